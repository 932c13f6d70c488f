"""The files of a checkpoint: tensors as safetensors, everything else as JSON.

Reading a checkpoint runs no code of it. A folder holds

* ``model.safetensors``: the tensors of ``checkpoint["state_dict"]`` under their own names,
* ``optimizer.safetensors``: the tensors of ``checkpoint["optimizer_states"]``,
* ``state.safetensors``: all other tensors, where there are any,
* ``state.json``: the structure of all three, with loops, callbacks, position and step.

JSON has fewer types than Python, so a value that is not one of JSON's own is an object with the key
``"$"``, which names its type: a tuple, an infinite or undefined float, bytes, a dictionary with
other keys than strings, a ``torch.Size``, a NumPy scalar, or a tensor by its name.

Tensors come back detached, dense and contiguous. Names that share one and the same tensor, such as
tied weights, are stored once and share it again; views that merely overlap are stored apart.
"""

import base64
import json
import math
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smol.errors import UserError

STRUCTURE_FILE = "state.json"
FORMAT_VERSION = 1

# Which entry of the checkpoint goes into which tensor file; the other entries go into "state".
_PARTS = {"model": "state_dict", "optimizer": "optimizer_states"}
_TAG = "$"
_REALS = ("float64", "float32", "float16")
_INTEGERS = ("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool")
_OTHERS = ("bfloat16", "complex64", "float8_e4m3fn", "float8_e5m2")
_DTYPES = frozenset(getattr(torch, name) for name in (*_REALS, *_INTEGERS, *_OTHERS))
_NUMPY_SCALARS = frozenset((*_REALS, *_INTEGERS))


FILES_KEY = "files"
"""Entry of a checkpoint whose items are written as JSON files, such as a decoder's description."""


def flatten(tree: Any, where: str = "") -> tuple[dict[str, Tensor], Any]:
    """Split a nested value into its tensors and a structure that JSON can hold.

    Args:
        tree: Dictionaries, ordered dictionaries, lists, tuples, ``torch.Size``, tensors, numbers,
            NumPy scalars, strings, bytes, booleans and None, nested at will.
        where: Key path of ``tree``, for errors.

    Returns:
        Tensors by name, and the structure, in which each stands as its name.

    Raises:
        UserError: If a value or a tensor is of another type; the message has its key path.
    """
    encoder = _Encoder(where)
    structure = encoder.encode(tree, ())
    return encoder.tensors, structure


def unflatten(tensors: dict[str, Tensor], structure: Any) -> Any:
    """Put together again what :func:`flatten` split; every type is restored.

    Args:
        tensors: Tensors by name.
        structure: What :func:`flatten` returned, possibly after a journey through JSON.

    Returns:
        The nested value.

    Raises:
        UserError: If the structure is malformed or names a tensor that is missing.
    """
    try:
        return _decode(structure, tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"the checkpoint's structure is malformed: {error!r}") from None


