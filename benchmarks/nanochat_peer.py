"""A model with nanochat's architecture and settings, trained on the batches of this project.

``learning_speed.py`` starts it as ``python nanochat_peer.py JOB`` (JOB is JSON, see ``Job``). What
is nanochat's is in ``nanochat_model.py``, with its source. The loop is a plain one, as theirs is.

What differs, on purpose: the tokens come in our rows, which may begin within a document, where
theirs begin with one; on a GPU the layers with a window use FlexAttention, not Flash Attention 3.
As there, tokens see all of their row before them, whatever document it belongs to.
"""

import json
import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from learning_clock import Curve, Kind
from nanochat_model import (
    EMBEDDING_RATE,
    HEAD_RATE,
    MATRIX_RATE,
    REFERENCE_BATCH,
    REFERENCE_DEPTH,
    REFERENCE_WIDTH,
    SCALAR_RATE,
    WEIGHT_DECAY,
    NorMuon,
    Peer,
    horizon,
    momentum,
    multiplier,
)
from torch import Tensor

from smol.config import compose
from smol.data import Pretraining
from smol.data.batch import TokenBatch
from smol.data.stages import SourceConfig, StageConfig
from smol.evaluation.bits_per_byte import BitsPerByte
from smol.interpolation import interpolate
from smol.modules.host_memory import keep_freed_memory


@dataclass
class Job:
    """What is trained, and how.

    Attributes:
        files: Configurations, of which the data are taken.
        overrides: Of single keys in them.
        depth: Layers.
        width: Of the residual stream; 64 for each layer in nanochat.
        head_dim: 128 in nanochat.
        steps: Of the optimiser.
        every: Steps between two looks at the held-out text.
        seed: Of the initial weights.
        file: Where the curve goes.
        kind: Of its clock.
        probe: Whether this only measures the speed.
        compile: Whether model and optimiser are compiled.
        unscaled: Learning rates and weight decay of the reference batch and horizon, instead of
            nanochat's rules for others.
    """

    files: list[str]
    overrides: dict[str, Any]
    depth: int
    width: int
    head_dim: int
    steps: int
    every: int
    seed: int
    file: str
    kind: Kind = "wall"
    probe: bool = False
    compile: bool = False
    unscaled: bool = False


