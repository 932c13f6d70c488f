"""The chat template: as transformers renders it, and exact about what is trained on."""

import json
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smol.data.chat import (
    ChatTemplate,
    default_source,
    default_template,
    load_chat_template,
    save_chat_tokenizer,
)
from smol.data.tokenizer import load_tokenizer
from smol.errors import UserError

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|pad|>"]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"é": 1}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CONVERSATION = [
    {"role": "system", "content": "Be  brief.\n/no_think Always."},
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": " a dog\n"},
    {"role": "user", "content": "why? /think"},
    {"role": "assistant", "content": "so", "reasoning_content": "hm"},
    {"role": "user", "content": "add"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "7 /no_think"},
    {"role": "assistant", "content": "<think>\n7?\n</think>\nseven"},
]
OPTIONS = {
    "plain": {},
    "no_think": {"enable_thinking": False},
    "tools": {"tools": TOOLS, "python_tools": ["def f(): ..."], "date": "2025-07-01"},
    "bare": {"bare": True},
    "cutoff": {"knowledge_cutoff": "May 1999"},
    "instructions": {"custom_instructions": "Be Bob."},
    "xml_tools": {"xml_tools": '{"name": "add"}'},
}
WORDS = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=20)
TURNS = st.lists(
    st.tuples(WORDS, WORDS, st.sampled_from(["", "hm", "\n a\n"])), min_size=1, max_size=3
)


@cache
def load(sources):
    return default_template(load_tokenizer(sources / "tokenizer"))


@pytest.fixture(scope="module")
def template(sources):
    return load(sources)


@pytest.fixture(scope="module")
def transformers_tokenizer(sources):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sources / "tokenizer")
    tokenizer.chat_template = default_source()
    return tokenizer


def messages_of(turns):
    messages = []
    for question, answer, reasoning in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer, "reasoning_content": reasoning})
    return messages


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("turns", [1, 2, 3, 9])
@pytest.mark.parametrize("prompt", [False, True])
def test_transformers_renders_and_masks_the_same(
    template, transformers_tokenizer, options, turns, prompt
):
    given, kwargs = CONVERSATION[:turns], options | {"add_generation_prompt": prompt}
    text = transformers_tokenizer.apply_chat_template(given, tokenize=False, **kwargs)
    assert template.render(given, **kwargs) == text
    encoded = transformers_tokenizer.apply_chat_template(
        given, return_dict=True, return_assistant_tokens_mask=True, **kwargs
    )
    ours = template.encode(given, **kwargs)
    assert ours.tokens.tolist() == encoded["input_ids"]
    assert ours.trained.tolist() == [bool(i) for i in encoded["assistant_masks"]]


@given(TURNS, st.sampled_from(["think", "no_think"]))
def test_every_beginning_is_a_prefix_and_answers_are_what_follows_a_prompt(sources, turns, mode):
    template = load(sources)
    messages = messages_of(turns)
    whole = template.encode(messages, mode=mode)
    trained = set()
    for i in range(1, len(messages), 2):
        prompt = template.encode(messages[:i], mode=mode, add_generation_prompt=True).tokens
        until = template.encode(messages[: i + 1], mode=mode).tokens
        assert whole.tokens[: len(until)].tolist() == until.tolist()
        # In no_think, an answer that reasons all the same begins before the prompt's empty block.
        if messages[i]["reasoning_content"] and mode == "no_think":
            return
        assert until[: len(prompt)].tolist() == prompt.tolist()
        end = len(prompt) + until[len(prompt) :].tolist().index(template.stop_id)
        trained |= set(range(len(prompt), end + 1))
    assert whole.trained.nonzero()[0].tolist() == sorted(trained)


@given(st.lists(st.sampled_from([*SPECIAL, "<|im_", "end|>", " a ", "\n"]), max_size=8))
def test_what_a_message_says_is_never_a_special_token(sources, parts):
    template = load(sources)
    text = "x" + "".join(parts) + "x"
    messages = [
        {"role": "system", "content": text},
        {"role": "user", "content": text},
        {"role": "assistant", "content": text, "reasoning_content": text},
    ]
    tools = [{"name": text, text: 1}]
    forged = template.encode(messages, tools=tools)
    harmless = json.loads(json.dumps([messages, tools]).replace(json.dumps(text)[1:-1], "x"))
    honest = template.encode(harmless[0], tools=harmless[1])
    special = [template.tokenizer.backend.token_to_id(token) for token in SPECIAL]
    assert [i for i in forged.tokens if i in special] == [i for i in honest.tokens if i in special]
    assert template.tokenizer.decode(forged.tokens) == template.render(messages, tools=tools)


