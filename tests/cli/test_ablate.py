"""The command line of ``ablate.py``: runs, what is shared and resumed, verdicts, promotion."""

import json
import signal
import sys
import time
import types
from concurrent.futures import Future
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "experiments"))
from ablation_parts import replace_training, write_baseline, write_study

from smol.config import load_config
from smol.experiments.ablation import arms, runs
from smol.experiments.ablation.command import main

NORM = {"model.decoder.qk_norm": True}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SMOL_ROOT", str(tmp_path))
    write_baseline(tmp_path)
    replace_training(monkeypatch, tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def parse_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsing takes a second; a study that is run again is parsed once."""
    known, parse = {}, arms.parse

    def cached(files, flags):
        key = json.dumps([list(files), flags])
        if key not in known:
            known[key] = parse(files, flags)
        return known[key]

    monkeypatch.setattr(arms, "parse", cached)


def starts(folder: Path) -> list[int]:
    return [len(f.read_text()) for f in sorted(folder.glob("runs/ablations/runs/*/starts"))]


def test_a_study_from_its_file_to_a_new_baseline(folder: Path, capsys) -> None:
    study = write_study(folder, question="Does it help?")
    assert main([str(study), "--dry_run"]) == 0
    assert capsys.readouterr().out.count("not begun") == 6
    assert starts(folder) == []

    assert main([str(study), "--jobs", "2"]) == 0
    out = capsys.readouterr().out
    assert "6 of 6 runs to go, 2 at a time" in out
    # The mean and the interval of what the script computes: -0.1 + {1, 4, 9} / 1000.
    assert "-0.0953 -0.1054 to -0.0853 0.1250" in " ".join(out.split())
    assert "adopt" in out
    report = (folder / "runs/ablations/study/report.md").read_text()
    assert "Does it help?" in report
    assert "model.init_args.decoder.qk_norm`: False → True" in report
    assert (folder / "runs/ablations/study/report/differences.png").stat().st_size > 5000
    page = (folder / "runs/ablations/study/report.html").read_text()
    assert page.count("data:image/png") >= 1

    # Nothing is run twice, also by another study with the same baseline.
    other = write_study(folder, "other.yaml", variants={"nope": {"model.decoder.nope": 2}})
    assert main([str(study)]) == main([str(other)]) == 0
    assert starts(folder) == [1] * 9
    assert "3 of 6 runs to go" in capsys.readouterr().out

    assert main([str(study), "--promote", "qk_norm"]) == 0
    capsys.readouterr()
    promoted = folder / "study_qk_norm.yaml"
    assert promoted.read_text().startswith("# Does it help?: better (qk_norm of study.yaml).\n")
    below, above = load_config(["baseline.yaml"]), load_config([promoted])
    below["model"]["init_args"]["decoder"]["qk_norm"] = True
    assert above == below
    chain = (folder / "decisions.md").read_text()
    assert "| study | qk_norm | better |" in chain
    assert chain.splitlines()[-1].endswith("| `baseline.yaml` | `study_qk_norm.yaml` |")
    for variant, told in {
        "qk_norm": "has that decision already",
        "qk_nrm": "Did you mean 'qk_norm'",
    }.items():
        assert main([str(study), "--promote", variant]) == 2
        assert told in capsys.readouterr().err
    assert main([str(other), "--promote", "nope"]) == 2
    assert "nothing in this configuration reads the change), expected" in capsys.readouterr().err


def test_runs_that_fail_or_diverge_are_shown_and_not_tried_again_unasked(folder, capsys) -> None:
    variants = {
        name: {"model.optimizer.learning_rate": rate}
        for name, rate in {"fails": 0.5, "diverges": 0.25}.items()
    }
    study = write_study(folder, variants=variants, seeds=2)
    assert main([str(study)]) == 0
    out = capsys.readouterr().out
    assert "failed: fails, seed 1: the model is refused; type less (exit status 1)" in out
    assert "failed: diverges, seed 2: diverged: held_out/bits_per_byte is not finite" in out
    assert out.count("keep baseline  2 of 2 runs failed") == 2
    report = (folder / "runs/ablations/study/report.md").read_text()
    assert report.count("| failed: ") == 4
    before = sum(starts(folder))
    assert main([str(study)]) == 0
    assert sum(starts(folder)) == before
    assert main([str(study), "--retry", "failed"]) == 0
    assert sum(starts(folder)) == before + 2  # what diverged has trained to its end


@pytest.mark.parametrize("rate", [0.125, 0.0625], ids=["status 143", "status 0, too early"])
def test_an_interrupted_study_goes_on(folder: Path, capsys, rate: float) -> None:
    study = write_study(folder, variants={"v": {"model.optimizer.learning_rate": rate}})
    assert main([str(study)]) == 0
    assert "undecided" in capsys.readouterr().out
    assert main([str(study)]) == 0
    out = capsys.readouterr().out
    assert "3 of 6 runs to go" in out
    assert "undecided" not in out
    assert sorted(starts(folder)) == [1, 1, 1, 2, 2, 2]


def test_ctrl_c_ends_the_runs(folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(
        runs.Run,
        "command",
        property(lambda run: [sys.executable, "-c", "import time; time.sleep(60)"]),
    )

    def interrupted(*arguments):
        while not runs._processes:
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "as_completed", interrupted)
    began = time.monotonic()
    handler = signal.getsignal(signal.SIGTERM)
    assert main([str(write_study(folder))]) == 130
    assert signal.getsignal(signal.SIGTERM) is handler
    assert time.monotonic() - began < 40
    assert "the same command goes on" in capsys.readouterr().err
    assert not runs._processes
    (record,) = folder.glob("runs/ablations/runs/*/ablation.json")
    assert json.loads(record.read_text())["status"] == "stopped"


def test_threads_and_gpus_are_shared_out(monkeypatch) -> None:
    import torch

    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with runs.Pool(2) as pool:
        seen = [pool.submit(lambda *given: given, i).result() for i in range(2)]
    assert [threads for _, threads, _ in seen] == [3, 3]
    assert {devices for *_, devices in seen} <= {"0,2", "1,3"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with runs.Pool(2) as pool:
        assert pool.submit(lambda *given: given).result() == (3, None)


class Slurm:
    """submitit's executor as far as it is used here; its jobs run at once."""

    def __init__(self, folder, cluster):
        assert cluster == "slurm"

    def update_parameters(self, **given):
        self.given = given
        if "tiemout_min" in given:
            raise NameError("Unknown argument(s): tiemout_min")

    def submit(self, function, *arguments):
        job = Future()
        job.set_result(function(*arguments))
        return job


def test_runs_go_to_slurm(folder: Path, monkeypatch, capsys) -> None:
    study = write_study(folder, slurm={"timeout_min": 9})
    words = [str(study), "--launcher", "submitit"]
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert main(words) == 2
    assert "needs the package submitit" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "submitit", types.SimpleNamespace(AutoExecutor=Slurm))
    assert main(words) == 0
    assert starts(folder) == [1] * 6
    write_study(folder, slurm={"tiemout_min": 9}, seeds=4)
    assert main(words) == 2
    assert "Unknown argument(s): tiemout_min" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["study.yaml", "--jbos", "2"], "unrecognized arguments: --jbos 2. Did you mean '--jobs'"),
        (["study.yaml", "--jobs", "0"], "--jobs is 0, expected 1 or more"),
        (["stdy.yaml"], "study stdy.yaml cannot be read"),
        (["study.yaml", "--launcher", "ray"], "invalid choice: 'ray'"),
        ([], "the following arguments are required: STUDY"),
        (["metric.yaml"], "metric.yaml: 'metrics' is missing"),
    ],
)
def test_mistakes_are_one_line(folder: Path, capsys, words: list[str], told: str) -> None:
    write_study(folder)
    write_study(folder, "metric.yaml", metrics=None)
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert told in line


