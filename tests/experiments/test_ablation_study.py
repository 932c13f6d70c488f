"""Studies: what their files may say, and what a variant may change."""

import json
from pathlib import Path

import pytest
from ablation_parts import write_baseline, write_study

from smol.data.card import Card, write_card
from smol.errors import UserError
from smol.experiments.ablation import arms, load_study
from smol.experiments.ablation.arms import build_arms
from smol.experiments.ablation.mixtures import repetition, repetition_warnings

QK = {"model.decoder.qk_norm": True}
COSINE = {"class_path": "smol.optim.Cosine", "init_args": {"warmup_steps": 2, "total_steps": 40}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studies")
    write_baseline(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def parse_once():
    """Parsing takes a second; the baseline is the same in all tests."""
    known, parse = {}, arms.parse

    def cached(files, flags):
        key = json.dumps([list(files), flags])
        if key not in known:
            known[key] = parse(files, flags)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arms, "parse", cached)
        yield


def built(folder: Path, **changed):
    return build_arms(load_study(write_study(folder, **changed)))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"sedes": [1]}, "unknown key 'sedes', .* Did you mean 'seeds'"),
        ({"metrics": None}, "'metrics' is missing"),
        ({"seeds": [1, 1]}, "'seeds' names one twice"),
        ({"seeds": "many"}, "'seeds' expects a number of seeds or a list"),
        ({"budget": {"steps": 4, "tokens": 4}}, "'budget' expects {steps: NUMBER} or"),
        ({"metrics": {"train/loss": "less"}}, "expects which is better, lower or higher"),
        ({"variants": {"a-b": QK}}, "named 'a-b', expected letters"),
        ({"variants": {"qk": True}}, "variant 'qk' expects what it changes"),
        ({"variants": {"qk": {"trainer.max_steps": 9}}}, "which the study does: set budget"),
        ({"overrides": {"data.init_args.seed": 9}}, "which the study does: list it under seeds"),
        ({"from": "stage1"}, "expects the sources it tries"),
        ({"tolerance": 5}, "a share between 0 and 1"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(folder: Path, changed: dict, told: str) -> None:
    with pytest.raises(UserError, match=rf"^study.yaml: .*{told}") as error:
        load_study(write_study(folder, **changed))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {**QK, "model.optimizer.learning_rate": 0.02},
            "changes 2 things, 'model.init_args.decoder.qk_norm' and "
            "'model.init_args.optimizer.learning_rate'",
        ),
        (
            {"model.decoder": {"qk_norm": True, "nope": 2}},
            "changes 2 things, .*nope' and .*qk_norm",
        ),
        ({"schedule": COSINE, **QK}, "changes 2 things, .*qk_norm' and 'schedule'"),
        ({"model.decoder.qk_norm": False}, "changes nothing: .* the baseline says the same"),
        ({"callbacks.absent": None}, "changes nothing"),
        ({"vars.idle": 2}, "no file reads 'vars.idle'"),
        ({"model.decoder.qk_nrom": True}, "variant 'one': .*'qk_nrom'. Did you mean 'qk_norm'"),
        ({"trainer": {"max_steps": 9}}, "sets 'trainer.max_steps', which the study does"),
        (
            {"mixture": {"cats": 1, "birds": 1}},
            "unknown source 'birds', expected one of cats, dogs",
        ),
        ({"mixture": {"cats": -1}}, "the weight of 'cats' is -1"),
    ],
)
def test_a_variant_changes_one_thing(folder: Path, change: dict, told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        built(folder, variants={"one": change})
    assert "\n" not in str(error.value)


def test_one_thing_may_have_several_keys(folder: Path) -> None:
    group = {"pattern": "embed", "weight_decay": 0.5}
    base, *variants = built(
        folder,
        variants={
            "schedule": {"schedule": COSINE},
            "group": {"model.optimizer.groups": {"rare": group}},
            "default": {"model.optimizer.groups.embeddings": None},
            "variable": {"vars.decay": 0.5},
            "callback": {"callbacks.progress": {"class_path": "callbacks.ProgressLine"}},
        },
    )
    assert base.changes == {}
    changed = {arm.name: set(arm.changes) for arm in variants}
    assert changed["default"] == {"model.init_args.optimizer.groups.embeddings"}
    assert changed["variable"] == {"model.init_args.optimizer.weight_decay"}
    assert len(changed["schedule"]) > 2
    assert variants[0].overlay == {"model": {"init_args": {"schedule": COSINE}}}


@pytest.mark.parametrize("name", ["held_out/bits_per_bite", "loss", "train/los"])
def test_an_unknown_metric_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"unknown metric '{name}', expected .* Did you mean"):
        built(folder, metrics={name: "lower"})


