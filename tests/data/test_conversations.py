"""Conversations: from records to documents, what is said before a run."""

import json

import numpy as np
import pytest
from conversation_parts import (
    ANSWER,
    OWN,
    PLAIN,
    THINKING,
    USER,
    rendered,
    template,  # noqa: F401
    texts,
    write,
)

from smol.data.conversation_tokens import SubsetConfig, read_conversations
from smol.data.conversations import Conversations, show_document
from smol.errors import UserError

# -- records -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "columns", "mode"),
    [
        ({"messages": PLAIN}, {}, "no_think"),
        ({"messages": THINKING}, {}, "think"),
        ({"messages": [USER, OWN]}, {}, "think"),
        ({"q": "the cat", "a": "a dog"}, {"prompt": "q", "response": "a"}, "no_think"),
        (
            {"turns": [{"from": "human", "value": "the cat"}, {"from": "gpt", "value": "a dog"}]},
            {"messages": "turns"},
            "no_think",
        ),
        (
            {"messages": PLAIN, "chat_template_kwargs": {"enable_thinking": False}},
            {},
            "no_think",
        ),
    ],
)
def test_forms_of_records(tmp_path, template, record, columns, mode):
    config = SubsetConfig(write(tmp_path / "x.jsonl", [record]), **columns)
    (conversation,) = read_conversations(config, held_out=False)
    assert conversation.mode == mode
    assert "enable_thinking" not in conversation.variables
    found, _ = rendered(config, template)
    messages = THINKING if mode == "think" else PLAIN
    expected = template.encode(messages, mode=mode)
    end = int(expected.trained.nonzero()[0][-1]) + 1
    assert found[0].tokens.tolist() == expected.tokens[:end].tolist()
    assert found[0].trained.tolist() == expected.trained[:end].tolist()


def test_parquet_and_compressed_files(tmp_path, template):
    import gzip

    import pyarrow
    import pyarrow.parquet

    records = [{"messages": PLAIN}, {"messages": THINKING}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "x.parquet")
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    plain = write(tmp_path / "z.jsonl", records)
    expected = texts(rendered(SubsetConfig(plain), template)[0], template)
    for name in ("x.parquet", "y.jsonl.gz"):
        found, _ = rendered(SubsetConfig(str(tmp_path / name)), template)
        assert texts(found, template) == expected


def test_a_saved_dataset(tmp_path, template):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"messages": PLAIN}]).save_to_disk(tmp_path / "set")
    found, _ = rendered(SubsetConfig(f"hub:{tmp_path / 'set'}"), template)
    assert texts(found, template, trained=True) == ["a dog<|im_end|>"]


def test_system_messages_and_tools_come_from_columns(tmp_path, template):
    tools = [{"name": "bark"}]
    kwargs = {"custom_instructions": "be a cat", "xml_tools": tools, "python_tools": None}
    records = [
        {"messages": PLAIN, "s": "be a dog", "t": json.dumps(tools), "chat_template_kwargs": None},
        {"messages": PLAIN, "s": None, "t": None, "chat_template_kwargs": kwargs},
        {"messages": [{"role": "system", "content": "own"}, *PLAIN], "s": "other", "t": tools},
    ]
    config = SubsetConfig(write(tmp_path / "x.jsonl", records), system="s", tools="t")
    found = texts(rendered(config, template)[0], template)
    for text, words in zip(found, ("be a dog", "be a cat", "own"), strict=True):
        assert f"## Custom Instructions\n{words}\n" in text
        assert '{"name": "bark"}' in text
    assert "other" not in found[2]


def test_custom_instructions_stand_beside_a_system_message(tmp_path, template):
    system, kwargs = {"role": "system", "content": "Be brief."}, {"custom_instructions": "Be Bob."}
    records = [
        {"messages": [system, *PLAIN], "s": None, "chat_template_kwargs": kwargs},
        {"messages": PLAIN, "s": "Be brief.", "chat_template_kwargs": kwargs},
        {"messages": PLAIN, "s": "Be Bob.", "chat_template_kwargs": kwargs},
    ]
    config = SubsetConfig(write(tmp_path / "x.jsonl", records), system="s")
    found = texts(rendered(config, template)[0], template)
    for text, words in zip(
        found, ["Be brief.\nBe Bob.", "Be brief.\nBe Bob.", "Be Bob."], strict=True
    ):
        assert f"## Custom Instructions\n{words}\n" in text


def test_tools_that_are_no_json(tmp_path, template):
    config = SubsetConfig(write(tmp_path / "x.jsonl", [{"messages": PLAIN, "t": "{x"}]), tools="t")
    with pytest.raises(UserError, match=r"^.*x.jsonl:1: column 't' is no JSON .*'{x'.*$"):
        rendered(config, template)


def test_held_out_conversations_are_apart(tmp_path, template):
    records = [{"messages": [{**USER, "content": f"cat {i}"}, ANSWER]} for i in range(200)]
    path = write(tmp_path / "x.jsonl", records)
    by_share = SubsetConfig(path, held_out=0.2)
    sides = [set(texts(rendered(by_share, template, side)[0], template)) for side in (False, True)]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 200
    assert 20 <= len(sides[1]) <= 60
    own = SubsetConfig(path, held_out=write(tmp_path / "y.jsonl", records[:3]))
    assert len(rendered(own, template, held_out=True)[0]) == 3
    assert len(rendered(own, template)[0]) == 200
    assert rendered(SubsetConfig(path), template, held_out=True)[0] == []


# -- documents -----------------------------------------------------------------------------------


