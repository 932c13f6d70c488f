"""Each method against loops over Python floats, and the rules that hold for all inputs."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from smol.errors import UserError
from smol.merging import methods
from smol.merging.methods import METHODS

SHAPE = (6, 5)
SIZE = math.prod(SHAPE)
integers = st.integers(0, 2**32)
shares = st.floats(0, 1)
weights = st.lists(st.floats(-2, 2), min_size=3, max_size=3)


def tensors(seed: int, count: int = 4, dtype=torch.float64) -> list[Tensor]:
    """A base and models near it that have some of their change in common."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(SHAPE, generator=generator, dtype=torch.float64)

    base, common = normal(), normal()
    return [base.to(dtype)] + [(base + common + normal()).to(dtype) for _ in range(count - 1)]


def run(name: str, inputs: list[Tensor], seeds=(0, 1, 2), **parameters) -> Tensor:
    """A method with its defaults; a parameter is a list, or the same for every model."""
    method, others = METHODS[name], len(inputs) - METHODS[name].has_base
    arguments = {k: parameters.pop(k, v) for k, v in method.shared.items()}
    for key, default in method.each.items():
        value = parameters.pop(key, default)
        arguments[key] = value if isinstance(value, list) else [value] * others
    assert not parameters
    if "lambda" in arguments:
        arguments["lambda_"] = arguments.pop("lambda")
    if method.seeded:
        arguments["seeds"] = seeds
    return method.function(iter(inputs), **arguments)


def flat(inputs: list[Tensor]) -> list[list[float]]:
    return [x.flatten().tolist() for x in inputs]


def loop_linear(inputs, weight, normalize):
    divisor = sum(weight) if normalize else 1.0
    return [
        sum(w * x[i] for w, x in zip(weight, inputs, strict=True)) / divisor for i in range(SIZE)
    ]


def loop_slerp(a, b, t):
    """By rotation: a's direction turned towards b's by t times the angle, for unit vectors."""
    length_a, length_b = (math.sqrt(sum(v * v for v in x)) for x in (a, b))
    angle = math.acos(sum(x * y for x, y in zip(a, b, strict=True)) / length_a / length_b)
    at = [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]
    return [at[0] * x + at[1] * y for x, y in zip(a, b, strict=True)]


def loop_kept(delta, density, gamma):
    """Indices that stay: sorted by magnitude, outliers off the top, the rest off the bottom."""
    order = sorted(range(SIZE), key=lambda i: abs(delta[i]))
    top = SIZE - int(gamma * SIZE)
    count = max(1, int(density * SIZE))
    first = max(0, top - count)
    return set(order[first : first + count])


def loop_task(inputs, weight, lam, normalize, density=1.0, gamma=0.0, elect=False):
    base, *others = inputs
    deltas = []
    for other, factor in zip(others, weight, strict=True):
        delta = [y - x for x, y in zip(base, other, strict=True)]
        kept = loop_kept(delta, density, gamma) if density < 1 else range(SIZE)
        deltas.append([factor * d if i in kept else 0.0 for i, d in enumerate(delta)])
    result = []
    for i, value in enumerate(base):
        column = [delta[i] for delta in deltas]
        sign = 1 if sum(column) >= 0 else -1
        chosen = [j for j, d in enumerate(column) if not elect or d * sign > 0]
        total, divisor = sum(column[j] for j in chosen), sum(weight[j] for j in chosen)
        result.append(value + lam * (total / divisor if normalize and chosen else total))
    return result


def loop_stock(rows):
    """Of one vector per model, the base's first."""
    base, *others = rows
    offsets = [[y - x for x, y in zip(base, other, strict=True)] for other in others]
    cosines = []
    for i, a in enumerate(offsets):
        for b in offsets[:i]:
            dot = sum(x * y for x, y in zip(a, b, strict=True))
            cosines.append(dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b)))
    cosine = max(0.0, sum(cosines) / len(cosines))
    t = len(others) * cosine / (1 + (len(others) - 1) * cosine)
    return [
        (1 - t) * value + t * sum(other[i] for other in others) / len(others)
        for i, value in enumerate(base)
    ]


