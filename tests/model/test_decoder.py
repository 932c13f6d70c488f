"""The decoder against transformers, and documents that never see each other."""

import pytest
import torch
from torch._dynamo.utils import counters

from smol.checkpoints.huggingface import from_huggingface_config
from smol.errors import UserError
from smol.model import Decoder, DecoderConfig, RopeConfig, init_weights
from smol.model.io import assemble_decoder

VOCAB = 199
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 112,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "max_position_embeddings": 256,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 20_000.0,
    "factor": 2.0,
    "original_max_position_embeddings": 32,
}
FAMILIES = {
    "SmolLM3": {"tie_word_embeddings": True},
    "SmolLM3-listed": {"no_rope_layers": [1, 0, 0, 1], "tie_word_embeddings": True},
    "SmolLM3-yarn": {"rope_parameters": YARN, "tie_word_embeddings": True},
    "Llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "head_dim": 24},
    "Llama-bias": {"attention_bias": True, "tie_word_embeddings": True},
    "Qwen2": {"tie_word_embeddings": False},
    "Qwen3": {"head_dim": 32, "tie_word_embeddings": True},
    "Qwen3-yarn": {"head_dim": 32, "rope_parameters": YARN | {"factor": 4.0, "beta_fast": 16.0}},
    "Mistral": {"sliding_window": None},
}


def build_pair(family: str):
    """A random transformers model, and the decoder that should equal it."""
    import transformers

    name = family.split("-")[0]
    config = getattr(transformers, f"{name}Config")(**SMALL, **FAMILIES[family])
    torch.manual_seed(0)
    reference = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():  # biases and norms too should count
            parameter.add_(torch.randn_like(parameter) * 0.1)
    weights = {k: v.clone() for k, v in reference.state_dict().items()}
    decoder_config, rope = from_huggingface_config(config.to_dict())
    if decoder_config.tie_embeddings:
        del weights["lm_head.weight"]
    return reference, assemble_decoder(decoder_config, rope, weights)


def random_documents(batch: int, time: int, generator: torch.Generator) -> torch.Tensor:
    return (torch.rand(batch, time, generator=generator) < 0.1).cumsum(dim=1)


def small_decoder(**changes) -> Decoder:
    config = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 48,
        "nope": 2,
        "init_std": 0.2,
    }
    decoder = Decoder(DecoderConfig(**config | changes), RopeConfig(theta=10_000.0))
    init_weights(decoder, seed=0)
    return decoder


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_equal_transformers(family):
    reference, decoder = build_pair(family)
    tokens = torch.randint(VOCAB, (2, 61), generator=torch.Generator().manual_seed(1))
    difference = (decoder(tokens) - reference(tokens).logits).abs().max().item()
    print(f"{family}: max difference of logits {difference:.2e}")
    assert difference < 2e-5


@pytest.mark.parametrize("family", ["SmolLM3", "Qwen2", "Qwen3-yarn"])
@torch.no_grad()
def test_documents_equal_transformers_one_at_a_time(family):
    reference, decoder = build_pair(family)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (3, 50), generator=generator)
    documents = random_documents(3, 50, generator)
    packed = decoder(tokens, documents=documents)
    for row in range(3):
        for document in documents[row].unique():
            here = documents[row] == document
            alone = reference(tokens[row, here].unsqueeze(0)).logits[0]
            torch.testing.assert_close(packed[row, here], alone, atol=2e-5, rtol=0)


def test_gradients_equal_transformers():
    reference, decoder = build_pair("SmolLM3")
    tokens = torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
    for model in (reference, decoder):
        model.requires_grad_(True)
    reference(tokens).logits.logsumexp(-1).sum().backward()
    decoder(tokens).logsumexp(-1).sum().backward()
    expected = dict(reference.named_parameters())
    for name, parameter in decoder.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-3, rtol=1e-4)


def test_gradient_never_crosses_documents():
    decoder = small_decoder()
    tokens = torch.randperm(VOCAB)[:40].view(2, 20)  # each token once: its embedding is its own
    documents = torch.tensor([[0] * 7 + [1] * 13, [0] * 20])
    logits = decoder(tokens, documents=documents, head=lambda hidden, weight: hidden)
    logits[0, 7:].square().sum().backward()
    gradient = decoder.model.embed_tokens.weight.grad
    assert gradient[tokens[0, 7:]].abs().sum(dim=1).min() > 0
    assert gradient[tokens[0, :7]].abs().max() == 0
    assert gradient[tokens[1]].abs().max() == 0


