"""Parameter groups by pattern, and what a resumed optimiser keeps."""

import copy

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn

from smol.errors import UserError
from smol.optim import (
    OptimizerConfig,
    ParameterGroup,
    Schedule,
    apply_hyperparameters,
    build_optimizer,
    parameter_groups,
    set_learning_rates,
)


class Tiny(nn.Module):
    """A decoder's parameter names at toy size."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(7, 4)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(4, 4), "q_norm": nn.RMSNorm(4)}) for _ in range(2)
        )
        self.norm = nn.RMSNorm(4)
        self.lm_head = nn.Linear(4, 7, bias=False)

    def forward(self, tokens):
        hidden = self.embed_tokens(tokens)
        for layer in self.layers:
            hidden = hidden + layer["q_proj"](layer["q_norm"](hidden))
        return self.lm_head(self.norm(hidden))


def names_by_group(model, config):
    return {
        group["name"]: {name for name, _ in group["params"]}
        for group in parameter_groups(model.named_parameters(), config)
    }


def train(model, optimizer, steps=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        tokens = torch.randint(0, 7, (4, 5), generator=generator)
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_default_groups():
    model = Tiny()
    groups = names_by_group(model, OptimizerConfig())
    assert groups == {
        "embeddings": {"embed_tokens.weight"},
        "norms": {"layers.0.q_norm.weight", "layers.1.q_norm.weight", "norm.weight"},
        "biases": {"layers.0.q_proj.bias", "layers.1.q_proj.bias"},
        "head": {"lm_head.weight"},
        "default": {"layers.0.q_proj.weight", "layers.1.q_proj.weight"},
    }
    optimizer = build_optimizer(model.named_parameters(), OptimizerConfig(weight_decay=0.3))
    decays = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {"embeddings": 0, "norms": 0, "biases": 0, "head": 0.3, "default": 0.3}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_each_parameter_in_exactly_one_group(name):
    model = Tiny()
    model.norm.weight.requires_grad_(False)
    config = OptimizerConfig(name=name, groups={"first": ParameterGroup(r"layers\.0")})
    grouped = [
        item
        for group in parameter_groups(model.named_parameters(), config)
        for item, _ in group["params"]
    ]
    assert sorted(grouped) == sorted(
        item for item, parameter in model.named_parameters() if parameter.requires_grad
    )


def test_first_match_wins_and_defaults_can_be_replaced_or_removed():
    config = OptimizerConfig(
        learning_rate=1.0,
        groups={
            "top": ParameterGroup(r"layers\.1", learning_rate_scale=0.5),
            "bottom": ParameterGroup(r"layers\.", weight_decay=0.7),
            "norms": ParameterGroup(r"^norm", weight_decay=0.2),
            "biases": None,
        },
    )
    model = Tiny()
    groups = names_by_group(model, config)
    assert all(name.startswith("layers.1") for name in groups["top"])
    assert len(groups["top"]) == len(groups["bottom"]) == 3
    assert groups["norms"] == {"norm.weight"}
    optimizer = build_optimizer(model.named_parameters(), config)
    by_name = {group["name"]: group for group in optimizer.param_groups}
    assert by_name["top"]["lr"] == 0.5
    assert by_name["bottom"]["lr"] == 1.0
    assert by_name["bottom"]["weight_decay"] == 0.7


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"q": ParameterGroup(r"q_porj")}, r"'q' .*'q_porj'.* matches none .*q_proj"),
        (
            {"all": ParameterGroup("."), "late": ParameterGroup("norm")},
            "'late' .* taken by the earlier 'all'",
        ),
        ({"bad": ParameterGroup("(")}, "no regular expression"),
        ({"m": ParameterGroup("layers", optimizer="muon")}, "the optimiser is adamw"),
    ],
)
def test_mistakes_are_one_line(groups, message):
    with pytest.raises(UserError, match=message) as error:
        parameter_groups(Tiny().named_parameters(), OptimizerConfig(groups=groups))
    assert "\n" not in str(error.value)


def test_muon_refuses_a_vector():
    config = OptimizerConfig("muon", groups={"n": ParameterGroup("norm", optimizer="muon")})
    with pytest.raises(UserError, match="matrices only"):
        parameter_groups(Tiny().named_parameters(), config)


def test_defaults_that_match_nothing_are_fine():
    assert names_by_group(nn.Linear(2, 2, bias=False), OptimizerConfig()) == {"default": {"weight"}}


def test_wrappers_leave_no_trace_in_names():
    model = Tiny()
    model.layers[0] = torch.compile(model.layers[0])
    assert names_by_group(model, OptimizerConfig()) == names_by_group(Tiny(), OptimizerConfig())


def test_apply_and_schedule():
    model = Tiny()
    config = OptimizerConfig(
        learning_rate=0.4, groups={"top": ParameterGroup(r"layers\.1", learning_rate_scale=0.5)}
    )
    optimizer = build_optimizer(model.named_parameters(), config)
    new = OptimizerConfig(
        learning_rate=0.8,
        betas=(0.5, 0.6),
        eps=1e-3,
        weight_decay=0.05,
        groups={"top": ParameterGroup(r"layers\.1", learning_rate_scale=0.25)},
    )
    set_learning_rates(optimizer, new, 0.5)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.1 if group["name"] == "top" else 0.4)
        assert (group["betas"], group["eps"]) == ((0.5, 0.6), 1e-3)
        assert group["weight_decay"] in (0.0, 0.05)
    apply_hyperparameters(optimizer, new)
    assert {group["lr"] for group in optimizer.param_groups} == {0.2, 0.8}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_resume_restores_moments_by_name_and_keeps_current_hyperparameters(name):
    torch.manual_seed(0)
    model = Tiny()
    old = build_optimizer(model.named_parameters(), OptimizerConfig(name, learning_rate=1e-3))
    train(model, old)
    saved = copy.deepcopy(old.state_dict())
    moments = {
        parameter_name: copy.deepcopy(old.state[parameter])
        for parameter_name, parameter in model.named_parameters()
    }

    # One more group: every parameter changes its position.
    config = OptimizerConfig(
        name, 5e-3, (0.8, 0.9), 1e-6, 0.4, groups={"top": ParameterGroup(r"layers\.1")}
    )
    new = build_optimizer(model.named_parameters(), config)
    new.load_state_dict(saved)
    assert {group["lr"] for group in new.param_groups} == {5e-3}
    assert {group["betas"] for group in new.param_groups} == {(0.8, 0.9)}
    assert {group["weight_decay"] for group in new.param_groups} == {0.0, 0.4}
    for parameter_name, parameter in model.named_parameters():
        assert new.state[parameter].keys() == moments[parameter_name].keys()
        for key, value in moments[parameter_name].items():
            assert torch.equal(new.state[parameter][key], value)

    # The optimiser writes into memory of its own.
    train(model, new)
    for index, values in saved["state"].items():
        for key, value in values.items():
            assert torch.equal(value, old.state_dict()["state"][index][key])


def test_resume_with_another_optimizer_or_model_is_refused():
    model = Tiny()
    adamw = build_optimizer(model.named_parameters(), OptimizerConfig())
    muon = build_optimizer(model.named_parameters(), OptimizerConfig("muon"))
    with pytest.raises(UserError, match=r"trained with adamw .* muon"):
        muon.load_state_dict(adamw.state_dict())
    model.lm_haed = nn.Linear(4, 7, bias=False)
    other = build_optimizer(model.named_parameters(), OptimizerConfig())
    with pytest.raises(UserError, match=r"no parameter 'lm_haed.weight'.*'lm_head.weight'"):
        other.load_state_dict(adamw.state_dict())


def test_configuration_from_yaml(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "optimizer:\n"
        "  name: muon\n"
        "  betas: [0.8, 0.9]\n"
        "  groups:\n"
        "    top: {pattern: 'layers.1', learning_rate_scale: 0.5, optimizer: adamw}\n"
        "    biases: null\n"
        "schedule: {class_path: smol.optim.WSD, init_args: {warmup_steps: 3}}\n"
    )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--optimizer", type=OptimizerConfig)
    parser.add_argument("--schedule", type=Schedule)
    parsed = parser.instantiate_classes(parser.parse_args([f"--config={tmp_path}/config.yaml"]))
    assert parsed.optimizer.betas == (0.8, 0.9)
    assert parsed.optimizer.groups["top"] == ParameterGroup(
        "layers.1", learning_rate_scale=0.5, optimizer="adamw"
    )
    assert parsed.optimizer.groups["biases"] is None
    assert parsed.schedule(0) == pytest.approx(1 / 3)
    optimizer = build_optimizer(Tiny().named_parameters(), parsed.optimizer)
    assert {group["name"] for group in optimizer.param_groups} >= {"top", "default_muon"}
