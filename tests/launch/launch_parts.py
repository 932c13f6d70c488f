"""A tiny run for launchers to start, and what it ends with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from smol.paths import project_root
from smol.runs import newest_checkpoint

ROOT = project_root()
TRAIN, SUPERVISE = ROOT / "src/train.py", ROOT / "launch/supervise.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
RANKS = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
CONFIG = """
extends: {root}/configs/base.yaml
name: {name}
runs_dir: {runs}
trainer:
  {{max_steps: {steps}, precision: 32-true, limit_val_batches: 0, log_every_n_steps: 1}}
model:
  init_args:
    decoder:
      {{vocab_size: 384, hidden_size: 32, num_layers: 2, num_heads: 2, intermediate_size: 64}}
    schedule: {{class_path: smol.optim.WSD, init_args: {{warmup_steps: 3}}}}
data:
  init_args:
    embedded: null
    tokenizer: {sources}/tokenizer
    context_length: 32
    global_batch_tokens: 256
    micro_batch_tokens: 128
    stages:
      one: {{start_step: 0, mixture: {{cats: {{path: {sources}/cats, weight: 1}}}}}}
callbacks:
  sample_text: null
  run_report: null
  eval_loss: null
  events: {{class_path: callbacks.Events}}
  checkpoint: {{init_args: {{every: 4, store: {runs}/safe}}}}
"""


def write_config(folder: Path, name: str, sources: Path, steps: int) -> Path:
    """Write the configuration of a run of the tiny model; returns its path."""
    path = folder / f"{name}.yaml"
    settings = {"root": ROOT, "name": name, "runs": folder / "runs", "sources": sources}
    path.write_text(CONFIG.format(steps=steps, **settings))
    return path


def fit(config: Path, *flags: str) -> list[str]:
    """The words that train a configuration."""
    return [str(TRAIN), "fit", "--config", str(config), *flags]


def faults(*kinds: dict) -> tuple[str, ...]:
    """Flags that make things go wrong."""
    name = "--callbacks.faults"
    classes = (f"{name}.class_path", "callbacks.FaultInjection")
    return (*classes, f"{name}.init_args.faults", json.dumps(kinds))


def run(command, timeout=200, **environment) -> subprocess.CompletedProcess:
    """Run a command to its end."""
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | environment,
    )


def final_weights(run_folder: Path) -> dict[str, torch.Tensor]:
    """Weights and moments that a run has ended with."""
    folder = newest_checkpoint(run_folder)
    return load_file(folder / "model.safetensors") | load_file(folder / "optimizer.safetensors")


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def events(run_folder: Path, *kinds: str) -> list[tuple[str, int]]:
    """Kind and step of the events of these kinds."""
    path = run_folder / "events.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(row["kind"], row["step"]) for row in rows if row["kind"] in kinds]
