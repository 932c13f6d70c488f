"""Fine-tuning from the command line, as a user types it."""

import json
from pathlib import Path

import pytest
import yaml
from tiny import make_config

from smol.cli import main
from smol.data.chat import load_chat_template


@pytest.fixture(scope="module")
def config(sources, tmp_path_factory):
    """A tiny model on two sets of conversations, one in each mode."""
    folder = tmp_path_factory.mktemp("sft")
    for name, reasoning in (("think", "so"), ("no_think", None)):
        lines = [
            {
                "messages": [
                    {"role": "system", "content": "be a cat"},
                    {"role": "user", "content": f"the cat {'saw ' * i}"},
                    {"role": "assistant", "content": "one dog", "reasoning_content": reasoning},
                ]
            }
            for i in range(30)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    trainer = {"max_steps": 4, "log_every_n_steps": 1, "val_check_interval": 2}
    values = make_config(sources, trainer, {"cats": 1.0})
    values["name"] = "sft"
    values["data"] = {
        "class_path": "smol.data.Conversations",
        "init_args": {
            "tokenizer": str(sources / "tokenizer"),
            "context_length": 256,
            "global_batch_tokens": 512,
            "micro_batch_tokens": 256,
            "cache_dir": str(folder / "cache"),
            "subsets": {
                name: {"path": str(folder / f"{name}.jsonl"), "mode": name, "held_out": 0.3}
                for name in ("think", "no_think")
            },
        },
    }
    for name in ("EvalLoss", "SourceLedger", "CheckpointRotation"):
        values.setdefault("callbacks", {})[name] = {"class_path": f"callbacks.{name}"}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder / "config.yaml"


def fit(config: Path, folder: Path, *words: str):
    main(["fit", "--config", str(config), "--runs_dir", str(folder), *words])
    return folder / "sft"


def test_a_run_says_what_it_reads_and_keeps_its_template(config, tmp_path, caplog):
    run = fit(config, tmp_path)
    said = caplog.text
    assert "be a cat\n<|im_end|>\n<|im_start|>user\nthe cat" in said
    assert "«" in said
    assert "think 100%" in said
    assert "items in" in said
    template = load_chat_template(run / "tokenizer")
    assert template.tokenizer.backend.id_to_token(template.stop_id) == "<|im_end|>"
    sources = json.loads((run / "sources.json").read_text())
    assert set(sources) == {"think", "no_think"}
    assert 0 < sources["think"]["tokens"] < 4 * 512
    measured = json.loads((run / "loss_by_position.json").read_text())
    assert set(measured["after"]["sources"]) == {"think", "no_think"}


def test_a_run_goes_on_where_it_ended_and_in_no_other_order(config, tmp_path, capfd):
    whole = fit(config, tmp_path / "whole")
    fit(config, tmp_path / "parts", "--trainer.max_steps", "2")
    with pytest.raises(SystemExit):
        fit(config, tmp_path / "parts", "--data.init_args.seed", "7")
    assert "made with data.seed=6, the configuration says 7" in capfd.readouterr().err
    parts = fit(config, tmp_path / "parts")
    for name in ("sources.json", "loss_by_position.json"):
        a, b = (json.loads((run / name).read_text()) for run in (whole, parts))
        assert a == b


SUBSETS = "--data.init_args.subsets"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([f"{SUBSETS}.think.path", "no.jsonl"], "no.jsonl: no such file"),
        ([f"{SUBSETS}.think.mode", "no_think"], "think.jsonl:"),
        ([f"{SUBSETS}.think.mode", "thinks"], "mode is 'thinks', expected think, no_think, data"),
        ([f"{SUBSETS}.think.wieght", "2"], "Did you mean 'weight'?"),
        ([f"{SUBSETS}.think.messages", "mesages"], "has no column 'mesages'"),
        (["--data.init_args.context_length", "64"], "conversations are longer than a row of 64"),
        (["--data.init_args.global_batch_tokens", "700"], "is not a multiple of context_length"),
        (["--data.init_args.train_on", "user"], "data.train_on is 'user', expected assistant or"),
        (["--data.init_args.long", "cut"], "data.long is 'cut', expected drop or split"),
    ],
)
def test_mistakes_are_one_line(config, tmp_path, capfd, words, message):
    with pytest.raises(SystemExit) as stop:
        fit(config, tmp_path, *words)
    assert stop.value.code == 2
    said = capfd.readouterr().err.splitlines()
    assert said[-1].startswith("error: ")
    assert message in said[-1]
