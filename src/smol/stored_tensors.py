"""Tensors that lie in safetensors files, whole or in pieces, read where and when they are needed.

A part of a folder, such as its ``model``, is one file ``model.safetensors``, or it is cut up:
``model-00001-of-00002.safetensors`` and so on hold boxes of its tensors, each under the tensor's
own name, and ``model.shards.json`` says where in the tensors they belong::

    {"format": 1, "tensors": {"head.weight": {"dtype": "F32", "shape": [384, 32], "pieces": [
        {"file": "model-00001-of-00002.safetensors", "offset": [0, 0], "shape": [192, 32]},
        {"file": "model-00002-of-00002.safetensors", "offset": [192, 0], "shape": [192, 32]}]}}}

Every element is stored exactly once. Nothing here says which processes wrote the pieces: any number
of them may read, each the boxes that it needs.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from smol.errors import UserError

INDEX_VERSION = 1
CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
"""Dtypes that can be stored, and their names in safetensors files."""
_DTYPES = {code: dtype for dtype, code in CODES.items()}


@dataclass(frozen=True)
class Box:
    """A rectangular part of a tensor: its first element and its size, by dimension."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Iterable[int]) -> "Box":
        """All of a tensor."""
        shape = tuple(shape)
        return cls((0,) * len(shape), shape)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def common(self, other: "Box") -> "Box":
        """The elements that both have; perhaps none."""
        offset = tuple(map(max, self.offset, other.offset))
        ends = (
            min(a + n, b + m)
            for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        )
        return Box(offset, tuple(max(end - o, 0) for end, o in zip(ends, offset, strict=True)))

    def within(self, other: "Box") -> tuple[slice, ...]:
        """Where its elements are in a tensor that holds another box around it."""
        starts = (a - b for a, b in zip(self.offset, other.offset, strict=True))
        return tuple(slice(s, s + n) for s, n in zip(starts, self.shape, strict=True))


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in one or more files, not read yet.

    Attributes:
        name: Its name in the files.
        dtype: Of its elements.
        shape: Of the whole.
        pieces: The files and the box that each holds; together they are the whole.
    """

    name: str
    dtype: torch.dtype
    shape: torch.Size
    pieces: tuple[tuple[Path, Box], ...]

    @property
    def nbytes(self) -> int:
        """Size of the whole in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def check(self) -> None:
        """Check that the pieces make up the tensor, each of its elements once.

        Raises:
            UserError: they do not.
        """
        whole, boxes = Box.whole(self.shape), [box for _, box in self.pieces]
        stored = sum(box.numel for box in boxes)
        if any(whole.common(box) != box for box in boxes):
            raise UserError(f"a piece of '{self.name}' lies outside of its shape {whole.shape}")
        if stored != whole.numel:
            raise UserError(
                f"the pieces of '{self.name}' hold {stored:,} of its {whole.numel:,} elements"
            )
        if whole.numel and len(boxes) > 1:
            starts = np.array([box.offset for box in boxes if box.numel])
            ends = starts + np.array([box.shape for box in boxes if box.numel])
            meets = ((starts[:, None] < ends) & (starts < ends[:, None])).all(-1)
            if meets.sum() > len(starts):  # each meets itself
                raise UserError(f"the pieces of '{self.name}' overlap")

    def read(self, box: Box | None = None) -> Tensor:
        """Read a box of it, or all.

        Returns:
            A tensor on the CPU in memory of its own.

        Raises:
            UserError: a file is missing, damaged, or holds something else; it is named.
        """
        box = box or Box.whole(self.shape)
        result = torch.empty(box.shape, dtype=self.dtype)
        for path, piece in self.pieces:
            common = box.common(piece)
            if common.numel:
                with _opened(path) as file:
                    stored = file.get_slice(self.name)
                    found = stored.get_dtype(), tuple(stored.get_shape())
                    if found != (CODES[self.dtype], piece.shape):
                        raise UserError(
                            f"{path} holds '{self.name}' as {found[0]} {found[1]}; its index says "
                            f"{CODES[self.dtype]} {piece.shape}"
                        )
                    result[common.within(box)] = stored[common.within(piece)]
        return result

    def read_like(self, target: Any) -> Tensor:
        """Read what this process needs of it.

        Args:
            target: What it will be loaded into. If that is a sharded tensor of the same shape, only
                this process' part is read.

        Returns:
            A tensor sharded like ``target``, where that is, or the whole on the CPU.
        """
        if not isinstance(target, DTensor) or target.shape != self.shape:
            return self.read()
        result = torch.empty_like(target, dtype=self.dtype, requires_grad=False)
        result.to_local().copy_(self.read(part_of(target)[0]))
        return result


