"""The loader: interrupted equals uninterrupted, by token ids per optimiser step."""

import multiprocessing
import os
import signal
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
import torch
from memory_sources import EOS, make_loader, step_ids

import smol.data.loader as loader_module
from smol.data.batch import token_tensors
from smol.data.stages import SourceConfig, StageConfig
from smol.errors import UserError

CHUNKS = {"code": [900, 700, 1100], "maths": [500, 640], "prose": [1300, 800, 999, 1024]}


def stage(start, context=None, batch=None, **weights):
    mixture = {n: SourceConfig(path=n, weight=w) for n, w in weights.items()}
    return StageConfig(mixture, start_step=start, context_length=context, global_batch_tokens=batch)


# Two stages, a longer context, a larger batch, and several epochs of the small sources.
STAGES = {
    "one": stage(0, prose=0.6, code=0.25, maths=0.15),
    "two": stage(17, prose=0.3, code=0.3, maths=0.4),
    "long": stage(29, context=32, prose=1, code=1),
    "large": stage(37, context=8, batch=256, prose=2, code=1, maths=1),
}
STEPS = 50


@pytest.fixture(scope="module")
def uninterrupted():
    return step_ids([make_loader(STAGES, CHUNKS)], STEPS)


def resumed(position, history, n, *, ranks=1, micro=32, workers=0):
    loaders = [
        make_loader(STAGES, CHUNKS, rank, ranks, micro, workers, history=history)
        for rank in range(ranks)
    ]
    return step_ids(loaders, n)


@pytest.mark.parametrize("stop", range(0, STEPS, 3))
def test_any_step(uninterrupted, stop):
    loader = make_loader(STAGES, CHUNKS)
    assert step_ids([loader], stop) == uninterrupted[:stop]
    history = loader.curriculum.history(loader.position)
    assert resumed(loader.position, history, STEPS - stop) == uninterrupted[stop:]


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_any_number_of_workers(uninterrupted, workers):
    loader = make_loader(STAGES, CHUNKS, workers=workers)
    assert step_ids([loader], 20) == uninterrupted[:20]
    history = loader.curriculum.history(loader.position)
    assert resumed(loader.position, history, STEPS - 20) == uninterrupted[20:]
    again = resumed(loader.position, history, STEPS - 20, workers=3 - workers % 3)
    assert again == uninterrupted[20:]


@pytest.mark.parametrize(("ranks", "micro"), [(1, 64), (1, 128), (2, 32), (2, 64), (4, 32)])
def test_any_accumulation_and_any_number_of_ranks(uninterrupted, ranks, micro):
    loader = make_loader(STAGES, CHUNKS)
    step_ids([loader], 14)
    history = loader.curriculum.history(loader.position)
    rest = resumed(loader.position, history, STEPS - 14, ranks=ranks, micro=micro)
    assert rest == uninterrupted[14:]


def test_ranks_get_different_rows():
    loaders = [make_loader(STAGES, CHUNKS, rank, 2) for rank in range(2)]
    a, b = (next(iter(loader)).tokens for loader in loaders)
    assert not (a == b).all()


def test_fetched_is_not_consumed_and_seek_drops_what_is_in_flight(uninterrupted):
    loader = make_loader(STAGES, CHUNKS, workers=2)
    iterator = iter(loader)
    first = next(iterator)
    assert loader.position == 0
    loader.seek(uninterrupted[2][0])
    batch = next(iterator)
    assert batch.position == uninterrupted[2][0]
    assert batch.micro == 0
    loader.seek(0)
    assert (next(iterator).tokens == first.tokens).all()
    with pytest.raises(ValueError, match="not the beginning of an optimiser step"):
        loader.seek(5)


def test_the_accumulation_is_that_of_the_next_step():
    loader = make_loader(STAGES, CHUNKS, micro=64)
    seen = set()
    for batch in islice(loader, 100):
        assert batch.accumulation == loader.accumulation
        seen.add(batch.accumulation)
        if batch.micro == batch.accumulation - 1:
            loader.consume(batch.next_position)
    assert seen == {2, 4}


def test_a_global_batch_that_does_not_divide_is_one_line():
    with pytest.raises(UserError, match="a global batch of 128 tokens is 8 sequences of 16") as e:
        make_loader(STAGES, CHUNKS, ranks=3)
    assert "--data.global_batch_tokens 192" in str(e.value)


def test_documents_begin_at_the_end_of_text_token():
    blocks = np.array([[5, 6, EOS, 7, 8, 9, EOS, EOS, 3]], dtype=np.uint16)
    batch = token_tensors(blocks, EOS)
    assert batch["tokens"].tolist() == [[5, 6, 0, 7, 8, 9, 0, 0]]
    assert batch["targets"].tolist() == [[6, 0, 7, 8, 9, 0, 0, 3]]
    assert batch["documents"].tolist() == [[0, 0, 1, 1, 1, 1, 2, 3]]
    assert batch["positions"].tolist() == [[0, 1, 0, 1, 2, 3, 0, 0]]
    assert batch["tokens"].dtype == torch.int64


def test_signals_to_every_process_do_not_end_workers(uninterrupted):
    loader = make_loader(STAGES, CHUNKS, workers=2)
    reader = iter(loader)
    first = list(islice(reader, 8))
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for number in (signal.SIGTERM, signal.SIGUSR1):
        for worker in workers:
            os.kill(worker.pid, number)
    more = list(islice(reader, 72))  # more than was read ahead
    assert all(worker.is_alive() for worker in workers)
    alone = islice(iter(make_loader(STAGES, CHUNKS)), 80)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(first + more, alone, strict=True))
    reader.close()
    assert not any(worker.is_alive() for worker in workers)


def test_signals_before_a_worker_can_ignore_them_do_not_end_it(monkeypatch):
    ignore = loader_module._ignore_signals

    def signalled(worker):
        for number in (signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        ignore(worker)

    monkeypatch.setattr(loader_module, "_ignore_signals", signalled)
    reader = iter(make_loader(STAGES, CHUNKS, workers=2))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
    batches = list(islice(reader, 8))
    alone = islice(iter(make_loader(STAGES, CHUNKS)), 8)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(batches, alone, strict=True))
    reader.close()


HUNG = """
import sys, time
from smol.data.loader import _Workers

class Hangs:
    def __getitem__(self, key):
        return key if key < 2 else time.sleep(600)

reader = iter(_Workers(Hangs(), batch_size=None, sampler=range(9), num_workers=2))
print(next(reader), next(reader))
sys.exit(143)
"""


def test_a_worker_that_hangs_does_not_keep_the_process_from_ending():
    command = [sys.executable, "-c", HUNG]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (143, "0 1\n", "")
