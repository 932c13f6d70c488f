"""Planned memory against what PyTorch's allocator has given out."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from smol.losses import cross_entropy, linear_cross_entropy
from smol.model import Decoder, DecoderConfig, init_weights, num_parameters
from smol.planning import memory
from smol.planning.memory import Sharding, Work, training_memory

CONFIG = DecoderConfig(1000, 64, 3, 4, 2, 192, nope=3)
ROWS, TIME = 2, 256
GPU = Work(tokens=12288)
SMOLLM3_3B = DecoderConfig(128_256, 2048, 36, 16, 4, 11_008, nope=4)


def peak_of_training(work: Work, length: int | None) -> int:
    """Highest sum of bytes in two steps, weights and moments included."""
    tokens = torch.randint(CONFIG.vocab_size, (ROWS, TIME))
    documents = None if length is None else (torch.arange(TIME) // length).expand(ROWS, -1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        decoder = Decoder(CONFIG, activation_checkpointing=work.checkpointing)
        init_weights(decoder, seed=0)
        optimizer = torch.optim.AdamW(decoder.parameters(), fused=True)
        for _ in range(2):
            for micro in range(work.accumulation):
                batch = [x.clone() for x in (tokens, tokens)]
                head = partial(linear_cross_entropy, targets=batch[1])
                with torch.autocast("cpu", torch.bfloat16, work.precision == "bf16-mixed"):
                    loss = decoder(batch[0], documents=documents, head=head)[0].mean()
                if micro == 0:
                    optimizer.zero_grad()  # where Lightning does it
                loss.backward()
                del loss, batch, head
            optimizer.step()
    events = profiler.profiler.kineto_results.events()
    alive = peak = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        alive += size
        peak = max(peak, alive)
    return peak


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_plan_is_within_five_percent_of_a_step(precision, checkpointing):
    work = Work(ROWS * TIME, 1, precision, checkpointing, "cpu")
    measured = peak_of_training(work, length=64)
    assert training_memory(CONFIG, Sharding(), work).total == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(("length", "accumulation"), [(None, 1), (128, 2)])
def test_rows_and_accumulation(length, accumulation):
    work = Work(ROWS * TIME, accumulation, "bf16-mixed", "none", "cpu")
    measured = peak_of_training(work, length)
    assert training_memory(CONFIG, Sharding(), work).total == pytest.approx(measured, rel=0.05)


def test_constants_are_those_of_the_loss():
    assert memory.TILE_ELEMENTS == cross_entropy.TILE_ELEMENTS
    assert memory.SMALLEST_CHUNK == cross_entropy.SMALLEST_CHUNK


def test_weights_gradients_and_moments_are_dealt_to_shards():
    held = {}
    for processes in (1, 8):
        plan = training_memory(
            SMOLLM3_3B, Sharding("fsdp", processes), replace(GPU, accumulation=2)
        )
        held[processes] = sum(plan.parts[k] for k in ("parameters", "gradients", "moments"))
    assert held[1] == 16 * num_parameters(SMOLLM3_3B)
    assert held[8] == pytest.approx(held[1] / 8)


def test_less_memory_in_the_expected_order():
    def total(strategy, *sizes, **changes):
        return training_memory(
            SMOLLM3_3B, Sharding(strategy, *sizes), replace(GPU, **changes)
        ).total

    assert total("ddp") > total("single") > total("fsdp", 8) > total("fsdp", 16)
    assert total("fsdp", 1, 2) < total("fsdp", 1)
    by_kind = [total("fsdp", 8, checkpointing=kind) for kind in ("none", "selective", "full")]
    assert by_kind == sorted(by_kind, reverse=True)
    assert total("ddp", precision="32-true") > total("ddp")
    assert total("fsdp", 8, tokens=4096) < total("fsdp", 8)
    assert total("fsdp", 8, accumulation=2) > total("fsdp", 8)


def test_smollm3_fits_as_it_was_trained():
    """Two tensor-parallel H100s held a copy, three sequences at a time, nothing computed again."""
    published = training_memory(SMOLLM3_3B, Sharding("fsdp", 1, 2), GPU)
    assert 40 < published.total / 2**30 < 80 * 0.92
    alone = training_memory(SMOLLM3_3B, Sharding("ddp"), GPU)
    assert alone.total / 2**30 > 80
