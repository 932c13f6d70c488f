"""Tasks: from YAML and records to prompts."""

import shutil
from pathlib import Path

import pytest
from evaluation_parts import write_records

from smol.errors import UserError
from smol.evaluation.tasks import Task, known_tasks, load_task

TASKS = Path(__file__).parents[2] / "configs" / "tasks"
QUESTIONS = [
    {"q": f"{n} + {n}?", "options": [str(n), str(2 * n), "none"], "gold": 1, "even": n % 2 == 0}
    for n in range(1, 9)
]
FIELDS = {"prompt": "Q: {{ q }}\nA:", "choices": "options", "answer": "gold"}


@pytest.fixture
def data(tmp_path):
    return str(write_records(tmp_path / "questions.jsonl", QUESTIONS))


def test_a_cloze_and_a_lettered_prompt(data):
    cloze, lettered = (Task("t", kind, data, **FIELDS) for kind in ("cloze", "multiple_choice"))
    first, second = cloze.records()[:2]
    assert cloze.context(first, []) == "Q: 1 + 1?\nA:"
    assert cloze.answers(first) == (["1", "2", "none"], 1)
    assert cloze.context(first, [second]) == "Q: 2 + 2?\nA: 4\n\nQ: 1 + 1?\nA:"
    assert lettered.answers(first) == (["A", "B", "C"], 1)
    assert lettered.context(first, [second]) == (
        "Q: 2 + 2?\nA:\nA. 2\nB. 4\nC. none\nAnswer: B\n\n"
        "Q: 1 + 1?\nA:\nA. 1\nB. 2\nC. none\nAnswer:"
    )


def test_examples_are_drawn_with_a_seed_and_never_the_question(data):
    task = Task("t", "cloze", data, shots=3, **FIELDS)
    records = task.records()
    drawn = task.examples(records)
    assert drawn == task.examples(records)
    assert drawn != Task("t", "cloze", data, shots=3, seed=1, **FIELDS).examples(records)
    for record, examples in zip(records, drawn, strict=True):
        assert len({one["q"] for one in examples} - {record["q"]}) == 3
    assert len({str(examples) for examples in drawn}) > 4


def test_examples_are_like_the_records_and_ask_something_else(tmp_path):
    records = [
        {"id": i, "q": f"{i % 6}?", "a": "x", "split": "train" if i % 6 > 4 else "test"}
        for i in range(18)
    ]
    data = str(write_records(tmp_path / "twice.jsonl", records))
    fields = {"prompt": "{{ q }}", "answer": "a", "where": "split == 'test'", "shots": 4}
    task = Task("t", "cloze", data, **fields)
    for record, examples in zip(task.records(), task.examples(task.records()), strict=True):
        assert len({one["q"] for one in examples}) == 4
        assert {one["split"] for one in examples} == {"test"}
        assert record["q"] not in {one["q"] for one in examples}
    # The place of a record, as in a draw of few, decides nothing.
    whole, some = task.records(), task.records()[3:6]
    assert task.examples(some) == task.examples(whole)[3:6]


def test_where_and_limit_choose_records(data):
    task = Task("t", "cloze", data, where="even", **FIELDS)
    assert [record["q"] for record in task.records()] == ["2 + 2?", "4 + 4?", "6 + 6?", "8 + 8?"]
    few = Task("t", "cloze", data, limit=3, **FIELDS).records()
    assert len(few) == 3
    assert few == [record for record in QUESTIONS if record in few]
    assert few == Task("t", "cloze", data, limit=3, **FIELDS).records()


def test_a_worked_answer_may_say_more_than_the_answer(data):
    fields = FIELDS | {"choices": "", "answer": "gold", "shot": "'so ' ~ options[gold]"}
    task = Task("t", "generative", data, metric="number", **fields)
    first, second = task.records()[:2]
    assert task.context(first, [second]) == "Q: 2 + 2?\nA: so 4\n\nQ: 1 + 1?\nA:"


