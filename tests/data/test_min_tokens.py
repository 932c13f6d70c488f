"""Documents left out by length: which ones, on which side of the split, and when interrupted."""

import json
from functools import partial
from pathlib import Path

import pytest
from prepare_parts import (
    SMALL,
    command,
    contents,
    make_texts,
    read_back,
    texts,  # noqa: F401
    tokenizer,  # noqa: F401
    write_jsonl,
)

from smol.data.card import identity, read_card
from smol.data.documents import Files, Piece, Shard
from smol.data.prepare import PrepareSettings, prepare
from smol.data.tokenizer import load_tokenizer
from smol.errors import UserError

AT_LEAST = 100  # tokens; about half of the texts
LONG = PrepareSettings(held_out=0.1, chunk_tokens=3000, min_tokens=AT_LEAST)
SHARD_BYTES = 20_000
quiet = partial(prepare, workers=0, log=lambda line: None)


@pytest.fixture
def by_length(tmp_path, texts) -> Files:
    """Texts in order of length, so that whole shards have nothing that is long enough."""
    return Files(
        (str(write_jsonl(tmp_path / "in.jsonl", sorted(texts, key=len))),), shard_bytes=SHARD_BYTES
    )


def test_what_is_left_is_long_and_on_the_side_where_it_was(tmp_path, by_length, texts, tokenizer):
    loaded, lines = load_tokenizer(tokenizer), []
    quiet(by_length, tmp_path / "all", tokenizer, SMALL)
    card = quiet(by_length, tmp_path / "long", tokenizer, LONG, log=lines.append)
    left_out = 0
    for split in ("train", "held_out"):
        everything = read_back(tmp_path / "all", split, loaded)
        long = [text for text in everything if len(loaded.encode(text)) + 1 >= AT_LEAST]
        assert 0 < len(long) < len(everything)
        assert sorted(read_back(tmp_path / "long", split, loaded)) == sorted(long)
        assert card.documents[split] == len(long)
        assert card.bytes[split] == sum(len(text.encode()) for text in long)
        left_out += len(everything) - len(long)
    assert f"left out {left_out:,} documents of fewer than {AT_LEAST} tokens." in lines[0]
    assert card.settings["min_tokens"] == AT_LEAST
    numbers = {int(chunk.file.split("-")[1]) for chunk in card.chunks["train"]}
    assert min(numbers) > 0, "the first shard has a document that is long enough"


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_matter(tmp_path, by_length, tokenizer, workers):
    quiet(by_length, tmp_path / "a" / "out", tokenizer, LONG)
    quiet(by_length, tmp_path / "b" / "out", tokenizer, LONG, workers=workers)
    assert contents(tmp_path / "a" / "out") == contents(tmp_path / "b" / "out")


class Failing:
    """A source that cannot read one of its shards."""

    def __init__(self, source: Files, number: int):
        self.source, self.number = source, number

    def shards(self) -> list[Shard]:
        shards = self.source.shards()
        shards[self.number] = Shard((Piece("x", 1),), self._fail)
        return shards

    def _fail(self, piece: Piece):
        raise UserError("the disk is gone")
        yield

    def settings(self):
        return self.source.settings()

    def inputs(self):
        return self.source.inputs()


def test_interrupted_and_run_again_equals_uninterrupted(tmp_path, by_length, tokenizer):
    Failing.__name__ = "Files"  # the card tells the class
    out, count, lines = tmp_path / "out", len(by_length.shards()), []
    with pytest.raises(UserError, match="the disk is gone"):
        quiet(Failing(by_length, count - 1), out, tokenizer, LONG)
    manifests = sorted((out / ".work").glob("shard-*.json"))
    empty = [path for path in manifests if not json.loads(path.read_text())["chunks"]]
    assert empty, "no shard was empty"
    assert len(manifests) == count - 1
    quiet(by_length, out, tokenizer, LONG, log=lines.append)
    assert f"resuming, {count - 1} of {count} shards done" in lines[0]
    quiet(by_length, tmp_path / "whole" / "out", tokenizer, LONG)
    assert contents(out) == contents(tmp_path / "whole" / "out")


def test_without_a_limit_the_data_keeps_its_identity(tmp_path, by_length, tokenizer):
    """The settings as they were before there was a limit, written out."""
    card = quiet(by_length, tmp_path / "out", tokenizer, SMALL)
    documents = {
        "source": "Files", "format": "auto", "field": "text", "separator": None,
        "shard_bytes": SHARD_BYTES,
    }  # fmt: skip
    settings = {
        "held_out": 0.1, "shuffle": True, "seed": 0, "chunk_tokens": 3000, "dtype": "uint16",
        "documents": documents,
    }  # fmt: skip
    assert card.settings == settings
    assert card.digest == identity(card.chunks, card.tokenizer, settings)
    with pytest.raises(UserError, match="settings min_tokens = None, now it is 100"):
        quiet(by_length, tmp_path / "out", tokenizer, LONG)


def test_mistakes_are_one_line(tmp_path, by_length, tokenizer):
    with pytest.raises(UserError, match="min_tokens is -1, expected 0 or more"):
        PrepareSettings(min_tokens=-1)
    nothing = PrepareSettings(min_tokens=10_000)
    with pytest.raises(UserError, match=r"no documents .* 600 are shorter than min_tokens 10000"):
        quiet(by_length, tmp_path / "out", tokenizer, nothing)
    assert not (tmp_path / "out" / "card.json").exists()


def test_command_line(tmp_path: Path):
    write_jsonl(tmp_path / "in.jsonl", make_texts(200))
    words = ["--documents", "in.jsonl", "--output", "out", "--tokenizer", "tok", "--workers", "1"]
    done = command(
        *words, "--vocab_size", "512", "--held_out", "0.1", "--min_tokens", "80", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    card = read_card(tmp_path / "out")
    assert card.settings["min_tokens"] == 80
    kept = sum(card.documents.values())
    assert 0 < kept < 200
    assert f"left out {200 - kept} documents of fewer than 80 tokens" in done.stdout
