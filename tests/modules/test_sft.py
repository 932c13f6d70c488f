"""Supervised fine-tuning: language modelling on what the assistant says."""

import json

import pytest
import torch
from tiny import Bomb, Die, make_module, make_trainer

from callbacks.parts.trial_data import find_fault
from smol.data.batch import IGNORE
from smol.data.conversation_tokens import SubsetConfig
from smol.data.conversations import Conversations
from smol.losses import linear_cross_entropy
from smol.model import Decoder


@pytest.fixture(scope="module")
def chats(sources, tmp_path_factory):
    """Questions whose answer follows from them, in both modes."""
    folder = tmp_path_factory.mktemp("chats")
    for name in ("think", "no_think"):
        lines = []
        for i in range(60):
            animal, place = ("cat", "mat") if i % 2 else ("dog", "house")
            messages = [
                {"role": "user", "content": f"the {animal} {'and ' * (i // 2)}one"},
                {"role": "assistant", "content": f"on the {place}"},
            ]
            if name == "think":
                messages[1]["reasoning_content"] = f"the {animal} sat"
            lines.append(json.dumps({"messages": messages}) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def make_data(sources, chats):
    def make(**kwargs):
        settings = {
            "subsets": {
                name: SubsetConfig(str(chats / f"{name}.jsonl"), mode=name, held_out=0.3)
                for name in ("think", "no_think")
            },
            "tokenizer": str(sources / "tokenizer"),
            "context_length": 256,
            "global_batch_tokens": 1024,
            "micro_batch_tokens": 1024,
            "cache_dir": str(chats / "cache"),
        }
        return Conversations(**(settings | kwargs))

    return make


def weights(module):
    return {name: p.detach().clone() for name, p in module.decoder.named_parameters()}


def assert_equal(a, b, **tolerance):
    for name in a:
        torch.testing.assert_close(a[name], b[name], **(tolerance or {"rtol": 0, "atol": 0}))


def test_a_conversation_in_a_row_is_as_alone(make_data):
    data = make_data()
    data.prepare_data()
    data.setup()
    module = make_module()
    decoder = Decoder(module.decoder_config)
    torch.nn.init.normal_(decoder.model.embed_tokens.weight)

    def nll(tokens, positions, documents, targets):
        def head(hidden, weight):
            return linear_cross_entropy(hidden, weight, targets=targets, ignore_index=IGNORE)

        with torch.no_grad():
            return decoder(tokens, positions, documents, head=head)[0]

    batch = data.rows.batch(range(2))
    packed = nll(batch.tokens, batch.positions, batch.documents, batch.targets)
    for row in range(2):
        for number, item in enumerate(batch.items[row][batch.items[row] >= 0].tolist()):
            (document,) = data.rows.documents_of(item)
            tokens = torch.tensor(document.tokens[None].astype("int64"))
            targets = torch.where(torch.tensor(document.trained[None]), tokens, IGNORE)[:, 1:]
            alone = nll(tokens[:, :-1], None, None, targets)
            mine = packed[row][batch.documents[row] == number]
            assert len(mine) == alone.shape[1] + 1
            torch.testing.assert_close(mine[:-1], alone[0], rtol=1e-4, atol=1e-5)
            assert mine[-1] == 0


def test_batches_are_what_the_trial_of_a_machine_expects(make_data):
    data = make_data()
    data.prepare_data()
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert find_fault(batch, data.tokenizer.vocab_size) is None


def test_held_out_loss_falls_in_both_modes(make_data, tmp_path):
    trainer = make_trainer(tmp_path, 30, limit_val_batches=1.0)
    module, data = make_module(), make_data()
    trainer.fit(module, data)
    after = {k: float(v) for k, v in trainer.callback_metrics.items()}
    (before,) = make_trainer(tmp_path, 1, limit_val_batches=1.0).validate(
        make_module(), make_data(), verbose=False
    )
    for mode in ("think", "no_think"):
        name = f"held_out/bits_per_byte/{mode}"
        assert after[name] < 0.5 * before[name]
    assert (tmp_path / "tokenizer" / "chat_template.jinja").is_file()


def test_accumulation_changes_nothing(make_data, tmp_path):
    made = []
    for micro in (1024, 256):
        module = make_module()
        data = make_data(micro_batch_tokens=micro)
        make_trainer(tmp_path, 3).fit(module, data)
        made.append(weights(module))
    assert_equal(*made, rtol=1e-4, atol=1e-4)


def test_a_run_that_was_killed_goes_on_exactly(make_data, tmp_path):
    whole = make_module()
    make_trainer(tmp_path, 6).fit(whole, make_data())
    first = make_trainer(tmp_path, 6, callbacks=[Bomb(4)])
    with pytest.raises(Die):
        first.fit(make_module(), make_data())
    half = make_trainer(tmp_path, 3)
    half.fit(make_module(), make_data())
    half.save_checkpoint(tmp_path / "half")
    again = make_module()
    make_trainer(tmp_path, 6).fit(again, make_data(num_workers=1), ckpt_path=tmp_path / "half")
    assert_equal(weights(whole), weights(again))
