"""Callbacks by name: one file, one idea. A docstring says so where one needs certain data."""

from callbacks.checkpoint import Checkpoint
from callbacks.events import Events
from callbacks.hardware import HardwareMonitor
from callbacks.progress_line import ProgressLine
from callbacks.run_report import RunReport
from callbacks.sample_text import SampleText
from callbacks.throughput import Throughput
from callbacks.write_predictions import WritePredictions
from callbacks.z_loss import ZLossMonitor

__all__ = [
    "Checkpoint",
    "Events",
    "HardwareMonitor",
    "ProgressLine",
    "RunReport",
    "SampleText",
    "Throughput",
    "WritePredictions",
    "ZLossMonitor",
]