def part_of(tensor: Tensor, first: bool = True) -> tuple[Box, bool]:
    """Which part of a tensor this process has, and whether it is the one to store it.

    Of processes with the same part exactly one stores it: the first along every dimension of the
    mesh over which a sharded tensor is replicated, and ``first`` for a tensor that is not sharded.

    Args:
        tensor: Sharded, or whole.
        first: Whether this is the first process of all.

    Raises:
        UserError: it is sharded in a way that is no box, or is a sum that is still to be made.
    """
    if not isinstance(tensor, DTensor):
        return Box.whole(tensor.shape), first
    mesh, placements = tensor.device_mesh, tensor.placements
    coordinate = mesh.get_coordinate()
    if coordinate is None:  # the mesh is one of other processes
        return Box((0,) * tensor.ndim, (0,) * tensor.ndim), False
    box = Box(*reversed(compute_local_shape_and_global_offset(tensor.shape, mesh, placements)))
    if any(p.is_partial() for p in placements) or box.shape != tuple(tensor.to_local().shape):
        raise UserError(
            f"a tensor of shape {tuple(tensor.shape)} is placed as {placements}, which a "
            "checkpoint cannot hold; expected even shards, or replicas"
        )
    replicas = (c for c, p in zip(coordinate, placements, strict=True) if p.is_replicate())
    return box, not any(replicas)


def file_name(part: str, number: int = 1, of: int = 1) -> str:
    """Name of a part's file; the files of one that is cut up are numbered from 1."""
    return f"{part}.safetensors" if of == 1 else f"{part}-{number:05d}-of-{of:05d}.safetensors"


def index_name(part: str) -> str:
    """Name of the index of a part that is cut up."""
    return f"{part}.shards.json"


def is_stored(folder: Path, part: str) -> bool:
    """Whether a folder has a part, whole or cut up."""
    return (folder / file_name(part)).is_file() or (folder / index_name(part)).is_file()


def stored_tensors(folder: Path, part: str) -> dict[str, StoredTensor]:
    """List the tensors of a part by name, without reading them.

    Returns:
        None at all if the folder does not have the part.

    Raises:
        UserError: a file or the index cannot be read, or pieces are missing.
    """
    if (index := folder / index_name(part)).is_file():
        return read_index(index)
    tensors: dict[str, StoredTensor] = {}
    if (path := folder / file_name(part)).is_file():
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (the file is no dictionary)
                stored = file.get_slice(name)
                shape = torch.Size(stored.get_shape())
                pieces = ((path, Box.whole(shape)),)
                tensors[name] = StoredTensor(name, _DTYPES[stored.get_dtype()], shape, pieces)
    return tensors


def read_tensors(folder: Path, part: str, device: str = "cpu") -> dict[str, Tensor]:
    """Read all tensors of a part, tensor by tensor.

    On the CPU those of a whole file are mapped and read when they are touched; writing to them does
    not change the file.

    Raises:
        UserError: As :func:`stored_tensors`.
    """
    path = folder / file_name(part)
    if path.is_file():
        try:
            return load_file(path, device=device)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read the tensors in {path}: {error}") from None
    return {k: tensor.read().to(device) for k, tensor in stored_tensors(folder, part).items()}


def write_index(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Write the index of tensors whose pieces lie in the same folder."""
    rows = []
    for name, tensor in tensors.items():
        pieces = [
            {"file": file.name, "offset": box.offset, "shape": box.shape}
            for file, box in tensor.pieces
        ]
        row = {"dtype": CODES[tensor.dtype], "shape": tensor.shape, "pieces": pieces}
        rows.append(f"{json.dumps(name)}: {json.dumps(row)}")
    text = ",\n".join(rows)  # a line for each: there may be many thousand pieces
    path.write_text(f'{{"format": {INDEX_VERSION}, "tensors": {{\n{text}\n}}}}\n', "utf-8")


def read_index(path: Path) -> dict[str, StoredTensor]:
    """Read what :func:`write_index` wrote.

    Raises:
        UserError: it cannot be read, names a file elsewhere, or pieces are missing or overlap.
    """
    index = read_json(path)
    if not isinstance(index, dict) or index.get("format") != INDEX_VERSION:
        raise UserError(f"{path} is not an index of format {INDEX_VERSION}")
    tensors = {}
    try:
        for name, row in index["tensors"].items():
            pieces = []
            for piece in row["pieces"]:
                if Path(piece["file"]).name != piece["file"]:
                    raise UserError(f"{path} names a file outside of its folder: {piece['file']}")
                box = Box(_sizes(piece["offset"]), _sizes(piece["shape"]))
                pieces.append((path.parent / piece["file"], box))
            shape = torch.Size(_sizes(row["shape"]))
            tensors[name] = StoredTensor(name, _DTYPES[row["dtype"]], shape, tuple(pieces))
            tensors[name].check()
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error!r}") from None
    return tensors


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: it is missing, or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def _sizes(values: Any) -> tuple[int, ...]:
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"{values} are not sizes")
    return tuple(values)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file for reading; whatever goes wrong with it is one line that names it."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read the tensors in {path}: {error}") from None
