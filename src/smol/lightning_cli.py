"""LightningCLI over layered configurations, with callbacks by name and a folder per run."""

import hashlib
import logging
import os
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, _InstantiatorFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from smol.cli import CommandLine
from smol.cli_errors import check_keys, explain
from smol.config import compose, dump_yaml
from smol.errors import UserError
from smol.interpolation import interpolate
from smol.paths import is_url, resolve
from smol.runs import find_start

DEFAULT_ORDER = 250  # guards 100, monitors 200, checkpoints 400, reports 500
DEFAULT_SEED = 42


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
        start = find_start(
            self.run_folder, settings.ckpt_path, settings.continues, settings.init_from, training
        )
        rank_zero_info(f"{settings.name}: {start.reason}")
        if hasattr(self.model, "initial_weights"):
            self.model.initial_weights, self.model.lineage = start.weights, start.lineage
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
        if self.line.help:
            _print_help(parser, [command, *self.line.help])
        self.source = compose(self.line.files, self.line.flags)
        values = interpolate(self.source)
        if not values.get("model"):
            raise UserError("no model is set; type --config FILE, as --config configs/stage1.yaml")
        known = self._subcommand_parsers[command]
        check_keys(values, known, self.source)
        try:
            self.config = parser.parse_object({"subcommand": command, command: values})
        except ArgumentError as error:
            raise UserError(explain(values, known, self.source, error)) from error
        self._check_run()
        if self.line.print_config:
            self._dump_config()
            print(dump_yaml(self.config_dump), end="")
            raise SystemExit(0)

    def _check_run(self) -> None:
        settings, name = self.settings, self.settings.name
        if settings.continues and settings.init_from:
            raise UserError(
                f"both continues ('{settings.continues}') and init_from ('{settings.init_from}') "
                "are set, expected at most one; type --init_from null or --continues null"
            )
        if is_url(settings.runs_dir):
            raise UserError(f"runs_dir is '{settings.runs_dir}', expected a local folder")
        if name is None and self.line.command == "fit" and not self.line.print_config:
            raise UserError("the run has no name; type --name NAME, or set name: in a config file")
        if name is not None and (not name or Path(name).is_absolute() or ".." in Path(name).parts):
            raise UserError(f"name is '{name}', expected a folder name to put under runs_dir")

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
        with _lightning_mistakes(MisconfigurationException, ValueError):
            return self._instantiate_trainer(config, [WriteConfig(self), *callbacks])

    def _run_subcommand(self, subcommand: str) -> None:
        if self.run:
            with _lightning_mistakes(MisconfigurationException):
                super()._run_subcommand(subcommand)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        return {**kwargs, "ckpt_path": self.resolve_checkpoint()}


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


def _quieten() -> None:
    """Leave out what Lightning says of other products and of its own internals."""
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    talk = ("💡", "TPU available", "`Trainer.fit` stopped")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: not record.msg.startswith(talk))


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


def _print_help(parser: LightningArgumentParser, words: list[str]) -> None:
    try:
        parser.parse_args(words)
    except ArgumentError as error:
        raise UserError(" ".join(str(error).split())) from None
    raise SystemExit(0)
