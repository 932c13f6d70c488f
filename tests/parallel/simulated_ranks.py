"""Sharded checkpoints of any layout, written and read by one process that plays every rank."""

import math
import os
import pickle
from itertools import count

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from smol.checkpoints.format import write_checkpoint


def as_rank(rank, mesh_shape, function):
    """Call a function with a mesh as one of its processes; what that sends goes nowhere.

    It runs in a child, because torch remembers meshes across process groups. Returns its result.
    """
    reader, writer = os.pipe()
    if os.fork() == 0:
        size = math.prod(mesh_shape)
        try:
            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
            result = function(init_device_mesh("cpu", mesh_shape))
        except Exception as error:
            result = error
        with os.fdopen(writer, "wb") as pipe:
            pickle.dump(result, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        result = pickle.load(pipe)
    os.wait()
    if isinstance(result, Exception):
        raise result
    return result


def shard(tensors, mesh, placements):
    """Each tensor with its placements on a mesh; None leaves it whole."""
    return {
        name: tensor
        if placements[name] is None
        else distribute_tensor(tensor, mesh, placements[name], src_data_rank=None)
        for name, tensor in tensors.items()
    }


def write_sharded(folder, mesh_shape, placements, weights, **entries):
    """Write a checkpoint as the ranks of a mesh would together; returns the digests."""
    outcomes = []  # of the ranks behind this one

    def write(mesh):
        mine = []

        def on_all_ranks(action):
            mine.append(action())
            return mine + outcomes

        content = {"state_dict": shard(weights, mesh, placements), **entries}
        return write_checkpoint(folder, content, rank, on_all_ranks), *mine

    for rank in reversed(range(math.prod(mesh_shape))):
        digests, outcome = as_rank(rank, mesh_shape, write)
        outcomes.insert(0, outcome)
    return digests


def write_halves(folder, weights, **entries):
    """A checkpoint of two ranks that have the first and the second rows of every tensor."""
    placements = {name: [Shard(0)] if tensor.ndim else None for name, tensor in weights.items()}
    return write_sharded(folder, (2,), placements, weights, **entries)


def numbered(shape, first=None):
    """A tensor in which no two elements are equal."""
    first = first or count()
    values = [next(first) for _ in range(math.prod(shape))]
    return torch.tensor(values, dtype=torch.float32).reshape(shape)
