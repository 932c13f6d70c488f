"""Merging on disk: a recipe is run, or refused, in the folder of its models."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from smol.errors import UserError
from smol.merging import merge, parse_recipe

LINEAR = """
models: [{model: one, parameters: {weight: 0.9}}, {model: two, parameters: {weight: 0.1}}]
merge_method: linear
"""
WEIGHTS = "model.safetensors"
TOKENS = torch.randint(40, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The models' folder, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(recipe: str, output: Path, **options) -> list[str]:
    """Merge; returns what was told on the way."""
    lines: list[str] = []
    merge(parse_recipe(recipe), output, log=lines.append, **options)
    return lines


def refused(recipe: str, output: Path, message: str, **options) -> None:
    before = sorted(output.parent.rglob("*"))
    with pytest.raises(UserError, match=message) as caught:
        run(recipe, output, **options)
    assert "\n" not in str(caught.value)
    assert sorted(output.parent.rglob("*")) == before


def edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(config | changes))


def edit_weights(folder: Path, **changes) -> None:
    """Replace tensors by name; None removes one."""
    weights = load_file(folder / WEIGHTS) | changes
    save_file({k: v for k, v in weights.items() if v is not None}, folder / WEIGHTS)


def tokenizer_of(words: list[str], folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    model = WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0])
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), unk_token=words[0], eos_token=words[-1]
    ).save_pretrained(folder)


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        return model.eval()(TOKENS).logits