def write_checkpoint(folder: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint into a folder; every file is on the disk when this returns.

    Args:
        folder: Where to write; created if missing.
        checkpoint: A checkpoint as Lightning makes it. Sharded tensors must have been gathered. The
            items of its entry ``files`` become JSON files of their own, by name.

    Raises:
        UserError: If it holds something the format does not cover, by key path. Nothing has been
            written then.
    """
    files = checkpoint.get(FILES_KEY, {})
    checkpoint = {key: value for key, value in checkpoint.items() if key != FILES_KEY}
    parts = {part: checkpoint[key] for part, key in _PARTS.items() if key in checkpoint}
    parts["state"] = {key: checkpoint[key] for key in checkpoint if key not in _PARTS.values()}
    flat = {part: flatten(tree, _PARTS.get(part, "")) for part, tree in parts.items()}
    structure = {"format": FORMAT_VERSION} | {part: item[1] for part, item in flat.items()}
    text = json.dumps(structure, indent=1, allow_nan=False)

    folder.mkdir(parents=True, exist_ok=True)
    for part, (tensors, _) in flat.items():
        if tensors:
            save_file(tensors, folder / f"{part}.safetensors", metadata={"format": "pt"})
            fsync(folder / f"{part}.safetensors")
    texts = {name: json.dumps(content, indent=1) for name, content in files.items()}
    for name, content in (texts | {STRUCTURE_FILE: text}).items():
        (folder / name).write_text(content, encoding="utf-8")
        fsync(folder / name)
    fsync(folder)


def read_checkpoint(folder: Path, map_location: torch.device | str | None = None) -> dict[str, Any]:
    """Read what :func:`write_checkpoint` wrote. Runs no code of the checkpoint.

    On the CPU the tensors are mapped from the file and read when they are touched; writing to them
    does not change the file.

    Args:
        folder: A checkpoint's folder.
        map_location: Device of the tensors; None for the CPU.

    Returns:
        The checkpoint.

    Raises:
        UserError: If a file is missing or cannot be read, by file.
    """
    structure = read_json(folder / STRUCTURE_FILE)
    if not isinstance(structure, dict) or structure.get("format") != FORMAT_VERSION:
        raise UserError(f"{folder / STRUCTURE_FILE} is not of checkpoint format {FORMAT_VERSION}")
    checkpoint = {}
    for part in (*_PARTS, "state"):
        if part in structure:
            tensors = _read_tensors(folder / f"{part}.safetensors", str(map_location or "cpu"))
            tree = unflatten(tensors, structure[part])
            checkpoint |= {_PARTS[part]: tree} if part in _PARTS else tree
    return checkpoint


def non_finite_tensor(folder: Path) -> str | None:
    """Find a weight or an optimiser moment that is infinite or not a number.

    Args:
        folder: A checkpoint's folder.

    Returns:
        The name of the first such tensor, or None if all are finite.
    """
    for part in _PARTS:
        for name, tensor in _iterate_tensors(folder / f"{part}.safetensors"):
            # torch.isfinite does not know the 8-bit floats.
            tensor = tensor.float() if tensor.element_size() == 1 else tensor
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                return name
    return None


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Args:
        path: The file.

    Returns:
        Its contents.

    Raises:
        UserError: If it is missing or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def fsync(path: Path) -> None:
    """Make a file, or the entries of a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Encoder:
    """Collects the tensors of one tree under unique names."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple, str] = {}
        self._storages: set[int] = set()

    def encode(self, value: Any, path: tuple[str, ...]) -> Any:
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {_TAG: "float", "value": repr(value)}
        if kind is bytes:
            return {_TAG: "bytes", "base64": base64.b64encode(value).decode("ascii")}
        if kind in (list, tuple, torch.Size):
            items = [self.encode(item, (*path, str(i))) for i, item in enumerate(value)]
            tag = {list: None, tuple: "tuple", torch.Size: "size"}[kind]
            return items if tag is None else {_TAG: tag, "items": items}
        if kind in (dict, OrderedDict):
            return self._encode_dict(value, path)
        if kind in (Tensor, nn.Parameter, nn.Buffer):
            return {_TAG: "tensor", "name": self._add(value.detach(), path)}
        if isinstance(value, np.generic) and value.dtype.name in _NUMPY_SCALARS:
            item = self.encode(value.item(), path)
            return {_TAG: "numpy", "dtype": value.dtype.name, "value": item}
        raise self._error(path, f"a {kind.__module__}.{kind.__qualname__}")

    def _encode_dict(self, value: dict, path: tuple[str, ...]) -> Any:
        if type(value) is dict and all(type(key) is str and key != _TAG for key in value):
            return {key: self.encode(item, (*path, key)) for key, item in value.items()}
        items = []
        for key, item in value.items():
            if not isinstance(key, (str, int, float, tuple, bytes, type(None))):
                raise self._error(path, f"a key of type {type(key).__name__}")
            inner = (*path, str(key))
            items.append([self.encode(key, inner), self.encode(item, inner)])
        return {_TAG: "dict" if type(value) is dict else "ordered_dict", "items": items}

    def _add(self, tensor: Tensor, path: tuple[str, ...]) -> str:
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.dtype not in _DTYPES:
            raise self._error(
                path, f"a tensor of layout {tensor.layout}, {tensor.dtype} on {tensor.device}"
            )
        identity = (
            *(tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()),
            *(tensor.is_conj(), tensor.is_neg()),
        )
        if tensor.numel() and identity in self._names:
            return self._names[identity]
        name = base = ".".join(path) or "value"
        suffix = 1
        while name in self.tensors:
            suffix += 1
            name = f"{base}#{suffix}"
        self._names[identity] = name
        storage = tensor.untyped_storage().data_ptr()
        dense = tensor.resolve_conj().resolve_neg().contiguous()
        self.tensors[name] = dense.clone() if storage in self._storages else dense
        self._storages.add(storage)
        return name

    def _error(self, path: tuple[str, ...], seen: str) -> UserError:
        where = ".".join(part for part in (self.where, *path) if part)
        return UserError(
            f"checkpoint entry '{where}' is {seen}, which a checkpoint cannot hold; "
            "expected dense tensors, numbers, strings, bytes, lists, tuples and dictionaries"
        )


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TAG not in value:
        return {key: _decode(item, tensors) for key, item in value.items()}
    tag = value[_TAG]
    if tag == "tensor":
        return tensors[value["name"]]
    if tag == "float":
        return float(value["value"])
    if tag == "bytes":
        return base64.b64decode(value["base64"], validate=True)
    if tag == "numpy" and value["dtype"] in _NUMPY_SCALARS:
        return np.dtype(value["dtype"]).type(_decode(value["value"], tensors))
    if tag in ("tuple", "size"):
        return (tuple if tag == "tuple" else torch.Size)(_decode(value["items"], tensors))
    if tag in ("dict", "ordered_dict"):
        pairs = [(_decode(key, tensors), _decode(item, tensors)) for key, item in value["items"]]
        return (dict if tag == "dict" else OrderedDict)(pairs)
    raise ValueError(f"unknown type {tag!r}")


def _read_tensors(path: Path, device: str) -> dict[str, Tensor]:
    if not path.exists():
        return {}
    try:
        return load_file(path, device=device)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def _iterate_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    if path.exists():
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (the file is no dictionary)
                yield name, file.get_tensor(name)
