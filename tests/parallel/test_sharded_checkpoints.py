"""Sharded checkpoints: each element once, any layout into any other, and nothing half."""

import json
import math
import os
import pickle
import subprocess
import sys
from collections import Counter
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from simulated_ranks import as_rank, numbered, shard, write_halves, write_sharded
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from smol.checkpoints.command import main
from smol.checkpoints.format import (
    NonFiniteError,
    open_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from smol.checkpoints.huggingface import export_huggingface
from smol.checkpoints.store import FsspecStore
from smol.checkpoints.weights import copy_weights
from smol.errors import UserError
from smol.model import Decoder, DecoderConfig, RopeConfig, init_weights, load_decoder
from smol.parallel.fsdp import local_part
from smol.runs import decoder_folder
from smol.stored_tensors import stored_tensors

MESHES = [(1,), (2,), (3,), (2, 2), (3, 2)]


# -- every layout --------------------------------------------------------------------------------


@st.composite
def layouts(draw, shapes):
    """A mesh, and placements of every shape on it: shards, replicas, and FSDP over rows of TP."""
    mesh = draw(st.sampled_from(MESHES))
    placements = {}
    for name, shape in shapes.items():
        dims = [Shard(dim) for dim in range(len(shape))]
        one = st.sampled_from([Replicate(), *dims])
        options = [st.lists(one, min_size=len(mesh), max_size=len(mesh))]
        if len(mesh) == 2 and shape and shape[0] % mesh[1] == 0:
            options.append(st.just([_StridedShard(0, split_factor=mesh[1]), Shard(0)]))
        placements[name] = draw(st.one_of(st.none(), *options))
    return mesh, placements


@st.composite
def cases(draw):
    sizes = st.lists(st.integers(0, 7), max_size=3).map(tuple)
    shapes = dict(enumerate(draw(st.lists(sizes, min_size=1, max_size=3))))
    shapes = {f"w{i}": shape for i, shape in shapes.items()}
    return shapes, draw(layouts(shapes)), draw(layouts(shapes))


@pytest.mark.slow
@given(cases())
@settings(max_examples=20)
def test_each_element_is_stored_once_and_found_by_any_layout(tmp_path_factory, case):
    shapes, (mesh_shape, placements), (other_mesh, other_placements) = case
    folder = tmp_path_factory.mktemp("sharded")
    weights = {name: numbered(shape) for name, shape in shapes.items()}
    digests = write_sharded(folder, mesh_shape, placements, weights, position=torch.tensor(7))

    files = [load_file(path) for path in folder.glob("model*.safetensors")]
    for name, whole in weights.items():
        elements = [x for file in files if name in file for x in file[name].flatten().tolist()]
        assert Counter(elements) == Counter(whole.flatten().tolist())
    assert len(files) <= math.prod(mesh_shape)
    assert set(digests) == {path.name for path in folder.glob("*.safetensors")}

    read = read_checkpoint(folder)
    assert read["position"] == 7
    assert all(torch.equal(read["state_dict"][name], whole) for name, whole in weights.items())
    stored = open_checkpoint(folder)["state_dict"]

    def is_found(mesh):
        targets = shard(weights, mesh, other_placements)
        pairs = [(stored[name].read_like(target), target) for name, target in targets.items()]
        return all(
            type(a) is type(b) and a.dtype == b.dtype and torch.equal(local_part(a), local_part(b))
            for a, b in pairs
        )

    for rank in range(math.prod(other_mesh)):
        assert as_rank(rank, other_mesh, is_found)


def test_files_are_numbered_by_who_writes(tmp_path):
    """Of two copies in two shards each, one is written; what one rank holds alone is one file."""
    weights = {"a": numbered((4, 2)), "b": numbered((3,))}
    copies = {"a": [Replicate(), Shard(0)], "b": [Replicate(), Replicate()]}
    write_sharded(tmp_path / "hsdp", (2, 2), copies, weights)
    names = {path.name for path in (tmp_path / "hsdp").iterdir()}
    assert names == {
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        *("model.shards.json", "state.json"),
    }
    write_sharded(tmp_path / "ddp", (2, 2), dict.fromkeys(copies, [Replicate()] * 2), weights)
    assert {p.name for p in (tmp_path / "ddp").iterdir()} == {"model.safetensors", "state.json"}


def test_a_rank_reads_nothing_but_its_rows(tmp_path):
    write_halves(tmp_path, {"w": numbered((6, 2))})
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    stored = open_checkpoint(tmp_path)["state_dict"]["w"]

    def read(mesh):
        target = shard({"w": torch.zeros(6, 2)}, mesh, {"w": [Shard(0)]})["w"]
        return stored.read_like(target).to_local().tolist()

    assert as_rank(1, (2,), read) == [[6, 7], [8, 9], [10, 11]]
    with pytest.raises(UserError, match=r"cannot read the tensors in .*model-00001-of-00002"):
        stored.read()


# -- damage --------------------------------------------------------------------------------------


def drop_piece(index):
    del index["tensors"]["w"]["pieces"][1]


def move_piece(index):
    index["tensors"]["w"]["pieces"][1]["offset"] = [0, 0]


def leave_folder(index):
    index["tensors"]["w"]["pieces"][1]["file"] = "../other.safetensors"


def stretch(index):
    index["tensors"]["w"]["shape"] = [6, 3]


def leave_shape(index):
    index["tensors"]["w"]["pieces"][1]["offset"] = [4, 0]


def confuse(index):
    index["tensors"]["w"]["pieces"][1]["offset"] = ["3", None]


def retype(index):
    index["tensors"]["w"]["dtype"] = "object"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop_piece, r"pieces of 'w' hold 6 of its 12 elements"),
        (move_piece, "pieces of 'w' overlap"),
        (leave_folder, r"outside of its folder: \.\./other"),
        (stretch, "hold 12 of its 18|outside of its shape"),
        (leave_shape, "'w' lies outside of its shape"),
        (confuse, "are not sizes"),
        (retype, "object"),
        (lambda index: index.pop("tensors"), "tensors"),
        (lambda index: index.update(format=2), "not an index of format 1"),
    ],
)
def test_a_tampered_index_is_one_line(tmp_path, edit, message):
    write_halves(tmp_path, {"w": numbered((6, 2))})
    path = tmp_path / "model.shards.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))
    for read in (read_checkpoint, open_checkpoint, load_weights):
        with pytest.raises(UserError, match=message) as error:
            read(tmp_path)
        assert "model.shards.json" in str(error.value)
        assert "\n" not in str(error.value)


