"""Tasks: YAML files that say which records to read and how they become prompts.

.. code-block:: yaml

    kind: cloze
    data: hub:allenai/ai2_arc@ARC-Easy/test
    shots_from: hub:allenai/ai2_arc@ARC-Easy/train
    shots: 5
    prompt: "Question: {{ question }}\\nAnswer:"
    choices: choices.text
    answer: choices.label.index(answerKey)

``prompt`` is a Jinja template over the fields of a record; ``choices``, ``answer`` and ``shot`` are
Jinja expressions, which keep their type. There is a filter ``regex_replace(old, new)``.
"""

import random
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from smol.errors import UserError, nearest, one_line, shown
from smol.paths import find, project_root, resolve

if TYPE_CHECKING:
    from smol.data.records import Records

Kind = Literal["multiple_choice", "cloze", "generative", "bits_per_byte", "chat"]
KINDS = get_args(Kind)
FOLDER = "configs/tasks"
NEEDED = {
    "multiple_choice": ("prompt", "choices", "answer"),
    "cloze": ("prompt", "answer"),
    "generative": ("prompt", "answer", "metric"),
    "bits_per_byte": ("prompt",),
    "chat": ("prompt", "answer", "metric"),
}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """What to ask a model and how to judge its answers.

    Raises:
        UserError: If a field that the kind needs is missing, or a value is out of range.
    """

    name: str
    """Of the YAML file, without its suffix."""
    kind: Kind
    """``multiple_choice`` shows lettered choices and scores the letters; ``cloze`` scores the texts
    of the choices, or without choices whether greedy decoding writes the answer; ``generative``
    lets the model write; ``bits_per_byte`` scores whole texts; ``chat`` tries both modes."""
    data: str
    """Records: a jsonl or parquet file, a glob, a URL, or ``hub:NAME@CONFIG/SPLIT``."""
    embedded: str = ""
    """Folder of the embedded corpora, where ``data`` is of them; made if it is missing."""
    prompt: str = ""
    """Jinja template of the context; for ``bits_per_byte`` of the whole text."""
    choices: str = ""
    """Expression of the list of choices."""
    answer: str = ""
    """Expression of the number of the right choice, from 0, or of the answer."""
    shot: str = ""
    """Expression of the answer in a worked example, where it is more than ``answer``."""
    shots: int = 0
    """Worked examples before the question, none of which asks the same; drawn anew for each
    question, by its text and a fixed seed."""
    shots_from: str = ""
    """Records of the examples; by default those of ``data`` where ``where`` is true."""
    delimiter: str = " "
    """Between a prompt and its answer."""
    separator: str = "\n\n"
    """Between examples."""
    description: str = ""
    """Text before all examples."""
    metric: str = ""
    """How an answer of a ``generative`` task is judged; see :mod:`smol.evaluation.graders`."""
    max_new_tokens: int = 256
    """Length of a written answer at most."""
    stop: tuple[str, ...] = ()
    """Texts that end a written answer."""
    group: str = ""
    """Expression of the group of a record, or the list of its groups, for accuracies in chats."""
    where: str = ""
    """Expression that is true of the records to use; by default of all."""
    limit: int | None = None
    """How many records to use, drawn with a fixed seed; ``null`` for all."""
    seed: int = 1234
    """Of the draws."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(
                f"task {self.name}: kind is {shown(self.kind)}, expected one of "
                f"{', '.join(KINDS)}.{nearest(str(self.kind), KINDS)}"
            )
        for key in ("data", *NEEDED[self.kind]):
            if not getattr(self, key):
                raise UserError(f"task {self.name}: {key} is missing, which {self.kind} needs")
        for key in (field.name for field in fields(self) if field.type is str):
            if not isinstance(value := getattr(self, key), str):
                raise UserError(
                    f"task {self.name}: {key} is {shown(value)}, expected text in quotes"
                )
        if not isinstance(self.stop, tuple | list) or not all(
            isinstance(text, str) and text for text in self.stop
        ):
            raise UserError(
                f"task {self.name}: stop is {shown(self.stop)}, expected a list of texts"
            )
        for key, least in {"shots": 0, "limit": 1, "max_new_tokens": 1}.items():
            value = getattr(self, key)
            if value is not None and (type(value) is not int or value < least):
                raise UserError(
                    f"task {self.name}: {key} is {shown(value)}, expected {least} or more"
                )

    def inputs(self) -> list[Any]:
        """What the records are read from, JSON-compatible: changes when that changes.

        Raises:
            UserError: If there is no such input.
        """
        return [self._open(path).inputs() for path in (self.data, self.shots_from) if path]

    def records(self) -> list[dict[str, Any]]:
        """Read the records that the task is about.

        Raises:
            UserError: If they cannot be read, or there are none.
        """
        found = self._used()
        if not found:
            which = f" where {self.where}" if self.where else ""
            raise UserError(f"task {self.name}: {self.data} holds no record{which}")
        if self.limit is not None and self.limit < len(found):
            kept = random.Random(self.seed).sample(range(len(found)), self.limit)
            found = [found[index] for index in sorted(kept)]
        return found

    def examples(self, records: Sequence[Record]) -> list[list[Record]]:
        """The worked examples of each record, ``shots`` of them."""
        if not self.shots:
            return [[] for _ in records]
        found = self._read(self.shots_from) if self.shots_from else self._used()
        pool = {self.question(record): record for record in found}
        if len(pool) <= self.shots:
            source = self.shots_from or self.data
            raise UserError(
                f"task {self.name}: shots is {self.shots}, but {source} holds {len(pool)} records "
                "with different questions; expected more records than shots"
            )
        questions, drawn = list(pool), []
        for record in records:
            own = self.question(record)
            several = random.Random(f"{self.seed}/{own}").sample(questions, self.shots + 1)
            drawn.append([pool[one] for one in several if one != own][: self.shots])
        return drawn

    def context(self, record: Record, examples: Sequence[Record]) -> str:
        """The description, the worked examples and the question, up to where the answer begins."""
        worked = [
            f"{self.question(one)}{self.delimiter}{self.worked_answer(one)}" for one in examples
        ]
        return self.separator.join(filter(None, [self.description, *worked, self.question(record)]))

    def question(self, record: Record) -> str:
        """The prompt of a record, with its choices where the kind shows them."""
        text = self._call(self.prompt, _template, record, "prompt")
        if self.kind != "multiple_choice":
            return text
        lines = [f"{LETTERS[i]}. {choice}" for i, choice in enumerate(self.options(record))]
        return "\n".join((text, *lines, "Answer:"))

    def options(self, record: Record) -> list[str]:
        """The choices of a record."""
        options = self.evaluate("choices", record)
        most = len(LETTERS) if self.kind == "multiple_choice" else None
        if not isinstance(options, list | tuple) or not 2 <= len(options) <= (most or len(options)):
            raise UserError(
                f"task {self.name}: choices {self.choices} is {shown(options)}, expected a list of "
                f"two {f'to {most}' if most else 'or more'}"
            )
        return [str(option) for option in options]

    def answers(self, record: Record) -> tuple[list[str], int]:
        """What is scored after the prompt, and which of it is right."""
        options = self.options(record)
        right = self.evaluate("answer", record)
        if type(right) is not int or not 0 <= right < len(options):
            raise UserError(
                f"task {self.name}: answer {self.answer} is {shown(right)}, expected a number "
                f"from 0 to {len(options) - 1}"
            )
        return list(LETTERS[: len(options)]) if self.kind == "multiple_choice" else options, right

    def worked_answer(self, record: Record) -> str:
        """The answer that stands in a worked example."""
        if self.shot:
            return str(self.evaluate("shot", record))
        if self.choices:
            texts, right = self.answers(record)
            return texts[right]
        return str(self.evaluate("answer", record))

    def groups(self, record: Record) -> list[str]:
        """The groups that a record belongs to."""
        found = self.evaluate("group", record) if self.group else []
        return [str(group) for group in (found if isinstance(found, list | tuple) else [found])]

    def evaluate(self, key: str, record: Record) -> Any:
        """The value of an expression of the task over the fields of a record."""
        return self._call(getattr(self, key), _expression, record, key)

    def _open(self, path: str) -> "Records":
        from smol.data.records import Records

        if self.embedded:
            from smol.data.corpora.chat import ensure_chat

            ensure_chat(resolve(self.embedded), log=partial(print, file=sys.stderr))
        return Records(path)

    def _used(self) -> list[dict[str, Any]]:
        """The records of ``data`` where ``where`` is true."""
        found = self._read(self.data)
        return [record for record in found if not self.where or self.evaluate("where", record)]

    def _read(self, path: str) -> list[dict[str, Any]]:
        return [record for _, record in self._open(path)]

    def _call(self, source: str, compile_: Callable, record: Record, key: str) -> Any:
        from jinja2 import TemplateError, Undefined

        try:
            value = compile_(source)(**record)
            if isinstance(value, Undefined):
                str(value)  # says what is undefined
            return value
        except (
            TemplateError,
            TypeError,
            ValueError,
            ArithmeticError,
            AttributeError,
            LookupError,
        ) as error:
            raise UserError(
                f"task {self.name}: {key} {shown(source)}: {one_line(error)}; the record has "
                f"{', '.join(record)}"
            ) from None


def known_tasks() -> list[str]:
    """Names of the tasks in ``configs/tasks``."""
    return sorted(file.stem for file in (project_root() / FOLDER).glob("*.yaml"))


def load_task(name: str | Path) -> Task:
    """Read a task by its name in ``configs/tasks``, or by its file.

    Raises:
        UserError: If there is no such task, or its file holds something else.
    """
    from smol.config import parse_yaml

    path = Path(find(name))
    if path.suffix not in (".yaml", ".yml"):
        path = project_root() / FOLDER / f"{name}.yaml"
        if not path.is_file():
            raise UserError(
                f"no task '{name}', expected the path of a YAML file or one of "
                f"{', '.join(known_tasks())}.{nearest(str(name), known_tasks())}"
            )
    if not path.is_file():
        raise UserError(f"{name}: no such file; expected a task such as {FOLDER}/arc_easy.yaml")
    content = parse_yaml(path.read_text(encoding="utf-8"), str(name))
    if not isinstance(content, dict):
        raise UserError(f"{name} holds {shown(content)}, expected keys such as kind and data")
    known = [field.name for field in fields(Task) if field.name != "name"]
    for key in content:
        if key not in known:
            raise UserError(f"{name}: unknown key '{key}'.{nearest(str(key), known)}")
    for key in ("kind", "data"):
        if key not in content:
            raise UserError(f"{name}: {key} is missing, which every task needs")
    content = {key: tuple(v) if isinstance(v, list) else v for key, v in content.items()}
    return Task(name=path.stem, **content)


@cache
def _environment() -> Any:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.globals["enumerate"] = enumerate
    environment.filters["regex_replace"] = lambda text, old, new="": re.sub(old, new, text)
    return environment


@cache
def _template(source: str) -> Callable[..., str]:
    return _environment().from_string(source).render


@cache
def _expression(source: str) -> Callable[..., Any]:
    return _environment().compile_expression(source, undefined_to_none=False)
