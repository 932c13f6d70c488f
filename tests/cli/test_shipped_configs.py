"""Every YAML under configs/ is parsed and built, alone or over the file it goes with."""

from pathlib import Path

import pytest
import torch
import yaml

from smol.cli import main
from smol.config import load_config, unused
from smol.paths import project_root

CONFIGS = project_root() / "configs"
OVERLAYS = ("callbacks", "debug", "hardware", "logging", "losses", "model")
NOT_TRAINING = ("ablations", "data", "merges", "tasks")  # of other scripts; their tests parse them


def training_files() -> list[Path]:
    return sorted(
        file for file in CONFIGS.rglob("*.yaml")
        if file.relative_to(CONFIGS).parts[0] not in NOT_TRAINING
    )  # fmt: skip


@pytest.mark.parametrize("file", training_files(), ids=lambda f: str(f.relative_to(CONFIGS)))
def test_builds(file: Path, tmp_path: Path) -> None:
    words = ["--config", str(file)]
    parts = file.relative_to(CONFIGS).parts
    if parts[0] in OVERLAYS or file.name == "base.yaml":
        below = "preference.yaml" if parts[0] == "losses" else "stage1.yaml"
        words = ["--config", str(CONFIGS / below), *words]
    trainer = load_config(words[1::2])["trainer"]
    nodes, devices = trainer.get("num_nodes", 1), trainer["devices"]
    needed = 1 if devices == "auto" else nodes * devices
    if trainer["accelerator"] == "gpu" and torch.cuda.device_count() < needed:
        words += ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]
        words += ["--trainer.num_nodes", "1"]
        if trainer.get("strategy") == "fsdp":  # refused without a GPU
            words += ["--trainer.strategy", "auto"]
    cli = main(["fit", *words, "--runs_dir", str(tmp_path)], run=False)
    assert list(unused(cli.source)) == []
    assert cli.model is not None
    assert cli.model.decoder is None  # made when a run starts; 3B would take long
    assert cli.datamodule is not None
    if parts[0] == "callbacks":
        named = yaml.safe_load(file.read_text())["callbacks"]
        built = {type(c).__name__ for c in cli.trainer.callbacks}
        for entry in named.values():
            if entry:
                assert entry["class_path"].rpartition(".")[2] in built


def test_accumulation_is_not_set_by_hand(capsys: pytest.CaptureFixture) -> None:
    words = ["--config", str(CONFIGS / "stage1.yaml"), "--trainer.accumulate_grad_batches", "4"]
    with pytest.raises(SystemExit) as stop:
        main(["fit", *words], run=False)
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: trainer.accumulate_grad_batches is 4, but accumulation follows from "
        "data.global_batch_tokens; for more passes a step type --data.micro_batch_tokens with a "
        "smaller number"
    )
