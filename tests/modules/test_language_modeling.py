"""Training: normalisation, schedules, resume, logging, all against an independent account."""

import math

import pytest
import torch
from lightning import Callback
from tiny import make_data, make_module, make_stages, make_trainer

from smol.data.batch import IGNORE
from smol.errors import UserError
from smol.experiments import CSVLogger
from smol.optim import WSD, Cosine, OptimizerConfig, clip_gradients


class Recorder(Callback):
    """What each optimiser step was: gradients before clipping, learning rate, rows, loss."""

    def __init__(self, mask=None):
        self.mask = mask  # hides targets of a batch, to make counts uneven
        self.steps, self.rows = [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if self.mask is not None:
            self.mask(batch)
        self.rows += [tuple(row) for row in batch.tokens.tolist()]

    def on_before_optimizer_step(self, trainer, module, optimizer):
        named = [(n, p.grad) for n, p in module.named_parameters() if p.grad is not None]
        gradients = {name: gradient.clone() for name, gradient in named}
        group = optimizer.param_groups[0]
        self.steps.append(
            {
                "gradients": gradients,
                "lr": group["lr"],
                "decay": max(g["weight_decay"] for g in optimizer.param_groups),
                "betas": group["betas"],
                "rows": sorted(self.rows),
            }
        )
        self.rows = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if "train/loss" in trainer.callback_metrics and self.steps:
            self.steps[-1]["loss"] = float(trainer.callback_metrics["train/loss"])


def train(
    folder, sources, max_steps=3, ckpt_path=None, mask=None, module=None, data=None, **kwargs
):
    recorder = Recorder(mask)
    module = module or make_module()
    callbacks = [recorder, *kwargs.pop("callbacks", [])]
    trainer = make_trainer(folder, max_steps, callbacks=callbacks, **kwargs)
    trainer.fit(module, data or make_data(sources), ckpt_path=ckpt_path)
    return trainer, module, recorder


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def assert_equal(a, b, tolerance=0.0):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)


def uneven(batch):
    """Hide an uneven number of targets; which ones depends on the row alone, not on the batch."""
    batch.exact = False
    for row, targets in zip(batch.tokens, batch.targets, strict=True):
        targets[: int(row.sum()) % 29] = IGNORE


class TestNormalisation:
    @pytest.mark.parametrize("mask", [None, uneven])
    @pytest.mark.parametrize("micro", [32, 64])
    def test_accumulation_changes_nothing(self, sources, tmp_path, mask, micro):
        whole = train(tmp_path, sources, mask=mask)[2].steps
        data = make_data(sources, micro_batch_tokens=micro)
        parts = train(tmp_path, sources, mask=mask, data=data)[2].steps
        for a, b in zip(whole, parts, strict=True):
            assert a["rows"] == b["rows"]
            assert_equal(a["gradients"], b["gradients"], 2e-6)

    def test_the_gradient_is_that_of_the_mean_over_trained_tokens(self, sources, tmp_path):
        data = make_data(sources, micro_batch_tokens=64)
        _, module, recorder = train(tmp_path, sources, max_steps=1, mask=uneven, data=data)
        reference = make_module()
        reference.trainer = module.trainer
        reference.configure_model()
        batches = list(first_step(data))
        for batch in batches:
            uneven(batch)
        logits = [reference.decoder(b.tokens, b.positions, b.documents) for b in batches]
        loss = torch.nn.functional.cross_entropy(
            torch.cat([x.flatten(0, 1) for x in logits]),
            torch.cat([b.targets.flatten() for b in batches]),
            ignore_index=IGNORE,
        )
        loss.backward()
        expected = {n: p.grad for n, p in reference.named_parameters()}
        assert_equal(recorder.steps[0]["gradients"], expected, 2e-6)

    def test_a_window_without_a_target_is_a_dropped_step(self, sources, tmp_path):
        calls = []

        def hide_second(batch):
            batch.exact = False
            calls.append(batch.position)
            if batch.position == 256:
                batch.targets.fill_(IGNORE)

        module = make_module()
        seen = {}

        class Watch(Callback):
            def on_train_batch_start(self, trainer, m, batch, batch_idx):
                seen[batch.position] = (trainer.global_step, weights(m))

        _, module, _ = train(
            tmp_path, sources, mask=hide_second, module=module, callbacks=[Watch()]
        )
        assert calls == [0, 256, 512, 768]
        assert [seen[p][0] for p in calls] == [0, 1, 1, 2]
        assert_equal(seen[256][1], seen[512][1])
        assert all(torch.isfinite(p).all() for p in module.parameters())

    def test_z_loss_enters_the_gradient(self, sources, tmp_path):
        plain = train(tmp_path, sources, 1)[2].steps[0]["gradients"]
        with_z = train(tmp_path, sources, 1, module=make_module(z_loss=1e-2))[2].steps[0]
        data = make_data(sources)
        _, module, _ = train(tmp_path, sources, 1, data=data)
        reference = make_module()
        reference.trainer = module.trainer
        reference.configure_model()
        (batch,) = first_step(data)
        logits = reference.decoder(batch.tokens, batch.positions, batch.documents)
        (1e-2 * logits.logsumexp(-1).square().mean()).backward()
        expected = {n: plain[n] + p.grad for n, p in reference.named_parameters()}
        assert_equal(with_z["gradients"], expected, 2e-6)


