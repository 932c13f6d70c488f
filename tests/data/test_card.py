"""The card of a prepared source, and what is found out when it or a chunk was changed."""

import json
import os
import shutil
from copy import deepcopy
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest
from prepare_parts import (
    SMALL,
    command,
    texts,  # noqa: F401
    tokenizer,  # noqa: F401
    write_jsonl,
)

from smol.data.card import read_card, verify
from smol.data.prepare import prepare
from smol.errors import UserError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, texts, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("data")
    source = write_jsonl(folder / "in.jsonl", texts)
    prepare(source, folder / "out", tokenizer, SMALL, workers=0, log=lambda line: None)
    return folder / "out"


def test_no_card(tmp_path):
    with pytest.raises(UserError, match=r"has no card\.json: run python src/prepare\.py"):
        read_card(tmp_path)


def test_every_damaged_chunk_is_told(tmp_path, prepared):
    out = shutil.copytree(prepared, tmp_path / "out")
    card = read_card(out)
    assert verify(out) == []
    corrupt, cut, lost = (out / "train" / chunk.file for chunk in card.chunks["train"][:3])
    size = cut.stat().st_size
    with open(corrupt, "r+b") as stream:
        stream.seek(500)
        byte = stream.read(1)[0] ^ 1
        stream.seek(500)
        stream.write(bytes([byte]))
    os.truncate(cut, size - 2)
    lost.unlink()
    for line, words in zip(
        verify(out),
        [f"{corrupt} is corrupt", f"{cut} has {size - 2} bytes", f"{lost} is missing"],
        strict=True,
    ):
        assert words in line
        assert "\n" not in line
    with pytest.raises(UserError, match="is a URL, expected a local folder"):
        verify("memory://out")
    (out / "card.json").write_text("{")
    with pytest.raises(UserError, match="not a readable card"):
        read_card(out)


def _leaves(tree, path=()):
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, dict | list):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key)


def test_an_edited_card_is_refused_whatever_was_edited(tmp_path, prepared):
    whole = json.loads((prepared / "card.json").read_text())
    file = tmp_path / "card.json"
    file.write_text(json.dumps(whole))  # another layout of the same content
    assert read_card(tmp_path) == read_card(prepared)
    paths = [path for path in _leaves(whole) if path != ("format",)]
    assert ("chunks", "train", 0, "tokens") in paths
    for path in paths:
        edited = deepcopy(whole)
        *above, last = path
        node = reduce(getitem, above, edited)
        node[last] = node[last] + 1 if isinstance(node[last], int) else f"{node[last]}0"
        file.write_text(json.dumps(edited))
        with pytest.raises(
            UserError, match=r"card\.json was changed since it was written"
        ) as error:
            read_card(tmp_path)
        assert "\n" not in str(error.value)
    del whole["sha256"]
    file.write_text(json.dumps(whole))  # as early ones were
    assert read_card(tmp_path) == read_card(prepared)


def test_verify_tells_all_that_is_wrong(tmp_path, prepared):
    whole, broken = (shutil.copytree(prepared, tmp_path / name) for name in ("whole", "broken"))
    done = command("--verify", "whole", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "whole: whole.\n", "")
    lost = sorted((broken / "train").glob("*.bin"))[:2]
    for file in lost:
        file.unlink()
    done = command("--verify", "broken", "none", whole, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == f"{whole}: whole.\n"
    first, second, third = done.stderr.splitlines()
    assert first.startswith(f"error: chunk broken/train/{lost[0].name} is missing")
    assert second.startswith(f"error: chunk broken/train/{lost[1].name} is missing")
    assert third.startswith("error: none has no card.json")
