"""Lightning's own save and resume, through safe files."""

import pickle

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from warm_python import python

from smol.checkpoints.io import SafeCheckpointIO
from smol.checkpoints.store import NonFiniteError
from smol.errors import UserError
from smol.optim import OptimizerConfig, build_optimizer, set_learning_rates


class Toy(LightningModule):
    """Two layers, dropout-free, trained on a fixed set in order."""

    def __init__(self, learning_rate=1e-2):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.config = OptimizerConfig(learning_rate=learning_rate)

    def training_step(self, batch, _):
        return (self.net(batch[0]).squeeze() - batch[1]).square().mean()

    validation_step = training_step

    def configure_optimizers(self):
        return build_optimizer(self.named_parameters(), self.config)

    def on_before_optimizer_step(self, optimizer):
        set_learning_rates(optimizer, self.config, 1 / (1 + self.global_step))


class Counter(Callback):
    """A callback with state that JSON alone cannot hold."""

    def __init__(self):
        self.state = {"seen": 0, "best": float("inf"), "losses": (), "sum": torch.zeros(2)}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        loss = outputs["loss"].item()
        self.state["seen"] += 1
        self.state["best"] = min(self.state["best"], loss)
        self.state["losses"] += (loss,)
        self.state["sum"] += loss

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def loader():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 4, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1)), batch_size=8)


def trainer(tmp_path, epochs, *callbacks, **kwargs):
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        plugins=[SafeCheckpointIO()],
        **{"enable_checkpointing": False} | kwargs,
    )


@pytest.fixture
def saved(tmp_path):
    """A folder with the checkpoint of one epoch, and the state then."""
    run, counter, module = None, Counter(), Toy()
    run = trainer(tmp_path, 1, counter)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "one")
    return tmp_path / "one"


def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, saved):
    whole, counter = Toy(), Counter()
    trainer(tmp_path, 3, counter).fit(whole, loader())

    resumed, resumed_counter = Toy(), Counter()
    run = trainer(tmp_path, 3, resumed_counter)
    run.fit(resumed, loader(), ckpt_path=saved)
    assert run.global_step == 12
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name))
    assert resumed_counter.state["losses"] == counter.state["losses"]
    assert torch.equal(resumed_counter.state["sum"], counter.state["sum"])


def test_validate_from_a_folder(tmp_path, saved):
    module = Toy()
    before = module.net[0].weight.detach().clone()
    trainer(tmp_path, 1).validate(module, loader(), ckpt_path=str(saved), verbose=False)
    assert not torch.equal(before, module.net[0].weight)


def test_resuming_uses_the_learning_rate_of_the_module(tmp_path, saved):
    module = Toy(learning_rate=0.5)
    run = trainer(tmp_path, 1)
    run.fit(module, loader(), ckpt_path=saved)
    assert {group["lr"] for group in run.optimizers[0].param_groups} == {0.5}
    assert run.optimizers[0].state[module.net[0].weight]["step"] == 4


def test_files_and_no_hyper_parameters(saved):
    assert {file.name for file in saved.iterdir()} == {
        *("model.safetensors", "optimizer.safetensors", "state.safetensors"),
        *("state.json", "manifest.json", "COMMITTED"),
    }
    assert "hyper_parameters" not in SafeCheckpointIO().load_checkpoint(saved)
    assert not list(saved.parent.glob(".one*"))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.safetensors", "state.json"]
)
def test_a_damaged_byte_is_named(tmp_path, saved, name):
    content = bytearray((saved / name).read_bytes())
    content[-2] ^= 1
    (saved / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is damaged") as error:
        trainer(tmp_path, 3).fit(Toy(), loader(), ckpt_path=saved)
    assert "\n" not in str(error.value)


def test_a_pickle_in_any_file_runs_nothing(tmp_path, saved):
    marker = tmp_path / "executed"

    class Bomb:
        def __reduce__(self):
            return open, (str(marker), "w")

    for file in [*saved.iterdir(), saved / "meta.pt", saved / ".metadata", tmp_path / "file.ckpt"]:
        content = file.read_bytes() if file.exists() else None
        file.write_bytes(pickle.dumps(Bomb()))
        if file.name in ("meta.pt", ".metadata"):
            trainer(tmp_path, 1).fit(Toy(), loader(), ckpt_path=saved)
        else:
            target = file if file.suffix == ".ckpt" else saved
            with pytest.raises(UserError):
                trainer(tmp_path, 1).fit(Toy(), loader(), ckpt_path=target)
        if content is not None:
            file.write_bytes(content)
    assert not marker.exists()


def test_incomplete_and_missing_folders_are_one_line(tmp_path, saved):
    (saved / "COMMITTED").unlink()
    io = SafeCheckpointIO()
    for path, message in [
        (saved, "no COMMITTED"),
        (tmp_path / "nowhere", "does not exist"),
        ("s3://bucket/one", "is a URL"),
    ]:
        with pytest.raises(UserError, match=message):
            io.load_checkpoint(path)


def test_model_checkpoint_keeps_the_best_and_a_link_to_the_last(tmp_path):
    callback = ModelCheckpoint(tmp_path / "ck", save_top_k=2, monitor="step", mode="max",
                               every_n_train_steps=2, save_last="link")  # fmt: skip
    trainer(tmp_path, 2, callback, enable_checkpointing=True).fit(Toy(), loader())
    names = sorted(path.name for path in (tmp_path / "ck").iterdir())
    assert names == ["epoch=1-step=6.ckpt", "epoch=1-step=8.ckpt", "last.ckpt"]
    run = trainer(tmp_path, 3)
    run.fit(Toy(), loader(), ckpt_path=tmp_path / "ck" / "last.ckpt")
    assert run.global_step == 12


def test_saving_over_a_link_spares_what_it_points_to(tmp_path, saved):
    link = tmp_path / "last"
    link.symlink_to(saved)
    io = SafeCheckpointIO()
    io.save_checkpoint({"state_dict": {"w": torch.ones(1)}, "global_step": 9}, link)
    assert io.load_checkpoint(link)["global_step"] == 9
    assert io.load_checkpoint(saved)["global_step"] == 4
    io.remove_checkpoint(link)
    io.remove_checkpoint(link)
    assert not link.exists()


def test_what_a_killed_save_left_goes_with_the_next_one(tmp_path):
    script = (
        "import os, sys\n"
        "from smol.checkpoints import SafeCheckpointIO\n"
        "os.rename = lambda *_: os._exit(9)\n"
        "SafeCheckpointIO().save_checkpoint({'global_step': 1}, sys.argv[1])"
    )
    folder = tmp_path / "step[1]"
    done = python("-c", script, folder)
    assert done.returncode == 9
    assert len(list(tmp_path.iterdir())) == 1
    SafeCheckpointIO().save_checkpoint({"global_step": 1}, folder)
    assert list(tmp_path.iterdir()) == [folder]


def test_manifest_fields_and_refusals(tmp_path, saved):
    io = SafeCheckpointIO()
    good = {"state_dict": {"w": torch.ones(1)}, "global_step": 3, "manifest": {"tokens": 77}}
    io.save_checkpoint(good, tmp_path / "good")
    assert '"tokens": 77' in (tmp_path / "good" / "manifest.json").read_text()
    bad = {"state_dict": {"w": torch.full((1,), torch.nan)}}
    with pytest.raises(NonFiniteError, match="'w'"):
        io.save_checkpoint(bad, saved)
    assert io.load_checkpoint(saved)["global_step"] == 4
    with pytest.raises(UserError, match="storage_options"):
        io.save_checkpoint(good, tmp_path / "good", storage_options={})
