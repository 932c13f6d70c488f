"""One of two gloo ranks: a sharded decoder's loss and gradients against a whole one's.

Started by test_cross_entropy.py with the file of the rendezvous and the rank.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from smol.losses import linear_cross_entropy
from smol.model import Decoder, DecoderConfig, check_initialization, init_weights
from smol.parallel.processes import leave_groups_at_exit

VOCAB, BATCH, TIME = 101, 2, 24


def build(tied: bool) -> Decoder:
    # 101 rows and 18 columns of heads do not divide evenly: the shards differ in size.
    config = DecoderConfig(VOCAB, 30, 2, 3, 1, 37, head_dim=6, nope=2, tie_embeddings=tied)
    with torch.device("meta"):
        return Decoder(config)


def loss_of(decoder, tokens, targets, documents):
    nll, lse = decoder(
        tokens,
        documents=documents,
        head=lambda hidden, weight: linear_cross_entropy(hidden, weight, targets, chunk_size=17),
    )
    return nll.sum() + 0.1 * lse.square().sum()


def shard(decoder: Decoder, mesh, **options) -> Decoder:
    for layer in decoder.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(decoder, mesh=mesh, **options)
    decoder.to_empty(device="cpu")
    init_weights(decoder, seed=5)
    check_initialization(decoder, std=decoder.config.init_std)
    return decoder


def compare(rank: int, mesh, tied: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (2 * BATCH, TIME), generator=generator)
    documents = (torch.rand(tokens.shape, generator=generator) < 0.2).cumsum(dim=1)
    targets = tokens.roll(-1, dims=1)
    targets[torch.rand(tokens.shape, generator=generator) < 0.3] = -100
    share = slice(rank * BATCH, (rank + 1) * BATCH)
    mine = tokens[share], targets[share], documents[share]

    whole = build(tied).to_empty(device="cpu")
    init_weights(whole, seed=5)
    expected = loss_of(whole, tokens, targets, documents)
    expected.backward()
    whole_weights, whole_parameters = whole.state_dict(), dict(whole.named_parameters())

    # Without gradients and with them, each before anything else has run.
    decoder = shard(build(tied), mesh)
    for name, weight in decoder.state_dict().items():
        assert torch.equal(weight.full_tensor(), whole_weights[name]), name
    with torch.no_grad():
        total = loss_of(decoder, *mine)
    dist.all_reduce(total)
    torch.testing.assert_close(total, expected.detach(), rtol=1e-5, atol=1e-4)

    for grads_first in (True, False):
        decoder = shard(build(tied), mesh)
        if not grads_first:
            decoder.eval()
            with torch.no_grad():
                loss_of(decoder, *mine)
            decoder.train()
        loss = loss_of(decoder, *mine)
        loss.backward()
        total = loss.detach().clone()
        dist.all_reduce(total)
        torch.testing.assert_close(total, expected.detach(), rtol=1e-5, atol=1e-4)
        for name, parameter in decoder.named_parameters():
            # FSDP2 averages over ranks; the expected gradient is of the sum.
            gradient = 2 * parameter.grad.full_tensor()
            torch.testing.assert_close(
                gradient, whole_parameters[name].grad, rtol=1e-4, atol=1e-5, msg=name
            )

    half = shard(build(tied), mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    loss = loss_of(half, *mine)
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total, expected.detach(), rtol=1e-2, atol=0)
    assert all(p.grad.dtype == torch.float32 for p in half.parameters())


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    for tied in (True, False):
        compare(rank, mesh, tied)


if __name__ == "__main__":
    main()
    leave_groups_at_exit()
