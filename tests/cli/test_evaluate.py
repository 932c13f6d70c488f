"""The command line of evaluate.py: tables, files, going on, and mistakes."""

import io
import json
import shutil
from pathlib import Path

import pytest
import yaml
from tiny import WORDS, make_data, make_module, make_trainer
from warm_python import python

from callbacks import CheckpointRotation
from smol.errors import UserError
from smol.evaluation.command import main
from smol.evaluation.measure import measure
from smol.evaluation.results import Results

SCRIPT = Path(__file__).parents[2] / "src" / "evaluate.py"
RECORDS = [
    {"q": f"the {a} and", "options": [b, c], "gold": i % 2}
    for i, (a, b, c) in enumerate(zip(WORDS, WORDS[3:], WORDS[7:], strict=False))
]
TASK = """
kind: cloze
data: {data}
prompt: "{{{{ q }}}}"
choices: options
answer: gold
"""


def train(folder: Path, sources: Path, steps: int) -> Path:
    """A run as the command line leaves it: checkpoints, and a configuration with a tokenizer."""
    trainer = make_trainer(folder, steps, callbacks=[CheckpointRotation(every=1, keep=2)])
    trainer.fit(make_module(), make_data(sources))
    config = {"data": {"init_args": {"tokenizer": str(sources / "tokenizer")}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def trained(sources, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return train(folder / "short", sources, 1), train(folder / "long", sources, 3)


@pytest.fixture
def runs(trained, tmp_path, monkeypatch):
    """Copies of two runs, in the working directory; and a task."""
    for run in trained:
        shutil.copytree(run, tmp_path / "runs" / run.name)
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    (tmp_path / "words.yaml").write_text(TASK.format(data=tmp_path / "words.jsonl"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SMOL_ROOT", str(tmp_path))
    shutil.copytree(SCRIPT.parents[1] / "configs" / "tasks", tmp_path / "configs" / "tasks")
    return tmp_path


def test_runs_side_by_side(runs, capsys):
    assert main(["runs/short", "runs/long", "--tasks", "words.yaml"]) == 0
    out, err = capsys.readouterr()
    header, ruler, *lines = out.splitlines()
    assert header.split() == "| task | metric | items | short@1 | long@3 |".split()
    assert set(ruler) == set("|- ")
    assert [line.split()[3] for line in lines] == [
        "accuracy", "accuracy_per_byte", "accuracy_centred", "bits_per_byte",
    ]  # fmt: skip
    assert all(line.split()[5] == str(len(RECORDS)) for line in lines)
    assert "wrote runs/long/evaluation.json" in err.replace(f"{runs}/", "")
    for name in ("short", "long"):
        (row,) = json.loads((runs / "runs" / name / "evaluation.json").read_text())["results"]
        accuracy = row["metrics"]["accuracy"]
        assert 0 <= accuracy["low"] <= accuracy["value"] <= accuracy["high"] <= 1
        assert f"{accuracy['value']:.3f} [{accuracy['low']:.3f}" in out
        table = (runs / "runs" / name / "evaluation.md").read_text()
        assert row["model"] in table


def test_what_is_there_is_not_measured_again(runs, capsys, monkeypatch):
    line = ["runs/long", "--tasks", "words.yaml", "--out", "there", "--limit", "4"]
    assert main(line) == 0
    first = capsys.readouterr()
    monkeypatch.setattr("smol.evaluation.measure.measure", lambda *_: pytest.fail("measured"))
    assert main(line) == 0
    again = capsys.readouterr()
    assert again.out == first.out
    assert "words is there already" in again.err
    monkeypatch.setattr("smol.evaluation.measure.measure", measure)
    assert main([*line[:-1], "3"]) == 0  # another limit, another result
    assert "is there already" not in capsys.readouterr().err
    with open("words.jsonl", "a") as data:
        data.write(json.dumps(RECORDS[0]) + "\n")
    assert main([*line[:-1], "3"]) == 0  # so with other records
    assert "is there already" not in capsys.readouterr().err
    assert main([*line[:-1], "3", "--force"]) == 0
    assert "is there already" not in capsys.readouterr().err
    rows = Results(runs / "there").rows()
    assert [row.settings for row in rows] == [{"limit": 4}, {"limit": 3}]  # neither is lost
    header = (runs / "there" / "evaluation.md").read_text().splitlines()[0].split(" | ")
    assert [cell.strip(" |") for cell in header[3:]] == ["long@3 limit=4", "long@3 limit=3"]


def test_models_of_one_name_do_not_replace_each_other(runs, capsys):
    for name in ("short", "long"):
        shutil.copytree(runs / "runs" / name, runs / name / "run")
        checkpoint = next((runs / name / "run" / "checkpoints").glob("step-00000001-*"), None)
        for other in (runs / name / "run" / "checkpoints").glob("step-*"):
            if checkpoint is None or other != checkpoint:
                other.rename(other.with_name(other.name.replace(other.name[:13], "step-00000001")))
        assert main([f"{name}/run", "--tasks", "words.yaml", "--out", "there"]) == 0
    rows = Results(runs / "there").rows()
    assert len(rows) == 2
    assert {row.model for row in rows} == {"run@1"}
    header = (runs / "there" / "evaluation.md").read_text().splitlines()[0]
    assert all(f"run@1 #{row.weights[:8]}" in header for row in rows)


def test_a_changed_description_or_tokenizer_is_another_model(runs):
    from smol.evaluation.model_folder import ModelFolder

    names = ("config.json", "decoder.json", "model.safetensors", "tokenizer.json")
    for name in (*names, "tokenizer_config.json", "chat_template.jinja"):
        seen = set()
        for text in ("{}", "{ }"):
            (runs / name).write_text(text)
            seen.add(ModelFolder(runs, runs, runs, "m", runs, True).fingerprint)
        assert len(seen) == 2, name


@pytest.mark.parametrize("text", ['{"mine": [1]}', "[]", '{"results": [{"model": "a"}]}', "{"])
def test_a_file_that_is_not_ours_stays(runs, capsys, text):
    (runs / "other").mkdir()
    (runs / "other" / "evaluation.json").write_text(text)
    assert main(["runs/long", "--tasks", "words.yaml", "--out", "other"]) == 2
    err = capsys.readouterr().err
    assert "other/evaluation.json is damaged or no file of results (" in err
    assert err.count("\n") == 1
    assert (runs / "other" / "evaluation.json").read_text() == text


def test_an_interrupted_evaluation_goes_on_at_the_next_task(runs, capsys, monkeypatch):
    done = []

    def once(task, *rest):
        if done:
            raise KeyboardInterrupt
        done.append(task.name)
        return measure(task, *rest)

    (runs / "more.yaml").write_text((runs / "words.yaml").read_text())
    monkeypatch.setattr("smol.evaluation.measure.measure", once)
    line = ["runs/long", "--tasks", "words.yaml", "more.yaml"]
    assert main(line) == 130
    monkeypatch.setattr("smol.evaluation.measure.measure", measure)
    capsys.readouterr()
    assert main(line) == 0
    err = capsys.readouterr().err
    assert "words is there already" in err
    assert "more, " in err


def test_json_for_programs(runs, capsys):
    assert main(["runs/short", "--tasks", "words.yaml", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["model"], row["task"]) == ("short@1", "words")


def test_a_checkpoint_beside_an_exported_folder(runs, sources, capsys):
    from smol.checkpoints.huggingface import export_huggingface
    from smol.model.io import load_decoder
    from smol.runs import newest_checkpoint

    checkpoint = newest_checkpoint(runs / "runs" / "long")
    decoder = load_decoder(checkpoint)
    weights = decoder.state_dict()
    export_huggingface(decoder.config, decoder.rope, weights, "exported", sources / "tokenizer")
    line = [str(checkpoint), "exported", "--tasks", "words.yaml", "--json", "--out", "there"]
    assert main(line) == 0
    ours, exported = json.loads(capsys.readouterr().out)
    assert (ours["model"], exported["model"]) == ("long@3", "exported")
    assert exported["metrics"]["accuracy"]["items"] == ours["metrics"]["accuracy"]["items"]
    assert not (checkpoint / "evaluation.json").exists()


def test_watching_a_run_evaluates_every_checkpoint_and_ends_with_its_input(
    runs, capsys, monkeypatch
):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(["runs/long", "--tasks", "words.yaml", "--watch"]) == 0
    rows = Results(runs / "runs" / "long").rows()
    assert [row.model for row in rows] == ["long@2", "long@3"]


def test_watching_goes_on_after_a_checkpoint_that_fails(runs, capsys, monkeypatch):
    from smol.evaluation import runner

    evaluate_model, removed = runner.evaluate_model, runs / "runs" / "long" / "checkpoints"

    def fails_at_first(folder, settings):
        if folder.name == "long@2":
            raise RuntimeError("out of memory")
        return evaluate_model(folder, settings)

    monkeypatch.setattr(runner, "evaluate_model", fails_at_first)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(["runs/long", "--tasks", "words.yaml", "--watch"]) == 2
    assert "could not be evaluated: RuntimeError: out of memory" in capsys.readouterr().err
    assert [row.model for row in Results(runs / "runs" / "long").rows()] == ["long@3"]

    def removes(folder, settings):  # as the rotation does: the marker goes before the folder
        (folder.weights / "COMMITTED").unlink()
        raise UserError("no weights")

    monkeypatch.setattr(runner, "evaluate_model", removes)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(["runs/long", "--tasks", "words.yaml", "--watch"]) == 0
    assert "was removed before its turn (UserError)" in capsys.readouterr().err
    assert removed.is_dir()


def test_as_a_script(runs):
    done = python(SCRIPT, "runs/short", "--tasks", "words.yaml", "--limit", "2", cwd=runs)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| task")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("runs/long", "--tasks is missing: name some of arc_challenge, "),
        ("runs/long --tasks wrods", "no task 'wrods', expected the path of a YAML file or one of"),
        ("runs/lonk --tasks words.yaml", "runs/lonk is not there; expected a run's folder"),
        ("runs --tasks words.yaml", "runs is neither a decoder folder nor a run with a checkpoint"),
        ("runs/long --tasks words.yaml --limit 0", "--limit is 0, expected 1 or more"),
        ("runs/long --tasks words.yaml --limit x", "argument --limit: invalid int value: 'x'."),
        ("runs/long --tasks words.yaml --device abacus", "--device abacus cannot be used here ("),
        ("runs/long --taks words.yaml", "arguments: --taks words.yaml. Did you mean '--tasks'?"),
        ("runs/long --tasks words.yaml --mode maybe", "argument --mode: invalid choice: 'maybe'"),
        ("--tasks words.yaml", "the following arguments are required: MODEL."),
        ("runs/long --tasks gone.yaml", "gone.jsonl"),
        ("runs/long runs/short --tasks words.yaml --watch", "--watch looks after one run, 2 were"),
        ("runs/lonk --tasks words.yaml --watch", "runs/lonk is not there; expected a run's folder"),
        ("configs --tasks words.yaml --watch", "configs is no run's folder, expected checkpoints/"),
        ("runs/long --tasks words.yaml --out words.yaml", "words.yaml is or lies in a file, expe"),
        ("runs/long --tasks words.yaml --tokenizer .", ". has no tokenizer.json"),
        ("runs/long --tasks talk.yaml", "long@3 has no chat template, which task talk needs"),
        ("runs/long --tasks hub.yaml", "dataset nobody/nothing: cannot be loaded"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(runs, capsys, words, message):
    text = (runs / "words.yaml").read_text()
    (runs / "talk.yaml").write_text(text.replace("cloze", "chat") + "metric: exact_match")
    (runs / "gone.yaml").write_text(text.replace("words.jsonl", "gone.jsonl"))
    (runs / "hub.yaml").write_text("kind: cloze\ndata: hub:nobody/nothing\nprompt: a\nanswer: b")
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
