"""A tiny study, and a script in the place of train.py, for the tests of ablations."""

import sys
from pathlib import Path
from typing import Any

from tiny import make_config

from smol.config import dump_yaml
from smol.experiments.ablation import runs

# Logs a loss that depends on the seed and, by a tenth, on QK-norm; obeys the learning rate:
# 0.5 fails, 0.25 diverges, 0.125 is interrupted once, and 0.0625 too, with status 0 after 8 steps.
TRAIN = """
import pathlib, re, sys
folder = pathlib.Path(sys.argv[1])
text = (folder / "run.yaml").read_text()
seed = int(re.search(r"seed_everything: (\\d+)", text)[1])
rate = float(re.search(r"learning_rate: (\\S+)", text)[1])
loss = 3 + seed / 8 - ("qk_norm: true" in text) / 10 + seed * seed / 1000 * ("qk_norm" in text)
(folder / "starts").open("a").write("x")
if rate == 0.5:
    sys.exit("error: the model is refused; type less")
if rate == 0.125 and len((folder / "starts").read_text()) == 1:
    sys.exit(143)
steps = 8 if rate == 0.0625 and len((folder / "starts").read_text()) == 1 else 40
loss = float("nan") if rate == 0.25 else loss
rows = [f"{step},{loss},{1000 + seed}" for step in range(1, steps + 1)]
head = "step,held_out/bits_per_byte,throughput/tokens_per_second"
(folder / "metrics.csv").write_text("\\n".join([head, *rows]) + "\\n")
"""


def write_baseline(folder: Path) -> Path:
    """The tiny configuration, with all that a study needs."""
    config = make_config(Path("data"), {"max_steps": 9}, {"cats": 0.7, "dogs": 0.3})
    config["trainer"]["log_every_n_steps"] = 1
    config |= {"seed_everything": 0, "runs_dir": "runs"}
    config["vars"] = {"decay": 0.1, "idle": 1}
    config["model"]["init_args"]["optimizer"]["weight_decay"] = "${vars.decay}"
    config["trainer"]["logger"] = {
        "class_path": "smol.experiments.CSVLogger",
        "init_args": {"save_dir": "${runs_dir}/${name}"},
    }
    file = folder / "baseline.yaml"
    file.write_text(dump_yaml(config))
    return file


def study_values(**changed: Any) -> dict[str, Any]:
    """A study of QK-norm as a mapping; ``None`` takes a key out."""
    values = {
        "baseline": "baseline.yaml",
        "variants": {"qk_norm": {"model.decoder.qk_norm": True}},
        "seeds": [1, 2, 3],
        "budget": {"steps": 40},
        "metrics": {"held_out/bits_per_byte": "lower"},
    }
    return {key: value for key, value in {**values, **changed}.items() if value is not None}


def write_study(folder: Path, name: str = "study.yaml", **changed: Any) -> Path:
    file = folder / name
    file.write_text(dump_yaml(study_values(**changed)))
    return file


def replace_training(monkeypatch, folder: Path) -> None:
    """Let runs be made by :data:`TRAIN`."""
    script = folder / "fake_train.py"
    script.write_text(TRAIN)
    command = property(lambda run: [sys.executable, "-S", str(script), str(run.folder)])
    monkeypatch.setattr(runs.Run, "command", command)
