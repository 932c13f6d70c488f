"""Documents: what stands in the files, read back by parsers of their own."""

import base64
import re
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

from smol.errors import UserError
from smol.experiments.document import Picture, Table, code_block, write_document


class Page(HTMLParser):
    """The text of each element, and the sources of pictures."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.texts, self.sources, self.tags = [], {}, [], set()
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "img":
            self.sources.append(dict(attrs)["src"])
        elif tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


def drawn() -> Figure:
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([1, 2])
    return figure


def test_the_page_stands_alone(tmp_path):
    rows = [["loss | nats", "-1.25"], ["steps", "1,200"]]
    blocks = ["## Part", Table(["name", "value"], rows, "a *caption*"), Picture("curve", drawn)]
    markdown, html = write_document(tmp_path / "out", "a_title <b>", blocks)
    text, page = markdown.read_text(), Page(html.read_text())
    png = (tmp_path / "out/report/curve.png").read_bytes()
    assert "](report/curve.png)" in text
    (source,) = page.sources
    assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == png
    assert png.startswith(b"\x89PNG")
    assert page.open == []
    assert page.texts["title"] == page.texts["h1"] == ["a_title <b>"]
    assert page.texts["th"] == ["name", "value"]
    assert page.texts["td"] == ["loss | nats", "-1.25", "steps", "1,200"]
    assert page.texts["em"] == ["a *caption*"]
    assert not re.search(r"(src|href|url\()\W*https?:", html.read_text())  # it fetches nothing
    assert re.fullmatch(r"\| -+ \| -+: \|", text.splitlines()[5])  # numbers are to the right


def test_what_is_shown_is_only_text(tmp_path):
    """A sample may hold anything: tags, fences, control sequences of markdown."""
    text = "<script>alert(1)</script>\n```\n# no heading\n~~~"
    _, html = write_document(tmp_path, "t", [code_block(text), "a <b>bold</b> word"])
    page = Page(html.read_text())
    assert "".join(page.texts["code"]).rstrip("\n") == text
    assert not {"script", "b"} & page.tags


def test_mistakes(tmp_path):
    for name in ("", "a/b", "../a", "ä"):
        with pytest.raises(ValueError, match="picture's name"):
            write_document(tmp_path, "t", [Picture(name, drawn)])
    with pytest.raises(ValueError, match="two pictures"):
        write_document(tmp_path, "t", [Picture("a", drawn), Picture("a", drawn)])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="expected a folder"):
        write_document(tmp_path / "file", "t", [])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
