"""Token streams: the same whatever the workers, the interruptions and the reader."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepare_parts import (
    ROOT,
    SMALL,
    all_texts,
    command,
    contents,
    make_texts,
    read_back,
    texts,  # noqa: F401
    tokenizer,  # noqa: F401
    write_jsonl,
)

from smol.data.card import read_card
from smol.data.chunks import ChunkWriter
from smol.data.documents import Files, Piece, Shard
from smol.data.prepare import PrepareSettings, prepare, sample_texts
from smol.data.tokenizer import load_tokenizer
from smol.errors import UserError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, texts, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("data")
    source = Files((str(write_jsonl(folder / "in.jsonl", texts)),), shard_bytes=60_000)
    assert len(source.shards()) > 3
    prepare(source, folder / "out", tokenizer, SMALL, workers=0, log=lambda line: None)
    return folder / "out"


def test_every_document_comes_back(prepared, texts, tokenizer):
    loaded = load_tokenizer(tokenizer)
    train = read_back(prepared, "train", loaded)
    held_out = read_back(prepared, "held_out", loaded)
    assert sorted(train + held_out) == sorted(texts)
    assert train != [text for text in texts if text in set(train)], "the order is shuffled"
    assert len(held_out) in range(30, 95)  # a tenth of 600, four standard deviations around


def test_split_is_by_hash_alone(prepared, tokenizer):
    loaded = load_tokenizer(tokenizer)
    for split in ("train", "held_out"):
        for text in read_back(prepared, split, loaded):
            share = int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64
            assert (share < 0.1) == (split == "held_out")


def test_card_equals_a_recount(prepared, tokenizer):
    card, loaded = read_card(prepared), load_tokenizer(tokenizer)
    for split in ("train", "held_out"):
        documents = read_back(prepared, split, loaded)
        assert card.documents[split] == len(documents)
        assert card.bytes[split] == sum(len(text.encode()) for text in documents)
        assert card.tokens[split] == sum(len(loaded.encode(text)) + 1 for text in documents)
        assert card.documents[split] == sum(chunk.documents for chunk in card.chunks[split])
    assert card.tokenizer == {
        "digest": loaded.digest, "vocab_size": 512, "eos_id": 0, "bos_id": None
    }  # fmt: skip
    assert card.settings["chunk_tokens"] == 3000
    assert not list(prepared.rglob("*.part"))
    assert not (prepared / ".work").exists()


@pytest.mark.parametrize("vocab", ["uint16", "int32"])
def test_litdata_reads_the_same_tokens(tmp_path, monkeypatch, texts, tokenizer, vocab):
    monkeypatch.setenv("LITDATA_DISABLE_VERSION_CHECK", "1")
    litdata = pytest.importorskip("litdata")
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    chosen = PrepareSettings(held_out=0.1, chunk_tokens=3000, dtype=vocab)
    card = prepare(source, tmp_path / "out", tokenizer, chosen, workers=0, log=lambda line: None)
    for split in ("train", "held_out"):
        folder = tmp_path / "out" / split
        dataset = litdata.StreamingDataset(
            str(folder), item_loader=litdata.TokensLoader(block_size=64), shuffle=False
        )
        seen = [block.tolist() for block in dataset]
        expected = []
        for chunk in card.chunks[split]:
            ids = np.fromfile(folder / chunk.file, vocab, offset=12)
            assert len(ids) == chunk.tokens
            expected += [ids[i : i + 64].tolist() for i in range(0, len(ids) - 63, 64)]
        assert seen == expected
        assert len(seen) > 5


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_output_does_not_depend_on_workers(tmp_path, prepared, texts, tokenizer, workers):
    source = Files((str(write_jsonl(tmp_path / "in.jsonl", texts)),), shard_bytes=60_000)
    prepare(source, tmp_path / "out", tokenizer, SMALL, workers=workers, log=lambda line: None)
    seen, expected = contents(tmp_path / "out"), contents(prepared)
    # The date of a file is among the inputs; everything else must agree.
    cards = [json.loads(files.pop("card.json")) for files in (seen, expected)]
    for card in cards:
        del card["inputs"]["digest"], card["sha256"]
    assert cards[0] == cards[1]
    assert seen == expected


def test_again_does_nothing_and_a_difference_is_refused(tmp_path, texts, tokenizer):
    source, out = write_jsonl(tmp_path / "in.jsonl", texts), tmp_path / "out"
    lines: list[str] = []
    run = partial(prepare, source, out, tokenizer, workers=0, log=lines.append)
    run(SMALL)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert run(SMALL) == read_card(out)
    assert "nothing to do" in lines[-1]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    other = PrepareSettings(held_out=0.1, chunk_tokens=2000)
    with pytest.raises(UserError, match=r"chunk_tokens = 3000, now it is 2000.*--overwrite"):
        run(other)
    run(other, overwrite=True)
    assert read_card(out).settings["chunk_tokens"] == 2000
    write_jsonl(source, [*texts, "one more"])
    with pytest.raises(UserError, match=r"inputs bytes = \d+, now it is \d+"):
        run(other)


@pytest.mark.parametrize("after", [0, 4])
def test_killed_and_run_again_equals_uninterrupted(tmp_path, tokenizer, after):
    """SIGKILL after so many finished shards; the second run keeps those and ends the same."""
    source, out = write_jsonl(tmp_path / "in.jsonl", make_texts(6000, seed=1)), tmp_path / "out"
    words = [
        sys.executable, str(ROOT / "src/prepare.py"), "--documents", str(source), "--output",
        str(out), "--tokenizer", str(tokenizer), "--shard_bytes", "200000", "--workers", "2",
        "--chunk_tokens", "60000", "--held_out", "0.05",
    ]  # fmt: skip
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60

    def finished() -> list[Path]:
        return sorted((out / ".work").glob("shard-*.json"))

    while not (out / ".work").exists() or len(finished()) < after:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.5)  # the orphaned workers leave by themselves
    assert not (out / "card.json").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in finished()}
    assert len(kept) >= after
    again = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    while again.poll() is None and (out / ".work").exists():
        for path in finished():
            if path.name in kept and path.exists():
                assert path.stat().st_mtime_ns == kept[path.name], "a finished shard was redone"
        time.sleep(0.02)
    said, _ = again.communicate()
    assert again.returncode == 0
    assert ("resuming" in said) == bool(kept)
    settings = PrepareSettings(held_out=0.05, chunk_tokens=60_000)
    files = Files((str(source),), shard_bytes=200_000)
    prepare(files, tmp_path / "whole" / "out", tokenizer, settings, workers=2, log=lambda x: None)
    assert contents(out) == contents(tmp_path / "whole" / "out")


def _die(piece: Piece):
    os._exit(9)
    yield piece.path


class Deadly:
    """A source whose reader kills the process that reads it."""

    def shards(self):
        return [Shard((Piece("x", 1),), _die)]

    def settings(self):
        return {}

    def inputs(self):
        return {}


def test_a_killed_worker_is_one_line(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"^out: a worker was killed .* fewer --workers"):
        prepare(Deadly(), tmp_path / "out", tokenizer, workers=1, log=lambda line: None)


def test_no_worker_outlives_a_parent_that_was_killed():
    script = (
        "import os, time\n"
        "from smol.data.corpora import _pool\n"
        "if __name__ == '__main__':\n"
        "    pool = _pool(1)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    pool.submit(time.sleep, 60)\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    worker = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_memory_url(tmp_path, texts, tokenizer, prepared):
    import fsspec

    with fsspec.open("memory://prepare-test/in.jsonl", "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    card = prepare(
        "memory://prepare-test/*.jsonl", tmp_path / "out", tokenizer, SMALL, workers=0,
        log=lambda line: None,
    )  # fmt: skip
    assert card.documents == read_card(prepared).documents
    assert card.bytes == read_card(prepared).bytes


def test_unusual_texts_survive(tmp_path, tokenizer):
    unusual = [
        "a <|endoftext|> that is only text <|im_start|>",
        "tabs\t\tand  two spaces \n\n\n lines\r\n",
        "数学 и 🦉 naïve e\u0301",
        "\x00\x01 control",
    ] * 2
    lines = [json.dumps({"text": text}) for text in [*unusual, "", "half \ud83d a pair"]]
    lines += ["", json.dumps({"text": None}), json.dumps({"text": "last, no newline"})]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    chosen = PrepareSettings(held_out=0)
    card = prepare(
        tmp_path / "in.jsonl", tmp_path / "out", tokenizer, chosen, workers=0, log=lambda x: None
    )
    seen = read_back(tmp_path / "out", "train", load_tokenizer(tokenizer))
    assert sorted(seen) == sorted([*unusual, "half \ufffd a pair", "last, no newline"])
    assert card.documents == {"train": 10, "held_out": 0}
    assert json.loads((tmp_path / "out/held_out/index.json").read_text())["chunks"] == []


BROKEN = {
    "missing": ("nothing.jsonl", None, r"no such file.*"),
    "near": ("in.jsnl", None, r"no such file.*Did you mean 'in.jsonl'"),
    "json": ("b.jsonl", '{"text": "a"}\n{"text": \n', r"b\.jsonl:2: broken JSON .*seen: \{"),
    "object": ("b.jsonl", "[1]\n", r"b\.jsonl:1: expected a JSON object per line, seen list"),
    "field": (
        "b.jsonl", '{"txt": "a", "id": 1}\n',
        r"b\.jsonl:1 has no field 'text', its fields are: 'txt', 'id'.*Did you mean 'txt'",
    ),
    "type": ("b.jsonl", '{"text": 3}\n', r"b\.jsonl:1: field 'text' holds int, expected text"),
    "empty": ("b.jsonl", "\n\n", r"no documents for training"),
    "suffix": ("b.bin", "x", r"cannot tell the format from its name"),
    "parquet": ("b.parquet", "not parquet", r"b\.parquet: not a readable parquet file"),
    "utf-8": ("b.txt", b"ab\xff", r"b\.txt: not UTF-8 \(byte 2 is 0xff\)"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("workers", [0, 1])
def test_mistakes_are_told_in_one_line(tmp_path, tokenizer, name, content, message, workers):
    write_jsonl(tmp_path / "in.jsonl", ["a"])
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        prepare(tmp_path / name, tmp_path / "o", tokenizer, workers=workers, log=lambda x: None)
    assert "\n" not in str(caught.value)


def test_line_number_behind_a_cut(tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl", make_texts(200))
    lines = path.read_text().splitlines(keepends=True)
    lines[170] = "{broken\n"
    path.write_text("".join(lines))
    with pytest.raises(UserError, match=r"in\.jsonl:171: broken JSON"):
        all_texts(Files((str(path),), shard_bytes=5000))


def test_wrong_settings_are_told(tmp_path, texts, tokenizer):
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    for wrong, message in [
        ({"held_out": 1.0}, "held_out is 1.0"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
        ({"dtype": "uint8"}, "dtype is 'uint8'"),
    ]:
        with pytest.raises(UserError, match=message):
            PrepareSettings(**wrong)
    assert PrepareSettings().dtype_for(65_536) == "uint16"
    assert PrepareSettings().dtype_for(65_537) == "int32"
    with pytest.raises(UserError, match=r"vocabulary of 128256 does not fit dtype uint16"):
        PrepareSettings(dtype="uint16").dtype_for(128_256)
    with pytest.raises(UserError, match="expected a local folder"):
        prepare(source, "s3://bucket/out", tokenizer)
    (tmp_path / "taken" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="neither a card nor an interrupted run"):
        prepare(source, tmp_path / "taken", tokenizer, workers=0)
    with pytest.raises(UserError, match=r"unknown format 'json'.*Did you mean 'jsonl'"):
        Files((str(source),), format="json").shards()


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=80),
    chunk_tokens=st.integers(1, 100),
    shuffle=st.booleans(),
)
def test_chunks_hold_whole_documents(tmp_path_factory, lengths, chunk_tokens, shuffle):
    folder = tmp_path_factory.mktemp("chunks")
    writer = ChunkWriter(folder, "chunk", chunk_tokens, shuffle)
    for number, length in enumerate(lengths):
        key = hashlib.sha256(b"%d" % number).digest()
        writer.add(np.array([number + 1] * (length - 1) + [0], "<u2"), key)
    chunks = writer.close()
    seen: list[list[int]] = []
    for chunk in chunks:
        ids = np.fromfile(folder / chunk.file, "<u2", offset=12)
        documents = np.split(ids, np.flatnonzero(ids == 0) + 1)[:-1]
        assert len(documents) == chunk.documents
        assert len(ids) == chunk.tokens <= 1.5 * chunk_tokens + 2 * max(lengths)
        seen += [document.tolist() for document in documents]
    expected = [[n + 1] * (length - 1) + [0] for n, length in enumerate(lengths)]
    assert (sorted(seen) if shuffle else seen) == (sorted(expected) if shuffle else expected)


def test_tokenizer_is_trained_on_every_shard_and_no_held_out_text(tmp_path, texts):
    source = Files((str(write_jsonl(tmp_path / "in.jsonl", texts)),), shard_bytes=30_000)
    sample = list(sample_texts(source, held_out=0.1, most_bytes=40_000))
    assert 40_000 < sum(len(text.encode()) for text in sample) < 50_000
    shares = [int(hashlib.sha256(t.encode()).hexdigest()[:16], 16) / 2**64 for t in sample]
    assert min(shares) >= 0.1
    assert all(set(shard) & set(sample) for shard in source.shards())


def test_command_line(tmp_path, texts):
    """From any folder, with a configuration file, a flag that wins over it, and mistakes."""
    write_jsonl(tmp_path / "in.jsonl", texts, field="body")
    (tmp_path / "c.yaml").write_text(
        "documents: [in.jsonl]\nfield: body\noutput: out\nheld_out: 0.1\ntokenizer: tok\n"
        "vocab_size: 512\nshuffle: false\nworkers: 1\nseed: 1\n"
    )
    done = command("--config", "c.yaml", "--seed", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    card = read_card(tmp_path / "out")
    assert (card.settings["seed"], card.settings["shuffle"]) == (2, False)
    assert sum(card.documents.values()) == len(texts)
    (tmp_path / "run.yaml").write_text("trainer: {max_steps: 3}")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    order = read_back(tmp_path / "out", "train", load_tokenizer(tmp_path / "tok"))
    assert order == [text for text in texts if text in set(order)]
    for words, message in [
        (["--outptu", "x"], "unrecognized arguments: --outptu x. Did you mean '--output'?"),
        (["--config", "c.yaml", "--field", "bdy", "--output", "o2"], "Did you mean 'body'?"),
        (["--config", "none.yaml"], "none.yaml: no such file."),
        (["--documents", "in.jsonl"], "--output is missing"),
        (["--output", ""], "--output is missing"),
        (["--output", "in.jsonl"], "--output is in.jsonl, a file: give the folder to write"),
        (
            ["--documents", "in.jsonl", "--tokenizer", "tok", "--output", "/dev/null/x"],
            "/dev/null/x: Not a directory",
        ),
        (["--output", "o", "--shard_bytes", "0"], "--shard_bytes is 0, expected 1 or more."),
        (["--output", "o", "--workers", "-1"], "--workers is -1, expected 0 or more."),
        (["--config", "run.yaml"], "run.yaml: trainer is a mapping, expected a value; is it of"),
        (["--config", "binary.yaml"], "binary.yaml: not YAML ('utf-8' codec can't decode byte"),
        (
            ["--documents", "in.jsonl", "--output", "o3"],
            "there is no data/tokenizer yet: train it on these documents with --vocab_size 4096",
        ),
    ]:
        done = command(*words, cwd=tmp_path)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs/data").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_data_config_is_parsed(path):
    import importlib.util

    spec = importlib.util.spec_from_file_location("prepare_script", ROOT / "src/prepare.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    arguments = script.build_parser().parse_args(script.flags_of(str(path)))
    assert arguments.output
    assert arguments.hub or arguments.documents