def load_weights(folder):
    copy_weights(torch.nn.ParameterDict({"w": torch.zeros(6, 2)}), folder)


def test_another_file_in_place_of_a_shard_is_one_line(tmp_path):
    write_halves(tmp_path, {"w": numbered((6, 2))})
    path = tmp_path / "model-00002-of-00002.safetensors"
    for tensors, message in [
        ({"w": torch.zeros(2, 2)}, r"'w' as F32 \(2, 2\); its index says F32 \(3, 2\)"),
        ({"w": torch.zeros(3, 2).bfloat16()}, r"'w' as BF16"),
        ({"v": torch.zeros(3, 2)}, "cannot read the tensors in .*00002-of-00002"),
    ]:
        save_file(tensors, path)
        with pytest.raises(UserError, match=message) as error:
            read_checkpoint(tmp_path)
        assert "\n" not in str(error.value)


def test_a_pickle_in_any_file_runs_nothing(tmp_path):
    marker = tmp_path / "executed"

    class Bomb:
        def __reduce__(self):
            return open, (str(marker), "w")

    bomb = pickle.dumps(Bomb())
    names = [
        "state.json", "model.shards.json", "state.safetensors",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    ]  # fmt: skip
    for name in names:
        folder = tmp_path / name.replace(".", "_")
        write_halves(folder, {"w": numbered((6, 2))}, callbacks=torch.ones(1))
        assert (folder / name).exists()
        (folder / ".metadata").write_bytes(bomb)
        (folder / name).write_bytes(bomb)
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            read_checkpoint(folder)
    assert not marker.exists()


def test_a_value_of_one_rank_that_is_not_finite_is_refused(tmp_path):
    weights = {"w": numbered((6, 2))}
    weights["w"][5, 1] = math.nan
    with pytest.raises(NonFiniteError, match="step 3 is refused: 'w'"):
        write_halves(tmp_path / "new", weights, global_step=3)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_not_all_see_is_named(tmp_path):
    def elsewhere(action):
        other = action()
        (tmp_path / "model-of-rank-0.safetensors").unlink()
        return [other]

    with pytest.raises(UserError, match="on a file system that all machines share"):
        write_checkpoint(tmp_path, {"state_dict": {"w": torch.ones(1)}}, on_all_ranks=elsewhere)


# -- folders as people use them --------------------------------------------------------------------

SHAPE = DecoderConfig(
    vocab_size=61, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=34
)


def decoder_files(decoder):
    description = {"decoder": asdict(decoder.config), "rope": asdict(decoder.rope)}
    return {"decoder.json": description}


@pytest.fixture
def decoder():
    decoder = Decoder(SHAPE, RopeConfig())
    init_weights(decoder, seed=3)
    return decoder


