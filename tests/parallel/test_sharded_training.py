"""Two processes save their shards, fail, and go on, with any layout.

Run as a script under torchrun, this file trains; under pytest it launches itself once.
"""

import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from lightning import Callback
from safetensors.torch import load_file
from tiny import make_data, make_module, make_trainer
from warm_python import python

from callbacks.checkpoint_rotation import CheckpointRotation
from callbacks.events import Events
from callbacks.fault_injection import Fault, FaultInjection
from smol.checkpoints.format import read_checkpoint
from smol.checkpoints.store import FsspecStore
from smol.checkpoints.structure import flatten
from smol.errors import UserError
from smol.parallel import FSDP2Strategy
from smol.parallel.fsdp import local_part
from smol.parallel.processes import leave_groups_at_exit

LAYOUTS = {"tensor_parallel": {"tensor_parallel_size": 2}, "replicas": {"shard_size": 1}}


class Spoil(Callback):
    """Puts a NaN into the second rank's part of the last norm, after the step was taken."""

    order = 300

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 2 and trainer.global_rank == 1:
            local_part(module.decoder.model.norm.weight)[-1] = math.nan


def train(sources, folder, steps, *callbacks, resume=None, **strategy):
    trainer = make_trainer(
        folder, steps, devices=2, strategy=FSDP2Strategy(**strategy),
        callbacks=[*callbacks, Events(), CheckpointRotation(every=2, keep=9)],
    )  # fmt: skip
    module = make_module(num_kv_heads=2)
    trainer.fit(module, make_data(sources, micro_batch_tokens=128), ckpt_path=resume)
    return trainer


def two_processes(sources, folder):
    fault = FaultInjection([Fault("full_disk", 4, rank=1)])
    train(sources, folder / "whole", 8, fault)
    checkpoints = FsspecStore(folder / "whole/checkpoints")
    begin = checkpoints.load_path(checkpoints.list()[0])
    train(sources, folder / "resumed", 8, resume=begin)
    for name, strategy in LAYOUTS.items():
        trainer = train(sources, folder / name, 2, resume=begin, **strategy)
        trainer.save_checkpoint(folder / name / "copy")
        again = train(sources, folder / "back", 2, resume=folder / name / "copy")
        again.save_checkpoint(folder / name / "back")
    try:
        train(sources, folder / "spoilt", 8, Spoil())
    except UserError as error:
        (folder / f"error-{os.environ['RANK']}").write_text(f"{type(error).__name__}: {error}")


@pytest.fixture(scope="module")
def trained(sources, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    done = python(__file__, sources, folder, ranks=2)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def steps_kept(folder):
    return {info.manifest.step: Path(info.location) for info in FsspecStore(folder).list()}


def events(folder, kind):
    rows = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == kind]


@pytest.mark.slow
def test_a_full_disk_of_the_second_rank_commits_nothing_and_the_run_goes_on(trained):
    run = trained / "whole"
    assert sorted(steps_kept(run / "checkpoints")) == [2, 6, 8]
    (failed,) = events(run, "save_failed")
    assert failed["step"] == 4
    assert "OSError: cannot write" in failed["message"]
    assert "of-rank-1.safetensors: Error while" in failed["message"]
    assert not [p for p in (run / "checkpoints").iterdir() if p.name.startswith(".")]


@pytest.mark.slow
def test_two_ranks_go_on_from_their_shards_bit_for_bit(trained):
    folders = [steps_kept(trained / name / "checkpoints")[8] for name in ("whole", "resumed")]
    left, right = ({p.name: load_file(p) for p in f.glob("*.safetensors")} for f in folders)
    assert len(left) == 4
    assert left.keys() == right.keys()
    for name, tensors in left.items():
        assert all(torch.equal(tensor, right[name][key]) for key, tensor in tensors.items())


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_and_moments_move_to_another_layout_and_back(trained, layout):
    begin = steps_kept(trained / "whole/checkpoints")[2]
    expected = read_checkpoint(begin)
    for name in ("copy", "back"):
        found = read_checkpoint(trained / layout / name)
        for key in ("state_dict", "optimizer_states"):
            left, right = (flatten(content[key])[0] for content in (expected, found))
            assert left.keys() == right.keys()
            assert all(torch.equal(left[k], right[k]) for k in left)
    files = {path.name for path in (trained / layout / "copy").glob("model*.safetensors")}
    assert len(files) == (1 if layout == "replicas" else 2)


@pytest.mark.slow
def test_what_is_not_finite_on_the_second_rank_ends_the_run_everywhere(trained):
    errors = [(trained / f"error-{rank}").read_text() for rank in range(2)]
    assert errors[0] == errors[1]
    assert errors[0].startswith("NonFiniteError: the checkpoint of step")
    assert steps_kept(trained / "spoilt/checkpoints") == {}


@pytest.mark.slow
def test_one_process_goes_on_from_two(sources, trained, tmp_path):
    """Exactly what was stored, and after four more steps what the two came to."""
    whole = steps_kept(trained / "whole/checkpoints")
    trainer = make_trainer(tmp_path, 8, callbacks=[CheckpointRotation(every=0)])
    module = make_module(num_kv_heads=2)
    taken = {}

    class Begin(Callback):
        def on_train_start(self, trainer, module):
            taken.update({k: v.detach().clone() for k, v in module.state_dict().items()})

    trainer.callbacks.append(Begin())
    trainer.fit(module, make_data(sources, micro_batch_tokens=256), ckpt_path=whole[2])
    shards = [load_file(path) for path in sorted(whole[2].glob("model-*.safetensors"))]
    for name, tensor in taken.items():
        pieces = [shard[name] for shard in shards if name in shard]
        assert torch.equal(tensor, torch.cat(pieces)), name
    two = read_checkpoint(whole[8])["state_dict"]
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    two_processes(*map(Path, sys.argv[1:]))
    leave_groups_at_exit()
