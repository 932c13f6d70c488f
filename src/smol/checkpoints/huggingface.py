"""Weights from and to Hugging Face folders, and from GGUF files."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from smol.checkpoints.huggingface_config import from_huggingface_config, to_huggingface_config
from smol.errors import UserError, shown
from smol.model.config import DecoderConfig, RopeConfig
from smol.model.io import PART, WEIGHTS, describe_decoder, read_description, stored_weights
from smol.stored_tensors import StoredTensor, file_name, read_json, stored_tensors

CONFIG = "config.json"
HEAD = "lm_head.weight"
INDEX = f"{WEIGHTS}.index.json"
FILE_BYTES = 5_000_000_000
Imported = tuple[DecoderConfig, RopeConfig, dict[str, Tensor]]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
TOKENIZER_FILES += ("added_tokens.json", "chat_template.jinja", "chat_template.json")


def load_huggingface(path: str | Path) -> Imported:
    """Read a Hugging Face model folder of a supported kind.

    Args:
        path: Folder with ``config.json`` and ``model.safetensors`` or its sharded form.

    Returns:
        Shape, rotary embedding, and the weights under the names of ``Decoder``, in the dtype in
        which they are stored.

    Raises:
        UserError: If files are missing, or the model has a feature that ``Decoder`` has not.
    """
    folder = Path(path)
    decoder, rope = from_huggingface_config(read_config(folder))
    weights = _own_weights(stored_shards(folder), decoder)
    return decoder, rope, {name: tensor.read() for name, tensor in weights.items()}


def load_gguf(file: str | Path) -> Imported:
    """Read a GGUF file; quantised weights become float32.

    Args:
        file: Of a model that transformers can read and ``Decoder`` can express.

    Returns:
        As :func:`load_huggingface`.

    Raises:
        UserError: If the file is missing, or the model has a feature that ``Decoder`` has not.
    """
    file = Path(file)
    if not file.is_file():
        raise UserError(f"no GGUF file at {file}.")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    decoder, rope = from_huggingface_config(model.config.to_dict())
    return decoder, rope, _own_weights(model.state_dict(), decoder)


def copy_tokenizer(source: str | Path, folder: str | Path) -> bool:
    """Copy the tokenizer of a Hugging Face folder as it is, or write that of a GGUF file.

    Args:
        source: The folder, or the GGUF file.
        folder: Created where missing.

    Returns:
        Whether there was one.
    """
    source, folder = Path(source), Path(folder)
    if source.is_file():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        tokenizer.save_pretrained(folder)
        return True
    if not (source / "tokenizer.json").is_file():
        return False
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    return True


def read_config(folder: Path) -> dict[str, Any]:
    """Read the ``config.json`` of a Hugging Face folder.

    Raises:
        UserError: If it is missing, or holds something else.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise UserError(f"no Hugging Face model in {folder}: {CONFIG} is missing.")
    config = read_json(file)
    if not isinstance(config, dict):
        raise UserError(f"{file} is {shown(config)}; expected keys and values")
    return config


def stored_shards(folder: Path) -> dict[str, StoredTensor]:
    """List the tensors of a Hugging Face folder, in one file or all shards of an index, by name.

    Raises:
        UserError: If a file is missing or damaged, or lacks a tensor that the index names.
    """
    parts, places = [PART], {}
    if (index := folder / INDEX).is_file():
        content = read_json(index)
        places = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(places, dict) or not all(isinstance(x, str) for x in places.values()):
            raise UserError(f"{index} has no weight_map; expected the file of each tensor")
        parts = sorted(file.removesuffix(".safetensors") for file in set(places.values()))
    stored = {}
    for part in parts:
        if not (folder / file_name(part)).is_file():
            raise UserError(f"{folder} holds no {file_name(part)}; expected all its safetensors")
        stored |= stored_tensors(folder, part)
    for name in sorted(places.keys() - stored.keys()):
        raise UserError(f"{index} names '{name}', which {places[name]} does not hold")
    return stored


