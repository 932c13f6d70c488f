"""From a configuration that the parser refuses to the one line that says why.

The parser reports every alternative of every type on the way down. Here the refused values are
walked along their type hints to the deepest one that does not fit, which alone is told.
"""

import inspect
import pkgutil
import sys
import types
from argparse import SUPPRESS, ArgumentError
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import is_dataclass
from importlib import import_module
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from jsonargparse import ArgumentParser

from smol.cli_help import full_names
from smol.config import CLASS_KEYS, Config
from smol.errors import UserError, nearest, shown


class Problem(NamedTuple):
    """A place in the configuration and what is wrong there."""

    path: tuple[str, ...]
    message: str


def explain(
    values: dict[str, Any], parser: ArgumentParser, source: Config, error: ArgumentError
) -> str:
    """Tell in one line why a parser refused a configuration.

    Args:
        values: The refused values, interpolations resolved.
        parser: The parser that refused them.
        source: The layers they came from, to name the file or the flag.
        error: The parser's own words, used where no single value is to blame.

    Returns:
        ``key (file): what is wrong, what was seen, what was expected``.
    """
    problem = _in_group(values, _parameters(parser), ())
    return _line(problem, source) if problem else " ".join(str(error).split())


def check_keys(values: dict[str, Any], parser: ArgumentParser, source: Config) -> None:
    """Refuse an unknown key of the parser or its groups, also an empty one, which it would take.

    Raises:
        UserError: With the line that `explain` would give.
    """

    def inside(value: Any, hint: Any, path: tuple[str, ...]) -> Problem | None:
        return _in_group(value, hint, path, inside) if isinstance(hint, dict) else None

    if problem := _in_group(values, _parameters(parser), (), inside):
        raise UserError(_line(problem, source))
    for name, value in (values.get("callbacks") or {}).items():
        if value == {}:  # a callback that does nothing, to the parser
            problem = Problem(("callbacks", str(name)), f"expected a class, got {shown(value)}")
            raise UserError(_line(problem, source))


def _line(problem: Problem, source: Config) -> str:
    origin = source.origin(problem.path)
    if origin and origin.startswith("--"):
        return f"{origin}: {problem.message}"
    where = ".".join(problem.path) or "configuration"
    return f"{where} ({origin}): {problem.message}" if origin else f"{where}: {problem.message}"


class _Required(NamedTuple):
    hint: Any


def _parameters(parser: ArgumentParser) -> dict[str, Any]:
    """Names to type hints, nested where a group has names of its own."""
    tree: dict[str, Any] = {}
    for action in parser._actions:
        hint = getattr(action, "_typehint", None)
        if hint is None or action.dest is SUPPRESS or action.dest.endswith(".help"):
            continue
        *groups, name = action.dest.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = _Required(hint) if action.required else hint
    return tree


def _class_parameters(cls: type) -> dict[str, Any]:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, fail_untyped=False, sub_configs=True)
    return _parameters(parser)


def _in_group(
    values: Any,
    known: dict[str, Any],
    path: tuple[str, ...],
    inside: Callable[[Any, Any, tuple[str, ...]], Problem | None] | None = None,
) -> Problem | None:
    """The first problem in values for names that are known; ``inside`` looks at each value."""
    inside = inside or _in_value
    if not isinstance(values, dict):
        return Problem(path, f"expected a mapping, got {shown(values)}")
    for key, value in values.items():
        if key not in known:
            return Problem((*path, str(key)), _unknown_key(str(key), known))
        if problem := inside(value, known[key], (*path, key)):
            return problem
    for key, hint in known.items():
        if key in values:
            continue
        if isinstance(hint, _Required):
            return Problem((*path, key), f"missing, expected {_name(hint.hint)}")
        if isinstance(hint, dict) and (problem := _in_group({}, hint, (*path, key), inside)):
            return problem
    return None


def _unknown_key(key: str, known: dict[str, Any]) -> str:
    # The keys of a group are offered too: max_steps is trainer.max_steps.
    groups = {name: group for name, group in known.items() if isinstance(group, dict)}
    inner = [f"{name}.{inner}" for name, group in groups.items() for inner in group]
    if near := nearest(key, [*known, *inner]):
        return f"unknown key '{key}'.{near}"
    return f"unknown key '{key}', expected one of {', '.join(known) or 'none'}"


def _in_value(value: Any, hint: Any, path: tuple[str, ...]) -> Problem | None:
    """The deepest problem in a value that does not fit its type hint."""
    if isinstance(hint, dict):
        return _in_group(value, hint, path)
    if isinstance(hint, _Required):
        hint = hint.hint
        if value is None and type(None) not in _options(hint):  # the parser takes any null
            return Problem(path, f"expected {_name(hint)}, got null")
    if _accepts(value, hint):
        return None
    for option in _options(hint):
        for problem in _inside(value, option, path):
            if problem:
                return problem
    return Problem(path, f"expected {_name(hint)}, got {shown(value)}")


