"""A global batch that grows in mid-run, from below a micro-batch to several of them."""

import pytest
import torch
from lightning import Callback
from tiny import make_data, make_module, make_stages, make_trainer

from callbacks import CheckpointRotation
from smol.runs import newest_checkpoint

STAGES = {
    "first": {"start_step": 0, "cats": 0.7, "dogs": 0.3, "global_batch_tokens": 64},
    "second": {"start_step": 4, "cats": 0.7, "dogs": 0.3, "global_batch_tokens": 128},
    "last": {"start_step": 6, "cats": 0.7, "dogs": 0.3, "global_batch_tokens": 512},
}
STEPS = 8


class Record(Callback):
    """Token ids by optimiser step, and how many micro-batches each took."""

    def __init__(self):
        self.steps, self.passes = [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch.micro == 0:
            self.steps.append([])
        self.steps[-1] += batch.tokens.tolist()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch.micro == batch.accumulation - 1:
            self.passes.append(batch.accumulation)
            assert trainer.global_step == len(self.passes) + self.first

    def on_train_start(self, trainer, module):
        self.first = trainer.global_step


def train(folder, sources, steps, resume=None, micro=256):
    record = Record()
    trainer = make_trainer(folder, steps, callbacks=[CheckpointRotation(every=1), record])
    module = make_module()
    data = make_data(sources, make_stages(sources, **STAGES), micro_batch_tokens=micro)
    trainer.fit(module, data, ckpt_path=resume)
    return module, record, data


@pytest.fixture(scope="module")
def uninterrupted(sources, tmp_path_factory):
    torch.manual_seed(0)
    return train(tmp_path_factory.mktemp("whole"), sources, STEPS)


def test_the_batch_grows_and_the_passes_follow(uninterrupted):
    _, record, data = uninterrupted
    assert [len(rows) * 32 for rows in record.steps] == [64] * 4 + [128] * 2 + [512] * 2
    assert record.passes == [1] * 6 + [2] * 2
    assert data.loader.position == 4 * 64 + 2 * 128 + 2 * 512
    history = data.state_dict()["segments"]
    assert [segment["global_batch"] for segment in history] == [64, 128, 512]


@pytest.mark.parametrize("stop", [4, 5])  # where the batch changes, and between two changes
def test_interrupted_equals_uninterrupted(uninterrupted, sources, tmp_path, stop):
    whole, expected, _ = uninterrupted
    _, first, _ = train(tmp_path / "parts", sources, stop)
    resume = newest_checkpoint(tmp_path / "parts")
    module, second, _ = train(tmp_path / "parts", sources, STEPS, resume)
    assert first.steps + second.steps == expected.steps
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, module.state_dict()[name])


def test_the_size_of_a_micro_batch_changes_nothing(uninterrupted, sources, tmp_path):
    whole, expected, _ = uninterrupted
    module, record, _ = train(tmp_path, sources, STEPS, micro=64)
    assert record.passes == [1] * 4 + [2] * 2 + [8] * 2
    assert record.steps == expected.steps
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(weight, module.state_dict()[name], rtol=1e-3, atol=1e-4)
