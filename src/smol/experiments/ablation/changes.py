"""What a variant changes, as differences of complete configurations."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from smol.config import NAMED
from smol.errors import UserError
from smol.experiments.ablation.study import SET_BY_STUDY

Tree = Mapping[str, Any]

OF_THE_RUN = ("name", "runs_dir", "vars")  # they say nothing of what is trained
FACTORS = {  # keys that go together, and what they are called
    r"model\.init_args\.schedule\b": "schedule",
    r"data\.init_args\.stages\.[^.]+\.mixture\b": "mixture",
    r"model\.init_args\.optimizer\.groups\.[^.]+": "",
}


def check_one_thing(
    name: str, keys: Iterable[str], written: Iterable[str], effects: Iterable[str]
) -> None:
    """Refuse a variant that changes nothing, or more than one thing.

    One thing may have several effects: a variable that two keys read.

    Args:
        name: Of the variant.
        keys: What its study says that it changes.
        written: Keys in which the merged configurations differ, interpolations kept.
        effects: Keys in which the complete ones differ.

    Raises:
        UserError: It is so.
    """
    if not effects:
        only_variables = all(key.startswith("vars.") for key in keys)
        why = "no code reads it" if only_variables else "the baseline says the same"
        raise UserError(f"variant '{name}' changes nothing: {_words(keys)} is set, but {why}")
    for key in effects:
        if reason := SET_BY_STUDY.get(key.replace("init_args.", "")):
            raise UserError(f"variant '{name}' sets '{key}', which the study does: {reason}")
    swapped = [key.removesuffix("class_path") for key in effects if key.endswith(".class_path")]
    things = sorted({_thing(key, swapped) for key in effects})
    if len(things) > 1 and len({_thing(key, swapped) for key in written}) > 1:
        raise UserError(
            f"variant '{name}' changes {len(things)} things, {_words(things)}; make a variant of "
            "each, and combine the winners afterwards"
        )


def _thing(key: str, swapped: Iterable[str]) -> str:
    """The factor that a key belongs to, or itself."""
    for pattern, name in FACTORS.items():
        if found := re.match(pattern, key):
            return name or found[0]
    for prefix in swapped:  # another class, and its arguments
        if key.startswith(prefix):
            return prefix.rstrip(".")
    return key


def _words(names: Iterable[str]) -> str:
    return " and ".join(f"'{name}'" for name in names)


def difference(below: Tree, above: Tree) -> dict[str, tuple[Any, Any]]:
    """Dotted key to the values of two configurations, wherever they differ."""
    one, other = dict(_leaves(below)), dict(_leaves(above))
    keys = [key for key in one | other if one.get(key, ...) != other.get(key, ...)]
    # Nothing where there is a mapping is no difference of its own.
    inner = [key for key in keys if not any(longer.startswith(f"{key}.") for longer in keys)]
    return {key: (one.get(key), other.get(key)) for key in inner}


def _leaves(tree: Tree, path: str = "", named: bool = False) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{path}{key}.", key in NAMED)
        elif value is not None or not named:  # what has a name and is null is not there
            yield f"{path}{key}", value


def what_trains(tree: Tree) -> dict[str, Any]:
    """A configuration without what only names a run."""
    return {key: value for key, value in tree.items() if key not in OF_THE_RUN}


def at(tree: Any, key: str) -> Any:
    """The value at a dotted key; None where there is none."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def nested(key: str, value: Any) -> dict[str, Any]:
    """The mapping with one value at a dotted key."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value
