"""Attention within documents against a dense mask written out in loops."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters

from smol.errors import UserError
from smol.model import Decoder, DecoderConfig, attention
from smol.model.attention import (
    BACKENDS,
    RowAttention,
    SplitAttention,
    build_attention,
    causal_document_mask,
    document_lengths,
    document_positions,
)
from smol.model.cpu_attention import SHORT_DOCUMENT


def dense_mask(documents: list[list[int]]) -> torch.Tensor:
    """``(batch, time, time)`` bool, by the definition."""
    mask = torch.zeros(len(documents), len(documents[0]), len(documents[0]), dtype=torch.bool)
    for b, row in enumerate(documents):
        for q in range(len(row)):
            for k in range(q + 1):
                mask[b, q, k] = len(set(row[k : q + 1])) == 1
    return mask


batches = st.integers(1, 3).flatmap(
    lambda batch: st.integers(1, 12).flatmap(
        lambda time: st.lists(
            st.lists(st.integers(0, 2), min_size=time, max_size=time),
            min_size=batch,
            max_size=batch,
        )
    )
)


@given(batches)
@settings(max_examples=60, deadline=None)
def test_lengths_and_positions(documents):
    mask = dense_mask(documents)
    tensor = torch.tensor(documents)
    # A token's position is the number of tokens before it that it sees.
    assert torch.equal(document_positions(tensor), mask.sum(dim=2) - 1)
    lengths = document_lengths(tensor, tuple(tensor.shape))
    assert sum(length * (length + 1) // 2 for length in lengths) == mask.sum()
    assert sum(lengths) == tensor.numel()


@given(batches, st.sampled_from([(4, 4), (4, 2), (4, 1)]))
@settings(max_examples=40, deadline=None)
def test_sdpa_equals_dense_mask(documents, heads):
    tensor = torch.tensor(documents)
    batch, time = tensor.shape
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(batch, time, n, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for n in (heads[0], heads[1], heads[1])
    )
    attend = build_attention("sdpa").prepare(tensor, (batch, time), tensor.device)
    out = attend(q, k, v)
    groups = heads[0] // heads[1]
    expected = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, *(x.repeat_interleave(groups, 2) for x in (k, v)))),
        attn_mask=dense_mask(documents).unsqueeze(1),
    ).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    cotangent = torch.randn(out.shape, generator=generator, dtype=out.dtype)
    gradients = [torch.autograd.grad(x, (q, k, v), cotangent) for x in (out, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("heads", [(3, 3), (6, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_documents_on_a_processor_equal_those_alone_in_float64(dtype, heads):
    """Short and long ones, whose gradients take different ways, and neighbours of one length."""
    lengths = [70, 70, 1, SHORT_DOCUMENT, SHORT_DOCUMENT, SHORT_DOCUMENT - 1, 33]
    q, k, v = (torch.randn(1, sum(lengths), n, 16).to(dtype) for n in (*heads, heads[1]))
    cotangent = torch.randn_like(q)

    def results(call, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = call(*inputs)
        return out, *torch.autograd.grad(out, inputs, cotangent.to(dtype))

    def one_by_one(*tensors):
        pieces = zip(*(x.transpose(1, 2).split(lengths, dim=2) for x in tensors), strict=True)
        out = [math_attention(*piece) for piece in pieces]
        return torch.cat(out, dim=2).transpose(1, 2)

    def math_attention(q, k, v):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        return scores.masked_fill(future, -torch.inf).softmax(-1) @ v

    seen = results(SplitAttention(lengths), dtype)
    expected = results(one_by_one, torch.float64)
    limit = {torch.bfloat16: 1e-2, torch.float32: 1e-5}[dtype]
    for result, reference in zip(seen, expected, strict=True):
        assert result.dtype == dtype
        error = (result - reference).norm() / reference.norm()
        assert error < limit


def test_one_document_per_row_is_one_call():
    sdpa, device = build_attention("sdpa"), torch.device("cpu")
    rows = torch.tensor([[1, 1, 1], [1, 1, 1]])
    assert isinstance(sdpa.prepare(None, (2, 3), device), RowAttention)
    assert isinstance(sdpa.prepare(rows, (2, 3), device), RowAttention)
    rows[0, 2] = 7
    assert isinstance(sdpa.prepare(rows, (2, 3), device), SplitAttention)


@given(batches)
@settings(max_examples=30, deadline=None)
def test_flex_mask(documents):
    tensor = torch.tensor(documents)
    batch, time = tensor.shape
    mask_mod = causal_document_mask(tensor)
    b, q, k = torch.meshgrid(
        torch.arange(batch), torch.arange(time), torch.arange(time), indexing="ij"
    )
    assert torch.equal(mask_mod(b, None, q, k), dense_mask(documents))


@pytest.mark.skipif(importlib.util.find_spec("xformers") is None, reason="needs xformers")
@given(batches)
@settings(max_examples=10, deadline=None)
def test_xformers_mask(documents):
    from smol.model.attention import block_diagonal_mask

    tensor = torch.tensor(documents)
    flat = tensor.numel()
    bias = block_diagonal_mask(document_lengths(tensor, tuple(tensor.shape)))
    visible = bias.materialize((1, 1, flat, flat))[0, 0] == 0
    assert torch.equal(visible, torch.block_diag(*dense_mask(documents).float()).bool())


def test_varlen_offsets():
    from smol.model.attention import cumulative_lengths

    offsets = cumulative_lengths([3, 1, 4], torch.device("cpu"))
    assert offsets.tolist() == [0, 3, 4, 8]
    assert offsets.dtype == torch.int32


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_varlen_is_part_of_one_graph(monkeypatch, kind):
    """Only traced: its kernel needs a GPU."""
    monkeypatch.setattr(attention, "_require_cuda", lambda *_: None)
    config = DecoderConfig(61, 64, 3, 4, 2, 96)
    decoder = Decoder(config, attention="varlen", activation_checkpointing=kind).bfloat16()
    torch._dynamo.reset()
    counters.clear()
    graphs = []

    def trace(graph, _):
        graphs.append(str(graph.code) + "".join(str(part.code) for part in graph.children()))
        (results,) = next(node for node in graph.graph.nodes if node.op == "output").args
        return lambda *inputs: tuple(
            next(x for x in inputs if x.shape[-1:] == (64,) and x.ndim == 3) for _ in results
        )

    for layer in decoder.model.layers:
        layer.compile(backend=trace)
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        documents = (torch.rand(2, 128, generator=generator) < 0.08).cumsum(1)
        decoder(torch.zeros_like(documents), documents=documents)
    assert len(graphs) == 2  # for the first longest document, then for any
    assert all("_varlen_attn" in graph for graph in graphs)
    assert not counters["graph_break"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="here these backends can run")
@pytest.mark.parametrize("name", ["flex", "varlen", "xformers"])
def test_backends_that_cannot_run_say_so(name):
    with pytest.raises(
        UserError, match=f"attention '{name}' needs .* use attention sdpa"
    ) as caught:
        Decoder(DecoderConfig(10, 8, 1, 2, 2, 8), attention=name)
    assert "\n" not in str(caught.value)


def test_unknown_backend_names_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'sdpa'"):
        build_attention("spda")
    assert set(BACKENDS) == {"sdpa", "flex", "varlen", "xformers"}
