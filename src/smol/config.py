"""Layered YAML files: read, merged, overridden by flags, interpolated.

A configuration is a stack of layers. A file lies above the files that its ``extends`` names, a
later file above an earlier one, and every flag above every file. Layers merge by three rules:

1. Mappings merge key by key; a list or a scalar replaces what is below.
2. A ``class_path`` other than the one below drops the ``init_args`` below.
3. ``null`` replaces too, and what is set over a ``null`` starts afresh.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from smol.errors import UserError, nearest, shown
from smol.paths import project_root, resolve

EXTENDS = "extends"
CLASS_KEYS = {"class_path", "init_args", "dict_kwargs"}
MAPPINGS = ("trainer", "callbacks", "vars")  # never a scalar, unlike a class
NAMED = {"callbacks", "stages", "mixture"}  # mappings whose keys are made up by users
CLOSE = 0.7  # a name this near to another one is taken for a misspelling of it
_VARIABLE = re.compile(r"\bvars\.(\w+(?:\.\w+)*)")
DOTTED_CLASS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


@dataclass(frozen=True)
class Layer:
    """What one file or one flag sets.

    Attributes:
        source: The name of the file or the flag, for error messages.
        values: Nested mappings of what it sets, interpolations unresolved.
    """

    source: str
    values: dict[str, Any]


@dataclass
class Config:
    """A stack of layers and what they amount to.

    Attributes:
        values: All layers merged, interpolations kept.
        layers: From the lowest to the highest.
    """

    values: dict[str, Any] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)

    def add(self, layer: Layer) -> None:
        """Put a layer on top.

        Raises:
            UserError: If it has a scalar or a list where only a mapping can be.
        """
        for key in MAPPINGS:
            if not isinstance(value := layer.values.get(key), dict | None):
                where = layer.source if layer.source.startswith("--") else f"{key} ({layer.source})"
                raise UserError(f"{where}: expected a mapping, got {shown(value)}")
        self.values = merge(self.values, layer.values)
        self.layers.append(layer)

    def origin(self, path: Sequence[str]) -> str | None:
        """The source of the highest layer that sets ``path``, or None."""
        for layer in reversed(self.layers):
            node: Any = layer.values
            for key in path:
                if isinstance(node, list) and key.isdigit() and int(key) < len(node):
                    node = node[int(key)]
                elif isinstance(node, dict) and key in node:
                    node = node[key]
                elif not (isinstance(node, str) and key == "class_path"):
                    break
            else:
                return layer.source
        return None


def unused(config: Config) -> Iterator[str]:
    """Find what has no effect: variables that nothing reads, removals of what is nowhere set.

    A file may hold variables for another one, or remove what only some others have; it is told if
    the name is close to one that has an effect. A flag is meant for this run.

    Yields:
        A line for each such key of a file.

    Raises:
        UserError: On a flag that sets such a variable, or is close to the name of what it removes.
    """
    for path, problem, near in chain(_unread_variables(config), _empty_removals(config)):
        origin = config.origin(path) or ""
        if origin.startswith("--") and (near or path[0] == "vars"):
            raise UserError(f"{origin}: {problem}.{near}")
        if near:
            yield f"{'.'.join(map(str, path))} ({origin}): {problem}.{near}"


def load_config(
    files: Iterable[str | Path], overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Merge configuration files and overrides into one mapping.

    Args:
        files: YAML files from the lowest to the highest, looked up in the working directory and
            then in the project root.
        overrides: Dotted key to value, such as ``{"vars.context": 512, "callbacks.z_loss": None}``.
            ``init_args`` may be left out: ``model.hidden_size``.

    Returns:
        The merged mapping, interpolations kept.

    Raises:
        UserError: On a missing file, bad YAML, a duplicate key or a circle of ``extends``.
    """
    return compose(files, overrides).values


def compose(files: Iterable[str | Path], overrides: Mapping[str, Any] | None = None) -> Config:
    """Like `load_config`, but keeps the layers, so that an error can name its source."""
    config = Config()
    applied: set[Path] = set()
    for file in files:
        for layer in _read_layers(_find(file), applied):
            config.add(layer)
    for key, value in (overrides or {}).items():
        config.add(Layer(f"--{key}", _nest(config.values, key, value)))
    return config


def merge(below: Any, above: Any) -> Any:
    """Lay one value over another by the three rules of this module; neither is changed."""
    # A class may be written as its path alone, and so be swapped or given arguments later.
    if _is_class(below) and isinstance(above, str) and DOTTED_CLASS.fullmatch(above):
        above = {"class_path": above}
    elif isinstance(below, str) and isinstance(above, dict) and "init_args" in above:
        below = {"class_path": below}
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return deepcopy(above)
    kept = dict(below)
    if _is_class(below) and above.get("class_path", below["class_path"]) != below["class_path"]:
        kept = {key: value for key, value in below.items() if key not in CLASS_KEYS}
    for key, value in above.items():
        kept[key] = merge(kept[key], value) if key in kept else deepcopy(value)
    return kept


