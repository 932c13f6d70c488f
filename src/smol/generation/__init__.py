"""Writing text with a decoder."""

from importlib import import_module
from typing import Any

_PLACES = {"Completion": "row", "Generator": "engine", "Sampling": "sampling", "Stream": "engine"}

__all__ = ["Completion", "Generator", "Sampling", "Stream"]


def __getattr__(name: str) -> Any:
    # The settings of a command line need no torch, so modules are imported when asked for.
    if name in _PLACES:
        return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
