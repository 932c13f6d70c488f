"""Merges from disk to disk: what is read, what is refused, what is written."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from merge_inputs import CONFIG, MODELS, shapes, write_models
from safetensors.torch import load_file, save_file

from smol.errors import UserError
from smol.merging import load_recipe, merge, parse_recipe
from smol.merging.methods import METHODS

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "configs" / "merges"
LINEAR = """
models: [{model: one, parameters: {weight: 0.9}}, {model: two, parameters: {weight: 0.1}}]
merge_method: linear
"""
DARE = """
models: [{model: one}, {model: two}]
merge_method: dare_linear
base_model: base
parameters: {weight: 0.5, density: 0.3}
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": 5e4}, r"one has rope_parameters.rope_theta 10000.0, two has 50000.0;"),
        ({"tie_word_embeddings": True}, "one has tie_word_embeddings False, two has True"),
        ({"num_hidden_layers": 3}, "one has num_hidden_layers 4, two has 3"),
        ({"model_type": "qwen3"}, "one has .*, two has "),
        ({"model_type": "gpt7"}, "has model_type 'gpt7' .*, which is unknown"),
        ({"vocab_size": "many"}, "config.json describes no llama model: "),
    ],
)
def test_models_of_other_architectures_are_refused(changes, message, here):
    write_models(here)
    edit_config(here / "two", **changes)
    refused(LINEAR, here / "out", message)


def test_what_does_not_concern_the_weights_may_differ(here):
    write_models(here)
    edit_config(here / "two", max_position_embeddings=128, torch_dtype="float16", use_cache=False)
    edit_config(here / "two", _name_or_path="x", eos_token_id=[3, 4], attention_dropout=0.1)
    run(LINEAR, here / "out")
    run(LINEAR + "base_model: two\n", here / "based")
    contexts = [
        json.loads((here / x / "config.json").read_text())["max_position_embeddings"]
        for x in ("out", "based")
    ]
    assert contexts == [64, 128]  # of the first, or of the base


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lm_head.weight": None}, "two lacks 'lm_head.weight', which its config.json implies"),
        ({"x.weight": torch.ones(2)}, "one lacks 'x.weight', which two has"),
        (
            {"lm_head.weight": torch.ones(39, 16)},
            r"'lm_head.weight' has shape \(40, 16\) in one, \(39, 16\) in two",
        ),
        ({"lm_head.weight": torch.ones(40, 16).to(torch.int8)}, "'lm_head.weight' is torch.int8"),
        (
            {"lm_head.weight": torch.full((40, 16), torch.nan)},
            "'lm_head.weight' would be infinite or not a number",
        ),
    ],
)
def test_other_tensors_are_refused(changes, message, here):
    write_models(here)
    edit_weights(here / "two", **changes)
    refused(LINEAR, here / "out", message)


def test_a_tied_head_is_never_written_and_old_frequencies_are_left_out(here):
    write_models(here, tied=True)
    run(LINEAR, here / "expected")
    # Some savers store the head although it is the embedding.
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    edit_weights(here / "two", **{"lm_head.weight": torch.ones(40, 16)}, **extra)
    run(LINEAR, here / "out")
    expected = load_file(here / "expected" / WEIGHTS)
    torch.testing.assert_close(load_file(here / "out" / WEIGHTS), expected, rtol=0, atol=0)


def test_tokenizers(here):
    write_models(here)
    words = [f"w{i}" for i in range(40)]
    tokenizer_of(words, here / "one")
    tokenizer_of([*words[:7], "new", *words[8:]], here / "two")
    (here / "two" / "generation_config.json").write_text('{"eos_token_id": 39, "top_p": 0.9}')
    edit_config(here / "two", eos_token_id=39)
    lines = run(LINEAR, here / "out")
    assert "note: the tokenizers of one and two differ, as in 'new'; embeddings are" in lines[0]
    message = "the tokenizers of two and one differ, as in 'new'; rows are not moved"
    refused(LINEAR + "tokenizer_source: two\n", here / "new", message)

    tokenizer_of(words, here / "two")
    assert not any(line.startswith("note") for line in run(LINEAR, here / "equal"))
    run(LINEAR + "tokenizer_source: two\n", here / "of_two")
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (here / "of_two" / file).read_bytes() == (here / "two" / file).read_bytes()
    assert json.loads((here / "of_two" / "config.json").read_text())["eos_token_id"] == 39
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(here / "of_two").eos_token_id == 39


