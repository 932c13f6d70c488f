"""Help finds what there is to choose from, without importing it."""

import lightning.pytorch as pl
import pytest
from command_lines import (
    line_of,
    root,  # noqa: F401
)
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy

import callbacks
import smol.data
import smol.experiments
import smol.modules
import smol.optim
import smol.parallel
from smol.cli import main
from smol.cli_help import PLACES, classes, overview

BASES = {
    "model": (smol.modules, pl.LightningModule),
    "model.schedule": (smol.optim, smol.optim.Schedule),
    "data": (smol.data, pl.LightningDataModule),
    "callbacks.NAME": (callbacks, pl.Callback),
    "trainer.logger": (smol.experiments, Logger),
    "trainer.strategy": (smol.parallel, Strategy),
}
ABSTRACT = {smol.modules.DecoderModule, smol.optim.Schedule}


def printed(capsys: pytest.CaptureFixture, *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *words])
    assert stop.value.code == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("key", BASES)
def test_what_is_parsed_is_what_is_imported(key: str) -> None:
    package, base = BASES[key]
    expected = {}
    for name in package.__all__:
        cls = getattr(package, name)
        if isinstance(cls, type) and issubclass(cls, base) and cls not in ABSTRACT:
            expected[f"{package.__name__}.{name}"] = cls.__doc__.strip().splitlines()[0]
    assert classes(key) == expected
    assert expected


def test_every_place_is_tested() -> None:
    assert BASES.keys() == PLACES.keys()


def test_the_page_lists_classes_and_configurations(
    root, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (root / "configs" / "mine").mkdir(parents=True)
    (root / "configs" / "mine" / "run.yaml").write_text("# My run.\nname: mine\n")
    (root / "configs" / "empty.yaml").write_text("")
    (root / "configs" / "tasks").mkdir()
    (root / "configs" / "tasks" / "one.yaml").write_text("# Of evaluate.py.\n")
    rows = {line.split()[0]: line.split()[1:] for line in overview().splitlines() if line}
    assert rows["configs/mine/run.yaml"] == ["My", "run."]
    assert rows["configs/empty.yaml"] == []
    assert "configs/tasks/one.yaml" not in rows
    assert rows["callbacks.CheckpointRotation"][:3] == ["Saves", "checkpoints", "to"]
    whole = printed(capsys, "--help")
    assert "--trainer.max_steps" in whole
    assert "callbacks.CheckpointRotation" in whole
    assert "scratch to begin anew" in whole


class TestKeys:
    @pytest.mark.parametrize("words", ["--model.help LanguageModeling",
                                       "--model.help=smol.modules.LanguageModeling"])  # fmt: skip
    def test_of_a_class_with_the_texts_of_its_fields(
        self, capsys: pytest.CaptureFixture, words: str
    ) -> None:
        text = printed(capsys, *words.split())
        assert "--model.z_loss Z_LOSS Coefficient of the z-loss" in text
        fields = (
            "--model.decoder.hidden_size HIDDEN_SIZE Width of the residual stream.",
            "--model.rope.theta THETA Base of the frequencies.",
            "--model.optimizer.learning_rate LEARNING_RATE Peak learning rate",
        )
        for field in fields:
            assert text.count(field) == 1
        assert ".help" not in text

    def test_of_the_class_that_the_configuration_sets(self, capsys: pytest.CaptureFixture) -> None:
        config = ("--config", "run.yaml")
        assert "--model.decoder.layers" in printed(capsys, *config, "--model.help")
        assert "--model.decoder.layers" in printed(capsys, *config, "--model.decoder.help")
        assert "--model.attention.window" in printed(capsys, *config, "--model.attention.help")
        assert "--callbacks.monitor.every" in printed(capsys, *config, "--callbacks.monitor.help")

    @pytest.mark.parametrize(
        ("flag", "expected"),
        [
            ("--model.help", "smol.modules.LanguageModeling"),
            ("--callbacks.help", "callbacks.CheckpointRotation"),
            ("--callbacks.mine.help", "callbacks.CheckpointRotation"),
            ("--model.schedule.help", "smol.optim.WSD"),
        ],
    )
    def test_or_else_the_classes_to_choose_from(
        self, capsys: pytest.CaptureFixture, flag: str, expected: str
    ) -> None:
        text = printed(capsys, flag)
        assert text.startswith("classes for --")
        assert f" {expected} " in text

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (
                "--model.help LanguagModeling",
                "--model.help: unknown class 'LanguagModeling', expected a full path as "
                "package.LanguagModeling. Did you mean 'LanguageModeling'?",
            ),
            (
                "--callbacks.help callbacks.Chekpoint",
                "--callbacks.NAME.help: unknown class 'callbacks.Chekpoint'. "
                "Did you mean 'callbacks.CheckpointRotation'?",
            ),
            ("--model.help os.path.join", "--model.help: 'os.path.join' is no class"),
            (
                "--config run.yaml --name.help",
                "no class is known for --name; type --name.help CLASS, or --help for all keys",
            ),
            (
                "--nosuch.help",
                "no class is known for --nosuch; type --nosuch.help CLASS, or --help for all keys",
            ),
        ],
    )
    def test_a_mistake_is_one_line(
        self, capsys: pytest.CaptureFixture, words: str, message: str
    ) -> None:
        assert line_of(capsys, *words.split()) == f"error: {message}"
