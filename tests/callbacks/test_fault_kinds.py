"""Each kind of fault does what it says, on a module of another's and on a decoder of ours."""

import errno
import json
import resource
import time
from itertools import pairwise

import pytest
import torch
from fault_parts import (
    MICROS,
    Fault,
    Plain,
    bad,
    fit,
    train,  # noqa: F401
)
from lightning import Callback

from callbacks import CheckpointRotation, Events
from callbacks.parts.fault_hooks import on_output
from smol.data.batch import IGNORE
from smol.errors import UserError

LAST = MICROS - 1


# -- one micro-batch -------------------------------------------------------------------------------


@pytest.mark.parametrize(("micro", "struck"), [(None, LAST), (0, 0), (1, 1)])
@pytest.mark.parametrize("kind", ["nan_loss", "inf_loss"])
def test_a_loss(train, kind, micro, struck):
    witness, module = train(Fault(kind, 2, micro=micro), steps=3)
    assert witness.losses_not_finite() == [(2, struck)]
    expected = "inf" if kind == "inf_loss" else "nan"
    assert str(witness.losses[2, struck]) == expected
    assert witness.gradients[1] == 0
    assert witness.gradients[2] == sum(p.numel() for p in module.parameters())


def test_an_activation(train):
    witness, module = train(Fault("nan_activation", 2, micro=0), steps=3)
    assert witness.losses_not_finite() == [(2, 0)]
    assert witness.gradients[2] > 1
    assert not [m for m in module.modules() if m._forward_hooks]


def test_an_activation_of_a_chosen_module(tmp_path):
    outputs = {}

    class Listen(Callback):
        def on_train_start(self, trainer, module):
            for name, layer in module.layers.named_children():
                layer.register_forward_hook(lambda m, i, o, n=name: outputs.setdefault(n, o))

    fit(tmp_path, Fault("nan_activation", 0, target=r"layers\.1"), steps=1, callbacks=[Listen()],
        accumulate_grad_batches=1)  # fmt: skip
    # The hook of a listener that came before the fault's sees what went in to it.
    assert bad([outputs["0"]]) == bad([outputs["1"]]) == 0
    assert bad([outputs["2"]]) == 4  # what one of 16 inputs makes of a row's 4 outputs


def test_a_spike_of_the_loss_is_finite_and_far_above(train):
    expected, _ = train(folder="other")
    witness, _ = train(Fault("loss_spike", 2))
    usual, spike = expected.losses[2, LAST], witness.losses[2, LAST]
    assert 3 * usual < spike < float("inf")
    assert witness.losses[2, 0] == expected.losses[2, 0]
    assert witness.gradients[2] == 0


def test_an_explosion_of_gradients_leaves_the_loss_alone(train):
    expected, _ = train(folder="other", steps=3)
    witness, _ = train(*(Fault("gradient_explosion", 2, micro=m) for m in range(MICROS)), steps=3)
    assert witness.losses == expected.losses
    assert witness.gradients[2] == 0
    assert witness.largest[1] == expected.largest[1]
    assert witness.largest[2] == pytest.approx(1e6 * expected.largest[2], rel=1e-3)