def use(data, changes):
    task = Task(**({"name": "t", "kind": "cloze", "data": data} | FIELDS | changes))
    records = task.records()
    task.examples(records)
    task.context(records[0], [])
    task.answers(records[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "{{ qq }}"}, "prompt '{{ qq }}' (str): UndefinedError: 'qq' is undefined"),
        ({"prompt": "{{ q"}, "prompt '{{ q' (str): TemplateSyntaxError: "),
        ({"choices": "q"}, "choices q is '1 + 1?' (str), expected a list of two or more"),
        ({"answer": "q"}, "answer q is '1 + 1?' (str), expected a number from 0 to 2"),
        ({"answer": "7"}, "answer 7 is 7 (int), expected a number from 0 to 2"),
        ({"where": "gold > 5"}, "questions.jsonl holds no record where gold > 5"),
        ({"where": "odd"}, "where 'odd' (str): UndefinedError: 'odd' is undefined"),
        ({"choices": "options.text"}, "UndefinedError: 'list object' has no attribute 'text'"),
        ({"choices": ("yes", "no")}, "choices is ('yes', 'no') (tuple), expected text in quotes"),
        ({"shots": 8}, "shots is 8, but "),
        ({"stop": "Question:"}, "stop is 'Question:' (str), expected a list of texts"),
        ({"stop": (3,)}, "stop is (3,) (tuple), expected a list of texts"),
        ({"prompt": "{{ 1 / 0 }}"}, "prompt '{{ 1 / 0 }}' (str): ZeroDivisionError: division by"),
        ({"shots": "2"}, "shots is '2' (str), expected 0 or more"),
        ({"kind": "close"}, "kind is 'close' (str), expected one of multiple_choice, cloze"),
        ({"answer": ""}, "task t: answer is missing, which cloze needs"),
        ({"prompt": "{{ q.__class__.__mro__ }}"}, "SecurityError"),
    ],
)
def test_mistakes_in_a_task_are_one_line(data, changes, message):
    with pytest.raises(UserError) as error:
        use(data, changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: cloze", "data is missing, which every task needs"),
        ("kind: cloze\ndata: x\npromt: y", "unknown key 'promt'. Did you mean 'prompt'?"),
        ("[1]", "holds [1] (list), expected keys such as kind and data"),
        ("kind: 'x", "bad YAML"),
    ],
)
def test_mistakes_in_a_file_are_one_line(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_task(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_name_is_told_with_the_nearest():
    with pytest.raises(UserError, match=r"no task 'arc_eazy', .*Did you mean 'arc_easy'\?"):
        load_task("arc_eazy")
    with pytest.raises(UserError, match="nothing.yaml: no such file"):
        load_task("nothing.yaml")


# A record of each data set on the hub, in its published form.
ARC = {
    "id": "1",
    "question": "What melts?",
    "choices": {"text": ["stone", "ice"], "label": ["1", "2"]},
    "answerKey": "2",
}
SAMPLES = {
    "arc_easy": (ARC, "Question: What melts?\nAnswer:", "ice"),
    "arc_challenge": (ARC, "Question: What melts?\nAnswer:", "ice"),
    "commonsense_qa": (ARC, "Question: What melts?\nAnswer:", "ice"),
    "openbookqa": (
        {"question_stem": "What melts is", "choices": ARC["choices"], "answerKey": "1"},
        "What melts is",
        "stone",
    ),
    "hellaswag": (
        {"activity_label": "Cooking", "ctx": "[header] A pot [title] It", "label": "1",
         "endings": ["sings.", "boils [substeps] now [title] Eat."]},
        "Cooking: A pot. It",
        "boils now. Eat.",
    ),
    "mmlu": (
        {"question": "2 + 2? ", "subject": "maths", "choices": ["1", "2", "3", "4"], "answer": 3},
        "Question: 2 + 2?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:",
        "D",
    ),
    "mmlu_cloze": (
        {"question": "2 + 2? ", "subject": "maths", "choices": ["1", "2", "3", "4"], "answer": 3},
        "Question: 2 + 2?\nAnswer:",
        "4",
    ),
    "piqa": (
        {"goal": "To cut", "sol1": "a spoon", "sol2": "a knife", "label": 1},
        "Question: To cut\nAnswer:",
        "a knife",
    ),
    "lambada": ({"text": "the end of the road"}, "the end of the", "road"),
    "gsm8k": (
        {"question": "How many?", "answer": "1 + 1 = 2\n#### 2"},
        "Question: How many?\nAnswer:",
        "1 + 1 = 2\n#### 2",
    ),
    "gsm8k_chat": (
        {"question": "How many?", "answer": "so\n#### 1,200"},
        "How many?\nGive the final answer in \\boxed{}.",
        "1200",
    ),
    "ifeval": (
        {"prompt": "Do it.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        "Do it.",
        "[['punctuation:no_comma'], [{}]]",
    ),
    "wikitext": ({"page": "= Title ="}, "= Title =", None),
}  # fmt: skip
GENERATED = {
    "split": "sizes", "kind": "addition", "size": 3, "question": "What is 1 + 1?", "steps": ["s"],
    "answer": "2",
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLES)
def test_shipped_tasks_read_the_published_records(name):
    record, prompt, answer = SAMPLES[name]
    task = load_task(name)
    assert task.context(record, []) == prompt
    if answer is not None:
        assert task.worked_answer(record) == answer


def test_the_tasks_on_generated_records():
    from smol.evaluation.graders import GRADERS

    for name in ("chat", "chat_unseen"):
        task = load_task(name)
        assert task.question(GENERATED) == "What is 1 + 1?"
        expected = task.evaluate("answer", GENERATED)
        assert GRADERS[task.metric]("<think>\n1\n</think>\n2.", expected)
        assert not GRADERS[task.metric]("about 2", expected)
    assert load_task("chat").groups(GENERATED) == ["sizes", "addition"]
    assert load_task("chat_unseen").groups(GENERATED) == ["addition"]
    assert load_task("generated").worked_answer(GENERATED) == "2"


def test_embedded_records_are_made_when_they_are_missing(tmp_path, monkeypatch, capsys):
    def ensure_chat(folder, log):
        (folder / "chat").mkdir(parents=True)
        write_records(folder / "chat" / "tasks.jsonl", [GENERATED | {"split": "instances"}] * 2)
        log("made")

    monkeypatch.setenv("SMOL_ROOT", str(tmp_path))
    monkeypatch.setattr("smol.data.corpora.chat.ensure_chat", ensure_chat)
    shutil.copytree(TASKS, tmp_path / "configs" / "tasks")
    assert len(load_task("generated").records()) == 2
    assert capsys.readouterr() == ("", "made\n")  # standard output is for tables


def test_every_shipped_task_is_tried_here():
    assert set(known_tasks()) == {*SAMPLES, "chat", "chat_unseen", "generated"}
    assert {path.stem for path in TASKS.iterdir()} == set(known_tasks())
