"""What is refused before a run: templates that teach something wrong, records, sets of them."""

import pytest
from conversation_parts import (  # noqa: F401
    ANSWER,
    OWN,
    PLAIN,
    REASONED,
    THINKING,
    USER,
    rendered,
    template,
    write,
)

from smol.data.chat import ChatTemplate, default_source
from smol.data.conversation_tokens import SubsetConfig, check_subsets
from smol.errors import UserError

# Each is the project's template with one thing wrong.
LOSES_SYSTEM = ("instructions ~ ", "'' ~ ")
LOSES_STOP = ('{{- "<|im_end|>" -}}\n    {%- endgeneration -%}', "{%- endgeneration -%}<|im_end|>")
LOSES_REASONING = ("{%- if reasoning -%}", "{%- if reasoning and loop.last -%}")


def broken(template, old, new):
    source = default_source()
    assert old in source
    return ChatTemplate(template.tokenizer, source.replace(old, new))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (LOSES_SYSTEM, "the system message 'be a dog' is lost in rendering"),
        (LOSES_STOP, "0 of 2 answers are trained on to the token that ends them"),
        (LOSES_REASONING, "renders the first 3 turns otherwise once others follow"),
    ],
)
def test_a_template_that_would_teach_something_wrong(tmp_path, template, fault, message):
    messages = [{"role": "system", "content": "be a dog"}, USER, OWN, USER, OWN]
    config = SubsetConfig(write(tmp_path / "x.jsonl", [{"messages": messages}]))
    with pytest.raises(UserError, match=message):
        rendered(config, broken(template, *fault))
    assert rendered(config, template)[0]


@pytest.mark.parametrize(
    ("record", "mode", "message"),
    [
        ({"messages": [USER]}, "data", "x.jsonl:1 has no turn of the assistant"),
        ({"messages": THINKING}, "no_think", "answer 1 reasons, but the mode is no_think"),
        ({"messages": PLAIN}, "think", "answer 1 does not reason, but the mode is think"),
        ({"text": "x"}, "data", "x.jsonl:1 has no column 'messages', its columns are 'text'"),
        (
            {"messages": PLAIN, "chat_template_kwargs": {"custom_instruction": "x"}},
            "data",
            "chat_template_kwargs has custom_instruction, which the chat template does not",
        ),
        ({"messages": ["x"]}, "data", "a message is 'x', expected role and content"),
        (
            {"messages": [USER, REASONED, USER, ANSWER]},
            "think",
            "answer 2 does not reason, but the",
        ),
        (
            {"messages": [USER, ANSWER, USER, OWN]},
            "data",
            "the mode changes without a flag: answer 2",
        ),
        ({"messages": None}, "data", "x.jsonl:1: the messages are null, expected a list of them"),
        ({"messages": []}, "data", "x.jsonl:1 has no turn of the assistant"),
        ({"messages": PLAIN, "chat_template_kwargs": "{}"}, "data", "chat_template_kwargs is '{}'"),
        ({"messages": PLAIN, "chat_template_kwargs": [1]}, "data", "chat_template_kwargs is [1]"),
        (
            {"messages": PLAIN, "chat_template_kwargs": {"custom_instructions": [1]}},
            "data",
            "a system message is [1] (list), expected text",
        ),
        (
            {
                "messages": [{"role": "system", "content": "/think"}, *PLAIN],
                "chat_template_kwargs": {"custom_instructions": "Be brief. /no_think"},
            },
            "data",
            "the system message and the custom_instructions ask for different modes",
        ),
        ({"messages": [{**USER, "content": [1]}]}, "data", "is of type list, expected text"),
        ({"messages": [{**USER, "role": "bot"}, ANSWER]}, "data", "has the role 'bot'"),
        (7, "data", "x.jsonl:1: expected a JSON object per line, seen int"),
    ],
)
def test_records_that_are_no_conversations(tmp_path, template, record, mode, message):
    config = SubsetConfig(write(tmp_path / "x.jsonl", [record]), mode=mode)
    with pytest.raises(UserError) as error:
        rendered(config, template)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "thinks"}, "mode is 'thinks', expected think, no_think, data. Did you mean"),
        ({"prompt": "q"}, "prompt and response are columns that go together"),
        ({"weight": -1.0}, "weight is -1.0, expected 0 or more"),
        ({"weight": float("nan")}, "weight is nan, expected 0 or more"),
        ({"weight": float("inf")}, "weight is inf, expected 0 or more"),
        ({"held_out": 1.0}, "held_out is 1.0, expected a share, 0 to below 1"),
    ],
)
def test_sets_that_cannot_be(fields, message):
    with pytest.raises(UserError, match=message):
        check_subsets({"x": SubsetConfig("x.jsonl", **fields)})


def test_a_change_of_mode_without_a_flag_is_found_in_any_record(tmp_path, template):
    switch = [USER, ANSWER, {**USER, "content": "why? /think"}, OWN]
    wrong = [USER, ANSWER, USER, OWN]
    records = [{"messages": messages} for messages in [*[PLAIN] * 80, switch, wrong]]
    with pytest.raises(UserError, match="x.jsonl:82: the mode changes without a flag: answer 2 re"):
        rendered(SubsetConfig(write(tmp_path / "x.jsonl", records)), template)


def test_a_flag_may_change_the_mode_of_a_set(tmp_path, template):
    switch = [USER, OWN, {**USER, "content": "why? /no_think"}, ANSWER, USER, ANSWER]
    config = SubsetConfig(write(tmp_path / "x.jsonl", [{"messages": switch}]), mode="think")
    (found,), notes = rendered(config, template)
    count = len(template.tokenizer.encode("a dog")) + 1  # and the end
    assert notes["modes"]["no_think"] == 2 * count
    assert sum(notes["modes"].values()) == int(found.trained.sum())


def test_all_tokens_count_for_the_mode_of_the_answer_they_lead_to(tmp_path, template):
    switch = [USER, OWN, {**USER, "content": "why? /no_think"}, ANSWER]
    config = SubsetConfig(write(tmp_path / "x.jsonl", [{"messages": switch}]))
    (found,), notes = rendered(config, template, train_on="all")
    first = found.tokens.tolist().index(template.stop_id, len(template.encode(switch[:1]).tokens))
    assert notes["modes"] == {"think": first, "no_think": len(found.tokens) - first - 1}
