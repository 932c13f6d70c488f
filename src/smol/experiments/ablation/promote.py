"""Make an accepted variant the new baseline, and keep the chain of decisions."""

from datetime import date
from os.path import relpath

from smol.config import dump_yaml
from smol.data.card import write_atomic
from smol.errors import UserError, nearest
from smol.experiments.ablation.arms import Arm
from smol.experiments.ablation.results import Results
from smol.experiments.ablation.verdict import ADOPT, Verdict

DECISIONS = "decisions.md"
HEAD = """\
# Decisions

Each line is a variant that became part of the baseline, and the baseline it was compared with.

| date | study | variant | why | difference | baseline | new baseline |
|---|---|---|---|---|---|---|
"""


def promote(results: Results, verdicts: list[Verdict], variant: str) -> list[str]:
    """Write the new baseline beside the study, and a line of ``decisions.md``.

    Args:
        results: Of the study.
        verdicts: On its variants.
        variant: The one that is accepted.

    Returns:
        What was written, in words.

    Raises:
        UserError: There is no such variant, it was not adopted, or it is of an annealed study.
    """
    study = results.study
    verdict = next((verdict for verdict in verdicts if verdict.variant == variant), None)
    if verdict is None:
        names = [verdict.variant for verdict in verdicts]
        raise UserError(
            f"--promote {variant}: {study.file.name} has the variants {', '.join(names)}."
            f"{nearest(variant, names)}"
        )
    if verdict.decision != ADOPT:
        raise UserError(
            f"--promote {variant}: the verdict is '{verdict.decision}' ({verdict.reason}), "
            "expected 'adopt'"
        )
    if study.start is not None:
        raise UserError(
            f"--promote {variant}: an annealed study chooses data; write its candidate into the "
            "stage that it is for"
        )
    folder = study.file.parent
    new = folder / f"{study.name}_{variant}.yaml"
    chain = folder / DECISIONS
    text = chain.read_text(encoding="utf-8") if chain.is_file() else HEAD
    name = f"`{new.name}`"
    if name in text:
        raise UserError(f"--promote {variant}: {chain} has that decision already")
    arm = next(arm for arm in results.arms if arm.name == variant)
    write_atomic(new, _overlay(results, arm, verdict).encode())
    metric, difference = next(iter(verdict.differences.items()))
    gained = f"{metric} {difference.mean:+.4g} ({difference.low:+.4g} to {difference.high:+.4g})"
    below = ", ".join(f"`{file.rsplit('/', 1)[-1]}`" for file in study.baseline)
    cells = (date.today().isoformat(), study.name, variant, verdict.reason, gained, below, name)
    write_atomic(chain, f"{text}| {' | '.join(cells)} |\n".encode())
    return [f"new baseline  {new}", f"decisions     {chain}"]


def _overlay(results: Results, arm: Arm, verdict: Verdict) -> str:
    study = results.study
    base = [relpath(file, study.file.parent) for file in study.baseline]
    head = (
        f"# {study.question or study.name}: {verdict.reason} ({arm.name} of {study.file.name}).\n"
    )
    return head + dump_yaml({"extends": base, **arm.overlay})
