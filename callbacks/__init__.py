"""Callbacks by name: one file, one idea. A docstring says so where one needs certain data."""

from callbacks.checkpoint_rotation import CheckpointRotation
from callbacks.context_length import ContextLengthSchedule
from callbacks.eval_loss import EvalLoss
from callbacks.evaluate_checkpoints import EvaluateCheckpoints
from callbacks.evaluate_tasks import EvaluateTasks
from callbacks.events import Events
from callbacks.fault_injection import Fault, FaultInjection
from callbacks.hardware import HardwareMonitor
from callbacks.nan_rollback import NaNRollback
from callbacks.progress_line import ProgressLine
from callbacks.run_report import RunReport
from callbacks.sample_text import SampleText
from callbacks.source_ledger import SourceLedger
from callbacks.throughput import Throughput
from callbacks.warmup_check import WarmupCheck
from callbacks.write_predictions import WritePredictions
from callbacks.z_loss import ZLossMonitor

__all__ = [
    "CheckpointRotation",
    "ContextLengthSchedule",
    "EvalLoss",
    "EvaluateCheckpoints",
    "EvaluateTasks",
    "Events",
    "Fault",
    "FaultInjection",
    "HardwareMonitor",
    "NaNRollback",
    "ProgressLine",
    "RunReport",
    "SampleText",
    "SourceLedger",
    "Throughput",
    "WarmupCheck",
    "WritePredictions",
    "ZLossMonitor",
]