class Given(Callback):
    """Keeps what the last ``training_step`` was given, and the batch it was made of."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.given, self.batch = module._batch, batch


def test_tokens_of_a_corrupt_batch_are_random_and_nothing_else(sources, tmp_path):
    def mask(trainer, module, batch, batch_idx):
        batch.exact = False
        batch.targets[:, 3:9] = IGNORE

    given = Given()
    given.on_train_batch_start = mask
    fault = Fault("corrupt_batch", 2)
    witness, _ = fit(tmp_path, fault, sources=sources, steps=3, callbacks=[given])
    assert witness.losses_not_finite() == []
    for name in ("tokens", "targets"):
        before, after = getattr(given.batch, name), getattr(given.given, name)
        assert (before != after).float().mean() > 0.7
        assert torch.equal(before == IGNORE, after == IGNORE)
        assert 0 <= after[after != IGNORE].min() <= after.max() <= before.max()
    for name in ("documents", "positions", "sources"):
        assert getattr(given.batch, name) is getattr(given.given, name)


def test_a_corrupt_batch_of_any_tensors(tmp_path):
    fault = Fault("corrupt_batch", 1, micro=0)
    _, module = fit(tmp_path, fault, steps=8)  # two epochs of eight batches
    first = module.batches[:8]
    for number, (again, once) in enumerate(zip(module.batches[8:], first, strict=True)):
        assert torch.equal(again[0], once[0]) == (number != 2)
    inputs, labels = first[2]
    assert inputs.std() > 5
    assert set(labels.tolist()) <= {0, 1, 2, 3}


# -- one element -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nan_gradient", "inf_gradient", "nan_gradient_before_reduce"])
def test_one_element_of_one_gradient(train, kind):
    witness, module = train(Fault(kind, 2), steps=3)
    assert list(witness.gradients.values()) == [0, 0, 1]
    first, _ = next(module.named_parameters())
    assert witness.owners[2] == [first]
    assert witness.losses_not_finite() == []
    assert not [p for p in module.parameters() if p._backward_hooks]


def test_a_gradient_of_a_chosen_parameter(train):
    _, module = train(folder="other", steps=1)
    *_, name = (name for name, _ in module.named_parameters())
    witness, _ = train(Fault("nan_gradient", 0, target=name.split(".")[-2]), steps=1)
    assert name.split(".")[-2] in witness.owners[0][0]


def test_one_element_of_one_weight_between_two_steps(train):
    witness, _ = train(Fault("nan_weight", 2), steps=3)
    assert list(witness.weights.values()) == [0, 0, 1]
    assert witness.losses_not_finite()[0] == (2, 0)
    assert witness.gradients[1] == 0


def test_one_element_of_one_moment(train):
    witness, module = train(Fault("nan_moment", 2), steps=3)
    assert list(witness.moments.values()) == [0, 0, 1]
    assert witness.gradients[2] == witness.weights[2] == 0
    assert bad(module.parameters()) == 1


def test_a_weight_grows_step_by_step(tmp_path):
    class Still(Plain):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    torch.manual_seed(0)
    before = [p.detach().clone() for p in Plain().parameters()]
    fault = Fault("scaled_weight", 1, times=3, value=1.25, target=r"2\.weight")
    torch.manual_seed(0)
    _, module = fit(tmp_path, fault, steps=6, module=Still())
    for index, (old, new) in enumerate(zip(before, module.parameters(), strict=True)):
        torch.testing.assert_close(new, old * (1.25**3 if index == 2 else 1))


# -- the machine -----------------------------------------------------------------------------------


def test_a_slow_step(tmp_path):
    class Clock(Callback):
        def on_train_batch_end(self, *_):
            ticks.append(time.perf_counter())

    ticks = []
    fault = Fault("slow_step", 3, seconds=0.4)
    fit(tmp_path, fault, steps=6, callbacks=[Clock()], accumulate_grad_batches=1)
    seconds = [b - a for a, b in pairwise(ticks)]
    assert max(seconds) == seconds[2] > 0.4


class Write(Callback):
    """Writes files all the time; one is open all the time."""

    def __init__(self, folder):
        self.folder, self.failures = folder, {}
        self.file = open(folder / "open", "wb", buffering=0)  # noqa: SIM115

    def on_train_batch_start(self, trainer, *_):
        for name in ("open", "new"):
            try:
                if name == "open":
                    self.file.write(b"more")
                else:
                    (self.folder / "new").write_text("all")
            except OSError as error:
                self.failures.setdefault((trainer.global_step, name), []).append(error.errno)

    on_train_batch_end = on_train_batch_start


def test_a_full_disk_is_full_for_one_step(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    write = Write(tmp_path)
    fit(tmp_path, Fault("full_disk", 2), steps=5, callbacks=[write])
    write.file.close()
    expected = {(2, name): [errno.EFBIG] * (2 * MICROS - 1) for name in ("open", "new")}
    # After its last micro-batch the step counts as done, and the disk is full until the next.
    expected |= {(3, name): [errno.EFBIG] for name in ("open", "new")}
    assert write.failures == expected
    assert (tmp_path / "open").stat().st_size == 4 * (5 * MICROS * 2 - 2 * MICROS)
    assert (tmp_path / "new").read_text() == "all"
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == limit


def test_a_checkpoint_does_not_fit_on_a_full_disk_and_the_run_goes_on_later(sources, tmp_path):
    def callbacks():
        return [CheckpointRotation(every=2), Events()]

    fit(tmp_path, Fault("full_disk", 4), sources=sources, steps=5, callbacks=callbacks())
    assert "File too large" in (tmp_path / "events.jsonl").read_text()  # full no more
    names = sorted(path.name[:13] for path in (tmp_path / "checkpoints").glob("step-*"))
    assert names == ["step-00000002", "step-00000005"]


def test_a_lost_device(tmp_path):
    with pytest.raises(RuntimeError, match="CUDA error: unspecified launch failure") as caught:
        fit(tmp_path, Fault("lost_device", 2), callbacks=[Events()])
    assert caught.type is getattr(torch, "AcceleratorError", RuntimeError)
    *_, fault, end = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert (fault["kind"], fault["step"], end["kind"]) == ("fault", 2, "exception")


class Compile(Callback):
    def on_train_start(self, trainer, module):
        self.layers = list(module.decoder.model.layers)
        for layer in self.layers:
            layer.compile(backend="eager")
        self.calls = [layer._compiled_call_impl for layer in self.layers]


def test_compiled_code_is_struck_too(sources, tmp_path):
    """Compiled code sees no hook that came after it."""
    compiled, fault = Compile(), Fault("nan_activation", 2, target=r"layers\.0\.mlp$")
    witness, _ = fit(tmp_path, fault, sources=sources, steps=3, callbacks=[compiled])
    assert witness.losses_not_finite() == [(2, LAST)]
    assert [layer._compiled_call_impl for layer in compiled.layers] == compiled.calls


def test_only_the_first_call_of_a_module_is_struck():
    module = Plain()
    inputs = torch.randn(2, 8)
    expected = module.layers(inputs)
    with on_output(module, "layers.0", lambda output: output * torch.nan):
        outputs = [module.layers(inputs) for _ in range(2)]
    assert bad(outputs[:1]) == 8
    for output in (outputs[1], module.layers(inputs)):
        assert torch.equal(output, expected)


class Odd(Plain):
    """Has a parameter that is not used, and an optimiser that keeps nothing."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(3))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nan_gradient", "fault nan_gradient finds nothing to strike in this process and step"),
        ("nan_gradient_before_reduce", "the fault in 'unused' did not strike: it got no gradient"),
        ("nan_moment", "fault nan_moment finds nothing to strike"),
    ],
)
def test_a_fault_that_cannot_strike_is_told(tmp_path, kind, message):
    with pytest.raises(UserError, match=message):
        fit(tmp_path, Fault(kind, 1, target="unused"), module=Odd())