def _own_weights(weights: Mapping[str, Any], decoder: DecoderConfig) -> dict[str, Any]:
    """Drop what ``Decoder`` computes by itself: a head that is the embedding, old frequencies."""
    dropped = {HEAD} if decoder.tie_embeddings else set()
    return {
        name: tensor
        for name, tensor in weights.items()
        if name not in dropped and not name.endswith("rotary_emb.inv_freq")
    }


def export_decoder(
    source: str | Path,
    folder: str | Path,
    tokenizer_dir: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a decoder folder or a checkpoint, whole or sharded, as a Hugging Face folder.

    Args:
        source: The decoder folder or checkpoint.
        folder: Must not exist, or be empty.
        tokenizer_dir: As for :func:`export_huggingface`.
        dtype: As for :func:`export_huggingface`.

    Raises:
        UserError: As :func:`export_huggingface`, or if the weights do not fit their description.
    """
    config, rope = read_description(source)
    weights = stored_weights(source)
    describe_decoder(config, rope, weights)
    export_huggingface(config, rope, weights, folder, tokenizer_dir, dtype)


def export_huggingface(
    decoder: DecoderConfig,
    rope: RopeConfig,
    weights: Mapping[str, Tensor | StoredTensor],
    folder: str | Path,
    tokenizer_dir: str | Path | None = None,
    dtype: torch.dtype | None = None,
    context: int | None = None,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Write a folder that ``AutoModelForCausalLM.from_pretrained`` reads.

    The folder appears whole: it is written beside its place and renamed. Stored tensors are read
    one by one, so that there is never more in memory than one output file and one tensor.

    Args:
        decoder: Shape and features.
        rope: Rotary embedding.
        weights: Whole tensors, or stored ones, under the names of ``Decoder``.
        folder: Must not exist, or be empty.
        tokenizer_dir: Folder with a tokenizer, copied along; generation then stops at its end
            token.
        dtype: Of the written weights; ``None`` keeps what they have.
        context: Longest sequence in tokens, see :func:`to_huggingface_config`.
        file_bytes: Size above which the weights are spread over several files, with an index.

    Raises:
        UserError: If ``folder`` holds something, or transformers has no such class.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty; name a new folder for the export.")
    config = to_huggingface_config(decoder, rope, context)
    config["dtype"] = str(dtype or next(iter(weights.values())).dtype).removeprefix("torch.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        if tokenizer_dir is not None:
            config |= _copy_tokenizer(Path(tokenizer_dir), temporary)
        generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json(temporary / CONFIG, config)
        write_json(temporary / "generation_config.json", generation)
        write_weights(temporary, weights, dtype, file_bytes)
        temporary.chmod(0o755)
        temporary.replace(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


class Readable(Protocol):
    """A tensor that is read, or computed, when it is needed."""

    @property
    def shape(self) -> torch.Size:
        """Its shape."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its elements."""

    def read(self) -> Tensor:
        """The whole tensor."""


def write_weights(
    folder: Path,
    weights: Mapping[str, Tensor | Readable],
    dtype: torch.dtype | None = None,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Write one file, or several with the index that transformers expects.

    Args:
        folder: Where to.
        weights: By name, in the order in which they are written, one file in memory at a time.
        dtype: Of the written weights; ``None`` keeps what they have.
        file_bytes: Size above which there are several files.
    """
    from safetensors.torch import save_file

    sizes = {k: w.shape.numel() * (dtype or w.dtype).itemsize for k, w in weights.items()}
    files: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if files[-1] and filled + size > file_bytes:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    places = {}
    for number, names in enumerate(files, 1):
        file = file_name(PART, number, len(files))
        places |= dict.fromkeys(names, file)
        tensors = {name: _read(weights[name], dtype) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        write_json(folder / INDEX, index)


def _read(weight: Tensor | Readable, dtype: torch.dtype | None) -> Tensor:
    tensor = weight.detach() if isinstance(weight, Tensor) else weight.read()
    return tensor.to("cpu", dtype or tensor.dtype).contiguous()


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write JSON as transformers does."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _copy_tokenizer(source: Path, target: Path) -> dict[str, int | None]:
    """Copy a tokenizer and return the ids of its special tokens, as config.json names them."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot read a tokenizer from {source}: {reason}") from error
    tokenizer.save_pretrained(target)
    return {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
