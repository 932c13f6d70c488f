"""Speed, utilisation and cost, against clocks and loops of the tests' own."""

import json
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning import Callback
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from tiny import make_data, make_module, make_stages, make_trainer
from torch.utils.data import DataLoader

from callbacks import CheckpointRotation, Events, Throughput
from callbacks.parts import loop_timer
from callbacks.throughput import attended_pairs
from smol.errors import UserError
from smol.experiments import CSVLogger
from smol.model.flops import num_matmul_parameters
from smol.runs import newest_checkpoint

PEAK = 1e12


def rows(folder):
    """Logged rows that have figures of throughput, as floats by name."""
    logged = CSVLogger(str(folder)).rows()
    return [
        {k.removeprefix("throughput/"): float(v) for k, v in row.items() if v}
        for row in logged
        if row.get("throughput/step_seconds")
    ]


class SlowData(RandomDataset):
    def __getitem__(self, index):
        time.sleep(0.02)
        return super().__getitem__(index)


class SlowModel(BoringModel):
    """Each part of training takes its own time; the first step and validation very long."""

    def training_step(self, batch, batch_idx):
        time.sleep(1.0 if batch_idx == 0 else 0.03)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        time.sleep(0.5)

    def train_dataloader(self):
        return DataLoader(SlowData(32, 64))

    def val_dataloader(self):
        return DataLoader(RandomDataset(32, 1))


