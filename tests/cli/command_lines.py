"""A configuration, and ways to run command lines over it, for the tests of the command line."""

from pathlib import Path

import pytest

from smol.cli import main
from smol.lightning_cli import SmolCLI

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN = str(REPOSITORY / "src" / "train.py")

RUN = """
name: first
vars: {hidden: 8, inner: {rate: 0.25}}
trainer:
  max_steps: 2
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
model:
  class_path: cli_parts.Model
  init_args:
    decoder: {hidden_size: "${vars.hidden}"}
    attention: {class_path: cli_parts.Attention, init_args: {window: 5}}
    lr: ${vars.inner.rate}
data:
  class_path: cli_parts.Data
  init_args:
    stages:
      stage1: {context_length: 64}
      stage2: {context_length: "${mul:${vars.hidden},16}", mixture: {web: 0.5, code: 0.5}}
callbacks:
  report: {class_path: cli_parts.Report}
  monitor: {class_path: cli_parts.Monitor, init_args: {every: 3}}
  unordered: {class_path: cli_parts.Unordered}
  guard: {class_path: cli_parts.Guard}
"""


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project root that is the working directory, with ``run.yaml`` in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SMOL_ROOT", str(tmp_path))
    monkeypatch.delenv("SMOL_TRACEBACK", raising=False)
    (tmp_path / "run.yaml").write_text(RUN)
    return tmp_path


def build(*words: str) -> SmolCLI:
    return main(["fit", "--config", "run.yaml", *words], run=False)


def fit(*words: str) -> SmolCLI:
    return main(["fit", "--config", "run.yaml", *words])


def line_of(capsys: pytest.CaptureFixture, *words: str, command: str = "fit") -> str:
    """The whole of standard error of a command line that is refused, checked to be one line."""
    with pytest.raises(SystemExit) as stop:
        main([command, *words])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    (line,) = err.splitlines()
    return line


def named_callbacks(cli: SmolCLI) -> list[str]:
    parts = [type(callback) for callback in cli.trainer.callbacks]
    return [part.__name__ for part in parts if part.__module__ == "cli_parts"]
