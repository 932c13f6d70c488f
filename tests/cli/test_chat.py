"""Conversations, and the chat as a user starts it."""

import importlib.util
import io
import itertools
import json
import re
import subprocess
import sys

import pytest
from chat_parts import SRC, folder, load_decoder_of  # noqa: F401 (a fixture)
from hypothesis import given
from hypothesis import strategies as st
from warm_python import python

from smol.data.chat import ChatTemplate, default_source
from smol.data.tokenizer import load_tokenizer
from smol.errors import UserError
from smol.generation import Generator, Sampling
from smol.generation.chat import COMMANDS, Conversation, split_reasoning

SAMPLING = Sampling(temperature=1.0, max_new_tokens=12)


@pytest.fixture
def converse(folder):
    """Makes conversations whose model says what it is told to, after it has read the prompt."""
    tokenizer = load_tokenizer(folder)

    class Scripted(Generator):
        def __init__(self):
            self.says, self.read, self.max_length = [], [], None

        def stream(self, prompt, sampling):
            self.read.append(tokenizer.decode(prompt))
            return Written(self.says.pop(0))

    class Written:
        def __init__(self, text):
            self.text = text
            self.completion = Completion(tokenizer.encode(text), text, [], "stop")

        def __iter__(self):
            return iter(self.text)

    from smol.generation import Completion

    def make(source: str | None = None, **kwargs) -> Conversation:
        template = ChatTemplate(tokenizer, source or default_source())
        return Conversation(Scripted(), tokenizer, template, SAMPLING, **kwargs)

    return make


def say(conversation: Conversation, question: str, answer: str) -> str:
    """Ask and be answered; returns what the model has read."""
    conversation.generator.says.append(answer)
    assert "".join(conversation.ask(question)).endswith(answer)
    return conversation.generator.read[-1]


def test_a_conversation_is_remembered(converse):
    chat = converse(mode="no_think", system="Be brief.")
    say(chat, "my name is cat", "hello cat")
    read = say(chat, "who am I", "a cat")
    turns = ["Be brief.", "my name is cat", "hello cat", "who am I"]
    assert [read.index(turn) for turn in turns] == sorted(read.index(turn) for turn in turns)
    assert "/no_think" in read.split("<|im_end|>")[0]
    assert (chat.reply.text, chat.reply.reasoning) == ("a cat", None)
    chat.command("/reset")
    read = say(chat, "again", "yes")
    assert "cat" not in read
    assert "Be brief." in read
    chat.command("/system Be a dog.")
    read = say(chat, "hi", "woof")
    assert "Be a dog." in read
    assert "Be brief." not in read


def test_reasoning_is_kept_apart_and_the_mode_changes_on_the_way(converse):
    chat = converse(mode="think")
    say(chat, "two and two", "<think>\nit is four\n</think>\nfour")
    assert (chat.reply.text, chat.reply.reasoning) == ("four", "it is four")
    chat.command("/no_think")
    read = say(chat, "three and three", "six")
    assert "it is four" in read  # the template keeps it
    assert "three and three /no_think" in read
    assert read.endswith("<think>\n\n</think>\n")
    read = say(chat, "four and four", "eight")
    assert read.count("/no_think") == 1  # it holds until it is changed
    assert read.endswith("<think>\n\n</think>\n")
    chat.command("/think")
    read = say(chat, "five and five", "<think>\nten\n</think>\nten")
    assert read.endswith("<|im_start|>assistant\n")


def test_reasoning_that_the_prompt_begins(converse):
    source = (
        "{% for m in messages %}{{ m.content }}{% generation %}<|im_end|>{% endgeneration %}"
        "{% endfor %}{% if add_generation_prompt %}{% if enable_thinking %}<think>{% endif %}"
        "{% endif %}"
    )
    chat = converse(source, mode="think")
    say(chat, "two and two", "four, of course</think>four")
    assert (chat.reply.text, chat.reply.reasoning) == ("four", "four, of course")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("four", (None, "four")),
        ("<think>\n\n</think>\nfour ", (None, "four")),
        ("<think>\nhm\n</think>\n\nfour", ("hm", "four")),
        ("<think>\nhm", ("hm", "")),
        ("<thi", (None, "<thi")),
        ("<", (None, "<")),
        ("<this", (None, "<this")),
    ],
)
def test_split_reasoning(text, expected):
    assert split_reasoning(text) == expected


@given(st.lists(st.sampled_from(["<", "</", "think", ">", "<think>", "</think>", "a", " ", "\n"])))
def test_what_is_shown_while_it_is_written_only_grows(pieces):
    text = "".join(pieces)
    shown = [split_reasoning(text[:end], finished=False) for end in range(len(text) + 1)]
    shown.append(split_reasoning(text))
    for (reasoning, answer), (later, last) in itertools.pairwise(shown):
        assert (later or "").startswith(reasoning or "")
        assert last.startswith(answer)


def test_a_mode_that_was_typed_outlives_the_conversation(converse):
    chat = converse(mode="think")
    say(chat, "hi", "hello")
    chat.command("/no_think")
    chat.command("/reset")
    assert say(chat, "hi", "hello").endswith("<think>\n\n</think>\n")


def test_a_full_conversation_says_how_to_go_on(converse):
    chat = converse(mode="no_think")
    say(chat, "the cat", "the dog")
    chat.generator.max_length = 20
    with pytest.raises(UserError, match=r"no room for an answer; expected fewer than 20\..*/reset"):
        list(chat.ask("the cat"))