def test_runs_and_checkpoints_are_models(here):
    """A run's newest checkpoint, a checkpoint, and a Hugging Face folder, all in one merge."""
    from smol.checkpoints.huggingface import export_huggingface
    from smol.checkpoints.store import FsspecStore
    from smol.model import Decoder, DecoderConfig, RopeConfig, init_weights, save_decoder

    config = DecoderConfig(
        vocab_size=40,
        hidden_size=16,
        num_layers=4,
        num_heads=2,
        num_kv_heads=1,
        intermediate_size=24,
        nope=2,
    )
    words = [f"w{i}" for i in range(40)]
    tokenizer_of(words, here / "tokenizer")
    decoders = []
    for seed, name in enumerate(("sft", "preference")):
        store = FsspecStore(here / "runs" / name / "checkpoints")
        for step in (1, 2):
            decoder = Decoder(config, RopeConfig())
            init_weights(decoder, seed=10 * seed + step)
            state = {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
            info = store.save(
                step,
                lambda folder, state=state: save_decoder(folder, config, RopeConfig(), state),
                {},
            )
            if step == 2:
                decoders.append(decoder.state_dict())
        settings = {"data": {"init_args": {"tokenizer": str(here / "tokenizer")}}}
        (here / "runs" / name / "config.yaml").write_text(yaml.safe_dump(settings))
    export_huggingface(config, RopeConfig(), decoders[0], here / "exported")
    key = f"runs/preference/checkpoints/{info.key}"
    run(
        "models: [{model: runs/sft, parameters: {weight: 0.5}}, "
        f"{{model: {key}, parameters: {{weight: 0.25}}}}, "
        "{model: exported, parameters: {weight: 0.25}}]\nmerge_method: linear\n",
        here / "out",
    )
    expected = {k: 0.75 * v + 0.25 * decoders[1][k] for k, v in decoders[0].items()}
    torch.testing.assert_close(load_file(here / "out" / WEIGHTS), expected)
    written = json.loads((here / "out" / "config.json").read_text())
    assert (written["model_type"], written["eos_token_id"]) == ("smollm3", 39)
    assert (here / "out" / "tokenizer.json").is_file()
    assert logits(here / "out").shape == (2, 20, 40)
    record = json.loads((here / "out" / "merge.json").read_text())
    assert record["models"][key]["folder"].endswith(info.key)
    with pytest.raises(UserError, match="there is no model runs/grpo: expected a folder, a run"):
        run(LINEAR.replace("one", "runs/grpo"), here / "new")


def test_sharded_checkpoints_are_models(here):
    """Every tensor cut in two, by rows, as two processes would have written it."""
    from smol.checkpoints.huggingface import load_huggingface
    from smol.model import save_decoder
    from smol.stored_tensors import Box, StoredTensor, write_index

    weights = write_models(here)
    save_decoder(here / "sharded", *load_huggingface(here / "two"))
    (here / "sharded" / WEIGHTS).unlink()
    files = [here / "sharded" / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    halves, stored = ({}, {}), {}
    for name, tensor in weights["two"].items():
        cut = len(tensor) // 2
        starts, parts = (0, cut), (tensor[:cut].clone(), tensor[cut:].clone())
        pieces = []
        for half, file, start, part in zip(halves, files, starts, parts, strict=True):
            half[f"decoder.{name}"] = part
            pieces.append((file, Box((start, *[0] * (part.dim() - 1)), tuple(part.shape))))
        stored[f"decoder.{name}"] = StoredTensor(name, tensor.dtype, tensor.shape, tuple(pieces))
    for file, half in zip(files, halves, strict=True):
        save_file(half, file)
    write_index(here / "sharded" / "model.shards.json", stored)
    run(LINEAR, here / "whole")
    run(LINEAR.replace("two", "sharded"), here / "out")
    merged = [load_file(here / x / WEIGHTS) for x in ("out", "whole")]
    torch.testing.assert_close(*merged, rtol=0, atol=0)
    digests = json.loads((here / "out" / "merge.json").read_text())["models"]["sharded"]["sha256"]
    assert {*digests} >= {"decoder.json", *(file.name for file in files)}


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
