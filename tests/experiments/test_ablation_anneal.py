"""Annealed studies: what they start from, what they read, how their learning rate goes down."""

from pathlib import Path

import pytest
from ablation_parts import write_baseline, write_study

from smol.checkpoints.manifest import commit, new_key
from smol.config import dump_yaml, load_config
from smol.errors import UserError
from smol.experiments.ablation import arms, load_study
from smol.experiments.ablation.arms import build_arms
from smol.optim import WSD

STEP, STEPS = 70, 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a run that is 70 steps old, in the second of its three stages."""
    folder = tmp_path_factory.mktemp("project")
    config = load_config([write_baseline(folder)])
    mixture = {name: {"path": f"data/{name}", "weight": 1} for name in ("cats", "dogs")}
    skewed = {"cats": {"path": "data/cats", "weight": 3}, "dogs": {**mixture["dogs"], "weight": 1}}
    config["data"]["init_args"]["stages"] = {
        "stage1": {"start_step": 0, "mixture": mixture},
        "stage2": {"start_step": 50, "mixture": skewed, "context_length": 64},
        "stage3": {"start_step": 90, "mixture": mixture},
    }
    run = folder / "runs" / "first"
    checkpoint = run / "checkpoints" / new_key(STEP)
    checkpoint.mkdir(parents=True)
    (checkpoint / "decoder.safetensors").write_bytes(b"weights")
    commit(checkpoint, STEP, {})
    (run / "config.source.yaml").write_text(dump_yaml(config))
    return folder


@pytest.fixture(autouse=True)
def root(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOL_ROOT", str(folder))


def built(folder: Path, **changed):
    settings = {"from": "first", "baseline": None, "budget": {"steps": STEPS}}
    return build_arms(load_study(write_study(folder, **{**settings, **changed})))


def shares(arm: arms.Arm) -> dict[str, float]:
    stage = arm.resolved["data"]["init_args"]["stages"]["anneal"]
    weights = {name: source["weight"] for name, source in stage["mixture"].items()}
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def test_the_candidate_gets_sixty_percent_beside_the_current_mixture(folder: Path) -> None:
    new = {"path": "data/birds", "weight": 1}
    control, dogs, birds = built(
        folder,
        variants={"dogs": {"candidate": {"dogs": 2}}, "birds": {"candidate": {"birds": new}}},
    )
    assert shares(control) == pytest.approx({"cats": 0.75, "dogs": 0.25})  # of stage2
    assert shares(dogs) == pytest.approx({"cats": 0.3, "dogs": 0.7})
    assert shares(birds) == pytest.approx({"cats": 0.3, "dogs": 0.1, "birds": 0.6})
    for arm in (control, dogs, birds):
        data = arm.resolved["data"]["init_args"]
        assert {name for name, stage in data["stages"].items() if stage} == {"anneal", "measured"}
        assert data["stages"]["anneal"]["context_length"] == 64
        assert data["stages"]["measured"]["mixture"].keys() == {"cats", "dogs", "birds"}
        assert Path(arm.resolved["init_from"]).parent == folder / "runs/first/checkpoints"
        assert arm.resolved["continues"] is None
        schedule = WSD(**arm.resolved["model"]["init_args"]["schedule"]["init_args"])
        assert [schedule(step) for step in (2, STEPS)] == [1.0, 0.0]
        assert schedule(21) == pytest.approx(19 / 38)
    assert len({arm.seeded(seed)[1] for arm in (control, dogs) for seed in (1, 2)}) == 4


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"from": "frist"}, "frist is neither a decoder folder nor a run with a checkpoint"),
        ({"variants": {"x": {"candidate": {"birds": 1}}}}, "unknown source 'birds'"),
        ({"variants": {"x": {"candidate": {"cats": 3, "dogs": 1}}}}, "changes nothing"),
        ({"budget": {"tokens": 9}}, "of an annealed study expects {steps: NUMBER}"),
        ({"budget": {"steps": 1}}, "too few to decay in"),
    ],
)
def test_mistakes_are_one_line(folder: Path, changed: dict, told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        built(folder, **({"variants": {"v": {"candidate": {"dogs": 1}}}} | changed))
    assert "\n" not in str(error.value)