@pytest.mark.parametrize("size", [1, 3, 100])
def test_reasoning_is_shown_in_pieces_of_any_size(size, converse, monkeypatch, capsys):
    chat, said = converse(mode="think"), "<think>\nit is four\n</think>\nfour <"
    chat.generator.says.append(said)
    stream = chat.generator.stream
    monkeypatch.setattr(chat.generator, "stream", lambda *args: Pieces(stream(*args), size))
    chat_script()._show(chat, "two and two", show_reasoning=True)
    assert capsys.readouterr().out.startswith("it is four\n\nfour <\n[")


class Pieces:
    """A stream in pieces of a size."""

    def __init__(self, stream, size):
        self.completion, self.size = stream.completion, size

    def __iter__(self):
        text = self.completion.text
        return (text[at : at + self.size] for at in range(0, len(text), self.size))


def test_mistakes_in_a_conversation(converse):
    chat = converse()
    with pytest.raises(UserError, match="no command /systm.*Did you mean '/system'"):
        chat.command("/systm")
    with pytest.raises(UserError, match="mode is 'thinking', expected think or no_think"):
        converse(mode="thinking")
    assert all(name in chat.command("/help") for name in COMMANDS)
    modeless = default_source().replace("enable_thinking", "something")
    with pytest.raises(UserError, match="no modes"):
        converse(modeless).command("/think")


def chat_script():
    """``src/chat.py`` as a module."""
    spec = importlib.util.spec_from_file_location("chat_script", SRC / "chat.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def chat_main(arguments, monkeypatch, stdin: str = "") -> int:
    """``src/chat.py`` in this process; returns the exit status."""
    monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
    return chat_script().main([str(argument) for argument in arguments])


def test_one_shot_for_a_program(folder):
    flags = ["--prompt", "the cat", "--json", "--log_probs", "--max_new_tokens", 9]
    flags = [*flags, "--dtype", "float32", "--mode", "no_think"]
    done = python(SRC / "chat.py", folder, *flags)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    tokenizer = load_tokenizer(folder)
    template = ChatTemplate(tokenizer, default_source())
    chat = [{"role": "user", "content": "the cat"}]
    prompt = template.encode(chat, mode="no_think", add_generation_prompt=True).tokens
    decoder = load_decoder_of(folder)
    sampling = Sampling(top_p=0.95, max_new_tokens=9, stop_ids=(template.stop_id,))
    [expected] = Generator(decoder, tokenizer).generate([prompt], sampling)
    assert answer["tokens"] == expected.tokens
    assert answer["log_probs"] == pytest.approx(expected.log_probs, abs=1e-4)
    assert answer["finish_reason"] == expected.finish_reason
    assert answer["tokens_per_second"] > 0


def test_a_talk_in_the_terminal(folder, monkeypatch, capsys):
    lines = "the cat\n\n/no_think\n/nothing\nand a dog\n/exit\nnever read\n"
    assert chat_main([folder, "--max_new_tokens", 5], monkeypatch, lines) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"\[\d+ tokens, [\d.]+ tokens/s", out)) == 2
    assert "/no_think from here on" in out
    assert "error: there is no command /nothing" in out


def test_a_base_model_continues_plain_text(folder, monkeypatch, capsys):
    base = folder.with_name("base")
    assert chat_main([base, "--max_new_tokens", 5], monkeypatch, "the cat\n") == 0
    out = capsys.readouterr().out
    assert "no chat template: what you type is continued as plain text" in out
    assert "tokens/s" in out
    assert chat_main([base, "--mode", "think", "--prompt", "a"], monkeypatch) == 2
    assert capsys.readouterr().err.startswith("error: a mode needs a chat template")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--json"], "--prompt TEXT"),
        (["--prompt", "a", "--log_probs"], "--json"),
        (["--prompt", "a", "--json", "--show_reasoning"], "leave --show_reasoning out"),
        (["--prompt", "a", "--top_p", "2"], "top_p is 2.0, expected 0 < top_p <= 1"),
        (["--prompt", "a", "--max_length", "5"], "leaves no room to write"),
        (["--prompt", "a", "--max_length", "1"], "max_length is 1, expected at least 2"),
        (["--prompt", "a", "--tokenizer", "/nowhere"], "/nowhere has no tokenizer.json"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(folder, flags, message, monkeypatch, capsys):
    assert chat_main([folder, *flags], monkeypatch) == 2
    assert re.fullmatch(rf"error: .*{re.escape(message)}.*\n", capsys.readouterr().err)


def test_a_model_that_is_not_there(tmp_path, monkeypatch, capsys):
    assert chat_main([tmp_path / "nothing"], monkeypatch) == 2
    assert "is not there" in capsys.readouterr().err


def test_an_answer_may_take_all_the_room_there_is(folder, monkeypatch, capsys):
    flags = ["--prompt", "a", "--json", "--mode", "no_think", "--max_length", "500"]
    assert chat_main([folder, *flags, "--temperature", "0"], monkeypatch) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["finish_reason"] == "stop" or len(answer["tokens"]) > 256


@pytest.mark.parametrize("script", ["chat.py", "serve.py"])
def test_help_does_not_wait_for_torch(script):
    code = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['x', '--help']; "
        f"runpy.run_path({str(SRC / script)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--dtype" in done.stdout
