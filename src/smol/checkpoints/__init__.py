"""Checkpoints: their files, their store, and Lightning's door to both."""

from importlib import import_module
from typing import Any

_PLACES = {"SafeCheckpointIO": "io", "FsspecStore": "store", "copy_weights": "weights"}

__all__ = ["FsspecStore", "SafeCheckpointIO", "copy_weights"]


def __getattr__(name: str) -> Any:
    # Lightning is imported only for its own door.
    if name in _PLACES:
        return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
