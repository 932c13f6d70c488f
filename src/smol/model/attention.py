"""Causal attention within documents, by interchangeable backends.

A backend looks at the documents of a batch once (``prepare``) and returns a function that every
layer calls. All of them take queries ``(batch, time, heads, head_dim)`` and keys and values
``(batch, time, kv_heads, head_dim)`` and return ``(batch, time, heads, head_dim)``; tokens of
different rows or different documents never meet.

To ``torch.compile``, ``varlen`` is one operator whatever the lengths of the documents, and so is
``sdpa`` on a processor. The others are hidden from it where lengths vary: it would specialise on
them, and compile again for every batch.
"""

import importlib.util
import inspect
from collections.abc import Callable
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from smol.errors import UserError, nearest
from smol.model.cpu_attention import attend_documents

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention over one prepared batch: queries, keys and values in, mixed values out."""


class AttentionBackend(Protocol):
    """One way to compute causal attention within documents."""

    def prepare(
        self, documents: Tensor | None, shape: tuple[int, int], device: torch.device
    ) -> Attend:
        """Look at the documents of a batch, once for all layers.

        Args:
            documents: ``(batch, time)``, integer; equal neighbours in a row belong together.
                ``None`` means that each row is one document.
            shape: ``(batch, time)``.
            device: Where the attention will run.

        Returns:
            The attention of this batch.

        Raises:
            UserError: If this backend cannot run on ``device``.
        """


def document_starts(documents: Tensor) -> Tensor:
    """Mark the first token of each document; ``(batch, time)`` integer in, bool out."""
    starts = torch.ones_like(documents, dtype=torch.bool)
    torch.ne(documents[:, 1:], documents[:, :-1], out=starts[:, 1:])
    return starts


def document_lengths(documents: Tensor | None, shape: tuple[int, int]) -> list[int]:
    """Lengths of the documents, row after row, on the host (one synchronisation on a GPU).

    Args:
        documents: ``(batch, time)``, integer, or ``None`` for one document per row.
        shape: ``(batch, time)``.

    Returns:
        Lengths in tokens; they sum to ``batch * time``.
    """
    batch, time = shape
    if documents is None:
        return [time] * batch
    starts = document_starts(documents).flatten().nonzero().squeeze(1).tolist()
    return [end - start for start, end in zip(starts, [*starts[1:], batch * time], strict=True)]


def document_positions(documents: Tensor) -> Tensor:
    """Positions that restart at 0 with each document; ``(batch, time)`` in and out, int64."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    return index - (index * document_starts(documents)).cummax(dim=1).values


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2) for x in tensors)


