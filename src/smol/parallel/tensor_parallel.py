"""Tensor parallelism of a decoder: a group of processes computes every block together.

The plan is Megatron-LM's. Attention and the feed-forward network are dealt to the processes by
heads and by columns (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053). Before each of them
the residual stream is gathered, and after it scattered, so that in between, where the norms are,
each process has a stretch of the time (sequence parallelism, Korthikanti et al. 2022,
https://arxiv.org/abs/2205.05198). Embedding and head are dealt by tokens of the vocabulary, and
:mod:`smol.losses.vocab_parallel` helps to compute the loss from such a head.
"""

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from smol.errors import UserError
from smol.model.config import DecoderConfig

WHOLE, ROWS, COLUMNS = Replicate(), Shard(0), Shard(1)
TIME, HEADS = Shard(1), Shard(2)  # of activations (batch, time, heads or features, ...)


def parallelize_decoder(decoder: nn.Module, mesh: DeviceMesh, context: int | None = None) -> None:
    """Deal a decoder's parameters to the processes of a mesh, in place.

    Called like before, with the same tokens on all processes, it returns the same on all of them.
    What it calls ``head`` with is whole, unless that takes a sharded weight.

    Args:
        decoder: A :class:`smol.model.decoder.Decoder`; may be on the meta device.
        mesh: One-dimensional mesh of the tensor-parallel ranks.
        context: Tokens per sequence that it will be trained on, where that is known.

    Raises:
        UserError: The decoder's shape or the context does not divide by the size of the mesh.
    """
    check_divisible(decoder.config, context, mesh.size())
    stream = _Stream(mesh.size(), decoder.config.dropout)
    decoder.model.embed_tokens.register_forward_pre_hook(stream.fit)
    norm = _Layout(WHOLE, given=stream, returned=WHOLE, local=False)
    column_wise = _Layout(ROWS, given=WHOLE)
    row_wise = _Layout(COLUMNS, given=HEADS, returned=stream)
    block = {
        "input_layernorm": norm,
        "self_attn.q_proj": column_wise,
        "self_attn.k_proj": column_wise,
        "self_attn.v_proj": column_wise,
        "self_attn.o_proj": row_wise,
        "post_attention_layernorm": norm,
        "mlp.gate_proj": column_wise,
        "mlp.up_proj": column_wise,
        "mlp.down_proj": row_wise,
    }
    if decoder.config.qk_norm:
        # Each process norms its own heads, and the gradients of the one weight are added up.
        block |= {f"self_attn.{name}": _Layout(WHOLE, given=HEADS) for name in ("q_norm", "k_norm")}
    plan = {"model.embed_tokens": _Layout(ROWS, given=WHOLE, returned=stream)}
    plan |= {f"model.layers.*.{name}": layout for name, layout in block.items()}
    plan["model.norm"] = _Layout(WHOLE, given=stream, returned=WHOLE)
    if not decoder.config.tie_embeddings:
        plan["lm_head"] = _Layout(ROWS, given=WHOLE)
    parallelize_module(decoder, mesh, plan, src_data_rank=None)


def check_divisible(config: DecoderConfig, context: int | None, size: int) -> None:
    """Refuse what cannot be dealt evenly.

    Raises:
        UserError: Naming the key that is not a multiple of ``size``.
    """
    keys = ("num_heads", "num_kv_heads", "intermediate_size", "vocab_size")
    numbers = {f"model.decoder.{key}": getattr(config, key) for key in keys}
    for key, number in (numbers | {"data.context_length": context or 0}).items():
        if number % size:
            raise UserError(
                f"{key} is {number}, which tensor_parallel_size {size} does not divide; expected "
                "a multiple of it"
            )


class _Stream:
    """How the residual stream lies: split over time, or whole where the time does not divide.

    The latter is for text that grows token by token.
    """

    def __init__(self, size: int, dropout: float) -> None:
        self.size, self.dropout = size, dropout
        self.placement: Placement = TIME

    def fit(self, embedding: nn.Module, inputs: tuple[Tensor]) -> None:
        time = inputs[0].shape[1]
        self.placement = WHOLE if time % self.size else TIME
        if self.dropout and embedding.training and time % self.size:
            # Each process drops elements of its own stretch, with random numbers of its own.
            raise UserError(
                f"a sequence has {time} tokens, which tensor_parallel_size {self.size} does not "
                "divide; expected a multiple of it, or model.decoder.dropout 0"
            )


class _Layout(ParallelStyle):
    """Where the parameters of a module lie, the tensor that it is given, and what it returns.

    Args:
        weight: Of its weight. A bias is split with the rows, and otherwise whole.
        given: Of its first argument, which may be the part of it that this process has.
        returned: Of the result; None leaves it as it falls out.
        local: Whether to return this process' part as a plain tensor. Kept together, gradients from
            several users are added up before they are sent.
    """

    def __init__(
        self,
        weight: Placement,
        given: Placement | _Stream,
        returned: Placement | _Stream | None = None,
        local: bool = True,
    ) -> None:
        super().__init__()
        self.weight, self.given, self.returned, self.local = weight, given, returned, local

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        for name, parameter in list(module.named_parameters(recurse=False)):
            placement = WHOLE if name == "bias" and self.weight == COLUMNS else self.weight
            placed = distribute_tensor(parameter, mesh, [placement], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(placed, parameter.requires_grad))

        def enter(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            first, *rest = inputs
            if not isinstance(first, DTensor):
                first = DTensor.from_local(first, mesh, [_place(self.given)], run_check=False)
            return first, *rest

        def leave(module: nn.Module, inputs: Any, output: DTensor) -> Tensor:
            if self.returned is not None:
                output = output.redistribute(placements=[_place(self.returned)])
            return output.to_local() if self.local else output

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
        return module


def _place(layout: Placement | _Stream) -> Placement:
    return layout.placement if isinstance(layout, _Stream) else layout
