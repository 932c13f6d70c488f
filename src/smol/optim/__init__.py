"""Parameter groups, optimisers and learning-rate schedules."""

from smol.optim.clipping import clip_gradients, gradient_norm
from smol.optim.groups import (
    OptimizerConfig,
    ParameterGroup,
    apply_hyperparameters,
    build_optimizer,
    parameter_groups,
    set_learning_rates,
)
from smol.optim.muon import Muon
from smol.optim.schedules import WSD, Constant, Cosine, Schedule

__all__ = [
    "WSD",
    "Constant",
    "Cosine",
    "Muon",
    "OptimizerConfig",
    "ParameterGroup",
    "Schedule",
    "apply_hyperparameters",
    "build_optimizer",
    "clip_gradients",
    "gradient_norm",
    "parameter_groups",
    "set_learning_rates",
]
