"""One of two gloo ranks: a loss from a head dealt by rows, against the loss of the whole head.

Started by test_vocab_parallel.py with the folder to write to.
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from smol.errors import UserError
from smol.losses import linear_cross_entropy
from smol.parallel.processes import leave_groups_at_exit

BATCH, TIME, HIDDEN, VOCAB = 3, 7, 5, 34


class LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest tensor that this process holds."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, DTensor):
                self.largest = max(self.largest, leaf.untyped_storage().nbytes())
        return output


def inputs(dtype, vocab=VOCAB, spread=1.0):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(BATCH, TIME, HIDDEN, generator=generator, dtype=dtype) * spread
    weight = torch.randn(vocab, HIDDEN, generator=generator, dtype=dtype)
    targets = torch.randint(vocab, (BATCH, TIME), generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < 0.2] = -100
    factors = torch.randn(2, BATCH, TIME, generator=generator, dtype=dtype)
    return hidden.requires_grad_(), weight, targets, factors


def differentiate(hidden, weight, targets, factors, **options):
    """Results, and gradients of a mixture of both, each token with a factor of its own."""
    nll, lse = linear_cross_entropy(hidden, weight, targets, **options)
    loss = (factors[0] * nll + factors[1] * lse.square()).sum()
    return nll.detach(), lse.detach(), *torch.autograd.grad(loss, (hidden, weight))


def main(folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh, seen = init_device_mesh("cpu", (2,)), {}
    cases = {
        "float64": (inputs(torch.float64), {}),
        "float32 in chunks": (inputs(torch.float32), {"chunk_size": 5}),
        "far apart": (inputs(torch.float64, spread=1e3), {}),  # the sum of one shard vanishes
    }
    for name, ((hidden, weight, *rest), options) in cases.items():
        dealt = distribute_tensor(weight, mesh, [Shard(0)], src_data_rank=None).requires_grad_()
        *results, gradient = differentiate(hidden, dealt, *rest, **options)
        own = VOCAB // 2
        assert gradient.placements == (Shard(0),)
        assert gradient.to_local().shape == (own, HIDDEN)
        seen[name] = [*results, gradient.full_tensor()]

    hidden, weight, targets, _ = inputs(torch.float32, vocab=8192)
    dealt = distribute_tensor(weight, mesh, [Shard(0)], src_data_rank=None).requires_grad_()
    with LargestTensor() as mode:
        linear_cross_entropy(hidden, dealt, targets, chunk_size=64)[0].sum().backward()
    seen["largest"] = mode.largest

    whole = distribute_tensor(weight, mesh, [Replicate()], src_data_rank=None)
    try:
        linear_cross_entropy(hidden, whole, targets)
    except UserError as error:
        seen["error"] = str(error)
    outside = targets.clone().fill_(8192)
    try:
        linear_cross_entropy(hidden, dealt, outside)
    except IndexError as error:
        seen["outside"] = str(error)
    torch.save(seen, f"{folder}/{dist.get_rank()}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
    leave_groups_at_exit()
