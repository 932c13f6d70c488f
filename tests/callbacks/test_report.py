"""What a run shows: the progress line, the sample, the report."""

import re

from tiny import make_data, make_module, make_trainer

from callbacks import ProgressLine, RunReport, SampleText
from smol.experiments import CSVLogger


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


def test_progress_works_without_a_position(tmp_path, capsys):
    """In any Trainer, with any data."""
    from lightning.pytorch.demos.boring_classes import BoringModel

    make_trainer(tmp_path, 3, callbacks=[ProgressLine(seconds=0)], plugins=[]).fit(BoringModel())
    assert "step 3/3" in capsys.readouterr().out
