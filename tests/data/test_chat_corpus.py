"""The generated chat corpus: answers that are right, held-out tasks that are held out."""

import json
import random
import re
from collections import Counter
from datetime import datetime, timedelta
from itertools import islice

import pytest

from smol.data.chat import default_template
from smol.data.conversation_tokens import SubsetConfig, read_conversations
from smol.data.corpora import chat
from smol.data.corpora.chat import conversation, ensure_chat, records
from smol.data.corpora.chat_tasks import KINDS, SPLITS, UNSEEN, check, contaminated, tasks
from smol.data.corpora.maths import UNITS
from smol.data.tokenizer import load_tokenizer

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()


def numbers(question):
    return [int(n) for n in re.findall(r"\d+", question)]


def items(question):
    return question.split(": ")[1].removesuffix("?").split(", ")


def letters(question):
    return question.split(": ")[1].removesuffix("?").split()


def weekday(question):
    start = DAYS.index(question.split()[2].removesuffix("."))
    return DAYS[(start + numbers(question)[0]) % 7]


def calendar(question):
    days, day = numbers(question)
    month = question.split()[-2]
    end = datetime.strptime(f"{month} {day} 2025", "%B %d %Y") + timedelta(days)
    return f"{end:%B} {end.day}"


def units(question):
    small, count, large = re.match(r"How many (\w+) are (\d+) (\w+)", question).groups()
    return int(count) * next(n for a, b, n in UNITS if (a, b) == (large, small))


def repetition(question):
    word, times, mark, other = re.match(
        r"Write (\w+) (\d+) times with (.) in between, then (\w+)", question
    ).groups()
    return f" {mark} ".join([word] * int(times)) + f" {other}"


