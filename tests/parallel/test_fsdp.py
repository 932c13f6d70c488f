"""FSDP2 on two gloo processes against one process.

Run as a script under torchrun, this file trains; under pytest it launches itself once and compares.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.utils.data import DataLoader
from warm_python import python

from smol.checkpoints.io import SafeCheckpointIO
from smol.model.config import DecoderConfig
from smol.model.decoder import Decoder
from smol.optim import OptimizerConfig, ParameterGroup, build_optimizer
from smol.parallel import FSDP2Strategy, shard_decoder
from smol.parallel.processes import leave_groups_at_exit

pytestmark = pytest.mark.slow

ROWS, TIME, STEPS_PER_EPOCH, VOCABULARY = 8, 32, 3, 61


class Module(LightningModule):
    """A small decoder with tied embeddings, sharded if the strategy asks for it."""

    def __init__(self, optimizer="adamw", mixed_precision=None):
        super().__init__()
        self.config = OptimizerConfig(
            optimizer,
            learning_rate=2e-2,
            groups={"first": ParameterGroup(r"layers\.0\.mlp", learning_rate_scale=0.5)},
        )
        self.mixed_precision = mixed_precision
        self.decoder = None
        self.losses, self.norms, self.kinds = [], [], set()

    def configure_model(self):
        if self.decoder is not None:
            return
        torch.manual_seed(0)
        self.decoder = Decoder(
            DecoderConfig(
                vocab_size=VOCABULARY,
                hidden_size=16,
                num_layers=2,
                num_heads=2,
                num_kv_heads=1,
                intermediate_size=34,
                nope=2,
            )
        )
        if isinstance(self.trainer.strategy, FSDP2Strategy):
            mesh = self.device_mesh["data_parallel"]
            shard_decoder(self.decoder, mesh, self.mixed_precision)

    def training_step(self, tokens, _):
        def head(hidden, weight):
            logits = F.linear(hidden[:, :-1], weight).float()
            return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

        loss = self.decoder(tokens, head=head)
        self.losses.append(self.trainer.strategy.reduce(loss.detach().clone()).item())
        return loss

    def on_before_optimizer_step(self, optimizer):
        norms = [p.grad.norm() for p in self.parameters()]
        whole = [n.full_tensor() if hasattr(n, "full_tensor") else n for n in norms]
        self.norms.append(torch.stack(whole).norm().item())
        self.kinds = {str(p.dtype) for p in self.parameters()}

    def configure_optimizers(self):
        return build_optimizer(self.named_parameters(), self.config)


class Clipped(Callback):
    """Records the gradient norm that the optimiser sees."""

    def on_before_zero_grad(self, trainer, module, optimizer):
        norms = [p.grad.norm() for p in module.parameters() if p.grad is not None]
        if norms:
            whole = [n.full_tensor() if hasattr(n, "full_tensor") else n for n in norms]
            self.norm = torch.stack(whole).norm().item()


def loader(rank, world_size):
    """The same tokens every epoch; each rank takes its rows of every global batch."""
    generator = torch.Generator().manual_seed(3)
    data = torch.randint(0, VOCABULARY, (STEPS_PER_EPOCH * ROWS, TIME), generator=generator)
    rows = ROWS // world_size
    batches = [
        [step * ROWS + rank * rows + row for row in range(rows)] for step in range(STEPS_PER_EPOCH)
    ]
    return DataLoader(data, batch_sampler=batches)


def run(folder, strategy, devices, epochs, resume=None, save=None, clip=0.5, **module):
    """Train from scratch or from ``resume`` until ``epochs`` are done; return what was seen."""
    rank = int(os.environ.get("RANK", 0)) if devices > 1 else 0
    model, clipped = Module(**module), Clipped()
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        plugins=[SafeCheckpointIO()],
        callbacks=[clipped],
        gradient_clip_val=clip,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(model, loader(rank, devices), ckpt_path=resume and folder / resume)
    if save is not None:
        trainer.save_checkpoint(folder / save)
    kind = type(next(model.parameters())).__name__
    return {"losses": model.losses, "norms": model.norms, "dtypes": sorted(model.kinds)} | {
        "kind": kind,
        "clipped": getattr(clipped, "norm", None),
        "step": trainer.global_step,
    }


def kinds_after_evaluation(reshard_after_forward):
    """Types of the parameters that a forward pass without a backward pass leaves behind."""
    decoder = Decoder(DecoderConfig(VOCABULARY, 16, 2, 2, 1, 34))
    mesh = init_device_mesh("cpu", (2,))
    shard_decoder(decoder, mesh, reshard_after_forward=reshard_after_forward)
    with torch.no_grad():
        decoder(torch.zeros(1, 4, dtype=torch.long))
    return sorted({type(parameter).__name__ for parameter in decoder.parameters()})


def two_processes(folder):
    """Everything that two ranks do, in one launch."""
    results = {}
    results["half"] = run(folder, FSDP2Strategy(), 2, 1, save="fsdp3")
    results["whole"] = run(folder, FSDP2Strategy(), 2, 2, save="fsdp6")
    results["resumed"] = run(folder, FSDP2Strategy(), 2, 2, resume="fsdp3", save="fsdp3_6")
    results["from_one"] = run(folder, FSDP2Strategy(), 2, 2, resume="one3", save="one3_fsdp6")
    results["copy"] = run(folder, FSDP2Strategy(), 2, 1, resume="one3", save="one3_copy")
    results["ddp"] = run(folder, "ddp", 2, 2, resume="fsdp3", save="fsdp3_ddp6")
    results["muon"] = run(folder, FSDP2Strategy(), 2, 1, save="muon3_fsdp", optimizer="muon")
    results["muon_copy"] = run(
        folder, FSDP2Strategy(), 2, 1, resume="muon3", save="muon3_copy", optimizer="muon"
    )
    results["bf16"] = run(folder, FSDP2Strategy(), 2, 1, mixed_precision=torch.bfloat16)
    results["after_evaluation"] = [kinds_after_evaluation(reshard) for reshard in (True, False)]
    try:
        run(folder, FSDP2Strategy(), 2, 2, resume="damaged")
    except ValueError as error:
        results["damaged"] = [type(error).__name__, str(error)]
    if int(os.environ["RANK"]) == 0:
        (folder / "results.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Train with one process here and with two in a launch; return folder and results."""
    folder = tmp_path_factory.mktemp("fsdp")
    one = {
        "half": run(folder, "auto", 1, 1, save="one3"),
        "whole": run(folder, "auto", 1, 2, save="one6"),
        "muon": run(folder, "auto", 1, 1, save="muon3", optimizer="muon"),
    }
    run(folder, "auto", 1, 1, save="damaged")
    content = bytearray((folder / "damaged" / "optimizer.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "damaged" / "optimizer.safetensors").write_bytes(content)
    result = python(__file__, folder, ranks=2)
    assert result.returncode == 0, result.stderr[-4000:]
    return folder, one, json.loads((folder / "results.json").read_text())


def load_part(folder, part):
    """The tensors of a part; shards of one mesh dimension lie one after the other."""
    if (folder / f"{part}.safetensors").exists():
        return load_file(folder / f"{part}.safetensors")
    shards = [load_file(file) for file in sorted(folder.glob(f"{part}-*.safetensors"))]
    names = {name for shard in shards for name in shard}
    pieces = {name: [shard[name] for shard in shards if name in shard] for name in names}
    return {name: torch.cat(p) if len(p) > 1 else p[0] for name, p in pieces.items()}


def tensors(folder, name):
    return load_part(folder / name, "model") | load_part(folder / name, "optimizer")


def assert_close(folder, a, b):
    left, right = tensors(folder, a), tensors(folder, b)
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=1e-4, atol=1e-6, msg=name)


def test_two_ranks_equal_one_process(runs):
    folder, one, two = runs
    assert two["whole"]["kind"] == "DTensor"
    assert two["whole"]["dtypes"] == ["torch.float32"]
    assert two["whole"]["losses"] == pytest.approx(one["whole"]["losses"], rel=1e-5)
    assert_close(folder, "one6", "fsdp6")


def test_clipping_is_by_the_norm_of_all_shards(runs):
    _, one, two = runs
    assert two["whole"]["norms"] == pytest.approx(one["whole"]["norms"], rel=1e-4)
    assert min(one["whole"]["norms"]) > 0.5
    assert two["whole"]["clipped"] == pytest.approx(0.5, rel=1e-3)


def test_resume_on_the_same_ranks_is_exact(runs):
    folder, _, two = runs
    assert two["resumed"]["losses"] == two["whole"]["losses"][STEPS_PER_EPOCH:]
    left, right = tensors(folder, "fsdp6"), tensors(folder, "fsdp3_6")
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_one_process_continues_what_two_began(runs):
    folder, one, _ = runs
    resumed = run(folder, "auto", 1, 2, resume="fsdp3", save="fsdp3_one6")
    assert resumed["step"] == 2 * STEPS_PER_EPOCH
    assert resumed["losses"] == pytest.approx(one["whole"]["losses"][STEPS_PER_EPOCH:], rel=1e-5)
    assert_close(folder, "one6", "fsdp3_one6")


def test_two_ranks_continue_what_one_began(runs):
    folder, one, two = runs
    expected = pytest.approx(one["whole"]["losses"][STEPS_PER_EPOCH:], rel=1e-5)
    assert two["from_one"]["losses"] == expected
    assert_close(folder, "one6", "one3_fsdp6")


def test_ddp_continues_what_fsdp_began(runs):
    folder, one, two = runs
    assert two["ddp"]["kind"] == "Parameter"
    expected = pytest.approx(one["whole"]["losses"][STEPS_PER_EPOCH:], rel=1e-5)
    assert two["ddp"]["losses"] == expected
    assert_close(folder, "one6", "fsdp3_ddp6")


@pytest.mark.parametrize(("name", "copy"), [("one3", "one3_copy"), ("muon3", "muon3_copy")])
def test_weights_and_moments_pass_through_two_ranks_unchanged(runs, name, copy):
    folder, _, _ = runs
    left, right = tensors(folder, name), tensors(folder, copy)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_every_rank_writes_its_shards(runs):
    folder, _, _ = runs
    shards = [
        f"{part}-0000{rank}-of-00002.safetensors"
        for part in ("model", "optimizer")
        for rank in (1, 2)
    ]
    indices = ["model.shards.json", "optimizer.shards.json"]
    others = ["COMMITTED", "manifest.json", "state.json"]
    found = sorted(path.name for path in (folder / "fsdp6").iterdir())
    assert found == sorted(shards + indices + others)
    assert not list(folder.rglob("*.distcp")) + list(folder.rglob(".metadata"))
    manifest = json.loads((folder / "fsdp6" / "manifest.json").read_text())
    assert (manifest["step"], manifest["world_size"]) == (6, 2)
    sizes = [sum(v["bytes"] for k, v in manifest["files"].items() if f"{r}-of" in k) for r in "12"]
    assert 0.8 < sizes[0] / sizes[1] < 1.25
    structures = [json.loads((folder / n / "state.json").read_text()) for n in ("one6", "fsdp6")]
    assert structures[0]["optimizer"] == structures[1]["optimizer"]
    assert structures[0]["model"] == structures[1]["model"]


def test_muon_on_two_ranks_equals_one_process_loosely(runs):
    """Newton-Schulz runs in bfloat16 on gradients that differ in their last bits."""
    folder, one, two = runs
    assert two["muon"]["losses"] == pytest.approx(one["muon"]["losses"], rel=1e-3)
    left, right = (load_part(folder / n, "model") for n in ("muon3", "muon3_fsdp"))
    for name, value in left.items():
        cosine = F.cosine_similarity(value.flatten(), right[name].flatten(), dim=0)
        assert cosine > 0.999, name


def test_mixed_precision_keeps_float32_parameters(runs):
    _, one, two = runs
    assert two["bf16"]["dtypes"] == ["torch.float32"]
    assert two["bf16"]["losses"] == pytest.approx(one["half"]["losses"], rel=2e-2)
    assert two["bf16"]["losses"] != pytest.approx(one["half"]["losses"], rel=1e-6)


def test_evaluation_leaves_nothing_gathered(runs):
    """Else the next training step would not see what a callback has done to the shards."""
    assert runs[2]["after_evaluation"] == [["DTensor"], ["DTensor"]]


def test_a_damaged_file_is_named_on_every_rank(runs):
    _, _, two = runs
    kind, message = two["damaged"]
    assert kind == "UserError"
    assert "optimizer.safetensors is damaged" in message


if __name__ == "__main__":
    two_processes(Path(sys.argv[1]))
    leave_groups_at_exit()
