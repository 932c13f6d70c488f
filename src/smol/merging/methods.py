"""How the tensors of several models become one.

Every function takes the tensors of one name, all of one shape and dtype, that of the arithmetic;
sums and inner products are taken in float32 at least. They come as an iterable that is read once,
so that a sum holds two tensors at a time, however many models there are. Where a method has a base
model, its tensor comes first.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smol.errors import UserError

NEARLY_PARALLEL = 0.9995
"""Absolute cosine beyond which SLERP is a straight line."""


def linear(tensors: Iterable[Tensor], *, weight: Sequence[float], normalize: bool) -> Tensor:
    """Weighted sum, or with ``normalize`` weighted mean: a model soup (arXiv:2203.05482).

    Args:
        tensors: One per model, any shape.
        weight: One per model.
        normalize: Divide by the sum of the weights.

    Raises:
        UserError: If the sum to divide by is zero.
    """
    total = dtype = None
    for tensor, factor in zip(tensors, weight, strict=True):
        if total is None:
            total, dtype = torch.zeros_like(tensor, dtype=_wide(tensor)), tensor.dtype
        total.add_(tensor, alpha=factor)
    if normalize:
        total /= _sum(weight)
    return total.to(dtype)


def slerp(tensors: Iterable[Tensor], *, t: float) -> Tensor:
    """Spherical interpolation from the first tensor (t = 0) to the second (t = 1).

    Each tensor is one vector. The angle is that between the two, the lengths are kept as they are;
    vectors of nearly the same or the opposite direction are interpolated linearly.
    """
    first, second = tensors
    a, b = first.to(_wide(first)), second.to(_wide(second))
    cosine = _cosine(a.flatten(), b.flatten()).item()
    if abs(cosine) > NEARLY_PARALLEL:
        share, other_share = 1 - t, t
    else:
        angle = math.acos(cosine)
        share = math.sin((1 - t) * angle) / math.sin(angle)
        other_share = math.sin(t * angle) / math.sin(angle)
    return (share * a + other_share * b).to(first.dtype)


def model_stock(tensors: Iterable[Tensor], *, filter_wise: bool) -> Tensor:
    """The point between base and mean that lies nearest to the centre of the fine-tuned models.

    With c the mean cosine between the N offsets from the base, it is at t = N c / (1 + (N - 1) c)
    of the way to their mean (arXiv:2403.19522, equation 2). Offsets that point away from each other
    have no such centre; c then counts as 0 and the base stays.

    Args:
        tensors: The base and at least two others.
        filter_wise: One t per row of the last dimension instead of one per tensor.
    """
    base, *others = tensors
    wide = base.to(_wide(base))
    offsets = [other.to(wide.dtype) - wide for other in others]
    if not filter_wise:
        offsets = [offset.flatten() for offset in offsets]
    cosines = [_cosine(a, b) for a, b in combinations(offsets, 2)]
    cosine = torch.stack(cosines).mean(dim=0).clamp_(min=0)
    count = len(offsets)
    t = count * cosine / (1 + (count - 1) * cosine)
    mean = sum(offsets) / count
    moved = t.unsqueeze(-1).to(mean.dtype) * mean
    return (wide + moved.view_as(wide)).to(base.dtype)


Sparsify = Callable[..., Tensor]


def task_vectors(
    tensors: Iterable[Tensor],
    *,
    weight: Sequence[float],
    normalize: bool,
    lambda_: float,
    sparsify: Sparsify | None = None,
    elect_sign: bool = False,
    rescale: bool = False,
    seeds: Sequence[int] = (),
    **each: Sequence[float],
) -> Tensor:
    """The base plus ``lambda`` times a weighted sum of the others' differences from it.

    Plain sums are task arithmetic (arXiv:2212.04089). With ``elect_sign`` each entry takes the sign
    that the weighted sum of the differences has there, counting 0 as positive, and only differences
    of that sign count; ``normalize`` then divides by the weights of these (TIES, arXiv:2306.01708).

    Args:
        tensors: The base, and one per model.
        weight: One per model.
        normalize: Divide by the weights that were added up.
        lambda_: Factor of the whole sum.
        sparsify: Thins out one difference: ``sparsify(delta, seed, rescale, **its parameters)``.
        elect_sign: Drop the differences of the minority's sign.
        rescale: Given to ``sparsify``.
        seeds: Given to ``sparsify``, one per model.
        each: Further parameters of ``sparsify``, one value per model.

    Raises:
        UserError: If the sum of weights to divide by is zero.
    """
    tensors = iter(tensors)
    base = next(tensors)
    zeros = torch.zeros_like(base, dtype=_wide(base))
    total, deltas = zeros.clone(), []
    for i, (tensor, factor) in enumerate(zip(tensors, weight, strict=True)):
        delta = tensor - base
        if sparsify is not None:
            delta = sparsify(delta, seeds[i], rescale, **{k: v[i] for k, v in each.items()})
        delta = delta * factor
        total += delta
        if elect_sign:
            deltas.append(delta)
    if elect_sign:
        positive, total, divisor = total >= 0, zeros.clone(), zeros
        for delta, factor in zip(deltas, weight, strict=True):
            agrees = torch.where(positive, delta > 0, delta < 0)
            total += delta * agrees
            divisor.add_(agrees, alpha=factor)
        if normalize:
            total /= divisor.masked_fill_(divisor == 0, 1)
    elif normalize:
        total /= _sum(weight)
    return (base + lambda_ * total).to(base.dtype)


def magnitude(delta: Tensor, seed: int, rescale: bool, density: float) -> Tensor:
    """Keep the ``density * n`` entries of largest magnitude, and at least one (TIES).

    Args:
        delta: Any shape.
        seed: Of no effect.
        rescale: Scale what is kept so that the sum of magnitudes stays.
        density: Share to keep, 0 to 1.
    """
    if density >= 1 or density <= 0:
        return delta if density >= 1 else torch.zeros_like(delta)
    count = max(1, int(density * delta.numel()))
    return _masked(delta, _smallest(-_magnitudes(delta), count), rescale)


def magnitude_outliers(
    delta: Tensor, seed: int, rescale: bool, density: float, gamma: float
) -> Tensor:
    """Drop the ``gamma * n`` entries of largest magnitude, then the smallest ones.

    So ``density * n`` are left (Model Breadcrumbs, arXiv:2312.06795); where both cannot be had, as
    many of the largest ones stay as it takes.

    Args:
        delta: Any shape.
        seed: Of no effect.
        rescale: Scale what is kept so that the sum of magnitudes stays.
        density: Share to keep, 0 to 1.
        gamma: Share of outliers, 0 to 1.
    """
    if density >= 1:
        return delta
    size = delta.numel()
    count = int(density * size)
    below = max(0, size - count - int(gamma * size))
    magnitudes = _magnitudes(delta)
    kept = _smallest(magnitudes, below + count) & ~_smallest(magnitudes, below)
    return _masked(delta, kept, rescale)


def random(delta: Tensor, seed: int, rescale: bool, density: float) -> Tensor:
    """Keep each entry with probability ``density`` (DARE, arXiv:2311.03099).

    Args:
        delta: Any shape.
        seed: Of the choice; of nothing else than shape and density does it depend.
        rescale: Divide what is kept by ``density``, so that the expectation stays.
        density: Share to keep, 0 to 1.
    """
    if density >= 1 or density <= 0:
        return delta if density >= 1 else torch.zeros_like(delta)
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(delta.shape, generator=generator) < density
    return delta * kept / density if rescale else delta * kept


def _magnitudes(delta: Tensor) -> Tensor:
    return delta.abs().to(_wide(delta)).flatten()


def _smallest(values: Tensor, count: int) -> Tensor:
    """Mark the ``count`` smallest of ``values``, ``(n,)``; of equal ones the first."""
    if count == 0 or count == len(values):
        return torch.full_like(values, count > 0, dtype=torch.bool)
    # torch.kthvalue and sort carry an int64 index per value, twice the memory of the values.
    threshold = np.partition(values.numpy(), count - 1)[count - 1].item()
    kept = values < threshold
    equal = (values == threshold).nonzero().squeeze(1)
    kept[equal[: count - int(kept.sum())]] = True
    return kept


def _masked(delta: Tensor, kept: Tensor, rescale: bool) -> Tensor:
    masked = delta * kept.view_as(delta)
    if not rescale:
        return masked
    before, after = (x.abs().sum(dtype=torch.float64).item() for x in (delta, masked))
    return masked * (before / after) if after else masked


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine along the last dimension, float64; 0 where one of the vectors is 0."""
    product = (a * b).sum(-1, dtype=torch.float64)
    norms = [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64) for x in (a, b)]
    scale = norms[0] * norms[1]
    return torch.where(scale > 0, product / scale, 0).clamp(-1, 1)


