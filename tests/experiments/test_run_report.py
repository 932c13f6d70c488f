"""Reports of runs, from folders as runs leave them."""

import json
import math
import re

import pytest

from smol.errors import UserError
from smol.experiments.figures import over_tokens, panel, panels_by_source, smoothed, training_loss
from smol.experiments.records import read_run, settings
from smol.experiments.report import write_comparison, write_run_report

SOURCES = ("code", "prose")


def write_run(folder, steps=40, rate=1e-3, **files):
    """The folder of a run that has logged every second step and validated three times."""
    folder.mkdir(parents=True)
    held_out = [f"held_out/bits_per_byte/{name}" for name in SOURCES]
    names = ["step", "train/loss", "train/tokens", "train/learning_rate", "data/epochs/prose"]
    lines = [",".join([*names, "held_out/bits_per_byte", *held_out])]
    for step in range(2, steps + 1, 2):
        value = 2 + 4 / step
        measured = [value, value + 1, value - 1] if step in (2, steps // 2, steps) else ["", "", ""]
        lines.append(",".join(map(str, [step, value, step * 100, rate, step / 50, *measured])))
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    schedule = {"learning_rate": rate, "storage_options": {"secret": "PASSWORD"}}
    (folder / "config.yaml").write_text(json.dumps({"name": folder.name, "optimizer": schedule}))
    (folder / "config.source.yaml").write_text(json.dumps({"optimizer": {"learning_rate": rate}}))
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("SMOL_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_report_says_what_the_files_say(here):
    events = [
        {"step": 4, "kind": "rollback", "message": "back to step 2"},
        {"step": 9, "kind": "start", "message": "again"},
        {"step": 9, "kind": "saved", "message": "step-9"},
    ]
    lines = "\n".join(map(json.dumps, events)) + '\n{"cut off'
    sample = "--- step 2\nfirst\n--- step 40\n``` last <b>\n"
    write_run(here / "runs/one", events__jsonl=lines, samples__txt=sample)
    page = write_run_report("one")
    assert page == here / "runs/one/report.html"
    text = page.with_suffix(".md").read_text()
    assert "40 steps · 4,000 tokens" in text
    gains = dict(re.findall(r"\| (held-out[^|]*?) +\|.*\| (\S+) +\| 2-40", text))
    assert gains == {
        "held-out bits per byte": "+1.900",
        "held-out bits per byte: code": "+1.900",
        "held-out bits per byte: prose": "+1.900",
    }
    assert re.search(r"\| rollback \| 1 +\| 4 +\| 4 +\| `back to step 2`", text)
    assert "`optimizer.learning_rate`" in text
    assert "At step 40" in text
    assert "``` last <b>" in text
    assert "first" not in text.split("What the model writes")[1].split("##")[0]
    pictures = re.findall(r"\(report/(\w+)\.png\)", text)
    assert pictures == ["loss", "held_out", "optimisation", "data"]  # nothing logged of the others
    assert all((page.parent / f"report/{name}.png").stat().st_size > 5_000 for name in pictures)
    assert "PASSWORD" not in text + page.read_text()


def test_what_is_missing_or_damaged_is_left_out(here):
    damaged = {"events__jsonl": "[1]\nnothing", "sources__json": "{", "samples__txt": ""}
    write_run(here / "runs/one", **damaged, evaluation__json='{"results": [{}]}')
    text = write_run_report("one").with_suffix(".md").read_text()
    assert re.search("## Evaluations\n\nLeft out: .*evaluation.json is damaged", text)
    assert "## What the run gained" in text
    for part in ("Events", "Data", "Checkpoints", "What the model writes", "Environment"):
        assert f"## {part}" not in text


def test_a_comparison_is_over_tokens_and_names_what_differs(here):
    write_run(here / "runs/one")
    write_run(here / "runs/two", steps=20, rate=2e-3)
    page = write_comparison(["one", here / "runs/two"])
    text = page.with_suffix(".md").read_text()
    assert page.parent == here / "runs/compare/one+two"
    assert re.search(r"\| tokens +\| 4,000 +\| 2,000 +\|", text)
    assert re.search(r"\| held-out bits per byte +\| 2.100 +\| 2.200 +\|", text)
    assert re.search(r"\| `optimizer.learning_rate` +\| `0.001` +\| `0.002` +\|", text)
    assert "`name`" not in text
    assert (page.parent / "report/loss.png").is_file()


def test_mistakes_are_one_line(here):
    write_run(here / "runs/stage1")
    (here / "runs/empty").mkdir()
    (here / "runs/begun").mkdir()
    (here / "runs/begun/config.yaml").write_text("name: begun")
    write_run(here / "runs/odd", metrics__csv="step,loss\n1,abc\n")
    for run, said in {
        "stage2": "there is no run stage2.*stage1",
        "empty": "is no run: it has no metrics.csv",
        "begun": "has no metrics .* yet",
        "odd": "is damaged .*expected numbers",
    }.items():
        with pytest.raises(UserError, match=said) as error:
            read_run(run)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="named twice"):
        write_comparison(["stage1", here / "runs/stage1"])


def test_smoothing_against_its_definition():
    values = [3.0, math.nan, 1.0, 4.0, math.inf, 1.0, 5.0] * 20
    keep = 1 - 1 / (0.03 * len(values))
    for end, mean in enumerate(smoothed(values), 1):
        finite = [v for v in values[:end] if math.isfinite(v)]
        weights = [keep ** (len(finite) - 1 - i) for i in range(len(finite))]
        expected = sum(w * v for w, v in zip(weights, finite, strict=True)) / sum(weights)
        assert mean == pytest.approx(expected)
    assert math.isnan(smoothed([math.nan])[0])
    assert smoothed([2.0, 3.0]) == [2.0, 3.0]  # of few points none is averaged


def test_steps_become_tokens():
    metrics = {"train/tokens": ([10, 20], [100.0, 400.0]), "x": ([10, 15, 20], [1.0, 2.0, 3.0])}
    assert over_tokens(metrics)["x"] == ([100.0, 250.0, 400.0], [1.0, 2.0, 3.0])


def test_of_one_run_sources_are_lines_of_several_panels():
    runs = {name: {"p/a": ([1], [1.0]), "p/b": ([1], [2.0])} for name in ("one", "two")}
    (alone,) = panels_by_source({"one": runs["one"]}, "p/", "bits")
    assert [line.label for line in alone.lines] == ["a", "b"]
    both = panels_by_source(runs, "p/", "bits")
    assert [p.label for p in both] == ["a: bits", "b: bits"]
    assert [line.label for line in both[0].lines] == ["one", "two"]
    assert panel(runs, "missing", "x") == []


def test_events_are_marked_where_they_were():
    metrics = {"one": {"train/loss": ([10, 20, 30], [3.0, 2.0, 1.0])}}
    events = [{"step": 20, "kind": kind, "message": ""} for kind in ("rollback", "unheard_of")]
    figure = training_loss(metrics, events, {"stage2": 15})
    (axes,) = figure.axes
    marked = {x for line in axes.lines for x in line.get_xdata() if len(line.get_xdata()) == 1}
    assert 20 in marked
    labels = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert {"one", "rollback", "unheard of"} <= {re.split(" [^a-z]", label)[0] for label in labels}
    assert any("stage2" in text.get_text() for text in axes.texts)


def test_settings_are_leaves_without_secrets():
    config = {"a": {"b": 1, "storage_options": {"key": "x"}, "c": {}}, "d": [1]}
    assert dict(settings(config)) == {"a.b": 1, "a.c": {}, "d": [1]}
