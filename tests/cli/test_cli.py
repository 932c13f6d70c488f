"""The command line as a user types it: what is built, what is written, what is refused."""

import os
import re
import signal
import subprocess
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import cli_parts
import pytest
import torch
import yaml
from command_lines import (
    TRAIN,
    build,
    fit,
    named_callbacks,
    root,  # noqa: F401
)

from smol.checkpoints.store import FsspecStore
from smol.cli import main, parse_command_line
from smol.errors import TemporaryError, UserError
from smol.lightning_cli import SmolCLI, WriteConfig, _format_warning


class TestBuild:
    def test_types_reach_their_classes(self) -> None:
        cli = build()
        assert cli.model.decoder == cli_parts.Decoder(hidden_size=8, layers=1)
        assert cli.model.attention.window == 5
        assert cli.model.lr == 0.25
        assert cli.datamodule.stages == {
            "stage1": cli_parts.Stage(64),
            "stage2": cli_parts.Stage(128, {"web": 0.5, "code": 0.5}),
        }
        assert cli.trainer.global_step == 0

    def test_a_variable_changes_all_that_names_it_and_nothing_else(self) -> None:
        cli = build("--vars.hidden", "40")
        assert cli.model.decoder.hidden_size == 40
        assert cli.datamodule.stages["stage2"].context_length == 640
        assert cli.model.lr == 0.25
        assert cli.settings.vars == {"hidden": 40, "inner": {"rate": 0.25}}

    def test_an_interpolation_may_stand_in_a_flag(self) -> None:
        assert build("--model.decoder.layers", "${add:${vars.hidden},1}").model.decoder.layers == 9

    @pytest.mark.parametrize("place", range(3))
    def test_a_flag_wins_in_any_place(self, root: Path, place: int) -> None:
        (root / "over.yaml").write_text("vars: {hidden: 16}\nmodel: {init_args: {lr: 0.5}}")
        files = [["--config", "run.yaml"], ["--config=over.yaml"]]
        files.insert(place, ["--vars.hidden", "12"])
        cli = main(["fit", *chain(*files)], run=False)
        assert (cli.model.decoder.hidden_size, cli.model.lr) == (12, 0.5)

    def test_one_stage_is_changed_removed_or_added(self) -> None:
        stages = build("--data.stages.stage2.context_length", "512").datamodule.stages
        assert stages["stage2"] == cli_parts.Stage(512, {"web": 0.5, "code": 0.5})
        assert stages["stage1"] == cli_parts.Stage(64)
        assert build("--data.stages.stage2", "null").datamodule.stages == {
            "stage1": cli_parts.Stage(64),
            "stage2": None,
        }
        added = build("--data.stages.stage3.mixture.maths", "1").datamodule.stages
        assert list(added) == ["stage1", "stage2", "stage3"]
        assert added["stage3"] == cli_parts.Stage(16, {"maths": 1.0})

    def test_swapping_a_class_drops_its_arguments(self, root: Path) -> None:
        assert build("--model.attention", "cli_parts.LinearAttention").model.attention.rank == 2
        (root / "over.yaml").write_text(
            "model: {init_args: {attention: {class_path: cli_parts.LinearAttention}}}"
        )
        model = build("--config", "over.yaml", "--model.attention.rank", "7").model
        assert type(model.attention) is cli_parts.LinearAttention
        assert model.attention.rank == 7

    def test_a_name_that_looks_like_a_number_is_a_name(self, root: Path) -> None:
        assert build("--name", "0012").run_folder == root / "runs" / "0012"


class TestCallbacks:
    def test_the_order_is_the_classes_and_not_the_files(self) -> None:
        assert named_callbacks(build()) == ["Guard", "Monitor", "Unordered", "Report"]

    def test_null_removes_by_flag_and_by_file(self, root: Path) -> None:
        assert "Guard" not in named_callbacks(build("--callbacks.guard", "null"))
        (root / "over.yaml").write_text("callbacks: {guard: null}")
        cli = build("--config", "over.yaml")
        assert named_callbacks(cli) == ["Monitor", "Unordered", "Report"]

    def test_null_then_set_again(self, root: Path) -> None:
        (root / "off.yaml").write_text("callbacks: {monitor: null}")
        (root / "on.yaml").write_text("callbacks: {monitor: {class_path: cli_parts.Monitor}}")
        on = build("--config", "off.yaml", "--config", "on.yaml")
        assert on.config_init.fit.callbacks["monitor"].every == 1  # 3 went with the null
        off = build("--config", "on.yaml", "--config", "off.yaml")
        assert off.config_init.fit.callbacks["monitor"] is None

    def test_one_argument_by_flag(self) -> None:
        for flag in ("--callbacks.monitor.every", "--callbacks.monitor.init_args.every"):
            assert build(flag, "9").config_init.fit.callbacks["monitor"].every == 9

    def test_swapped_and_added_by_flag(self) -> None:
        swapped = build("--callbacks.monitor", "cli_parts.Guard", "--callbacks.monitor.limit", "2")
        assert named_callbacks(swapped) == ["Guard", "Guard", "Unordered", "Report"]
        added = build("--callbacks.mine", "cli_parts.Guard", "--callbacks.mine.limit", "3.5")
        assert added.config_init.fit.callbacks["mine"].limit == 3.5


