"""Merges from disk to disk: what is written."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from merge_inputs import CONFIG, MODELS, shapes, write_models
from merge_parts import LINEAR, TOKENS, WEIGHTS, edit_config, here, logits, refused, run  # noqa: F401
from safetensors.torch import load_file, save_file

from smol.merging import load_recipe, merge
from smol.merging.methods import METHODS

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "configs" / "merges"
DARE = """
models: [{model: one}, {model: two}]
merge_method: dare_linear
base_model: base
parameters: {weight: 0.5, density: 0.3}
"""


@pytest.mark.parametrize("tied", [True, False])
def test_result_opens_everywhere(tied, here):
    from smol.checkpoints.huggingface import load_huggingface
    from smol.checkpoints.weights import copy_weights
    from smol.model import Decoder
    from smol.model.io import assemble_decoder

    weights = write_models(here, tied)
    run(LINEAR, here / "out")
    expected = {k: 0.9 * v + 0.1 * weights["two"][k] for k, v in weights["one"].items()}
    merged = load_file(here / "out" / WEIGHTS)
    assert merged.keys() == shapes(tied).keys()
    torch.testing.assert_close(merged, expected)

    config, rope, state = load_huggingface(here / "out")
    with torch.no_grad():
        found = assemble_decoder(config, rope, state)(TOKENS)
        torch.testing.assert_close(found, logits(here / "out"), rtol=1e-4, atol=1e-5)
        decoder = Decoder(config, rope)
        copy_weights(decoder, here / "out")  # as init_from does
        torch.testing.assert_close(decoder(TOKENS), found)
    written = json.loads((here / "out" / "config.json").read_text())
    assert written == CONFIG | {
        "tie_word_embeddings": tied,
        "dtype": "float32",
        "pad_token_id": None,
    }


def test_shards_hold_what_one_file_holds(here):
    write_models(here)
    run(LINEAR, here / "whole")
    run(LINEAR, here / "shards", file_bytes=5000)
    files = sorted((here / "shards").glob("*.safetensors"))
    assert len(files) > 3
    assert files[-1].name == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    index = json.loads((here / "shards" / "model.safetensors.index.json").read_text())
    whole, pieces = load_file(here / "whole" / WEIGHTS), {}
    for file in files:
        piece = load_file(file)
        assert sum(x.nbytes for x in piece.values()) <= 5000
        assert {name for name, at in index["weight_map"].items() if at == file.name} == {*piece}
        pieces |= piece
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in whole.values())
    torch.testing.assert_close(pieces, whole, rtol=0, atol=0)
    assert torch.equal(logits(here / "shards"), logits(here / "whole"))
    # And shards are read like a whole.
    shutil.move(here / "shards", here / "one2")
    run(LINEAR.replace("one", "whole").replace("two", "one2"), here / "again")
    torch.testing.assert_close(load_file(here / "again" / WEIGHTS), whole)


def test_dtypes(here):
    weights = write_models(here, dtype=torch.bfloat16)
    name = "model.layers.1.mlp.up_proj.weight"
    task = LINEAR.replace("linear", "task_arithmetic") + "base_model: base\n"
    wide = {m: weights[m][name].float() for m in MODELS}
    exact = wide["base"] + 0.9 * (wide["one"] - wide["base"]) + 0.1 * (wide["two"] - wide["base"])
    for text, dtype in (
        ("", torch.bfloat16),
        ("dtype: float32", torch.float32),
        ("dtype: float32\nout_dtype: bfloat16", torch.bfloat16),
    ):
        run(task + text, here / f"out{len(text)}")
        merged = load_file(here / f"out{len(text)}" / WEIGHTS)[name]
        config = json.loads((here / f"out{len(text)}" / "config.json").read_text())
        assert merged.dtype == dtype
        assert config["dtype"] == str(dtype).removeprefix("torch.")
        # Without a word on dtypes the differences are rounded to bfloat16 too.
        tolerance = {"rtol": 2**-8 if text else 2**-7, "atol": 1e-7 if text else 1e-3}
        torch.testing.assert_close(merged.float(), exact, **tolerance)


def test_the_same_recipe_gives_the_same_bytes(here):
    write_models(here)
    run(DARE, here / "first", seed=3)
    torch.manual_seed(99)
    run(DARE, here / "second", seed=3)
    names = sorted(path.name for path in (here / "first").iterdir())
    assert "merge.json" in names
    for name in names:
        assert (here / "first" / name).read_bytes() == (here / "second" / name).read_bytes()
    run(DARE, here / "third", seed=4)
    first, third = (load_file(here / x / WEIGHTS) for x in ("first", "third"))
    assert all(not torch.equal(first[name], third[name]) for name in first)


def test_each_model_and_tensor_is_thinned_out_by_itself(here):
    weights = write_models(here)
    run(DARE, here / "out")
    merged = load_file(here / "out" / WEIGHTS)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(4)]
    moved = [(merged[name] != weights["base"][name]) for name in names]
    assert all(not torch.equal(moved[0], other) for other in moved[1:])
    # Two independent choices of 30 % leave 49 % untouched; one for both would leave 70 %.
    share = torch.stack(moved).float().mean().item()
    assert share == pytest.approx(0.51, abs=0.04)
    # A third model changes nothing in what the others give.
    more = "models: [{model: three, parameters: {weight: 0}}, {model: one}, {model: two}]"
    run(DARE.replace("models: [{model: one}, {model: two}]", more), here / "more")
    torch.testing.assert_close(load_file(here / "more" / WEIGHTS), merged)


def test_record(here):
    write_models(here)
    run(LINEAR, here / "out", seed=5)
    record = json.loads((here / "out" / "merge.json").read_text())
    assert (record["recipe"], record["seed"]) == (LINEAR, 5)
    for name in ("one", "two"):
        assert record["models"][name]["folder"] == str(here / name)
        for file in ("config.json", WEIGHTS):
            digest = hashlib.sha256((here / name / file).read_bytes()).hexdigest()
            assert record["models"][name]["sha256"][file] == digest
    digest = hashlib.sha256((here / "out" / WEIGHTS).read_bytes()).hexdigest()
    assert record["sha256"] == {WEIGHTS: digest}


def test_output_is_not_lightly_replaced(here):
    write_models(here)
    (here / "out").mkdir()
    run(LINEAR, here / "out")  # an empty folder is as good as none
    before = (here / "out" / WEIGHTS).read_bytes()
    refused(LINEAR, here / "out", "out exists and is not empty; .* add --force")
    run(LINEAR.replace("0.9", "0.5"), here / "out", force=True)
    assert (here / "out" / WEIGHTS).read_bytes() != before
    refused(LINEAR, here / "three", "holds no merge.json, so it is no earlier merge", force=True)
    refused(LINEAR, here / "one", "one would replace or lie in one", force=True)
    refused(LINEAR, here, "would replace or lie in one", force=True)
    refused(LINEAR, here / "one" / "out", "would replace or lie in one")
    assert not [path for path in here.iterdir() if path.name.startswith(".")]


def test_a_merge_that_fails_leaves_what_was_there(here, monkeypatch):
    write_models(here)
    run(LINEAR, here / "out")
    before = {path.name: path.read_bytes() for path in (here / "out").iterdir()}
    (here / ".out.merging").mkdir()
    (here / ".out.merging" / "half").write_text("of a merge that was killed")
    import safetensors.torch

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            run(LINEAR, here / "out", force=True)
    assert {path.name: path.read_bytes() for path in (here / "out").iterdir()} == before
    assert not (here / ".out.merging").exists()


def test_shipped_recipes(here, monkeypatch):
    """Every file in configs/merges runs, and every method but one variant has one."""
    import huggingface_hub.constants

    write_models(here / "runs")
    for old, new in zip(MODELS, ("sft", "preference", "preference_2", "grpo"), strict=True):
        (here / "runs" / old).rename(here / "runs" / new)
    repository = "models--HuggingFaceTB--SmolLM3-3B-checkpoints"
    for branch, model in (("it-soup-APO", "preference"), ("it-LC-expert", "sft")):
        commit = here / "hub" / repository / "snapshots" / hashlib.sha1(branch.encode()).hexdigest()
        shutil.copytree(here / "runs" / model, commit)
        reference = here / "hub" / repository / "refs" / branch
        reference.parent.mkdir(exist_ok=True)
        reference.write_text(commit.name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(here / "hub"))
    names = set()
    for path in sorted(RECIPES.glob("*.yaml")):
        recipe, lines = load_recipe(path), []
        names.add(recipe.method_name)
        merge(recipe, here / path.stem, log=lines.append)
        assert not any(line.startswith("note") for line in lines), (path, lines)
    assert METHODS.keys() - names == {"breadcrumbs_ties"}
    name = "model.layers.0.mlp.up_proj.weight"
    sft, preference = (load_file(here / "runs" / x / WEIGHTS)[name] for x in ("sft", "preference"))
    merged = load_file(here / "smollm3" / WEIGHTS)[name]
    assert torch.equal(merged, (0.9 * preference + 0.1 * sft).bfloat16())


def test_memory_is_a_shard_and_a_few_tensors(here):
    """Three models of 67 MB in tensors of 2 MB."""
    name = "model.layers.{}.x.weight"
    for seed, model in enumerate(("base", "one", "two")):
        x = torch.rand(512, 1024, generator=torch.Generator().manual_seed(seed))
        (here / model).mkdir()
        save_file({name.format(i): x + i for i in range(32)}, here / model / WEIGHTS)
        edit_config(here / model, **(CONFIG | {"num_hidden_layers": 32}))
    ties = LINEAR.replace("linear", "ties") + "base_model: base\nparameters: {density: 0.5}\n"
    jobs = [[LINEAR, 10_000_000], [LINEAR, 10_000_000], [ties, 10_000_000], [LINEAR, 10**9]]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("merge_memory.py")), json.dumps(jobs)],
        cwd=here,
        # What is freed goes back to the system at once, so that growth is what is held.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
        check=True,
        capture_output=True,
        text=True,
    )
    _, linear, ties, whole = json.loads(done.stdout.splitlines()[-1])  # the first imports
    assert max(linear, ties) < 10 + 15 * 2
    assert whole > linear + 30  # so it would be seen
