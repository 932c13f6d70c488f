"""The command line of decide.py: flags, questions, JSON, and the commands that it ends in."""

import importlib.util
import json
import shlex
from itertools import count

import pytest

from smol.cli import main as train
from smol.config import compose, unused
from smol.paths import project_root

SCRIPT = importlib.util.spec_from_file_location("decide", project_root() / "src" / "decide.py")
decide = importlib.util.module_from_spec(SCRIPT)
SCRIPT.loader.exec_module(decide)
PRETRAIN = "--goal research --prompting not_enough --fine_tuning not_enough"
SFT = "--goal product --prompting not_enough"


def run(words: str, capsys: pytest.CaptureFixture) -> str:
    assert decide.main(words.split()) == 0
    return capsys.readouterr().out


def test_flags_alone(capsys):
    page = run(f"{PRETRAIN} --model 3b --device h100 --devices 384 --price 2 --yes", capsys)
    assert page.startswith("Pretrain.\n  Why: ")
    assert "13,447" in page
    assert "configs/smollm3_3b/stage1.yaml" in page
    assert all(len(line) < 120 for line in page.splitlines() if "python" not in line)


def test_questions(capsys, monkeypatch):
    """Asks what matters, takes the default on enter, and asks again after a mistake."""
    answers = iter(["research", "not_enough", "perhaps", "", "135m"])
    asked = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or next(answers))
    assert decide.main([]) == 0
    assert "fine_tuning is 'perhaps'" in capsys.readouterr().out
    assert [line.split("?")[0] for line in asked] == [
        "What is it for",
        "Does prompting a model that exists do",
        "Does fine-tuning one do",
        "Does fine-tuning one do",
        "Which model: nano, 135m, 3b or a YAML file with model.init_args.decoder",
    ]


def test_flags_are_not_asked_for(capsys, monkeypatch):
    numbers = count()
    monkeypatch.setattr("builtins.input", lambda text: [next(numbers), ""][1])
    assert decide.main(["--goal", "learn", "--device", "h100", "--tokens", "3.5M"]) == 0
    assert next(numbers) == len(decide.QUESTIONS) - 5 - 3
    assert "3.5M" in capsys.readouterr().out


def test_json(capsys):
    content = json.loads(run(f"{PRETRAIN} --tokens 1.5e9 --team 3 --json", capsys))
    assert content["answers"]["tokens"] == 1.5e9
    assert content["verdict"] == "Pretrain."
    assert content["options"][0]["plan"]["total"] == sum(
        content["options"][0]["plan"]["parts"].values()
    )
    assert content["commands"][-1].startswith(
        "python src/train.py fit --config configs/stage1.yaml"
    )


@pytest.mark.parametrize(
    "words",
    [
        "--goal learn",
        "--goal learn --devices 2",
        f"{PRETRAIN} --model 135m --device rtx4090 --tokens 10B --context 1024",
        f"{PRETRAIN} --model 135m --device h100 --devices 8",
        f"{PRETRAIN} --model 3b",
        f"{PRETRAIN} --model 3b --device h200",
        f"{PRETRAIN} --model 3b --device h100 --devices 2 --micro_batch_tokens 4096",
        f"{PRETRAIN} --model 3b --device h100 --devices 8",
        f"{PRETRAIN} --model 3b --device h100 --devices 64",
        f"{PRETRAIN} --model 3b --device a100-40gb --devices 384",
        SFT,
        f"{SFT} --model 135m",
        f"{SFT} --model 3b",
    ],
)
def test_recommended_files_merge(words, capsys):
    content = json.loads(run(f"{words} --json", capsys))
    for command in content["commands"]:
        _, script, *rest = shlex.split(command)
        assert (project_root() / script).is_file()
        if script != "src/train.py":
            continue
        assert rest.pop(0) == "fit"
        pairs = list(zip(rest[::2], rest[1::2], strict=True))
        files = [value for name, value in pairs if name == "--config"]
        flags = {name.removeprefix("--"): value for name, value in pairs if name != "--config"}
        merged = compose(files, flags)
        assert list(unused(merged)) == []
        assert {"trainer", "model", "data", "name"} <= merged.values.keys()


def test_recommended_command_parses(capsys):
    """One with most of the flags; every file alone is built in test_shipped_configs."""
    words = f"{PRETRAIN} --model 3b --device h100 --devices 2 --tokens 1T --context 8192 --json"
    content = json.loads(run(words, capsys))
    assert len(content["flags"]) >= 7
    *_, command = content["commands"]
    with pytest.raises(SystemExit) as stop:
        train([*shlex.split(command)[2:], "--print_config"])
    assert stop.value.code in (0, None)
    assert f"max_steps: {content['flags']['--trainer.max_steps']}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--tokens many", "error: tokens is 'many'; expected a number, as 4096, 2.4M, 100B or 11T"),
        ("--devices 1.5", "error: devices is '1.5'; expected a whole number"),
        ("--devices 0", "error: devices is 0; expected more than 0"),
        ("--device gtx", "error: device 'gtx' is unknown; expected cpu, a100, a100-40gb, b200,"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys):
    assert decide.main([*words.split(), "--yes"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message)


def test_nobody_answers(capsys, monkeypatch):
    def end(text: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    assert decide.main([]) == 2
    assert capsys.readouterr().err.strip() == "error: no answer; --yes takes the defaults"
