"""Tokens and epochs of each source, against a count of what was trained on."""

import json

import pytest
from lightning import Callback, LightningDataModule
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from tiny import make_data, make_module, make_stages, make_trainer
from torch.utils.data import DataLoader

from callbacks import CheckpointRotation, Events
from callbacks.source_ledger import SourceLedger
from smol.errors import UserError
from smol.experiments import CSVLogger
from smol.runs import newest_checkpoint


class Tally(Callback):
    """Counts the tokens of each source by hand, row by row."""

    def __init__(self):
        self.tokens, self.by_step = {"cats": 0, "dogs": 0}, {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        for source in batch.sources.tolist():
            self.tokens[trainer.datamodule.source_names[source]] += batch.tokens.shape[1]
        self.by_step.setdefault(trainer.global_step, dict(self.tokens))  # of the whole step


STAGES = {
    "one": {"start_step": 0, "cats": 9.0, "dogs": 1.0},
    "two": {"start_step": 5, "cats": 0.25, "dogs": 0.75, "context_length": 64},
}


def fit(folder, sources, steps, *callbacks, resume=None):
    data = make_data(sources, make_stages(sources, **STAGES), micro_batch_tokens=128)
    trainer = make_trainer(
        folder, steps, callbacks=[Events(), *callbacks, CheckpointRotation(every=3)],
        logger=CSVLogger(str(folder)), log_every_n_steps=2,
    )  # fmt: skip
    trainer.fit(make_module(), data, ckpt_path=resume)
    return data


def repetitions(folder):
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == "repetition"]


def ledger_of(folder):
    """What was logged, by step."""
    rows = CSVLogger(str(folder)).rows()
    names = [f"data/{of}/{name}" for of in ("tokens", "epochs") for name in ("cats", "dogs")]
    return {
        int(row["step"]): {k: float(row[k]) for k in names} for row in rows if row.get(names[0])
    }


def test_counts_what_was_trained_on(sources, tmp_path):
    tally = Tally()
    data = fit(tmp_path, sources, 9, tally, SourceLedger())
    logged = ledger_of(tmp_path)
    assert list(logged) == [2, 4, 6, 8]
    spans = {name: order.tokens_per_epoch for name, order in data.orders.items()}
    for step, row in logged.items():
        for name, tokens in tally.by_step[step].items():
            assert row[f"data/tokens/{name}"] == tokens
            assert row[f"data/epochs/{name}"] == pytest.approx(tokens / spans[name])
    table = json.loads((tmp_path / "sources.json").read_text())
    planned = {"cats": (5 * 0.9 + 4 * 0.25) / 9, "dogs": (5 * 0.1 + 4 * 0.75) / 9}
    for name, tokens in tally.tokens.items():
        assert table[name]["tokens"] == tokens
        assert table[name]["epochs"] == pytest.approx(tokens / spans[name])
        assert table[name]["share"] == pytest.approx(tokens / (9 * 256))
        assert table[name]["planned_share"] == pytest.approx(planned[name])
        # Each stage is within two sequences of its weights.
        assert abs(tokens - planned[name] * 9 * 256) < 2 * (32 + 64)


def test_a_source_that_is_read_too_often_is_one_event(sources, tmp_path):
    tally = Tally()
    data = fit(tmp_path, sources, 12, tally, SourceLedger(max_epochs=0.02))
    first = {}
    for step, tokens in tally.by_step.items():
        for name, n in tokens.items():
            if step % 2 == 0 and n > 0.02 * data.orders[name].tokens_per_epoch:
                first.setdefault(name, step)
    assert {e["fields"]["source"]: e["step"] for e in repetitions(tmp_path)} == first
    assert len(repetitions(tmp_path)) == len(first) == 2
    assert "limit 0.02" in repetitions(tmp_path)[0]["message"]


def test_a_restart_tells_nothing_twice_and_counts_on(sources, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    fit(whole, sources, 12, SourceLedger(max_epochs=0.02))
    fit(broken, sources, 9, SourceLedger(max_epochs=0.02))
    fit(broken, sources, 12, SourceLedger(max_epochs=0.02), resume=newest_checkpoint(broken))
    assert ledger_of(whole) == ledger_of(broken)
    told = [[e["fields"]["source"] for e in repetitions(folder)] for folder in (whole, broken)]
    assert told[0] == told[1]
    tables = [json.loads((folder / "sources.json").read_text()) for folder in (whole, broken)]
    assert tables[0] == tables[1]


class OtherData(LightningDataModule):
    """Data of another make, which keeps a ledger."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def train_dataloader(self):
        return DataLoader(RandomDataset(32, 64))

    def ledger(self):
        self.calls += 1
        return {"data/tokens/web": 10.0 * self.calls, "data/epochs/web": float(self.calls)}


def test_in_any_trainer_whose_data_keep_a_ledger(tmp_path):
    data, ledger = OtherData(), SourceLedger(max_epochs=1)
    trainer = make_trainer(
        tmp_path, 9, plugins=[], callbacks=[ledger, Events()],
        logger=CSVLogger(str(tmp_path)), log_every_n_steps=4,
    )  # fmt: skip
    trainer.fit(BoringModel(), data)
    rows = [row for row in CSVLogger(str(tmp_path)).rows() if row.get("data/epochs/web")]
    assert [float(row["data/tokens/web"]) for row in rows] == [10, 20]
    assert data.calls == 3  # asked only where it logs, and at the end
    (event,) = repetitions(tmp_path)
    assert event["step"] == 8
    web = {"tokens": 30, "epochs": 3.0, "share": 1.0, "planned_share": None}
    assert json.loads((tmp_path / "sources.json").read_text()) == {"web": web}
    assert ledger.state_dict() == {"told": ["web"]}


def test_without_a_ledger_there_is_nothing_to_do(tmp_path):
    make_trainer(tmp_path, 3, plugins=[], callbacks=[SourceLedger()]).fit(BoringModel())
    assert not (tmp_path / "sources.json").exists()


def test_a_limit_is_positive():
    with pytest.raises(UserError, match="max_epochs is 0, expected more than 0"):
        SourceLedger(max_epochs=0)
