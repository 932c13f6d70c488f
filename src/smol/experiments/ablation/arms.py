"""From a study to configurations: its baseline and its variants, each checked to change one thing.

What a variant changes is read off complete configurations, as ``train.py`` would run them, not off
its file: a key that says what is so anyway, or that nothing reads, changes nothing.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from smol.cli import CommandLine
from smol.config import compose, merge
from smol.errors import UserError, nearest
from smol.experiments.ablation.anneal import annealed
from smol.experiments.ablation.changes import at, check_one_thing, difference, nested, what_trains
from smol.experiments.ablation.mixtures import measured_alike, mixture_of
from smol.experiments.ablation.study import Study
from smol.interpolation import interpolate
from smol.lightning_cli import SmolCLI
from smol.model.config import DecoderConfig
from smol.model.flops import num_parameters

ABLATION, BASELINE = "ablation", "baseline"
SCHEDULE = "model.init_args.schedule"
SEEDS = ("seed_everything", "model.init_args.init_seed", "data.init_args.seed")
THROUGHPUT = "callbacks.Throughput"
LOGGED = ("loss", "z_loss", "grad_norm", "learning_rate")  # as train/..., of LanguageModeling

Flags = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """The baseline or a variant, ready to run but for its seed.

    Attributes:
        name: ``baseline`` or the variant's.
        source: The merged configuration, interpolations kept.
        resolved: The same, interpolated and complete with defaults.
        overlay: What it sets over the baseline, as a configuration file would.
        changes: Dotted key to the baseline's value and this one's, where they differ.
    """

    name: str
    source: dict[str, Any]
    resolved: dict[str, Any]
    overlay: dict[str, Any]
    changes: Mapping[str, tuple[Any, Any]]

    @property
    def parameters(self) -> int | None:
        """Number of parameters; None where the model is no decoder."""
        decoder = at(self.resolved, "model.init_args.decoder")
        return num_parameters(DecoderConfig(**decoder)) if decoder else None

    @property
    def steps(self) -> int:
        """Optimiser steps of a run."""
        return self.resolved["trainer"]["max_steps"]

    @property
    def tokens(self) -> int | None:
        """Tokens of a run; None where the data do not count in tokens."""
        batch = _batch(self.resolved)
        return batch and batch * self.steps

    def seeded(self, seed: int) -> tuple[dict[str, Any], str]:
        """The configuration of one run, and the digest of all that it depends on."""
        source, resolved = self.source, what_trains(self.resolved)
        for key in SEEDS:
            if at(self.resolved, key) is not None:
                source = merge(source, nested(key, seed))
                resolved = merge(resolved, nested(key, seed))
        text = json.dumps(resolved, sort_keys=True, default=str)
        return source, hashlib.sha256(text.encode()).hexdigest()


def build_arms(study: Study) -> list[Arm]:
    """The baseline, then the variants.

    Raises:
        UserError: The configuration of one is refused, a variant changes nothing or more than one
            thing, or a metric is not logged.
    """
    files, common, changes = study.baseline, dict(study.overrides), study.variants
    if study.start is not None:
        files, start, changes = annealed(study)
        common |= start
    unit, number = study.budget
    plain = interpolate(compose(files, common | {"name": ABLATION, "trainer.max_steps": number}))
    batch = _batch(plain)
    if unit == "tokens" and batch is None:
        raise UserError("'budget' is in tokens, but the data do not count in them; give steps")
    steps = number if unit == "steps" else -(-number // batch)
    common |= _observed(plain) | {"trainer.max_steps": steps}
    own = {name: _expanded(name, change, plain) for name, change in changes.items()}
    flags = {name: common | own.get(name, {}) for name in (BASELINE, *own)}
    parsed = {name: _parsed(name, files, flags[name]) for name in flags}
    _check_metrics(study, parsed[BASELINE][1])
    for name, change in changes.items():
        merged, complete = zip(parsed[BASELINE], parsed[name], strict=True)
        check_one_thing(name, change, difference(*merged), _effects(*complete))
    extra = measured_alike([resolved for _, resolved in parsed.values()])
    for name, (_, resolved) in parsed.items():
        flags[name] |= extra
        if batch and (other := _batch(resolved)) != batch:  # as many tokens, not as many steps
            flags[name]["trainer.max_steps"] = -(-steps * batch // other)
    if extra or any(given["trainer.max_steps"] != steps for given in flags.values()):
        parsed = {name: _parsed(name, files, flags[name]) for name in flags}
    below = parsed[BASELINE][1]
    return [
        Arm(name, source, resolved, _overlay(files, own.get(name, {})), _effects(below, resolved))
        for name, (source, resolved) in parsed.items()
    ]


def _effects(below: dict[str, Any], above: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return difference(what_trains(below), what_trains(above))


def _overlay(files: Sequence[str], own: Flags) -> dict[str, Any]:
    layers = compose(files, own).layers[-len(own) :] if own else []
    return reduce(merge, (layer.values for layer in layers), {})


class _Parsed(SmolCLI):
    """A command line that is checked and completed, of which nothing is built."""

    def _set_seed(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass


def parse(files: Sequence[str], flags: Flags) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration that ``train.py fit`` would run.

    Args:
        files: As for ``--config``.
        flags: Dotted key to value.

    Returns:
        The merged mapping with its interpolations, and the complete one without.
    """
    line = CommandLine("fit", list(files), {"name": ABLATION, **flags})
    cli = _Parsed(line, run=False)
    cli._dump_config()
    return cli.source.values, cli.config_dump


