"""Ablations: variants of a baseline that each change one thing, and what their runs amount to."""

from smol.experiments.ablation.results import Results, load_results
from smol.experiments.ablation.study import Study, load_study
from smol.experiments.ablation.verdict import Verdict, judge

__all__ = ["Results", "Study", "Verdict", "judge", "load_results", "load_study"]