def first_step(data):
    """The micro-batches of the first optimiser step."""
    data.loader.seek(0)
    for batch in data.loader:
        yield batch
        if batch.micro == batch.accumulation - 1:
            return


class TestResume:
    @pytest.mark.parametrize("stop", [1, 4, 7])
    def test_interrupted_equals_uninterrupted(self, sources, tmp_path, stop):
        stages = make_stages(
            sources,
            one={"start_step": 0, "cats": 0.7, "dogs": 0.3},
            two={"start_step": 5, "cats": 0.2, "dogs": 0.8, "context_length": 64},
        )
        whole = train(tmp_path, sources, 10, data=make_data(sources, stages))
        first = train(tmp_path, sources, stop, data=make_data(sources, stages))
        first[0].save_checkpoint(tmp_path / "ck")
        data = make_data(sources, stages, micro_batch_tokens=64, num_workers=1)
        rest = train(tmp_path, sources, 10, tmp_path / "ck", data=data)
        for a, b in zip(whole[2].steps[stop:], rest[2].steps, strict=True):
            assert a["rows"] == b["rows"]
            assert a["lr"] == b["lr"]
        assert rest[0].global_step == 10
        assert_equal(weights(whole[1]), weights(rest[1]), 1e-5)
        same = train(tmp_path, sources, 10, tmp_path / "ck", data=make_data(sources, stages))
        assert_equal(weights(whole[1]), weights(same[1]))

    def test_dropout_does_not_depend_on_where_a_run_was_interrupted(self, sources, tmp_path):
        whole = train(tmp_path, sources, 6, module=make_module(dropout=0.2))
        first = train(tmp_path, sources, 3, module=make_module(dropout=0.2))
        first[0].save_checkpoint(tmp_path / "ck")
        torch.manual_seed(1)
        rest = train(tmp_path, sources, 6, tmp_path / "ck", module=make_module(dropout=0.2))
        assert_equal(weights(whole[1]), weights(rest[1]))
        plain = train(tmp_path, sources, 6)
        assert not torch.equal(*(next(m.parameters()) for m in (whole[1], plain[1])))

    def test_hyper_parameters_are_those_of_the_current_configuration(self, sources, tmp_path):
        first = train(tmp_path, sources, 4)
        first[0].save_checkpoint(tmp_path / "ck")
        module = make_module(
            schedule=Cosine(warmup_steps=2, total_steps=8),
            optimizer=OptimizerConfig(learning_rate=0.5, weight_decay=0.3, betas=(0.8, 0.9)),
        )
        steps = train(tmp_path, sources, 8, tmp_path / "ck", module=module)[2].steps
        expected = [0.5 * module.schedule(step) for step in range(4, 8)]
        assert [s["lr"] for s in steps] == pytest.approx(expected)
        assert all(s["decay"] == 0.3 and s["betas"] == (0.8, 0.9) for s in steps)

    def test_a_decay_that_a_later_file_adds_starts(self, sources, tmp_path):
        first = train(tmp_path, sources, 5, module=make_module(schedule=WSD(2)))
        first[0].save_checkpoint(tmp_path / "ck")
        module = make_module(schedule=WSD(2, decay_steps=4, decay_start_step=5))
        steps = train(tmp_path, sources, 9, tmp_path / "ck", module=module)[2].steps
        assert [s["lr"] for s in steps] == pytest.approx([0.01, 0.0075, 0.005, 0.0025])

    def test_a_changed_order_is_one_line(self, sources, tmp_path):
        trainer, _, _ = train(tmp_path, sources, 1)
        trainer.save_checkpoint(tmp_path / "ck")
        with pytest.raises(UserError, match="made with data.seed=6, the configuration says 7"):
            train(tmp_path, sources, 2, tmp_path / "ck", data=make_data(sources, seed=7))

    def test_a_changed_source_is_one_line_unless_allowed(self, sources, tmp_path, monkeypatch):
        trainer, _, _ = train(tmp_path, sources, 1)
        trainer.save_checkpoint(tmp_path / "ck")
        data = make_data(sources)
        original = type(data).digests.fget
        changed = property(lambda self: original(self) | {"cats": "0123456789abcdef"})
        monkeypatch.setattr(type(data), "digests", changed)
        with pytest.raises(UserError, match="source 'cats' has changed since stage 'one'"):
            train(tmp_path, sources, 2, tmp_path / "ck", data=data)
        allowed = make_data(sources, allow_changed_data=True)
        trainer, _, _ = train(tmp_path, sources, 2, tmp_path / "ck", data=allowed)
        assert [s.start for s in allowed.loader.curriculum.segments] == [0, 256]