def _parsed(name: str, files: Sequence[str], flags: Flags) -> tuple[dict, dict]:
    try:
        return parse(files, flags)
    except UserError as error:
        where = name if name == BASELINE else f"variant '{name}'"
        raise UserError(f"{where}: {error}") from None


def _expanded(name: str, change: Flags, below: dict[str, Any]) -> Flags:
    """Flags for what a variant changes, named factors included."""
    flags = {}
    for key, value in change.items():
        if key == "schedule":
            flags[SCHEDULE] = value
        elif key == "mixture":
            flags |= mixture_of(name, value, below)
        else:
            flags[key] = value
    return flags


def _observed(config: dict[str, Any]) -> Flags:
    """What all runs have besides: a measurement of their speed."""
    if "CSVLogger" not in json.dumps(at(config, "trainer.logger")):
        raise UserError(
            "the baseline keeps no metrics.csv, which a study reads; set trainer.logger to "
            "smol.experiments.CSVLogger, as configs/base.yaml does"
        )
    if THROUGHPUT in json.dumps(config.get("callbacks")):
        return {}
    return {"callbacks.throughput": {"class_path": THROUGHPUT}}


def _batch(resolved: dict[str, Any]) -> int | None:
    return at(resolved, "data.init_args.global_batch_tokens")


# -- metrics ---------------------------------------------------------------------------------------


def _check_metrics(study: Study, resolved: dict[str, Any]) -> None:
    """Refuse a misspelt metric of pretraining; what callbacks log is seen when a run has ended."""
    stages = at(resolved, "data.init_args.stages")
    if not stages or not resolved["model"]["class_path"].endswith("LanguageModeling"):
        return
    mixtures = [stage["mixture"] for stage in stages.values() if stage]
    sources = {name for mixture in mixtures for name, source in mixture.items() if source}
    known = [f"train/{name}" for name in LOGGED]
    for name in ("held_out/bits_per_byte", "held_out/loss"):
        known += [name, *(f"{name}/{source}" for source in sorted(sources))]
    for name in study.metrics:
        if name not in known and name.split("/")[0] in ("train", "held_out", name):
            raise UserError(
                f"unknown metric '{name}', expected one of {', '.join(known)}."
                f"{nearest(name, known)}"
            )
