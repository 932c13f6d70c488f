"""Plans of time, checkpoints and data against published figures and plain arithmetic."""

import pytest

from smol.errors import UserError
from smol.model import DecoderConfig
from smol.model.peak_flops import PEAK_FLOPS
from smol.planning.answers import DEVICES, MODELS, Answers, recipe
from smol.planning.checklist import decide
from smol.planning.compute import TRIALS_SHARE, checkpoint_traffic, training_compute
from smol.planning.spreading import options

H100 = PEAK_FLOPS[DEVICES["h100"][0]]
PRETRAIN = {"goal": "open_source", "prompting": "not_enough", "fine_tuning": "not_enough"}
SMOLLM3 = PRETRAIN | {"model": "3b", "device": "h100", "devices": 384}
CONFIG = recipe(Answers(model="3b")).config


def plan(**answers) -> dict[str, str]:
    return {figure.name: figure.value for figure in decide(Answers(**answers)).figures}


def test_smollm3_as_published():
    """13.5k to 14k tokens a second on each of 384 H100: 24 days, some 30 % of the peak."""
    slow, fast = (
        training_compute(CONFIG, 11.136e12, 4096, 384, mfu * H100) for mfu in (0.30, 0.3125)
    )
    assert slow.tokens_per_second == pytest.approx(13_500, rel=0.01)
    assert fast.tokens_per_second == pytest.approx(14_000, rel=0.01)
    assert fast.days == pytest.approx(24, rel=0.01)
    # Published: 276,480 GPU-hours with all interruptions, 437,760 with ablations and debugging.
    assert 276_480 * 0.8 < slow.device_hours < 276_480
    with_trials = 276_480 * (1 + TRIALS_SHARE)
    assert with_trials == pytest.approx(437_760)
    # Published: 6 N D, with N = 3e9 and D = 11e12; attention is some 20 % on top.
    assert slow.flops == pytest.approx(1.98e23 * 1.2, rel=0.05)


def test_smollm3_is_spread_as_it_was():
    """The published batch needs pairs of GPUs: 192 groups of three sequences of 4096."""
    decision = decide(Answers(**SMOLLM3))
    best = decision.options[0]
    assert (best.strategy, best.batch, best.work.tokens) == ("tensor_parallel", 2_359_296, 12_288)
    assert best.fits
    assert best.work.accumulation == 1
    assert decision.configs[0] == "configs/smollm3_3b/stage1.yaml"
    assert not decision.warnings


@pytest.mark.parametrize("model", MODELS)
def test_recipe_says_what_its_files_say(model):
    made = recipe(Answers(model=model))
    expected = {
        "nano": (4096, 4096, 256, 550),
        "135m": (4096, 4096, 256, 550),
        "3b": (2_359_296, 12_288, 4096, 4_720_000),
    }[model]
    batch, micro, context, steps = expected
    assert (made.batch, made.micro_batch_tokens, made.context) == (batch, micro, context)
    assert made.tokens == batch * steps


def test_time_is_operations_over_speed():
    config = DecoderConfig(100, 8, 1, 2, 1, 16)
    matrices = 8 * (8 + 4 + 4 + 8 + 3 * 16) + 100 * 8
    per_token = 6 * matrices + 12 * 1 * 2 * 4 * 32
    time = training_compute(config, tokens=1e6, context=32, devices=4, speed=1e6)
    assert time.flops_per_token == per_token
    assert time.device_hours == pytest.approx(per_token * 1e6 / 1e6 / 3600)
    assert time.days * 24 * 4 == pytest.approx(time.device_hours)


def test_checkpoints():
    config = DecoderConfig(100, 8, 1, 2, 1, 16)
    size = 12 * (100 * 8 + 8 * (8 + 4 + 4 + 8 + 48) + 16 + 8)
    made = checkpoint_traffic(config, 2, 4, store_bandwidth=size, disk_bandwidth=size, writers=2)
    assert made.bytes == size
    assert made.count == 12
    assert made.upload_seconds == 1
    assert made.bandwidth_share == pytest.approx(1 / 14_400)
    assert made.stall_share == pytest.approx(0.5 / 14_400.5)


