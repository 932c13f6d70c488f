"""How a decoder is spread over processes."""

from importlib import import_module
from typing import Any

_PLACES = {
    "FSDP2Strategy": "strategy",
    "parallelize_decoder": "tensor_parallel",
    "shard_decoder": "fsdp",
}

__all__ = ["FSDP2Strategy", "parallelize_decoder", "shard_decoder"]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