class Training:
    """Model, optimisers and their schedules.

    Args:
        job: What is trained.
        vocab: Rows of the embedding.
        context: Tokens of a row.
        batch: Tokens of a step.
        device: Of the training.
    """

    def __init__(self, job: Job, vocab: int, context: int, batch: int, device: torch.device):
        self.job, self.device = job, device
        model = Peer(vocab, job.depth, job.width, job.head_dim, context).to(device)
        model.initialize(torch.Generator(device).manual_seed(job.seed))
        self.model = torch.compile(model, dynamic=False) if job.compile else model
        # What is only measured varies in shape, and a processor takes long to compile.
        self.scorer = model if device.type == "cpu" else self.model
        larger = 1.0 if job.unscaled else math.sqrt(batch / REFERENCE_BATCH)
        reference = horizon(vocab, REFERENCE_DEPTH, REFERENCE_WIDTH, 128)
        longer = horizon(vocab, job.depth, job.width, job.head_dim) / reference
        self.decay = WEIGHT_DECAY * larger / (1.0 if job.unscaled else longer)
        self.matrix_rate = MATRIX_RATE * larger
        head_rate = HEAD_RATE * larger * REFERENCE_WIDTH / job.width
        embedding_rate, scalar_rate = EMBEDDING_RATE * larger, SCALAR_RATE * larger
        groups = [  # parameter, learning rate, betas, weight decay
            (model.head, head_rate, (0.8, 0.96), 0.01),
            (model.embedding, embedding_rate, (0.8, 0.995), 0.001),
            (model.values, 0.5 * embedding_rate, (0.8, 0.995), 0.01),
            (model.residual, 0.01 * scalar_rate, (0.8, 0.95), 0.05),
            (model.skip, scalar_rate, (0.96, 0.95), 0.0),
            (model.backout, 0.2, (0.8, 0.95), 0.0),
        ]
        keys = ("params", "lr", "betas", "weight_decay")
        settings = [dict(zip(keys, group, strict=True)) for group in groups]
        self.adamw = torch.optim.AdamW(settings, eps=1e-10, fused=True)
        self.rates = [group["lr"] for group in self.adamw.param_groups]
        stacks = [model.square, model.up, model.down, model.gates]
        self.muon = NorMuon(stacks, job.compile)
        self.parameters = sum(p.numel() for p in model.parameters())

    def backward(self, batch: TokenBatch) -> None:
        """Gradients of a micro-batch, added to those that are there."""
        nll = self.model(*self._moved(batch.tokens, batch.targets))
        (nll.sum() / batch.step_tokens).backward()

    @torch.no_grad()
    def measure(self, batch: TokenBatch, metric: BitsPerByte) -> None:
        """Count a batch of held-out text."""
        tokens, targets, sources = self._moved(batch.tokens, batch.targets, batch.sources)
        metric.update(self.scorer(tokens, targets), targets, sources)

    def _moved(self, *tensors: Tensor) -> list[Tensor]:
        return [tensor.to(self.device, non_blocking=True) for tensor in tensors]

    def step(self, step: int) -> None:
        """Take a step, counted from 0."""
        factor = multiplier(step, self.job.steps)
        for group, rate in zip(self.adamw.param_groups, self.rates, strict=True):
            group["lr"] = factor * rate
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        decay = self.decay * (1 + math.cos(math.pi * step / self.job.steps)) / 2
        self.muon.step(factor * self.matrix_rate, momentum(step, self.job.steps), decay)


def build_data(job: Job) -> tuple[Pretraining, dict[str, Any]]:
    """The data of a configuration, ready to be read, and all of the configuration."""
    values = interpolate(compose(job.files, job.overrides))
    settings = values["data"]["init_args"]
    stages = {
        name: StageConfig(
            **stage | {"mixture": {k: SourceConfig(**s) for k, s in stage["mixture"].items() if s}}
        )
        for name, stage in settings["stages"].items()
    }
    data = Pretraining(**settings | {"stages": stages})
    data.prepare_data()
    data.setup()
    return data, values


def train(job: Job) -> None:
    """Do a job."""
    data, values = build_data(job)
    vocab = values["model"]["init_args"]["decoder"]["vocab_size"]
    device = torch.device("cuda" if values["trainer"]["accelerator"] == "gpu" else "cpu")
    if device.type == "cpu":  # what our own runs do on a processor
        torch.set_flush_denormal(True)
        keep_freed_memory()
    loader = data.train_dataloader()
    training = Training(job, vocab, data.context_length, data.global_batch_tokens, device)
    metric = BitsPerByte(data.source_names, data.tokenizer).to(device)
    curve, step = Curve(job.file, job.kind, device, job.probe), 0
    for batch in loader:
        curve.begin((tuple(batch.tokens.shape), batch.accumulation))
        training.backward(batch)
        if batch.micro < batch.accumulation - 1:
            continue
        training.step(step)
        step += 1
        curve.end(batch.stage, batch.next_position)
        if not job.probe and (step % job.every == 0 or step == job.steps):
            curve.clock.stop()
            curve.reached(step, measure(training, data, metric))
        if step == job.steps:
            break
    curve.write(parameters=training.parameters)


def measure(training: Training, data: Pretraining, metric: BitsPerByte) -> float:
    """Held-out bits per byte."""
    metric.reset()
    for batch in data.val_dataloader():
        training.measure(batch, metric)
    return float(metric.compute()["bits_per_byte"])


if __name__ == "__main__":
    train(Job(**json.loads(sys.argv[1])))
