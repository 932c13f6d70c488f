"""The files of a checkpoint: tensors as safetensors, everything else as JSON.

Reading a checkpoint runs no code of it. A folder holds

* ``model.safetensors``: the tensors of ``checkpoint["state_dict"]`` under their own names,
* ``optimizer.safetensors``: the tensors of ``checkpoint["optimizer_states"]``,
* ``state.safetensors``: all other tensors, where there are any,
* ``state.json``: the structure of all three, with loops, callbacks, position and step.

Where the tensors of a run are sharded, every process writes its own shards, and a part is cut up
as ``model-00001-of-00002.safetensors``, … with ``model.shards.json``; :mod:`smol.stored_tensors`
says how. A part that one process holds alone is one file, so a checkpoint of one process or of DDP
is whole. Either can be read by any number of processes.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from smol.checkpoints.structure import flatten, unflatten
from smol.errors import UserError
from smol.stored_tensors import (
    StoredTensor,
    file_name,
    index_name,
    part_of,
    read_json,
    read_tensors,
    stored_tensors,
    write_index,
)

STRUCTURE_FILE = "state.json"
FORMAT_VERSION = 1

# Which entry of the checkpoint goes into which tensor file; the other entries go into "state".
_PARTS = {"model": "state_dict", "optimizer": "optimizer_states"}
_ALL_PARTS = (*_PARTS, "state")

FILES_KEY = "files"
"""Entry of a checkpoint whose items are written as JSON files, such as a decoder's description."""

Digests = dict[str, dict[str, Any]]
"""Size and SHA-256 of files by name, as in a manifest."""

OnAllRanks = Callable[[Callable[[], Any]], list[Any]]
"""Runs an action on every process; returns what came of it by rank, or raises on all of them."""


class NonFiniteError(UserError):
    """A checkpoint was refused because a weight or a moment is infinite or not a number."""


def write_checkpoint(
    folder: Path,
    checkpoint: dict[str, Any],
    rank: int = 0,
    on_all_ranks: OnAllRanks = lambda action: [action()],
) -> Digests:
    """Write a checkpoint into a folder; every file is on the disk when this returns.

    The processes of a sharded run call it together, with a folder that they all see. Each writes
    the shards that it holds, and of equal ones only the first process; nothing is gathered.

    Args:
        folder: Where to write; created if missing.
        checkpoint: A checkpoint as Lightning makes it. The items of its entry ``files`` become JSON
            files of their own, by name.
        rank: Number of this process.
        on_all_ranks: How the processes wait for each other; as a rule there is only one.

    Returns:
        Sizes and digests of the tensor files, on the first process.

    Raises:
        UserError: If it holds something the format does not cover, by key path. Nothing has been
            written then.
        NonFiniteError: If a weight or a moment is infinite or not a number.
        OSError: If it cannot be written; as the others, on all processes.
    """
    shards = on_all_ranks(partial(_write_shards, folder, checkpoint, rank))
    return {} if rank else _join(folder, shards)


def read_checkpoint(folder: Path, map_location: torch.device | str | None = None) -> dict[str, Any]:
    """Read what :func:`write_checkpoint` wrote. Runs no code of the checkpoint.

    On the CPU the tensors of a whole file are mapped and read when they are touched; writing to
    them does not change the file.

    Args:
        folder: A checkpoint's folder.
        map_location: Device of the tensors; None for the CPU.

    Returns:
        The checkpoint.

    Raises:
        UserError: If a file is missing or cannot be read, by file.
    """
    read = partial(read_tensors, device=str(map_location or "cpu"))
    return _read(folder, dict.fromkeys(_ALL_PARTS, read))


def open_checkpoint(folder: Path) -> dict[str, Any]:
    """Read a checkpoint, but for weights and moments.

    Args:
        folder: A checkpoint's folder.

    Returns:
        The checkpoint, in which a :class:`~smol.stored_tensors.StoredTensor` stands for every
        tensor of ``state_dict`` and ``optimizer_states``.

    Raises:
        UserError: If a file is missing or cannot be read, by file.
    """
    return _read(folder, dict.fromkeys(_PARTS, stored_tensors) | {"state": read_tensors})