def _sum(weight: Sequence[float]) -> float:
    total = math.fsum(weight)
    if abs(total) < 1e-8:
        raise UserError(
            f"the weights {', '.join(f'{w:g}' for w in weight)} add up to zero, by which normalize "
            "would divide; change them or set normalize to false"
        )
    return total


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


REQUIRED = object()
"""In place of a default: the recipe must say it."""


@dataclass(frozen=True)
class Method:
    """A way to merge, under its name in a recipe.

    Attributes:
        function: Takes tensors and, by name, the parameters; ``lambda`` as ``lambda_``.
        shared: Parameters of the whole merge and their defaults.
        each: Parameters of each model but the base, and their defaults.
        has_base: Whether there is a base model, which is no summand.
        others: Least and greatest number of models beside the base.
        seeded: Whether it takes a seed per model.
    """

    function: Callable[..., Tensor]
    shared: dict[str, Any]
    each: dict[str, Any] = field(default_factory=dict)
    has_base: bool = True
    others: tuple[int, float] = (1, math.inf)
    seeded: bool = False


def _of_task_vectors(
    sparsify: Sparsify | None = None,
    elect_sign: bool = False,
    normalize: bool = False,
    rescale: bool = False,
    **each: float,
) -> Method:
    return Method(
        partial(task_vectors, sparsify=sparsify, elect_sign=elect_sign),
        {"normalize": normalize, "rescale": rescale, "lambda": 1.0},
        {"weight": REQUIRED, **each},
        seeded=True,
    )


_DENSITY = {"density": 1.0}
_OUTLIERS = {"density": 1.0, "gamma": 0.01}

METHODS = {
    "linear": Method(linear, {"normalize": True}, {"weight": REQUIRED}, has_base=False),
    "slerp": Method(slerp, {"t": REQUIRED}, others=(1, 1)),
    "task_arithmetic": _of_task_vectors(),
    "ties": _of_task_vectors(magnitude, elect_sign=True, normalize=True, **_DENSITY),
    "dare_linear": _of_task_vectors(random, rescale=True, **_DENSITY),
    "dare_ties": _of_task_vectors(random, elect_sign=True, rescale=True, **_DENSITY),
    "breadcrumbs": _of_task_vectors(magnitude_outliers, **_OUTLIERS),
    "breadcrumbs_ties": _of_task_vectors(magnitude_outliers, elect_sign=True, **_OUTLIERS),
    "model_stock": Method(model_stock, {"filter_wise": False}, others=(2, math.inf)),
}
"""By the names and with the defaults of mergekit (https://github.com/arcee-ai/mergekit)."""
