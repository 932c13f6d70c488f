"""What a run shows: the progress line, the sample, the report."""

import re
import time

import pytest
import torch
from lightning import Callback
from tiny import make_data, make_module, make_trainer

from callbacks import ProgressLine, RunReport, SampleText, Throughput
from callbacks.eval_loss import EvalLoss
from smol.errors import UserError
from smol.experiments import CSVLogger
from smol.generation import Completion


def test_a_whole_run_on_the_screen(sources, tmp_path, capsys):
    folder = tmp_path / "myrun"
    trainer = make_trainer(
        folder,
        12,
        callbacks=[
            ProgressLine(seconds=0),
            SampleText("the cat", tokens=20),
            RunReport(next_command="python src/train.py fit --config configs/stage2.yaml"),
        ],
        logger=CSVLogger(str(folder)),
        limit_val_batches=1.0,
        val_check_interval=6,
    )
    trainer.fit(make_module(), make_data(sources))
    out = capsys.readouterr().out
    lines = re.findall(r"step (\d+)/12  loss (\d\.\d{3})  [\d,]+ tokens/s", out)
    assert [int(step) for step, _ in lines][:3] == [2, 3, 4]  # the first loss is that of step 1
    assert re.search(r"step 12/12 .* took 0:\d\d", out)
    for name in ("cats", "dogs"):
        assert re.search(rf"  {name} +\d\.\d{{3}}\n", out)
    assert "the model writes\n  the cat" in out
    assert "next        python src/train.py fit --config configs/stage2.yaml" in out
    assert (folder / "samples.txt").read_text().startswith("--- step 12\nthe cat")
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
    assert f"report      {folder / 'report.html'}\n" in out
    assert "## What the run gained" in (folder / "report.md").read_text()
    assert "torch" in (folder / "environment.json").read_text()


def test_a_report_that_cannot_be_made_costs_nothing(sources, tmp_path, capsys, monkeypatch):
    def fails(folder):
        raise OSError("No space left on device")

    monkeypatch.setattr("callbacks.run_report.write_run_report", fails)
    folder = tmp_path / "run"
    logger = CSVLogger(str(folder))
    trainer = make_trainer(folder, 2, callbacks=[RunReport("next line")], logger=logger)
    with pytest.warns(UserWarning, match="could not be written: .*No space left on device"):
        trainer.fit(make_module(), make_data(sources))
    assert "next        next line" in capsys.readouterr().out


def test_a_sample_changes_nothing_and_is_repeatable(sources, tmp_path):
    texts = []
    for _ in range(2):
        sample = SampleText(tokens=30)
        module = make_module()
        make_trainer(tmp_path, 3, callbacks=[sample]).fit(module, make_data(sources))
        assert module.training
        texts.append(sample.text)
    assert texts[0] == texts[1]
    assert len(texts[0]) > 20


class Random(Callback):
    """Training that draws random numbers; what it ends with, and what was seen of the sampling."""

    def on_train_start(self, trainer, module):
        module.decoder.model.layers[0].eval()  # a part that somebody has frozen

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        layers = module.decoder.model.layers
        assert [layer.training for layer in layers] == [False, True]

    def on_before_optimizer_step(self, trainer, module, optimizer):
        for parameter in module.parameters():
            parameter.grad.add_(torch.randn_like(parameter), alpha=1e-3)

    def on_train_end(self, trainer, module):
        self.weights = [p.detach().clone() for p in module.parameters()]
        self.generator = torch.get_rng_state()