def digest_of(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as in a manifest."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def fsync(path: Path) -> None:
    """Make a file, or the entries of a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(folder: Path, readers: dict[str, Callable[[Path, str], Any]]) -> dict[str, Any]:
    structure = read_json(folder / STRUCTURE_FILE)
    if not isinstance(structure, dict) or structure.get("format") != FORMAT_VERSION:
        raise UserError(f"{folder / STRUCTURE_FILE} is not of checkpoint format {FORMAT_VERSION}")
    checkpoint = {}
    for part, read in readers.items():
        if part in structure:
            tree = unflatten(read(folder, part), structure[part])
            checkpoint |= {_PARTS[part]: tree} if part in _PARTS else tree
    return checkpoint


def _write_shards(folder: Path, checkpoint: dict[str, Any], rank: int) -> dict[str, Any]:
    """Write what this process stores, and on the first one the JSON.

    Returns:
        By part, the digest of the file and the tensors in it.
    """
    parts, texts = _encode(checkpoint)
    own = {part: _own_shards(tensors, rank) for part, tensors in parts.items()}
    for part in _PARTS:
        if (broken := non_finite(own.get(part, {}))) is not None:
            raise NonFiniteError(
                f"the checkpoint of step {checkpoint.get('global_step', 0)} is refused: '{broken}' "
                "has values that are infinite or not a number; resume from an earlier one"
            )
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for part, shards in own.items():
        if shards:
            path = folder / _unnumbered(part, rank)
            try:
                save_file(shards, path, metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(f"cannot write {path}: {error}") from None
            fsync(path)
            wholes = {name: parts[part][name] for name in shards}
            stored = {
                name: StoredTensor(name, t.dtype, t.shape, ((path, part_of(t)[0]),))
                for name, t in wholes.items()
            }
            written[part] = digest_of(path), stored
    for name, text in texts.items() if rank == 0 else ():
        (folder / name).write_text(text, encoding="utf-8")
        fsync(folder / name)
    return written


def _encode(checkpoint: dict[str, Any]) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """The tensors of a checkpoint by part and name, and the contents of its JSON files by name."""
    content = dict(checkpoint)
    files = content.pop(FILES_KEY, {})
    trees = {part: content.pop(key) for part, key in _PARTS.items() if key in content}
    flat = {part: flatten(tree, _PARTS[part]) for part, tree in trees.items()}
    flat["state"] = flatten(content)
    structure = {"format": FORMAT_VERSION} | {part: item[1] for part, item in flat.items()}
    texts = {name: json.dumps(item, indent=1) for name, item in files.items()}
    texts[STRUCTURE_FILE] = json.dumps(structure, indent=1, allow_nan=False)
    return {part: tensors for part, (tensors, _) in flat.items()}, texts


def _own_shards(tensors: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """What this process is to store of tensors, by name."""
    shards = {}
    for name, tensor in tensors.items():
        box, stores = part_of(tensor, first=rank == 0)
        if stores and (box.numel or not tensor.numel()):
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            shards[name] = local.contiguous()
    return shards


def _join(folder: Path, written: list[dict[str, Any]]) -> Digests:
    """Number the files that all processes have written, and write an index where there are many."""
    digests = {}
    for part in _ALL_PARTS:
        ranks = [rank for rank, parts in enumerate(written) if part in parts]
        tensors: dict[str, StoredTensor] = {}
        for number, rank in enumerate(ranks, 1):
            digest, stored = written[rank][part]
            path = folder / file_name(part, number, len(ranks))
            try:
                os.rename(folder / _unnumbered(part, rank), path)
            except FileNotFoundError:
                raise UserError(
                    f"what process {rank} wrote to {folder} is not there for the first process; "
                    "put the run folder on a file system that all machines share"
                ) from None
            digests[path.name] = digest
            for name, tensor in stored.items():
                piece = path, tensor.pieces[0][1]
                before = tensors[name].pieces if name in tensors else ()
                tensors[name] = replace(tensor, pieces=(*before, piece))
        for tensor in tensors.values():
            tensor.check()
        if len(ranks) > 1:
            write_index(folder / index_name(part), tensors)
            fsync(folder / index_name(part))
    fsync(folder)
    return digests


def non_finite(tensors: dict[str, Tensor]) -> str | None:
    """The name of the first tensor with a value that is infinite or not a number, if there is one.

    Args:
        tensors: Of any dtypes, on any device, by name.
    """
    for name, tensor in tensors.items():
        # torch.isfinite does not know the 8-bit floats.
        tensor = tensor.float() if tensor.element_size() == 1 else tensor
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return name
    return None


def _unnumbered(part: str, rank: int) -> str:
    """Name of a process' file until it is known how many there are."""
    return f"{part}-of-rank-{rank}.safetensors"
