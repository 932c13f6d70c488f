"""Optimiser parameter groups by pattern, and the optimiser built from them."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from smol.errors import UserError, nearest
from smol.optim.muon import Muon

# Wrappers put these into parameter names; a checkpoint must not depend on them.
_WRAPPER_PREFIXES = re.compile(r"_orig_mod\.|_checkpoint_wrapped_module\.")


@dataclass
class ParameterGroup:
    """Settings for the parameters whose name matches a pattern.

    Args:
        pattern: Regular expression searched for in the parameter name.
        weight_decay: Weight decay of the group; None for the optimiser's.
        learning_rate_scale: Factor on the optimiser's learning rate.
        optimizer: Update rule of the group where the optimiser is ``muon``; None for ``muon`` on
            matrices and ``adamw`` on everything else.
    """

    pattern: str
    weight_decay: float | None = None
    learning_rate_scale: float = 1.0
    optimizer: Literal["adamw", "muon"] | None = None


DEFAULT_GROUPS = {
    "embeddings": ParameterGroup(r"embed|\bwte\b", weight_decay=0.0, optimizer="adamw"),
    "norms": ParameterGroup(r"norm|\bln_", weight_decay=0.0, optimizer="adamw"),
    "biases": ParameterGroup(r"bias$", weight_decay=0.0, optimizer="adamw"),
    "head": ParameterGroup(r"\b(lm_)?head\b", optimizer="adamw"),
}


@dataclass
class OptimizerConfig:
    """What the optimiser is and how its parameters are grouped.

    Args:
        name: ``adamw``, or ``muon``: Muon on the matrices inside blocks and AdamW on the rest.
        learning_rate: Peak learning rate, multiplied by the schedule.
        betas: Decay rates of AdamW's two moments.
        eps: Term that keeps AdamW's denominator from zero.
        weight_decay: Decoupled weight decay, as a factor on the learning rate.
        fused: AdamW's fused kernel; None to use it wherever it exists.
        groups: Parameter groups by name, first match wins. They come before the default groups
            (``embeddings``, ``norms`` and ``biases`` without weight decay, ``head``), of which one
            is replaced by giving its name and removed by setting it to null.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    fused: bool | None = None
    groups: dict[str, ParameterGroup | None] | None = None

    def __post_init__(self) -> None:
        ranges = {
            "learning_rate": (self.learning_rate, 0.0, math.inf),
            "weight_decay": (self.weight_decay, 0.0, math.inf),
            "eps": (self.eps, 0.0, math.inf),
            "betas[0]": (self.betas[0], 0.0, 1.0),
            "betas[1]": (self.betas[1], 0.0, 1.0),
        }
        for name, (value, least, end) in ranges.items():
            if not least <= value < end:
                raise UserError(f"optimizer {name} is {value}; expected {least} <= {name} < {end}")


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig
) -> list[dict[str, Any]]:
    """Sort the trainable parameters into groups, each parameter into exactly one.

    Args:
        named_parameters: Names and parameters, as from ``module.named_parameters()``; those that
            need no gradient are left out.
        config: The optimiser's configuration.

    Returns:
        Groups as ``torch.optim`` takes them, without empty ones. ``params`` holds (name, parameter)
        pairs, ``group`` the group's name, ``algorithm`` its update rule and ``name``, under which
        the learning rate is logged, both.

    Raises:
        UserError: If a pattern is no regular expression, if a pattern of ``config.groups`` decides
            for no parameter, or if Muon is asked for a parameter that is not a matrix.
    """
    parameters = {
        _WRAPPER_PREFIXES.sub("", name): parameter
        for name, parameter in named_parameters
        if parameter.requires_grad
    }
    patterns = _patterns(config)
    members: dict[tuple[str, str], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in parameters.items():
        group_name = next((key for key in patterns if re.search(patterns[key].pattern, name)), "")
        algorithm = _algorithm(name, parameter, patterns.get(group_name), config)
        members.setdefault((group_name or "default", algorithm), []).append((name, parameter))

    decided = {group_name for group_name, _ in members}
    for group_name, group in (config.groups or {}).items():
        if group is not None and group_name not in decided:
            raise UserError(_unmatched(group_name, group, parameters, patterns))
    return [
        {
            "params": pairs,
            "name": f"{group_name}_muon" if algorithm == "muon" else group_name,
            "group": group_name,
            "algorithm": algorithm,
        }
        for (group_name, algorithm), pairs in members.items()
    ]


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig
) -> Optimizer:
    """Build the optimiser over its parameter groups, at the peak learning rate.

    ``optimizer.load_state_dict`` matches parameters by name, restores moments and step counts only
    and keeps every hyper-parameter of ``config``.

    Args:
        named_parameters: Names and parameters, as from ``module.named_parameters()``.
        config: The optimiser's configuration.

    Returns:
        A ``torch.optim.AdamW`` or a :class:`~smol.optim.muon.Muon`.

    Raises:
        UserError: See :func:`parameter_groups`.
    """
    groups = parameter_groups(named_parameters, config)
    fused = config.fused
    if fused is None:
        kinds = {parameter.device.type for group in groups for _, parameter in group["params"]}
        fused = kinds <= {"cpu", "cuda"} or None
    optimizer_class = torch.optim.AdamW if config.name == "adamw" else Muon
    optimizer = optimizer_class(groups, lr=config.learning_rate, fused=fused)
    optimizer.register_load_state_dict_pre_hook(_restore_by_name)
    apply_hyperparameters(optimizer, config)
    return optimizer