# Answers worked out from the question alone.
SOLVERS = {
    "addition": lambda q: sum(numbers(q)),
    "subtraction": lambda q: numbers(q)[0] - numbers(q)[1],
    "more": lambda q: sum(numbers(q)),
    "fewer": lambda q: numbers(q)[0] - numbers(q)[1],
    "cost": lambda q: numbers(q)[0] * numbers(q)[1],
    "comparison": lambda q: "yes" if numbers(q)[0] > numbers(q)[1] else "no",
    "largest": lambda q: max(numbers(q)),
    "ordering": lambda q: ", ".join(map(str, sorted(numbers(q)))),
    "position": lambda q: items(q)[numbers(q)[0] - 1],
    "reversal": lambda q: " ".join(letters(q)[::-1]),
    "counting": lambda q: letters(q).count(q.split()[3]),
    "weekday": weekday,
    "calendar": calendar,
    "units": units,
    "capitals": lambda q: q.split(": ")[1].upper(),
    "repetition": repetition,
    "smallest": lambda q: min(numbers(q)),
    "doubling": lambda q: 2 * numbers(q)[0],
    "last_letter": lambda q: letters(q)[-1],
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return ensure_chat(tmp_path_factory.mktemp("embedded"), log=lambda line: None)


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("kind", [*KINDS, *UNSEEN])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_answers_are_right(kind, size):
    make = (KINDS | UNSEEN)[kind]
    for seed in range(60):
        question, _, answer = make(random.Random(seed), size)
        assert str(answer) == str(SOLVERS[kind](question)), question


def test_steps_hold_true_sums():
    for task in islice(tasks("train"), 2000):
        for left, right in re.findall(r"([\d+*/ -]+\d) = (\d+)", "\n".join(task.steps)):
            assert eval(left) == int(right), task


def test_tasks_depend_on_seed_and_number_alone():
    first = list(islice(tasks("train", seed=3), 50))
    assert list(islice(tasks("train", seed=3), 50)) == first
    assert list(islice(tasks("train", seed=4), 50)) != first


def test_held_out_is_held_out():
    trained = list(islice(tasks("train"), 8000))
    questions = {task.question for task in trained}
    assert {task.kind for task in trained} == set(KINDS)
    assert max(task.size for task in trained) == 2
    instances = list(islice(tasks("instances"), 800))
    assert not questions & {task.question for task in instances}
    assert {task.size for task in instances} == {1, 2}
    assert {task.size for task in islice(tasks("sizes"), 100)} == {3}
    assert {task.kind for task in islice(tasks("unseen"), 30)} == set(UNSEEN)


def test_tasks_to_evaluate_on_share_no_run_of_words_with_training(corpus):
    training = [
        message["content"].removesuffix(" /think").removesuffix(" /no_think")
        for name in (*chat.CONVERSATIONS, "reasoning")
        for record in read(corpus / f"{name}.jsonl")
        for message in record["messages"]
        if message["role"] == "user"
    ]
    seen = {f" {question} " for question in training}
    joined = "\n".join(seen)
    evaluated = read(corpus / "tasks.jsonl")
    for task in evaluated:
        words = task["question"].split()
        for i in range(max(1, len(words) - 12)):
            assert f" {' '.join(words[i : i + 13])} " not in joined
    counts = Counter((task["split"], task["kind"]) for task in evaluated)
    assert {split for split, _ in counts} == set(SPLITS[1:])
    assert min(counts.values()) >= 4
    assert len({task["question"] for task in evaluated}) == len(evaluated)


def test_contamination_is_found():
    long = " ".join(f"w{i}" for i in range(20))
    assert contaminated([long], [f"x {' '.join(long.split()[3:16])} y"]) == {long}
    assert contaminated([long], [f"x {' '.join(long.split()[3:15])} y"]) == set()
    assert contaminated(["a b"], ["x a b c"]) == {"a b"}
    assert contaminated(["a b"], ["x a c b"]) == set()


def test_check_accepts_the_answer_and_nothing_else():
    task = next(tasks("train"))
    for right in (task.answer, f" {task.answer}.\n", f"<think>\n1 + 1\n</think>\n{task.answer}"):
        assert check(task, right)
    for wrong in ("", f"{task.answer}0", f"It is {task.answer}", f"<think>\n{task.answer}"):
        assert not check(task, wrong)


def test_both_modes_answer_the_same_tasks(corpus):
    for thinking, direct in zip(
        read(corpus / "think.jsonl")[:500], read(corpus / "no_think.jsonl")[:500], strict=True
    ):
        assert thinking["tasks"] == direct["tasks"]
        for a, b in zip(thinking["messages"], direct["messages"], strict=True):
            assert a["content"] == b["content"]
            assert ("reasoning_content" in a) == (a["role"] == "assistant")
            assert "reasoning_content" not in b


def test_a_switched_conversation_is_rendered_in_the_modes_asked_for(corpus, sources):
    template = default_template(load_tokenizer(sources / "tokenizer"))
    switched = 0
    for made in islice(read_conversations(SubsetConfig(str(corpus / "switch.jsonl")), False), 200):
        text = template.render(made.messages, mode=made.mode)
        answers = [part.split("<|im_end|>")[0] for part in text.split("assistant\n")[1:]]
        mode = None
        turns = [m for m in made.messages if m["role"] != "system"]
        for user, answer in zip(turns[::2], answers, strict=True):
            flag = user["content"].rpartition(" /")[2]
            switched += mode is not None and flag in ("think", "no_think")
            mode = flag if flag in ("think", "no_think") else mode
            assert answer.startswith("<think>\n\n</think>\n") == (mode == "no_think")
    assert switched > 50


def test_conversations_carry_system_messages_now_and_then():
    made = list(records("think", 200))
    system = [record for record in made if record["messages"][0]["role"] == "system"]
    assert 15 < len(system) < 80


def test_flags_stand_where_the_mode_changes():
    turns = list(zip(islice(tasks("train"), 3), ["think", "think", "no_think"], strict=True))
    users = [m["content"] for m in conversation(turns, flags=True) if m["role"] == "user"]
    assert [user.split()[-1] for user in users[::2]] == ["/think", "/no_think"]
    assert not users[1].endswith("think")


def test_the_corpus_is_written_once(corpus, monkeypatch):
    monkeypatch.setattr(chat, "records", None)
    lines = []
    assert ensure_chat(corpus.parent, log=lines.append) == corpus
    assert lines == []
