"""The benchmark of learning per second: its clock, its arithmetic, its ways and its peer."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from launch_parts import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import learning_speed
import nanochat_model
from learning_clock import Clock, Curve, LearningCurve
from learning_speed import SCALES, quarter_of, seconds_to, settings
from nanochat_peer import Job, train
from tiny import VOCAB, make_config, make_data, make_module, make_trainer

from smol.config import compose, dump_yaml, load_config
from smol.interpolation import interpolate


@pytest.fixture
def ticks(monkeypatch):
    """A clock that a test moves."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setitem(sys.modules["learning_clock"].TIMES, "wall", lambda: now.seconds)
    return now


CPU = torch.device("cpu")


def test_the_clock_stands_still_when_told(ticks):
    clock = Clock("wall", CPU)
    for running in (False, True, False, True):
        (clock.start if running else clock.stop)()
        ticks.seconds += 2
    assert clock.read() == 4
    clock.start()  # it runs already
    assert clock.read() == 4


@pytest.mark.parametrize(
    ("probe", "seconds", "tokens"), [(False, 10 + 30 + 7 + 7, 32), (True, 17, 20)]
)
def test_first_steps_are_not_timed(ticks, tmp_path, probe, seconds, tokens):
    """Steps of 50, 10, 30, 7 and 7 seconds, the third with another shape, and validation."""
    curve, read = Curve(tmp_path / "curve.json", "wall", CPU, probe), 0
    for step, (shape, size, lasts) in enumerate(
        [(1, 8, 50), (1, 8, 10), (2, 12, 30), (2, 12, 7), (2, 0, 7)], start=1
    ):
        curve.begin(shape)
        ticks.seconds += lasts
        read += size
        if size:
            curve.end("ab"[shape - 1], read)
        if step == 1:
            curve.clock.stop()
            ticks.seconds += 100
            curve.reached(step, 2.5)
    if probe:
        seconds += 7
    curve.write(parameters=3)
    found = json.loads(curve.file.read_text())
    assert found["seconds"] == seconds
    assert found["tokens"] == tokens
    assert found["step_seconds"] == ({"a": 10, "b": 7} if probe else {})
    assert found["rows"] == [{"step": 1, "tokens": 8, "seconds": 0, "bits_per_byte": 2.5}]
    assert found["parameters"] == 3


def test_the_callback_sees_steps_and_held_out_text(sources, tmp_path):
    file = tmp_path / "curve.json"
    trainer = make_trainer(
        tmp_path, 4, callbacks=[LearningCurve(str(file))], limit_val_batches=None,
        val_check_interval=2,
    )  # fmt: skip
    module = make_module()
    trainer.fit(module, make_data(sources, micro_batch_tokens=128))
    found = json.loads(file.read_text())
    assert [(row["step"], row["tokens"]) for row in found["rows"]] == [(2, 512), (4, 1024)]
    assert found["tokens"] == 3 * 256
    assert 0 < found["rows"][0]["seconds"] < found["rows"][1]["seconds"] == found["seconds"]
    assert found["parameters"] == sum(p.numel() for p in module.parameters())


def test_steps_fill_the_time():
    assert quarter_of({"first": 1.0, "second": 2.0, "last": 4.0}, 80) == 10
    assert quarter_of({"first": 1.0, "second": 2.0, "last": 4.0}, 1) == 1


def test_the_time_to_a_value():
    rows = [{"seconds": s, "bits_per_byte": b} for s, b in [(10, 3.0), (20, 2.0), (30, 1.5)]]
    assert [seconds_to(bits, rows) for bits in (3.5, 2.5, 1.5, 1.0)] == [10, 15, 30, None]


@pytest.mark.parametrize("size", SCALES, ids=str.upper)  # "gpu" is a mark that skips
def test_every_way_is_a_run_that_can_be_planned(size):
    scale = SCALES[size]
    for way in learning_speed.OURS:
        changes = settings(way, scale) | {"vars.quarter": 50}
        values = interpolate(compose([scale.config], changes))
        data = values["data"]["init_args"]
        stages = data["stages"]
        assert [stages[part]["start_step"] for part in learning_speed.PARTS] == [0, 100, 150]
        assert values["trainer"]["max_steps"] == 200
        assert values["model"]["init_args"]["schedule"]["init_args"]["total_steps"] == 200
        for stage in stages.values():
            assert stage["global_batch_tokens"] % stage["context_length"] == 0
            passes = min(data["micro_batch_tokens"], stage["global_batch_tokens"])
            assert stage["global_batch_tokens"] % passes == 0


