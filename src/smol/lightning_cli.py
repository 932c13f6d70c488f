"""LightningCLI over layered configurations, with callbacks by name and a folder per run."""

import hashlib
import logging
import os
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, _InstantiatorFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from smol.checkpoints.replicas import RemoteRuns
from smol.checkpoints.store import FsspecStore
from smol.cli import CommandLine, rank, show
from smol.cli_errors import check_keys, explain
from smol.cli_help import key_help, overview
from smol.config import compose, dump_yaml, unused
from smol.errors import UserError
from smol.heartbeat import Heartbeat, is_launched
from smol.interpolation import interpolate
from smol.model.io import with_trained_context
from smol.parallel.processes import leave_groups_at_exit
from smol.paths import is_url, resolve
from smol.precision import choose_precision
from smol.restarts import TERMINATED, refuse_crash_loop
from smol.runs import CHECKPOINTS, find_start

DEFAULT_ORDER = 250  # guards 100, monitors 200, checkpoints 400, reports 500
DEFAULT_SEED = 42
MAX_SEED = 2**32 - 1  # NumPy's
LEAST = {  # of the data and of its stages
    "context_length": 1,
    "global_batch_tokens": 1,
    "micro_batch_tokens": 1,
    "start_step": 0,
    "start_tokens": 0,
}
_default_format = warnings.formatwarning


