"""Preference optimisation against logits written out, and against itself in other arrangements."""

from pathlib import Path

import pytest
import torch
from lightning import Callback
from preference_parts import (
    assert_same,
    cache_files,
    make_module,
    make_preferences,
    prepare_pairs,
    run,
)
from tiny import Bomb, Die

from smol.data.batch import IGNORE
from smol.data.pairs import PairsConfig
from smol.errors import UserError
from smol.losses import PreferenceLoss
from smol.model.io import save_decoder
from smol.modules.preference import sum_by_answer
from smol.modules.reference import gather_log_probs

LOSSES = {
    "apo_zero": {"beta": 0.1},
    "apo_down": {"beta": 0.1},
    "dpo": {"beta": 0.1},
    "dpo_norm": {"beta": 2.0},
    "cdpo": {"beta": 0.1, "label_smoothing": 0.1},
    "robust": {"beta": 0.1, "label_smoothing": 0.1},
    "hinge": {"beta": 0.1},
    "ipo": {"beta": 0.5},
    "simpo": {"beta": 2.0, "gamma": 0.5},
}


LARGE = {"context_length": 1024, "global_batch_tokens": 4096, "micro_batch_tokens": 4096}


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    return prepare_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture
def folder(pairs, tmp_path):
    """The pairs, and room for a run and its caches."""
    for name in ("tokenizer", "pairs.jsonl"):
        (tmp_path / name).symlink_to(pairs / name)
    return tmp_path


@pytest.fixture
def ready(folder):
    """A module after a few steps, with its data."""
    module, _ = run(folder, 4, data=(data := make_preferences(folder)))
    return module, data


def alone(decoder, document) -> tuple[float, int]:
    """Log-probability of an answer, in a row of its own, from all logits in float64."""
    tokens = torch.from_numpy(document.tokens.astype("int64"))
    logits = decoder(tokens[None])[0].double()
    log_probs = logits.log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0]
    trained = torch.from_numpy(document.trained[1:].copy())
    return float(log_probs[trained].sum()), int(trained.sum())


@torch.no_grad()
def test_packed_equals_one_answer_at_a_time(ready):
    module, data = ready
    seen = []
    for batch in data.all_pairs():
        log_probs, lengths = module.answer_log_probs(batch)
        numbers = batch.items[batch.items >= 0].tolist()
        assert len(batch.items) > 1  # of several rows
        for number, row, counts in zip(numbers, log_probs, lengths, strict=True):
            train = len(data.rows.lengths)
            first = number < train
            item = data._all[0 if first else 1].item(number if first else number - train)
            expected = [alone(module.decoder, document) for document in item]
            assert counts.tolist() == [n for _, n in expected]
            assert row.tolist() == pytest.approx([x for x, _ in expected], rel=1e-5, abs=1e-5)
        seen += numbers
    assert sorted(seen) == list(range(60))


@torch.no_grad()
@pytest.mark.parametrize("name", LOSSES)
def test_objective_and_sums_from_single_answers(ready, folder, name):
    module, data = ready
    module.loss = PreferenceLoss(name, **LOSSES[name])
    module.rpo_alpha = 0.3
    batch = next(iter(data.val_dataloader()))
    objective, sums = module.objective(batch)
    policy, reference, lengths = [], [], []
    start = make_module(folder)
    start.trainer = module.trainer
    start.configure_model()
    for number in batch.items[batch.items >= 0].tolist():
        item = data._all[1].item(number - len(data.rows.lengths))
        policy.append([alone(module.decoder, document)[0] for document in item])
        reference.append([alone(start.decoder, document)[0] for document in item])
        lengths.append([alone(start.decoder, document)[1] for document in item])
    policy, reference, lengths = map(torch.tensor, (policy, reference, lengths))
    loss, rewards = module.loss(policy, reference, lengths)
    loss = loss - 0.3 * policy[:, 0] / lengths[:, 0]
    assert float(objective) == pytest.approx(float(loss.sum()), rel=1e-4)
    assert sums["tokens"] == len(loss) > 10
    assert sums["rewards/accuracies"] == int((rewards[:, 0] > rewards[:, 1]).sum())
    assert sums["ranking"] == int((policy[:, 0] > policy[:, 1]).sum())
    assert float(sums["logps/rejected"]) == pytest.approx(float(policy[:, 1].sum()), rel=1e-5)
    assert sums["length/chosen"] == lengths[:, 0].sum()
    if name != "simpo":
        moved = float((policy - reference)[:, 0].sum())
        assert float(sums["displacement"]) == pytest.approx(moved, rel=1e-3, abs=1e-3)
        metrics = module._metrics({k: float(v) for k, v in sums.items()}, "held_out")
        per_token = moved / float(lengths[:, 0].sum())
        assert metrics["held_out/displacement"] == pytest.approx(per_token, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_margin_grows_on_an_easy_set(folder, name):
    module = make_module(folder, PreferenceLoss(name, **LOSSES[name]), learning_rate=0.002)
    _, steps = run(folder, 15, module)
    margins = [(s["rewards/chosen"] - s["rewards/rejected"]) / s["tokens"] for s in steps]
    assert margins[-1] > margins[0] + 0.05
    assert sum(s["rewards/accuracies"] for s in steps[-3:]) > 0.8 * sum(
        s["tokens"] for s in steps[-3:]
    )
    if name != "simpo":
        # Not yet moved: rewards are 0 to the last bit, since the same code computed both sides.
        assert steps[0]["rewards/chosen"] == pytest.approx(0, abs=1e-4)
        table = cache_files(folder)
        assert len(table) == 1
    else:
        assert not (folder / "reference").exists()


def save_weights(module, folder: Path) -> None:
    save_decoder(folder, module.decoder.config, module.decoder.rope, module.decoder.state_dict())


def test_accumulation_changes_nothing(folder):
    module, steps = run(folder, 5)
    split, parts = run(folder, 5, data=make_preferences(folder, micro_batch_tokens=256))
    assert_same(steps, parts, rel=1e-3, abs=1e-3)
    for a, b in zip(module.parameters(), split.parameters(), strict=True):
        # Adam turns the last bits of a tiny gradient into whole steps of a thousandth each.
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_loss_of_a_step_is_the_mean_over_its_pairs(folder):
    """Also where its micro-batches hold different numbers of them."""
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            pairs, loss = int((batch.items >= 0).sum()), float(outputs["loss"])
            seen.append((pairs, loss * batch.step_tokens, batch.step_tokens))

    _, steps = run(
        folder, 3, callbacks=[Look()], data=make_preferences(folder, micro_batch_tokens=256)
    )
    for step, first in zip(steps, range(0, 12, 4), strict=True):
        counts, losses, totals = zip(*seen[first : first + 4], strict=True)
        assert len(set(counts)) > 1 or first
        assert sum(counts) == step["tokens"] == totals[0]
        # Lightning has divided by the accumulation what was multiplied by it.
        assert sum(losses) / totals[0] == pytest.approx(step["loss"] / step["tokens"], rel=1e-5)


def test_cached_equals_live(folder):
    data = make_preferences(folder)
    cached, steps = run(folder, 6, data=data)
    live, others = run(folder, 6, make_module(folder, reference="live"))
    assert_same(steps, others, rel=1e-6, abs=1e-6)
    assert live._table is None
    assert not any("_live" in name for name, _ in live.named_parameters())
    with torch.no_grad():
        for batch in data.all_pairs():
            numbers = batch.items[batch.items >= 0]
            again, _ = live.answer_log_probs(batch, live._live[0])
            torch.testing.assert_close(cached._table[numbers], again, rtol=1e-6, atol=1e-6)
            assert not torch.equal(again, live.answer_log_probs(batch)[0])


@pytest.mark.parametrize("kind", ["cached", "uncached", "live"])
def test_a_restart_keeps_the_reference(folder, kind):
    """With the cache, without it (computed anew from the first weights), and live."""
    start, _ = run(folder, 1, make_module(folder, init_seed=9))
    save_weights(start, folder / "start")

    def module():
        made = make_module(folder, reference="live" if kind == "live" else "cached")
        made.initial_weights = folder / "start"
        return made

    whole, expected = run(folder, 6, module())
    save = folder / "checkpoint"
    run(folder, 3, module(), save=save)
    if kind == "uncached":
        [file.unlink() for file in cache_files(folder)]
    again = module()
    again.initial_weights = None  # as the command line leaves it on a restart
    resumed, rest = run(folder, 6, again, resume=save)
    assert rest == expected[3:]
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert resumed._weights == whole._weights
    if kind == "uncached":
        assert len(cache_files(folder)) == 1
        [file.unlink() for file in (folder / "start").iterdir()]
        (folder / "start").rmdir()
        cache_files(folder)[0].unlink()
        with pytest.raises(UserError, match="give their folder: --model.reference_weights"):
            run(folder, 6, make_module(folder), resume=save)


def test_interrupted_in_mid_step_equals_uninterrupted(folder):
    _, expected = run(folder, 6)
    with pytest.raises(Die):
        run(folder, 6, callbacks=[Bomb(4), SaveAt(3, folder / "checkpoint")])
    _, rest = run(folder, 6, resume=folder / "checkpoint")
    assert rest == expected[3:]


class SaveAt(Callback):
    def __init__(self, step: int, path: Path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


def test_reference_weights_of_ones_own(folder):
    other, _ = run(folder, 3, make_module(folder, init_seed=9))
    save_weights(other, folder / "other")
    module = make_module(folder, reference_weights=str(folder / "other"))
    trained, steps = run(folder, 2, module, save=folder / "checkpoint")
    assert abs(steps[0]["displacement"]) > 0.1  # it begins elsewhere
    first = make_module(folder)
    run(folder, 2, first)
    assert not torch.equal(first._table, trained._table)
    # The policy was given its own weights back.
    expected, _ = run(folder, 2, make_module(folder))
    assert steps[0]["logps/chosen"] == pytest.approx(
        float(run(folder, 1, make_module(folder))[1][0]["logps/chosen"]), rel=1e-6
    )
    changed = make_module(folder, reference_weights=str(folder / "run/none"))
    with pytest.raises(UserError):
        run(folder, 3, changed)
    save_weights(expected, folder / "third")
    changed = make_module(folder, reference_weights=str(folder / "third"))
    with pytest.raises(UserError, match="began with another reference"):
        run(folder, 4, changed, resume=folder / "checkpoint")


def test_a_loss_without_reference_cannot_gain_one_in_mid_run(folder):
    simpo = make_module(folder, PreferenceLoss("simpo", beta=2.0))
    run(folder, 2, simpo, save=folder / "checkpoint")
    with pytest.raises(UserError, match="trained without a reference, but 'dpo' needs one"):
        run(folder, 4, make_module(folder, PreferenceLoss("dpo")), resume=folder / "checkpoint")


def test_what_the_cache_depends_on(folder):
    data = make_preferences(folder)
    run(folder, 1)
    (file,) = cache_files(folder)
    stamp = file.stat().st_mtime_ns
    run(folder, 1, make_module(folder, PreferenceLoss("dpo")))  # not the loss
    assert cache_files(folder) == [file]
    assert file.stat().st_mtime_ns == stamp
    run(folder, 1, make_module(folder, init_seed=1))  # the weights
    run(folder, 1, precision="bf16-mixed")  # the dtype
    run(folder, 1, data=make_preferences(folder, bare=False, **LARGE))  # the rendering
    assert len(cache_files(folder)) == 4
    file.write_bytes(file.read_bytes()[:-40])  # damaged: made anew
    module, _ = run(folder, 1, data=data)
    assert module._table.isfinite().all()
    assert len(cache_files(folder)) == 4


def test_without_room_for_the_cache_the_run_goes_on(folder, caplog):
    (folder / "reference").write_text("a file where a folder should be")
    with caplog.at_level("INFO"):
        module, _ = run(folder, 1)
    assert module._table.isfinite().all()
    assert "not kept in" in caplog.text


def test_without_held_out_pairs(folder):
    subsets = {"easy": PairsConfig(str(folder / "pairs.jsonl"))}
    module, steps = run(folder, 2, data=make_preferences(folder, subsets), limit_val_batches=1.0)
    assert len(module._table) == 60
    assert len(steps) == 2


def test_every_pair_has_to_be_covered_exactly_once():
    def parts(*numbers):
        return [(torch.tensor([n]), torch.full((1, 2), float(n))) for n in numbers]

    used = torch.tensor([True, True, False, True])
    table = gather_log_probs(parts(3, 0, 1), used, lambda x: x)
    assert table[[0, 1, 3]].tolist() == [[0, 0], [1, 1], [3, 3]]
    assert table[2].isnan().all()
    for numbers, first in [((0, 1), 3), ((0, 1, 3, 1), 1), ((0, 1, 2, 3), 2)]:
        with pytest.raises(UserError, match=f"the first is number {first}"):
            gather_log_probs(parts(*numbers), used, lambda x: x)
    broken = [(torch.tensor([1]), torch.tensor([[torch.nan, 0.0]])), *parts(0, 3)]
    with pytest.raises(UserError, match="1 of 3 pairs have no log-probabilities"):
        gather_log_probs(broken, used, lambda x: x)


def test_a_batch_of_padding_counts_nothing(ready):
    module, data = ready
    batch = next(iter(data.val_dataloader()))
    batch.targets.fill_(IGNORE)
    batch.items.fill_(-1)
    for name, settings in LOSSES.items():
        module.loss = PreferenceLoss(name, **settings)
        objective, sums = module.objective(batch)
        assert float(objective) == 0
        assert not any(float(value) for value in sums.values())


def test_sums_of_answers_by_a_loop(ready):
    _, data = ready
    batch = data.rows.batch([0, len(data.rows) - 1])
    values = torch.randint(9, batch.tokens.shape) * (batch.targets != IGNORE)
    expected = []
    for row in range(2):
        for pair in range(int((batch.items[row] >= 0).sum())):
            mine = [values[row][batch.documents[row] == 2 * pair + side] for side in (0, 1)]
            expected.append([int(m.sum()) for m in mine])
    assert sum_by_answer(values, batch).tolist() == expected


def test_displacement_alarm(folder):
    module = make_module(folder, displacement_alarm=0.3)
    sums = dict.fromkeys(("loss", "rewards/chosen", "rewards/rejected", "length/chosen"), 10.0)

    def report(nats):
        return module.report(sums | {"tokens": 2.0, "displacement": nats})["train/displacement"]

    with pytest.warns(UserWarning, match=r"less likely by 0\.40 nats per token") as told:
        moved = [report(nats) for nats in (-2.0, -4.0, -5.0, 1.0, -4.0)]
    assert moved == [-0.2, -0.4, -0.5, 0.1, -0.4]
    assert len(told) == 2  # when it falls, not as long as it is low


def test_without_reference_displacement_is_from_the_first_report(folder):
    module = make_module(folder, PreferenceLoss("simpo", beta=2.0))
    sums = dict.fromkeys(("loss", "rewards/chosen", "rewards/rejected", "length/chosen"), 10.0)
    moved = [
        module.report(sums | {"tokens": 2.0, "displacement": nats})["train/displacement"]
        for nats in (-30.0, -31.0, -20.0)
    ]
    assert moved == pytest.approx([0.0, -0.1, 1.0])


@pytest.mark.parametrize("wrong", [{"rpo_alpha": -1.0}, {"displacement_alarm": -0.1}])
def test_mistakes(folder, wrong):
    with pytest.raises(UserError, match="expected 0 or more"):
        make_module(folder, **wrong)
