"""A tiny model, tiny data and a trainer, for tests that train."""

from pathlib import Path

import numpy as np
from lightning import Callback, Trainer

from smol.checkpoints import SafeCheckpointIO
from smol.data.pretraining import Pretraining
from smol.data.stages import SourceConfig, StageConfig
from smol.model import DecoderConfig
from smol.modules import LanguageModeling
from smol.optim import WSD, OptimizerConfig

WORDS = "the cat sat on a mat and saw one more dog in the old house by the sea".split()
VOCAB = 384


def prepare_sources(folder: Path) -> Path:
    """Prepare two sources of random words; returns the folder that holds them."""
    from smol.data.documents import Files
    from smol.data.prepare import PrepareSettings, prepare
    from smol.data.tokenizer import train_tokenizer

    rng = np.random.default_rng(0)
    texts = {
        name: [" ".join(rng.choice(WORDS, rng.integers(5, 200))) for _ in range(400)]
        for name in ("cats", "dogs")
    }
    train_tokenizer(texts["cats"], folder / "tokenizer", vocab_size=VOCAB)
    for name, documents in texts.items():
        (folder / f"{name}.txt").write_text("\n\n".join(documents))
        prepare(
            Files([str(folder / f"{name}.txt")], separator="\n\n"),
            folder / name,
            folder / "tokenizer",
            PrepareSettings(held_out=0.1, chunk_tokens=4000),
            name=name,
            workers=0,
            log=lambda line: None,
        )
    return folder


def make_stages(sources: Path, **stages: dict) -> dict[str, StageConfig]:
    """Stages by name; each a mapping with ``cats`` and ``dogs`` weights and StageConfig fields."""
    made = {}
    for name, fields in (stages or {"one": {"start_step": 0, "cats": 0.7, "dogs": 0.3}}).items():
        weights = {k: fields[k] for k in ("cats", "dogs") if k in fields}
        rest = {k: v for k, v in fields.items() if k not in weights}
        mixture = {k: SourceConfig(str(sources / k), w) for k, w in weights.items()}
        made[name] = StageConfig(mixture, **rest)
    return made


def make_data(sources: Path, stages=None, **kwargs) -> Pretraining:
    defaults = {
        "context_length": 32,
        "global_batch_tokens": 256,
        "micro_batch_tokens": 256,
        "held_out_tokens": 256,
    }
    return Pretraining(
        stages or make_stages(sources), str(sources / "tokenizer"), **(defaults | kwargs)
    )


def make_module(schedule=None, optimizer=None, z_loss=0.0, **decoder) -> LanguageModeling:
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "intermediate_size": 64,
        "nope": 2,
    }
    return LanguageModeling(
        decoder=DecoderConfig(**(shape | decoder)),
        schedule=schedule or WSD(warmup_steps=3),
        optimizer=optimizer or OptimizerConfig(learning_rate=0.01),
        z_loss=z_loss,
    )


def make_trainer(folder: Path, max_steps: int, **kwargs) -> Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": max_steps,
        "max_epochs": -1,
        "gradient_clip_val": 1.0,
        "check_val_every_n_epoch": None,
        "val_check_interval": 10**6,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "default_root_dir": folder,
        "plugins": [SafeCheckpointIO()],
    }
    return Trainer(**(defaults | kwargs))


class Die(Exception):
    """What :class:`Bomb` ends a run with."""


class Bomb(Callback):
    """Ends the run in the middle of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step == self.step:
            raise Die


def make_config(sources: Path, trainer: dict, mixture: dict[str, float]) -> dict:
    """The tiny model, data and trainer as a configuration for the command line.

    Args:
        sources: What :func:`prepare_sources` has made.
        trainer: Settings of the trainer beside those that every test has.
        mixture: Weights by source, of the stage ``stage1``.
    """
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
    decoder = {"vocab_size": VOCAB, **shape, "intermediate_size": 64}
    weighted = {k: {"path": str(sources / k), "weight": w} for k, w in mixture.items()}
    return {
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": -1,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "plugins": [{"class_path": "smol.checkpoints.SafeCheckpointIO"}],
            **trainer,
        },
        "model": {
            "class_path": "smol.modules.LanguageModeling",
            "init_args": {"decoder": decoder, "optimizer": {"learning_rate": 0.01}},
        },
        "data": {
            "class_path": "smol.data.Pretraining",
            "init_args": {
                "tokenizer": str(sources / "tokenizer"),
                "context_length": 32,
                "global_batch_tokens": 256,
                "micro_batch_tokens": 256,
                "held_out_tokens": 256,
                "stages": {"stage1": {"start_step": 0, "mixture": weighted}},
            },
        },
    }
