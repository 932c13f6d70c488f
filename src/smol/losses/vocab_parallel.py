"""What a loss needs to know of a head whose rows are dealt to several processes."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from smol.errors import UserError


@dataclass(frozen=True)
class VocabularyShard:
    """The rows of a head that this process has; the tokens are the same on all of the group.

    As in Megatron-LM (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3) a process
    computes the logits of its own rows, and only numbers per token are sent: neither logits nor
    weights.

    Args:
        first: Index of its first row in the whole head.
        group: The processes that have the other rows.
    """

    first: int
    group: dist.ProcessGroup

    @classmethod
    def of(cls, weight: DTensor) -> "VocabularyShard":
        """Where the local part of a head's weight ``(vocab, hidden)`` stands in the whole.

        Raises:
            UserError: The weight is not dealt by rows, in equal parts, to one group of processes.
        """
        mesh = weight.device_mesh
        if weight.placements != (Shard(0),) or len(weight) % mesh.size():
            raise UserError(
                f"a head of {len(weight)} rows lies as {weight.placements} on {mesh.size()} "
                "processes; expected equal shares of its rows"
            )
        rows = len(weight) // mesh.size()
        return cls(mesh.get_local_rank() * rows, mesh.get_group())

    def combine(self, lse: Tensor, target_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Log-sum-exp and logit of the target over all rows, from those over each process' rows.

        Args:
            lse: ``(tokens,)``.
            target_logits: ``(tokens,)``; 0 where the target is another process' row.

        Returns:
            Both likewise, the same on all processes to the last bit.
        """
        mine = torch.stack([lse, target_logits])
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, mine, group=self.group)
        lses, logits = torch.stack(parts, dim=1)
        return lses.logsumexp(dim=0), logits.sum(dim=0)

    def add_up(self, gradient: Tensor) -> Tensor:
        """Sum, in place, what the rows of each process have contributed to a gradient."""
        dist.all_reduce(gradient, group=self.group)
        return gradient
