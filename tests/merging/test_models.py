"""Folders that are no whole model: what is missing is named, in one line."""

import json
from pathlib import Path

import pytest
from merge_inputs import write_models
from safetensors.torch import load_file, save_file

from smol.errors import UserError
from smol.merging import merge, parse_recipe

LINEAR = """
models: [{model: one, parameters: {weight: 0.9}}, {model: two, parameters: {weight: 0.1}}]
merge_method: linear
"""
UP = "model.layers.2.mlp.up_proj.weight"


def without(tensor):
    def damage(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        del weights[tensor]
        save_file(weights, folder / "model.safetensors")

    return damage


def writes(name, content):
    return lambda folder: (folder / name).write_text(json.dumps(content))


INDEX = "model.safetensors.index.json"
GONE = {"weight_map": {"model.norm.weight": "model.safetensors", "gone": "model.safetensors"}}
DAMAGES = {
    "no head": (without("lm_head.weight"), "one lacks 'lm_head.weight', which its config.json"),
    "no layer": (without(UP), f"one lacks '{UP}', which its config.json implies"),
    "index": (writes(INDEX, GONE), "index.json names 'gone', which model.safetensors does not"),
    "no map": (writes(INDEX, {"metadata": {}}), "index.json has no weight_map; expected the file"),
    "list": (writes(INDEX, []), "index.json has no weight_map; expected the file"),
    "config": (writes("config.json", []), r"one/config.json is \[\] \(list\); expected keys"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_all_models_lack_is_told(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_models(tmp_path)
    damage, message = DAMAGES[name]
    for model in ("one", "two"):
        damage(tmp_path / model)
    with pytest.raises(UserError, match=message) as error:
        merge(parse_recipe(LINEAR), tmp_path / "out", log=lambda line: None)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