class TestLog:
    def test_rows_of_a_restarted_run_are_those_of_an_uninterrupted_one(self, sources, tmp_path):
        options = {"limit_val_batches": 1.0, "val_check_interval": 3}
        whole = tmp_path / "whole"
        train(whole, sources, 8, logger=CSVLogger(str(whole)), **options)
        broken = tmp_path / "broken"
        trainer, _, _ = train(broken, sources, 4, logger=CSVLogger(str(broken)), **options)
        trainer.save_checkpoint(tmp_path / "ck")
        # It went on to step 6 before it died.
        train(broken, sources, 6, tmp_path / "ck", logger=CSVLogger(str(broken)), **options)
        train(broken, sources, 8, tmp_path / "ck", logger=CSVLogger(str(broken)), **options)
        a, b = CSVLogger(str(whole)).rows(), CSVLogger(str(broken)).rows()
        assert [row["step"] for row in a] == [str(i) for i in range(1, 9)]
        # Step 4 was the last of a shorter run once, and validated: only there they may differ.
        for row, other in zip(a, b, strict=True):
            assert {k: v for k, v in row.items() if v} == {k: other[k] for k in row if row[k]}

    def test_what_is_logged(self, sources, tmp_path):
        logger = CSVLogger(str(tmp_path))
        recorder = train(tmp_path, sources, 5, logger=logger)[2]
        rows = logger.rows()
        for i, row in enumerate(rows):
            gradients = recorder.steps[i]["gradients"].values()
            norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
            assert float(row["train/grad_norm"]) == pytest.approx(norm, rel=1e-5)
            assert float(row["train/learning_rate"]) == pytest.approx(recorder.steps[i]["lr"])
            assert float(row["train/tokens"]) == 256 * (i + 1)
            assert float(row["train/z_loss"]) > 0
        assert float(rows[0]["train/loss"]) == pytest.approx(math.log(384), rel=0.05)
        assert float(rows[-1]["train/loss"]) < float(rows[0]["train/loss"])

    def test_validation_counts_optimiser_steps(self, sources, tmp_path):
        steps = []

        class Count(Callback):
            def on_validation_start(self, trainer, module):
                steps.append(trainer.global_step)

        data = make_data(sources, micro_batch_tokens=64)
        train(
            tmp_path, sources, 8, data=data, callbacks=[Count()],
            limit_val_batches=1.0, val_check_interval=3,
        )  # fmt: skip
        assert steps == [3, 6, 8]


class TestBitsPerByte:
    def test_equals_a_count_by_hand(self, sources, tmp_path):
        data = make_data(sources, held_out_tokens=10**6)
        module = make_module()
        trainer = make_trainer(tmp_path, 1, limit_val_batches=1.0)
        metrics = trainer.validate(module, data, verbose=False)[0]
        bits, size = {}, {}
        with torch.no_grad():
            for batch in data.val_dataloader():
                logits = module.decoder(batch.tokens, batch.positions, batch.documents)
                picked = logits.log_softmax(-1).gather(-1, batch.targets[..., None])[..., 0]
                for row, source in enumerate(batch.sources.tolist()):
                    name = data.source_names[source]
                    text = batch.targets[row] != data.tokenizer.eos_id
                    bits[name] = bits.get(name, 0) - float(picked[row][text].sum()) / math.log(2)
                    written = data.tokenizer.decode(batch.targets[row][text].tolist())
                    size[name] = size.get(name, 0) + len(written.encode())
        for name in bits:
            expected = bits[name] / size[name]
            assert metrics[f"held_out/bits_per_byte/{name}"] == pytest.approx(expected, rel=1e-4)
        expected = sum(bits.values()) / sum(size.values())
        assert metrics["held_out/bits_per_byte"] == pytest.approx(expected, rel=1e-4)

    def test_does_not_depend_on_the_number_of_ranks(self, sources):
        from smol.data.held_out import HeldOut
        from smol.data.loader import Layout
        from smol.data.streams import TokenStream

        names = ("cats", "dogs")
        streams = {i: TokenStream(sources / n, "held_out") for i, n in enumerate(names)}

        def rows(ranks):
            seen = []
            for rank in range(ranks):
                dataset = HeldOut(streams, 0, 32, Layout(rank, ranks, 96), 2000)
                for batch in dataset:
                    kept = batch.targets[:, 0] != IGNORE
                    seen += [tuple(r) for r in batch.targets[kept].tolist()]
            return sorted(seen)

        assert rows(1) == rows(2) == rows(3)


def test_a_vocabulary_that_does_not_fit_is_one_line(sources, tmp_path):
    with pytest.raises(UserError, match="has 384 tokens, the model only 128 rows") as error:
        train(tmp_path, sources, 1, module=make_module(vocab_size=128))
    assert "--model.decoder.vocab_size 384" in str(error.value)


def test_clipping_scales_the_joint_norm():
    parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2))]
    parameters[0].grad = torch.tensor([3.0, 0, 0])
    parameters[1].grad = torch.tensor([[0, 4.0], [0, 0]])
    assert float(clip_gradients(parameters, None)) == 5
    assert float(clip_gradients(parameters, 1.0)) == 5
    assert parameters[0].grad[0] == pytest.approx(0.6, rel=1e-5)
    assert parameters[1].grad[0, 1] == pytest.approx(0.8, rel=1e-5)