@torch.no_grad()
def test_changing_a_document_changes_no_other_bit():
    decoder = small_decoder()
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(VOCAB, (2, 64), generator=generator)
    documents = random_documents(2, 64, generator)
    before = decoder(tokens, documents=documents)
    changed = documents[0] == 1
    assert changed.any()
    tokens[0, changed] = (tokens[0, changed] + 1) % VOCAB
    after = decoder(tokens, documents=documents)
    assert not torch.equal(before[0, changed], after[0, changed])
    assert torch.equal(before[0, ~changed], after[0, ~changed])
    assert torch.equal(before[1], after[1])


@torch.no_grad()
def test_positions_restart_with_documents_and_may_be_given():
    decoder = small_decoder(nope=None)
    tokens = torch.randint(VOCAB, (1, 6), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[4, 4, 4, 9, 9, 4]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 0]])
    restarted = decoder(tokens, documents=documents)
    assert torch.equal(restarted, decoder(tokens, positions=positions, documents=documents))
    # Rotary embedding is relative: what counts is the distance within a document.
    shifted = decoder(tokens, positions=positions + 50, documents=documents)
    torch.testing.assert_close(shifted, restarted, atol=1e-4, rtol=0)
    stretched = decoder(tokens, positions=positions * 2, documents=documents)
    assert (stretched - restarted).abs().max() > 1e-2


def test_head_is_called_with_hidden_states_and_weight():
    for tied in (True, False):
        decoder = small_decoder(tie_embeddings=tied)
        tokens = torch.randint(VOCAB, (2, 5))
        hidden, weight = decoder(tokens, head=lambda hidden, weight: (hidden, weight))
        assert hidden.shape == (2, 5, 32)
        owner = decoder.model.embed_tokens if tied else decoder.lm_head
        assert weight is owner.weight
        assert ("lm_head.weight" in decoder.state_dict()) is not tied
        torch.testing.assert_close(decoder(tokens), hidden @ weight.T)


def test_dropout_only_while_training():
    decoder = small_decoder(dropout=0.5)
    tokens = torch.randint(VOCAB, (2, 5))
    assert not torch.equal(decoder(tokens), decoder(tokens))
    decoder.eval()
    assert torch.equal(decoder(tokens), decoder(tokens))


@torch.no_grad()
def test_bfloat16_autocast_is_close_to_float32():
    decoder = small_decoder(qk_norm=True, init_std=0.02)
    tokens = torch.randint(VOCAB, (2, 50), generator=torch.Generator().manual_seed(0))
    documents = random_documents(2, 50, torch.Generator().manual_seed(0))
    exact = decoder(tokens, documents=documents)
    with torch.autocast("cpu", torch.bfloat16):
        rough = decoder(tokens, documents=documents)
    assert rough.dtype == torch.bfloat16
    assert (rough - exact).abs().max() < 0.02 * exact.abs().max()
    decoder.bfloat16()
    assert decoder.rotary.inv_freq.dtype == torch.float32
    assert (decoder(tokens, documents=documents) - exact).abs().max() < 0.04 * exact.abs().max()


@pytest.mark.slow
def test_varied_documents_are_one_graph_and_one_compilation():
    decoder = small_decoder(num_layers=6)
    tokens = torch.randint(VOCAB, (2, 48), generator=torch.Generator().manual_seed(0))
    plain = decoder(tokens, documents=torch.zeros_like(tokens))
    counters.clear()
    for layer in decoder.model.layers:
        layer.compile(backend="aot_eager")
    generator = torch.Generator().manual_seed(0)
    compilations = []
    for step in range(50):
        documents = random_documents(2, 48, generator)
        decoder.set_rope_theta(10_000.0 * (1 + step // 10))
        decoder(tokens, documents=documents).sum().backward()
        compilations.append(counters["stats"]["unique_graphs"])
    growth = [i for i in range(1, 50) if compilations[i] > compilations[i - 1]]
    assert compilations[0] == 2  # with and without rotary embedding
    assert not growth, f"compiled again at batches {growth}"
    assert not counters["graph_break"]
    decoder.set_rope_theta(10_000.0)
    compiled = decoder(tokens, documents=torch.zeros_like(tokens))
    torch.testing.assert_close(compiled, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"num_heads": 5, "num_kv_heads": 5}, "hidden_size 32 is not a multiple of num_heads 5"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"nope": 0}, "nope is 0"),
        ({"nope": [1, 3]}, "nope names layer 3"),
        ({"attention_bias": "yes"}, "attention_bias is 'yes'"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"intermediate_size": 0}, "intermediate_size is 0"),
    ],
)
def test_contradictions_are_one_line(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        small_decoder(**changes)
    assert "\n" not in str(caught.value)


def test_nope_layers():
    config = small_decoder(num_layers=12, nope=4).config
    assert config.nope_layers == {3, 7, 11}
    assert small_decoder(nope=[0, 2]).config.nope_layers == {0, 2}
    assert small_decoder(nope=None).config.nope_layers == set()
