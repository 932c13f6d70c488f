"""The commands of the README, word for word (of make's only the first), each made short."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from warm_python import python

from smol.paths import project_root

ROOT = project_root()
TRAIN = "make train"
SHORT = "--trainer.max_steps 2 --trainer.limit_val_batches 1 --trainer.log_every_n_steps 1"


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not (line.startswith("make ") and line != TRAIN)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project root of its own: the repository, with data and runs that end with the test."""
    home = tmp_path_factory.mktemp("readme")
    for name in ("configs", "src", "callbacks", "docs", "README.md", "Makefile"):
        (home / name).symlink_to(ROOT / name)
    return home


def run(line: str, home: Path) -> str:
    if line == TRAIN:
        # Its set-up is what this environment has; what it trains with is the next line.
        shown = subprocess.run(
            ["make", "--no-print-directory", "-n", "train", f"VENV={sys.prefix}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert shown.returncode == 0, shown.stderr
        line = "python " + shown.stdout.strip().splitlines()[-1].split("python ")[-1]
    words = shlex.split(line)
    assert words[0] == "python"
    if words[1] == "src/train.py" and words[2] == "fit" and "--print_config" not in words:
        words += shlex.split(SHORT)
        for stage, steps in {"stage2": "3", "stage3": "4"}.items():  # each after the one before
            if f"configs/{stage}.yaml" in words:
                words += ["--trainer.max_steps", steps]
    if "configs/preference.yaml" in words:  # of all pairs beforehand, it would take a minute
        words += ["--model.reference", "live"]
    if words[1] == "src/evaluate.py":
        words += ["--limit", "1"]
    if "configs/callbacks/production.yaml" in words:
        words += shlex.split("--callbacks.warmup_check.init_args '{steps: 2, fall: null}'")
    if "HUGGINGFACE_FOLDER" in words:
        words[words.index("HUGGINGFACE_FOLDER")] = str(tiny_huggingface_folder(home))
    done = python(*words[1:], cwd=home, SMOL_ROOT=str(home), SMOL_TRACEBACK="1")
    assert done.returncode == 0, f"{line}\n{done.stderr[-3000:]}"
    return done.stdout


def tiny_huggingface_folder(home: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(home / "llama")
    return home / "llama"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_command_runs(home: Path) -> None:
    lines = commands()
    assert lines[0] == TRAIN
    assert len(lines) > 8
    outputs = {line: run(line, home) for line in lines}
    trained = outputs[TRAIN]
    for promised in ("held-out bits per byte", "the model writes", "plot", "run folder", "next"):
        assert promised in trained
    assert (home / "runs/stage1/training.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "notebook",
    [p for p in sorted((ROOT / "notebooks").glob("*.ipynb")) if p.stem != "ablation"],
    ids=lambda p: p.stem,
)  # that of ablations runs in test_ablate.py
def test_every_notebook_runs(notebook: Path, home: Path, monkeypatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("SMOL_ROOT", str(home))
    document = nbformat.read(notebook, as_version=4)
    assert not any(cell.get("outputs") for cell in document.cells), "clear its outputs"
    client = NotebookClient(document, timeout=300, resources={"metadata": {"path": str(home)}})
    client.execute()
    results = [
        output["data"]["text/plain"]
        for cell in document.cells
        for output in cell.get("outputs", ())
        if output.output_type == "execute_result"
    ]
    shown = [o.get("data", {}) for c in document.cells for o in c.get("outputs", ())]
    assert any("image/png" in data for data in shown)
    if notebook.stem == "inspect_run":
        assert "True" in results  # a sentence is likelier than its words shuffled
    if notebook.stem == "swap_callbacks":
        # Watching changed nothing; the guard saved the run, and without it the run was lost.
        assert "True" in results
        assert results[-1] == "{'plain': True, 'guarded': True, 'unguarded': False}"
