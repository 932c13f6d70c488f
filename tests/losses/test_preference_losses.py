"""Preference losses: TRL's values, the papers' formulas in plain Python, and their limits."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smol.errors import UserError
from smol.losses import PreferenceLoss

NAMES = ("apo_zero", "apo_down", "dpo", "dpo_norm", "cdpo", "robust", "hinge", "ipo", "simpo")
OPTIONS = {"cdpo": {"label_smoothing": 0.2}, "robust": {"label_smoothing": 0.2}}
OPTIONS["simpo"] = {"gamma": 0.7}

nats = st.floats(-200, 200)
betas = st.floats(0.01, 2)
tokens = st.integers(1, 50)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def log_loss(x: float) -> float:
    """``-log(sigmoid(x))``."""
    return math.log1p(math.exp(-abs(x))) + max(-x, 0.0)


def formula(name, pw, pl, rw, rl, nw, nl, beta, label_smoothing=0.0, gamma=0.0) -> float:
    """As the papers write them, of policy and reference log-probabilities and lengths."""
    a, b = pw - rw, pl - rl
    eps = label_smoothing
    return {
        "dpo": lambda: log_loss(beta * (a - b)),
        "dpo_norm": lambda: log_loss(beta / nw * a - beta / nl * b),
        "cdpo": lambda: (1 - eps) * log_loss(beta * (a - b)) + eps * log_loss(beta * (b - a)),
        "robust": lambda: (
            ((1 - eps) * log_loss(beta * (a - b)) - eps * log_loss(beta * (b - a))) / (1 - 2 * eps)
        ),
        "hinge": lambda: max(0.0, 1 - beta * (a - b)),
        "ipo": lambda: (a / nw - b / nl - 0.5 / beta) ** 2,
        "apo_zero": lambda: (1 - sigmoid(beta * a)) + sigmoid(beta * b),
        "apo_down": lambda: sigmoid(beta * a) + (1 - sigmoid(beta * (a - b))),
        "simpo": lambda: log_loss(beta / nw * pw - beta / nl * pl - gamma),
    }[name]()


def loss_of_ratios(name, chosen, rejected, beta=0.1, dtype=torch.float64, **options):
    ratios = torch.tensor([[chosen, rejected]], dtype=dtype, requires_grad=True)
    zeros, ones = torch.zeros(1, 2, dtype=dtype), torch.ones(1, 2)
    loss, rewards = PreferenceLoss(name, beta, **options)(ratios, zeros, ones)
    (gradient,) = torch.autograd.grad(loss.sum(), ratios)
    return loss.item(), gradient[0].tolist(), rewards[0].tolist()


@pytest.mark.parametrize(
    ("name", "ratios", "expected"),
    [
        ("dpo", (0, 0), 0.693147),
        ("dpo", (2, -1), 0.554355),
        ("dpo", (-3, 4), 1.103186),
        ("dpo", (50, -60), 1.670e-5),
        ("apo_zero", (0, 0), 1.0),
        ("apo_zero", (2, -1), 0.925187),
        ("apo_zero", (-3, 4), 1.173130),
        ("apo_zero", (50, -60), 0.0091654),
        ("apo_down", (0, 0), 1.0),
        ("apo_down", (2, -1), 0.975392),
        ("apo_down", (-3, 4), 1.093745),
        ("apo_down", (50, -60), 0.9933238),
        ("ipo", (0, 0), 25.0),
        ("hinge", (0, 0), 1.0),
    ],
)
def test_values_of_trl(name, ratios, expected):
    for dtype in (torch.float32, torch.float64):
        loss, _, rewards = loss_of_ratios(name, *map(float, ratios), dtype=dtype)
        assert loss == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert rewards == pytest.approx([0.1 * ratios[0], 0.1 * ratios[1]])


@pytest.mark.parametrize(
    ("name", "expected"),
    [("dpo", (-0.05, 0.05)), ("apo_zero", (-0.025, 0.025)), ("apo_down", (0.0, 0.025))],
)
def test_gradients_of_trl_where_the_policy_is_the_reference(name, expected):
    assert loss_of_ratios(name, 0.0, 0.0)[1] == pytest.approx(list(expected), abs=1e-12)


@given(
    name=st.sampled_from(NAMES),
    policy=st.tuples(nats, nats),
    reference=st.tuples(nats, nats),
    lengths=st.tuples(tokens, tokens),
    beta=betas,
)
def test_values_and_rewards_equal_the_formulas(name, policy, reference, lengths, beta):
    options = OPTIONS.get(name, {})
    expected = formula(name, *policy, *reference, *lengths, beta, **options)
    score = [p - (r if name != "simpo" else 0) for p, r in zip(policy, reference, strict=True)]
    if name in ("dpo_norm", "ipo", "simpo"):
        score = [s / n for s, n in zip(score, lengths, strict=True)]
    for dtype, rel in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        pair = (torch.tensor([x], dtype=dtype) for x in (policy, reference))
        loss, rewards = PreferenceLoss(name, beta, **options)(*pair, torch.tensor([lengths]))
        assert loss.shape == (1,)
        assert loss.dtype == dtype
        assert loss.item() == pytest.approx(expected, rel=rel, abs=rel / 10)
        assert rewards[0].tolist() == pytest.approx([beta * s for s in score], rel=rel, abs=rel)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_finite_differences(name):
    generator = torch.Generator().manual_seed(1)
    policy, reference = torch.randn(2, 6, 2, generator=generator, dtype=torch.float64) * 4
    lengths = torch.randint(1, 9, (6, 2), generator=generator)
    loss = PreferenceLoss(name, 0.3, **OPTIONS.get(name, {}))
    policy.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: loss(p, reference, lengths)[0], policy)


@given(a=nats, b=nats, beta=betas)
def test_bounds_and_limits(a, b, beta):
    for name in ("apo_zero", "apo_down"):
        assert 0 <= loss_of_ratios(name, a, b, beta)[0] <= 2
    plain = loss_of_ratios("dpo", a, b, beta)[0]
    for name in ("cdpo", "robust", "dpo_norm"):  # answers of one token
        assert loss_of_ratios(name, a, b, beta)[0] == plain
    assert plain >= loss_of_ratios("hinge", a, b, beta)[0] - 1
    saturated = 1000 / beta
    assert loss_of_ratios("apo_zero", saturated, -saturated, beta)[1] == [0, 0]
    assert loss_of_ratios("apo_zero", -saturated, saturated, beta)[1] == [0, 0]
    assert loss_of_ratios("dpo", -saturated, saturated, beta)[1] == pytest.approx([-beta, beta])


@given(a=nats, b=nats, shift=nats, beta=betas)
def test_only_the_difference_counts_but_in_the_anchored_losses(a, b, shift, beta):
    for name in ("dpo", "cdpo", "robust", "hinge"):
        options = OPTIONS.get(name, {})
        there, here = (loss_of_ratios(name, a + s, b + s, beta, **options)[0] for s in (shift, 0.0))
        assert there == pytest.approx(here, rel=1e-6, abs=1e-9)
    anchored = loss_of_ratios("apo_zero", 1.0, 0.0)[0], loss_of_ratios("apo_zero", 3.0, 2.0)[0]
    assert anchored[0] != pytest.approx(anchored[1], rel=1e-6)


@given(a=nats, b=nats, beta=betas, eps=st.floats(0.01, 0.45))
def test_swapped_labels(a, b, beta, eps):
    """What eps wrong labels make of the robust loss is, on average, DPO on the right ones."""
    right, wrong = (
        loss_of_ratios("robust", *pair, beta, label_smoothing=eps)[0] for pair in ((a, b), (b, a))
    )
    expected = loss_of_ratios("dpo", a, b, beta)[0]
    assert (1 - eps) * right + eps * wrong == pytest.approx(expected, rel=1e-6, abs=1e-6)
    half = [loss_of_ratios("apo_zero", *pair, beta)[0] for pair in ((a, b), (b, a))]
    assert sum(half) == pytest.approx(2, abs=1e-9)


def test_each_pair_has_a_loss_of_its_own():
    policy = torch.tensor([[1.0, -2.0], [-30.0, 4.0], [0.0, 0.0]])
    reference, lengths = torch.zeros(3, 2), torch.tensor([[2, 3], [5, 1], [1, 1]])
    for name in NAMES:
        loss = PreferenceLoss(name, 0.2, **OPTIONS.get(name, {}))
        together = loss(policy, reference, lengths)[0]
        apart = [loss(policy[i : i + 1], reference[:1], lengths[i : i + 1])[0] for i in range(3)]
        assert torch.equal(together, torch.cat(apart))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"name": "orpo"}, "expected one of dpo, dpo_norm"),
        ({"beta": 0.0}, "beta is 0.0"),
        ({"beta": math.inf}, "beta is inf"),
        ({"name": "robust", "label_smoothing": 0.5}, "expected 0 <= it < 0.5"),
        ({"name": "dpo", "label_smoothing": 0.1}, "it belongs to cdpo and robust"),
        ({"name": "dpo", "gamma": 0.1}, "it belongs to simpo"),
    ],
)
def test_mistakes(settings, told):
    with pytest.raises(UserError, match=told) as error:
        PreferenceLoss(**settings)
    assert "\n" not in str(error.value)
