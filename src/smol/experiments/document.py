"""A document of text, tables and pictures, as markdown and as one HTML file."""

import io
import re
import sys
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from smol.data.card import write_atomic
from smol.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 144
NUMBER = re.compile(r"(?!\d{4}-)[-+±<>~]?\d.*|-?")  # what each cell of a column of numbers holds

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ --text: #1c2024; --back: #fff; --faint: #60646c; --line: #d9d9e0; --tint: #f3f3f6; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --text: #e4e4e9; --back: #17181b; --faint: #a0a3ab; --line: #3b3d45; --tint: #222429; }}
}}
body {{ max-width: 60rem; margin: 2.5rem auto; padding: 0 1.25rem; color: var(--text);
  background: var(--back); font: 16px/1.5 system-ui, sans-serif; }}
h1, h2, h3 {{ line-height: 1.2; }}
h2 {{ margin-top: 2.5rem; border-bottom: 1px solid var(--line); padding-bottom: 0.3rem; }}
img {{ display: block; max-width: 100%; margin: 1rem 0 0.25rem; background: #fff;
  border-radius: 6px; }}
table {{ display: block; overflow-x: auto; border-collapse: collapse; margin: 1rem 0 0.25rem;
  font-size: 0.9rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.25rem 0.75rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }}
p > em:only-child {{ color: var(--faint); font-size: 0.9rem; }}
code, pre {{ font: 0.85rem/1.45 ui-monospace, monospace; background: var(--tint);
  border-radius: 4px; }}
code {{ padding: 0.1rem 0.3rem; overflow-wrap: anywhere; }}
pre {{ padding: 0.75rem 1rem; overflow-x: auto; white-space: pre-wrap; }}
pre code {{ padding: 0; }}
</style>
</head>
<body>
{body}</body>
</html>
"""


@dataclass(frozen=True)
class Table:
    """Rows of cells; a column of numbers is aligned to the right.

    Attributes:
        header: Heads of the columns.
        rows: Cells of each row, as many as there are heads; inline markdown, as is the header.
        caption: A line below.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
        name: Name of its file without the suffix: ASCII letters, digits, ``_``, ``-`` and ``.``.
        draw: Returns the figure; called once.
        caption: A line below, and what is read aloud in the place of the picture.
    """

    name: str
    draw: Callable[[], "Figure"]
    caption: str = ""


Block = str | Table | Picture


def write_document(
    folder: Path, title: str, blocks: Sequence[Block], stem: str = "report"
) -> tuple[Path, Path]:
    """Write ``<stem>.md``, its pictures in ``<stem>/``, and ``<stem>.html``, which stands alone.

    The HTML has its pictures within, follows the reader's choice of light or dark, and fetches
    nothing. HTML in the text is shown as text. Files are replaced whole; the HTML comes last.

    Args:
        folder: Where the files go; created if missing.
        title: The first heading, plain text.
        blocks: Markdown, tables and pictures, in order.
        stem: What the files are called.

    Returns:
        The markdown file and the HTML file.

    Raises:
        ValueError: Two pictures have one name, or one that is no file name.
        UserError: There is a file in the place of the folder.
    """
    from markdown_it import MarkdownIt

    _check_names([block.name for block in blocks if isinstance(block, Picture)])
    try:
        Path(folder, stem).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{folder} is or lies in a file, expected a folder") from None
    texts, images = [f"# {_plain(title)}"], {}
    for block in blocks:
        if isinstance(block, Picture):
            source, png = f"{stem}/{block.name}.png", _png(block.draw())
            write_atomic(Path(folder, source), png)
            images[source] = "data:image/png;base64," + b64encode(png).decode()
            texts.append(f"![{_plain(block.caption or block.name)}]({source})")
        else:
            texts.append(_table(block) if isinstance(block, Table) else block.strip())
        if not isinstance(block, str) and block.caption:
            texts.append(f"*{_plain(block.caption)}*")
    text = "\n\n".join(texts) + "\n"

    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    of_file = markdown.renderer.rules["image"]

    def embedded(tokens, index, options, env):
        source = tokens[index].attrs["src"]
        tokens[index].attrs["src"] = images.get(source, source)
        return of_file(tokens, index, options, env)

    markdown.renderer.rules["image"] = embedded
    page = PAGE.format(title=escape(title), body=markdown.render(text))
    paths = Path(folder, f"{stem}.md"), Path(folder, f"{stem}.html")
    for path, content in zip(paths, (text, page), strict=True):
        write_atomic(path, content.encode())
    return paths


def code_block(text: str) -> str:
    """Return markdown that shows a text as it is, whatever it holds."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _check_names(names: list[str]) -> None:
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise ValueError(f"a picture's name is {name!r}, expected A-Z, a-z, 0-9, _, - and .")
        if names.count(name) > 1:
            raise ValueError(f"two pictures are named {name!r}")


def _plain(text: str) -> str:
    """Markdown for a line of text without any markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", " ".join(text.split()))


def _png(figure: "Figure") -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close(figure)  # which keeps what it has made
    return file.getvalue()


def _table(table: Table) -> str:
    lines = [[_cell(cell) for cell in row] for row in (table.header, *table.rows)]
    columns = list(zip(*lines, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]
    right = [all(map(NUMBER.fullmatch, column[1:])) for column in columns]
    ruler = [
        "-" * (width - 1) + (":" if to_right else "-")
        for width, to_right in zip(widths, right, strict=True)
    ]
    return "\n".join(
        f"| {' | '.join(map(str.ljust, line, widths))} |" for line in (lines[0], ruler, *lines[1:])
    )


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")
