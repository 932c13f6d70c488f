"""Lightning's checkpoints in this project's format, without pickle."""

import glob
import os
import shutil
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fsspec.implementations.local import LocalFileSystem
from lightning.pytorch.plugins.io import CheckpointIO

from smol.checkpoints.format import fsync, open_checkpoint, read_checkpoint
from smol.checkpoints.manifest import Write
from smol.checkpoints.store import MARKER_FILE, committed, read_manifest, verify_files
from smol.checkpoints.together import on_all_ranks, save_together
from smol.errors import UserError

MANIFEST_KEY = "manifest"
"""Entry of a checkpoint whose items become fields of its manifest (tokens, lineage, parent...)."""

# The run's folder holds its configuration; in a checkpoint it could only contradict it.
HYPER_PARAMETERS = (
    *("hyper_parameters", "hparams_name", "hparams_type"),
    *("datamodule_hyper_parameters", "datamodule_hparams_name", "datamodule_hparams_type"),
)


class SafeCheckpointIO(CheckpointIO):
    """Writes a checkpoint as a committed folder of safetensors and JSON, and verifies it on load.

    ``trainer.save_checkpoint(folder)`` and ``trainer.fit(model, ckpt_path=folder)`` work with it as
    with Lightning's own files. Hyper-parameters of modules are not written.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint next to its place and rename it into it.

        A folder that is already there is replaced. The two renames of a replacement are not one: a
        crash between them leaves the old folder under a name that starts with a dot.

        Args:
            checkpoint: Lightning's checkpoint. One with sharded tensors is saved by all processes,
                each of which writes its own shards; any other by the first.
            path: A local folder.
            storage_options: Must be None.

        Raises:
            UserError: If an entry cannot be stored, by key path, or if ``path`` is a URL.
            NonFiniteError: If a weight or a moment is infinite or not a number.
        """
        if storage_options is not None:
            raise UserError("storage_options are not supported: checkpoints go to local folders")
        path = _local(path)
        metadata = {"world_size": dist.get_world_size() if dist.is_initialized() else 1}
        metadata |= checkpoint.get(MANIFEST_KEY, {})
        checkpoint = {k: v for k, v in checkpoint.items() if k not in HYPER_PARAMETERS}

        step = checkpoint.get("global_step", 0)
        save_together(checkpoint, lambda write: _replace(path, step, write, metadata))

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: torch.device | str | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Verify a checkpoint's folder against its manifest and read it.

        Args:
            path: A local folder.
            map_location: Device of the tensors; None for the CPU.
            weights_only: Of no effect; reading never runs code.

        Returns:
            The checkpoint.

        Raises:
            UserError: If the folder or a file is missing, incomplete or damaged; it is named.
        """
        _verify(path)
        return read_checkpoint(Path(path), map_location)

    def open_checkpoint(self, path: str | Path) -> dict[str, Any]:
        """Verify a checkpoint's folder and read it, but for weights and moments.

        All processes call it; each verifies some of the files.

        Args:
            path: A local folder, the same on all processes.

        Returns:
            The checkpoint; see :func:`smol.checkpoints.format.open_checkpoint`.

        Raises:
            UserError: If the folder or a file is missing, incomplete or damaged; it is named.
        """
        ranks = dist.get_world_size()
        on_all_ranks(lambda: _verify(path, slice(dist.get_rank(), None, ranks)))
        return open_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint's folder, its marker first.

        Args:
            path: A local folder; nothing happens if it does not exist.
        """
        _remove(_local(path))


def _local(path: str | Path) -> Path:
    if "://" in str(path):
        raise UserError(
            f"{path} is a URL; expected a local folder. To resume from a store, use the folder "
            "that its load_path returns"
        )
    return Path(path)


def _verify(path: str | Path, some: slice = slice(None)) -> None:
    """Compare files of a checkpoint with its manifest, all or some of them."""
    path = _local(path)
    if not path.is_dir():
        seen = "is a file" if path.exists() else "does not exist"
        raise UserError(f"{path} {seen}; expected the folder of a checkpoint")
    local = LocalFileSystem()
    manifest = read_manifest(local, str(path))
    files = dict(list(manifest.files.items())[some])
    verify_files(local, str(path), replace(manifest, files=files))


def _replace(path: Path, step: int, write: Write, metadata: dict[str, Any]) -> None:
    """Commit a checkpoint beside ``path`` and rename it into its place."""
    for interrupted in path.parent.glob(f".{glob.escape(path.name)}.new-*"):
        shutil.rmtree(interrupted)
    attempt = uuid.uuid4().hex[:8]
    new, old = (path.with_name(f".{path.name}.{state}-{attempt}") for state in ("new", "old"))
    with committed(new, step, write, metadata):
        if path.exists() or path.is_symlink():
            os.rename(path, old)
        os.rename(new, path)
        fsync(path.parent)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_symlink():
        # Such as ``last``: what it points to is a checkpoint of its own.
        path.unlink()
    elif path.is_dir():
        (path / MARKER_FILE).unlink(missing_ok=True)
        shutil.rmtree(path)
