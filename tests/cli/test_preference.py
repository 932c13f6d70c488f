"""Preference optimisation from the command line: runs, restarts, overlays and mistakes."""

import csv
import re
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from preference_parts import SHAPE, prepare_pairs
from safetensors.torch import load_file

from smol.cli import main
from smol.config import load_config
from smol.losses import PreferenceLoss
from smol.model import Decoder, DecoderConfig, init_weights
from smol.model.io import save_decoder
from smol.paths import project_root
from smol.runs import newest_checkpoint

CONFIGS = project_root() / "configs"


def make_config() -> dict:
    return {
        "name": "aligned",
        "init_from": "start",
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": -1,
            "max_steps": 12,
            "log_every_n_steps": 1,
            "val_check_interval": 6,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "plugins": [{"class_path": "smol.checkpoints.SafeCheckpointIO"}],
            "logger": {
                "class_path": "smol.experiments.CSVLogger",
                "init_args": {"save_dir": "${runs_dir}/${name}"},
            },
        },
        "runs_dir": "runs",
        "model": {
            "class_path": "smol.modules.PreferenceOptimization",
            "init_args": {
                "decoder": {k: v for k, v in SHAPE.items() if k != "nope"},
                "optimizer": {"learning_rate": 0.003},
                "loss": {"name": "apo_zero", "beta": 0.1},
            },
        },
        "data": {
            "class_path": "smol.data.Preferences",
            "init_args": {
                "tokenizer": "tokenizer",
                "context_length": 256,
                "global_batch_tokens": 1024,
                "micro_batch_tokens": 512,
                "bare": True,
                "subsets": {"easy": {"path": "pairs.jsonl", "held_out": 0.2}},
            },
        },
        "callbacks": {
            "checkpoint": {
                "class_path": "callbacks.CheckpointRotation",
                "init_args": {"every": 4, "keep": 9},
            },
            "eval_loss": {"class_path": "callbacks.EvalLoss"},
        },
    }


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project root with pairs, their tokenizer, weights to begin with, and a configuration."""
    monkeypatch.setenv("SMOL_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    prepare_pairs(tmp_path)
    config = DecoderConfig(**{k: v for k, v in SHAPE.items() if k != "nope"})
    decoder = Decoder(config)
    init_weights(decoder, seed=3)
    save_decoder(tmp_path / "start", config, decoder.rope, decoder.state_dict())
    (tmp_path / "preference.yaml").write_text(yaml.safe_dump(make_config()))
    return tmp_path


def fit(*words: str):
    return main(["fit", "--config", "preference.yaml", *words])


def rows(folder: Path) -> dict[int, dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return {int(row["step"]): row for row in csv.DictReader(file)}


def test_a_run_learns_and_its_restart_is_bit_identical(home: Path):
    fit()
    whole = rows(home / "runs/aligned")
    assert float(whole[0]["held_out/rewards/margins"]) == pytest.approx(0, abs=1e-6)
    assert float(whole[12]["held_out/rewards/margins"]) > 0.1
    assert float(whole[12]["held_out/rewards/accuracies"]) > 0.8
    assert float(whole[12]["train/rewards/margins"]) > float(whole[2]["train/rewards/margins"])
    assert (home / "runs/aligned/tokenizer/chat_template.jinja").is_file()

    fit("--name", "again", "--trainer.max_steps", "4")
    for file in (home / "data/cache/reference").iterdir():
        file.unlink()
    fit("--name", "again")
    weights = [
        load_file(newest_checkpoint(home / "runs" / name) / "model.safetensors")
        for name in ("aligned", "again")
    ]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name])
    again = rows(home / "runs/again")
    measured = [key for key in whole[7] if key.startswith(("train/", "held_out/"))]
    for step in range(5, 13):
        assert [whole[step][k] for k in measured] == [again[step][k] for k in measured]


def test_validate_takes_the_reference_of_the_run(home: Path):
    fit()
    expected = rows(home / "runs/aligned")[12]["held_out/rewards/margins"]
    cli = main(["validate", "--config", "preference.yaml"])
    margin = cli.trainer.callback_metrics["held_out/rewards/margins"]
    assert float(margin) == pytest.approx(float(expected), rel=1e-5)


def test_the_report_says_what_was_gained(home: Path, capsys: pytest.CaptureFixture):
    fit("--callbacks.run_report", "callbacks.RunReport", "--name", "named")
    out = capsys.readouterr().out
    measured = rows(home / "runs/named")
    for name in ("accuracies", "margins"):
        before, after = (float(measured[step][f"held_out/rewards/{name}"]) for step in (0, 12))
        found = re.search(rf"  {name} +(-?\d\.\d{{3}}) +(\d\.\d{{3}}) +(\d\.\d{{3}})\n", out)
        expected = [before, after, after - before]
        assert list(map(float, found.groups())) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("chain", ["", "smollm3_3b/"])
def test_phases_name_their_run_and_render_alike(chain: str):
    phases = ("mid_training", "sft", "preference")
    words = {"runs_dir": "/elsewhere", "name": "mine"}
    configs = {
        phase: OmegaConf.to_container(
            OmegaConf.create(load_config([CONFIGS / f"{chain}{phase}.yaml"], words)), resolve=True
        )
        for phase in phases
    }
    data = {phase: config["data"]["init_args"] for phase, config in configs.items()}
    assert len({data[phase].get("chat_template") for phase in phases}) == 1
    for key in ("date", "bare"):
        assert (data["sft"].get(key) or None) == (data["preference"].get(key) or None), key
    assert data["mid_training"]["bare"]  # so it has no date
    following = [
        c["callbacks"]["run_report"]["init_args"]["next_command"] for c in configs.values()
    ]
    fit = "python src/train.py fit --runs_dir /elsewhere --init_from mine --config configs"
    assert following == [
        f"{fit}/{chain}sft.yaml",
        f"{fit}/{chain}preference.yaml",
        "python src/chat.py /elsewhere/mine",
    ]


@pytest.mark.parametrize("name", sorted(file.stem for file in (CONFIGS / "losses").iterdir()))
def test_a_loss_is_an_overlay(name: str, tmp_path: Path):
    files = [CONFIGS / "preference.yaml", CONFIGS / "losses" / f"{name}.yaml"]
    words = [word for file in files for word in ("--config", str(file))]
    cli = main(["fit", *words, "--runs_dir", str(tmp_path)], run=False)
    assert cli.model.loss.name == name
    assert cli.settings.name == f"preference_{name}"
    assert isinstance(cli.model.loss, PreferenceLoss)


def test_the_laptop_begins_with_the_decoder_of_its_chain():
    own, chain = (
        load_config([CONFIGS / file])["model"]["init_args"]
        for file in ("preference.yaml", "base.yaml")
    )
    chain["decoder"].pop("init_std")
    assert (own["decoder"], own["rope"]) == (chain["decoder"], chain["rope"])


def test_published_figures():
    config = load_config([CONFIGS / "smollm3_3b/preference.yaml"])
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    assert model["loss"] == {"name": "apo_zero", "beta": 0.05}
    assert model["optimizer"]["learning_rate"] == 1e-6
    assert config["trainer"]["gradient_clip_val"] == 0.2
    assert data["max_length"] == 24576
    pairs = sum(
        count * data["subsets"][name]["weight"]
        for name, count in (("tulu3_no_think", 230_501), ("tulu3_think", 216_385))
    )
    steps = config["trainer"]["max_steps"]
    assert pairs == pytest.approx(169_346, abs=1)
    assert steps == round(169_346 / 32)
    schedule = model["schedule"]["init_args"]
    assert schedule == {"warmup_steps": round(steps / 10), "total_steps": steps, "final": 0.1}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model.loss.name", "apo_zer0"], "apo_zero"),
        (["--model.loss.beta", "0"], "loss beta is 0.0; expected a number above 0"),
        (["--model.loss.gamma", "1"], "belongs to simpo"),
        (["--model.reference", "lives"], "live"),
        (["--model.reference_weights", "nowhere"], "nowhere"),
        (["--data.max_length", "200"], "type --data.context_length 400"),
        (["--data.truncation", "keep"], "expected drop or cut"),
        (["--data.subsets.easy.path", "none.jsonl"], "none.jsonl"),
        (["--data.subsets.easy.chosen", "better"], "has no column 'better'"),
        (["--data.max_length", "9"], "44 longer than 9 tokens; type --data.max_length"),
        (["--init_from", "sft"], "the run 'sft' has no checkpoint"),
        (["--model.decoder.hidden_size", "64"], "make model.decoder equal"),
        (["--model.decoder.vocab_size", "256"], "--model.decoder.vocab_size 384"),
    ],
)
def test_mistakes_are_one_line(home: Path, words, told, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stop:
        fit(*words)
    assert stop.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert told in line
