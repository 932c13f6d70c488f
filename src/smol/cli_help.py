"""What ``train.py`` can be given: configurations, and the classes that its keys take.

Classes are found by parsing sources instead of importing them, so that help answers at once.
"""

import ast
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from typing import Any

from smol.config import DOTTED_CLASS
from smol.errors import UserError
from smol.paths import project_root

# The key that takes a class: the package that exports such classes, and the end of a base's name.
PLACES = {
    "model": ("smol.modules", "DecoderModule"),
    "model.schedule": ("smol.optim", "Schedule"),
    "data": ("smol.data", "LightningDataModule"),
    "callbacks.NAME": ("callbacks", "Callback"),
    "trainer.logger": ("smol.experiments", "Logger"),
    "trainer.strategy": ("smol.parallel", "Strategy"),
}
OF_OTHER_SCRIPTS = ("ablations", "data", "merges", "tasks")  # folders of configs/
WIDTH = 120


def overview() -> str:
    """All configurations of the project and all classes by their keys, a line each."""
    lines = []
    if configs := dict(_configs()):
        lines += [f"configurations, in {project_root()}:", *_table(configs, 2), ""]
    lines.append("classes, by the key that takes them; --KEY.help CLASS prints the keys of one:")
    for key in PLACES:
        lines += [f"  --{key}", *_table(classes(key), 4)]
    return "\n".join(lines) + "\n"


def classes(key: str) -> dict[str, str]:
    """The classes that the project has for a key of `PLACES`: class path to its first line."""
    package, base = PLACES[key]
    spec = find_spec(package)
    if spec is None:
        return {}
    init, found = Path(spec.origin), {}
    exported = _exported(init)
    for node in _derived(init.parent, base):
        if node.name in exported:
            text = ast.get_docstring(node) or ""
            found[f"{package}.{node.name}"] = text.partition("\n")[0]
    return dict(sorted(found.items()))


def full_names() -> dict[str, str]:
    """The class paths of the project's classes by their last names."""
    return {path.rpartition(".")[2]: path for key in PLACES for path in classes(key)}


def key_help(key: str, class_path: str | None, values: dict[str, Any]) -> str:
    """What ``--KEY.help [CLASS]`` prints: the keys of a class, or the classes to choose from.

    Args:
        key: Where the class goes, such as ``model`` or ``callbacks.throughput``.
        class_path: The class; a class of this project may go by its last name. By default the one
            that ``values`` set.
        values: The merged configuration.

    Raises:
        UserError: If there is no such class, or no class goes to this key.
    """
    if class_path is None:
        key, class_path = _configured(key, values) or (key, None)
    if key == "callbacks":
        key = "callbacks.NAME"
    if class_path is None:
        place = "callbacks.NAME" if key.startswith("callbacks.") else key
        if place not in PLACES:
            raise UserError(
                f"no class is known for --{key}; type --{key}.help CLASS, or --help for all keys"
            )
        head = f"classes for --{place}; type --{key}.help CLASS for the keys of one:"
        return "\n".join([head, *_table(classes(place), 2)]) + "\n"
    from smol.cli_errors import import_class

    try:
        cls = import_class(full_names().get(class_path, class_path))
        if not isinstance(cls, type):
            raise UserError(f"'{class_path}' is no class")
        return _class_help(cls, key)
    except UserError as error:
        raise UserError(f"--{key}.help: {error}") from None


def _configs() -> Iterator[tuple[str, str]]:
    """Files that ``--config`` takes, and what their first comment says."""
    folder = project_root() / "configs"
    for file in sorted(folder.rglob("*.yaml"), key=lambda file: (len(file.parts), file)):
        if file.relative_to(folder).parts[0] not in OF_OTHER_SCRIPTS:
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
            comment = lines[0].lstrip("# ") if lines and lines[0].startswith("#") else ""
            yield f"configs/{file.relative_to(folder)}", comment


def _table(rows: dict[str, str], indent: int) -> Iterator[str]:
    for name, text in rows.items():
        head = f"{' ' * indent}{name:<{42 - indent}}  "
        yield (head + shorten(text, WIDTH - len(head), placeholder="…")).rstrip()


def _derived(folder: Path, base: str, whole: bool = False) -> Iterator[ast.ClassDef]:
    """Classes of a folder with a base whose name ends like this, or is this as a whole.

    Those derived from them follow in turn.
    """
    for file in folder.glob("*.py"):
        for node in _statements(file, base):
            if not isinstance(node, ast.ClassDef):
                continue
            names = [ast.unparse(parent) for parent in node.bases]
            if base in names or (not whole and any(name.endswith(base) for name in names)):
                yield node
                yield from _derived(folder, node.name, whole=True)


def _statements(file: Path, word: str) -> list[ast.stmt]:
    """The statements of a source file, if the word is in it."""
    source = file.read_bytes()
    try:
        return ast.parse(source).body if word.encode() in source else []
    except SyntaxError:  # told when it is imported
        return []


def _exported(file: Path) -> set[str]:
    for node in _statements(file, "__all__"):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def _configured(key: str, values: dict[str, Any]) -> tuple[str, str] | None:
    """The longest beginning of a key at which the configuration has a class, and that class."""
    found, node, path = None, values, []
    for part in key.split("."):
        node = node.get("init_args", node) if isinstance(node, dict) else None
        node = node.get(part) if isinstance(node, dict) else None
        path.append(part)
        class_path = node.get("class_path") if isinstance(node, dict) else node
        if isinstance(class_path, str) and DOTTED_CLASS.fullmatch(class_path):
            found = ".".join(path), class_path
    return found


def _class_help(cls: type, key: str) -> str:
    """The keys of a class and of the dataclasses that it takes, below ``--key``."""
    from argparse import SUPPRESS
    from dataclasses import is_dataclass
    from typing import get_args

    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(exit_on_error=False, add_help=False, usage=SUPPRESS)
    parser.add_class_arguments(cls, key, fail_untyped=False)
    inner = []
    for action in parser._actions:
        hint = getattr(action, "_typehint", None)
        if hint is None or action.dest.endswith(".help"):
            action.help = SUPPRESS
            continue
        options = [option for option in get_args(hint) if is_dataclass(option)]
        inner += [_class_help(option, action.dest) for option in options]
    return "\n".join([parser.format_help().lstrip(), *inner])