def close(result: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(result.flatten(), torch.tensor(expected, dtype=torch.float64))


WEIGHT = [0.5, -0.3, 0.8]
TASKS = {
    "task_arithmetic": {},
    "ties": {"density": 0.4, "elect": True},
    "breadcrumbs": {"density": 0.5, "gamma": 0.1},
    "breadcrumbs_ties": {"density": 0.3, "gamma": 0.2, "elect": True},
}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_linear(seed, normalize):
    inputs = tensors(seed, 3)
    result = run("linear", inputs, weight=WEIGHT, normalize=normalize)
    close(result, loop_linear(flat(inputs), WEIGHT, normalize))


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 1.4])
def test_slerp(t):
    inputs = tensors(0, 2)
    close(run("slerp", inputs, t=t), loop_slerp(*flat(inputs), t))


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_task_vectors(name, normalize, seed):
    inputs, options = tensors(seed), dict(TASKS[name])
    own = {k: v for k, v in options.items() if k != "elect"}
    result = run(name, inputs, weight=WEIGHT, normalize=normalize, **{"lambda": 0.7}, **own)
    close(result, loop_task(flat(inputs), WEIGHT, 0.7, normalize, **options))


@pytest.mark.parametrize("seed", range(4))
def test_model_stock(seed):
    inputs = tensors(seed)
    close(run("model_stock", inputs), loop_stock(flat(inputs)))
    by_row = run("model_stock", inputs, filter_wise=True)
    for i, row in enumerate(by_row):
        close(row, loop_stock([x[i].tolist() for x in inputs]))


def test_model_stock_of_opposite_offsets_is_the_base():
    base, one, _ = tensors(0, 3)
    assert torch.equal(run("model_stock", [base, one, 2 * base - one]), base)
    assert torch.equal(run("model_stock", [base, base, base]), base)


SPARSE = ["ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties"]
SAME = {"linear": {"weight": [0.5, 0.3, 0.9]}, "slerp": {"t": 0.3}, "model_stock": {}}
SAME |= {"task_arithmetic": {"weight": WEIGHT}}
SAME |= {name: {"weight": WEIGHT, "density": 0.5} for name in SPARSE}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_of_equal_models_is_the_model(name, dtype):
    tensor = tensors(1, dtype=dtype)[1]
    count = {"linear": 3, "slerp": 2}.get(name, 4)
    result = run(name, [tensor] * count, **SAME[name])
    assert result.dtype == dtype
    torch.testing.assert_close(result, tensor, rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "model_stock", *SPARSE])
@given(seed=integers, weight=weights, order=st.permutations(range(3)))
def test_the_order_of_models_does_not_matter(name, seed, weight, order):
    base, *others = tensors(seed)
    lists = {"weight": weight, "density": [0.3, 0.6, 0.9], "gamma": [0.1, 0.0, 0.3]}
    lists = {key: value for key, value in lists.items() if key in METHODS[name].each}
    options = {"normalize": False} if "normalize" in METHODS[name].shared else {}
    results = []
    for indices in (range(3), order):
        moved = {key: [value[i] for i in indices] for key, value in lists.items()}
        inputs = [base] * METHODS[name].has_base + [others[i] for i in indices]
        results.append(run(name, inputs, seeds=list(indices), **moved, **options))
    torch.testing.assert_close(*results)


@given(integers, weights, st.floats(-3, 3), st.floats(-3, 3))
def test_linear_is_affine(seed, weight, factor, shift):
    inputs = tensors(seed, 3)
    go = partial(run, "linear", weight=[abs(w) + 0.1 for w in weight])
    torch.testing.assert_close(
        go([factor * x + shift for x in inputs]), factor * go(inputs) + shift
    )


@given(integers)
def test_slerp_ends_at_the_models_and_keeps_length_in_between(seed):
    one, two = tensors(seed, 2)
    torch.testing.assert_close(run("slerp", [one, two], t=0.0), one)
    torch.testing.assert_close(run("slerp", [one, two], t=1.0), two)
    two = two * one.norm() / two.norm()
    torch.testing.assert_close(run("slerp", [one, two], t=0.4).norm(), one.norm())


def test_slerp_of_parallel_models_is_a_straight_line():
    one, _ = tensors(0, 2)
    for other in (1.001 * one, -one, torch.zeros_like(one)):
        expected = loop_linear(flat([one, other]), [0.7, 0.3], True)
        if other.any():
            close(run("slerp", [one, other], t=0.3), expected)
        assert run("slerp", [one, other], t=0.3).isfinite().all()


