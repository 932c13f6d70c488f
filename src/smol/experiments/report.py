"""Reports: what one run did, and how several compare."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smol.config import load_config
from smol.errors import UserError
from smol.evaluation.results import Results, table
from smol.experiments.document import Block, Picture, Table, code_block, write_document
from smol.experiments.figures import (
    LOSS,
    STEPS,
    TOKENS,
    curves,
    over_tokens,
    panel,
    panels_by_source,
    smoothed,
    training_loss,
)
from smol.experiments.plots import loss_by_position
from smol.experiments.records import ENVIRONMENT, Metrics, RunRecord, read_run, settings
from smol.paths import resolve

QUIET = {"start", "end", "uploaded", "warmup_check"}  # events that are no marks
LONGEST_VALUE = 60  # characters of a setting
LOWER, HIGHER = -1, 1
BITS = "held_out/bits_per_byte"
FINAL = {  # what is told of the end, and which way it is better
    BITS: ("held-out bits per byte", LOWER),
    "held_out/loss": ("held-out loss, nats per token", LOWER),
    "held_out/rewards/accuracies": ("held-out reward accuracy", HIGHER),
    "held_out/rewards/margins": ("held-out reward margin", HIGHER),
}
MEDIANS = {  # of speed and use the middle value is told
    "throughput/tokens_per_second": "tokens per second",
    "throughput/mfu_documents": "MFU over documents",
    "train/grad_norm": "gradient norm",
}


def write_run_report(run: str | Path, out: Path | None = None) -> Path:
    """Write ``report.md`` and ``report.html`` of a run.

    Args:
        run: The folder of a run, or the name of one in ``runs``.
        out: Where the report goes; by default the folder of the run.

    Returns:
        The HTML file.

    Raises:
        UserError: There is no such run, or it has logged nothing yet.
    """
    record = read_run(run)
    runs = {record.name: record.metrics}
    blocks: list[Block] = [_summary(record), *_gains(record)]
    if LOSS in record.metrics:
        blocks.append(
            Picture(
                "loss",
                lambda: _loss(record),
                "Training loss over steps; many points are smoothed, and faint as logged.",
            )
        )
    blocks += _pictures(runs, STEPS)
    positions = record.json("loss_by_position.json")
    if positions.get("after"):
        caption = "Held-out loss over the position in the document, before the run and after."
        blocks.append(Picture("positions", lambda: loss_by_position(**positions), caption))
    blocks += [*_evaluations([record]), *_sample(record), *_sources(record), *_settings(record)]
    blocks += [*_checkpoints(record), *_events(record), *_environment(record)]
    return write_document(out or record.folder, record.name, blocks)[1]


def write_comparison(runs: Sequence[str | Path], out: Path | None = None) -> Path:
    """Write ``report.md`` and ``report.html`` of several runs: curves overlaid, tables beside.

    Curves are over tokens where all runs have logged them, else over steps.

    Args:
        runs: Folders of runs, or names in ``runs``.
        out: Where the report goes; by default a folder in ``runs/compare``.

    Returns:
        The HTML file.

    Raises:
        UserError: A run is not there, has logged nothing yet, or is named twice.
    """
    records = {}
    for record in map(read_run, runs):
        if record.folder in [other.folder for other in records.values()]:
            raise UserError(f"{record.name} is named twice, expected different runs")
        label = record.name if record.name not in records else str(record.folder)
        records[label] = record
    metrics = {name: record.metrics for name, record in records.items()}
    x_label = STEPS
    if all("train/tokens" in run for run in metrics.values()):
        x_label, metrics = TOKENS, {name: over_tokens(run) for name, run in metrics.items()}
    blocks: list[Block] = ["## At the end", _side_by_side(records), *_differences(records)]
    if any(LOSS in run for run in metrics.values()):
        caption = "Training loss; many points are smoothed, and faint as logged."
        blocks.append(Picture("loss", lambda: training_loss(metrics, x_label=x_label), caption))
    blocks += [*_pictures(metrics, x_label), *_evaluations(list(records.values()))]
    folder = out or Path(resolve("runs/compare"), "+".join(r.name for r in records.values())[:100])
    return write_document(folder, " · ".join(records), blocks)[1]


def _pictures(runs: Mapping[str, Metrics], x_label: str) -> list[Block]:
    """All curves but the training loss; those that no run has logged are left out."""
    groups = {
        "held_out": (
            "Held-out text.",
            panels_by_source(runs, f"{BITS}/", "bits per byte")
            + (panel(runs, BITS, "bits per byte, all sources") if len(runs) > 1 else []),
        ),
        "rewards": (
            "Implicit rewards of preference training; a margin is chosen less rejected.",
            panel(runs, "held_out/rewards/accuracies", "accuracy, held out")
            + panel(runs, "held_out/rewards/margins", "margin, held out")
            + panel(runs, "train/rewards/accuracies", "accuracy, training", smooth=True)
            + panel(runs, "train/rewards/margins", "margin, training", smooth=True),
        ),
        "optimisation": (
            "The z-loss is the mean square of log Z, before its coefficient.",
            panel(runs, "train/grad_norm", "gradient norm", scale="log", smooth=True)
            + panel(runs, "train/learning_rate", "learning rate", scale="zero")
            + panel(runs, "train/z_loss", "z-loss", smooth=True)
            + panel(runs, "z_loss/log_partition_mean", "mean log Z", smooth=True),
        ),
        "speed": (
            "MFU: the share of the devices' peak that the model's own operations use.",
            panel(
                runs, "throughput/tokens_per_second", "tokens per second", scale="zero", smooth=True
            )
            + panel(runs, "throughput/step_seconds", "seconds per step", scale="zero", smooth=True)
            + panel(runs, "throughput/mfu_palm", "MFU, PaLM", scale="percent", smooth=True)
            + panel(
                runs, "throughput/mfu_documents", "MFU, documents", scale="percent", smooth=True
            ),
        ),
        "data": (
            "What has been read of each source.",
            panels_by_source(runs, "data/tokens/", "tokens")
            + panels_by_source(runs, "data/epochs/", "epochs"),
        ),
    }
    return [
        Picture(name, lambda panels=panels: curves(panels, x_label), caption)
        for name, (caption, panels) in groups.items()
        if panels
    ]


def _loss(record: RunRecord) -> Any:
    starts = [event for event in record.events if event["kind"] == "start"]
    marks = [event for event in record.events if event["kind"] not in QUIET]
    marks += [event | {"kind": "restart"} for event in starts[1:]]
    stages = record.config.get("data") or {}
    stages = (stages.get("init_args") or {}).get("stages") or {}
    first, last = record.metrics[LOSS][0][0], record.metrics[LOSS][0][-1]
    shown = {
        f"{name}, context {stage['context_length']:,}"
        if stage.get("context_length")
        else name: step
        for name, stage in stages.items()
        if first < (step := (stage or {}).get("start_step") or 0) <= last
    }
    return training_loss({record.name: record.metrics}, marks, shown)


def _summary(record: RunRecord) -> str:
    said = [f"{record.steps:,} steps"]
    if "train/tokens" in record.metrics:
        said.append(f"{record.metrics['train/tokens'][1][-1]:,.0f} tokens")
    if LOSS in record.metrics:
        said.append(f"training loss {_last_loss(record)} nats per token (smoothed)")
    said += [f"{_median(record, name)} {label}" for name, label in MEDIANS.items() if "per" in label
             and name in record.metrics]  # fmt: skip
    return " · ".join(said)


def _gains(record: RunRecord) -> list[Block]:
    rows = []
    for name, (label, better) in _finals([record]).items():
        steps, values = record.metrics[name]
        gained = f"{better * (values[-1] - values[0]):+.3f}" if len(values) > 1 else ""
        first = f"{values[0]:.3f}" if len(values) > 1 else ""
        rows.append([label, first, f"{values[-1]:.3f}", gained, f"{steps[0]:,}-{steps[-1]:,}"])
    head = ["", "first", "last", "gained", "steps"]
    return ["## What the run gained", Table(head, rows, "A gain is positive.")] if rows else []


def _finals(records: Sequence[RunRecord]) -> dict[str, tuple[str, int]]:
    """The metrics of ``FINAL`` and of each source that a run has, by name."""
    names = {name for record in records for name in record.metrics}
    found = {}
    for name, (label, better) in FINAL.items():
        found |= dict.fromkeys(names & {name}, (label, better))
        if name == BITS:
            parts = sorted(n for n in names if n.startswith(f"{BITS}/"))
            found |= {n: (f"{label}: {n.removeprefix(f'{BITS}/')}", better) for n in parts}
    return found


def _side_by_side(records: Mapping[str, RunRecord]) -> Table:
    columns = list(records.values())
    rows = [
        ["steps", *(f"{r.steps:,}" for r in columns)],
        ["tokens", *(_last(r, "train/tokens", ",.0f") for r in columns)],
        ["training loss, smoothed", *(map(_last_loss, columns))],
    ]
    rows += [
        [label, *(_last(r, name, ".3f") for r in columns)]
        for name, (label, _) in _finals(columns).items()
    ]
    rows += [
        [f"{label}, median", *(_median(r, name) for r in columns)]
        for name, label in MEDIANS.items()
        if any(name in r.metrics for r in columns)
    ]
    return Table(["", *records], rows)


def _differences(records: Mapping[str, RunRecord]) -> list[Block]:
    found = [dict(settings(record.config)) for record in records.values()]
    keys = list(dict.fromkeys(key for config in found for key in config))
    rows = [
        [f"`{key}`", *cells]
        for key in keys
        if len(set(cells := [_value(c[key]) if c.get(key) is not None else "" for c in found])) > 1
        and not key.startswith(("name", "trainer.logger.init_args.save_dir"))
    ]
    text = "" if rows else "The configurations are equal but for the name."
    return ["## Settings that differ", Table(["", *records], rows) if rows else text]


def _settings(record: RunRecord) -> list[Block]:
    if not record.source:
        return []
    try:
        base = dict(settings(load_config(["configs/base.yaml"])))
    except UserError:  # a project of somebody's own
        base = {}
    rows = [
        [f"`{key}`", _value(value), _value(base[key]) if key in base else ""]
        for key, value in settings(record.source)
        if key not in base or base[key] != value
    ]
    return ["## Settings that differ from `configs/base.yaml`", Table(["", "run", "base"], rows)]


def _value(value: Any) -> str:
    if isinstance(value, float):
        value = f"{value:.10g}"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = text.replace("`", "'")
    return f"`{text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 1] + '…'}`"


def _evaluations(records: Sequence[RunRecord]) -> list[Block]:
    rows, unread = [], []
    for record in records:
        try:
            rows += Results(record.folder).rows()
        except UserError as error:  # a run is worth a report all the same
            unread.append(f"Left out: {error}")
    tables = [table(rows, everything=False)] if rows else []
    return ["## Evaluations", *tables, *unread] if tables or unread else []


def _sample(record: RunRecord) -> list[Block]:
    _, *found = re.split(r"^--- step (\d+)\n", record.text("samples.txt"), flags=re.MULTILINE)
    if not found:
        return []
    step, text = found[-2:]
    return [f"## What the model writes\n\nAt step {step}:", code_block(text.strip())]


def _sources(record: RunRecord) -> list[Block]:
    rows = [
        [name, f"{s['tokens']:,}", *(_decimal(s[key], d) for key, d in
                                     (("epochs", 2), ("share", 3), ("planned_share", 3)))]
        for name, s in record.json("sources.json").items()
    ]  # fmt: skip
    head = ["source", "tokens", "epochs", "share", "planned share"]
    return ["## Data", Table(head, rows)] if rows else []


def _checkpoints(record: RunRecord) -> list[Block]:
    from smol.runs import replicas

    rows = [
        [
            f"`{info.key}`",
            f"{info.manifest.step:,}",
            f"{info.manifest.tokens:,}",
            f"{info.manifest.bytes / 1e6:,.1f}",
            str(info.manifest.lineage),
            info.manifest.created,
        ]
        for info in replicas(record.folder).list()
    ]
    head = ["checkpoint", "step", "tokens", "megabytes", "lineage", "written"]
    return ["## Checkpoints", Table(head, rows)] if rows else []


def _events(record: RunRecord) -> list[Block]:
    kinds: dict[str, list[dict[str, Any]]] = {}
    for event in record.events:
        kinds.setdefault(event["kind"], []).append(event)
    rows = [
        [
            kind,
            str(len(found)),
            f"{found[0]['step']:,}",
            f"{found[-1]['step']:,}",
            _value(found[-1]["message"]),
        ]
        for kind, found in kinds.items()
    ]
    head = ["event", "times", "first step", "last step", "last message"]
    return ["## Events", Table(head, rows)] if rows else []


def _environment(record: RunRecord) -> list[Block]:
    rows = [[name, _value(value)] for name, value in record.json(ENVIRONMENT).items()]
    return ["## Environment", Table(["", "at the start"], rows)] if rows else []


def _last(record: RunRecord, name: str, spec: str) -> str:
    return format(record.metrics[name][1][-1], spec) if name in record.metrics else ""


def _last_loss(record: RunRecord) -> str:
    return f"{smoothed(record.metrics[LOSS][1])[-1]:.3f}" if LOSS in record.metrics else ""


def _median(record: RunRecord, name: str) -> str:
    from statistics import median

    value = median(record.metrics[name][1]) if name in record.metrics else None
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _decimal(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