class TestRun:
    def test_fit_writes_what_was_run(self, root: Path) -> None:
        cli = fit("--vars.hidden", "4")
        assert cli.trainer.global_step == 2
        assert cli.run_folder == root / "runs" / "first"
        assert cli.trainer.default_root_dir == str(cli.run_folder)
        source = yaml.safe_load((cli.run_folder / "config.source.yaml").read_text())
        assert source["vars"]["hidden"] == 4
        assert source["model"]["init_args"]["decoder"] == {"hidden_size": "${vars.hidden}"}
        resolved = yaml.safe_load((cli.run_folder / "config.yaml").read_text())
        assert resolved["model"]["init_args"]["decoder"] == {"hidden_size": 4, "layers": 1}

    def test_what_was_written_runs_again(self, root: Path) -> None:
        first = fit("--model.lr", "1e-3")
        for file in ("config.yaml", "config.source.yaml"):
            again = main(["fit", "--config", str(first.run_folder / file), "--name", "again"])
            assert torch.equal(again.model.weight, first.model.weight)
            assert again.config_dump | {"name": "first"} == first.config_dump

    def test_a_config_that_differs_is_kept(self, root: Path) -> None:
        folder = fit().run_folder
        first = (folder / "config.yaml").read_text()
        fit()
        assert not (folder / "config.1.yaml").exists()
        fit("--model.lr", "0.5")
        second = (folder / "config.yaml").read_text()
        fit("--model.lr", "0.75")
        kept = [(folder / f"config.{n}.yaml").read_text() for n in (1, 2)]
        assert kept == [first, second]
        assert "lr: 0.75" in (folder / "config.yaml").read_text()

    def test_what_concerns_programmers_keeps_its_place_in_the_code(self) -> None:
        warning = DeprecationWarning("old")
        text = _format_warning(warning, DeprecationWarning, "file.py", 7)
        assert text.startswith("file.py:7: ")
        assert _format_warning(UserWarning("a\nb"), UserWarning, "file.py", 7) == "warning: a b\n"

    def test_only_the_first_rank_writes(self, root: Path) -> None:
        cli = build()
        for zero in (False, True):
            trainer = SimpleNamespace(is_global_zero=zero, fast_dev_run=False)
            WriteConfig(cli).setup(trainer, cli.model, "fit")
            assert (root / "runs" / "first" / "config.yaml").exists() is zero

    def test_print_config_goes_round(self, root: Path, capsys: pytest.CaptureFixture) -> None:
        with pytest.raises(SystemExit) as stop:
            fit("--vars.hidden", "4", "--print_config")
        assert stop.value.code == 0
        printed = capsys.readouterr().out
        (root / "printed.yaml").write_text(printed)
        with pytest.raises(SystemExit):
            main(["fit", "--config", "printed.yaml", "--print_config"])
        assert capsys.readouterr().out == printed
        assert not (root / "runs").exists()
        again = main(["fit", "--config", "printed.yaml"])
        assert torch.equal(again.model.weight, fit("--vars.hidden", "4").model.weight)

    def test_a_given_root_dir_stays(self, root: Path) -> None:
        cli = build("--trainer.default_root_dir", "elsewhere")
        assert Path(cli.trainer.default_root_dir).name == "elsewhere"

    def test_validate_needs_no_name(self, root: Path) -> None:
        cli = main(["validate", "--config", "run.yaml", "--name", "null"])
        assert cli.trainer.callback_metrics["weight"] == 0
        assert not (root / "runs").exists()

    def test_what_a_checkpoint_says_overrides_nothing(self, root: Path) -> None:
        cli = fit()
        cli.trainer.save_checkpoint("last.ckpt")
        saved = torch.load("last.ckpt", weights_only=False)["hyper_parameters"]
        assert saved["lr"] == 0.25
        resumed = fit("--ckpt_path", "last.ckpt", "--model.lr", "0.5", "--trainer.max_steps", "3")
        assert resumed.model.lr == 0.5
        assert resumed.trainer.global_step == 3

    def test_the_checkpoint_comes_from_its_resolver(self, root: Path) -> None:
        trained = fit()
        trained.trainer.save_checkpoint("last.ckpt")

        class Resolving(SmolCLI):
            def resolve_checkpoint(self) -> str:
                return str(self.settings.ckpt_path).replace("newest", "last")

        words = ["validate", "--config", "run.yaml", "--ckpt_path", "newest.ckpt"]
        cli = Resolving(parse_command_line(words))
        assert torch.equal(cli.model.weight, trained.model.weight)

    @pytest.mark.parametrize(
        ("words", "steps", "expected"),
        [
            ("", [], "stopped at step 0, before the first checkpoint"),
            ("", [1, 7], "stopped at step 0; type the same command to go on from {newest}"),
            (
                "--ckpt_path scratch",
                [7],
                "stopped at step 0; type the same command without --ckpt_path to go on from "
                "{newest}",
            ),
        ],
    )
    def test_ctrl_c_is_one_line_and_status_130(
        self, root: Path, capsys: pytest.CaptureFixture, words: str, steps: list, expected: str
    ) -> None:
        class Fresh(SmolCLI):
            def resolve_checkpoint(self) -> None:
                return None

        store = FsspecStore(root / "runs" / "first" / "checkpoints")
        saved = [store.save(step, lambda folder: None, {}) for step in steps]
        handler = signal.getsignal(signal.SIGINT)
        line = ["fit", "--config", "run.yaml", "--model.fail", "interrupt", *words.split()]
        try:
            with pytest.raises(SystemExit) as stop:
                Fresh(parse_command_line(line))
        finally:
            signal.signal(signal.SIGINT, handler)  # Lightning ignores it from then on
        assert stop.value.code == 130
        newest = saved[-1].location if saved else None
        assert capsys.readouterr().err == expected.format(newest=newest) + "\n"

    def test_sigterm_that_nothing_answers_is_no_success(
        self, root: Path, capsys: pytest.CaptureFixture
    ) -> None:
        with pytest.raises(SystemExit) as stop:
            main(["fit", "--config", "run.yaml", "--model.fail", "terminate"])
        assert stop.value.code == 143
        said = capsys.readouterr().err.splitlines()[-1]
        assert re.fullmatch("SIGTERM: stopped at step \\d, before the first checkpoint", said)