def test_metadata_instructions_and_tools(template):
    text = template.render(CONVERSATION[:2], tools=TOOLS, date="2025-07-01")
    system = text[: text.index("<|im_start|>user")]
    assert "Today Date: 2025-07-01\nReasoning Mode: /no_think\n" in system
    assert "## Custom Instructions\nBe  brief.\nAlways.\n" in system
    assert '{"name": "add", "parameters": {"é": 1}}' in system
    assert "Today Date" not in template.render(CONVERSATION[1:2])
    assert "## Tools" not in template.render(CONVERSATION[1:2])


@pytest.mark.parametrize(
    ("system", "mode", "expected"),
    [
        ("", None, "/think"),
        ("", "no_think", "/no_think"),
        ("x /think", "no_think", "/think"),
        ("/no_think", "think", "/no_think"),
        ("see /thinking", "no_think", "/no_think"),
    ],
)
def test_flags_in_the_system_message_come_before_the_mode(template, system, mode, expected):
    text = template.render([{"role": "system", "content": system}], mode=mode)
    assert f"Reasoning Mode: {expected}\n" in text


def test_system_override_leaves_only_the_instructions(template):
    messages = [{"role": "system", "content": "Only this. /system_override"}, CONVERSATION[1]]
    text = template.render(messages, tools=TOOLS)
    assert text.startswith("<|im_start|>system\nOnly this.<|im_end|>\n<|im_start|>user\n")


@pytest.mark.parametrize("options", [{}, {"bare": True}])
@pytest.mark.parametrize("system", ["", "Be brief.", "Be brief. /system_override", "/no_think"])
def test_custom_instructions_join_the_system_message(template, system, options):
    apart = [{"role": "system", "content": system}, CONVERSATION[1]]
    joined = [{"role": "system", "content": f"{system}\nBe Bob."}, CONVERSATION[1]]
    text = template.render(apart, custom_instructions="Be Bob.", **options)
    assert "Be Bob." in text
    assert text == template.render(joined, **options)


def test_a_flag_of_the_user_counts_from_there_on(template):
    messages = messages_of([("a", "b", ""), ("c /no_think", "d", ""), ("e", "f", "")])
    text = template.render(messages, mode="think")
    assert "assistant\nb<" in text
    assert "assistant\n<think>\n\n</think>\nd<" in text
    assert "assistant\n<think>\n\n</think>\nf<" in text
    prompt = template.render(messages[:3], mode="think", add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n")
    assert text.startswith(prompt)


def test_reasoning_is_kept_on_every_turn(template):
    text = template.render(messages_of([("a", "b", "one"), ("c", "d", "two")]))
    assert "<think>\none\n</think>\nb<|im_end|>" in text
    assert "<think>\ntwo\n</think>\nd<|im_end|>" in text


def test_an_answer_may_bring_its_own_block(template):
    inline = [CONVERSATION[1], {"role": "assistant", "content": "<think>\nhm\n</think>\nso"}]
    apart = [CONVERSATION[1], {"role": "assistant", "content": "so", "reasoning_content": "hm"}]
    assert template.render(inline) == template.render(apart)
    empty = [CONVERSATION[1], {"role": "assistant", "content": "<think>\n\n</think>\n\nso"}]
    none = [CONVERSATION[1], {"role": "assistant", "content": "so"}]
    assert template.render(empty, mode="no_think") == template.render(none, mode="no_think")


def test_a_tokenizer_is_saved_with_its_template(template, sources, tmp_path):
    from transformers import AutoTokenizer

    save_chat_tokenizer(template, tmp_path / "chat")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "chat")
    ours = load_chat_template(tmp_path / "chat")
    text = theirs.apply_chat_template(CONVERSATION, tokenize=False)
    assert text == ours.render(CONVERSATION) == template.render(CONVERSATION)
    assert theirs.eos_token_id == template.stop_id == ours.tokenizer.eos_id
    assert (
        ours.encode(CONVERSATION).tokens.tolist() == template.encode(CONVERSATION).tokens.tolist()
    )
    assert load_chat_template(sources / "tokenizer") is None


