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
    """The attention, and of each query the logarithm of its normalizer, piece after piece."""
    out, normalizers = _results(q)
    pieces, start = zip(*(_pieces(x, lengths) for x in (q, k, v, out)), strict=True), 0
    for query, key, value, result in pieces:
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        mixed, normalizer = _forward(*heads_first, is_causal=True)
        result.copy_(mixed.transpose(1, 2))
        end = start + normalizer.numel()
        normalizers[start:end].view(normalizer.shape).copy_(normalizer)
        start = end
    return out, normalizers


@torch.library.custom_op("smol::attend_documents_backward", mutates_args=(), device_types="cpu")
def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, normalizers: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    grads = tuple(x.new_empty(x.shape) for x in (q, k, v))
    pieces = zip(*(_pieces(x, lengths) for x in (grad, q, k, v, out, *grads)), strict=True)
    start = 0
    for *tensors, grad_q, grad_k, grad_v in pieces:
        documents, length, heads, _ = grad_q.shape
        end = start + documents * length * heads
        normalizer = normalizers[start:end].view(documents, heads, length)
        start = end
        dtype = torch.promote_types(q.dtype, torch.float32) if length < SHORT_DOCUMENT else q.dtype
        heads_first = (x.to(dtype).transpose(1, 2) for x in tensors)
        results = _backward(*heads_first, normalizer, dropout_p=0.0, is_causal=True)
        for piece, result in zip((grad_q, grad_k, grad_v), results, strict=True):
            piece.copy_(result.transpose(1, 2))
    return grads


@_attend.register_fake
def _(q, k, v, lengths):
    return _results(q)


@_attend_backward.register_fake
def _(grad, q, k, v, out, normalizers, lengths):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _results(q: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q[..., 0].numel(), dtype=dtype)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)


def _differentiate(ctx, grad, _):
    q, k, v, lengths, out, normalizers = ctx.saved_tensors
    return *_attend_backward(grad, q, k, v, out, normalizers, lengths), None


_attend.register_autograd(_differentiate, setup_context=_keep)


def _pieces(x: Tensor, lengths: Tensor) -> Iterator[Tensor]:
    """Views ``(documents, length, heads, head_dim)``, neighbours of equal length as one."""
    flat, start = x.reshape(-1, *x.shape[2:]), 0
    for length, equals in groupby(lengths.tolist()):
        end = start + length * len(list(equals))
        yield flat[start:end].unflatten(0, (-1, length))
        start = end
