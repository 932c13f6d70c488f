"""Pairs for tests: an easy set, its tokenizer, and the module and data that train on it."""

import json
from pathlib import Path

import numpy as np
import pytest
from lightning import Callback
from tiny import VOCAB, make_trainer

from smol.data.pairs import PairsConfig
from smol.data.preferences import Preferences
from smol.data.tokenizer import train_tokenizer
from smol.losses import PreferenceLoss
from smol.model import DecoderConfig
from smol.modules import PreferenceOptimization
from smol.optim import OptimizerConfig, Schedule

ANIMALS = "cat dog cow hen fox owl bee ant".split()
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "intermediate_size": 64,
    "nope": 2,
}


def easy_pairs(count: int, seed: int = 0) -> list[dict]:
    """Asked for a word, one answer says it, the other says another word, and often."""
    rng = np.random.default_rng(seed)
    pairs = []
    for number in range(count):
        right, wrong = rng.choice(ANIMALS, 2, replace=False)
        prompt = [{"role": "user", "content": f"{number}: say {right}"}]
        rejected = " ".join([wrong] * int(rng.integers(1, 6)))
        pairs.append({"prompt": prompt, "chosen": right, "rejected": rejected})
    return pairs


def write_jsonl(file: Path, records: list[dict]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def prepare_pairs(folder: Path, count: int = 60) -> Path:
    """A folder with ``tokenizer/`` and ``pairs.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer([" ".join(ANIMALS) + " say"] * 20, folder / "tokenizer", vocab_size=VOCAB)
    write_jsonl(folder / "pairs.jsonl", easy_pairs(count))
    return folder


def make_preferences(folder: Path, subsets: dict | None = None, **kwargs) -> Preferences:
    defaults = {
        "context_length": 256,
        "global_batch_tokens": 1024,
        "micro_batch_tokens": 1024,
        "bare": True,
        "cache_dir": str(folder / "cache"),
    }
    subsets = subsets or {"easy": PairsConfig(str(folder / "pairs.jsonl"), held_out=0.2)}
    return Preferences(subsets, str(folder / "tokenizer"), **(defaults | kwargs))


def make_module(
    folder: Path,
    loss: PreferenceLoss | None = None,
    schedule: Schedule | None = None,
    learning_rate: float = 0.003,
    **kwargs,
) -> PreferenceOptimization:
    return PreferenceOptimization(
        loss=loss or PreferenceLoss("apo_zero", beta=0.1),
        reference_cache=str(folder / "reference"),
        decoder=DecoderConfig(**SHAPE),
        optimizer=OptimizerConfig(learning_rate=learning_rate),
        schedule=schedule,
        **kwargs,
    )


class Record(Callback):
    """Metrics by optimiser step."""

    def __init__(self):
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch.micro == batch.accumulation - 1:
            sums = {key: float(value) for key, value in sorted(module._sums.items())}
            self.steps.append(sums | {"norm": float(module._grad_norm)})


def run(folder, steps=6, module=None, resume=None, save=None, callbacks=(), data=None, **trainer):
    """Train; returns the module and what was recorded."""
    record, module = Record(), module or make_module(folder)
    data = data or make_preferences(folder)
    trainer = make_trainer(folder / "run", steps, callbacks=[record, *callbacks], **trainer)
    trainer.fit(module, data, ckpt_path=resume)
    if save is not None:
        trainer.save_checkpoint(save)
    return module, record.steps


def cache_files(folder: Path) -> list[Path]:
    return list((folder / "reference").glob("*.safetensors"))


def assert_same(a, b, rel=0.0, abs=0.0):
    assert len(a) == len(b)
    for mine, theirs in zip(a, b, strict=True):
        assert mine == pytest.approx(theirs, rel=rel, abs=abs)
