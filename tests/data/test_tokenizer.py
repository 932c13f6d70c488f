"""The tokenizer: lossless, the same every time, and what transformers makes of its folder."""

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smol.data.tokenizer import load_tokenizer, train_tokenizer
from smol.errors import UserError

TEXTS = [
    "The quick brown fox, 1234 times over the lazy dog.\n",
    "def f(x):\n    return x + 1\n",
] * 50
CHAT = "<|im_start|>user\nhi<|im_end|>\n<think>\n42</think>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, folder, 384)
    return folder


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(codec="utf-8")))
def test_round_trip(folder, text):
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_vocabulary_is_exactly_as_asked(tmp_path, folder):
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == (384, 0, None)
    few = train_tokenizer(["aa"], tmp_path, 512)
    assert few.vocab_size == 512
    with pytest.raises(UserError, match=r"vocab_size is 1000.*--vocab_size 1024"):
        train_tokenizer(TEXTS, tmp_path, 1000)
    with pytest.raises(UserError, match=r"at least 384: try --vocab_size 384"):
        train_tokenizer(TEXTS, tmp_path, 128)


def test_special_tokens_only_where_asked(folder):
    tokenizer = load_tokenizer(folder)
    as_text = tokenizer.encode("<|endoftext|><|im_end|>")
    assert not {0, 1, 2, 3} & set(as_text)
    assert tokenizer.encode("<|endoftext|><|im_end|>", special_tokens=True) == [0, 2]
    assert tokenizer.encode("<|endoftext|>") == tokenizer.encode("<|endoftext|>")
    ids = tokenizer.encode(CHAT, special_tokens=True)
    assert tokenizer.decode(ids) == CHAT
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nhi\n<think>\n42</think>"


def test_digits_stand_alone(folder):
    tokenizer = load_tokenizer(folder)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("1234")] == list("1234")


def test_transformers_reads_the_folder(folder):
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(str(folder)), load_tokenizer(folder)
    for text in [*TEXTS[:2], CHAT, "  ünïcode 🦉\n\n"]:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ids == ours.encode(text, special_tokens=True)
        assert theirs.decode(ids) == text
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id) == (0, 3, None)
    assert len(theirs) == ours.vocab_size


def test_training_is_the_same_in_every_process(tmp_path, folder):
    script = (
        "import sys; from smol.data.tokenizer import train_tokenizer\n"
        f"texts = {TEXTS!r}\n"
        "train_tokenizer(texts, sys.argv[1], 384)"
    )
    for seed, threads in [("1", "1"), ("2", "2")]:
        out = tmp_path / seed
        environment = {**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads}
        subprocess.run([sys.executable, "-c", script, str(out)], check=True, env=environment)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (out / name).read_bytes() == (folder / name).read_bytes()


def test_digest_is_of_the_content(tmp_path, folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {
        "direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content, sort_keys=True))
    moved = load_tokenizer(tmp_path)
    assert moved.digest == load_tokenizer(folder).digest
    assert len(moved.encode("a long text " * 9)) > 5, "a saved truncation is not applied"
    content["added_tokens"][5]["content"] = "<|other|>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(tmp_path).digest != moved.digest


def test_mistakes_are_told_in_one_line(tmp_path, folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"has no tokenizer\.json: train one with"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="has no end-of-text token: expected '<eod>'"):
        load_tokenizer(folder, eos_token="<eod>")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is not a tokenizer"):
        load_tokenizer(tmp_path)
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="has no end-of-text token: expected one of") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
