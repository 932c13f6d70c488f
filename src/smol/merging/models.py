"""The models that go into a merge: found by name, compared, and read tensor by tensor."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from smol.checkpoints.huggingface import CONFIG, HEAD, read_config, stored_shards
from smol.checkpoints.huggingface_config import to_huggingface_config
from smol.errors import UserError, nearest, one_line, shown
from smol.model.io import DESCRIPTION, read_description, stored_weights
from smol.paths import find
from smol.runs import decoder_folder, tokenizer_of
from smol.stored_tensors import StoredTensor

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# What two models may say differently and still have the same weights in the same places.
_NOT_ARCHITECTURE = frozenset(
    """
    _name_or_path architectures attention_dropout auto_map bos_token_id chunk_size_feed_forward
    dtype embd_pdrop eos_token_id finetuning_task hidden_dropout id2label initializer_range
    is_decoder label2id max_position_embeddings max_window_layers output_attentions
    output_hidden_states output_router_logits pad_token_id pretraining_tp problem_type resid_pdrop
    return_dict sep_token_id task_specific_params tokenizer_class torch_dtype transformers_version
    use_cache use_return_dict
    """.split()
)
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class InputModel:
    """One of the models that are merged.

    Attributes:
        name: As the recipe says.
        folder: Where it was found: a Hugging Face folder, a decoder folder or a checkpoint.
        config: As in its ``config.json``.
        tokenizer: Folder of its tokenizer, if it has one.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    tokenizer: Path | None

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """All weights under their Hugging Face names; a tied head is none."""
        in_checkpoint = (self.folder / DESCRIPTION).is_file()
        stored = (stored_weights if in_checkpoint else stored_shards)(self.folder)
        dropped = {HEAD} if self.architecture.get("tie_word_embeddings") else set()
        for name, tensor in stored.items():
            if name.endswith("rotary_emb.inv_freq"):  # written by old versions of transformers
                dropped.add(name)
            elif tensor.dtype not in _DTYPES:
                raise UserError(
                    f"{self.name}: '{name}' is {tensor.dtype}; expected float64, float32, float16 "
                    "or bfloat16, quantised models cannot be merged"
                )
        kept = {name: tensor for name, tensor in stored.items() if name not in dropped}
        # Some architectures have other names in memory than in files; of those nothing is known.
        if kept.keys() <= self.implied:
            for name in sorted(self.implied - kept.keys()):
                raise UserError(f"{self.folder} lacks '{name}', which its {CONFIG} implies")
        return kept

    @cached_property
    def implied(self) -> frozenset[str]:
        """Names of the weights of a model with this configuration, without a tied head.

        Empty for what is no causal language model.
        """
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM

        config = CONFIG_MAPPING[self.config["model_type"]].from_dict(self.config)
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except ValueError:
            return frozenset()
        tied = {HEAD} if self.architecture.get("tie_word_embeddings") else set()
        return frozenset(model.state_dict().keys() - tied)

    @cached_property
    def architecture(self) -> dict[str, Any]:
        """What decides where which weight is, with the defaults of its class filled in."""
        from transformers import CONFIG_MAPPING

        kind = self.config.get("model_type")
        if kind not in CONFIG_MAPPING:
            raise UserError(
                f"{self.folder / CONFIG} has model_type {shown(kind)}, which is unknown"
            )
        try:
            config = CONFIG_MAPPING[kind].from_dict(self.config).to_dict()
        except Exception as error:  # transformers validates in many ways
            reason = one_line(error)
            raise UserError(f"{self.folder / CONFIG} describes no {kind} model: {reason}") from None
        flat = _flatten(config)
        return {key: v for key, v in flat.items() if key.split(".")[0] not in _NOT_ARCHITECTURE}

    @property
    def layers(self) -> int:
        """Number of layers."""
        layers = self.config.get("num_hidden_layers")
        if not isinstance(layers, int):
            raise UserError(f"{self.folder / CONFIG} has no num_hidden_layers; expected a number")
        return layers

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Ids by token; empty where there is no ``tokenizer.json``."""
        from tokenizers import Tokenizer

        file = self.tokenizer and self.tokenizer / "tokenizer.json"
        if not file or not file.is_file():
            return {}
        try:
            return Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
        except Exception as error:  # the library has no type of its own
            raise UserError(f"cannot read the tokenizer {file}: {one_line(error)}") from None

    def digests(self) -> dict[str, str]:
        """SHA-256 of the description and the weights, by file."""
        paths = {path for tensor in self.tensors.values() for path, _ in tensor.pieces}
        paths |= {self.folder / name for name in (CONFIG, DESCRIPTION)}
        return {path.name: sha256(path) for path in sorted(paths) if path.is_file()}


def open_model(name: str) -> InputModel:
    """Find a model by its name in a recipe, without reading a weight.

    Args:
        name: A Hugging Face folder, a run's folder, a checkpoint, a decoder folder, or a hub name
            (``owner/name``, ``owner/name@revision``) that is in the cache.

    Raises:
        UserError: If there is no such model, or it has no safetensors.
    """
    folder = Path(find(name)).absolute()
    if not folder.is_dir():
        folder = _cached(name)
    if (folder / CONFIG).is_file():
        return InputModel(name, folder, read_config(folder), folder)
    decoder = decoder_folder(folder)
    tokenizer = tokenizer_of(folder)
    config = to_huggingface_config(*read_description(decoder))
    return InputModel(name, decoder, config | _token_ids(tokenizer), tokenizer)


def check_agreement(models: Sequence[InputModel]) -> None:
    """See that all models have the same architecture and the same tensors.

    Raises:
        UserError: If they have not; the first differing key or tensor is named.
    """
    first = models[0]
    for model in models[1:]:
        here, there = first.architecture, model.architecture
        for key in sorted(here.keys() | there.keys()):
            if here.get(key) != there.get(key):
                raise UserError(
                    f"{first.name} has {key} {here.get(key)}, {model.name} has {there.get(key)}; "
                    "only models of one architecture can be merged"
                )
        for name in sorted(first.tensors.keys() ^ model.tensors.keys()):
            has, lacks = (first, model) if name in first.tensors else (model, first)
            raise UserError(
                f"{lacks.name} lacks '{name}', which {has.name} has.{nearest(name, lacks.tensors)}"
            )
        for name, tensor in first.tensors.items():
            shape, other = tuple(tensor.shape), tuple(model.tensors[name].shape)
            if shape != other:
                raise UserError(
                    f"'{name}' has shape {shape} in {first.name}, {other} in {model.name}; only "
                    "tensors of one shape can be merged"
                )


def _cached(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        flag = f" --revision {revision}" if revision else ""
        raise UserError(
            f"there is no model {name}: expected a folder, a run such as runs/sft, or a hub name "
            f"in the cache (hf download {repository}{flag})"
        ) from None


def _token_ids(tokenizer: Path | None) -> dict[str, int | None]:
    """The ids of a tokenizer's special tokens, as ``config.json`` names them."""
    from transformers import AutoTokenizer

    if tokenizer is None:
        return {}
    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read a tokenizer from {tokenizer}: {one_line(error)}") from None
    return {name: getattr(loaded, name) for name in TOKEN_IDS}


def sha256(path: Path) -> str:
    """Digest of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        nested = isinstance(value, dict)
        flat |= _flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat
