"""Each guard is taken out, and the test that causes its fault must fail."""

import math

import pytest
import test_nan_rollback as drills

from callbacks import nan_rollback
from callbacks.nan_rollback import NaNRollback
from callbacks.parts.robust_window import RobustWindow
from callbacks.parts.rollback_points import RollbackPoints
from callbacks.parts.spike_detector import SpikeDetector
from smol.data.pretraining import Pretraining
from smol.modules import snapshot
from smol.modules.snapshot import Snapshot


def nothing(*args, **kwargs):
    pass


def judge_only_what_is_finite(detector, loss, norm, judge=SpikeDetector.judge):
    finite = [x if math.isfinite(x) else 1.0 for x in (loss, norm)]
    return judge(detector, *finite)


def accept_what_is_rejected(detector, loss, norm, judge=SpikeDetector.judge):
    reason = judge(detector, loss, norm)
    if reason:
        detector.loss.accept(loss)
    return reason


def judge_losses_only(detector, loss, norm, judge=SpikeDetector.judge):
    return judge(detector, loss, norm if not math.isfinite(norm) else 1.0)


def any_snapshot(points, trainer):
    return points._kept[-1]


def same_lineage(callback, trainer, module, verdict, roll_back=NaNRollback._roll_back):
    lineage = module.lineage
    roll_back(callback, trainer, module, verdict)
    module.lineage = lineage


def forget_what_was_usual(callback, state):
    callback.attempts = 0


DROPPED, UNDONE = (
    "a_bad_step_is_as_if_its_data_had_never_been_there",
    "what_comes_back_is_undone_and_other_data_read",
)

# Guard: what is put in its place (place, name, replacement), the test that has to fail.
GUARDS = {
    "numbers that are not finite": (
        (SpikeDetector, "judge", judge_only_what_is_finite),
        (DROPPED, {"name": "nan in one element of one gradient"}),
    ),
    "spikes": ((RobustWindow, "deviation", lambda *_: 0.0), (DROPPED, {"name": "corrupt batch"})),
    "spikes of the gradient norm": (
        (SpikeDetector, "judge", judge_losses_only),
        (DROPPED, {"name": "gradient explosion"}),
    ),
    "rejected values stay out of the window": (
        (SpikeDetector, "judge", accept_what_is_rejected),
        ("a_value_that_was_rejected_is_not_compared_with", {}),
    ),
    "the window survives a restart": (
        (NaNRollback, "load_state_dict", forget_what_was_usual),
        ("a_restart_knows_what_was_usual", {}),
    ),
    "rollback when it comes back": (
        (NaNRollback, "_point_to_return_to", lambda *_: None),
        (UNDONE, {"name": "nan in a weight"}),
    ),
    "age of a snapshot": (
        (RollbackPoints, "choose", any_snapshot),
        (UNDONE, {"name": "a weight that grows by half at each step"}),
    ),
    "snapshots are finite": (
        (Snapshot, "is_finite", lambda _: True),
        ("a_snapshot_with_numbers_that_are_not_finite_is_none", {}),
    ),
    "checkpoints when no snapshot helps": (
        (RollbackPoints, "_newest_checkpoint", lambda *_: None),
        ("a_snapshot_that_did_not_help_is_not_tried_again_then_comes_a_checkpoint", {}),
    ),
    "what was usual goes back, too": (
        (SpikeDetector, "load_state_dict", nothing),
        ("the_higher_loss_of_an_earlier_state_is_no_spike", {}),
    ),
    "skipped data is remembered": (
        (Pretraining, "skip", nothing),
        ("stages_begin_at_their_step_and_a_restart_knows_what_was_skipped", {}),
    ),
    "random numbers go back": (
        (snapshot, "_set_rng_states", nothing),
        ("in_any_trainer_with_any_module", {"omit": "dropped"}),
    ),
    "a lineage of its own": (
        (NaNRollback, "_roll_back", same_lineage),
        ("checkpoints_after_a_rollback_are_the_newer_ones", {}),
    ),
    "the log goes back": (
        (nan_rollback, "rewind_loggers", nothing),
        ("the_log_is_that_of_the_way_that_was_taken", {}),
    ),
    "a budget": (
        (drills.GUARD, "max_rollbacks", 10**6),
        ("a_fault_that_stays_ends_the_run_and_leaves_what_is_known", {}),
    ),
}


@pytest.mark.parametrize("guard", GUARDS)
def test_without_it_its_test_fails(guard, request, sources, tmp_path, monkeypatch):
    (place, attribute, replacement), (name, arguments) = GUARDS[guard]
    test = getattr(drills, f"test_{name}")
    wanted = test.__code__.co_varnames[: test.__code__.co_argcount]
    given = {"sources": sources, "tmp_path": tmp_path} | arguments
    given["controls"] = lambda omit: drills.train(tmp_path / "control", sources, omit=tuple(omit))
    change = monkeypatch.setitem if isinstance(place, dict) else monkeypatch.setattr
    change(place, attribute, replacement)
    with pytest.raises((AssertionError, RuntimeError, ValueError, pytest.fail.Exception)):
        test(**{key: given[key] for key in wanted})
