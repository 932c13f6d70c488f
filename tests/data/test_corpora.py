"""The embedded corpora: what they hold, and that the maths is right."""

import json
import re
import time
from fractions import Fraction

import pytest

from smol.data.card import read_card, verify
from smol.data.corpora import ensure_embedded, maths
from smol.data.corpora.code import is_table
from smol.data.corpora.prose import is_prose, module_paragraphs, paragraphs
from smol.data.tokenizer import load_tokenizer
from smol.errors import UserError

# Each unit in the smallest one of its kind.
SIZES = {
    "kilometres": 10**6, "metres": 1000, "centimetres": 10, "millimetres": 1,
    "kilograms": 1000, "grams": 1, "litres": 1000, "millilitres": 1,
    "weeks": 604800, "days": 86400, "hours": 3600, "minutes": 60, "seconds": 1,
}  # fmt: skip


def solve(question: str) -> str:
    """Answer a problem from its words alone, by other means than the generator's."""
    n = [int(number) for number in re.findall(r"(?<![\w)])-?\d+", question)]
    if found := re.fullmatch(r"What is (\d+) ([-+*]) (\d+)\?", question):
        a, sign, b = found.groups()
        return str({"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[sign](int(a), int(b)))
    if question.startswith("Divide"):
        return f"{n[0] // n[1]} remainder {n[0] % n[1]}"
    if found := re.fullmatch(r"Solve for x: (\d+)x ([-+]) (\d+) = (-?\d+)", question):
        a, sign, b, c = found.groups()
        b = int(sign + b)
        (root,) = [x for x in range(-100, 101) if int(a) * x + b == int(c)]
        return f"x = {root}"
    if "%" in question:
        return f"{n[0] * n[1] / 100:.2f}".rstrip("0").rstrip(".")
    if found := re.fullmatch(r"Calculate (\S+) ([-+]) (\S+) in lowest terms\.", question):
        a, sign, b = Fraction(found[1]), found[2], Fraction(found[3])
        return str(a + b if sign == "+" else a - b)
    if question.startswith("What comes next"):
        if n[1] - n[0] == n[2] - n[1]:
            return str(2 * n[3] - n[2])
        return str(n[3] * n[3] // n[2])
    if found := re.fullmatch(r"How many (\w+) are (\d+) (\w+)\?", question):
        to, count, of = found[1], int(found[2]), found[3]
        return f"{count * SIZES[of] // SIZES[to]} {to}"
    if "buys" in question:
        return str(n[2] - n[0] * n[1])
    if "shares the rest" in question:
        return str((n[0] - n[1]) // n[2])
    if "travels" in question:
        total = n[0] * n[1] + n[2] * n[3]
        return f"{total} km, {Fraction(total, n[0] + n[2])} km per hour"
    times, total = n
    return str(total - total // (times + 1))


def test_maths_is_right():
    kinds = set()
    for problem in maths.problems(2600, seed=1):
        kinds.add(problem.kind)
        assert problem.answer == solve(problem.question), problem.text
        assert problem.text.endswith(f"\nAnswer: {problem.answer}\n")
        check_steps(problem)
    assert kinds == set(maths.KINDS)


def check_steps(problem) -> None:
    """Evaluate every ``a op b ... = c`` that the solution states."""
    number = r"\(?-?\d+(?:\.\d+)?\)?"
    result = r"-?\d+(?:\.\d+)?(?:/\d+)?"
    stated = re.compile(rf"(?<![\w.])({number}(?: [-+*/] {number})+) = ({result})")
    checked = 0
    for step in problem.steps:
        for left, right in stated.findall(step):
            exact = re.sub(r"\d+(?:\.\d+)?", r"Fraction('\g<0>')", left)
            assert eval(exact, {"Fraction": Fraction}) == Fraction(right), (step, problem.text)
            checked += 1
    assert checked or "borrow" in problem.text, problem.text


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
    folders = ensure_embedded(tmp_path, vocab_size=2048, workers=2, log=lines.append)
    assert list(folders) == ["prose", "code", "maths"]
    assert len(lines) == 4
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert tokenizer.vocab_size == 2048
    for name, folder in folders.items():
        card = verify(folder)
        assert card.name == name
        assert card.tokens["train"] > 1_000_000
        assert card.documents["held_out"] >= 10
        assert all(chunk.tokens > 300_000 for chunk in card.chunks["train"])
        assert 1.5 < card.bytes["train"] / card.tokens["train"] < 6
        lines_of = (tmp_path / "raw" / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
        raw = [json.loads(line)["text"] for line in lines_of if line]
        assert len(set(raw)) == len(raw) == sum(card.documents.values())
    digests = {name: read_card(folder).digest for name, folder in folders.items()}
    started = time.monotonic()
    assert ensure_embedded(tmp_path, 2048, log=lines.append) == folders
    assert time.monotonic() - started < 2
    assert len(lines) == 4, "nothing is said where nothing is done"
    (folders["maths"] / "card.json").unlink()
    for split in ("train", "held_out"):
        for path in (folders["maths"] / split).iterdir():
            path.unlink()
        (folders["maths"] / split).rmdir()
    ensure_embedded(tmp_path, 2048, workers=1, log=lines.append)
    assert {name: read_card(folder).digest for name, folder in folders.items()} == digests
    with pytest.raises(UserError, match="has 2048 tokens, expected 4096"):
        ensure_embedded(tmp_path, 4096)
