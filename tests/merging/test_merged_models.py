"""What a merge reads: models that belong together, in every form that they have on disk."""

import json

import pytest
import torch
import yaml
from merge_inputs import write_models
from merge_parts import (
    LINEAR,
    WEIGHTS,
    edit_config,
    edit_weights,
    here,  # noqa: F401
    logits,
    refused,
    run,
    tokenizer_of,
)
from safetensors.torch import load_file, save_file

from smol.errors import UserError


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
