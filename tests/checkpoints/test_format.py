"""The checkpoint's files: every type comes back, nothing runs, damage is named."""

import json
import math
import pickle
from collections import Counter, OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from smol.checkpoints.format import NonFiniteError, read_checkpoint, write_checkpoint
from smol.checkpoints.structure import flatten, unflatten
from smol.errors import UserError

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def same(a, b):
    """Equality that also compares types, tensors and undefined floats."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (float, np.floating)):
        return (a == b and math.copysign(1, a) == math.copysign(1, b)) or (a != a and b != b)
    return a == b


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    tensor = (torch.arange(math.prod(shape)).reshape(shape) % 3).to(dtype)
    return tensor.transpose(0, -1) if shape and draw(st.booleans()) else tensor


keys = st.one_of(st.text(max_size=4), st.integers(), st.just("$"))
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=8),
    tensors(),
    st.lists(st.integers(0, 9), max_size=3).map(torch.Size),
    st.floats(width=32).map(np.float32),
    st.floats().map(np.float64),
    st.integers(0, 255).map(np.uint8),
    st.booleans().map(np.bool_),
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
        st.dictionaries(keys, inner, max_size=3).map(OrderedDict),
    ),
    max_leaves=12,
)


@given(trees)
@settings(max_examples=300, deadline=None)
def test_every_value_comes_back(tree):
    flat, structure = flatten(tree)
    assert same(unflatten(flat, json.loads(json.dumps(structure, allow_nan=False))), tree)


@given(st.dictionaries(st.text(max_size=4), trees, max_size=4))
@settings(max_examples=25, deadline=None)
def test_every_checkpoint_comes_back_from_files(tmp_path_factory, tree):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, tree)
    assert same(dict(sorted(read_checkpoint(folder).items())), dict(sorted(tree.items())))


def lightning_checkpoint():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    return {
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "callbacks": {"best": torch.tensor(2.5), "worst": -math.inf},
        "global_step": 1,
    }


def test_files_of_a_checkpoint(tmp_path):
    checkpoint = lightning_checkpoint()
    write_checkpoint(tmp_path / "new", checkpoint)
    assert {file.name for file in (tmp_path / "new").iterdir()} == {
        *("model.safetensors", "optimizer.safetensors", "state.safetensors", "state.json")
    }
    weights = load_file(tmp_path / "new" / "model.safetensors")
    assert set(weights) == {"weight", "bias"}
    assert set(load_file(tmp_path / "new" / "optimizer.safetensors")) == {
        f"0.state.{i}.{key}" for i in (0, 1) for key in ("step", "exp_avg", "exp_avg_sq")
    }
    assert same(read_checkpoint(tmp_path / "new"), checkpoint)


def test_the_files_are_not_changed_by_writing_to_what_was_read(tmp_path):
    checkpoint = lightning_checkpoint()
    write_checkpoint(tmp_path, checkpoint)
    for tensor in read_checkpoint(tmp_path)["state_dict"].values():
        tensor.zero_()
    assert same(read_checkpoint(tmp_path), checkpoint)


def test_tied_tensors_are_stored_once_and_tied_again(tmp_path):
    weight = torch.randn(4, 2)
    state = {"embed": weight, "head": weight, "view": weight[1:], "turned": weight.T}
    write_checkpoint(tmp_path, {"state_dict": state})
    assert set(load_file(tmp_path / "model.safetensors")) == {"embed", "view", "turned"}
    read = read_checkpoint(tmp_path)["state_dict"]
    assert same(read, state)
    assert read["embed"] is read["head"]


def test_keys_that_look_alike_stay_apart():
    tree = {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}, 1: torch.ones(2), "1": torch.zeros(2)}
    flat, structure = flatten(tree)
    assert len(flat) == 4
    assert same(unflatten(flat, structure), tree)


class Opaque:
    pass


class Text(str):
    pass


@pytest.mark.parametrize(
    "value",
    [
        Opaque(),
        Text("a"),
        {1, 2},
        lambda: 0,
        Counter(),
        defaultdict(list),
        np.zeros(2),
        1j,
        torch.float32,
        torch.zeros(2, device="meta"),
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(2, dtype=torch.complex128),
        {Opaque(): 1},
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_types_are_refused_by_key_path(tmp_path, value):
    with pytest.raises(UserError, match=r"'callbacks\.guard\.1'") as error:
        write_checkpoint(tmp_path / "new", {"callbacks": {"guard": [0, value]}})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match=r"'state_dict\.x'"):
        write_checkpoint(tmp_path / "new", {"state_dict": {"x": value}})


def test_a_pickle_in_any_file_runs_nothing(tmp_path):
    marker = tmp_path / "executed"

    class Bomb:
        def __reduce__(self):
            return open, (str(marker), "w")

    for name in ("model.safetensors", "optimizer.safetensors", "state.safetensors", "state.json"):
        folder = tmp_path / name.replace(".", "_")
        write_checkpoint(folder, lightning_checkpoint())
        (folder / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            read_checkpoint(folder)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Bomb()))  # the bomb itself works
    assert marker.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "format 1"),
        ('{"format": 2}', "format 1"),
        ('{"format": 1, "state": {"a": {"$": "tensor", "name": "gone"}}}', "gone"),
        ('{"format": 1, "state": {"a": {"$": "os.system", "items": []}}}', "os.system"),
        ('{"format": 1, "state": {"a": {"$": "numpy", "dtype": "object", "value": 1}}}', "numpy"),
    ],
)
def test_a_foreign_structure_is_one_line(tmp_path, text, message):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


def test_non_finite_tensors_are_refused_by_name(tmp_path):
    checkpoint = lightning_checkpoint() | {"step": math.nan, "callbacks": torch.tensor(math.inf)}
    write_checkpoint(tmp_path / "good", checkpoint)
    checkpoint["state_dict"]["bias"][1] = math.nan
    with pytest.raises(NonFiniteError, match="step 1 is refused: 'bias'"):
        write_checkpoint(tmp_path / "weights", checkpoint)
    checkpoint = lightning_checkpoint()
    checkpoint["optimizer_states"][0]["state"][0]["exp_avg"][0, 0] = math.inf
    with pytest.raises(NonFiniteError, match=r"'0\.state\.0\.exp_avg'"):
        write_checkpoint(tmp_path / "moments", checkpoint)
    checkpoint = {"state_dict": {"w": torch.full((2,), math.nan).to(torch.float8_e5m2)}}
    with pytest.raises(NonFiniteError, match="'w'"):
        write_checkpoint(tmp_path / "eight_bits", checkpoint)
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_named_files_are_written_beside_the_rest(tmp_path):
    description = {"decoder": {"hidden_size": 8}, "rope": {"theta": 1e4}}
    checkpoint = {"state_dict": {"w": torch.ones(2)}, "files": {"decoder.json": description}}
    write_checkpoint(tmp_path / "ck", checkpoint)
    assert json.loads((tmp_path / "ck/decoder.json").read_text()) == description
    assert "files" not in read_checkpoint(tmp_path / "ck")
