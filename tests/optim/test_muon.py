"""Muon against torch's own optimisers and against the singular value decomposition."""

import copy

import pytest
import torch
from torch import nn

from smol.optim import OptimizerConfig, build_optimizer
from smol.optim.muon import newton_schulz

FASTEST = "smol.optim.muon.multiplies_bfloat16"


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 24)
        self.down = nn.Linear(24, 8, bias=False)
        self.norm = nn.LayerNorm(8)

    def forward(self, tokens):
        hidden = self.embed(tokens)
        return self.norm(hidden + self.down(torch.relu(self.up(hidden)))) @ self.embed.weight.T


def loss(model, seed):
    tokens = torch.randint(0, 11, (16, 8), generator=torch.Generator().manual_seed(seed))
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1).flatten())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16)])
def test_newton_schulz_against_the_decomposition(monkeypatch, shape, dtype):
    monkeypatch.setattr(FASTEST, lambda device: dtype == torch.bfloat16)
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    found = newton_schulz(matrix)
    assert found.dtype == dtype
    found = found.float()
    assert nn.functional.cosine_similarity(found.flatten(), (u @ vh).flatten(), dim=0) > 0.97
    values = torch.linalg.svdvals(found)
    assert values.max() < 1.3
    assert values.median() > 0.6


def test_equals_torch_muon_and_adamw_side_by_side(monkeypatch):
    monkeypatch.setattr(FASTEST, lambda device: True)  # torch's has no other dtype
    torch.manual_seed(0)
    ours, theirs = Tiny(), Tiny()
    theirs.load_state_dict(ours.state_dict())
    config = OptimizerConfig("muon", learning_rate=1e-2, weight_decay=0.1, fused=False)
    optimizer = build_optimizer(ours.named_parameters(), config)
    muon = torch.optim.Muon(
        [theirs.up.weight, theirs.down.weight],
        lr=1e-2,
        weight_decay=0.1,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    others = [theirs.embed.weight, theirs.up.bias, *theirs.norm.parameters()]
    adamw = torch.optim.AdamW(others, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for step in range(10):
        for model, optimizers in ((ours, [optimizer]), (theirs, [muon, adamw])):
            loss(model, step).backward()
            for each in optimizers:
                each.step()
                each.zero_grad()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, theirs.get_parameter(name), rtol=1e-4, atol=1e-5)


def test_state_round_trip_continues_bit_for_bit():
    torch.manual_seed(0)
    model = Tiny()
    optimizer = build_optimizer(model.named_parameters(), OptimizerConfig("muon", 1e-2))

    def train(model, optimizer, steps):
        for step in steps:
            loss(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()

    train(model, optimizer, range(4))
    twin = copy.deepcopy(model)
    resumed = build_optimizer(twin.named_parameters(), OptimizerConfig("muon", 1e-2))
    resumed.load_state_dict(optimizer.state_dict())
    train(model, optimizer, range(4, 8))
    train(twin, resumed, range(4, 8))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, twin.get_parameter(name))


def test_step_hooks_run_once_and_closure_is_called():
    model = Tiny()
    optimizer = build_optimizer(model.named_parameters(), OptimizerConfig("muon"))
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("hook"))

    def closure():
        calls.append("closure")
        value = loss(model, 0)
        value.backward()
        return value

    assert optimizer.step(closure).item() > 0
    assert calls == ["closure", "hook"]


def test_matrices_alone_need_no_adamw():
    model = nn.Linear(4, 4, bias=False)
    optimizer = build_optimizer(model.named_parameters(), OptimizerConfig("muon"))
    before = model.weight.detach().clone()
    model(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.weight)
