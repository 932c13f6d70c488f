"""Cross-entropy of a linear head, without ever holding the logits of all tokens and columns."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from smol.losses.vocab_parallel import VocabularyShard

TILE_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}
"""Logits in work at a time: what fits a processor's cache, or keeps a GPU busy."""
SMALLEST_CHUNK = 512


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    chunk_size: int | None = None,
    ignore_index: int | None = -100,
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood and log-sum-exp of ``hidden @ weight.T``, token by token.

    The head is walked through in chunks of the vocabulary. The forward pass keeps one number per
    token, the log-sum-exp, and the backward pass computes the logits again: a third more matrix
    products than keeping them, in exchange for a memory that does not grow with the vocabulary and
    for temporaries that stay in cache. Chunks of the vocabulary rather than of the tokens, because
    each then yields a finished slice of the weight's gradient, and the sums over chunks run over
    ``(tokens, hidden)``, which is the smaller matrix.

    Gradients may flow from both results, each token with its own: that of z-loss
    (https://arxiv.org/abs/2204.02311, section 5) comes through the log-sum-exp. Products run in
    autocast's dtype; exponentials and sums in float32 (float64 for float64 inputs).

    A weight that is dealt by rows to tensor-parallel ranks (``DTensor``) stays where it is. All of
    them call with the same ``hidden`` and ``targets``, and get the same results and the whole
    gradient of ``hidden``.

    Args:
        hidden: ``(..., hidden)``.
        weight: Head, ``(vocab, hidden)``.
        targets: ``(...)``, int64.
        chunk_size: Rows of the head per chunk; ``None`` chooses by device and number of tokens.
        ignore_index: Target of tokens that give no loss and no gradient; ``None`` promises that
            there is none, which spares a GPU a synchronisation.

    Returns:
        Negative log-likelihood in nats and log-sum-exp, both of the shape of ``targets``, float32;
        both 0 where the target is ignored.

    Raises:
        IndexError: If a target is neither a row of the head nor ``ignore_index``.
    """
    flat_hidden, flat_targets = hidden.flatten(0, -2), targets.flatten()
    all_kept = True
    if ignore_index is not None:
        kept = (flat_targets != ignore_index).nonzero().squeeze(1)
        all_kept = len(kept) == len(flat_targets)
    if not all_kept:
        flat_hidden, flat_targets = flat_hidden[kept], flat_targets[kept]
    device, vocab = hidden.device.type, len(weight)
    strangers = (flat_targets < 0) | (flat_targets >= vocab)
    if device == "cpu" and strangers.any():  # a GPU's gather asserts by itself
        stranger = flat_targets[strangers][0].item()
        raise IndexError(f"target {stranger} is not a token of a vocabulary of {vocab}.")
    shard = None
    if isinstance(weight, DTensor):
        shard, weight = VocabularyShard.of(weight), weight.to_local()

    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if chunk_size is None:
        tile = TILE_ELEMENTS.get(device, TILE_ELEMENTS["cuda"])
        chunk_size = max(tile // max(len(flat_targets), 1), SMALLEST_CHUNK)
    results = _LinearCrossEntropy.apply(flat_hidden, weight, flat_targets, chunk_size, dtype, shard)
    if not all_kept:
        results = (x.new_zeros(targets.numel()).index_copy(0, kept, x) for x in results)
    # Copies, because FSDP2 hooks what a forward returns and cannot hook views safely.
    nll, lse = (x.view(targets.shape).clone() for x in results)
    return nll, lse


linear_cross_entropy.takes_sharded_weight = True  # a decoder asks its head for this


class _LinearCrossEntropy(torch.autograd.Function):
    """Tokens in one row, none ignored; the weight may be some rows of the head."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk_size, dtype, shard):
        if shard is not None:
            targets = targets - shard.first
        ctx.save_for_backward(hidden, weight, targets)
        tiles = _Tiles(hidden, weight, targets, chunk_size, dtype)
        lse = hidden.new_full((len(hidden),), -torch.inf, dtype=tiles.sum_dtype)
        target_logits = torch.zeros_like(lse)
        with torch.autocast(hidden.device.type, enabled=False):
            for logits, column, inside, _ in tiles:
                found = logits.gather(1, column).squeeze(1)
                target_logits += torch.where(inside, found, 0)
                top = logits.amax(dim=1).to(lse.dtype)
                total = tiles.exp(logits, top).sum(dim=1)
                lse = torch.logaddexp(lse, total.log_().add_(top))
        if shard is not None:
            lse, target_logits = shard.combine(lse, target_logits)
        ctx.lse, ctx.chunk_size, ctx.dtype, ctx.shard = lse, chunk_size, dtype, shard
        ctx.set_materialize_grads(False)
        return lse - target_logits, lse.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_nll, grad_lse):
        hidden, weight, targets = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        tiles = _Tiles(hidden, weight, targets, ctx.chunk_size, ctx.dtype)
        zero = torch.zeros_like(ctx.lse)
        grad_nll = zero if grad_nll is None else grad_nll
        # Each column's share is its probability times this, less grad_nll in the target's column.
        scale = (grad_nll + (zero if grad_lse is None else grad_lse)).unsqueeze(1)

        hidden_grad = (
            hidden.new_zeros(hidden.shape, dtype=tiles.sum_dtype) if needs_hidden else None
        )
        weight_grad = torch.empty_like(weight) if needs_weight else None
        with torch.autocast(hidden.device.type, enabled=False):
            for logits, column, inside, rows in tiles:
                grad = tiles.exp(logits, ctx.lse).mul_(scale)
                grad.scatter_add_(1, column, torch.where(inside, -grad_nll, 0).unsqueeze(1))
                grad = logits.copy_(grad)
                if needs_hidden:
                    _add_product(hidden_grad, grad, weight[rows].to(ctx.dtype))
                if needs_weight:
                    weight_grad[rows] = grad.T @ tiles.hidden
        if needs_hidden:
            if ctx.shard is not None:
                ctx.shard.add_up(hidden_grad)
            hidden_grad = hidden_grad.to(hidden.dtype)
        return hidden_grad, weight_grad, None, None, None, None


