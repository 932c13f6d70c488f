"""Which precision a machine trains fastest in: what ``trainer.precision: auto`` stands for."""

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch

CPUINFO = Path("/proc/cpuinfo")


def choose_precision(trainer: Any) -> None:
    """Put the machine's fastest precision in the place of ``auto`` in a Trainer's configuration.

    Args:
        trainer: Its keys, changed in place; what is no mapping is left to the parser to refuse.
    """
    if isinstance(trainer, dict) and trainer.get("precision") == "auto":
        trainer["precision"] = fastest_precision(trainer.get("accelerator", "auto"))


def fastest_precision(accelerator: Any) -> str:
    """The Trainer's ``precision`` for float32 weights: bfloat16 products where they are faster.

    Args:
        accelerator: The Trainer's: ``cpu``, ``gpu``, ``auto``, or anything else.
    """
    on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
    device = "cuda" if on_gpu else "cpu" if accelerator in ("cpu", "auto") else "another"
    return "bf16-mixed" if multiplies_bfloat16(device) else "32-true"


@cache
def multiplies_bfloat16(device: str) -> bool:
    """Whether matrix products are faster in bfloat16 than in float32.

    It follows from what the machine is and not from a measurement, so that all ranks, and a run
    that goes on, choose alike. A processor's are faster with AMX (8 times, measured) and on AMD's
    with AVX-512 BF16 (2.8 times), and not on Intel's with AVX-512 BF16 alone (0.7 times).
    Elsewhere bfloat16 is emulated.

    Args:
        device: ``cpu``, ``cuda``, …
    """
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if device != "cpu":
        return False
    if torch.cpu._is_amx_tile_supported():
        return True
    return torch.cpu._is_avx512_bf16_supported() and _is_amd()


def _is_amd() -> bool:
    known = CPUINFO.read_text() if CPUINFO.is_file() else platform.processor()
    return "AuthenticAMD" in known
