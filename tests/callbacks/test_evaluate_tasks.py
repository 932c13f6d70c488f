"""Tasks measured while training: inside the loop, and by a process beside it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from lightning import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from tiny import WORDS, make_data, make_module, make_trainer

from callbacks import CheckpointRotation
from callbacks.evaluate_checkpoints import LOG, EvaluateCheckpoints
from callbacks.evaluate_tasks import EvaluateTasks
from callbacks.events import Events
from smol.errors import UserError
from smol.evaluation.language_model import LanguageModel
from smol.evaluation.measure import measure
from smol.evaluation.results import Results
from smol.evaluation.tasks import load_task
from smol.experiments import CSVLogger

TASKS = {
    "words": "kind: cloze\nprompt: '{{ q }}'\nchoices: options\nanswer: gold",
    "writing": "kind: generative\nprompt: '{{ q }}'\nanswer: options[gold]\n"
    "metric: exact_match\nmax_new_tokens: 3",
}


@pytest.fixture
def tasks(tmp_path):
    """Files of a task that scores and of one that writes."""
    records = [
        {"q": f"the {a} and", "options": [b, c], "gold": i % 2}
        for i, (a, b, c) in enumerate(zip(WORDS, WORDS[3:], WORDS[7:], strict=False))
    ]
    data = tmp_path / "words.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    paths = []
    for name, text in TASKS.items():
        paths.append(str(tmp_path / f"{name}.yaml"))
        Path(paths[-1]).write_text(f"data: {data}\n{text}\n")
    return paths


class Noise(Callback):
    """Training that draws random numbers: any that another draws change the weights."""

    def on_before_optimizer_step(self, trainer, module, optimizer):
        for parameter in module.parameters():
            parameter.grad.add_(torch.randn_like(parameter), alpha=1e-3)


def fit(folder, sources, steps, *callbacks, resume=None, **kwargs):
    logger = CSVLogger(str(folder))
    trainer = make_trainer(folder, steps, callbacks=list(callbacks), logger=logger, **kwargs)
    trainer.fit(module := make_module(dropout=0.1), make_data(sources), ckpt_path=resume)
    return module


def logged(folder):
    """What was logged of tasks, by step."""
    rows = {}
    for row in CSVLogger(str(folder)).rows():
        found = {k: float(v) for k, v in row.items() if k.startswith("tasks/") and v}
        if found:
            rows[int(row["step"])] = found
    return rows


def test_training_is_bit_identical_with_and_without(sources, tmp_path, tasks):
    states = []
    for name, callbacks in {"with": [EvaluateTasks(tasks, every=2)], "without": []}.items():
        torch.manual_seed(3)
        module = fit(tmp_path / name, sources, 5, *callbacks, Noise())
        (optimizer,) = module.trainer.optimizers
        moments = [x for state in optimizer.state.values() for x in state.values()]
        states.append([*module.parameters(), *moments, torch.get_rng_state()])
        assert all(part.training for part in module.decoder.modules())
    for x, y in zip(*states, strict=True):
        assert torch.equal(x, y)
    assert list(logged(tmp_path / "with")) == [2, 4, 5]


def test_figures_are_those_of_the_model_at_that_step(sources, tmp_path, tasks):
    callback = EvaluateTasks(tasks, every=0, limit=6)
    module = fit(tmp_path / "run", sources, 2, callback)
    tokenizer = module.trainer.datamodule.tokenizer
    model = LanguageModel(module.decoder.eval(), tokenizer, "", (tokenizer.eos_id,), 32)
    words = measure(load_task(tasks[0]), model, 6)
    expected = {f"tasks/words/{name}": estimate.value for name, estimate in words.items()}
    assert expected.items() <= callback.metrics.items()
    assert "tasks/writing/accuracy" in callback.metrics
    assert logged(tmp_path / "run") == {2: pytest.approx(callback.metrics)}


def test_a_restart_logs_no_step_twice(sources, tmp_path, tasks):
    run = tmp_path / "run"
    fit(run, sources, 3, EvaluateTasks(tasks[:1], every=2), CheckpointRotation(every=1))
    (newest,) = (run / "checkpoints").glob("step-00000002-*")
    fit(run, sources, 4, EvaluateTasks(tasks[:1], every=2), resume=newest)
    assert list(logged(run)) == [2, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: cloze\ndata: gone.jsonl\nprompt: x\nanswer: gold", "gone.jsonl"),
        ("metric: exact\nkind: generative\ndata: words.jsonl\nprompt: x\nanswer: gold", "'exact'"),
        ("kind: cloze\ndata: words.jsonl\nprompt: '{{ 1 / 0 }}'\nanswer: gold", "ZeroDivision"),
        ("kind: cloze\ndata: words.jsonl\nprompt: x\nanswer: q * 99", "tokens, expected at most"),
        ("kind: chat\nmetric: exact_match\ndata: words.jsonl\nprompt: x\nanswer: gold", "template"),
    ],
)
def test_a_mistake_in_a_task_is_told_before_the_first_step(
    sources, tmp_path, tasks, monkeypatch, text, message
):
    monkeypatch.setenv("SMOL_ROOT", str(tmp_path))  # where relative paths start
    (tmp_path / "wrong.yaml").write_text(text)
    steps = []

    class Count(Callback):
        def on_train_batch_start(self, *_):
            steps.append(1)

    with pytest.raises(UserError, match=message) as error:
        fit(tmp_path / "run", sources, 2, EvaluateTasks(["wrong.yaml"], every=1), Count())
    assert "\n" not in str(error.value)
    assert not steps


def failures(run):
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event["message"] for event in events if event["kind"] == "evaluation_failed"]


def test_what_fails_while_training_is_an_event(sources, tmp_path, tasks):
    class Gone(Callback):
        def on_train_batch_start(self, *_):
            (tmp_path / "words.jsonl").unlink(missing_ok=True)

    run, callback = tmp_path / "run", EvaluateTasks(tasks[:1], every=1)
    module = fit(run, sources, 2, callback, Gone(), Events())
    assert module.trainer.global_step == 2
    assert len(failures(run)) == 2
    assert all("words.jsonl: no such file" in message for message in failures(run))
    assert callback.metrics == {}


@pytest.mark.parametrize("wrong", ["memory", "weights"])
def test_a_runtime_error_while_training_is_an_event(sources, tmp_path, tasks, monkeypatch, wrong):
    class Breaks(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if wrong == "weights":
                next(module.decoder.parameters()).data.fill_(torch.nan)

    def fails(*_):
        raise RuntimeError("out of\nmemory")

    if wrong == "memory":
        monkeypatch.setattr("callbacks.evaluate_tasks.measure", fails)
    run, callback = tmp_path / "run", EvaluateTasks(tasks[:1], every=2)
    module = fit(run, sources, 3, Breaks(), callback, Events())
    assert module.trainer.global_step == 3
    assert all(part.training for part in module.decoder.modules())
    messages = {"memory": "RuntimeError: out of memory", "weights": "log-probabilities are not num"}
    assert len(failures(run)) == 2
    assert all(messages[wrong] in message for message in failures(run))


def test_other_modules_and_data_are_left_alone(tmp_path, tasks):
    trainer = make_trainer(tmp_path, 2, plugins=[], callbacks=[callback := EvaluateTasks(tasks)])
    trainer.fit(BoringModel())
    assert callback.metrics == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": []}, "EvaluateTasks tasks is empty, expected at least one"),
        ({"tasks": ["arc_easy"], "every": -1}, "EvaluateTasks every is -1, expected 0 or more"),
        ({"tasks": ["arc_easy"], "limit": 0}, "EvaluateTasks limit is 0, expected 1 or more"),
        ({"tasks": ["arc_easy"], "modes": ["thinking"]}, "modes holds 'thinking' .*expected"),
        ({"tasks": ["arc_hard"]}, "no task 'arc_hard', expected the path of a YAML file"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UserError, match=message):
        EvaluateTasks(**arguments)
    if set(arguments) == {"tasks"}:
        with pytest.raises(UserError, match=message.removeprefix("EvaluateTasks tasks")[:20]):
            EvaluateCheckpoints(**arguments)


def describe(run: Path, sources: Path) -> Path:
    """Leave the configuration in the run folder, as the command line does."""
    run.mkdir(parents=True, exist_ok=True)
    config = {"data": {"init_args": {"tokenizer": str(sources / "tokenizer")}}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


@pytest.mark.slow
def test_a_process_evaluates_what_is_saved_and_ends_with_the_run(sources, tmp_path, tasks):
    run = describe(tmp_path / "run", sources)
    beside = EvaluateCheckpoints(tasks[:1], limit=4)
    fit(run, sources, 3, CheckpointRotation(every=1, keep=3), beside, Events())
    rows = Results(run).rows()
    assert [row.model for row in rows] == ["run@1", "run@2", "run@3"]
    assert {row.metrics["accuracy"].items for row in rows} == {4}
    assert "run@3" in (run / "evaluation.md").read_text()
    assert "evaluation_failed" not in (run / "events.jsonl").read_text()


def test_a_process_that_fails_harms_nothing_and_is_told_of(sources, tmp_path, tasks):
    run = describe(tmp_path / "run", sources)
    beside = EvaluateCheckpoints(tasks[:1], device="abacus")
    fit(run, sources, 2, CheckpointRotation(every=1), beside, Events())
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    (failed,) = [event for event in events if event["kind"] == "evaluation_failed"]
    assert failed["message"].startswith("error: --device abacus cannot be used here")
    assert events[-1]["kind"] == "evaluation_failed"


def test_training_that_fails_leaves_the_process_to_itself(sources, tmp_path, tasks, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the process looks for the task, too

    class Fails(Callback):
        def on_train_batch_end(self, trainer, *_):
            raise RuntimeError("as it happens")

    beside, processes = EvaluateCheckpoints(["words.yaml"]), []

    class Keep(Callback):
        def on_train_batch_start(self, *_):
            processes.append(beside._process)

    run = describe(tmp_path / "run", sources)
    with pytest.raises(RuntimeError, match="as it happens"):
        fit(run, sources, 2, CheckpointRotation(every=1), beside, Keep(), Fails(), Events())
    assert processes[0].wait(120) == 0
    assert "evaluation_failed" not in (run / "events.jsonl").read_text()


class Killed(Callback):
    """Dies as a process does that is killed."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_when_training_is_killed_the_process_ends_too(sources, tmp_path, tasks):
    run = describe(tmp_path / "run", sources)
    line = [sys.executable, __file__, str(run), str(sources), tasks[0]]
    paths = [str(Path(__file__).parents[i]) for i in (0, 1, 2)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    training = subprocess.run(line, env=environment)
    assert training.returncode == -signal.SIGKILL
    pid = int((run / "pid").read_text())
    deadline = time.monotonic() + 60
    while running(pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not running(pid)
    assert [row.model for row in Results(run).rows()] == ["run@1"], (run / LOG).read_text()


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


if __name__ == "__main__":
    run, sources, task = sys.argv[1:]
    beside = EvaluateCheckpoints([task])

    class Tell(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            Path(run, "pid").write_text(str(beside._process.pid))

    fit(Path(run), Path(sources), 9, beside, Tell(), CheckpointRotation(every=1), Killed())