class _Tiles:
    """Walks through the head and computes the logits of one chunk after another, in one buffer."""

    def __init__(self, hidden, weight, targets, chunk_size, dtype) -> None:
        self.hidden, self.weight, self.targets = hidden.to(dtype), weight, targets
        self.chunk_size = min(chunk_size, len(weight))
        self.sum_dtype = torch.promote_types(dtype, torch.float32)
        size = len(hidden) * self.chunk_size
        self.buffer = hidden.new_empty(size, dtype=dtype)
        same = dtype == self.sum_dtype
        self.sum_buffer = self.buffer if same else hidden.new_empty(size, dtype=self.sum_dtype)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor, slice]]:
        """Yield logits, each target's column in them, whether it lies in them, and rows of head."""
        for start in range(0, len(self.weight), self.chunk_size):
            rows = slice(start, min(start + self.chunk_size, len(self.weight)))
            weight = self.weight[rows].to(self.hidden.dtype)
            logits = self._shaped(self.buffer, len(weight))
            torch.mm(self.hidden, weight.T, out=logits)
            column = self.targets - start
            inside = (column >= 0) & (column < len(weight))
            yield logits, column.clamp(0, len(weight) - 1).unsqueeze(1), inside, rows

    def exp(self, logits: Tensor, shift: Tensor) -> Tensor:
        """``exp(logits - shift)`` in the dtype of sums; overwrites ``logits`` if it has it."""
        out = self._shaped(self.sum_buffer, logits.shape[1])
        return torch.sub(logits, shift.unsqueeze(1), out=out).exp_()

    def _shaped(self, buffer: Tensor, columns: int) -> Tensor:
        return buffer[: len(self.hidden) * columns].view(len(self.hidden), columns)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, where the factors may be of a lower precision."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
