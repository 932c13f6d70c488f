"""Every mistake is one line with the name that was meant, and exit status 2."""

from itertools import chain, repeat
from pathlib import Path

import cli_parts
import pytest
from command_lines import (
    build,
    fit,
    line_of,
    root,  # noqa: F401
)

from smol.cli import main
from smol.errors import UserError

NO_KEY = "unknown key"


class TestRefused:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            # A misspelt key, at any depth.
            ("--trainer.max_stepz 5", f"{NO_KEY} 'max_stepz'. Did you mean 'max_steps'?"),
            ("--max_steps 5", f"{NO_KEY} 'max_steps'. Did you mean 'trainer.max_steps'?"),
            ("--calbacks.x null", f"{NO_KEY} 'calbacks'. Did you mean 'callbacks'?"),
            ("--model.decoder.hiden_size 6", f"{NO_KEY} 'hiden_size'. Did you mean 'hidden_size'?"),
            ("--model.attention.rank 6", f"{NO_KEY} 'rank', expected one of window"),
            ("--callbacks.monitor.init_args.evry 9", f"{NO_KEY} 'evry'. Did you mean 'every'?"),
            ("--data.stags.a 9", f"{NO_KEY} 'stags'. Did you mean 'stages'?"),
            (
                "--data.stages.stage1.contxt_length 9",
                f"{NO_KEY} 'contxt_length'. Did you mean 'context_length'?",
            ),
            # An unknown class.
            (
                "--model cli_parts.Modle",
                "unknown class 'cli_parts.Modle'. Did you mean 'cli_parts.Model'?",
            ),
            (
                "--model cli_part.Model",
                "unknown class 'cli_part.Model': no module 'cli_part'. Did you mean 'cli_parts'?",
            ),
            (
                "--trainer.logger lightning.pytorch.logers.CSVLogger",
                "unknown class 'lightning.pytorch.logers.CSVLogger': no module "
                "'lightning.pytorch.logers'. Did you mean 'lightning.pytorch.loggers'?",
            ),
            (
                "--callbacks.new Gard",
                "unknown class 'Gard', expected a full path as package.Gard. Did you mean 'Guard'?",
            ),
            ("--model.attention cli_parts.Guard", "'cli_parts.Guard' is no Attention"),
            ("--model.attention os.path.join", "'os.path.join' is no Attention"),
            ("--callbacks.new {}", "expected a class, got {} (dict)"),
            # A wrong type.
            ("--trainer.max_steps many", "expected int, got 'many' (str)"),
            ("--model.lr fast", "expected float, got 'fast' (str)"),
            ("--model.decoder.layers 1.5", "expected int, got 1.5 (float)"),
            ("--data.stages.stage2.mixture.web much", "expected float, got 'much' (str)"),
            ("--callbacks.guard 5", "expected Callback | null, got 5 (int)"),
            (
                "--callbacks.new.limit 5",
                "expected class_path and init_args, got {'limit': 5} (dict)",
            ),
            ("--data.stages.stage2.mixture 3", "expected dict[str, float] | null, got 3 (int)"),
            ("--data.stages.stage2.context_length abc", "expected int, got 'abc' (str)"),
            ("--trainer 3", "expected a mapping, got 3 (int)"),
            ("--vars 3", "expected a mapping, got 3 (int)"),
            ("--callbacks [3]", "expected a mapping, got [3] (list)"),
            # What has no effect.
            ("--vars.hiden 3", "no file reads 'vars.hiden'. Did you mean 'hidden'?"),
            ("--vars.inner.rat 3", "no file reads 'vars.inner.rat'. Did you mean 'inner.rate'?"),
            ("--vars.unlike 3", "no file reads 'vars.unlike'."),
            ("--callbacks.monitr null", "there is no 'monitr' to remove. Did you mean 'monitor'?"),
            ("--data.stages.stge1 null", "there is no 'stge1' to remove. Did you mean 'stage1'?"),
        ],
    )
    def test_flag(self, capsys: pytest.CaptureFixture, words: str, message: str) -> None:
        flag = words.split()[0]
        line = line_of(capsys, "--config", "run.yaml", *words.split())
        assert line == f"error: {flag}: {message}"

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ("", "model.init_args.attention.init_args.stride: missing, expected int"),
            ("--model.attention.stride null", "--model.attention.stride: expected int, got null"),
            (
                "--model.attention.stride 2 --model.attention.edge fold",
                "--model.attention.edge: expected 'wrap' | 'cut', got 'fold' (str)",
            ),
        ],
    )
    def test_required_and_chosen(
        self, capsys: pytest.CaptureFixture, words: str, message: str
    ) -> None:
        swap = ["--model.attention", "cli_parts.StridedAttention"]
        line = line_of(capsys, "--config", "run.yaml", *swap, *words.split())
        assert line == f"error: {message}"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("trainr: {}", "trainr (over.yaml): unknown key 'trainr'. Did you mean 'trainer'?"),
            (
                "model: {init_args: {decoder: {hiden_size: 3}}}",
                "model.init_args.decoder.hiden_size (over.yaml): "
                "unknown key 'hiden_size'. Did you mean 'hidden_size'?",
            ),
            (
                "model: {decoder: {hidden_size: 3}}",
                "model.decoder (over.yaml): unknown key 'decoder' beside class_path. "
                "Put 'decoder' under init_args.",
            ),
            (
                "callbacks: {monitor: {init_args: {every: often}}}",
                "callbacks.monitor.init_args.every (over.yaml): expected int, got 'often' (str)",
            ),
            (
                "data: {class_path: cli_parts.Date}",
                "data.class_path (over.yaml): unknown class 'cli_parts.Date'. "
                "Did you mean 'cli_parts.Data'?",
            ),
            (
                "model: {class_path: cli_parts.Model}\nmodel: {}",
                "over.yaml:2: bad YAML, duplicate key 'model'",
            ),
            (
                "model: {init_args: {lr: '${vars.iner.rate}'}}",
                "model.init_args.lr (over.yaml): '${vars.iner.rate}' names no key. "
                "Did you mean 'vars.inner.rate'?",
            ),
            ("trainer: 3", "trainer (over.yaml): expected a mapping, got 3 (int)"),
            ("data: {init_args: {required: {s: {}}}}",
             "data.init_args.required.s.length: missing, expected int"),
            ("data: {init_args: {required: {s: {length: null}}}}",
             "data.init_args.required.s.length (over.yaml): expected int, got null"),
            ("vars: null", "model.init_args.decoder.hidden_size (run.yaml): '${vars.hidden}' names "
             "no key. Did you mean 'vars'?"),
            ("trainer: {callback: {}}", "trainer.callback (over.yaml): unknown key 'callback'. "
             "Did you mean 'callbacks'?"),
            ("model: null", "no model is set; type --config FILE, as --config configs/stage1.yaml"),
            ("name: 12", "name (over.yaml): expected str | null, got 12 (int)"),
            *((f"name: {name}", f"name is '{name}', expected a folder name to put "
               "under runs_dir") for name in ("../up", "a/b", ".", "..", "/a")),
            ("name: ''", "name is '', expected a folder name to put under runs_dir"),
            ("trainer: {log_every_n_steps: 0}", "trainer.log_every_n_steps is 0, expected more "
             "than 0; type --trainer.logger false to log nothing"),
            ("trainer: {val_check_interval: 0}", "trainer.val_check_interval is 0, expected more "
             "than 0; type --trainer.limit_val_batches 0 to validate never"),
            ("trainer: {val_check_interval: -0.5}", "trainer.val_check_interval is -0.5, expected "
             "more than 0; type --trainer.limit_val_batches 0 to validate never"),
            ("name: null", "the run has no name; type --name NAME, or set name: in a config file"),
            ('name: "a\\nb"', r"name is 'a\nb', expected a folder name to put under runs_dir"),
            ("runs_dir: s3://b/runs", "runs_dir is 's3://b/runs', expected a local folder"),
            ("runs_dir: ''", "runs_dir is '', expected a local folder"),
            ("runs_dir: null", "runs_dir is '', expected a local folder"),
            ("init_from: ''", "init_from is empty, expected a name; for none type "
             "--init_from null"),
            ("trainer: {gradient_clip_val: -1}", "trainer.gradient_clip_val is -1, expected 0 or "
             "more, or null"),
            ("seed_everything: -1", "seed_everything is -1, expected 0 to 4,294,967,295"),
            ("data: {init_args: {stages: {stage2: {context_length: -2}}}}",
             "data.stages.stage2.context_length is -2, expected 1 or more"),
            ("runs_dir: /proc/there", "cannot make the run folder /proc/there/first: No such file "
             "or directory; type --runs_dir FOLDER with one that can be written to"),
            (
                "continues: one\ninit_from: two",
                "both continues ('one') and init_from ('two') are set, expected at most one; "
                "type --init_from null or --continues null",
            ),
        ],
    )  # fmt: skip
    def test_file(self, root: Path, capsys: pytest.CaptureFixture, text: str, message: str) -> None:
        (root / "over.yaml").write_text(text)
        line = line_of(capsys, "--config", "run.yaml", "--config", "over.yaml")
        assert line == f"error: {message}"

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ("fitt", "unknown command 'fitt', expected fit, validate, test, predict. "
             "Did you mean 'fit'?"),
            ("--config run.yaml", "no command; type one of fit, validate, test, predict after "
             "train.py"),
            ("fit run.yaml", "unexpected 'run.yaml' after 'fit'; a key needs --"),
            ("fit -x 3", "unexpected '-x'; flags begin with --"),
            ("fit --model.lr --config run.yaml", "--model.lr has no value; type --model.lr VALUE"),
            ("fit --name -c run.yaml", "--name has no value; type --name VALUE"),
            ("fit --hlep", "--hlep has no value; type --hlep VALUE. Did you mean '--help'?"),
            ("fit --data.stages [1", "--data.stages:1: bad YAML, expected ',' or ']', but got "
             "'<stream end>'"),
            ("fit --config rum.yaml", "config file 'rum.yaml' not found in {root}. "
             "Did you mean 'run.yaml'?"),
        ],
    )  # fmt: skip
    def test_command_line(
        self, root: Path, capsys: pytest.CaptureFixture, words: str, message: str
    ) -> None:
        command, *rest = words.split()
        line = line_of(capsys, *rest, command=command)
        assert line == f"error: {message.format(root=root)}"

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ("--model.refuse user", "the model is refused; type --model.refuse null"),
            ("--model.fail step", "the step failed; type --model.fail null"),
            ("--data.fail true", "row 0 is bad, got 1, expected 2"),
            ("--data.fail true --data.workers 1", "row 0 is bad, got 1, expected 2"),
            ("--trainer.accelerator quantum", "You selected an invalid accelerator name"),
            ("--trainer.devices many", "`devices` selected with `CPUAccelerator` should be an int"),
        ],
    )
    def test_mistakes_found_while_building_or_running(
        self,
        capsys: pytest.CaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
        words: str,
        message: str,
    ) -> None:
        with pytest.raises(SystemExit) as stop:
            fit(*words.split())
        assert stop.value.code == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"error: {message}")
        assert line == f"error: {message}" or words.startswith("--trainer")
        monkeypatch.setenv("SMOL_TRACEBACK", "1")
        with pytest.raises(UserError):
            fit(*words.split())

    def test_a_scalar_below_a_mapping_is_refused_too(
        self, root: Path, capsys: pytest.CaptureFixture
    ) -> None:
        (root / "base.yaml").write_text("trainer: 3")
        line = line_of(capsys, "--config", "base.yaml", "--config", "run.yaml")
        assert line == "error: trainer (base.yaml): expected a mapping, got 3 (int)"

    def test_a_bug_in_a_constructor_keeps_its_traceback(self) -> None:
        with pytest.raises(ValueError, match=r"^a mistake of the programmer's$") as error:
            build("--model.refuse", "bug")
        assert error.traceback[-1].path == Path(cli_parts.__file__)


