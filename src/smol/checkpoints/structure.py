"""Nested values as tensors by name and a structure that JSON can hold.

JSON has fewer types than Python, so a value that is not one of JSON's own is an object with the key
``"$"``, which names its type: a tuple, an infinite or undefined float, bytes, a dictionary with
other keys than strings, a ``torch.Size``, a NumPy scalar, or a tensor by its name.

Tensors come out detached, dense and contiguous. Names that share one and the same tensor, such as
tied weights, are one name and share it again; views that merely overlap are kept apart.
"""

import base64
import math
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from smol.errors import UserError
from smol.stored_tensors import CODES

_TAG = "$"
_REALS = ("float64", "float32", "float16")
_INTEGERS = ("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool")
_NUMPY_SCALARS = frozenset((*_REALS, *_INTEGERS))


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
        if kind in (Tensor, DTensor, nn.Parameter, nn.Buffer):
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
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.dtype not in CODES:
            raise self._error(
                path, f"a tensor of layout {tensor.layout}, {tensor.dtype} on {tensor.device}"
            )
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        identity = (
            *(local.device, local.data_ptr(), local.dtype, tensor.shape, local.stride()),
            *(local.is_conj(), local.is_neg()),
        )
        if local.numel() and identity in self._names:
            return self._names[identity]
        name = base = ".".join(path) or "value"
        suffix = 1
        while name in self.tensors:
            suffix += 1
            name = f"{base}#{suffix}"
        self._names[identity] = name
        storage = local.untyped_storage().data_ptr()
        dense = tensor if tensor is not local else local.resolve_conj().resolve_neg().contiguous()
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