def _inside(value: Any, option: Any, path: tuple[str, ...]) -> Iterator[Problem | None]:
    """Problems of the parts of a value, if it has the shape of this member of a union."""
    origin, arguments = get_origin(option), get_args(option)
    if isinstance(value, dict) and origin is dict and len(arguments) == 2:
        for key, inner in value.items():
            yield _in_value(inner, arguments[1], (*path, str(key)))
    elif isinstance(value, list) and origin in (list, Iterable) and arguments:
        for index, inner in enumerate(value):
            yield _in_value(inner, arguments[0], (*path, str(index)))
    elif isinstance(value, dict) and is_dataclass(option) and "class_path" not in value:
        yield _in_group(value, _class_parameters(option), path)
    elif inspect.isclass(option) and option.__module__ != "builtins":
        if isinstance(value, str):
            yield _in_class({"class_path": value}, option, path)
        elif isinstance(value, dict):
            yield _in_class(value, option, path)


def _in_class(value: dict[str, Any], base: type, path: tuple[str, ...]) -> Problem | None:
    class_path = value.get("class_path")
    if not isinstance(class_path, str):
        return Problem(path, f"expected class_path and init_args, got {shown(value)}")
    for key in value:
        if key not in CLASS_KEYS:
            hint = nearest(str(key), CLASS_KEYS) or f" Put '{key}' under init_args."
            return Problem((*path, str(key)), f"unknown key '{key}' beside class_path.{hint}")
    try:
        cls = import_class(class_path, base)
    except UserError as error:
        return Problem((*path, "class_path"), str(error))
    if not inspect.isclass(cls) or not issubclass(cls, base):
        return Problem((*path, "class_path"), f"'{class_path}' is no {base.__name__}")
    return _in_group(value.get("init_args") or {}, _class_parameters(cls), (*path, "init_args"))


def import_class(class_path: str, base: type | None = None) -> type:
    """Import a class.

    Args:
        class_path: ``package.module.Class``.
        base: Classes that are derived from this one and loaded may go by their last name.

    Raises:
        UserError: If it is not there, with the nearest module or class.
    """
    module_name, _, name = class_path.rpartition(".")
    if not module_name:
        derived = _subclasses(base) if base else ()
        loaded = {cls.__name__: cls for cls in derived if not cls.__name__.startswith("_")}
        if name in loaded:
            return loaded[name]
        names = full_names()
        near = (
            f" Did you mean '{names[name]}'?" if name in names else nearest(name, [*loaded, *names])
        )
        raise UserError(f"unknown class '{name}', expected a full path as package.{name}.{near}")
    module = _import_module(module_name, class_path)
    if not hasattr(module, name):
        known = [key for key, item in vars(module).items() if inspect.isclass(item)]
        known = [f"{module_name}.{key}" for key in known]
        raise UserError(f"unknown class '{class_path}'.{nearest(class_path, known)}")
    return getattr(module, name)


def _import_module(name: str, class_path: str) -> types.ModuleType:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if not error.name or not f"{name}.".startswith(f"{error.name}."):
            raise UserError(f"importing '{class_path}' failed, {error}") from None
        parent, _, _ = error.name.rpartition(".")
        folders = sys.modules[parent].__path__ if parent else None
        known = [module.name for module in pkgutil.iter_modules(folders)]
        known = [f"{parent}.{module}" if parent else module for module in known]
        raise UserError(
            f"unknown class '{class_path}': no module '{error.name}'.{nearest(error.name, known)}"
        ) from None
    except ImportError as error:
        raise UserError(f"importing '{class_path}' failed, {error}") from None


def _subclasses(base: type) -> Iterator[type]:
    for cls in base.__subclasses__():
        yield cls
        yield from _subclasses(cls)


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _accepts(value: Any, hint: Any) -> bool:
    """Whether the parser takes a value for a type hint."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        parser.parse_object({"value": deepcopy(value)})
    except (ArgumentError, ValueError, TypeError):
        return False
    return True


def _name(hint: Any) -> str:
    """A type hint as it is written: ``int | None``."""
    if hint is type(None):
        return "null"
    if get_origin(hint) in (Union, types.UnionType):
        return " | ".join(_name(option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return " | ".join(repr(option) for option in get_args(hint))
    if inspect.isclass(hint) and not get_args(hint):
        return hint.__name__
    if inspect.isclass(get_origin(hint)) and Ellipsis not in get_args(hint):
        return f"{get_origin(hint).__name__}[{', '.join(map(_name, get_args(hint)))}]"
    return str(hint).replace("typing.", "")