@pytest.mark.parametrize("bare", [False, True])
def test_what_was_trained_with_is_stored(template, tmp_path, bare):
    from transformers import AutoTokenizer

    used = {"date": "2025-07-01", "bare": bare}
    save_chat_tokenizer(template, tmp_path, **used)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = load_chat_template(tmp_path)
    trained = template.render(CONVERSATION, **used)
    assert ours.render(CONVERSATION) == trained
    assert theirs.apply_chat_template(CONVERSATION, tokenize=False) == trained
    other = {"date": "2026-01-02", "bare": not bare}
    assert ours.render(CONVERSATION, **other) == template.render(CONVERSATION, **other)
    assert ours.variables == template.variables
    save_chat_tokenizer(ours, tmp_path, date=None, bare=False)  # of a phase after it
    again = load_chat_template(tmp_path)
    assert again.render(CONVERSATION) == template.render(CONVERSATION, date="2025-07-01")
    save_chat_tokenizer(again, tmp_path, **other)
    assert load_chat_template(tmp_path).render(CONVERSATION) == template.render(
        CONVERSATION, **other
    )


def test_marks_of_reasoning_may_be_special_tokens(sources):
    tokenizer = load_tokenizer(sources / "tokenizer")
    tokenizer.backend.add_special_tokens(["<think>", "</think>"])
    template, plain = default_template(tokenizer), load(sources)
    inline = "<think>\nhm\n</think>\nso"
    for content in (inline, "<think>\n\n</think>\n\nso"):
        messages = [CONVERSATION[1], {"role": "assistant", "content": content}]
        assert template.render(messages, mode="no_think") == plain.render(messages, mode="no_think")
    apart = {"role": "assistant", "content": "so", "reasoning_content": "hm"}
    own = template.encode([CONVERSATION[1], {"role": "assistant", "content": inline}])
    assert own.tokens.tolist() == template.encode([CONVERSATION[1], apart]).tokens.tolist()
    assert tokenizer.backend.token_to_id("<think>") in own.tokens[own.trained]


@pytest.mark.parametrize("arguments", ['{"a": 1}', {"a": 1}])
def test_arguments_of_a_call_may_be_json(template, arguments):
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    messages = [CONVERSATION[1], {"role": "assistant", "content": "", "tool_calls": [call]}]
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' in template.render(
        messages
    )


@pytest.mark.parametrize("stored", ["{{ messages[0].content }}", [{"name": "default"}]])
def test_a_template_in_tokenizer_config(sources, tmp_path, stored):
    for file in (sources / "tokenizer").iterdir():
        (tmp_path / file.name).write_text(file.read_text())
    if isinstance(stored, list):
        stored[0]["template"] = "{{ messages[0].content }}"
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = stored
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_chat_template(tmp_path).render(CONVERSATION[1:]) == "the cat"


@pytest.mark.parametrize(
    ("source", "messages", "options", "message"),
    [
        (None, CONVERSATION, {"mode": "thinking"}, "mode is 'thinking', expected think or no_th"),
        (None, [{"role": "bot", "content": ""}], {}, "a message has the role 'bot', expected user"),
        (None, [CONVERSATION[1], CONVERSATION[0]], {}, "role 'system', expected"),
        (None, [{"role": "user", "content": "\ufdd1"}], {}, "holds U+FDD1, which is no character"),
        (None, [{"role": "user", "content": "\ud800"}], {}, "holds U+D800, which is no character"),
        ("{% if %}", [], {}, "the chat template is broken in line 1"),
        ("{{ strftime_now('%d') }}", [], {}, "today's date for the chat template is None, exp"),
        (
            "{{ ''.__class__.mro() }}",
            [],
            {},
            "the chat template refuses a conversation: SecurityError",
        ),
    ],
)
def test_mistakes_are_one_line(template, source, messages, options, message):
    def render():
        made = template if source is None else ChatTemplate(template.tokenizer, source)
        made.render(messages, **options)

    with pytest.raises(UserError) as error:
        render()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_date_of_a_foreign_template_is_the_one_given(template):
    foreign = ChatTemplate(template.tokenizer, "{{ strftime_now('%d %B %Y') }}")
    assert foreign.render([], date="2025-07-01") == "01 July 2025"


def test_the_date_is_stored_in_a_foreign_template(template, tmp_path):
    from transformers import AutoTokenizer

    source = "{{ strftime_now('%d %B %Y') }}|{{ strftime_now( \"%Y\" ) }}|" + default_source()
    foreign = ChatTemplate(template.tokenizer, source)
    save_chat_tokenizer(foreign, tmp_path, date="2025-07-01")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = theirs.apply_chat_template(CONVERSATION[1:3], tokenize=False)
    assert text.startswith("01 July 2025|2025|<|im_start|>system")
    assert text == foreign.render(CONVERSATION[1:3], date="2025-07-01")


def test_a_template_that_ends_no_answer(template):
    foreign = ChatTemplate(template.tokenizer, "{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match="cannot learn to stop"):
        _ = foreign.stop_id
    assert not foreign.marks_answers
    assert template.marks_answers
