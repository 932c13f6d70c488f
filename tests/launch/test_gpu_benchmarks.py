"""The benchmarks of one GPU, as far as a processor goes: the same models, counts and groups."""

import argparse
import json
import sys

import pytest
import torch
from launch_parts import ROOT
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from smol.model import DecoderConfig, init_weights
from smol.model.attention import SplitAttention

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_profile
import gpu_training
import gpu_ways
from gpu_profile import Work, breakdown, busy, floors, group_of, read_work
from gpu_ways import CHECKPOINTING, WAYS, Case, is_installed, make_batch

CPU = torch.device("cpu")
OURS = Case("smol", "smallest", 64, "sdpa", "none")


def test_the_best_micro_batch_is_found_within_its_limit(capsys):
    """On a processor, where memory is never full."""
    gpu_training.measure(OURS, peak=1e12, most_tokens=128)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["micro-batch tokens"] for row in rows} <= {64, 128}
    assert [row["tokens/s"] for row in rows] == sorted(row["tokens/s"] for row in rows)
    flops_per_token = rows[-1]["MFU %"] / 100 * 1e12 / rows[-1]["tokens/s"]
    matrices = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64) + 64 * 32
    attention = 12 * 2 * 32 * 64 / 2  # at most: causal, of one document
    assert 6 * matrices < flops_per_token < 6 * matrices + attention * 1.1


@pytest.mark.parametrize(
    ("way", "checkpointing"),
    [(way, kind) for way in WAYS if way != "liger" for kind in CHECKPOINTING[way]],
)
def test_each_way_trains_a_model_of_the_same_size(way, checkpointing):
    if way != "smol" and not is_installed(way):
        pytest.skip(f"{way} is not installed")
    training = gpu_training.Training(Case(way, "smallest", 64, "sdpa", "none"), checkpointing)
    training.start(rows=2)  # raises if the number of parameters is another one
    losses = [training.step().item() for _ in range(30)]
    assert losses[-1] < losses[0] - 0.01


def pair(monkeypatch, attention):
    """Mean loss and gradient of the head, of ours and of transformers with the same weights."""
    monkeypatch.setattr(gpu_ways, "MEAN_DOCUMENT", 12)
    results = []
    ours, prepare = WAYS["smol"](OURS, "none", CPU)
    init_weights(ours, seed=1)
    theirs, their_prepare = WAYS["transformers"](
        Case("transformers", "smallest", 64, attention, "none"), "none", CPU
    )
    theirs.load_state_dict(ours.state_dict(), strict=False)
    batch = make_batch(OURS, 2, CPU)
    assert len(batch.lengths) > 4
    for module, start in ((ours, prepare), (theirs, their_prepare)):
        loss = start(batch)()
        loss.backward()
        results.append((loss.item(), module.get_parameter("model.embed_tokens.weight").grad))
    return results


def test_flattened_rows_of_a_peer_keep_the_same_documents_apart(monkeypatch):
    """A kernel of ours stands in for that of flash attention, and sees what that would be given."""

    def kernel(module, q, k, v, attention_mask, **options):
        assert attention_mask is None
        assert options["cu_seq_lens_q"].dtype == torch.int32
        lengths = options["cu_seq_lens_q"].diff().tolist()
        assert options["max_length_q"] == options["max_length_k"] == max(lengths)
        assert torch.equal(options["cu_seq_lens_q"], options["cu_seq_lens_k"])
        return SplitAttention(lengths)(*(x.transpose(1, 2) for x in (q, k, v))), None

    ALL_ATTENTION_FUNCTIONS.register("varlen_stub", kernel)
    ALL_MASK_ATTENTION_FUNCTIONS.register("varlen_stub", flash_attention_mask)
    (loss, gradient), (their_loss, theirs) = pair(monkeypatch, "varlen_stub")
    assert their_loss == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(theirs, gradient, rtol=1e-3, atol=1e-6)


def test_a_peer_without_a_mask_says_that_documents_meet(monkeypatch):
    assert not Case("transformers", "smallest", 64, "sdpa", "none").documents_apart
    assert OURS.documents_apart
    (loss, _), (their_loss, _) = pair(monkeypatch, "sdpa")
    assert their_loss != pytest.approx(loss, rel=1e-5)


def flags(**changed):
    values = {"ways": ["smol"], "model": ["1b"], "context": [4096], "attention": ["varlen"]}
    values |= {"compile": ["block"], "float8": ["none"], "peer_attention": None}
    return argparse.Namespace(**(values | changed))


def test_a_peer_that_is_absent_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(gpu_training, "is_installed", lambda way: way != "litgpt")
    made = list(gpu_training.cases(flags(ways=["smol", "transformers", "litgpt"])))
    assert [(c.way, c.attention, c.compile) for c in made] == [
        ("smol", "varlen", "block"),
        ("transformers", "sdpa", "whole"),
    ]
    assert capsys.readouterr().out == (
        "litgpt is left out: it is not installed; see benchmarks/README.md\n"
    )


def test_float8_is_for_ours_only():
    asked = flags(ways=["smol", "transformers"], compile=["none"], float8=["none", "rowwise"])
    made = list(gpu_training.cases(asked))
    assert [(c.way, c.compile, c.float8) for c in made] == [
        ("smol", "none", "none"),
        ("smol", "none", "rowwise"),
        ("transformers", "none", "none"),
    ]


