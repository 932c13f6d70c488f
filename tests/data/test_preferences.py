"""Preference pairs: what formats they come in, what is trained on, and how rows hold them."""

import itertools
import json
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preference_parts import easy_pairs, make_preferences, prepare_pairs, write_jsonl

from smol.data.batch import IGNORE
from smol.data.chat import default_template
from smol.data.conversation_tokens import Rendering
from smol.data.corpora.chat_tasks import KINDS, Task, check, is_held_out, tasks
from smol.data.corpora.preferences import FLAWS, NEAR_MISSES, altered, ensure_preferences, records
from smol.data.pairs import PairsConfig, documents, read_pairs
from smol.data.tokenizer import load_tokenizer
from smol.errors import UserError

USER = {"role": "user", "content": "say cat"}
GOOD = {"role": "assistant", "content": "cat"}
BAD = {"role": "assistant", "content": "dog"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def template(folder):
    return default_template(load_tokenizer(folder / "tokenizer"))


@pytest.fixture(scope="module")
def data(folder):
    made = make_preferences(folder)
    made.prepare_data()
    made.setup()
    return made


def read(tmp_path, *records, held_out=False, **columns):
    config = PairsConfig(str(write_jsonl(tmp_path / "records.jsonl", list(records))), **columns)
    return list(read_pairs(config, held_out))


def encode(tmp_path, template, *records, context=200, long="drop", **columns):
    """The documents of records, and the notes on them."""
    config = PairsConfig(str(write_jsonl(tmp_path / "records.jsonl", list(records))), **columns)
    notes: dict = {}
    return list(documents(config, Rendering(template, context, long=long), False, notes)), notes


class TestFormats:
    @pytest.mark.parametrize(
        "record",
        [
            {"prompt": "say cat", "chosen": "cat", "rejected": "dog"},
            {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
            {"prompt": [USER], "chosen": "cat", "rejected": [BAD]},
            {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
            {"prompt": "an id of no use", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            {
                "prompt": [{"from": "human", "value": "say cat"}],
                "chosen": [{"from": "gpt", "value": "cat"}],
                "rejected": [{"from": "gpt", "value": "dog"}],
            },
        ],
        ids=["texts", "messages", "mixed", "implicit prompt", "prompt beside", "sharegpt"],
    )
    def test_all_say_the_same(self, tmp_path, record):
        (pair,) = read(tmp_path, record)
        assert pair.prompt.messages == [USER]
        assert pair.chosen.messages == [USER, GOOD]
        assert pair.rejected.messages == [USER, BAD]
        assert pair.chosen.mode == "no_think"

    def test_other_columns(self, tmp_path):
        record = {"question": "say cat", "better": "cat", "worse": "dog", "s": "Be brief."}
        columns = {"prompt": "question", "chosen": "better", "rejected": "worse", "system": "s"}
        (pair,) = read(tmp_path, record, **columns)
        assert pair.prompt.messages == [{"role": "system", "content": "Be brief."}, USER]
        assert pair.turns == 2

    def test_a_long_conversation_differs_in_its_last_answer(self, tmp_path):
        (pair,) = read(tmp_path, {"prompt": [USER, BAD, USER], "chosen": "cat", "rejected": "dog"})
        assert pair.prompt.messages == [USER, BAD, USER]

    def test_mode_follows_the_template_arguments_or_the_answer(self, tmp_path):
        thinking = {**GOOD, "reasoning_content": "hm"}
        plain = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
        asked = plain | {"chat_template_kwargs": {"enable_thinking": True}}
        reasoned = plain | {"chosen": [thinking]}
        modes = [pair.chosen.mode for pair in read(tmp_path, plain, asked, reasoned)]
        assert modes == ["no_think", "think", "think"]
        assert {p.chosen.mode for p in read(tmp_path, plain, reasoned, mode="think")} == {"think"}

    @pytest.mark.parametrize(
        ("record", "told"),
        [
            ({"chosen": "cat", "rejected": "dog"}, "has no column 'prompt'"),
            ({"prompt": "say cat", "chosen": "cat"}, "has no column 'rejected'"),
            ({"prompt": "say cat", "chosen": "cat", "rejected": ""}, "column 'rejected' is ''"),
            ({"prompt": "say cat", "chosen": "cat", "rejected": [3]}, "a message is '3'"),
            (
                {"chosen": [USER, GOOD], "rejected": [{**USER, "content": "say cow"}, BAD]},
                "not two answers of the assistant to one prompt",
            ),
            ({"prompt": "a", "chosen": [USER], "rejected": [USER, BAD]}, "no turn of the assist"),
        ],
    )
    def test_mistakes_are_one_line_with_their_place(self, tmp_path, record, told):
        with pytest.raises(UserError, match=told) as error:
            read(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"}, record)
        assert "records.jsonl:2" in str(error.value)
        assert "\n" not in str(error.value)

    def test_a_prompt_is_on_one_side_only(self, tmp_path):
        twice = [{**p, "rejected": f"{p['rejected']} {i}"} for p in easy_pairs(80) for i in (1, 2)]
        write_jsonl(tmp_path / "records.jsonl", twice)
        config = PairsConfig(str(tmp_path / "records.jsonl"), held_out=0.3)
        train, held_out = (
            {json.dumps(p.prompt.messages) for p in read_pairs(config, side)}
            for side in (False, True)
        )
        assert not train & held_out
        assert len(train) + len(held_out) == 80
        assert 8 < len(held_out) < 40


class TestDocuments:
    def test_only_the_answer_and_its_end_are_trained_on(self, tmp_path, template):
        record = {"prompt": [USER, BAD, USER], "chosen": "cat", "rejected": "dog dog"}
        ((chosen, rejected),), _ = encode(tmp_path, template, record)
        prompt = template.encode([USER, BAD, USER], mode="no_think", add_generation_prompt=True)
        tokenizer = template.tokenizer
        for document, text in ((chosen, "cat"), (rejected, "dog dog")):
            count = len(prompt.tokens)
            assert np.array_equal(document.tokens[:count], prompt.tokens)
            assert not document.trained[:count].any()
            assert document.trained[count:].all()
            assert tokenizer.decode(document.tokens[count:-1]) == text
            assert document.tokens[-1] == template.stop_id

    def test_a_rejected_answer_may_be_in_the_wrong_mode(self, tmp_path, template):
        thinks = {**BAD, "reasoning_content": "hm"}
        record = {"prompt": [USER], "chosen": [GOOD], "rejected": [thinks]}
        # A model is given an empty block there, so it can begin no such answer.
        plain = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
        one, notes = encode(tmp_path, template, *[record] * 70, plain)
        assert (len(one), notes["unasked"]) == (1, 70)
        with pytest.raises(UserError, match="no pair .*: 1 with .* another mode than the prompt"):
            encode(tmp_path, template, record)
        record = {"prompt": [USER], "chosen": [thinks], "rejected": [GOOD]}
        ((_, rejected),), notes = encode(tmp_path, template, record)
        trained = template.tokenizer.decode(rejected.tokens[rejected.trained])
        assert trained == "cat<|im_end|>"
        assert list(notes["modes"]) == ["think"]

    @pytest.mark.parametrize("mode", ["think", "no_think"])
    def test_both_answers_follow_the_prompt_that_a_model_is_given(self, tmp_path, template, mode):
        made = list(records(mode, 100))
        documents, notes = encode(tmp_path, template, *made, context=1000, mode=mode)
        assert (len(documents), notes["unasked"]) == (100, 0)
        for record, pair in zip(made, documents, strict=True):
            prompt = template.encode(record["prompt"], mode=mode, add_generation_prompt=True).tokens
            for document in pair:
                assert document.tokens[: len(prompt)].tolist() == prompt.tolist()
                assert document.trained.tolist().index(True) == len(prompt)

    def test_a_chosen_answer_may_not(self, tmp_path, template):
        thinks = {**GOOD, "reasoning_content": "hm"}
        record = {"prompt": [USER], "chosen": [thinks], "rejected": [BAD]}
        with pytest.raises(UserError, match="answer 1 reasons, but the mode is no_think"):
            encode(tmp_path, template, record, mode="no_think")

    def test_long_pairs_are_dropped_or_cut_and_counted(self, tmp_path, template):
        records = [
            {"prompt": "say cat", "chosen": "cat", "rejected": "dog " * n + "cow"}
            for n in (1, 60, 2, 80)
        ]
        records.append({"prompt": "say " * 100, "chosen": "cat", "rejected": "dog"})
        records.append({"prompt": "say cat", "chosen": "cat", "rejected": "cat"})
        whole, notes = encode(tmp_path, template, *records, context=10_000)
        assert len(whole) == 5
        assert (notes["dropped"], notes["cut"], notes["same"]) == (0, 0, 1)
        short = len(whole[0][1].tokens) + 10
        kept, notes = encode(tmp_path, template, *records, context=short)
        assert [len(b.tokens) for _, b in kept] == [len(whole[i][1].tokens) for i in (0, 2)]
        assert (notes["dropped"], notes["cut"]) == (3, 0)
        kept, notes = encode(tmp_path, template, *records, context=short, long="cut")
        assert (notes["dropped"], notes["cut"]) == (1, 2)  # of a prompt that long nothing is left
        for mine, theirs in zip(kept, whole[:4], strict=True):
            for cut, document in zip(mine, theirs, strict=True):
                assert np.array_equal(cut.tokens, document.tokens[:short])
                assert np.array_equal(cut.trained, document.trained[:short])
        with pytest.raises(UserError, match="no pair is left .*: 5 longer.* type --data.max_l"):
            encode(tmp_path, template, *records, context=5)

    def test_truncated_pairs_are_known(self, tmp_path, folder):
        records = [
            {"prompt": "say cat", "chosen": "cat", "rejected": "dog " * n + "cow"} for n in (1, 60)
        ]
        write_jsonl(tmp_path / "long.jsonl", records)
        subsets = {"long": PairsConfig(str(tmp_path / "long.jsonl"))}
        options = {"cache_dir": str(tmp_path / "cache"), "truncation": "cut", "context_length": 80}
        made = make_preferences(folder, subsets, **options)
        made.prepare_data()
        made.setup()
        assert made.truncated.tolist() == [False, True]
        assert any("1 cut to 40 tokens" in line for line in made.balance())

    def test_the_balance_tells_modes_with_their_weights(self, tmp_path, folder):
        thinking = [
            {**r, "chosen": f"<think>\nhm\n</think>\n{r['chosen']}"} for r in easy_pairs(10)
        ]
        write_jsonl(tmp_path / "think.jsonl", thinking)
        subsets = {
            "think": PairsConfig(str(tmp_path / "think.jsonl")),
            "plain": PairsConfig(str(folder / "pairs.jsonl"), weight=0.5),
        }
        made = make_preferences(folder, subsets, cache_dir=str(tmp_path / "cache"))
        made.prepare_data()
        made.setup()
        assert list(made.balance())[-1].split() == (
            ["all", "40", "0", "no_think", "75.0%,", "think", "25.0%"]
        )


class TestRows:
    def test_each_pair_is_whole_in_one_row_once_an_epoch(self, data):
        rows = data.rows
        for number in range(len(rows)):
            batch = rows.batch([number])
            items = batch.items[0].tolist()
            for place, item in enumerate(items):
                for side, document in enumerate(rows.documents_of(item)):
                    mine = batch.documents[0] == 2 * place + side
                    assert batch.tokens[0][mine].tolist() == document.tokens.tolist()
                    targets = batch.targets[0][mine]
                    trained = int(document.trained.sum())
                    assert int((targets != IGNORE).sum()) == trained
                    assert targets[-1] == IGNORE  # the end is a target, and has none
        together = np.concatenate([rows.items_of(number) for number in range(len(rows))])
        assert sorted(together) == list(range(len(rows.lengths)))

    def test_all_pairs_over_any_number_of_ranks(self, data, monkeypatch):
        from smol.data.loader import Layout

        for ranks in (1, 2, 3):
            seen = []
            for rank in range(ranks):
                monkeypatch.setattr(data, "layout", lambda: Layout(rank, ranks, 512))  # noqa: B023
                batches = data.all_pairs()
                seen += [i for batch in batches for i in batch.items[batch.items >= 0].tolist()]
            assert sorted(seen) == list(range(60))

    def test_only_what_is_used_is_asked_for(self, folder, tmp_path):
        config = PairsConfig(str(folder / "pairs.jsonl"), weight=0.5, held_out=0.2)
        made = make_preferences(folder, {"easy": config}, cache_dir=str(tmp_path))
        made.prepare_data()
        made.setup()
        seen = [i for b in made.all_pairs() for i in b.items[b.items >= 0].tolist()]
        assert len(seen) == 22 + 16
        assert sorted(seen) == made.used.nonzero().squeeze(1).tolist()

    def test_held_out_pairs_have_numbers_of_their_own(self, data):
        seen = [i for b in data.test_dataloader() for i in b.items[b.items >= 0].tolist()]
        assert sorted(seen) == list(range(44, 60))

    @settings(max_examples=20)
    @given(
        start=st.integers(0, 9), ranks=st.sampled_from([1, 2]), micro=st.sampled_from([256, 512])
    )
    def test_any_position_ranks_and_accumulation_give_the_same_pairs(
        self, data, start, ranks, micro
    ):
        def steps(ranks, micro, position, count):
            """Items by optimiser step, from a position on."""
            made = []
            for rank in range(ranks):
                from smol.data.loader import Layout

                data.micro_batch_tokens = micro
                data.layout = lambda rank=rank: Layout(rank, ranks, micro)
                loader = data.build_loader(data.build_curriculum())
                loader.seek(position * 1024)
                for batch in itertools.islice(loader, loader.accumulation * count):
                    made.append((batch.position // 1024, batch))
            by_step: dict[int, list[int]] = {}
            for step, batch in made:
                assert batch.exact
                by_step.setdefault(step, []).extend(batch.items[batch.items >= 0].tolist())
                assert batch.step_tokens > 0
            for step, batch in made:
                assert len(by_step[step]) == batch.step_tokens
            return {step: sorted(items) for step, items in by_step.items()}

        whole = steps(1, 1024, 0, 12)
        part = steps(ranks, micro, start, 3)
        assert part == {step: whole[step] for step in range(start, start + 3)}


class TestCorpus:
    @given(st.integers(0, 2**32), st.integers(0, 300))
    def test_near_misses_are_wrong_and_near(self, seed, number):
        task = next(itertools.islice(tasks("train", seed), number % len(KINDS), None))
        rng = random.Random(number)
        found = altered(task.answer, task.question, rng)
        assert not check(task, found)
        assert re.sub(r"\w+", "", found) == re.sub(r"\w+", "", task.answer)
        right, wrong = (re.findall(r"\w+", text) for text in (task.answer, found))
        if len(set(right)) == len(set(wrong)) == 1:
            return  # a word said several times is another word, as often
        # Words may change places, or one of them its digits.
        assert sum(a != b for a, b in zip(right, wrong, strict=True)) <= 2
        assert not any(part[0] == "0" != part for part in re.findall(r"\d+", found))

    def test_most_flaws_are_near_misses(self):
        flaws = [record["flaw"] for record in records("think", 1000)]
        assert flaws.count("near_miss") / 1000 == pytest.approx(NEAR_MISSES, abs=0.05)

    @pytest.mark.parametrize("mode", ["think", "no_think"])
    def test_strong_answers_are_right_and_weak_ones_are_not(self, mode):
        seen = set()
        for record in records(mode, 200):
            task = Task(**record["task"])
            chosen, rejected = record["chosen"][0], record["rejected"][0]
            flaw = record["flaw"]
            assert check(task, chosen["content"])
            assert bool(chosen.get("reasoning_content")) == (mode == "think")
            if flaw == "wrong_mode":
                assert check(task, rejected["content"])
                assert bool(rejected.get("reasoning_content")) == (mode != "think")
            else:
                assert not check(task, rejected["content"]), flaw
                assert bool(rejected.get("reasoning_content")) == (mode == "think")
            if flaw == "over_long":
                assert len(rejected["content"]) > 2 * len(chosen["content"])
            seen.add((flaw, task.kind))
        assert {flaw for flaw, _ in seen} == set(FLAWS) - (
            {"wrong_mode"} if mode != "think" else set()
        )
        assert len({kind for flaw, kind in seen if flaw == "near_miss"}) == len(KINDS)

    def test_files_are_seeded_and_held_out_questions_unseen(self, tmp_path):
        said = []
        folder = ensure_preferences(tmp_path, log=said.append)
        assert len(said) == 1
        assert ensure_preferences(tmp_path, log=said.append) == folder
        assert len(said) == 1
        for mode in ("think", "no_think"):
            lines = (folder / f"{mode}.jsonl").read_text().splitlines()
            again = [json.dumps(record, ensure_ascii=False) for record in records(mode, 50)]
            assert lines[:50] == again
            held_out = (folder / f"held_out_{mode}.jsonl").read_text().splitlines()
            for line in held_out:
                assert is_held_out(json.loads(line)["task"]["question"])
            assert not any(is_held_out(json.loads(line)["task"]["question"]) for line in lines)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"max_length": 200}, "a row of 256 tokens holds two answers of 128"),
        ({"max_length": 1}, "data.max_length is 1"),
        ({"truncation": "cutt"}, "Did you mean 'cut'"),
        ({"context_length": 0}, "data.context_length is 0"),
        ({"subsets": {"easy": PairsConfig("x.jsonl", mode="thinking")}}, "mode is 'thinking'"),
        ({"subsets": {"easy": PairsConfig("x.jsonl", weight=-1)}}, "weight is -1"),
    ],
)
def test_mistakes(folder, wrong, told):
    with pytest.raises(UserError, match=told) as error:
        make_preferences(folder, **wrong)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(folder, tmp_path):
    subsets = {"easy": PairsConfig(str(tmp_path / "none.jsonl"))}
    with pytest.raises(UserError, match="none.jsonl"):
        make_preferences(folder, subsets).prepare_data()