def parse_yaml(text: str, source: str) -> Any:
    """Read YAML 1.2 scalars: ``1e-4`` is a number, ``no`` and ``2024-01-01`` are strings.

    Raises:
        UserError: With ``source:line``, on a syntax error or a duplicate key.
    """
    try:
        value = yaml.load(text, Loader=_Loader)
        json.dumps(value, default=str, skipkeys=True)  # finds what holds itself
        return value
    except (RecursionError, ValueError):
        raise UserError(f"{source}: bad YAML, nested too deeply or within itself") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{source}{line}: bad YAML, {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source}: bad YAML, {' '.join(str(error).split())}") from None


def dump_yaml(values: dict[str, Any]) -> str:
    """Write YAML that `parse_yaml` reads back as the same values, keys in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


_Unused = Iterator[tuple[tuple, str, str]]  # path, what is wrong, the nearest name


def _unread_variables(config: Config) -> _Unused:
    read = set(_VARIABLE.findall(repr([layer.values for layer in config.layers])))
    for path, _ in _leaves(config.values.get("vars") or {}):
        name = ".".join(map(str, path))
        if not any(f"{name}.".startswith(f"{used}.") for used in read):
            yield ("vars", *path), f"no file reads 'vars.{name}'", nearest(name, read, CLOSE)


def _empty_removals(config: Config) -> _Unused:
    for path, value in _leaves(config.values):
        *above, name = path
        if value is not None or not NAMED.intersection(above[-1:]):
            continue
        if all(_at(layer.values, path) is None for layer in config.layers):
            there = [str(key) for key, other in _at(config.values, above).items() if other]
            yield path, f"there is no '{name}' to remove", nearest(str(name), there, CLOSE)


def _leaves(tree: dict[str, Any], path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _at(tree: Any, path: Sequence[str]) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _is_class(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("class_path"), str)


def _nest(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The mapping that sets a dotted key, with ``init_args`` put in where a class stands."""
    path: list[str] = []
    node: Any = config
    for part in key.split("."):
        if isinstance(node, list):
            where = ".".join(path)
            raise UserError(f"--{key}: '{where}' is a list; give it whole, as --{where} '[…]'")
        if (_is_class(node) or isinstance(node, str)) and part not in CLASS_KEYS:
            path.append("init_args")
            node = node.get("init_args") if isinstance(node, dict) else None
        path.append(part)
        node = node.get(part) if isinstance(node, dict) else None
    for part in reversed(path):
        value = {part: value}
    return value


def _read_layers(path: Path, applied: set[Path], above: tuple[Path, ...] = ()) -> list[Layer]:
    """The layers of a file, those it extends first.

    ``applied`` holds files that already lie below: two overlays that extend the same base share
    it, instead of the second one undoing the first.
    """
    if path in above:
        circle = " -> ".join(_name(file) for file in (*above[above.index(path) :], path))
        raise UserError(f"{EXTENDS} goes round in a circle: {circle}")
    source = _name(path)
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"), source)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: cannot be read, {error}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise UserError(f"{source}: expected a mapping, got a {type(values).__name__}")
    parents = values.pop(EXTENDS, None) or []
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise UserError(f"{EXTENDS} ({source}): expected a file or a list, got {shown(parents)}")
    layers: list[Layer] = []
    for parent in parents:
        file = (path.parent / parent).resolve()
        if not file.is_file():
            raise UserError(f"{source}: {EXTENDS} {_missing(parent, [file])}")
        if file not in applied:
            layers += _read_layers(file, applied, (*above, path))
    applied.add(path)
    return [*layers, Layer(source, values)]


def _find(file: str | Path) -> Path:
    candidates = [Path(file).expanduser().absolute(), Path(resolve(file))]
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    raise UserError(f"config {_missing(str(file), candidates)}")


def _missing(name: str, candidates: list[Path]) -> str:
    folders = dict.fromkeys(path.parent for path in candidates)
    names = [file.name for folder in folders for file in sorted(folder.glob("*.y*ml"))]
    places = " or ".join(str(folder) for folder in folders)
    return f"file '{name}' not found in {places}.{nearest(Path(name).name, names)}"


def _name(path: Path) -> str:
    root = project_root()
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2 and no duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag.endswith(":null"):
                problem = "expected a name before the colon"
            elif key_node.value in seen:
                problem = f"duplicate key '{key_node.value}'"
            else:
                seen.add(key_node.value)
                continue
            raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        return super().construct_mapping(node, deep)


_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
_replaced = {f"tag:yaml.org,2002:{kind}" for kind in (*_SCALARS, "timestamp")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _replaced]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), list(_first)
    )


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes the strings which `_Loader` would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # PyYAML folds these line breaks as if they were spaces unless they are escaped.
        style = '"' if set(data) & set("\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *resolvers]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_Dumper.add_representer(str, _Dumper.represent_str)
