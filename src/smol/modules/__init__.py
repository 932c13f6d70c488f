"""LightningModules, one per training objective."""

from smol.modules.base import DecoderModule
from smol.modules.language_modeling import LanguageModeling

__all__ = ["DecoderModule", "LanguageModeling"]
