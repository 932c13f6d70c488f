"""Chat templates: messages become text, or tokens of which it is known which are trained on.

A template is Jinja in the vocabulary of transformers, so that transformers and the servers built on
it render the same. The project's own is ``chat_template.jinja`` beside this file.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date as Date
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from smol.data.card import write_json
from smol.data.tokenizer import MARKERS, Tokenizer
from smol.errors import UserError, one_line

FILE = "chat_template.jinja"
PAD = "<|pad|>"
# Noncharacters of Unicode, which stand in no text that is meant for others.
FORGED, BEGIN, END = "\ufdd0", "\ufdd1", "\ufdd2"
NO_CHARACTER = re.compile(f"[{FORGED}{BEGIN}{END}\ud800-\udfff]")  # half a surrogate pair neither
TODAY = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
ANY_DAY = "2025-07-01"  # some templates ask for one
MODES = {"think": True, "no_think": False}

Message = Mapping[str, Any]
"""``role`` (system, user, assistant or tool) and ``content``; of an answer also
``reasoning_content`` and ``tool_calls``, as in OpenAI's interface."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens.

    Attributes:
        tokens: ``(time,)`` int32.
        trained: ``(time,)`` bool: what the assistant writes, the token that ends its turn included,
            and not what a generation prompt supplies.
    """

    tokens: np.ndarray
    trained: np.ndarray


class ChatTemplate:
    """A Jinja template and the tokenizer it belongs to.

    What a message says is never read as a special token: ``<|im_end|>`` in it stays text. Not so
    ``<think>`` and the other marks that an assistant writes, where a tokenizer has them so.

    Args:
        tokenizer: The tokenizer.
        source: The template. What an assistant writes stands in ``{% generation %}`` blocks; a
            template without them renders, but says nothing of what is trained.

    Raises:
        UserError: it is not Jinja.
    """

    def __init__(self, tokenizer: Tokenizer, source: str):
        from jinja2 import TemplateSyntaxError

        self.tokenizer, self.source = tokenizer, source
        try:
            self._template = _environment().from_string(source)
        except TemplateSyntaxError as error:
            raise UserError(
                f"the chat template is broken in line {error.lineno}: {error}"
            ) from None
        added = tokenizer.backend.get_added_tokens_decoder()
        self._special = {t.content: i for i, t in added.items() if t.special}
        self._specials = _any_of(self._special.keys() - set(MARKERS))
        self._parts = re.compile(f"({_any_of(self._special).pattern}|{BEGIN}|{END})")

    def render(
        self,
        messages: Sequence[Message],
        *,
        mode: str | None = None,
        tools: Sequence[Any] | None = None,
        date: str | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: The turns.
            mode: ``think`` or ``no_think``; by default the template's. Flags in the messages come
                before it.
            tools: Functions the model may call, as JSON schemas.
            date: Today, as ``2025-07-01``; what is trained on should not depend on the day.
            add_generation_prompt: Begin the assistant's next turn.
            variables: Any others of the template, such as ``python_tools`` or ``bare``.

        Raises:
            UserError: the mode is unknown, or the template refuses the messages.
        """
        text = self._marked(
            messages,
            mode=mode,
            tools=tools,
            date=date,
            add_generation_prompt=add_generation_prompt,
            **variables,
        )
        return re.sub(f"[{FORGED}{BEGIN}{END}]", "", text)

    def encode(self, messages: Sequence[Message], **options: Any) -> Rendered:
        """The tokens of a conversation, as :meth:`render` words it.

        What the assistant writes is tokenised apart from what precedes it, as at inference.

        Args:
            messages: The turns.
            options: Those of :meth:`render`.

        Raises:
            UserError: as :meth:`render`.
        """
        text = self._marked(messages, **options)
        tokens: list[int] = []
        trained: list[bool] = []
        inside = False
        for part in self._parts.split(text):
            if part in (BEGIN, END):
                inside = part == BEGIN
                continue
            special = self._special.get(part)
            plain = part.replace(FORGED, "")
            ids = self.tokenizer.encode(plain) if special is None else [special]
            tokens += ids
            trained += [inside] * len(ids)
        return Rendered(np.array(tokens, np.int32), np.array(trained, bool))

    def _marked(
        self,
        messages: Sequence[Message],
        mode: str | None = None,
        tools: Sequence[Any] | None = None,
        date: str | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The text with marks: around what the assistant writes, and in forged special tokens."""
        from jinja2 import TemplateError

        if mode is not None:
            if mode not in MODES:
                raise UserError(f"mode is {mode!r}, expected think or no_think")
            variables = {"enable_thinking": MODES[mode]} | variables
        if date is not None:
            variables = {"date": date} | variables
        given = self._disarm({"messages": messages, "tools": tools, **variables})
        special = {f"{name}_token": token for name, token in self.special_tokens.items()}
        try:
            return self._template.render(
                **special,
                **given,
                add_generation_prompt=add_generation_prompt,
                strftime_now=lambda form: day_of(date).strftime(form),
            )
        except UserError:
            raise
        except (TemplateError, TypeError, AttributeError, ValueError) as error:
            raise UserError(
                f"the chat template refuses a conversation: {one_line(error)}"
            ) from None

    @property
    def special_tokens(self) -> dict[str, str]:
        """The tokens ``bos`` and ``eos``; empty where the tokenizer has none."""
        ids = {"bos": self.tokenizer.bos_id, "eos": self.tokenizer.eos_id}
        names = {
            name: self.tokenizer.backend.id_to_token(i) for name, i in ids.items() if i is not None
        }
        return {"bos": "", "eos": ""} | names

    def _disarm(self, value: Any) -> Any:
        """Mark what looks like a special token in any text of the user's."""
        if isinstance(value, str):
            if found := NO_CHARACTER.search(value):
                raise UserError(f"a message holds U+{ord(found[0]):04X}, which is no character")
            return self._specials.sub(lambda match: match[0][0] + FORGED + match[0][1:], value)
        if isinstance(value, Mapping):
            return {self._disarm(key): self._disarm(content) for key, content in value.items()}
        if isinstance(value, list | tuple):
            return [self._disarm(content) for content in value]
        return value

    @property
    def marks_answers(self) -> bool:
        """Whether the template says what an assistant writes."""
        return bool(re.search(r"{%-?\s*generation\s*-?%}", self.source))

    @cached_property
    def variables(self) -> set[str]:
        """Names that the template reads."""
        from jinja2 import meta

        environment = _environment()
        return meta.find_undeclared_variables(environment.parse(self.source))

    @cached_property
    def openings(self) -> dict[str, np.ndarray]:
        """The tokens that a generation prompt adds to a question in each mode; int32."""
        question = [{"role": "user", "content": "a"}]
        options = {"date": ANY_DAY}
        found = {}
        for mode in MODES:
            prompt = self.encode(question, mode=mode, add_generation_prompt=True, **options)
            until = self.encode(question, mode=mode, **options)
            found[mode] = prompt.tokens[len(until.tokens) :]
        return found

    @cached_property
    def stop_id(self) -> int:
        """The token that ends an assistant's turn.

        Raises:
            UserError: the template ends it with no special token, so no model could learn to stop.
        """
        question = [{"role": "user", "content": "a"}]
        both = [*question, {"role": "assistant", "content": "b"}]
        options = {"mode": "no_think", "date": ANY_DAY}
        prompt = self.encode(question, add_generation_prompt=True, **options).tokens
        answer = self.encode(both, **options).tokens[len(prompt) :]
        stop = next((i for i in answer.tolist() if i in set(self._special.values())), None)
        if stop is None:
            raise UserError(
                "the chat template ends an answer with no special token, so a model cannot learn "
                "to stop; expected one such as <|im_end|>, known to the tokenizer"
            )
        return stop


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def default_source() -> str:
    """The project's own template."""
    return Path(__file__).with_name(FILE).read_text(encoding="utf-8")


def default_template(tokenizer: Tokenizer) -> ChatTemplate:
    """The project's template for a tokenizer that has none of its own.

    Raises:
        UserError: the tokenizer does not know its tokens.
    """
    for token in ("<|im_start|>", "<|im_end|>"):
        if tokenizer.backend.token_to_id(token) is None:
            raise UserError(
                f"the tokenizer has no chat template, and no token '{token}' for the project's "
                "own; name another with data.chat_template, or add the token"
            )
    tokenizer.backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return ChatTemplate(tokenizer, default_source())


def load_chat_template(
    folder: str | Path, tokenizer: Tokenizer | None = None
) -> ChatTemplate | None:
    """The template that is stored with a tokenizer; ``None`` where there is none.

    Args:
        folder: With ``tokenizer.json``, and ``chat_template.jinja`` or a ``tokenizer_config.json``
            that holds the template.
        tokenizer: The tokenizer, if it is loaded already.

    Raises:
        UserError: there is no tokenizer, or the template is not Jinja.
    """
    from smol.data.tokenizer import load_tokenizer

    source = _stored_source(Path(folder))
    return source and ChatTemplate(tokenizer or load_tokenizer(folder), source)


def save_chat_tokenizer(template: ChatTemplate, folder: str | Path, **defaults: Any) -> None:
    """Write a tokenizer with its chat template, for transformers and the servers built on it.

    Its end-of-text token is the one that ends an assistant's turn, so generation stops there.

    Args:
        template: The template and its tokenizer.
        folder: Receives ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja``.
        defaults: What a model was trained with, such as ``date``: the values of variables of the
            template where none are given. A date also replaces today's where the template asks
            for it.
    """
    backend, folder = template.tokenizer.backend, Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": template.special_tokens["bos"] or None,
        "eos_token": backend.id_to_token(template.stop_id),
        "pad_token": PAD if backend.token_to_id(PAD) is not None else None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 30,
    }
    source = template.source
    if day := defaults.get("date"):
        source = TODAY.sub(lambda match: json.dumps(day_of(day).strftime(match[2])), source)
    for name, value in defaults.items():
        if value is None or name not in template.variables:
            continue
        line = f"{{%- set {name} = {name} | default(VALUE) %}}\n"
        source = re.sub(re.escape(line).replace("VALUE", ".*"), "", source)  # of an earlier phase
        source = (line.replace("VALUE", json.dumps(value)) if value else "") + source
    (folder / FILE).write_text(source, encoding="utf-8")
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "tokenizer.json", json.loads(backend.to_str()))


def _stored_source(folder: Path) -> str | None:
    file, config = folder / FILE, folder / "tokenizer_config.json"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    stored = None
    if config.is_file():
        stored = json.loads(config.read_text(encoding="utf-8")).get("chat_template")
    if isinstance(stored, list):  # several by name
        by_name = {entry["name"]: entry["template"] for entry in stored}
        stored = by_name.get("default")
    return stored


def day_of(date: str | None) -> Date:
    """The day that a date names.

    Raises:
        UserError: it is none.
    """
    try:
        return Date.fromisoformat(date)
    except (TypeError, ValueError):
        raise UserError(
            f"today's date for the chat template is {date!r}, expected one such as --data.date "
            "2025-07-01"
        ) from None


@cache
def _environment() -> Any:
    """Jinja as transformers sets it up, with marks around what an assistant writes."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return f"{BEGIN}{caller()}{END}"

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    return environment
