"""The embedded corpora: what they hold, and that the maths is right."""

import json
import time

import pytest
from maths_parts import check_steps, solve

from smol.data.card import read_card, verify
from smol.data.corpora import ensure_embedded, maths
from smol.data.corpora.code import is_table
from smol.data.corpora.prose import is_prose, module_paragraphs, paragraphs
from smol.data.tokenizer import load_tokenizer
from smol.errors import UserError


def test_maths_is_right():
    kinds = set()
    for problem in maths.problems(2600, seed=1):
        kinds.add(problem.kind)
        assert problem.answer == solve(problem.question), problem.text
        assert problem.text.endswith(f"\nAnswer: {problem.answer}\n")
        check_steps(problem.steps)
    assert kinds == set(maths.KINDS)


def test_maths_depends_on_the_seed_alone():
    first = list(maths.documents(300, seed=5))
    assert first == list(maths.documents(300, seed=5))
    assert first != list(maths.documents(300, seed=6))
    assert first[:100] == list(maths.documents(100, seed=5))
    assert len(set(first)) == 300


def test_prose_keeps_sentences_and_drops_the_rest(tmp_path):
    sentence = "This function returns the number of items that are in the list, and it is not slow."
    assert paragraphs(f"{sentence}\n\n>>> f([1])\n1\n\nx : int\n\n    {sentence.upper()}") == [
        sentence,
        sentence.upper(),
    ]
    assert paragraphs("Use :class:`~a.b.Thing` or ``x`` as in `the docs <http://d.io>`_, so that "
                      "the result\nof it is **not** lost.") == [
        "Use Thing or x as in the docs, so that the result of it is not lost."
    ]  # fmt: skip
    assert not is_prose("Copyright " + sentence)
    assert not is_prose("0.1 0.2 0.3 " * 20)
    assert not is_prose("tensor shape dtype device layout stride numel " * 5)
    module = tmp_path / "m.py"
    docstring = f'"""{sentence}\n\n    {sentence}\n    """'
    module.write_text(f'"""Short."""\nimport does_not_exist\ndef f():\n    {docstring}\n')
    assert module_paragraphs(str(module)) == [sentence, sentence]
    module.write_text("def broken(:\n")
    assert module_paragraphs(str(module)) == []


def test_tables_are_not_code():
    assert is_table("table = (\n" + "    0x00e0, 0x00e1, 7, 9,\n" * 50 + ")\n")
    assert not is_table("def area(width, height):\n    return 2 * width * height\n")


@pytest.mark.slow
def test_ensure_embedded(tmp_path):
    """The whole default set-up, as a first run makes it, then again."""
    lines: list[str] = []

    def log(line: str) -> None:
        if "of the input" not in line:  # progress, every ten seconds on a slow machine
            lines.append(line)

    folders = ensure_embedded(tmp_path, vocab_size=2048, workers=2, log=log)
    assert list(folders) == ["prose", "code", "maths"]
    assert len(lines) == 4
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert tokenizer.vocab_size == 2048
    for name, folder in folders.items():
        assert verify(folder) == []
        card = read_card(folder)
        assert card.name == name
        assert card.tokens["train"] > 1_000_000
        assert card.documents["held_out"] >= 10
        assert all(chunk.tokens > 300_000 for chunk in card.chunks["train"])
        assert 1.5 < card.bytes["train"] / card.tokens["train"] < 6
        lines_of = (tmp_path / "raw" / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
        raw = [json.loads(line)["text"] for line in lines_of if line]
        assert len(set(raw)) == len(raw) == sum(card.documents.values())
    long = [tmp_path / f"long_2048/{name}" for name in folders]
    for name, folder in ensure_embedded(tmp_path, 2048, log=log, paths=long).items():
        card = read_card(folder)
        assert card.settings["min_tokens"] == 2049
        assert card.tokens["train"] > 200_000
        assert card.tokens["held_out"] > 2 * 2048, f"{name} cannot be evaluated at twice that"
    assert len(lines) == 4 + 2 * 3
    del lines[4:]
    digests = {name: read_card(folder).digest for name, folder in folders.items()}
    started = time.monotonic()
    assert ensure_embedded(tmp_path, 2048, log=log) == folders
    assert time.monotonic() - started < 2
    assert len(lines) == 4, "nothing is said where nothing is done"
    (folders["maths"] / "card.json").unlink()
    for split in ("train", "held_out"):
        for path in (folders["maths"] / split).iterdir():
            path.unlink()
        (folders["maths"] / split).rmdir()
    ensure_embedded(tmp_path, 2048, workers=1, log=log)
    assert {name: read_card(folder).digest for name, folder in folders.items()} == digests
    with pytest.raises(UserError, match="has 2048 tokens, expected 4096"):
        ensure_embedded(tmp_path, 4096)
