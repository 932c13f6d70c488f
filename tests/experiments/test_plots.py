"""Pictures: what is drawn is what was measured."""

from smol.experiments.plots import loss_by_position, plot_loss_by_position


def measurement(step, losses, tokens):
    """Two sources, the second of them a nat worse."""
    edges = [0, *(2**i for i in range(len(tokens)))]
    sources = {
        name: {
            "loss": 2.0 + worse,
            "tokens": sum(tokens),
            "by_position": {
                "loss": [None if x is None else x + worse for x in losses],
                "tokens": tokens,
            },
        }
        for name, worse in (("code", 0), ("prose", 1))
    }
    return {"step": step, "context": edges[-1], "edges": edges, "sources": sources}


def points(line):
    return [None if y != y else y for y in line.get_ydata()]


def test_loss_over_position_before_and_after(tmp_path):
    before = measurement(0, [5.0, 4.9, None], [400, 12, 0])
    after = measurement(1200, [3.0, 2.9, 2.8, 2.7], [400, 12, 100, 99])
    picture = tmp_path / "picture.png"
    plot_loss_by_position(before, after, picture, "myrun")
    assert picture.read_bytes().startswith(b"\x89PNG")
    figure = loss_by_position(before, after)
    losses, counts = figure.axes
    drawn = {
        (line.get_linestyle(), line.get_alpha(), line.get_color()): points(line)
        for line in losses.lines
        if len(line.get_ydata())
    }
    # The whole line is faint; what rests on a hundred tokens is drawn over it; the rest is hollow.
    assert drawn["-", 0.3, "C0"] == [3.0, 2.9, 2.8, 2.7]
    assert drawn["-", None, "C0"] == [3.0, None, 2.8, None]
    assert drawn["--", 0.3, "C1"] == [6.0, 5.9, None]
    assert drawn["--", None, "C1"] == [6.0, None, None]
    hollow = [line for line in losses.lines if line.get_markerfacecolor() == "none"]
    assert [None, 2.9, None, 2.7] in [points(line) for line in hollow]
    bars = [(b.get_height(), b.get_alpha()) for b in counts.patches]
    assert bars == 2 * [(400, 1.0), (12, 0.4), (100, 1.0), (99, 0.4)]
    ticks = [tick.get_text() for tick in counts.get_xticklabels()]
    assert ticks == ["0", "1", "2-3", "4-7"]
    labels = [text.get_text() for text in losses.get_legend().get_texts()]
    assert labels[:4] == ["step 0", "step 1,200", "code: 2.000 → 2.000", "prose: 3.000 → 3.000"]


def test_without_a_before_there_is_one_line_a_source():
    figure = loss_by_position(None, measurement(7, [3.0], [500]))
    assert {line.get_linestyle() for line in figure.axes[0].lines} == {"-", "None"}


def test_more_sources_than_can_be_told_apart():
    after = measurement(7, [3.0], [500])
    (source, _) = after["sources"].values()
    after["sources"] = {f"source{i:02d}": source for i in range(41)}
    figure = loss_by_position(None, after)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert "source09: 2.000" in labels
    assert labels[-1] == "and 31 more, in figures"
