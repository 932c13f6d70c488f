"""The keys and values of earlier tokens, kept so that each token is computed once."""

from collections.abc import Sequence
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

    Memory is taken at the first use, in the dtype that keys have.

    Args:
        layers: Number of layers of the decoder.
        rows: How many texts it holds.
        length: How many positions each of them has.
    """

    def __init__(self, layers: int, rows: int, length: int) -> None:
        self.layers, self.rows, self.length = layers, rows, length
        # Keys and values of each layer, (layers, 2, rows, kv_heads, length, head_dim).
        self._memory: Tensor | None = None

    def place(self, first_row: int, starts: Sequence[int], time: int) -> list[Attend]:
        """Prepare one forward pass: where its tokens go and what they see.

        Args:
            first_row: The pass is about this row and those behind it.
            starts: For each of them, the position of the first new token.
            time: New tokens of each row.

        Returns:
            The attention of every layer, for the decoder's ``attends``.
        """
        step = _Pass(self, first_row, starts, time)
        return [partial(step.attend, layer) for layer in range(self.layers)]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of a row over another row."""
        if self._memory is not None:
            self._memory[:, :, target, :, :length] = self._memory[:, :, source, :, :length]

    def clear(self) -> None:
        """Forget everything; a value that is not finite would reach every later sum through 0."""
        if self._memory is not None:
            self._memory.zero_()

    def memory(self, keys: Tensor) -> Tensor:
        """The memory for keys like these, ``(batch, time, kv_heads, head_dim)``."""
        memory = self._memory
        if memory is None or (memory.dtype, memory.device) != (keys.dtype, keys.device):
            shape = (self.layers, 2, self.rows, keys.shape[2], self.length, keys.shape[3])
            # Zeros, because a masked slot still takes part in the sum, times nought.
            self._memory = memory = keys.new_zeros(shape)
        return memory


class _Pass:
    """One forward pass: its views of the cache are made once, for all layers.

    Args:
        cache: Where keys and values lie.
        first_row: See :meth:`KVCache.place`.
        starts: See :meth:`KVCache.place`.
        time: See :meth:`KVCache.place`.
    """

    def __init__(self, cache: KVCache, first_row: int, starts: Sequence[int], time: int) -> None:
        self.cache, self.starts, self.time = cache, starts, time
        self.rows = slice(first_row, first_row + len(starts))
        self.first, self.end = min(starts), max(starts) + time
        self.aligned = self.first == max(starts)
        self._targets: Sequence[Tensor] = ()  # keys and values of layer after layer

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store new keys and values and look at all of the row; shapes as in :data:`Attend`."""
        if not self._targets:
            self._open(q, k)
        for new, target in zip((k, v), self._targets[2 * layer : 2 * layer + 2], strict=True):
            if self.aligned:
                target.copy_(new.transpose(1, 2))
            else:
                target.index_copy_(0, self._slots, new.transpose(1, 2).flatten(0, 2))
        if self.end == self.time:  # the first tokens of all rows
            return RowAttention()(q, k, v)
        keys, values = self._sources[2 * layer : 2 * layer + 2]
        batch, time, heads, head_dim = q.shape
        if time == 1:
            # The queries that share a key head stand where time would: nothing is repeated.
            q = q.view(batch, keys.shape[1], -1, head_dim)
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=self._mask)
            return out.reshape(batch, 1, heads, head_dim)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), keys, values, self._mask, enable_gqa=heads != keys.shape[1]
        )
        return out.transpose(1, 2)

    def _open(self, q: Tensor, k: Tensor) -> None:
        memory = self.cache.memory(k).flatten(0, 1)
        rows = memory[:, self.rows]  # (2 layers, batch, kv_heads, length, head_dim)
        self._sources = rows[..., : self.end, :].unbind()
        self._targets = rows[..., self.first : self.end, :].unbind()
        if not self.aligned:
            # Numbers of the written slots, through all rows and heads of a layer.
            batch, heads, length = rows.shape[1:4]
            slots = torch.arange(batch * heads).view(batch, heads, 1) * length
            slots = slots + torch.tensor(self.starts).view(-1, 1, 1) + torch.arange(self.time)
            self._slots = (slots + self.rows.start * heads * length).flatten().to(k.device)
            self._targets = memory.flatten(1, 3).unbind()
        self._mask = None
        if self.end > self.time and not (self.aligned and self.time == 1):
            last_seen = torch.tensor(self.starts).unsqueeze(1) + torch.arange(self.time)
            hidden = torch.arange(self.end) > last_seen.unsqueeze(-1)
            # What is added to the scores, (rows, 1, time, end): the same for all heads and layers.
            mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
            self._mask = mask.unsqueeze(1).to(q.device, q.dtype)
