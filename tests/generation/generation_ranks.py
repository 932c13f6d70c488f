"""One of two gloo ranks: texts of a sharded decoder, each rank with prompts of its own.

Started by test_engine.py with the file of the rendezvous and the rank.
"""

import torch
import torch.distributed as dist
from generation_parts import brute_force, make_decoder
from torch.distributed.device_mesh import init_device_mesh

from smol.generation import Generator, Sampling
from smol.parallel import shard_decoder
from smol.parallel.processes import leave_groups_at_exit

# The ranks differ in the number of prompts and in their lengths, and so in their passes.
PROMPTS = [[[5, 9, 2], [7], [3, 1, 4, 1, 5], [8, 8]], [[30, 20, 10, 40, 50, 2, 1]]]
LENGTHS = [4, 17]


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    sharded = make_decoder()
    shard_decoder(sharded, init_device_mesh("cpu", (2,)))
    sampling = Sampling(temperature=0, max_new_tokens=LENGTHS[rank])
    generator = Generator(sharded)
    for prompts in (PROMPTS[rank], PROMPTS[rank] if rank else [], PROMPTS[1 - rank]):
        found = generator.generate(prompts, sampling, batch_size=2)
        for prompt, completion in zip(prompts, found, strict=True):
            assert completion.tokens == brute_force(make_decoder(), prompt, LENGTHS[rank])


if __name__ == "__main__":
    main()
    leave_groups_at_exit()