class TestRanks:
    """Under several processes a mistake is told once."""

    def test_a_mistake_of_one_rank_is_told_by_it(
        self, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("LOCAL_RANK", "1")
        monkeypatch.setattr("smol.cli.PATIENCE_SECONDS", 3600)
        with pytest.raises(SystemExit) as stop:
            fit("--model.fail", "step")
        assert stop.value.code == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last == "error: rank 1: the step failed; type --model.fail null"

    @pytest.mark.parametrize(("ends", "told"), [(True, ""), (False, "error: rank 1: {message}")])
    def test_one_of_all_ranks_is_left_to_the_first(
        self,
        capsys: pytest.CaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
        ends: bool,
        told: str,
    ) -> None:
        monkeypatch.setenv("LOCAL_RANK", "1")
        monkeypatch.setattr("smol.cli.PATIENCE_SECONDS", 30 if ends else 0.3)
        parents = chain([7, 7, 7], repeat(1 if ends else 7))
        monkeypatch.setattr("os.getppid", lambda: next(parents))
        with pytest.raises(SystemExit) as stop:
            main(["fitt"])
        assert stop.value.code == 2
        expected = "fit, validate, test, predict. Did you mean 'fit'?"
        message = f"unknown command 'fitt', expected {expected}"
        assert capsys.readouterr().err.strip() == told.format(message=message)
