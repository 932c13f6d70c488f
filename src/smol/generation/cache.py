"""The keys and values of earlier tokens, kept so that each token is computed once."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from smol.model.attention import Attend, RowAttention


class KVCache:
    """Static memory for the keys and values of a number of rows, at every layer.

    The slot of a token is its position, so rows of any lengths lie side by side without padding
    before them. A row may write garbage into slots behind its end (from the padding of a batch of
    prompts): no query looks there before a later token has overwritten it.

    Memory is taken at the first use of each layer, in the dtype that its keys have.

    Args:
        layers: Number of layers of the decoder.
        rows: How many texts it holds.
        length: How many positions each of them has.
    """

    def __init__(self, layers: int, rows: int, length: int) -> None:
        self.rows, self.length = rows, length
        self._layers = [_LayerCache(rows, length) for _ in range(layers)]

    def place(
        self, first_row: int, starts: Sequence[int], time: int, device: torch.device
    ) -> list[Attend]:
        """Prepare one forward pass: where its tokens go and what they see.

        Args:
            first_row: The pass is about this row and those behind it.
            starts: For each of them, the position of the first new token.
            time: New tokens of each row.
            device: Of the decoder.

        Returns:
            The attention of every layer, for the decoder's ``attends``.
        """
        rows = slice(first_row, first_row + len(starts))
        end = max(starts) + time
        aligned = min(starts) == max(starts)
        slots = mask = None
        if not aligned:
            offsets = torch.arange(time)
            slots = torch.tensor(
                [(row * self.length + start) for row, start in enumerate(starts, first_row)]
            )
            slots = (slots.unsqueeze(1) + offsets).flatten().to(device)
        if end > time and not (aligned and time == 1):
            last_seen = torch.tensor(starts).unsqueeze(1) + torch.arange(time)
            mask = torch.arange(end) <= last_seen.unsqueeze(-1)
            mask = mask.unsqueeze(1).to(device)  # the same for all heads
        plan = _Plan(rows, slice(end - time, end), slots, end, mask)
        return [partial(layer.attend, plan) for layer in self._layers]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of a row over another row."""
        for layer in self._layers:
            for tensor in layer.tensors:
                tensor[target, :length] = tensor[source, :length]

    def clear(self) -> None:
        """Forget everything; a value that is not finite would reach every later sum through 0."""
        for layer in self._layers:
            for tensor in layer.tensors:
                tensor.zero_()


@dataclass(frozen=True)
class _Plan:
    """What one forward pass does in every layer.

    Attributes:
        rows: That are written.
        columns: The slots that are written, where all rows write the same ones.
        slots: Otherwise the written slots, numbered through all rows of the cache.
        end: One more than the highest slot in use.
        mask: Which slots each new token sees, ``(rows, 1, time, end)`` bool; ``None`` if the new
            tokens are the first of their rows, or each sees all slots.
    """

    rows: slice
    columns: slice
    slots: Tensor | None
    end: int
    mask: Tensor | None


class _LayerCache:
    def __init__(self, rows: int, length: int) -> None:
        self.rows, self.length = rows, length
        self.tensors: tuple[Tensor, ...] = ()  # keys and values, (rows, length, kv_heads, head_dim)

    def attend(self, plan: _Plan, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store new keys and values and look at all of the row; shapes as in :data:`Attend`."""
        if not self.tensors or _kind(self.tensors[0]) != _kind(k):
            shape = (self.rows, self.length, *k.shape[2:])
            # Zeros, because a masked slot still takes part in the sum, times nought.
            self.tensors = k.new_zeros(shape), k.new_zeros(shape)
        for cache, new in zip(self.tensors, (k, v), strict=True):
            if plan.slots is None:
                cache[plan.rows, plan.columns] = new
            else:
                cache.flatten(0, 1).index_copy_(0, plan.slots, new.flatten(0, 1))
        if plan.columns.start == 0:
            return RowAttention()(q, k, v)
        k, v = (x[plan.rows, : plan.end].transpose(1, 2) for x in self.tensors)
        batch, time, heads, head_dim = q.shape
        if time == 1:
            # The queries that share a key head stand where time would: nothing is repeated.
            q = q.view(batch, k.shape[1], -1, head_dim)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=plan.mask)
            return out.reshape(batch, 1, heads, head_dim)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k, v, attn_mask=plan.mask, enable_gqa=heads != k.shape[1]
        )
        return out.transpose(1, 2)


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.device]:
    return tensor.dtype, tensor.device
