"""Messages of records: what is given as JSON, instructions in any place, and any mistake."""

import datetime
import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smol.data import pairs
from smol.data.chat import default_template
from smol.data.conversation_tokens import Rendering, check_subsets, documents
from smol.data.messages import SubsetConfig, is_held_out, read_messages
from smol.data.records import Records
from smol.data.tokenizer import load_tokenizer
from smol.errors import UserError

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
KWARGS = "chat_template_kwargs"
CONFIG = SubsetConfig("x.jsonl")


@pytest.fixture(scope="module")
def rendering(sources):
    return Rendering(default_template(load_tokenizer(sources / "tokenizer")), 512)


@pytest.mark.parametrize("system", [None, "Be brief.", "Be brief. /system_override"])
@pytest.mark.parametrize(
    "place", [{"custom_instructions": "Be Bob."}, {KWARGS: {"custom_instructions": "Be Bob."}}]
)
def test_custom_instructions_are_kept_wherever_they_stand(rendering, system, place):
    first = [] if system is None else [{"role": "system", "content": system}]
    messages, variables = read_messages({"messages": [*first, USER, ANSWER], **place}, CONFIG, "w")
    text = rendering.template.render(messages, **variables)
    instructions = text[: text.index("<|im_start|>user")]
    assert "Be Bob." in instructions
    assert ("Be brief." in instructions) == (system is not None)
    assert ("## Metadata" in instructions) == ("/system_override" not in str(system))


@pytest.mark.parametrize(
    "calls",
    [
        [CALL],
        json.dumps([CALL]),
        [json.dumps(CALL)],
        [CALL["function"]],
        [{"function": {"name": "add", "arguments": '{"a": 1}'}}],
    ],
    ids=["objects", "a string", "strings", "bare", "arguments as a string"],
)
def test_calls_may_be_json(rendering, calls):
    record = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": calls}]}
    messages, _ = read_messages(record, CONFIG, "w")
    text = rendering.template.render(messages)
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' in text


@pytest.mark.parametrize("tools", [[{"name": "f"}], '[{"name": "f"}]', ['{"name": "f"}']])
@pytest.mark.parametrize("name", ["tools", "xml_tools"])
def test_tools_may_be_json(rendering, name, tools):
    record = {"messages": [USER, ANSWER], KWARGS: {name: tools}}
    messages, variables = read_messages(record, CONFIG, "w")
    text = rendering.template.render(messages, **variables)
    assert '<tools>\n{"name": "f"}\n</tools>' in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"messages": [USER, {**ANSWER, "reasoning_content": [1]}]}, "reasoning_content of a mess"),
        ({"messages": [USER, {**ANSWER, "tool_calls": 5}]}, "a tool call is 5 (int), expected a"),
        ({"messages": [USER, {**ANSWER, "tool_calls": ["f"]}]}, "a tool call is no JSON"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{"a": 1}]}]}, "expected a function with na"),
        ({"messages": [USER, {**ANSWER, "content": " "}]}, "has an answer with nothing in it"),
        ({"messages": [USER, {**ANSWER, "content": None}]}, "has an answer with nothing in it"),
        ({KWARGS: {"enable_thinking": "false"}}, "enable_thinking is 'false' (str), expected true"),
        ({KWARGS: {"mode": "think"}}, "chat_template_kwargs has mode, which it cannot set"),
        ({KWARGS: {"messages": []}}, "chat_template_kwargs has messages, which it cannot set"),
        ({KWARGS: {"xml_tools": '{"name": "f"}'}}, "xml_tools is {'name': 'f'} (dict), expected a"),
        ({"custom_instructions": ["x"]}, "a system message is ['x'] (list), expected text"),
    ],
)
def test_values_of_the_wrong_type(given, message):
    with pytest.raises(UserError) as error:
        read_messages({"messages": [USER, ANSWER], **given}, CONFIG, "x.jsonl:7")
    assert message in str(error.value)
    assert str(error.value).startswith("x.jsonl:7")


@pytest.mark.parametrize("kept", [0, -20], ids=["no gzip", "cut off"])
def test_a_broken_compressed_file(tmp_path, kept):
    whole = gzip.compress(json.dumps({"text": "x" * 9999}).encode())
    (tmp_path / "x.jsonl.gz").write_bytes(whole[:kept] or b"text")
    with pytest.raises(UserError, match=r"^[^\n]*x.jsonl.gz cannot be read \([^\n]*\)$"):
        list(Records(str(tmp_path / "x.jsonl.gz")))


@pytest.mark.parametrize("key", ["path", "weight", "mode", "held_out"])
def test_a_subset_with_a_null(key):
    with pytest.raises(UserError, match=f"subset 'x': {key} is null, expected a value"):
        check_subsets({"x": SubsetConfig(**{"path": "x.jsonl", key: None})})


def test_sides_of_messages_with_other_values():
    message = {**USER, "timestamp": datetime.datetime(2025, 7, 1)}  # as parquet files have them
    assert is_held_out([message], 1.0)
    assert not is_held_out([message], 0.0)


LEAF = st.none() | st.booleans() | st.integers(-3, 3) | st.floats()
LEAF |= st.sampled_from(["", "x", "/think", "<think>\na\n</think>b", "{}", "[1]", "\ud800"])
KEYS = st.sampled_from(["name", "function", "arguments", "role", "content"])
JUNK = st.recursive(
    LEAF,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=2),
    max_leaves=4,
)


def some(*names, **more):
    return st.fixed_dictionaries({}, optional=dict.fromkeys(names, JUNK) | more)


ANSWERS = some("reasoning_content", "tool_calls").map(lambda extra: ANSWER | extra)
MESSAGES = st.tuples(st.just(USER), ANSWERS).map(list)
MESSAGES |= st.lists(some("role", "content", "from", "value") | st.just(USER), max_size=3) | JUNK
ARGUMENTS = some(
    *("enable_thinking", "custom_instructions", "xml_tools", "python_tools", "tools"),
    *("date", "messages", "mode", "bare", "add_generation_prompt", "eos_token"),
)
RECORDS = some(
    "custom_instructions",
    **dict.fromkeys(("messages", "prompt", "chosen", "rejected"), MESSAGES),
    **{KWARGS: ARGUMENTS | JUNK},
)


def refusal(read, *args):
    try:
        list(read(*args))
    except UserError as error:
        return str(error)
    return None


@settings(max_examples=60)
@given(RECORDS, st.sampled_from(["data", "think", "no_think"]))
def test_any_record_is_read_or_refused_in_one_line_with_its_place(
    tmp_path_factory, rendering, record, mode
):
    file = tmp_path_factory.getbasetemp() / "any.jsonl"
    file.write_text(json.dumps(record))
    for kind, read in ((SubsetConfig, documents), (pairs.PairsConfig, pairs.documents)):
        said = refusal(read, kind(str(file), mode=mode), rendering, False, {})
        assert said is None or (f"{file}:" in said and "\n" not in said)