def test_the_schedules_of_the_peer():
    steps = 1000
    factors = [nanochat_model.multiplier(step, steps) for step in range(steps)]
    assert factors[0] == 1 / 40
    assert factors[39] == factors[350] == 1
    assert factors[675] == pytest.approx((1 + 0.05) / 2)
    assert nanochat_model.multiplier(steps, steps) == pytest.approx(0.05)
    momenta = [nanochat_model.momentum(step, steps) for step in (0, 200, 1000)]
    assert momenta == pytest.approx([0.85, 0.91, 0.90])


def test_the_size_of_the_peer_is_that_of_d12():
    with torch.device("meta"):
        model = nanochat_model.Peer(32768, 12, 768, 128, 2048)
    assert model.windows == [512, 512, 512, 2048] * 3
    assert model.with_values == [1, 3, 5, 7, 9, 11]
    matrices = 12 * 12 * 768**2
    gates, scalars = 6 * 6 * 12, 2 * 12 + 1
    assert nanochat_model.horizon(32768, 12, 768, 128) == matrices + gates + 32768 * 768
    assert sum(p.numel() for p in model.parameters()) == (
        matrices + gates + scalars + (2 + 6) * 32768 * 768
    )


def test_the_peer_looks_only_back_and_no_further_than_its_window(monkeypatch):
    monkeypatch.setattr(nanochat_model, "WINDOW", 3)
    model = nanochat_model.Peer(64, 2, 32, 16, 16)
    model.initialize(torch.Generator().manual_seed(0))
    model.windows = [3, 3]  # the last layer would see all
    with torch.no_grad():
        model.square.normal_(0, 0.2)
        model.down.normal_(0, 0.2)
        model.head.normal_(0, 0.2)
    tokens, targets = torch.randint(64, (2, 1, 16)).unbind()
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 64
    differs = (model(tokens, targets) != model(changed, targets))[0].tolist()
    assert differs[:5] == [False] * 5  # the loss at 5 is that of what follows token 5
    assert differs[5]
    assert not any(differs[5 + 2 * 3 + 1 :])  # two layers of three tokens each


@pytest.mark.parametrize("shape", [(1, 12, 12), (2, 8, 24), (2, 24, 8)])
def test_the_direction_of_muon_is_orthogonal(shape):
    direction = nanochat_model.orthogonal(torch.randn(shape))
    values = torch.linalg.svdvals(direction)
    assert direction.norm(dim=(1, 2)).tolist() == pytest.approx(
        [math.sqrt(min(shape[1:]))] * shape[0]
    )
    assert (values - 1).abs().max() < 0.35


def test_the_peer_learns_on_the_same_batches(sources, tmp_path):
    config = make_config(sources, {}, {"cats": 0.7, "dogs": 0.3})
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    job = Job(
        [str(tmp_path / "config.yaml")], {}, 2, 32, 16, 12, 6, 0, str(tmp_path / "curve.json"),
        unscaled=True,
    )  # fmt: skip
    train(job)
    torch.set_flush_denormal(False)
    found = json.loads((tmp_path / "curve.json").read_text())
    assert [(row["step"], row["tokens"]) for row in found["rows"]] == [(6, 1536), (12, 3072)]
    first, last = (row["bits_per_byte"] for row in found["rows"])
    assert last < first < math.log2(VOCAB)


def test_text_that_is_missing_is_one_line(tmp_path):
    args = SimpleNamespace(data=None, documents=None, tokenizer=None, laptop=False)
    with pytest.raises(learning_speed.UserError, match="no text to train on; type --data FOLDER"):
        learning_speed.given_text(args, tmp_path)
    args.data = "data/text"
    with pytest.raises(learning_speed.UserError, match="--tokenizer is missing"):
        learning_speed.given_text(args, tmp_path)
    args = SimpleNamespace(data=None, documents=None, tokenizer=None, laptop=True)
    assert learning_speed.given_text(args, tmp_path) == {}


def test_the_laptop_runs_through_the_same_parts():
    large, small = (load_config([scale.config]) for scale in SCALES.values())
    assert large["data"]["init_args"]["stages"] == small["data"]["init_args"]["stages"]
    assert large["trainer"] | {"accelerator": "cpu"} == small["trainer"]
