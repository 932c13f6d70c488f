"""Our model class of the lm-evaluation-harness against the harness's own on the exported folder."""

import random

import pytest
from evaluation_parts import tiny_decoder
from tiny import WORDS

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from smol.checkpoints.huggingface import export_huggingface
from smol.errors import UserError
from smol.evaluation.lm_eval_model import SmolLM
from smol.model import save_decoder

ITEMS, CHOICES = 200, 4


def requests(kind, arguments):
    return [
        Instance(kind, {}, pair, i % CHOICES, ("task", i // CHOICES, 1))
        for i, pair in enumerate(arguments)
    ]


def words(rng, most):
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


@pytest.fixture(scope="module")
def models(sources, tmp_path_factory):
    """The same weights: ours from a decoder folder, the harness's own from an exported one."""
    folder = tmp_path_factory.mktemp("models")
    decoder = tiny_decoder(qk_norm=False)
    tokenizer = sources / "tokenizer"
    weights = decoder.state_dict()
    save_decoder(folder / "ours", decoder.config, decoder.rope, weights)
    export_huggingface(
        decoder.config, decoder.rope, weights, folder / "theirs", tokenizer, context=64
    )
    ours = SmolLM(str(folder / "ours"), tokenizer=str(tokenizer), max_length=64)
    # Its cache of logits mixes up items with equal tokens before the last one, seen in 0.4.13.
    theirs = HFLM(
        pretrained=str(folder / "theirs"),
        device="cpu",
        dtype="float32",
        batch_size=8,
        logits_cache=False,
    )
    return ours, theirs


def test_likelihoods_and_choices_of_200_items(models):
    rng = random.Random(0)
    pairs = []
    for item in range(ITEMS):
        # Some contexts are empty, some end in a blank, some are longer than the model can read.
        context = ["", words(rng, 8) + " ", words(rng, 90), words(rng, 8)][item % 4]
        pairs += [(context, f" {words(rng, 4)}") for _ in range(CHOICES)]
    results = [
        model.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True) for model in models
    ]
    for (ours, greedy), (theirs, theirs_greedy) in zip(*results, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)
        assert greedy == theirs_greedy
    chosen = [
        [max(range(CHOICES), key=lambda k: answers[CHOICES * i + k][0]) for i in range(ITEMS)]
        for answers in results
    ]
    assert chosen[0] == chosen[1]
    assert len(set(chosen[0])) == CHOICES


def test_likelihoods_of_texts_longer_than_a_window(models):
    rng = random.Random(1)
    texts = [(words(rng, n),) for n in (3, 40, 200, 300)]
    ours, theirs = (
        model.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
        for model in models
    )
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_greedy_texts(models):
    rng = random.Random(2)
    settings = {"until": ["dog", "\n\n"], "max_gen_toks": 12, "do_sample": False}
    asked = [(words(rng, 9), settings) for _ in range(8)]
    asked += [(words(rng, 9), settings | {"max_gen_toks": 5}) for _ in range(4)]
    ours, theirs = (
        model.generate_until(requests("generate_until", asked), disable_tqdm=True)
        for model in models
    )
    assert ours == theirs
    assert any(ours)


def test_a_model_that_is_not_there_is_told():
    with pytest.raises(UserError, match="nowhere is not there"):
        SmolLM("nowhere")