@pytest.mark.slow
def test_the_notebook_runs_a_study(tmp_path: Path, monkeypatch) -> None:
    """With real runs: they learn, and a fiftieth of the learning rate learns less."""
    import nbformat
    from nbclient import NotebookClient

    root = Path(__file__).resolve().parents[2]
    (tmp_path / "configs").symlink_to(root / "configs")
    if (root / "data" / "embedded").is_dir():  # else it is made, once
        (tmp_path / "data").symlink_to(root / "data")
    document = nbformat.read(root / "notebooks" / "ablation.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in document.cells), "clear its outputs"
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(document, timeout=280, resources=resources).execute()
    outputs = [output for cell in document.cells for output in cell.get("outputs", ())]
    shown = [o["data"] for o in outputs if o.output_type == "execute_result"]
    assert shown[-1]["text/plain"] == "{'slow': ('keep baseline', 'worse')}"
    assert "learning_rate': (0.003, 6e-05)" in shown[0]["text/plain"]
    assert sum("image/png" in data for data in shown) == 1
    printed = "".join(o["text"] for o in outputs if o.output_type == "stream")
    assert "changes 2 things" in printed
    assert "the baseline says the same" in printed
    assert printed.count("finished after") == 4


def test_a_metric_that_no_run_logged_is_told_with_those_that_were(folder: Path, capsys) -> None:
    study = write_study(folder, metrics={"tasks/arc": "higher"})
    assert main([str(study)]) == 2
    err = capsys.readouterr().err
    assert "unknown metric 'tasks/arc': the run" in err
    assert "logged held_out/bits_per_byte, throughput/tokens_per_second" in err