class TestProcess:
    """What only a process of its own can show: status, standard error, imports."""

    @staticmethod
    def run(*words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), **env}
        words = (sys.executable, *words)
        return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)

    def test_from_another_folder(self, root: Path) -> None:
        away = root / "away"
        away.mkdir()
        done = self.run(TRAIN, "fit", "--config", "run.yaml", cwd=away)
        assert done.returncode == 0, done.stderr
        assert (root / "runs" / "first" / "config.yaml").is_file()
        assert not any(away.iterdir())

    def test_a_mistake_is_one_line_and_status_two(self, root: Path) -> None:
        done = self.run(TRAIN, "fit", "--config", "run.yaml", "--trainer.max_stepz=1", cwd=root)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr == (
            "error: --trainer.max_stepz: unknown key 'max_stepz'. Did you mean 'max_steps'?\n"
        )

    def test_a_reader_of_help_may_stop_early(self, root: Path) -> None:
        script = f"{sys.executable} {TRAIN} fit --help | head -1"
        done = subprocess.run(["sh", "-c", script], cwd=root, capture_output=True, text=True)
        assert done.stdout.startswith("usage: train.py")
        assert done.stderr == ""

    def test_a_warning_is_one_line(self, root: Path) -> None:
        (root / "over.yaml").write_text("vars: {hiden: 3}\ncallbacks: {gaurd: null}")
        words = ("--config", "run.yaml", "--config", "over.yaml", "--print_config")
        done = self.run(TRAIN, "fit", *words, cwd=root)
        assert done.returncode == 0
        assert done.stderr.splitlines() == [
            "warning: vars.hiden (over.yaml): no file reads 'vars.hiden'. Did you mean 'hidden'?",
            "warning: callbacks.gaurd (over.yaml): there is no 'gaurd' to remove. "
            "Did you mean 'guard'?",
        ]

    def test_help_imports_next_to_nothing(self, root: Path) -> None:
        script = (
            "import runpy, sys\n"
            "sys.argv = ['train.py', *sys.argv[2:]]\n"
            f"try: runpy.run_path({TRAIN!r}, run_name='__main__')\n"
            "finally: print(*sys.modules, file=sys.stderr)"
        )
        done = self.run("-c", script, "--", "--help", cwd=root)
        assert done.returncode == 0
        assert done.stdout.startswith("usage: train.py COMMAND --config FILE")
        heavy = {"torch", "lightning", "transformers", "litdata", "jsonargparse", "smol.data"}
        assert not heavy & set(done.stderr.split())

        done = self.run("-c", script, "--", "fit", "--help", cwd=root)
        assert done.returncode == 0
        assert "--trainer.max_steps" in done.stdout
        assert not {"litdata", "datasets", "smol.data", "callbacks"} & set(done.stderr.split())


@pytest.mark.parametrize(
    ("kind", "status", "ends"), [(TemporaryError, 75, False), (UserError, 2, True)]
)
def test_what_may_pass_by_itself_does_not_end_torchrun(
    monkeypatch, capsys, kind, status, ends
) -> None:
    def fail(*_):
        raise kind("the store is away")

    killed = []
    monkeypatch.setattr("smol.cli.parse_command_line", fail)
    monkeypatch.setattr("smol.cli.os.kill", lambda *words: killed.append(words))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == status
    assert killed == ([(os.getppid(), signal.SIGTERM)] if ends else [])
    assert capsys.readouterr().err == "error: the store is away\n"