@pytest.mark.parametrize(
    ("answers", "verdict"),
    [
        ({}, "Train."),
        ({"goal": "product"}, "Do not train"),
        ({"goal": "product", "prompting": "enough"}, "Do not train"),
        ({"goal": "product", "prompting": "not_enough"}, "Fine-tune"),
        ({"goal": "product", "prompting": "not_enough", "fine_tuning": "enough"}, "Fine-tune"),
        (PRETRAIN, "Pretrain."),
    ],
)
def test_verdict(answers, verdict):
    decision = decide(Answers(**answers))
    assert decision.verdict.startswith(verdict)
    assert decision.commands


@pytest.mark.parametrize(
    ("answers", "dense"),
    [
        ({"deployment": "edge", "experience": "expert"}, True),
        ({"deployment": "server", "experience": "first"}, True),
        ({"deployment": "server", "experience": "dense", "weeks": 8}, True),
        ({"deployment": "server", "experience": "dense", "weeks": 30}, False),
        ({"deployment": "server", "experience": "expert", "weeks": 8}, False),
    ],
)
def test_architecture(answers, dense):
    decision = decide(Answers(**PRETRAIN, **answers))
    assert decision.reasons[1].startswith("What: a dense" if dense else "What: a mixture")
    assert any("dense decoders only" in warning for warning in decision.warnings) != dense


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        ({"devices": 8}, "deadline is impossible"),
        ({"unique_tokens": 2e12}, "read 5.57 times"),
        ({"device": "rtx4090", "devices": 1}, "does not fit"),
        ({"store_bandwidth": 1e6}, "store cannot keep up"),
        ({"team": 1}, "One person is few"),
        ({"tokens": 1e12}, "configs/smollm3_3b/stage3.yaml"),
        ({"model": "135m", "tokens": 1e11}, "made for minutes"),
    ],
)
def test_warnings(change, warning):
    assert not decide(Answers(**SMOLLM3)).warnings
    assert any(warning in line for line in decide(Answers(**SMOLLM3 | change)).warnings)


def test_four_epochs_are_no_reason_to_warn():
    assert not decide(Answers(**SMOLLM3, unique_tokens=2.784e12)).warnings


def test_price_is_that_of_the_trials_too():
    hours = 11.136e12 * 22.0736e9 / (0.3 * 989.4e12) / 3600
    cost = plan(**SMOLLM3, price=2)["cost"]
    assert float(cost.replace(",", "")) == pytest.approx(2 * hours * 437_760 / 276_480, rel=1e-3)
    learning = plan(goal="learn", model="3b", device="h100", devices=384, price=2)["cost"]
    assert float(learning.replace(",", "")) == pytest.approx(2 * hours, rel=1e-3)


def test_batch_is_kept_where_it_divides():
    kept = options(made := Answers(model="3b", device="h100", devices=8), recipe(made))
    assert {option.batch for option in kept} == {2_359_296}
    for option in kept:
        replicas = 8 // option.sharding.tensor_parallel_size
        assert option.work.tokens * replicas * option.work.accumulation == option.batch
    odd = options(made := Answers(model="3b", device="h100", devices=7), recipe(made))
    assert all(option.batch % (7 * option.work.tokens) == 0 for option in odd)
    assert all(abs(option.batch / 2_359_296 - 1) < 0.05 for option in odd)


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({"device": "h10"}, "Did you mean 'h100'?"),
        ({"model": "7b"}, "'7b' is unknown"),
        ({"model": "configs/callbacks/none.yaml"}, "describes no model"),
        ({"model": "missing.yaml"}, "not found"),
        ({"mfu": 30}, "mfu is 30"),
        ({"tokens": 0.0}, "tokens is 0"),
        ({"device": "h100", "devices": 12}, "whole nodes"),
    ],
)
def test_mistakes(answers, words):
    with pytest.raises(UserError, match=r"^[^\n]+$") as error:
        decide(Answers(**answers))
    assert words in str(error.value)