def test_a_study_needs_the_log_that_it_reads(folder: Path) -> None:
    with pytest.raises(UserError, match="keeps no metrics.csv"):
        built(folder, overrides={"trainer.logger": False})


def test_the_budget_is_one_of_tokens_where_batches_differ(folder: Path) -> None:
    base, large = built(
        folder,
        budget={"tokens": 10_000},
        variants={"large": {"data.global_batch_tokens": 512}},
    )
    assert (base.steps, large.steps) == (40, 20)  # of 256 and 512 tokens
    assert base.tokens == large.tokens == 10_240


def test_a_run_depends_on_its_seed_and_on_nothing_that_only_names_it(folder: Path) -> None:
    base, variant = built(folder)
    digests = {arm.seeded(seed)[1] for arm in (base, variant) for seed in (1, 2)}
    assert len(digests) == 4
    source, digest = base.seeded(1)
    assert (source["seed_everything"], source["data"]["init_args"]["seed"]) == (1, 1)
    assert source["model"]["init_args"]["init_seed"] == 1
    again, _ = built(folder, variants={"other": {"model.decoder.nope": 2}})
    assert again.seeded(1)[1] == digest  # shared by studies


def test_what_one_mixture_leaves_out_is_measured_all_the_same(folder: Path) -> None:
    base, one = built(folder, variants={"one": {"mixture": {"cats": 1}}})
    stages = one.resolved["data"]["init_args"]["stages"]
    assert {k for k, s in stages["stage1"]["mixture"].items() if s} == {"cats"}
    for arm in (base, one):
        later = arm.resolved["data"]["init_args"]["stages"]["measured"]
        assert set(later["mixture"]) == {"cats", "dogs"}
        assert later["start_step"] > arm.steps


def test_repetition_is_counted_beforehand(folder: Path) -> None:
    for name, tokens in {"cats": 1024, "dogs": 10**6}.items():
        card = Card(
            name, {}, {"train": tokens, "held_out": 0}, {}, {}, "uint16", {}, {},
            {"train": [], "held_out": []}, "",
        )  # fmt: skip
        (folder / name).mkdir()
        write_card(folder / name, card)
    base, _ = built(
        folder,
        overrides={
            "data.stages.stage1.mixture": {
                "cats": {"path": str(folder / "cats"), "weight": 3},
                "dogs": {"path": str(folder / "dogs"), "weight": 1},
            }
        },
    )
    tokens = 40 * 256
    assert repetition(base.resolved) == {
        "cats": (tokens * 3 // 4, tokens * 0.75 / 1024),
        "dogs": (tokens // 4, tokens * 0.25 / 10**6),
    }
    (line,) = repetition_warnings("baseline", base.resolved)
    assert line.startswith("baseline will read 'cats' 7.5 times (7,680 tokens)")


def test_studies_are_read_by_name_of_their_baseline_beside_them(folder: Path) -> None:
    study = load_study(write_study(folder, seeds=2, overrides={"vars.decay": 0.2}))
    assert study.baseline == (str(folder / "baseline.yaml"),)
    assert study.seeds == (1, 2)
    assert study.overrides == {"vars.decay": 0.2}
    with pytest.raises(UserError, match="cannot be read.* Did you mean 'study.yaml'"):
        load_study(folder / "stdy.yaml")


SHIPPED = Path(__file__).resolve().parents[2] / "configs" / "ablations"
STUDIES = sorted(file.stem for file in SHIPPED.glob("*.yaml") if file.stem != "baseline")


@pytest.mark.parametrize("name", STUDIES)
def test_the_shipped_studies_can_be_run(name: str) -> None:
    study = load_study(SHIPPED / f"{name}.yaml")
    assert len(study.seeds) == 3
    if study.start is None:  # else it needs a run
        base, *variants = build_arms(study)
        assert [arm.name for arm in variants] == list(study.variants)
        assert all(arm.tokens == base.tokens for arm in variants)