class RowAttention:
    """Causal attention where each row is one document. Transparent to ``torch.compile``."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gqa = q.shape[2] != k.shape[2]
        q, k, v = _heads_first(q, k, v)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        return out.transpose(1, 2)


class SplitAttention:
    """One causal call per document, over the batch laid out as one row.

    ``split`` and ``cat`` move each token once in the backward pass; slicing would add a zero-filled
    gradient of the whole batch for every document.

    Args:
        lengths: Of the documents, summing to ``batch * time``.
    """

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = torch.tensor(lengths, device="cpu")  # where it is read
        torch._dynamo.maybe_mark_dynamic(self.lengths, 0)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.device.type == "cpu":
            return attend_documents(q, k, v, self.lengths)
        return self._one_by_one(q, k, v)

    @torch.compiler.disable
    def _one_by_one(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gqa, lengths = q.shape[2] != k.shape[2], self.lengths.tolist()
        pieces = zip(
            *(x.flatten(0, 1).transpose(0, 1).split(lengths, dim=1) for x in (q, k, v)),
            strict=True,
        )
        out = [
            F.scaled_dot_product_attention(
                *(x.unsqueeze(0) for x in piece), is_causal=True, enable_gqa=gqa
            ).transpose(1, 2)
            for piece in pieces
        ]
        return torch.cat(out, dim=1).view(q.shape)


class SDPABackend:
    """``torch.nn.functional.scaled_dot_product_attention``; runs everywhere."""

    def prepare(
        self, documents: Tensor | None, shape: tuple[int, int], device: torch.device
    ) -> Attend:
        lengths = document_lengths(documents, shape)
        return RowAttention() if len(lengths) == shape[0] else SplitAttention(lengths)


def _require_cuda(name: str, device: torch.device | None = None) -> None:
    """Refuse a backend without a GPU, in one line."""
    if not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        seen = f"the model is on {device}" if torch.cuda.is_available() else "none was found"
        raise UserError(f"attention {name!r} needs a CUDA device, {seen}; use attention sdpa.")


def causal_document_mask(documents: Tensor) -> Callable[..., Tensor]:
    """The rule "earlier or same token, same document", as FlexAttention asks for it.

    Args:
        documents: ``(batch, time)``, integer; ids may come back later in a row.

    Returns:
        ``mask_mod(batch, head, query, key)`` over index tensors.
    """
    unique = document_starts(documents).cumsum(dim=1)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (unique[b, q] == unique[b, k])

    return mask_mod


@cache
def _compiled_flex() -> tuple[Callable, Callable]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Uncompiled, both would materialise the whole (time, time) matrix.
    return torch.compile(create_block_mask, dynamic=False), torch.compile(
        flex_attention, dynamic=False
    )


class FlexAttention:
    """FlexAttention under one block mask."""

    def __init__(self, block_mask) -> None:
        self.block_mask = block_mask

    @torch.compiler.disable
    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gqa = q.shape[2] != k.shape[2]
        _, flex_attention = _compiled_flex()
        q, k, v = _heads_first(q, k, v)
        out = flex_attention(q, k, v, block_mask=self.block_mask, enable_gqa=gqa)
        return out.transpose(1, 2)


class FlexBackend:
    """``torch.nn.attention.flex_attention``: one fused kernel that skips empty blocks."""

    def __init__(self) -> None:
        _require_cuda("flex")

    def prepare(
        self, documents: Tensor | None, shape: tuple[int, int], device: torch.device
    ) -> Attend:
        _require_cuda("flex", device)
        batch, time = shape
        if documents is None:
            documents = torch.zeros(shape, dtype=torch.long, device=device)
        create_block_mask, _ = _compiled_flex()
        mask_mod = causal_document_mask(documents)
        return FlexAttention(create_block_mask(mask_mod, batch, None, time, time, device=device))


def cumulative_lengths(lengths: list[int], device: torch.device) -> Tensor:
    """Offsets of the documents in the flat batch, ``(documents + 1,)``, int32."""
    offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return offsets.to(device, non_blocking=True)


class VarlenAttention:
    """Flash attention over the flat batch, told where documents begin.

    Args:
        offsets: From :func:`cumulative_lengths`.
        longest: Length in tokens of the longest document.
    """

    def __init__(self, offsets: Tensor, longest: int) -> None:
        from torch.nn.attention.varlen import varlen_attn

        self.offsets, self.longest, self.varlen_attn = offsets, longest, varlen_attn
        torch._dynamo.maybe_mark_dynamic(offsets, 0)
        known = inspect.signature(varlen_attn).parameters
        # Causality was a flag before it became a window without a right side.
        self.options = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
        self.native_gqa = "enable_gqa" in known

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.dtype not in (torch.bfloat16, torch.float16):
            raise UserError(
                f"attention 'varlen' works in bfloat16 or float16, not {q.dtype}; "
                "use precision bf16-mixed or attention sdpa."
            )
        options = dict(self.options)
        groups = q.shape[2] // k.shape[2]
        if groups > 1 and self.native_gqa:
            options["enable_gqa"] = True
        elif groups > 1:
            k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
        flat = (x.flatten(0, 1) for x in (q, k, v))
        out = self.varlen_attn(
            *flat, self.offsets, self.offsets, self.longest, self.longest, **options
        )
        return out.view(q.shape)


class VarlenBackend:
    """``torch.nn.attention.varlen``: flash attention over documents of any length."""

    def __init__(self) -> None:
        _require_cuda("varlen")
        if importlib.util.find_spec("torch.nn.attention.varlen") is None:
            raise UserError(
                f"attention 'varlen' needs torch 2.10 or newer, this is {torch.__version__}; "
                "use attention sdpa."
            )

    def prepare(
        self, documents: Tensor | None, shape: tuple[int, int], device: torch.device
    ) -> Attend:
        _require_cuda("varlen", device)
        lengths = document_lengths(documents, shape)
        return VarlenAttention(cumulative_lengths(lengths, device), max(lengths))


def block_diagonal_mask(lengths: list[int], device: torch.device | None = None):
    """The ``BlockDiagonalCausalMask`` of xformers over the batch laid out as one row."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    return BlockDiagonalCausalMask.from_seqlens(lengths, device=device)


class XFormersAttention:
    """``xformers.ops.memory_efficient_attention`` under a block-diagonal causal mask."""

    def __init__(self, mask) -> None:
        from xformers.ops import memory_efficient_attention

        self.mask, self.attention = mask, memory_efficient_attention

    @torch.compiler.disable
    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kv_heads, groups = k.shape[2], q.shape[2] // k.shape[2]
        shape = (1, -1, kv_heads, groups, q.shape[3])
        # Grouped heads are a fifth dimension; expanding does not copy keys and values.
        grouped_q = q.reshape(shape)
        k, v = (
            x.reshape(1, -1, kv_heads, 1, x.shape[3]).expand(-1, -1, -1, groups, -1) for x in (k, v)
        )
        if groups == 1:
            grouped_q, k, v = (x.squeeze(3) for x in (grouped_q, k, v))
        return self.attention(grouped_q, k, v, attn_bias=self.mask).view(q.shape)


class XFormersBackend:
    """Memory-efficient attention of xformers (``pip install xformers``)."""

    def __init__(self) -> None:
        if importlib.util.find_spec("xformers") is None:
            raise UserError(
                "attention 'xformers' needs the package xformers, which is not installed; "
                "type pip install 'smol-lightning[gpu]' or use attention sdpa."
            )
        _require_cuda("xformers")

    def prepare(
        self, documents: Tensor | None, shape: tuple[int, int], device: torch.device
    ) -> Attend:
        _require_cuda("xformers", device)
        return XFormersAttention(block_diagonal_mask(document_lengths(documents, shape), device))


BACKENDS: dict[str, Callable[[], AttentionBackend]] = {
    "sdpa": SDPABackend,
    "flex": FlexBackend,
    "varlen": VarlenBackend,
    "xformers": XFormersBackend,
}


def build_attention(name: str) -> AttentionBackend:
    """Return the attention backend called ``name``.

    Raises:
        UserError: If no backend has that name, or if it cannot run on this machine.
    """
    if name not in BACKENDS:
        raise UserError(
            f"attention {name!r} is unknown; expected one of {', '.join(BACKENDS)}."
            f"{nearest(name, BACKENDS)}"
        )
    return BACKENDS[name]()