@pytest.mark.parametrize("name", SPARSE)
@given(seed=integers, weight=weights)
def test_density_1_leaves_task_arithmetic_with_or_without_signs(name, seed, weight):
    inputs = tensors(seed)
    result = run(name, inputs, weight=weight, density=1.0, normalize=False)
    elect = METHODS[name].function.keywords["elect_sign"]
    close(result, loop_task(flat(inputs), weight, 1.0, False, elect=elect))


@given(integers, weights)
def test_ties_elects_the_sign_of_the_sum(seed, weight):
    """And takes nothing from a model that disagrees: its size does not matter then."""
    base, *others = tensors(seed)
    moves = [w * (x - base) for w, x in zip(weight, others, strict=True)]
    result = run("ties", [base, *others], weight=weight, normalize=False) - base
    total = sum(moves)
    assert ((result * total >= -1e-12) | (total.abs() < 1e-12)).all()
    assert ((result.abs() + 1e-12 >= total.abs()) | (total.abs() < 1e-12)).all()


@given(integers, shares)
def test_magnitude_keeps_the_largest_and_of_equal_ones_the_first(seed, density):
    delta = (tensors(seed)[0] * 2).round()  # many equal magnitudes
    kept = methods.magnitude(delta, 0, False, density).flatten()
    count = max(1, int(density * SIZE)) if density > 0 else 0
    order = sorted(range(SIZE), key=lambda i: (-abs(delta.flatten()[i]), i))[:count]
    expected = torch.zeros(SIZE, dtype=delta.dtype)
    expected[order] = delta.flatten()[order]
    assert torch.equal(kept, expected)


@given(integers, shares, shares)
def test_rescaled_magnitudes_have_the_same_sum(seed, density, gamma):
    delta = tensors(seed)[0]
    for kept in (
        methods.magnitude(delta, 0, True, density),
        methods.magnitude_outliers(delta, 0, True, density, gamma),
    ):
        assert not kept.any() or kept.abs().sum().item() == pytest.approx(delta.abs().sum().item())


def test_dare_keeps_its_share_and_its_expectation():
    delta = torch.randn(200, 500, generator=torch.Generator().manual_seed(0))
    kept = methods.random(delta, 1, True, 0.1)
    assert (kept != 0).float().mean().item() == pytest.approx(0.1, abs=0.005)
    chosen = kept != 0
    torch.testing.assert_close(kept[chosen], delta[chosen] / 0.1)
    means = torch.stack([methods.random(delta[:2], i, True, 0.1) for i in range(3000)]).mean(0)
    # The standard error of a mean of 3,000 at density 0.1 is 3 / sqrt(3000) of the value.
    assert ((means - delta[:2]).abs() < 6 * 0.055 * delta[:2].abs()).all()


def test_dare_goes_by_its_seed_alone():
    delta = tensors(0)[0]
    torch.manual_seed(1)
    first = methods.random(delta, 5, True, 0.5)
    torch.manual_seed(2)
    assert torch.equal(methods.random(delta, 5, True, 0.5), first)
    assert not torch.equal(methods.random(delta, 6, True, 0.5), first)


def test_density_0_takes_nothing():
    inputs = tensors(0)
    for name in SPARSE:
        assert torch.equal(run(name, inputs, weight=WEIGHT, density=0.0), inputs[0])


@pytest.mark.parametrize("name", ["linear", "task_arithmetic"])
def test_weights_that_add_up_to_zero_are_refused(name):
    inputs = tensors(0, 3 + METHODS[name].has_base)
    with pytest.raises(UserError, match="the weights 0.5, -0.7, 0.2 add up to zero"):
        run(name, inputs, weight=[0.5, -0.7, 0.2], normalize=True)


def test_sums_of_bfloat16_are_taken_in_float32():
    """1 + 1/256 eight times over is lost in bfloat16, which has no such number."""
    one, step = (torch.full((4,), x, dtype=torch.bfloat16) for x in (1.0, 2.0**-8))
    inputs = [one] + [step] * 8
    result = run("linear", inputs, weight=1.0, normalize=False)
    assert torch.equal(result, torch.full((4,), 1 + 2.0**-5, dtype=torch.bfloat16))