class SmolCLI(LightningCLI):
    """Parses a command line, builds model, data and trainer, and runs the command.

    Files, flags and interpolations are put together before Lightning's parser sees them
    (`smol.config`, `smol.interpolation`); that parser checks types and builds objects.

    Args:
        line: The command line, taken apart.
        run: Whether to run the command after building its objects.

    Attributes:
        source: The merged layers, interpolations kept (`smol.config.Config`).
        model: The LightningModule.
        datamodule: The LightningDataModule, or None.
        trainer: The Trainer.

    Raises:
        UserError: On any mistake in files or flags.
    """

    def __init__(self, line: CommandLine, run: bool = True):
        self.line = line
        self.run = run
        self._failure: Exception | None = None
        _quieten()
        super().__init__(
            pl.LightningModule,
            save_config_callback=None,  # see WriteConfig
            seed_everything_default=DEFAULT_SEED,
            parser_kwargs={"exit_on_error": False, line.command: {"exit_on_error": False}},
            subclass_mode_model=True,
            auto_configure_optimizers=False,
        )

    @property
    def settings(self) -> Namespace:
        """The checked arguments of the command: ``name``, ``trainer``, ``model``, ``vars``, …"""
        return self.config[self.line.command]

    @property
    def run_folder(self) -> Path:
        """Where the run keeps its files: ``runs_dir/name``, under the project root."""
        return Path(resolve(self.settings.runs_dir)) / (self.settings.name or "")

    def resolve_checkpoint(self) -> str | None:
        """The checkpoint that the command goes on from; weights to begin with go to the model."""
        settings = self.settings
        training = self.line.command == "fit" or settings.name is None
        stores = (getattr(callback, "remote", None) for callback in self.trainer.callbacks)
        start = find_start(
            self.run_folder,
            settings.ckpt_path,
            settings.continues,
            settings.init_from,
            training,
            next((store for store in stores if isinstance(store, RemoteRuns)), None),
        )
        rank_zero_info(f"{settings.name}: {start.reason}")
        if hasattr(self.model, "initial_weights"):
            self.model.initial_weights, self.model.lineage = start.weights, start.lineage
            self.model.rope_config = with_trained_context(
                self.model.rope_config, start.checkpoint or start.weights
            )
            config = dump_yaml(self.config_dump).encode()
            self.model.config_digest = hashlib.sha256(config).hexdigest()
        return None if start.checkpoint is None else str(start.checkpoint)

    def after_fit(self) -> None:
        """Say so if there was nothing left to do."""
        trainer = self.trainer
        if trainer.fit_loop.total_batch_idx < 0 and 0 <= trainer.max_steps <= trainer.global_step:
            rank_zero_info(
                f"{self.settings.name} has taken its {trainer.global_step:,} steps already; go on "
                "with a larger --trainer.max_steps, or begin anew with --ckpt_path scratch"
            )

    def subcommands(self) -> dict[str, set[str]]:
        """Only the command that was asked for: each costs time to set up."""
        return {self.line.command: super().subcommands()[self.line.command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what a run has besides its trainer, model and data."""
        add = parser.add_argument
        add("--name", type=str | None, default=None, help="Name of the run and of its folder.")
        add("--runs_dir", type=str, default="runs", help="Folder of all runs.")
        add("--continues", type=str | None, default=None, help="Run to go on from, state and all.")
        add("--init_from", type=str | None, default=None, help="Run to take the weights from.")
        add("--vars", type=dict, default={}, help="Values for ${vars.key} anywhere.")
        add("--callbacks", type=dict[str, pl.Callback | None], default={}, help="By name.")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Merge files and flags, interpolate, check; print the configuration if that is asked."""
        command = self.line.command
        self.source = compose(self.line.files, self.line.flags)
        if self.line.help:
            self._print_help(self._subcommand_parsers[command])
        for line in unused(self.source):
            rank_zero_warn(line)
        values = interpolate(self.source)
        choose_precision(values.get("trainer"))
        if not values.get("model"):
            raise UserError("no model is set; type --config FILE, as --config configs/stage1.yaml")
        known = self._subcommand_parsers[command]
        check_keys(values, known, self.source)
        try:
            # The parser writes into what it is given, and a mistake is told from the values.
            self.config = parser.parse_object({"subcommand": command, command: deepcopy(values)})
        except ArgumentError as error:
            raise UserError(explain(values, known, self.source, error)) from error
        self._check_run()
        if self.line.print_config:
            self._dump_config()
            show(dump_yaml(self.config_dump))
            raise SystemExit(0)

    def _print_help(self, parser: LightningArgumentParser) -> NoReturn:
        flag, *words = self.line.help
        if flag == "--help":
            (checkpoint,) = (action for action in parser._actions if action.dest == "ckpt_path")
            checkpoint.help = "auto, latest, folder or URL, or scratch to begin anew."
            show(f"{parser.format_help()}\n{overview()}")
        else:
            key = flag.removeprefix("--").removesuffix(".help")
            show(key_help(key, words[0] if words else None, self.source.values))
        raise SystemExit(0)

    def _check_run(self) -> None:
        settings, name = self.settings, self.settings.name
        if settings.continues and settings.init_from:
            raise UserError(
                f"both continues ('{settings.continues}') and init_from ('{settings.init_from}') "
                "are set, expected at most one; type --init_from null or --continues null"
            )
        if not settings.runs_dir or is_url(settings.runs_dir):
            raise UserError(f"runs_dir is '{settings.runs_dir or ''}', expected a local folder")
        for key in ("ckpt_path", "continues", "init_from"):
            if settings[key] == "":
                raise UserError(f"{key} is empty, expected a name; for none type --{key} null")
        if name is None and self.line.command == "fit" and not self.line.print_config:
            raise UserError("the run has no name; type --name NAME, or set name: in a config file")
        if name is not None and (name in ("", ".", "..") or "/" in name or not name.isprintable()):
            raise UserError(f"name is {name!r}, expected a folder name to put under runs_dir")
        for key, instead in {
            "log_every_n_steps": "--trainer.logger false to log nothing",
            "val_check_interval": "--trainer.limit_val_batches 0 to validate never",
            "check_val_every_n_epoch": "--trainer.limit_val_batches 0 to validate never",
        }.items():
            value = settings.trainer[key]
            if isinstance(value, int | float) and value <= 0:
                raise UserError(f"trainer.{key} is {value}, expected more than 0; type {instead}")
        clip = settings.trainer.gradient_clip_val
        if clip is not None and clip < 0:
            raise UserError(f"trainer.gradient_clip_val is {clip}, expected 0 or more, or null")
        parts = settings.trainer.accumulate_grad_batches
        if parts != 1 and "micro_batch_tokens" in (settings.get("data.init_args") or {}):
            raise UserError(
                f"trainer.accumulate_grad_batches is {parts}, but accumulation follows from "
                "data.global_batch_tokens; for more passes a step type --data.micro_batch_tokens "
                "with a smaller number"
            )
        seed = settings.seed_everything
        if seed is not None and not 0 <= seed <= MAX_SEED:
            raise UserError(f"seed_everything is {seed}, expected 0 to {MAX_SEED:,}")
        self._check_data()

    def _check_data(self) -> None:
        data = self.settings.get("data.init_args") or {}
        stages = {f"data.stages.{k}": s for k, s in (data.get("stages") or {}).items() if s}
        for place, values in {"data": data, **stages}.items():
            for key, least in LEAST.items():
                number = values.get(key)
                if number is not None and number < least:
                    raise UserError(f"{place}.{key} is {number}, expected {least} or more")

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration alone: Lightning would let a checkpoint's override it."""

    def _add_instantiators(self) -> None:
        """Let constructors keep their own errors, which the parser would wrap in its own."""
        # Lightning's own two record the hyper-parameters for checkpoints and loggers.
        model = partial(_InstantiatorFn(cli=self, key="model"), applied_instantiation_links={})
        data = partial(_InstantiatorFn(cli=self, key="data"), applied_instantiation_links={})
        self.parser.add_instantiator(self._remembering(model), pl.LightningModule)
        self.parser.add_instantiator(self._remembering(data), pl.LightningDataModule)
        self.parser.add_instantiator(self._remembering(lambda cls, /, **args: cls(**args)), object)

    def _remembering(self, construct: Callable[..., Any]) -> Callable[..., Any]:
        def build(cls: type, /, **arguments: Any) -> Any:
            try:
                return construct(cls, **arguments)
            except Exception as error:
                self._failure = error
                raise

        return build

    def before_instantiate_classes(self) -> None:
        """Count the starts of whoever starts this command again when it dies."""
        if self.run and self.line.command == "fit" and rank() == 0:
            refuse_crash_loop(self.run_folder, self.settings.ckpt_path)

    def instantiate_classes(self) -> None:
        """Build model, data, callbacks and trainer."""
        try:
            super().instantiate_classes()
        except UserError:
            raise
        except ValueError as error:
            raise self._failure or error from None

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build the trainer with the callbacks in the order of their classes."""
        config = {**self._get(self.config_init, "trainer"), **kwargs}
        if config["default_root_dir"] is None:
            config["default_root_dir"] = str(self.run_folder)
        named = self._get(self.config_init, "callbacks") or {}
        callbacks = [callback for callback in named.values() if callback is not None]
        callbacks.sort(key=lambda callback: getattr(callback, "order", DEFAULT_ORDER))
        if is_launched():
            callbacks.insert(0, Heartbeat())
        with _lightning_mistakes(MisconfigurationException, ValueError, TypeError, ImportError):
            return self._instantiate_trainer(config, [WriteConfig(self), *callbacks])

    def _run_subcommand(self, subcommand: str) -> None:
        if not self.run:
            return
        try:
            with _lightning_mistakes(MisconfigurationException):
                super()._run_subcommand(subcommand)
            leave_groups_at_exit()
        except SystemExit as stop:
            unsaved = isinstance(
                stop, SIGTERMException
            )  # which has no status: Lightning ends with 0
            if unsaved or stop.code == TERMINATED:
                leave_groups_at_exit()
            if unsaved:
                if rank() == 0:
                    print(f"SIGTERM: {self._interrupted()}", file=sys.stderr)
                raise SystemExit(TERMINATED) from None
            if not isinstance(stop.__context__, KeyboardInterrupt):
                raise
            if rank() == 0:
                print(self._interrupted(), file=sys.stderr)
            raise SystemExit(130) from None

    def _interrupted(self) -> str:
        """What to say after Ctrl-C, or a SIGTERM for which nothing was saved."""
        if self.line.command != "fit":
            return "stopped"
        said = f"stopped at step {self.trainer.global_step:,}"
        saved = FsspecStore(self.run_folder / CHECKPOINTS).list()
        if not saved:
            return f"{said}, before the first checkpoint"
        command = "the same command"
        if self.settings.ckpt_path is not None:
            command += " without --ckpt_path"
        return f"{said}; type {command} to go on from {saved[-1].location}"

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        kwargs["ckpt_path"] = self.resolve_checkpoint()
        if subcommand == "fit" and not self.trainer.fast_dev_run:
            self._make_run_folder()
        return kwargs

    def _make_run_folder(self) -> None:
        try:
            self.run_folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot make the run folder {self.run_folder}: {error.strerror}; type --runs_dir "
                "FOLDER with one that can be written to"
            ) from error


class WriteConfig(pl.Callback):
    """Writes what is run into the run folder when training starts.

    ``config.source.yaml`` has the files and flags merged, with their interpolations;
    ``config.yaml`` is checked, complete and can be run again. A ``config.yaml`` of an earlier
    start that differs is kept as ``config.1.yaml``, ``config.2.yaml``, …

    Args:
        cli: The command line whose configuration is written.
    """

    def __init__(self, cli: SmolCLI):
        self.cli = cli

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write both files, on the first rank, unless this is a ``fast_dev_run``."""
        if stage != "fit" or not trainer.is_global_zero or trainer.fast_dev_run:
            return
        folder = self.cli.run_folder
        folder.mkdir(parents=True, exist_ok=True)
        text = dump_yaml(self.cli.config_dump)
        file = folder / "config.yaml"
        if file.is_file() and file.read_text(encoding="utf-8") != text:
            used = (int(old.suffixes[0][1:]) for old in folder.glob("config.[0-9]*.yaml"))
            file.rename(folder / f"config.{max(used, default=0) + 1}.yaml")
        _write(file, text)
        _write(folder / "config.source.yaml", dump_yaml(self.cli.source.values))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on a mistake, such as a damaged chunk, may be one of this rank alone."""
        self.cli.line.started = True

    on_validation_start = on_test_start = on_predict_start = on_train_start


def _quieten() -> None:
    """Leave out what Lightning says of other products and of its own internals."""
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.formatwarning = _format_warning
    talk = ("💡", "TPU available", "`Trainer.fit` stopped", "\nDetected KeyboardInterrupt")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: not record.msg.startswith(talk))


def _format_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """What concerns the user is one line; what concerns programmers keeps its place in the code."""
    if issubclass(category, UserWarning) and os.environ.get("SMOL_TRACEBACK") != "1":
        return f"warning: {' '.join(str(message).split())}\n"
    return _default_format(message, category, filename, lineno, line)


@contextmanager
def _lightning_mistakes(*kinds: type[Exception]) -> Iterator[None]:
    """Tell what Lightning finds wrong with a configuration in one line."""
    try:
        yield
    except kinds as error:
        if isinstance(error, UserError):
            raise
        raise UserError(" ".join(str(error).split())) from error


def _write(file: Path, text: str) -> None:
    """Replace a file at once, so that a crash leaves the old one or the new one."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)
