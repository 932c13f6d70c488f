"""The YAML file of a study: a question in a dozen lines.

.. code-block:: yaml

    question: Does QK-norm help?
    baseline: baseline.yaml          # a configuration of train.py, or a list of them
    overrides: {vars.context: 128}   # flags of the baseline and of all variants
    variants:
      qk_norm: {model.decoder.qk_norm: true}
    seeds: [1, 2, 3]
    budget: {steps: 150}             # or {tokens: 600000}
    metrics: {held_out/bits_per_byte: lower}
    benefit: fewer parameters        # why a variant that is no worse would be adopted
    tolerance: 0.005                 # what counts as no worse, as a share of the baseline's value

A variant changes one dotted key, or one factor whose keys go together: ``mixture`` (weights by
source) or ``schedule`` (a class). With ``from``, a run or a checkpoint, the study is an annealed
one: see `smol.experiments.ablation.anneal`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from smol.config import parse_yaml
from smol.errors import UserError, nearest, shown
from smol.paths import find

Better = Literal["lower", "higher"]
KEYS = ("question", "baseline", "overrides", "variants", "seeds", "budget", "metrics", "benefit")
KEYS += ("tolerance", "from", "candidate_share", "slurm")
REQUIRED = ("variants", "seeds", "budget", "metrics")
SET_BY_STUDY = {
    "name": "it names the runs",
    "runs_dir": "it places the runs",
    "ckpt_path": "all runs begin alike",
    "seed_everything": "list it under seeds",
    "model.init_seed": "list it under seeds",
    "data.seed": "list it under seeds",
    "trainer.max_steps": "set budget",
}
CANDIDATE_SHARE = 0.6  # of the mixture of an annealed ablation, as for SmolLM3


@dataclass(frozen=True)
class Study:
    """A study as its file describes it.

    Attributes:
        file: The YAML file; its stem is the study's name.
        baseline: Configuration files, from the lowest to the highest.
        variants: What each changes: dotted key or factor to value; of an annealed study the
            mixture that is tried.
        seeds: Of initialisation and data order, the same for all variants.
        budget: Optimiser steps or tokens of each run, as ``("steps", number)``.
        metrics: Which way is better, by name; the first one decides.
        question: What is to be found out.
        overrides: Dotted key to value, for the baseline and all variants.
        benefit: Why a neutral variant would be adopted. ``fewer parameters`` and ``faster`` are
            measured, anything else is taken at its word.
        tolerance: How much worse may be called neutral, as a share of the baseline's value.
        start: The run or checkpoint that an annealed study begins from.
        candidate_share: Share of the tokens of an annealed study that its candidate gets.
        slurm: Parameters of submitit's executor.
    """

    file: Path
    baseline: tuple[str, ...]
    variants: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...]
    budget: tuple[str, int]
    metrics: Mapping[str, Better]
    question: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    benefit: str | None = None
    tolerance: float = 0.005
    start: str | None = None
    candidate_share: float = CANDIDATE_SHARE
    slurm: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.file.stem


def load_study(path: str | Path) -> Study:
    """Read the file of a study.

    Args:
        path: The file, in the working directory or under the project root.

    Raises:
        UserError: It is not there, or one of its keys is unknown, missing or of another form.
    """
    file = Path(find(path)).absolute()
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        there = [other.name for other in file.parent.glob("*.yaml")]
        raise UserError(
            f"study {path} cannot be read, {error.strerror}.{nearest(file.name, there)}"
        ) from None
    values = parse_yaml(text, file.name)
    try:
        return _study(file, values if isinstance(values, dict) else {})
    except UserError as error:
        raise UserError(f"{file.name}: {error}") from None


def _study(file: Path, values: dict[str, Any]) -> Study:
    for key in values:
        if key not in KEYS:
            known = ", ".join(KEYS)
            raise UserError(f"unknown key '{key}', expected one of {known}.{nearest(key, KEYS)}")
    required = REQUIRED if "from" in values else ("baseline", *REQUIRED)
    for key in required:
        if not values.get(key):
            raise UserError(f"'{key}' is missing")
    study = Study(
        file,
        tuple(_next_to(file, name) for name in _list("baseline", values.get("baseline") or [])),
        _variants(values["variants"], "from" in values),
        _seeds(values["seeds"]),
        _budget(values["budget"]),
        _metrics(values["metrics"]),
        question=str(values.get("question", "")),
        overrides=_mapping("overrides", values.get("overrides") or {}),
        benefit=values.get("benefit"),
        tolerance=_share("tolerance", values.get("tolerance", Study.tolerance)),
        start=values.get("from"),
        candidate_share=_share("candidate_share", values.get("candidate_share", CANDIDATE_SHARE)),
        slurm=_mapping("slurm", values.get("slurm") or {}),
    )
    for where, changes in {"overrides": study.overrides, **study.variants}.items():
        for key in changes:
            if reason := SET_BY_STUDY.get(key.replace("init_args.", "")):
                raise UserError(f"{where} sets '{key}', which the study does: {reason}")
    return study


def _next_to(file: Path, name: str) -> str:
    beside, elsewhere = file.parent / name, Path(find(name))
    there = next((path for path in (beside, elsewhere) if path.is_file()), None)
    return name if there is None else str(there.resolve())


def _list(key: str, value: Any) -> list[str]:
    value = [value] if isinstance(value, str) else value
    if not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        raise UserError(f"'{key}' expects a file or a list of files, got {shown(value)}")
    return value


def _mapping(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"'{key}' expects a mapping, got {shown(value)}")
    return value


def _variants(value: Any, anneal: bool) -> dict[str, dict[str, Any]]:
    variants = _mapping("variants", value)
    for name, changes in variants.items():
        if name in ("baseline", "control") or not name.replace("_", "").isalnum():
            raise UserError(f"a variant is named '{name}', expected letters, digits and _")
        if not isinstance(changes, dict) or not changes:
            example = "{model.decoder.qk_norm: true}"
            raise UserError(
                f"variant '{name}' expects what it changes, as {example}, got {shown(changes)}"
            )
        if anneal and set(changes) != {"candidate"}:
            raise UserError(
                f"variant '{name}' of an annealed study expects the sources it tries, as "
                f"{{candidate: {{maths: 1}}}}, got {shown(changes)}"
            )
    return variants


def _seeds(value: Any) -> tuple[int, ...]:
    seeds = list(range(1, value + 1)) if _is_count(value) else value
    if not isinstance(seeds, list) or not all(_is_count(s) or s == 0 for s in seeds):
        raise UserError(f"'seeds' expects a number of seeds or a list of them, got {shown(value)}")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"'seeds' names one twice: {seeds}")
    return tuple(seeds)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _budget(value: Any) -> tuple[str, int]:
    given = list(value.items()) if isinstance(value, dict) else []
    if len(given) != 1 or given[0][0] not in ("steps", "tokens") or not _is_count(given[0][1]):
        raise UserError(
            f"'budget' expects {{steps: NUMBER}} or {{tokens: NUMBER}}, got {shown(value)}"
        )
    return given[0]


def _metrics(value: Any) -> dict[str, Better]:
    metrics = _mapping("metrics", value)
    for name, better in metrics.items():
        if better not in ("lower", "higher"):
            raise UserError(
                f"metric '{name}' expects which is better, lower or higher, got {shown(better)}"
            )
    return metrics


def _share(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise UserError(f"'{key}' expects a share between 0 and 1, got {shown(value)}")
    return float(value)
