"""Less memory for more time: computing activations again in the backward pass.

Chen et al. 2016 (https://arxiv.org/abs/1604.06174). To keep what is dear and forget the cheap is
the idea of Korthikanti et al. 2022 (https://arxiv.org/abs/2205.05198).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from smol.errors import UserError, nearest

ActivationCheckpointing = Literal["none", "selective", "full"]
"""What a block forgets after its forward pass: nothing, all that is cheap to compute, or all."""

# Products, attention, and the sums over tensor-parallel ranks that follow products.
_DEAR = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "smol::attend_documents",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "torch_attn::_varlen_attn",
        "_c10d_functional::reduce_scatter_tensor",
        "_c10d_functional::all_reduce",
    }
)


def check_mode(mode: str) -> None:
    """Refuse what is no kind of activation checkpointing.

    Raises:
        UserError: Naming the kinds.
    """
    kinds = get_args(ActivationCheckpointing)
    if mode not in kinds:
        raise UserError(
            f"activation_checkpointing {mode!r} is unknown; expected one of {', '.join(kinds)}."
            f"{nearest(mode, kinds)}"
        )


def run_checkpointed(
    function: Callable[..., Any], args: tuple[Any, ...], mode: ActivationCheckpointing, random: bool
) -> Any:
    """Call a function whose activations the backward pass is to compute again.

    Args:
        function: Of tensors; it is called a second time in the backward pass.
        args: Its arguments, which are kept.
        mode: With ``selective`` the results of matrix products and attention are kept too.
        random: Whether it draws random numbers, which are then the same the second time.

    Returns:
        What ``function`` returns.
    """
    if mode == "none" or not torch.is_grad_enabled():
        return function(*args)
    options = {}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_what_is_dear)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=random, **options)


def _keep_what_is_dear(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operator.name() in _DEAR:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
