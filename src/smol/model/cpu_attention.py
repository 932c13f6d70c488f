"""Causal attention within documents on a processor, with torch's own kernels, several at once.

Both passes are operators of their own (``torch.ops.smol``), which ``torch.compile`` and activation
checkpointing see as one product each, whatever the lengths of the documents.
"""

from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

SHORT_DOCUMENT = 512
"""Length in tokens below which gradients are faster in float32 than in bfloat16 or float16."""


def attend_documents(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """Causal attention of each document to itself, over the batch laid out as one row.

    The kernels are those behind ``scaled_dot_product_attention``. Called by themselves they take
    neighbours of equal length together, which keeps more cores busy, and the backward pass may
    choose its precision: in bfloat16 it walks through short documents in blocks of 32 or 64 queries
    and takes up to four times as long as in float32, while the forward pass is always faster.

    Args:
        q: ``(batch, time, heads, head_dim)``.
        k: ``(batch, time, kv_heads, head_dim)``, of the same dtype.
        v: As ``k``.
        lengths: Of the documents, in tokens, ``(documents,)``, int64; they sum to ``batch * time``.

    Returns:
        ``(batch, time, heads, head_dim)``.
    """
    return _attend(q, k, v, lengths)[0]


@torch.library.custom_op("smol::attend_documents", mutates_args=(), device_types="cpu")
def _attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The attention, and the logarithm of each query's normalizer, ``(batch, time, heads)``."""
    out, normalizers = _results(q)
    for query, key, value, result, kept in _pieces(lengths, q, k, v, out, normalizers):
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        mixed, normalizer = _forward(*heads_first, is_causal=True)
        result.copy_(mixed.transpose(1, 2))
        kept.copy_(normalizer.transpose(1, 2))
    return out, normalizers


@torch.library.custom_op("smol::attend_documents_backward", mutates_args=(), device_types="cpu")
def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, normalizers: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    grads = _gradients(q, k, v)
    pieces = _pieces(lengths, grad, q, k, v, out, normalizers, *grads)
    for *tensors, normalizer, grad_q, grad_k, grad_v in pieces:
        short = grad_q.shape[1] < SHORT_DOCUMENT
        dtype = torch.promote_types(q.dtype, torch.float32) if short else q.dtype
        heads_first = (x.to(dtype).transpose(1, 2) for x in tensors)
        results = _backward(*heads_first, normalizer.transpose(1, 2), dropout_p=0.0, is_causal=True)
        for piece, result in zip((grad_q, grad_k, grad_v), results, strict=True):
            piece.copy_(result.transpose(1, 2))
    return grads


@_attend.register_fake
def _(q, k, v, lengths):
    return _results(q)


@_attend_backward.register_fake
def _(grad, q, k, v, out, normalizers, lengths):
    return _gradients(q, k, v)


def _results(q: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=dtype)


def _gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in tensors)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)


def _differentiate(ctx, grad, _):
    q, k, v, lengths, out, normalizers = ctx.saved_tensors
    return *_attend_backward(grad, q, k, v, out, normalizers, lengths), None


_attend.register_autograd(_differentiate, setup_context=_keep)


def _pieces(lengths: Tensor, *tensors: Tensor) -> Iterator[list[Tensor]]:
    """Views ``(documents, length, heads, ...)`` of all, neighbours of equal length as one."""
    flat, start = [x.flatten(0, 1) for x in tensors], 0
    for length, equals in groupby(lengths.tolist()):
        end = start + length * len(list(equals))
        yield [x[start:end].unflatten(0, (-1, length)) for x in flat]
        start = end
