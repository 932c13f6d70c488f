"""One of several gloo ranks: decoders dealt to pairs of tensor-parallel ranks, and their results.

Started by test_tensor_parallel.py with the file of the rendezvous, rank, number of ranks and where
to write. What it compares with, one process, is made of the same functions.
"""

import sys
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from smol.errors import UserError
from smol.losses import linear_cross_entropy
from smol.model import Decoder, DecoderConfig, check_initialization, init_weights
from smol.optim import clip_gradients, gradient_norm
from smol.parallel.fsdp import local_part, shard_decoder
from smol.parallel.processes import leave_groups_at_exit
from smol.parallel.tensor_parallel import parallelize_decoder

VOCAB, SEED, CLIP = 102, 5, 0.1
DECODERS = {
    "tied": {},
    "all": {"tie_embeddings": False, "qk_norm": True, "attention_bias": "all"},
}
TIMES = {"even": 16, "odd": 7}


def build(**features):
    # 33 of the 66 columns do not divide by two once more: data-parallel shards differ in size.
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "nope": 2}
    with torch.device("meta"):
        return Decoder(DecoderConfig(VOCAB, intermediate_size=66, **(shape | features)))


def initialize(decoder):
    decoder.to_empty(device="cpu")
    init_weights(decoder, seed=SEED)
    check_initialization(decoder)
    return decoder


@torch.no_grad()
def change_what_is_constant(decoder):
    """Norms of nothing but ones and biases of zeros would hide mistakes."""
    for name, parameter in decoder.named_parameters():
        if "norm" in name or "bias" in name:
            values = torch.arange(parameter.numel()).remainder(7) * 0.1
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                values = distribute_tensor(values, mesh, placements, src_data_rank=None)
            parameter.add_(values)


def batch(time):
    generator = torch.Generator().manual_seed(time)
    tokens = torch.randint(VOCAB, (2, time), generator=generator)
    documents = (torch.rand(tokens.shape, generator=generator) < 0.2).cumsum(dim=1)
    return tokens, documents, tokens.roll(-1, dims=1)


def cross_entropy(hidden, weight, targets):
    """A head that knows nothing of shards."""
    logits = F.linear(hidden, weight).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), reduction="none")


def sharded_aware(hidden, weight, targets):
    return linear_cross_entropy(hidden, weight, targets, chunk_size=17)[0]


sharded_aware.takes_sharded_weight = True


def results(decoder):
    """Losses, gradients and their norm, by head and time."""
    seen = {}
    with torch.no_grad():
        seen["logits"] = decoder(batch(7)[0])
        seen["last"] = decoder(batch(1)[0], head=lambda h, w: F.linear(h[:, -1], w))
    for name, time in TIMES.items():
        tokens, documents, targets = batch(time)
        for head in (cross_entropy, sharded_aware):
            decoder.zero_grad()
            losses = decoder(tokens, documents=documents, head=partial(head, targets=targets))
            losses.sum().backward()
            gradients = {n: whole(p.grad) for n, p in decoder.named_parameters()}
            norm = gradient_norm(decoder.parameters())
            clip_gradients(decoder.parameters(), CLIP)
            clipped = gradient_norm(decoder.parameters())
            values = (losses.detach().flatten(), gradients, norm, clipped)
            seen[f"{head.__name__} {name}"] = values
    return seen


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def weights(decoder):
    """Whole, and this process' parts."""
    named = dict(decoder.named_parameters())
    parts = {name: local_part(p).clone() for name, p in named.items()}
    return {name: whole(p.detach()) for name, p in named.items()}, parts


def drop(decoder, rank):
    """Which elements of the second half of the sequence a block drops, each rank with its seed."""
    torch.manual_seed(rank)
    dropped = []
    handle = decoder.model.layers[0].register_forward_hook(
        lambda layer, inputs, output: dropped.append(output.detach() == inputs[0])
    )
    decoder.train()
    decoder(batch(16)[0])
    handle.remove()
    try:
        decoder(batch(7)[0])
    except UserError as error:
        return dropped[0], str(error)


def main(folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    names = ("data_parallel", "tensor_parallel")
    mesh, seen = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=names), {}

    def dealt(**features):
        decoder = build(**features)
        parallelize_decoder(decoder, mesh["tensor_parallel"])
        shard_decoder(decoder, mesh["data_parallel"])
        return initialize(decoder)

    for name, features in DECODERS.items():
        decoder = dealt(**features)
        seen[f"{name} weights"] = weights(decoder)
        change_what_is_constant(decoder)
        seen[name] = results(decoder)
    if size == 2:
        seen["dropout"] = drop(dealt(dropout=0.5), rank)
    torch.save(seen, f"{folder}/{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
    leave_groups_at_exit()
