"""Chats: modes, a change of mode, and what is counted."""

import pytest
from evaluation_parts import tiny_model, write_records

from smol.data.chat import ChatTemplate, default_source
from smol.errors import UserError
from smol.evaluation.chats import in_mode
from smol.evaluation.measure import measure
from smol.evaluation.tasks import Task
from smol.generation import Completion

SUMS = [{"q": f"{n} + 1?", "a": str(n + 1), "kind": "odd" if n % 2 else "even"} for n in range(6)]
FIELDS = {"prompt": "{{ q }}", "answer": "a", "metric": "exact_match", "group": "kind"}


@pytest.mark.parametrize(
    ("text", "think", "no_think"),
    [
        ("<think>\n1 + 1\n</think>\n2", True, False),
        ("2", False, True),
        ("<think>\n\n</think>\n2", False, True),
        ("<think>\n1 + 1", False, False),
        ("<think>\n1 + 1\n</think>", False, False),
    ],
)
def test_an_answer_is_in_a_mode(text, think, no_think):
    assert in_mode(text, "think") is think
    assert in_mode(text, "no_think") is no_think


class Scripted:
    """Answers by a rule instead of a model, and keeps the prompts."""

    def __init__(self, rule):
        self.rule, self.prompts = rule, []

    def __call__(self, prompts, sampling):
        self.sampling = sampling
        texts = [self.model.tokenizer.decode(prompt) for prompt in prompts]
        self.prompts.append(texts)
        return [
            Completion(list(range(len(text))), text, [], "stop") for text in map(self.rule, texts)
        ]


def chat_model(sources, rule, monkeypatch):
    model = tiny_model(sources)
    model.template = ChatTemplate(model.tokenizer, default_source())
    script = Scripted(rule)
    script.model = model
    monkeypatch.setattr(model, "generate", script, raising=False)
    return model, script


def adds(prompt: str) -> str:
    """Knows sums of even numbers; reasons where the prompt ends without an empty block."""
    question = prompt.rpartition("user\n")[2].partition("?")[0]
    n = int(question.split(" + ")[0])
    answer = str(n + 1) if n % 2 == 0 else "?"
    return answer if prompt.endswith("</think>\n") else f"<think>\n{n} + 1\n</think>\n{answer}"


def test_accuracies_lengths_and_modes(sources, tmp_path, monkeypatch):
    data = str(write_records(tmp_path / "sums.jsonl", SUMS))
    model, script = chat_model(sources, adds, monkeypatch)
    found = measure(Task("t", "chat", data, **FIELDS), model)
    for mode in ("think", "no_think"):
        assert found[f"{mode}/accuracy"].value == 0.5
        assert found[f"{mode}/accuracy/even"].value == 1
        assert found[f"{mode}/accuracy/odd"].value == 0
        assert found[f"{mode}/in_mode"].value == 1
        assert found[f"{mode}/ended"].value == 1
    assert found["no_think/answer_tokens"].value == 1
    assert found["think/answer_tokens"].value == len("<think>\n0 + 1\n</think>\n1")
    assert found["think/tokens_per_second"].value > 0
    assert found["think/tokens_per_second"].low is None
    # Two conversations of three turns for each change of mode.
    assert found["think/in_mode_after_switch"].items == 2
    assert found["think/in_mode_after_switch"].value == 1
    assert found["no_think/in_mode_after_switch"].value == 1
    assert script.sampling.stop_ids == (model.template.stop_id,)
    assert script.sampling.temperature == 0


def test_a_change_of_mode_is_asked_for_in_the_third_turn(sources, tmp_path, monkeypatch):
    data = str(write_records(tmp_path / "sums.jsonl", SUMS))
    model, script = chat_model(sources, adds, monkeypatch)
    measure(Task("t", "chat", data, **FIELDS), model, modes=["no_think"])
    first, second, third = script.prompts
    assert (len(first), len(second), len(third)) == (6, 2, 2)
    assert "Reasoning Mode: /no_think" in third[0]
    assert [third[0].count(f"{question}?") for question in ("0 + 1", "1 + 1", "2 + 1")] == [1] * 3
    assert "2 + 1? /think" in third[0]
    assert not third[0].endswith("</think>\n")  # the template leaves the reasoning to the model
    assert second[0].endswith("</think>\n")
    assert "assistant\n<think>\n\n</think>\n1" in second[0]  # its own first answer


def test_a_model_that_heeds_no_mode_is_found_out(sources, tmp_path, monkeypatch):
    data = str(write_records(tmp_path / "sums.jsonl", SUMS))
    model, _ = chat_model(sources, lambda prompt: "7", monkeypatch)
    found = measure(Task("t", "chat", data, **FIELDS), model)
    assert found["think/in_mode"].value == 0
    assert found["think/in_mode_after_switch"].value == 0
    assert found["no_think/in_mode"].value == 1
    assert found["no_think/accuracy"].value == 0


def test_a_generative_task_can_be_asked_in_a_chat(sources, tmp_path, monkeypatch):
    data = str(write_records(tmp_path / "sums.jsonl", SUMS))
    model, _ = chat_model(sources, adds, monkeypatch)
    found = measure(Task("t", "generative", data, **FIELDS), model, modes=["think"])
    assert found["think/accuracy"].value == 0.5
    assert "no_think/in_mode_after_switch" not in found


def test_without_a_template_there_is_no_chat(sources, tmp_path):
    data = str(write_records(tmp_path / "sums.jsonl", SUMS))
    with pytest.raises(UserError, match="tiny has no chat template, which task t needs"):
        measure(Task("t", "chat", data, **FIELDS), tiny_model(sources))


def test_a_real_generator_answers(sources, tmp_path):
    data = str(write_records(tmp_path / "sums.jsonl", SUMS[:3]))
    model = tiny_model(sources)
    model.max_length = 512
    model.template = ChatTemplate(model.tokenizer, default_source())
    found = measure(Task("t", "chat", data, max_new_tokens=4, **FIELDS), model)
    assert found["think/answer_tokens"].value <= 4
    assert found["think/in_mode_after_switch"].items == 1
