"""Texts, files and a tokenizer for the tests of preparation."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from smol.data.prepare import PrepareSettings
from smol.data.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]
WORDS = ["the", "river", "ran", "over", "dark", "stones", "while", "a", "small", "7", "ünder"]
SMALL = PrepareSettings(held_out=0.1, chunk_tokens=3000)


def make_texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [
        f"Document {i}. " + " ".join(rng.choices(WORDS, k=rng.randint(5, 120)))
        for i in range(count)
    ]


def write_jsonl(path: Path, texts: list[str], opener=open, field: str = "text") -> Path:
    with opener(path, "wt", encoding="utf-8") as stream:
        for i, text in enumerate(texts):
            stream.write(json.dumps({"id": i, field: text}) + "\n")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def read_back(folder: Path, split: str, tokenizer) -> list[str]:
    """Read the documents with numpy alone: header, ids, one end-of-text id per document."""
    card = json.loads((folder / "card.json").read_text())
    documents = []
    for chunk in card["chunks"][split]:
        data = (folder / split / chunk["file"]).read_bytes()
        assert list(np.frombuffer(data[:12], "<u4")) == [1, 12, len(data)]
        ids = np.frombuffer(data[12:], {"uint16": "<u2", "int32": "<i4"}[card["dtype"]])
        assert ids[-1] == tokenizer.eos_id, "a chunk ends where a document ends"
        ends = np.flatnonzero(ids == tokenizer.eos_id)
        documents += [tokenizer.decode(part[part != 0]) for part in np.split(ids, ends)[:-1]]
    return documents


def command(*words: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run ``prepare.py`` with ``cwd`` as project root."""
    return subprocess.run(
        [sys.executable, str(ROOT / "src/prepare.py"), *map(str, words)],
        cwd=cwd,
        env=os.environ | {"SMOL_ROOT": str(cwd)},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return make_texts(600)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, texts) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(texts, folder, 512)
    return folder


def all_texts(source) -> list[str]:
    return [text for shard in source.shards() for text in shard]
