"""Long context from the command line: two stages at laptop scale, and YaRN on any checkpoint."""

from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from tiny import make_config

from smol.cli import main
from smol.config import load_config
from smol.data import corpora
from smol.lightning_cli import SmolCLI
from smol.model import RopeConfig
from smol.model.io import read_description
from smol.optim import Cosine
from smol.paths import project_root
from smol.runs import newest_checkpoint

CONFIGS = project_root() / "configs"
PHASES = ("stage3", "long_context_32k", "long_context_64k")


def built(name: str, folder: Path) -> SmolCLI:
    words = ["fit", "--config", str(CONFIGS / f"{name}.yaml"), "--runs_dir", str(folder)]
    return main(words, run=False)


@pytest.fixture(scope="module")
def phases(tmp_path_factory: pytest.TempPathFactory) -> list[SmolCLI]:
    folder = tmp_path_factory.mktemp("runs")
    return [built(name, folder) for name in PHASES]


def published(name: str) -> dict:
    return load_config([CONFIGS / "smollm3_3b" / f"{name}.yaml"])


def test_context_and_theta_grow_as_published(phases):
    base, *longer = [cli.datamodule.context_length for cli in phases]
    assert longer == [8 * base, 16 * base]
    for cli, name in zip(phases[1:], PHASES[1:], strict=True):
        recipe = published(name)["model"]["init_args"]
        assert cli.model.rope_config == RopeConfig(theta=recipe["rope"]["theta"])
        share = recipe["optimizer"]["learning_rate"] / 2.0e-4  # of the published stages'
        rates = [run.model.optimizer_config.learning_rate for run in (cli, phases[0])]
        assert rates[0] / rates[1] == pytest.approx(share)
        data = cli.datamodule
        (stage,) = data.stages.values()
        assert stage.context_length is None, "validation would run at another context"
        assert data.global_batch_tokens % data.context_length == 0


def test_optimiser_and_schedule_begin_anew_in_proportion(phases):
    for cli, (before, name) in zip(phases[1:], pairwise(PHASES), strict=True):
        assert (cli.settings.init_from, cli.settings.continues) == (before, None)
        schedule, recipe = cli.model.schedule, published(name)
        assert isinstance(schedule, Cosine)
        assert (schedule.total_steps, schedule.final) == (cli.trainer.max_steps, 0.0)
        warmup = recipe["model"]["init_args"]["schedule"]["init_args"]["warmup_steps"]
        share = warmup / recipe["trainer"]["max_steps"]
        assert schedule.warmup_steps / schedule.total_steps == pytest.approx(share, abs=0.005)


def test_documents_are_longer_than_the_context_before(phases):
    for before, cli in pairwise(phases):
        (stage,) = cli.datamodule.stages.values()
        shares = list(before.datamodule.stages.values())[-1].sources
        old = before.datamodule.context_length
        assert {Path(s.path).name: s.weight for s in stage.sources.values()} == {
            Path(s.path).name: s.weight for s in shares.values()
        }
        assert {Path(s.path).parts[-2] for s in stage.sources.values()} == {f"long_{old}"}


def test_each_run_names_the_next(phases):
    for cli, name in zip(phases, PHASES[1:], strict=False):
        (report,) = [c for c in cli.trainer.callbacks if type(c).__name__ == "RunReport"]
        assert report.next_command == f"python src/train.py fit --config configs/{name}.yaml"


def test_only_the_corpora_of_the_stages_are_prepared(phases, monkeypatch):
    asked = []
    monkeypatch.setattr(
        corpora, "ensure_embedded", lambda *_, paths, **__: asked.append({*map(str, paths)})
    )
    for cli in phases:
        cli.datamodule.prepare_data()
    folder = Path(phases[0].datamodule.embedded)
    names = ("prose", "code", "maths")
    assert asked == [
        {str(folder / part / name) for name in names} for part in ("", "long_256", "long_2048")
    ]


@pytest.fixture
def home(tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project root with one tiny stage, trained at 32 tokens of context."""
    trainer = {"max_steps": 4, "logger": False}
    checkpoint = {"class_path": "callbacks.CheckpointRotation", "init_args": {"every": 0}}
    stage1 = {"name": "stage1", **make_config(sources, trainer, {"cats": 1})}
    stage1["callbacks"] = {"checkpoint": checkpoint}
    monkeypatch.setenv("SMOL_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stage1.yaml").write_text(yaml.safe_dump(stage1))
    return tmp_path


def test_yarn_factor_alone_in_validate(home: Path, capsys: pytest.CaptureFixture):
    main(["fit", "--config", "stage1.yaml"])
    checkpoint = newest_checkpoint(home / "runs" / "stage1")
    assert read_description(checkpoint)[1] == RopeConfig(original_context=32)

    def validate(*words: str) -> SmolCLI:
        validating = ["validate", "--config", "stage1.yaml", "--data.context_length", "64"]
        return main([*validating, *words])

    yarn = ["--model.rope.yarn_factor", "2"]
    losses = [
        float(validate(*words).trainer.callback_metrics["held_out/loss"])
        for words in ([], yarn, [*yarn, "--model.rope.original_context", "32"])
    ]
    assert losses[0] != losses[1] == losses[2]
    initialised = main(
        ["fit", "--config", "stage1.yaml", "--name", "longer", "--init_from", "stage1", *yarn]
    )
    assert initialised.model.decoder.rope == RopeConfig(yarn_factor=2, original_context=32)

    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "stage1.yaml", "--name", "fresh", *yarn])
    assert stop.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "original_context is missing" in line
