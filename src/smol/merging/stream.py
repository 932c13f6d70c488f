"""A merge from disk to disk, one tensor at a time."""

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smol.checkpoints.format import fsync
from smol.checkpoints.huggingface import CONFIG, FILE_BYTES, write_json, write_weights
from smol.errors import UserError
from smol.merging.models import (
    TOKEN_IDS,
    TOKENIZER_FILES,
    InputModel,
    check_agreement,
    open_model,
    sha256,
)
from smol.merging.recipe import Recipe

RECORD = "merge.json"
GENERATION = "generation_config.json"


def merge(
    recipe: Recipe,
    output: str | Path,
    *,
    seed: int = 0,
    file_bytes: int = FILE_BYTES,
    force: bool = False,
    log: Callable[[str], None] = print,
) -> None:
    """Merge models into a Hugging Face folder, which appears whole or not at all.

    At no time is more in memory than the tensors of one name and one file of the result. Beside
    the weights lie configuration and tokenizer, and ``merge.json`` with the recipe, the seed and
    the SHA-256 of every file that was read and of the weights that were written. What is random
    depends on the seed, the model's name in the recipe and the tensor's name, and on nothing else.

    Args:
        recipe: What to merge, and how.
        output: New folder.
        seed: Of methods that drop entries at random.
        file_bytes: Size above which the weights are spread over several files, with an index.
        force: Replace ``output`` if it is the result of an earlier merge.
        log: Told what is read and what is noticed.

    Raises:
        UserError: If the models cannot be merged, or ``output`` holds something else.
    """
    output = Path(output).absolute()
    models = [open_model(name) for name in recipe.models]
    _check_output(output, models, force)
    check_agreement(models)
    donor = models[recipe.models.index(recipe.donor)]
    tokenizer = _tokenizer(recipe, models, donor, log)
    merged = _plan(recipe, models, seed)
    for note in recipe.notes(merged):
        log(f"note: {note}")

    record: dict[str, Any] = {"recipe": recipe.text, "seed": seed, "torch": torch.__version__}
    record["recipe_sha256"] = hashlib.sha256(recipe.text.encode()).hexdigest()
    record["models"] = {}
    for model in models:
        log(f"reads {model.name}: {model.folder}")
        record["models"][model.name] = {"folder": str(model.folder), "sha256": model.digests()}

    staging, replaced = (output.with_name(f".{output.name}.{x}") for x in ("merging", "replaced"))
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        write_weights(staging, merged, file_bytes=file_bytes)
        record["sha256"] = {path.name: sha256(path) for path in sorted(staging.iterdir())}
        dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in merged.values()]
        _write_config(staging, donor, tokenizer, max(dtypes, key=dtypes.count))
        write_json(staging / RECORD, record)
        for path in (*staging.iterdir(), staging):
            fsync(path)
        if output.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            output.rename(replaced)
        staging.rename(output)
        fsync(output.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@dataclass(frozen=True)
class MergedTensor:
    """A tensor of the result, which is computed when it is read.

    Attributes:
        name: Its name.
        recipe: How it is computed.
        models: From what, in the recipe's order.
        arguments: Of the method's function.
    """

    name: str
    recipe: Recipe
    models: list[InputModel]
    arguments: Mapping[str, Any]

    @property
    def shape(self) -> torch.Size:
        """Its shape."""
        return self.models[0].tensors[self.name].shape

    @property
    def arithmetic(self) -> torch.dtype:
        """Dtype in which it is computed."""
        dtypes = [model.tensors[self.name].dtype for model in self.models]
        return self.recipe.dtype or reduce(torch.promote_types, dtypes)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which it is stored."""
        return self.recipe.out_dtype or self.arithmetic

    def read(self) -> Tensor:
        """Compute it.

        Raises:
            UserError: If it has values that are infinite or not a number.
        """
        try:
            merged = self.recipe.method.function(self._inputs(), **self.arguments).to(self.dtype)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from None
        if not merged.isfinite().all():
            raise UserError(
                f"'{self.name}' would be infinite or not a number; look for a damaged model, or "
                "set out_dtype: float32"
            )
        return merged

    def _inputs(self) -> Iterator[Tensor]:
        for model in self.models:
            yield model.tensors[self.name].read().to(self.arithmetic)


def _plan(recipe: Recipe, models: list[InputModel], seed: int) -> dict[str, MergedTensor]:
    """All tensors of the result, in the order of the layers."""
    layers = models[0].layers
    if recipe.layers not in (None, layers):
        raise UserError(
            f"slices: layer_range ends at {recipe.layers}, the models have {layers} layers; only "
            "all layers can be merged"
        )
    merged = {}
    for name in sorted(models[0].tensors, key=_natural):
        arguments = recipe.parameters(name, layers)
        if recipe.method.seeded:
            arguments["seeds"] = [_seed(seed, model, name) for model in recipe.others]
        merged[name] = MergedTensor(name, recipe, models, arguments)
    return merged


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 10 behind layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _seed(seed: int, model: str, tensor: str) -> int:
    digest = hashlib.sha256(f"{seed}\n{model}\n{tensor}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _check_output(output: Path, models: list[InputModel], force: bool) -> None:
    place = output.resolve()
    for model in models:
        folder = model.folder.resolve()
        if place in (folder, *folder.parents) or folder in place.parents:
            raise UserError(f"{output} would replace or lie in {model.name}; name another folder")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not force:
        raise UserError(f"{output} exists and is not empty; name a new folder, or add --force")
    if not (output / RECORD).is_file():
        raise UserError(
            f"{output} holds no {RECORD}, so it is no earlier merge and --force does not replace "
            "it; name a new folder"
        )


def _tokenizer(
    recipe: Recipe, models: list[InputModel], donor: InputModel, log: Callable[[str], None]
) -> InputModel:
    """The model whose tokenizer goes along."""
    source = recipe.tokenizer_source
    chosen = donor if source is None else models[recipe.models.index(source)]
    for model in models:
        differing = sorted(set(chosen.vocabulary.items()) ^ set(model.vocabulary.items()))
        if not (chosen.vocabulary and model.vocabulary and differing):
            continue
        seen = f"the tokenizers of {chosen.name} and {model.name} differ, as in {differing[0][0]!r}"
        if source is not None:
            raise UserError(
                f"{seen}; rows are not moved to other ids: remove tokenizer_source to merge them "
                "as they are"
            )
        log(f"note: {seen}; embeddings are merged id by id")
    return chosen


def _write_config(folder: Path, donor: InputModel, tokenizer: InputModel, dtype: str) -> None:
    """Write configuration and tokenizer."""
    ids = {key: tokenizer.config.get(key) for key in TOKEN_IDS}
    config = {key: value for key, value in donor.config.items() if key != "torch_dtype"}
    write_json(folder / CONFIG, config | ids | {"dtype": dtype})
    write_json(folder / GENERATION, ids)
    for name in (*TOKENIZER_FILES, GENERATION):
        if tokenizer.tokenizer and (tokenizer.tokenizer / name).is_file():
            shutil.copyfile(tokenizer.tokenizer / name, folder / name)