def test_samples_on_the_way_change_nothing(sources, tmp_path):
    ends, rows = [], []
    for name, callbacks in {"with": [SampleText(tokens=9, every=2)], "without": []}.items():
        torch.manual_seed(3)
        ends.append(Random())
        folder = tmp_path / name
        trainer = make_trainer(
            folder, 5, callbacks=[ends[-1], *callbacks], logger=CSVLogger(str(folder))
        )
        trainer.fit(make_module(), make_data(sources, micro_batch_tokens=128))
        rows.append(CSVLogger(str(folder)).rows())
    for a, b in zip(ends[0].weights, ends[1].weights, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(ends[0].generator, ends[1].generator)
    assert rows[0] == rows[1]
    headers = re.findall(r"^--- step (\d+)$", (tmp_path / "with/samples.txt").read_text(), re.M)
    assert headers == ["2", "4", "5"]


def test_a_sample_is_written_once_for_each_step(sources, tmp_path):
    """Also where a run ends on one, and where it goes on from one."""

    def fit(steps, resume=None):
        sample = SampleText(tokens=5, every=2)
        trainer = make_trainer(tmp_path, steps, callbacks=[sample])
        data = make_data(sources, micro_batch_tokens=128)
        trainer.fit(make_module(), data, ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return sample

    fit(4)
    for _ in range(2):  # the second time as after a crash that lost the steps since
        assert fit(7, tmp_path / "4.ckpt").text is not None
        headers = re.findall(r"^--- step (\d+)$", (tmp_path / "samples.txt").read_text(), re.M)
        assert headers == ["2", "4", "6", "7"]


def test_writing_is_no_time_of_training(sources, tmp_path, monkeypatch):
    def slow(self, prompts, sampling):
        time.sleep(0.8)
        return [Completion([5], "x", [0.0], "length")]

    monkeypatch.setattr("callbacks.sample_text.Generator.generate", slow)
    trainer = make_trainer(
        tmp_path, 4, callbacks=[Throughput(), SampleText(every=1)], logger=CSVLogger(str(tmp_path))
    )
    trainer.fit(make_module(), make_data(sources))
    rows = CSVLogger(str(tmp_path)).rows()[1:]  # of the first step no time is taken
    seconds = [float(row["throughput/step_seconds"]) for row in rows]
    assert len(seconds) == 3
    assert min(seconds) < 0.8


def test_nothing_is_compiled_for_a_sample(sources, tmp_path):
    from torch._dynamo.testing import CompileCounter

    counts = []
    for callbacks in ([SampleText(tokens=9, every=1)], []):
        torch._dynamo.reset()
        counter = CompileCounter()

        class Compile(Callback):
            def on_train_start(self, trainer, module, counter=counter):
                for layer in module.decoder.model.layers:
                    layer.compile(backend=counter)

        make_trainer(tmp_path, 3, callbacks=[Compile(), *callbacks]).fit(
            make_module(), make_data(sources)
        )
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] > 0


def test_a_sample_needs_a_decoder_and_a_tokenizer(tmp_path):
    from lightning.pytorch.demos.boring_classes import BoringModel

    sample = SampleText(every=1)
    make_trainer(tmp_path, 2, callbacks=[sample], plugins=[]).fit(BoringModel())
    assert sample.text is None
    with pytest.raises(UserError, match="every is -1, expected 0 or more"):
        SampleText(every=-1)


def test_the_report_says_what_was_gained(sources, tmp_path, capsys):
    evaluation = EvalLoss()
    trainer = make_trainer(tmp_path, 20, callbacks=[evaluation, RunReport()], limit_val_batches=1.0)
    trainer.fit(make_module(), make_data(sources))
    out = capsys.readouterr().out
    assert re.search(r"held-out bits per byte +before +after +gained\n", out)
    for name in ("cats", "dogs"):
        found = re.search(rf"  {name} +(\d\.\d{{3}}) +(\d\.\d{{3}}) +(\d\.\d{{3}})\n", out)
        before, after, gained = map(float, found.groups())
        metric = f"held_out/bits_per_byte/{name}"
        assert before == pytest.approx(evaluation.before["metrics"][metric], abs=6e-4)
        assert after == pytest.approx(float(trainer.callback_metrics[metric]), abs=6e-4)
        assert gained == pytest.approx(before - after, abs=1.1e-3)
        assert gained > 0
    assert f"plot        {tmp_path / 'loss_by_position.png'}\n" in out
    assert (tmp_path / "loss_by_position.png").exists()


def test_progress_works_without_a_position(tmp_path, capsys):
    """In any Trainer, with any data."""
    from lightning.pytorch.demos.boring_classes import BoringModel

    make_trainer(tmp_path, 3, callbacks=[ProgressLine(seconds=0)], plugins=[]).fit(BoringModel())
    assert "step 3/3" in capsys.readouterr().out