def test_the_best_of_each_is_compared():
    def row(way, speed, float8="none", model="1b"):
        made = {"model": model, "context": 4096, "way": way, "attention": "sdpa"}
        return made | {"float8": float8, "tokens/s": speed}

    rows = [row("smol", 90.0), row("smol", 100.0), row("smol", 150.0, "rowwise")]
    rows += [row("litgpt", 80.0), row("transformers", 60.0), row("smol", 1.0, model="3b")]
    assert gpu_training.comparison(rows) == [
        {
            "model": "1b",
            "context": 4096,
            "best peer": "litgpt sdpa",
            "ours / best peer": 1.25,
            "float8 rowwise / bfloat16": 1.5,
        }
    ]


def event(cat, name, ts, dur, tid=1, correlation=None):
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


def test_a_kernel_belongs_to_what_launched_it():
    """A trace by hand: two threads launch, kernels run later than their launches."""
    trace = [
        event("cpu_op", "aten::linear", 0, 10),
        event("cpu_op", "aten::mm", 0, 8),
        event("cuda_runtime", "cudaLaunchKernel", 2, 1, correlation=1),
        event("cpu_op", "aten::mul", 12, 3),
        event("cuda_driver", "cuLaunchKernelEx", 13, 1, correlation=2),
        event("cpu_op", "_LinearCrossEntropyBackward", 0, 20, tid=2),
        event("cpu_op", "aten::mm", 4, 9, tid=2),
        event("cuda_runtime", "cudaLaunchKernel", 5, 1, tid=2, correlation=3),
        event("user_annotation", "Optimizer.step#AdamW.step", 40, 9),
        event("cuda_runtime", "cudaLaunchKernel", 41, 1, correlation=4),
        event("kernel", "nvjet_tst_128x256", 100, 30, tid=7, correlation=1),
        event("kernel", "vectorized_elementwise_kernel", 125, 10, tid=7, correlation=2),
        event("kernel", "nvjet_tst_64x8", 145, 5, tid=7, correlation=3),
        event("kernel", "multi_tensor_apply_kernel", 150, 7, tid=7, correlation=4),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 170, 1, tid=7, correlation=5),
        event("gpu_user_annotation", "Optimizer.step#AdamW.step", 100, 70, tid=7),
        {"ph": "M", "name": "process_name"},
    ]
    work = read_work(trace)
    assert work[0].ranges == ("aten::linear", "aten::mm")
    assert work[2].ranges == ("_LinearCrossEntropyBackward", "aten::mm")
    assert [group_of(each) for each in work] == [
        "matrix products",
        "element-wise and casts",
        "head and loss",
        "optimiser",
        "copies and communication",
    ]
    assert busy(work) == 35 + 5 + 7 + 1  # two of them overlap for 5
    rows = {row["group"]: row for row in breakdown(work, 100e-6, {"attention": 2e-6})}
    assert rows["matrix products"]["ms"] == pytest.approx(0.030)
    assert rows["matrix products"]["share %"] == pytest.approx(30)
    assert rows["launch gaps"]["ms"] == pytest.approx(0.1 - 0.048)
    assert rows["attention"] == {"group": "attention", "ms": 0, "share %": 0, "floor ms": 2e-3}


@pytest.mark.parametrize(
    ("name", "ranges", "group"),
    [
        ("triton_poi_fused_silu_mul_3", ("CompiledFxGraph",), "element-wise and casts"),
        ("triton_tem_fused_mm_2", (), "matrix products"),
        ("triton_tem_fused_flex_attention_0", (), "attention"),
        ("void pytorch_flash::flash_fwd_kernel", ("aten::_flash_attention_forward",), "attention"),
        ("elementwise_kernel", ("torch_attn::_varlen_attn",), "attention"),
        ("sm90_xmma_gemm_e4m3bf16", ("aten::_scaled_mm",), "matrix products"),
        ("reduce_kernel", ("aten::_foreach_norm",), "optimiser"),
        ("ncclDevKernel_ReduceScatter", (), "copies and communication"),
    ],
)
def test_kernels_of_a_gpu_are_known_by_their_names(name, ranges, group):
    assert group_of(Work(name, 0, 1, ranges)) == group


def test_floors_add_up_to_the_operations_of_the_model():
    config = DecoderConfig(64, 32, 2, 2, 1, 64)
    least = floors(config, [10, 6], product_rate=1e9, copy_rate=1e6)
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64
    assert least["matrix products"] == pytest.approx(6 * 2 * layer * 16 / 1e9)
    assert least["head and loss"] == pytest.approx(6 * 64 * 32 * 16 / 1e9)
    pairs = 10 * 11 / 2 + 6 * 7 / 2
    assert least["attention"] == pytest.approx(12 * 2 * 32 * pairs / 1e9)
    norms = 2 * 2 * 32 + 32
    assert least["optimiser"] == pytest.approx(28 * (2 * layer + 64 * 32 + norms) / 1e6)


def test_a_step_on_a_processor_is_taken_apart(tmp_path):
    training = gpu_training.Training(OURS, "none")
    lengths = training.start(rows=2)
    work = gpu_profile.profile_step(training, tmp_path / "trace.json")
    rows = breakdown(work, seconds=10.0, least=floors(training.case.config, lengths, 1e9, 1e9))
    taken = {row["group"]: row["ms"] for row in rows}
    for group in ("matrix products", "attention", "head and loss", "optimiser"):
        assert taken[group] > 0, group
    assert sum(taken.values()) - taken["step"] == pytest.approx(10_000, rel=1e-2)
    assert (tmp_path / "trace.json").exists()
