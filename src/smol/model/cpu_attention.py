"""Causal attention within documents on a processor, with torch's own kernels, several at once."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

SHORT_DOCUMENT = 512
"""Length in tokens below which gradients are faster in float32 than in bfloat16 or float16."""


def attend_documents(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """Causal attention of each document to itself, over the batch laid out as one row.

    The kernels are those behind ``scaled_dot_product_attention``. Called by themselves they take
    neighbours of equal length together, which keeps more cores busy, and the backward pass may
    choose its precision: in bfloat16 it walks through short documents in blocks of 32 or 64 queries
    and takes up to four times as long as in float32, while the forward pass is always faster.

    Args:
        q: ``(batch, time, heads, head_dim)``.
        k: ``(batch, time, kv_heads, head_dim)``, of the same dtype.
        v: As ``k``.
        lengths: Of the documents, in tokens; they sum to ``batch * time``.

    Returns:
        ``(batch, time, heads, head_dim)``.
    """
    return _DocumentAttention.apply(q, k, v, lengths)


class _DocumentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, lengths):
        out, normalizers = torch.empty_like(q), []
        pieces = zip(*(_pieces(x, lengths) for x in (q, k, v, out)), strict=True)
        for query, key, value, result in pieces:
            heads_first = (x.transpose(1, 2) for x in (query, key, value))
            mixed, normalizer = _forward(*heads_first, is_causal=True)
            result.copy_(mixed.transpose(1, 2))
            normalizers.append(normalizer)
        ctx.lengths = lengths
        ctx.save_for_backward(q, k, v, out, *normalizers)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, out, *normalizers = ctx.saved_tensors
        grads = tuple(torch.empty_like(x) for x in (q, k, v))
        pieces = zip(*(_pieces(x, ctx.lengths) for x in (grad, q, k, v, out, *grads)), strict=True)
        for normalizer, (*tensors, grad_q, grad_k, grad_v) in zip(normalizers, pieces, strict=True):
            short = grad_q.shape[1] < SHORT_DOCUMENT
            dtype = torch.promote_types(q.dtype, torch.float32) if short else q.dtype
            heads_first = (x.to(dtype).transpose(1, 2) for x in tensors)
            results = _backward(*heads_first, normalizer, dropout_p=0.0, is_causal=True)
            for piece, result in zip((grad_q, grad_k, grad_v), results, strict=True):
                piece.copy_(result.transpose(1, 2))
        return *grads, None


def _pieces(x: Tensor, lengths: Sequence[int]) -> Iterator[Tensor]:
    """Views ``(documents, length, heads, head_dim)``, neighbours of equal length as one."""
    flat, start = x.reshape(-1, *x.shape[2:]), 0
    for length, equals in groupby(lengths):
        end = start + length * len(list(equals))
        yield flat[start:end].unflatten(0, (-1, length))
        start = end
