"""Prose: what programmers wrote for people, found in the Python environment itself.

Documentation strings of installed packages, the descriptions that packages carry, and the language
topics of ``pydoc``. The standard library's own documentation strings stay with its code, so that
no held-out text of one corpus is training text of the other.
"""

import ast
import hashlib
import importlib.metadata
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

SHORTEST_PARAGRAPH, SHORTEST_DOCUMENT = 60, 300  # characters
SOURCE_PER_PACKAGE, SOURCE_IN_ALL = 6_000_000, 60_000_000  # bytes of Python parsed
BYTES_PER_QUOTE = 2000  # a module with fewer triple quotes has too little to say to be parsed
SKIPPED_FOLDERS = {"test", "tests", "testing", "_vendor", "vendor", "_vendored", "third_party"}
FUNCTION_WORDS = {
    "the", "a", "an", "of", "to", "in", "is", "are", "be", "and", "or", "for", "that", "this",
    "it", "with", "as", "by", "on", "if", "not", "from", "can", "will", "which", "when", "you",
    "has", "have", "was", "but", "at", "we", "all",
}  # fmt: skip
NOT_PROSE = re.compile(
    r">>>|:param |:type |copyright|licen[cs]e|warrant|all rights reserved|redistribut",
    re.IGNORECASE,
)
LIST_ITEM = re.compile(r"\s*(?:[-*+•]|\d+[.)])\s")
UNDERLINE = re.compile(r"\s*([=\-~^\"'#*.+])\1{2,}\s*$")

# Markup that stands around words which are worth keeping, and what is left of it.
MARKUP = [
    (re.compile(r":[\w:+-]+:`~?(?:[^`<\n]*?\.)?([^`.<\n]+?)(?:\s*<[^`\n]*>)?`"), r"\1"),
    (re.compile(r"`([^`<\n]+?)\s*<[^`\n]*>`__?"), r"\1"),
    (re.compile(r"``([^`\n]+)``|`([^`\n]+)`_?"), r"\1\2"),
    (re.compile(r"<!--.*?-->|<[^<>\n]{1,200}>", re.DOTALL), ""),
    (re.compile(r"!\[[^\]]*\]\([^)]*\)|!?\[\]\([^)]*\)"), ""),
    (re.compile(r"\[([^\]\n]+)\](?:\([^)\n]*\)|\[[^\]\n]*\])"), r"\1"),
    (re.compile(r"\*\*([^*\n]+)\*\*"), r"\1"),
    (re.compile(r"\s*\[(?:\d+|[A-Z]\w*\d+)\]_"), ""),
    (re.compile(r"(?:https?|ftp)://\S+"), ""),
]
CODE_BLOCK = re.compile(r"^[ \t]*(`{3,}|~{3,}).*?^[ \t]*\1[ \t]*$", re.DOTALL | re.MULTILINE)


def documents(map_files: Callable = map) -> Iterator[str]:
    """Yield one document per module, package description and topic, without repeated paragraphs.

    Args:
        map_files: Like the built-in ``map``; a process pool's spreads the parsing.
    """
    seen: set[bytes] = set()
    yield from _without_repeats(map(paragraphs, _topics()), seen)
    yield from _without_repeats(map(paragraphs, _descriptions()), seen)
    yield from _without_repeats(map_files(module_paragraphs, list(_modules())), seen)


def _without_repeats(found: Iterable[list[str]], seen: set[bytes]) -> Iterator[str]:
    for candidates in found:
        kept = []
        for paragraph in candidates:
            digest = hashlib.sha256(paragraph.lower().encode()).digest()
            if digest not in seen:
                seen.add(digest)
                kept.append(paragraph)
        document = "\n\n".join(kept)
        if len(document) >= SHORTEST_DOCUMENT:
            yield document + "\n"


def paragraphs(text: str) -> list[str]:
    """Return the paragraphs of a text that read as English, unwrapped and without markup."""
    text = CODE_BLOCK.sub("\n\n", text.replace("\r\n", "\n").expandtabs())
    for pattern, kept in MARKUP:
        text = pattern.sub(kept, text)
    blocks = re.split(r"\n\s*\n", text)
    return [block for block in map(_unwrap, blocks) if is_prose(block)]


def _unwrap(block: str) -> str:
    """Join the lines of a paragraph; the items of a list keep a line each."""
    lines: list[str] = []
    for line in block.splitlines():
        if UNDERLINE.match(line) or line.lstrip().startswith((".. ", "|", "@", "#")):
            continue
        if lines and not LIST_ITEM.match(line):
            lines[-1] += " " + line.strip()
        else:
            lines.append(line.strip())
    return "\n".join(re.sub(r"\s+", " ", line) for line in lines).removesuffix("::").strip()


def is_prose(paragraph: str) -> bool:
    """Tell whether a paragraph is sentences: long enough, mostly letters, with function words."""
    if len(paragraph) < SHORTEST_PARAGRAPH or NOT_PROSE.search(paragraph):
        return False
    letters = sum(c.isalpha() or c in " ,.'" for c in paragraph)
    ascii_only = sum(c.isascii() for c in paragraph)
    words = paragraph.lower().split()
    function_words = sum(word in FUNCTION_WORDS for word in words)
    return (
        letters >= 0.9 * len(paragraph)
        and ascii_only >= 0.97 * len(paragraph)
        and function_words >= 0.2 * len(words)
    )


def module_paragraphs(path: str) -> list[str]:
    """Return the prose in the strings of a module, in order, without importing it."""
    try:
        tree = ast.parse(Path(path).read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError):
        return []
    strings = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and len(node.value) >= SHORTEST_PARAGRAPH
        and "\n" in node.value
    ]
    strings.sort(key=lambda node: (node.lineno, node.col_offset))
    return [found for node in strings for found in paragraphs(inspect.cleandoc(node.value))]


def _topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return []
    return [topics[name] for name in sorted(topics)]


def _packages() -> list[importlib.metadata.Distribution]:
    """Return the installed distributions, one per name, in an order that favours none."""
    found = {d.metadata["Name"].lower(): d for d in importlib.metadata.distributions()}
    return [found[name] for name in sorted(found, key=_scatter)]


def _scatter(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _descriptions() -> Iterator[str]:
    for package in _packages():
        yield package.metadata.get_payload() or package.metadata.get("Description") or ""


def _modules() -> Iterator[str]:
    """Yield paths of installed modules, up to a number of bytes per package and in all."""
    total = 0
    for package in _packages():
        files = [
            file
            for file in package.files or ()
            if file.suffix == ".py" and not SKIPPED_FOLDERS.intersection(file.parts)
        ]
        read = 0
        for file in sorted(files, key=lambda file: _scatter(str(file))):
            path = Path(package.locate_file(file))
            if not path.is_file():
                continue
            source = path.read_bytes()
            size = len(source)
            if source.count(b'"""') * BYTES_PER_QUOTE < size:
                continue
            if read + size <= SOURCE_PER_PACKAGE and total + size <= SOURCE_IN_ALL:
                read, total = read + size, total + size
                yield str(path)
