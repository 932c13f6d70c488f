"""Metrics of small tasks, worked out by hand from whole logits."""

import math

import pytest
from evaluation_parts import brute_force, tiny_model, write_records
from hypothesis import given
from hypothesis import strategies as st
from tiny import WORDS

from smol.errors import UserError
from smol.evaluation.measure import measure
from smol.evaluation.tasks import Task
from smol.generation import Sampling

RECORDS = [
    {"q": f"the {a} and", "options": [b, f"{c} {a}", f"{b} {b} sat"], "gold": i % 3}
    for i, (a, b, c) in enumerate(zip(WORDS, WORDS[3:], WORDS[7:], strict=False))
]
FIELDS = {"prompt": "{{ q }}", "choices": "options", "answer": "gold"}


@pytest.fixture
def data(tmp_path):
    return str(write_records(tmp_path / "records.jsonl", RECORDS))


def by_hand(model, context, continuation):
    """Log-probability and bytes of a continuation, its tokens being those of the whole text."""
    encode, eos = model.tokenizer.encode, model.tokenizer.eos_id
    before, whole = encode(context), encode(context + continuation)
    assert whole[: len(before)] == before
    log_prob, greedy = brute_force(model.decoder, [eos, *before], whole[len(before) :])
    return log_prob, greedy


def test_a_cloze_task(sources, data):
    model = tiny_model(sources)
    found = measure(Task("t", "cloze", data, **FIELDS), model)
    hits = hits_per_byte = bits = size = 0
    for record in RECORDS:
        texts = [" " + option for option in record["options"]]
        log_probs = [by_hand(model, record["q"], text)[0] for text in texts]
        rates = [v / len(text) for v, text in zip(log_probs, record["options"], strict=True)]
        hits += log_probs.index(max(log_probs)) == record["gold"]
        hits_per_byte += rates.index(max(rates)) == record["gold"]
        bits -= log_probs[record["gold"]] / math.log(2)
        size += len(texts[record["gold"]])
    n = len(RECORDS)
    assert found["accuracy"].value == hits / n
    assert found["accuracy_per_byte"].value == hits_per_byte / n
    assert found["accuracy_centred"].value == pytest.approx((hits / n - 1 / 3) / (2 / 3))
    assert found["bits_per_byte"].value == pytest.approx(bits / size, rel=1e-5)
    assert 0 < hits < n
    assert hits != hits_per_byte  # else the test could not tell them apart


def test_a_lettered_task_scores_letters(sources, data):
    model = tiny_model(sources)
    found = measure(Task("t", "multiple_choice", data, limit=5, **FIELDS), model)
    task = Task("t", "multiple_choice", data, limit=5, **FIELDS)
    hits = 0
    for record in task.records():
        shown = "".join(f"\n{x}. {o}" for x, o in zip("ABC", record["options"], strict=True))
        context = f"{record['q']}{shown}\nAnswer:"
        log_probs = [by_hand(model, context, f" {x}")[0] for x in "ABC"]
        hits += log_probs.index(max(log_probs)) == record["gold"]
    assert found["accuracy"].value == hits / 5
    assert "accuracy_per_byte" not in found


def test_a_cloze_without_choices_asks_for_what_greedy_decoding_writes(sources, tmp_path):
    model = tiny_model(sources)
    likeliest = Sampling(temperature=0.0, max_new_tokens=1)
    records = [{"q": record["q"], "a": " dog"} for record in RECORDS]
    for record in records[:6]:
        prompt = [model.tokenizer.eos_id, *model.tokenizer.encode(record["q"])]
        record["a"] = model.generate([prompt], likeliest)[0].text or record["a"]
    data = str(write_records(tmp_path / "open.jsonl", records))
    task = Task("t", "cloze", data, prompt="{{ q }}", answer="a", delimiter="")
    greedy = [brute_force(model.decoder, *model.encode_pair(r["q"], r["a"]))[1] for r in records]
    assert 0 < sum(greedy) < len(records)
    assert measure(task, model)["accuracy"].value == sum(greedy) / len(records)


def test_bits_per_byte_of_texts(sources, tmp_path):
    model = tiny_model(sources)
    texts = ["the cat sat", "a dog é by the sea", "one"]
    data = str(write_records(tmp_path / "texts.jsonl", [{"text": text} for text in texts]))
    found = measure(Task("t", "bits_per_byte", data, prompt="{{ text }}"), model)
    eos, encode = model.tokenizer.eos_id, model.tokenizer.encode
    nats = -sum(brute_force(model.decoder, [eos], encode(text))[0] for text in texts)
    size = sum(len(text.encode()) for text in texts)
    assert found["bits_per_byte"].value == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert found["bits_per_byte"].items == 3


def test_a_generative_task_grades_what_greedy_decoding_writes(sources, tmp_path):
    import torch

    model = tiny_model(sources)
    records = [{"q": record["q"]} for record in RECORDS[:4]]
    for number, record in enumerate(records):
        ids = [model.tokenizer.eos_id, *model.tokenizer.encode(record["q"])]
        written = []
        for _ in range(5):
            with torch.no_grad():
                token = int(model.decoder(torch.tensor([ids]))[0, -1].argmax())
            if token == model.tokenizer.eos_id:
                break
            ids.append(token)
            written.append(token)
        record["a"] = model.tokenizer.decode(written) if number != 2 else "something else"
    data = str(write_records(tmp_path / "written.jsonl", records))
    fields = {"prompt": "{{ q }}", "answer": "a", "metric": "exact_match", "max_new_tokens": 5}
    found = measure(Task("t", "generative", data, **fields), model)
    assert found["accuracy"].value == 0.75


@given(limit=st.integers(1, 12), own=st.none() | st.integers(1, 12))
def test_the_smaller_limit_counts(limit, own):
    task = Task("t", "cloze", "nothing.jsonl", limit=own, **FIELDS)
    seen = []

    class Asked(Exception):
        pass

    def records(self):
        seen.append(self.limit)
        raise Asked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Task, "records", records)
        with pytest.raises(Asked):
            measure(task, None, limit)
    assert seen == [min(limit, own or limit)]


def test_an_unknown_metric_is_told(sources, data):
    task = Task("t", "generative", data, prompt="q", answer="gold", metric="exactmatch")
    with pytest.raises(UserError, match="metric is 'exactmatch', .*Did you mean 'exact_match'"):
        measure(task, tiny_model(sources))
