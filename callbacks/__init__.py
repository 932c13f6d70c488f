"""Callbacks by name: one file, one idea; each usable alone in any Lightning Trainer."""

from callbacks.checkpoint import Checkpoint
from callbacks.progress_line import ProgressLine
from callbacks.run_report import RunReport
from callbacks.sample_text import SampleText
from callbacks.write_predictions import WritePredictions

__all__ = ["Checkpoint", "ProgressLine", "RunReport", "SampleText", "WritePredictions"]
