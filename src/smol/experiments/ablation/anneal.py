"""Annealed ablations.

An annealed ablation asks whether a source is worth having, late in a run: from a checkpoint the
learning rate goes down to 0 on 40 % of the current mixture and 60 % of the candidate, and so it
does on the current mixture alone, the control. SmolLM3 chose the data of its later stages so
(The Smol Training Playbook, https://huggingface.co/spaces/HuggingFaceTB/smol-training-playbook).

A run takes the weights and begins the optimiser's moments, and the order of the data, anew: the
seeds of an annealed study are orders of the data.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from smol.checkpoints.store import read_manifest
from smol.config import load_config
from smol.errors import UserError
from smol.experiments.ablation.mixtures import Sources, sources_of
from smol.experiments.ablation.study import Study
from smol.paths import project_root, resolve
from smol.runs import decoder_folder

STAGE = "anneal"
WARMUP = 0.05  # share of the steps in which new moments settle
SOURCE = "config.source.yaml"


def annealed(
    study: Study,
) -> tuple[tuple[str, ...], dict[str, Any], dict[str, dict[str, Any]]]:
    """An annealed study, put as one of mixtures.

    Args:
        study: With ``start``.

    Returns:
        The files of the baseline; the flags of all arms: what they start from, how the learning
        rate goes down, and the current mixture; and the flags of each variant: its mixture.

    Raises:
        UserError: The run has no checkpoint or no configuration, or a source is not known.
    """
    run = Path(resolve(study.start))
    run = run if run.is_dir() else project_root() / "runs" / study.start
    checkpoint = decoder_folder(run)
    files = study.baseline or (str(_configuration(run)),)
    given = (load_config(files).get("data") or {}).get("init_args", {}).get("stages") or {}
    stages = {name: stage for name, stage in given.items() if stage}
    if not stages:
        raise UserError(f"the run {study.start} has no stages, so no mixture to compare with")
    manifest = read_manifest(LocalFileSystem(), str(checkpoint))
    name = _current(stages, manifest.step, manifest.tokens)
    given_mixture = sources_of(f"stage '{name}'", stages[name]["mixture"], {})
    current = _mixed([(1.0, given_mixture)])
    variants = {}
    for variant, change in study.variants.items():
        candidate = sources_of(f"variant '{variant}'", change["candidate"], current)
        share = study.candidate_share
        mixture = _mixed([(1 - share, current), (share, candidate)])
        variants[variant] = {f"data.stages.{STAGE}.mixture": mixture}
    stage = {**stages[name], "start_step": 0, "start_tokens": None, "mixture": current}
    start = {
        "continues": None,
        "init_from": str(checkpoint),
        "data.stages": {**dict.fromkeys(given), STAGE: stage},
        "model.schedule": {"class_path": "smol.optim.WSD", "init_args": _decay(study)},
    }
    return files, start, variants


def _current(stages: dict[str, Any], step: int, tokens: int) -> str:
    """The stage that a checkpoint is in."""
    steps = {name: stage.get("start_step") for name, stage in stages.items()}
    if any(steps.values()):
        return max((name for name in steps if steps[name] <= step), key=steps.get)
    starts = {name: stage.get("start_tokens") or 0 for name, stage in stages.items()}
    return max((name for name in starts if starts[name] <= tokens), key=starts.get)


def _decay(study: Study) -> dict[str, Any]:
    unit, number = study.budget
    if unit != "steps":
        raise UserError("'budget' of an annealed study expects {steps: NUMBER}")
    warmup = max(1, round(WARMUP * number))
    if warmup >= number:
        raise UserError(f"'budget' is {number} steps, too few to decay in")
    decay = {"warmup_steps": warmup, "decay_start_step": warmup, "decay_steps": number - warmup}
    return {**decay, "final": 0.0}


def _mixed(parts: Iterable[tuple[float, Sources]]) -> Sources:
    """One mixture of several, each with its share of the tokens."""
    mixed: Sources = {}
    for share, sources in parts:
        total = sum(source["weight"] for source in sources.values())
        for name, source in sources.items():
            before = mixed[name]["weight"] if name in mixed else 0.0
            weight = round(before + share * source["weight"] / total, 12)
            mixed[name] = {**source, "weight": weight}
    return mixed


def _configuration(run: Path) -> Path:
    for folder in (run, *run.resolve().parents[1:2]):  # a checkpoint lies two below its run
        if (folder / SOURCE).is_file():
            return folder / SOURCE
    raise UserError(f"{run} has no {SOURCE}; name its configuration as the study's baseline")
