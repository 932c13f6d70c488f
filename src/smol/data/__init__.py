"""Data: preparation, token streams, the curriculum, and the LightningDataModules."""

from importlib import import_module
from typing import Any

_PLACES = {
    "Conversations": "conversations",
    "Preferences": "preferences",
    "Pretraining": "pretraining",
}

__all__ = ["Conversations", "Preferences", "Pretraining"]


def __getattr__(name: str) -> Any:
    # Preparing data needs neither torch nor Lightning, so modules are imported when asked for.
    if name in _PLACES:
        return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
