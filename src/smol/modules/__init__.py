"""LightningModules, one per training objective."""

from smol.modules.base import DecoderModule
from smol.modules.language_modeling import LanguageModeling
from smol.modules.preference import PreferenceOptimization

__all__ = ["DecoderModule", "LanguageModeling", "PreferenceOptimization"]
