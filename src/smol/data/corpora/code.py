"""Code: the modules of the standard library, as they are installed with Python."""

import hashlib
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

# Tests are near copies of each other; the last two are tables that a program wrote.
SKIPPED_FOLDERS = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__",
    "encodings", "pydoc_data",
}  # fmt: skip
SMALLEST, LARGEST = 400, 200_000  # characters


def documents() -> Iterator[str]:
    """Yield the source of each module, sorted by path, without repeats and generated tables."""
    root = Path(sysconfig.get_path("stdlib"))
    seen = set()
    for path in sorted(root.rglob("*.py")):
        folders = path.relative_to(root).parts[:-1]
        if SKIPPED_FOLDERS.intersection(folders) or any(f.startswith("config-") for f in folders):
            continue
        try:
            with tokenize.open(path) as stream:  # honours the file's own coding line
                text = stream.read().strip() + "\n"
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if SMALLEST <= len(text) <= LARGEST and digest not in seen and not is_table(text):
            seen.add(digest)
            yield text


def is_table(text: str) -> bool:
    """Tell whether a source is mostly literals, as generated tables are."""
    words = len(re.findall(r"[A-Za-z_]{2,}", text))
    literals = len(re.findall(r"\b(?:0x[0-9a-fA-F]+|\d+)\b|\\x[0-9a-f]{2}|\\u[0-9a-f]{4}", text))
    return literals > words