def apply_hyperparameters(optimizer: Optimizer, config: OptimizerConfig) -> None:
    """Set learning rate, weight decay, betas and eps of every group from the configuration.

    Args:
        optimizer: An optimiser of :func:`build_optimizer`; changed in place.
        config: The configuration; its groups must be those the optimiser was built with.
    """
    patterns = _patterns(config)
    for group in optimizer.param_groups:
        settings = patterns.get(group["group"], ParameterGroup(""))
        decay = settings.weight_decay
        group["lr"] = config.learning_rate * settings.learning_rate_scale
        group["weight_decay"] = config.weight_decay if decay is None else decay
        group["betas"] = tuple(config.betas)
        group["eps"] = config.eps


def set_learning_rates(optimizer: Optimizer, config: OptimizerConfig, multiplier: float) -> None:
    """Apply the configuration with its learning rates multiplied, for one optimiser step.

    Args:
        optimizer: An optimiser of :func:`build_optimizer`; changed in place.
        config: The configuration.
        multiplier: The schedule's value for the step, in [0, 1].
    """
    apply_hyperparameters(optimizer, config)
    for group in optimizer.param_groups:
        group["lr"] *= multiplier


def _patterns(config: OptimizerConfig) -> dict[str, ParameterGroup]:
    """Return the groups by name in order of precedence: the user's, then the other defaults."""
    user = config.groups or {}
    defaults = {name: group for name, group in DEFAULT_GROUPS.items() if name not in user}
    patterns = {name: group for name, group in (user | defaults).items() if group is not None}
    for name, group in patterns.items():
        try:
            re.compile(group.pattern)
        except re.error as error:
            raise UserError(
                f"parameter group '{name}' has the pattern {group.pattern!r}, "
                f"which is no regular expression: {error}"
            ) from None
    return patterns


def _algorithm(
    name: str, parameter: Tensor, group: ParameterGroup | None, config: OptimizerConfig
) -> str:
    """Return the update rule of one parameter, ``adamw`` or ``muon``."""
    chosen = group.optimizer if group is not None else None
    if config.name == "adamw":
        if chosen == "muon":
            raise UserError(
                f"parameter '{name}' is in a group with optimizer: muon, but the optimiser is "
                "adamw; set the optimiser's name to muon"
            )
        return "adamw"
    if chosen == "muon" and parameter.ndim != 2:
        raise UserError(
            f"parameter '{name}' has shape {tuple(parameter.shape)}, and Muon updates matrices "
            "only; set optimizer: adamw for its group"
        )
    return chosen or ("muon" if parameter.ndim == 2 else "adamw")


def _unmatched(
    group_name: str,
    group: ParameterGroup,
    parameters: dict[str, nn.Parameter],
    patterns: dict[str, ParameterGroup],
) -> str:
    """Word the error of a pattern that decided for no parameter."""
    found = [name for name in parameters if re.search(group.pattern, name)]
    start = f"parameter group '{group_name}' with the pattern {group.pattern!r}"
    if found:
        first = next(key for key in patterns if re.search(patterns[key].pattern, found[0]))
        return f"{start} decides for no parameter: '{found[0]}' is taken by the earlier '{first}'"
    literal = re.sub(r"[^\w.]", "", group.pattern.replace(r"\d+", "0"))
    parts = {part: name for name in parameters for part in name.split(".")}
    hint = nearest(literal, parameters) or nearest(literal.split(".")[-1], parts)
    return f"{start} matches none of {len(parameters)} parameters.{hint}" + (
        "" if hint else f" The first is '{next(iter(parameters), '')}'."
    )


def _restore_by_name(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
    """Rearrange a saved state by parameter name and put the current hyper-parameters into it.

    Left to itself, ``load_state_dict`` matches parameters by position, which a changed group
    silently shifts, and brings back the saved learning rate, betas, eps and weight decay.
    """
    saved: dict[str, tuple[str | None, Any]] = {}
    for group in state_dict["param_groups"]:
        if "param_names" not in group:
            return None
        for name, index in zip(group["param_names"], group["params"], strict=True):
            saved[name] = group.get("algorithm"), state_dict["state"].get(index)

    state, groups, index = {}, [], 0
    for group in optimizer.param_groups:
        names = group["param_names"]
        groups.append({**group, "params": list(range(index, index + len(names)))})
        for name in names:
            if name not in saved:
                raise UserError(
                    f"the saved optimiser state has no parameter '{name}'.{nearest(name, saved)} "
                    "To start from the weights alone, use init_from instead of continues"
                )
            algorithm, values = saved[name]
            if algorithm not in (None, group["algorithm"]):
                raise UserError(
                    f"parameter '{name}' was trained with {algorithm} and is now in a group with "
                    f"{group['algorithm']}; keep the optimiser, or use init_from to start from "
                    "the weights alone"
                )
            if values:
                # Cloned because a checkpoint's tensors may be a mapped file, and the optimiser
                # would otherwise go on writing into them.
                state[index] = {
                    key: value.clone() if isinstance(value, Tensor) else value
                    for key, value in values.items()
                }
            index += 1
    return {**state_dict, "state": state, "param_groups": groups}
