"""Contexts that grow in mid-run: data, base and restart."""

import pytest
import torch
from lightning import Callback
from tiny import make_data, make_module, make_stages, make_trainer

from callbacks import CheckpointRotation
from callbacks.context_length import ContextLengthSchedule
from smol.errors import UserError
from smol.runs import newest_checkpoint

THETAS = {32: 1e4, 64: 5e4, 128: 2e6}
STAGES = {
    "one": {"start_step": 0, "cats": 0.7, "dogs": 0.3},
    "two": {"start_step": 5, "cats": 0.2, "dogs": 0.8},
}


class Record(Callback):
    """Rows, stage and base of each step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        rows = (batch.tokens.tolist(), batch.stage, module.decoder.rope.theta)
        self.steps.append(rows)


def train(folder, sources, steps, schedule, stages=None, resume=None):
    record = Record()
    callbacks = [*([schedule] if schedule else []), CheckpointRotation(every=1), record]
    trainer = make_trainer(folder, steps, callbacks=callbacks)
    module = make_module()
    data = make_data(sources, make_stages(sources, **(stages or STAGES)))
    trainer.fit(module, data, ckpt_path=resume)
    return module, record.steps, trainer


def make_schedule(unit="steps"):
    scale = 1 if unit == "steps" else 256
    return ContextLengthSchedule({0: 32, 3 * scale: 64, 7 * scale: 128}, unit=unit, thetas=THETAS)


def test_the_data_is_that_of_stages_that_say_so(sources, tmp_path):
    stages = {
        "one": STAGES["one"],
        "one@3": STAGES["one"] | {"start_step": 3, "context_length": 64},
        "two": STAGES["two"] | {"context_length": 64},
        "two@7": STAGES["two"] | {"start_step": 7, "context_length": 128},
    }
    _, expected, _ = train(tmp_path / "a", sources, 10, None, stages)
    _, seen, _ = train(tmp_path / "b", sources, 10, make_schedule())
    assert [(rows, stage) for rows, stage, _ in seen] == [step[:2] for step in expected]


def test_rows_shrink_as_the_context_grows_and_the_base_follows(sources, tmp_path):
    _, seen, _ = train(tmp_path, sources, 10, make_schedule())
    shapes = [(len(rows), len(rows[0])) for rows, _, _ in seen]
    assert shapes == [(8, 32)] * 3 + [(4, 64)] * 4 + [(2, 128)] * 3
    assert [theta for _, _, theta in seen] == [THETAS[time] for _, time in shapes]


@pytest.mark.parametrize("stop", [2, 3, 6, 8])
def test_interrupted_equals_uninterrupted(sources, tmp_path, stop):
    whole, expected, _ = train(tmp_path / "whole", sources, 10, make_schedule())
    _, first, _ = train(tmp_path / "parts", sources, stop, make_schedule())
    resume = newest_checkpoint(tmp_path / "parts")
    module, second, _ = train(tmp_path / "parts", sources, 10, make_schedule(), resume=resume)
    assert first + second == expected
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, module.state_dict()[name])


def test_tokens_are_another_way_to_say_it(sources, tmp_path):
    _, expected, _ = train(tmp_path / "a", sources, 10, make_schedule(), {"one": STAGES["one"]})
    by_tokens = make_schedule("tokens")
    _, seen, _ = train(tmp_path / "b", sources, 10, by_tokens, {"one": STAGES["one"]})
    # The names of the parts tell their beginnings.
    assert [(r, t) for r, _, t in seen] == [(r, t) for r, _, t in expected]


def test_a_checkpoint_is_validated_with_the_base_of_its_context(sources, tmp_path):
    train(tmp_path, sources, 8, make_schedule())
    trainer = make_trainer(tmp_path, 8, callbacks=[make_schedule()], limit_val_batches=1)
    module = make_module()
    trainer.validate(module, make_data(sources), ckpt_path=newest_checkpoint(tmp_path))
    assert module.decoder.rope.theta == THETAS[128]


def test_what_cannot_be_is_one_line(sources, tmp_path):
    def message(schedule, stages=None):
        with pytest.raises(UserError) as error:
            train(tmp_path, sources, 1, schedule, stages)
        return str(error.value)

    assert "contexts begin at 3" in message(ContextLengthSchedule({3: 64}))
    assert "stage 'two' does not" in message(ContextLengthSchedule({0: 32, 512: 64}, "tokens"))
    own = {"one": STAGES["one"] | {"context_length": 32}}
    assert "leave one of them out" in message(ContextLengthSchedule({0: 64}), own)
    with pytest.raises(UserError, match="thetas has no entry for context 64"):
        ContextLengthSchedule({0: 32, 3: 64}, thetas={32: 1e4})
    trainer = make_trainer(tmp_path, 1, callbacks=[ContextLengthSchedule({0: 32})])
    with pytest.raises(UserError, match="needs data with schedule_contexts"):
        trainer.fit(make_module(), [0])