class SlowCheckpoints(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step in (5, 10):
            trainer.save_checkpoint(f"{trainer.default_root_dir}/{batch_idx}.ckpt")

    def on_save_checkpoint(self, *_):
        time.sleep(0.5)


def test_time_is_split_and_pauses_are_left_out(tmp_path):
    """Alone in a Trainer that knows no tokens: one second of steps, three of everything else."""
    trainer = make_trainer(
        tmp_path, 13, plugins=[], callbacks=[Throughput(), SlowCheckpoints()],
        logger=CSVLogger(str(tmp_path)), log_every_n_steps=3, limit_val_batches=1,
        val_check_interval=4,
    )  # fmt: skip
    trainer.fit(SlowModel())
    logged = rows(tmp_path)
    assert len(logged) == 4
    for row in logged:
        assert 0.02 <= row["data_seconds"] < 0.1
        assert 0.03 <= row["compute_seconds"] < 0.15
        assert row["step_seconds"] == pytest.approx(row["data_seconds"] + row["compute_seconds"])
        assert row["steps_per_second"] == pytest.approx(1 / row["step_seconds"])
        assert not {"tokens_per_second", "mfu_palm", "model_flops"} & set(row)
    # One of four steps validates and two saved: what is between two steps belongs to the time left.
    assert logged[1]["eta_seconds"] > 7 * (logged[1]["step_seconds"] + 0.1)
    assert not isinstance(trainer.profiler, loop_timer.LoopTimer)


class Look(Callback):
    """Keeps the documents of every micro-batch."""

    def __init__(self):
        self.documents = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.documents.append((trainer.global_step, batch.documents.clone()))


def brute_force_flops(config, documents, attends):
    """Operations of every weight and of every pair of tokens that attend to each other."""
    rows, tokens = documents.shape
    pairs = sum(
        attends(row, i, j)
        for row in documents.tolist()
        for i in range(tokens)
        for j in range(tokens)
    )
    # Scores and weighted values: one product and one sum each, per channel; thrice with backward.
    attention = 3 * 2 * 2 * config.num_layers * config.num_heads * config.head_dim * pairs
    return 6 * num_matmul_parameters(config) * rows * tokens + attention


CONVENTIONS = {
    "palm": lambda row, i, j: True,
    "causal": lambda row, i, j: j <= i,
    "documents": lambda row, i, j: j <= i and row[i] == row[j],
}


def test_utilisation_while_context_and_documents_change(sources, tmp_path):
    stages = make_stages(
        sources,
        short={"start_step": 0, "cats": 1.0},
        long={"start_step": 5, "cats": 0.5, "dogs": 0.5, "context_length": 64},
    )
    look, module = Look(), make_module()
    trainer = make_trainer(
        tmp_path, 8, callbacks=[look, Throughput(peak_flops=PEAK)],
        logger=CSVLogger(str(tmp_path)), log_every_n_steps=2,
    )  # fmt: skip
    trainer.fit(module, make_data(sources, stages, micro_batch_tokens=128))
    logged = rows(tmp_path)
    assert [row["step"] for row in logged] == [2, 4, 6, 8]
    assert {d.shape[1] for _, d in look.documents} == {32, 64}
    for row in logged:
        first = max(row["step"] - 1, 2)  # two steps, but the run's first one does not count
        # A micro-batch that is not the last of its step is seen at the count of the step before.
        step_of = [step for step, _ in look.documents]
        seen = [d for k, (_, d) in enumerate(look.documents) if first <= k // 2 + 1 <= row["step"]]
        assert step_of == sorted(step_of)
        seconds = row["step_seconds"] * (row["step"] - first + 1)
        for name, attends in CONVENTIONS.items():
            flops = sum(brute_force_flops(module.decoder_config, d, attends) for d in seen)
            measured = row[f"mfu_{name}"] * seconds * PEAK
            assert measured == pytest.approx(flops, rel=1e-6), name
        assert row["tokens_per_second"] == pytest.approx(sum(d.numel() for d in seen) / seconds)
    everything = sum(
        brute_force_flops(module.decoder_config, d, CONVENTIONS["palm"]) for _, d in look.documents
    )
    assert logged[-1]["model_flops"] == pytest.approx(everything, rel=1e-6)


@given(st.lists(st.lists(st.integers(0, 2), min_size=7, max_size=7), min_size=1, max_size=4))
def test_attended_pairs(documents):
    numbers = torch.tensor(documents, dtype=torch.int32).cumsum(dim=1)
    expected = sum(
        row[i] == row[j] for row in numbers.tolist() for i in range(7) for j in range(i + 1)
    )
    assert int(attended_pairs(numbers)) == expected


def test_cost_survives_a_restart(sources, tmp_path):
    def fit(folder, steps, resume=None):
        throughput = Throughput()
        callbacks = [throughput, CheckpointRotation(every=3)]
        trainer = make_trainer(folder, steps, callbacks=callbacks)
        trainer.fit(make_module(), make_data(sources), ckpt_path=resume)
        return throughput.model_flops

    whole = fit(tmp_path / "whole", 6)
    half = fit(tmp_path / "broken", 3)
    assert fit(tmp_path / "broken", 6, newest_checkpoint(tmp_path / "broken")) == whole > half > 0


def test_an_unknown_device_has_no_utilisation(sources, tmp_path):
    trainer = make_trainer(
        tmp_path, 3, callbacks=[Throughput()], logger=CSVLogger(str(tmp_path))
    )  # fmt: skip
    trainer.fit(make_module(), make_data(sources))
    (row, _) = rows(tmp_path)
    assert "attended_tokens" in row
    assert not [name for name in row if "mfu" in name]


def test_waits_for_the_device_only_where_it_logs(sources, tmp_path, monkeypatch):
    waited = []
    callback = Throughput(peak_flops=PEAK)
    trainer = make_trainer(tmp_path, 9, callbacks=[callback], log_every_n_steps=4)
    for name in ("callbacks.throughput.synchronize", "callbacks.parts.loop_timer.synchronize"):
        monkeypatch.setattr(name, lambda device: waited.append(trainer.global_step))
    trainer.fit(make_module(), make_data(sources, micro_batch_tokens=128))
    assert waited == [1, 4, 8]  # the first step is when the clock begins


def test_more_than_the_peak_is_an_event(sources, tmp_path):
    callbacks = [Events(), Throughput(peak_flops=1.0)]
    make_trainer(tmp_path, 6, callbacks=callbacks).fit(make_module(), make_data(sources))
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    (event,) = [e for e in map(json.loads, lines) if e["kind"] == "impossible_mfu"]
    assert "peak_flops 1 is too low" in event["message"]


def test_a_peak_is_positive():
    with pytest.raises(UserError, match="peak_flops is 0, expected operations per second"):
        Throughput(peak_flops=0)
