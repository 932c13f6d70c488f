"""Runs that follow each other, from the command line: continues, init_from, restart, predict."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import make_config
from warm_python import python

from smol.cli import main
from smol.runs import newest_checkpoint


@pytest.fixture
def home(tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project root with two stages over tiny sources."""
    monkeypatch.setenv("SMOL_ROOT", str(tmp_path))
    logger = {
        "class_path": "smol.experiments.CSVLogger",
        "init_args": {"save_dir": "${runs_dir}/${name}"},
    }
    trainer = {
        "gradient_clip_val": 1.0,
        "val_check_interval": 1000,
        "limit_val_batches": 1,
        "log_every_n_steps": 1,
        "logger": logger,
    }
    base = {
        "runs_dir": "runs",
        "seed_everything": 1,
        **make_config(sources, trainer, {"cats": 1, "dogs": 1}),
        "callbacks": {
            "checkpoint": {"class_path": "callbacks.CheckpointRotation", "init_args": {"every": 2}},
            "predictions": {"class_path": "callbacks.WritePredictions"},
        },
    }
    warmup = {"class_path": "smol.optim.WSD", "init_args": {"warmup_steps": 2}}
    base["model"]["init_args"]["schedule"] = warmup
    stage1 = {"extends": "base.yaml", "name": "stage1", "trainer": {"max_steps": 4}}
    decay = {"decay_start_step": 4, "decay_steps": 4}
    mixture = {source: {"path": str(sources / source), "weight": 1} for source in ("cats", "dogs")}
    stage2 = {
        "extends": "stage1.yaml",
        "name": "stage2",
        "continues": "stage1",
        "trainer": {"max_steps": 8},
        "model": {"init_args": {"schedule": {"init_args": decay}}},
        "data": {"init_args": {"stages": {"stage2": {"start_step": 4, "mixture": mixture}}}},
    }
    for name, content in {"base": base, "stage1": stage1, "stage2": stage2}.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(newest_checkpoint(run) / "model.safetensors")


def assert_equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_stage2_goes_on_with_optimiser_and_position_and_restarts_itself(home: Path) -> None:
    main(["fit", "--config", "stage1.yaml"])
    main(["fit", "--config", "stage2.yaml", "--trainer.max_steps", "6"])
    assert weights(home / "runs/stage2").keys() == weights(home / "runs/stage1").keys()
    cli = main(["fit", "--config", "stage2.yaml"])  # a restart: on from its own step 6
    segments = cli.datamodule.loader.curriculum.segments
    assert [(s.stage, s.start_step) for s in segments] == [("stage1", 0), ("stage2", 4)]
    rows = cli.trainer.logger.rows()
    assert [row["step"] for row in rows] == ["5", "6", "7", "8"]
    rates = [float(row["train/learning_rate"]) for row in rows]
    assert rates == pytest.approx([0.01, 0.0075, 0.005, 0.0025])

    # The same in one go.
    main(["fit", "--config", "stage2.yaml", "--name", "whole", "--continues", "null"])
    assert_equal(weights(home / "runs/stage2"), weights(home / "runs/whole"))


def test_a_run_begun_anew_is_restarted_from_its_new_checkpoints(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    main(["fit", "--config", "stage1.yaml"])
    words = ["fit", "--config", "stage1.yaml", "--model.optimizer.learning_rate", "0.02"]
    main([*words, "--ckpt_path", "scratch", "--trainer.max_steps", "2"])
    assert newest_checkpoint(home / "runs/stage1").name.startswith("step-00000002")
    cli = main(words)
    assert [float(row["train/learning_rate"]) for row in cli.trainer.logger.rows()] == [
        pytest.approx(rate) for rate in (0.01, 0.02, 0.02, 0.02)
    ]
    caplog.clear()
    main(words)
    assert "stage1 has taken its 4 steps already" in caplog.text


def test_init_from_takes_weights_only(home: Path) -> None:
    main(["fit", "--config", "stage1.yaml"])
    words = ["fit", "--config", "stage1.yaml", "--name", "other", "--init_from", "stage1"]
    cli = main([*words, "--trainer.max_steps", "0"])
    cli = main(words)
    assert cli.trainer.global_step == 4
    assert cli.trainer.logger.rows()[0]["train/tokens"] == "256.0"
    first = float(cli.trainer.logger.rows()[0]["train/loss"])
    assert first < 0.9 * float(
        main(["fit", "--config", "stage1.yaml", "--name", "fresh"]).trainer.logger.rows()[0][
            "train/loss"
        ]
    )


def test_a_missing_predecessor_is_one_line(home: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "stage2.yaml"])
    assert stop.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: the run 'stage1' has no checkpoint")
    assert "make it first: python src/train.py fit --config" in line


def test_validate_and_predict_read_the_newest_checkpoint(home: Path) -> None:
    cli = main(["fit", "--config", "stage1.yaml", "--trainer.max_steps", "4"])
    trained = float(cli.trainer.callback_metrics["held_out/loss"])
    validated = main(["validate", "--config", "stage1.yaml"])
    assert float(validated.trainer.callback_metrics["held_out/loss"]) == pytest.approx(trained)
    main(["predict", "--config", "stage1.yaml", "--trainer.limit_predict_batches", "1"])
    lines = (home / "runs/stage1/predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert {row["source"] for row in rows} <= {"cats", "dogs"}
    losses = [loss for row in rows for loss in row["token_losses"]]
    assert len(losses) == 256
    assert all(row["text"] for row in rows)


def test_repeating_a_source_more_than_four_times_is_announced(home: Path) -> None:
    words = ["fit", "--config", "stage1.yaml", "--trainer.max_steps", "3", "--name", "repeats"]
    batch = ["--data.global_batch_tokens", "262144", "--data.micro_batch_tokens", "262144"]
    cli = main([*words, *batch], run=False)
    data = cli.datamodule
    data.setup()
    data.trainer = cli.trainer
    with pytest.warns(UserWarning, match="source 'cats' will be read [0-9.]+ times; more than 4"):
        data.train_dataloader()
    end = 3 * 262144
    assert sum(data.loader.curriculum.tokens(end).values()) == end


def test_a_run_is_exported_to_transformers_with_the_same_loss(home: Path) -> None:
    from transformers import AutoModelForCausalLM

    cli = main(["fit", "--config", "stage1.yaml"])
    convert = Path(__file__).parents[2] / "src" / "convert.py"
    done = python(convert, "export", "runs/stage1", "exported")
    assert done.returncode == 0, done.stderr
    batch = next(iter(cli.datamodule.val_dataloader()))
    row = batch.tokens[:1, : int((batch.documents[0] == batch.documents[0, 0]).sum())]
    ours = cli.model.decoder(row)
    theirs = AutoModelForCausalLM.from_pretrained(home / "exported")(row).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert (home / "exported/tokenizer.json").is_file()
