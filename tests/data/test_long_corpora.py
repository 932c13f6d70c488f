"""Long documents of the embedded corpora: what they hold, and on which side of the split."""

import re
from itertools import islice

import pytest
from maths_parts import check_steps, solve
from prepare_parts import make_texts, read_back, texts, tokenizer, write_jsonl  # noqa: F401

from smol.data.card import read_card
from smol.data.corpora import HELD_OUT, LONG_MATHS, MATHS_PROBLEMS, ensure_embedded
from smol.data.corpora import documents as corpus
from smol.data.corpora.long_maths import documents
from smol.data.corpora.maths import problems
from smol.data.tokenizer import load_tokenizer

OPENING, CLOSING = "Opening balances in dollars:", "Closing balances:"
PAYMENT = re.compile(
    r"Payment (\d+): (\w+) pays (\w+) (\d+) dollars\. "
    r"(\w+): (\d+) - (\d+) = (\d+)\. (\w+): (\d+) \+ (\d+) = (\d+)\."
)


@pytest.fixture(scope="module")
def long_maths() -> list[str]:
    return list(documents(60, after=500))


def split_worksheet(text: str) -> tuple[list[str], list[list[str]]]:
    """Return the questions and, for each, the lines of its solution; numbers must be in order."""
    head, *parts = re.split(r"^Solution (\d+):\n", text, flags=re.MULTILINE)
    questions = re.findall(r"^Problem (\d+): (.*)\n", head, flags=re.MULTILINE)
    expected = [str(i + 1) for i in range(len(questions))]
    assert [number for number, _ in questions] == expected == parts[::2]
    return [question for _, question in questions], [part.splitlines() for part in parts[1::2]]


def test_worksheets_are_right_and_solutions_repeat_no_question(long_maths):
    for text in long_maths[::2]:
        questions, solutions = split_worksheet(text)
        assert len(questions) >= 3
        for question, (*steps, answer) in zip(questions, solutions, strict=True):
            assert answer == f"Answer: {solve(question)}"
            check_steps(steps)
            assert question not in "\n".join(steps)


def test_ledgers_are_right(long_maths):
    """Replayed from the opening balances alone."""
    for text in long_maths[1::2]:
        lines = text.splitlines()
        closing = lines.index(CLOSING)
        people = lines[1:closing].index(next(x for x in lines if x.startswith("Payment"))) + 1
        assert lines[0] == OPENING
        balance = {n: int(v) for n, v in (line.split(": ") for line in lines[1:people])}
        total = sum(balance.values())
        for i, line in enumerate(lines[people:closing], 1):
            number, payer, payee, amount, a, before, minus, after, b, *second = PAYMENT.fullmatch(
                line
            ).groups()
            assert (int(number), a, b) == (i, payer, payee)
            assert amount == minus == second[1]
            assert [int(before), int(second[0])] == [balance[payer], balance[payee]]
            balance[payer] -= int(amount)
            balance[payee] += int(amount)
            assert [int(after), int(second[2])] == [balance[payer], balance[payee]]
            assert min(balance.values()) >= 0
        assert lines[closing + 1 : -1] == [f"{name}: {value}" for name, value in balance.items()]
        assert lines[-1].endswith(f": {total}")
        assert sum(balance.values()) == total


def test_a_worksheet_has_no_question_in_common_with_another_corpus(long_maths):
    short = {problem.question for problem in problems(500)}
    seen = [question for text in long_maths[::2] for question in split_worksheet(text)[0]]
    assert len(set(seen)) == len(seen)
    assert not short.intersection(seen)
    following = (problem.question for problem in islice(problems(None), 500, None))
    assert seen == list(islice(following, len(seen)))


def test_long_maths_depends_on_the_seed_alone_and_is_of_all_lengths(long_maths):
    assert list(documents(20, after=500)) == long_maths[:20]
    assert list(documents(4, after=500, seed=1)) != long_maths[:4]
    whole = list(corpus("long_maths"))
    assert len(set(whole)) == len(whole) == LONG_MATHS
    # A token of maths is about two characters.
    for characters, share in [(2 * 256, 0.9), (2 * 2048, 0.35), (2 * 4096, 0.2), (2 * 8192, 0.05)]:
        for kind in (whole[::2], whole[1::2]):
            assert sum(len(text) > characters for text in kind) > share * len(kind)
    asked = {question for text in whole[::2] for question in split_worksheet(text)[0]}
    assert not asked.intersection(p.question for p in problems(MATHS_PROBLEMS))


@pytest.fixture
def home(tmp_path, tokenizer):
    """A folder of corpora with its tokenizer and raw documents, and nothing prepared."""
    (tmp_path / "raw").mkdir()
    for seed, name in enumerate([*HELD_OUT, "long_maths"]):
        write_jsonl(tmp_path / "raw" / f"{name}.jsonl", make_texts(400, seed))
    (tmp_path / "tokenizer").symlink_to(tokenizer)
    return tmp_path


def prepare(home, *names: str) -> dict:
    paths = [home / name for name in names]
    return ensure_embedded(home, 512, workers=0, log=lambda line: None, paths=paths)


def test_only_what_is_asked_for_is_prepared(home, monkeypatch):
    monkeypatch.setenv("SMOL_ROOT", str(home.parent))
    paths = ["s3://bucket/prose", "elsewhere/prose", f"{home.name}/mine", f"{home.name}/code"]
    made = ensure_embedded(home, 512, workers=0, log=lambda line: None, paths=paths)
    assert made == {"code": home / "code"}
    assert prepare(home, "long_60/maths", "code") == {
        "long_60/maths": home / "long_60" / "maths", "code": home / "code",
    }  # fmt: skip
    assert sorted(card.parent for card in home.rglob("card.json")) == [
        home / "code", home / "long_60" / "maths",
    ]  # fmt: skip
    assert read_card(home / "long_60" / "maths").name == "long_60/maths"
    assert prepare(home, "long_60/poems", "prose/") == {"prose": home / "prose"}


@pytest.mark.parametrize("name", ["prose", "code"])
def test_held_out_text_of_long_documents_is_in_no_training_part(home, name):
    """What another context saw, too; the base model may have been trained on it."""
    prepare(home, name, f"long_60/{name}", f"long_120/{name}")
    loaded = load_tokenizer(home / "tokenizer")
    folders = [home / name, home / "long_60" / name, home / "long_120" / name]
    train, held_out = (
        [set(read_back(folder, split, loaded)) for folder in folders]
        for split in ("train", "held_out")
    )
    for parts in (train, held_out):
        assert parts[0] > parts[1] > parts[2] > set()
    assert not set.union(*train) & set.union(*held_out)
    for more_than, longer, all_of_them in [(60, 1, 0), (120, 2, 1)]:
        for parts in (train, held_out):
            assert parts[longer] == {
                text for text in parts[all_of_them] if len(loaded.encode(text)) + 1 > more_than
            }


def test_long_maths_has_the_same_split_at_every_length(home):
    prepare(home, "long_60/maths", "long_120/maths")
    loaded = load_tokenizer(home / "tokenizer")
    for split in ("train", "held_out"):
        some, fewer = (
            set(read_back(home / f"long_{n}" / "maths", split, loaded)) for n in (60, 120)
        )
        assert some > fewer > set()