@pytest.fixture
def run(tmp_path, decoder):
    """A run with two sharded checkpoints."""
    weights = {f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}
    store = FsspecStore(tmp_path / "run/checkpoints")
    for step in (1, 2):
        entries = {"global_step": step, "files": decoder_files(decoder)}
        store.save(step, lambda folder, e=entries: write_halves(folder, weights, **e), {})
    return tmp_path / "run"


@torch.no_grad()
def test_a_sharded_checkpoint_is_a_decoder_folder(run, decoder):
    folder = decoder_folder(run)
    assert len(list(folder.glob("model-*.safetensors"))) == 2
    assert decoder_folder(folder) == folder
    tokens = torch.randint(0, 61, (2, 9))
    assert torch.equal(load_decoder(folder)(tokens), decoder(tokens))
    other = Decoder(SHAPE, RopeConfig())
    copy_weights(other, folder)
    assert torch.equal(other(tokens), decoder(tokens))


def call(capsys, *words):
    status = main([*map(str, words), "--json"])
    out, err = capsys.readouterr()
    return status, json.loads(out) if out else None, err


@torch.no_grad()
def test_commands(run, decoder, capsys, tmp_path):
    from transformers import AutoModelForCausalLM

    assert [row["step"] for row in call(capsys, "list", run)[1]] == [1, 2]
    assert {row["local"] for row in call(capsys, "verify", run)[1]} == {"whole"}
    status, (row,), _ = call(capsys, "restore", run, "2", "--to", tmp_path / "there")
    restored = FsspecStore(tmp_path / "there")
    restored.verify(restored.list()[0])
    assert call(capsys, "export", run, "--to", tmp_path / "hub")[0] == 0
    tokens = torch.randint(0, 61, (2, 9))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hub").eval()
    torch.testing.assert_close(exported(tokens).logits, decoder(tokens), atol=1e-5, rtol=1e-4)
    shard_file = run / "checkpoints" / row["key"] / "model-00002-of-00002.safetensors"
    shard_file.write_bytes(shard_file.read_bytes()[:-1])
    status, found, _ = call(capsys, "verify", run)
    assert status == 1
    assert "model-00002-of-00002.safetensors is damaged" in found[-1]["local"]
    shard_file.unlink()
    _, _, err = call(capsys, "export", run, "2", "--to", tmp_path / "none")
    assert err.count("\n") == 1
    assert "model-00002-of-00002.safetensors" in err


@torch.no_grad()
def test_an_export_in_several_files_is_read_by_transformers(run, decoder, tmp_path):
    from transformers import AutoModelForCausalLM

    weights = {n.removeprefix("decoder."): t for n, t in
               stored_tensors(decoder_folder(run), "model").items()}  # fmt: skip
    export_huggingface(SHAPE, RopeConfig(), weights, tmp_path / "hub", file_bytes=8000)
    files = sorted(path for path in (tmp_path / "hub").glob("*.safetensors"))
    assert len(files) > 2
    assert all(sum(t.nbytes for t in load_file(f).values()) <= 8000 for f in files)
    tokens = torch.randint(0, 61, (2, 9))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hub").eval()
    torch.testing.assert_close(exported(tokens).logits, decoder(tokens), atol=1e-5, rtol=1e-4)


EXPORT = """
import re, sys
from pathlib import Path
import torch
from smol.checkpoints.huggingface import export_huggingface
from smol.model.io import read_description, stored_weights
source, out, file_bytes, all_at_once = sys.argv[1:]
def peak():  # ru_maxrss would be that of the parent
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
torch.zeros(9).exp()
weights = stored_weights(source)
before = peak()
if int(all_at_once):
    weights = {name: weight.read() for name, weight in weights.items()}
export_huggingface(*read_description(source), weights, out, file_bytes=int(file_bytes))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_export_holds_one_output_file_and_no_more(tmp_path):
    config = DecoderConfig(
        vocab_size=512, hidden_size=512, num_layers=12, num_heads=4, num_kv_heads=2,
        intermediate_size=1536,
    )  # fmt: skip
    decoder = Decoder(config, RopeConfig())
    weights = decoder.state_dict()
    total = sum(tensor.nbytes for tensor in weights.values())
    assert total > 130e6
    write_halves(tmp_path / "sharded", weights, files=decoder_files(decoder))
    peaks = []
    for all_at_once in (0, 1):
        words = [tmp_path / "sharded", tmp_path / f"hub{all_at_once}", 16_000_000, all_at_once]
        done = subprocess.run(
            [sys.executable, "-c", EXPORT, *map(str, words)],
            # What is freed goes back to the system at once, so that growth is what is held.
            env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
    assert peaks[0] < total / 3, peaks
    assert peaks[1] > total