def test_all_tokens_are_trained_on_when_asked(tmp_path, template):
    config = SubsetConfig(write(tmp_path / "x.jsonl", [{"messages": THINKING}]))
    (found,), _ = rendered(config, template, train_on="all", bare=True)
    assert found.trained.all()
    assert template.tokenizer.decode(found.tokens) == template.render(THINKING, bare=True)


def test_long_conversations_are_dropped_or_split(tmp_path, template):
    long = [USER, {**ANSWER, "content": "the cat sat " * 40}]
    path = write(tmp_path / "x.jsonl", [{"messages": PLAIN}, {"messages": long}])
    config, room = SubsetConfig(path), len(template.encode(PLAIN, mode="no_think").tokens)
    found, notes = rendered(config, template, context=room)
    assert len(found) == 1
    assert notes["dropped"] == 1
    pieces, notes = rendered(config, template, context=room, long="split")
    assert (notes["dropped"], notes["split"]) == (0, 1)
    assert all(len(piece.tokens) <= room for piece in pieces)
    targets = [t for piece in pieces[1:] for t in piece.tokens[1:][piece.trained[1:]].tolist()]
    whole = template.encode(long, mode="no_think")
    assert targets == whole.tokens[whole.trained].tolist()


# -- the data module -----------------------------------------------------------------------------


def make(folder, sources, **kwargs):
    rng = np.random.default_rng(0)
    for name, messages in (("plain", PLAIN), ("think", THINKING)):
        if not (folder / f"{name}.jsonl").exists():
            words = [" ".join(rng.choice(["cat", "dog"], rng.integers(1, 20))) for _ in range(40)]
            records = [{"messages": [{**USER, "content": w}, messages[1]]} for w in words]
            write(folder / f"{name}.jsonl", records)
    subsets = {
        "plain": SubsetConfig(str(folder / "plain.jsonl"), mode="no_think", held_out=0.2),
        "think": SubsetConfig(str(folder / "think.jsonl"), weight=0.5, mode="think"),
    }
    settings = {
        "subsets": subsets,
        "tokenizer": str(sources / "tokenizer"),
        "context_length": 256,
        "global_batch_tokens": 512,
        "micro_batch_tokens": 512,
        "cache_dir": str(folder / "cache"),
    }
    data = Conversations(**(settings | kwargs))
    data.prepare_data()
    data.setup()
    return data


def test_a_held_out_side_that_is_empty_is_told(tmp_path, sources):
    long = write(
        tmp_path / "long.jsonl", [{"messages": [{**USER, "content": "cat " * 400}, ANSWER]}]
    )
    make(tmp_path, sources)  # writes the other side
    config = SubsetConfig(str(tmp_path / "plain.jsonl"), mode="no_think", held_out=long)
    with pytest.warns(UserWarning, match="nothing of 'own' is held out.*longer than a row of 256"):
        make(tmp_path, sources, subsets={"own": config})


def test_the_balance_adds_up_to_what_is_read(tmp_path, sources):
    data = make(tmp_path, sources)
    header, *lines = data.balance()
    cells = {line.split()[0]: line.replace(",", "").split() for line in lines}
    batch = data.rows.batch(range(len(data.rows)))
    assert int(cells["all"][3]) == int((batch.targets != -100).sum())
    assert int(cells["think"][1]) == 20
    assert cells["plain"][-2:] == ["no_think", "100%"]
    assert "think" in lines[-1]
    assert header.split()[:3] == ["subset", "documents", "tokens"]
    assert next(iter(data.val_dataloader())).sources.tolist() == [0] * 2


def test_tokenising_happens_once_and_again_when_anything_changes(tmp_path, sources):
    data = make(tmp_path, sources)
    cache = tmp_path / "cache" / "conversations"
    made = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    again = make(tmp_path, sources)
    assert {file: file.stat().st_mtime_ns for file in cache.iterdir()} == made
    assert again.digests == data.digests
    other = make(tmp_path, sources, date="2025-07-01")
    assert len(list(cache.iterdir())) == 2 * len(made)
    assert other.digests != data.digests


def test_what_is_trained_on_is_marked(tmp_path, sources, template):
    document = template.encode(PLAIN, mode="no_think")
    plain = show_document(template.tokenizer, document, colour=False)
    assert plain.endswith("<think>\n\n</think>\n«a dog<|im_end|>»\n")
    coloured = show_document(template.tokenizer, document, colour=True)
    assert "\x1b[32ma dog<|im_end|>\x1b[0m" in coloured
    data = make(tmp_path, sources)
    assert data.example(colour=False).count("«") == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"subsets": {}}, "there is nothing to train on in no set at all"),
        ({"train_on": "asistant"}, "train_on is 'asistant', expected assistant or all. Did you"),
        ({"long": "cut"}, "data.long is 'cut', expected drop or split"),
        ({"context_length": 0}, "data.context_length is 0; expected a number of at least 1"),
        ({"seed": -1}, "data.seed is -1"),
        ({"subsets": {"x": SubsetConfig("nowhere.jsonl")}}, "nowhere.jsonl: no such file"),
        ({"chat_template": "."}, "expected a Jinja file or a chat_template.jinja"),
        (
            {"context_length": 32},
            "all 34 conversations are longer than a row of 32 tokens; type --d",
        ),
        ({"context_length": 1, "long": "split"}, "data.context_length is 1, expected at least 2"),
    ],
)
def test_mistakes_are_one_line(tmp_path, sources, settings, message):
    with pytest.raises(UserError) as error:
        make(tmp_path, sources, **settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_template_without_marks_is_refused(tmp_path, sources):
    file = tmp_path / "bare.jinja"
    file.write_text("{{ messages[0].content }}<|im_end|>")
    with pytest.raises(UserError, match="has no {% generation %} blocks"):
        make(tmp_path, sources, chat_template=str(file))
