"""Every attention backend against sdpa in float32, on a GPU."""

import pytest
import torch

from smol.errors import UserError
from smol.model import Decoder, DecoderConfig, init_weights
from smol.model.attention import BACKENDS, build_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def build_or_skip(name: str):
    try:
        return build_attention(name)
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("name", BACKENDS)
def test_backend_equals_sdpa(name, kv_heads, packed):
    backend = build_or_skip(name)
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (2, 512)
    q, k, v = (
        torch.randn(*shape, n, 64, generator=generator, device="cuda", dtype=torch.bfloat16)
        for n in (8, kv_heads, kv_heads)
    )
    documents = None
    if packed:
        documents = (torch.rand(shape, generator=generator, device="cuda") < 0.02).cumsum(dim=1)
    cotangent = torch.randn(q.shape, generator=generator, device="cuda")
    results = []
    for attention, dtype in ((backend, torch.bfloat16), (build_attention("sdpa"), torch.float32)):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = attention.prepare(documents, shape, q.device)(*inputs)
        gradients = torch.autograd.grad(out, inputs, cotangent.to(dtype))
        results.append([x.float() for x in (out, *gradients)])
    for rough, exact in zip(*results, strict=True):
        assert (rough - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("name", BACKENDS)
@torch.no_grad()
def test_documents_never_see_each_other(name):
    build_or_skip(name)
    config = DecoderConfig(101, 128, 2, 4, 2, 256, nope=2)
    with torch.device("cuda"):
        decoder = Decoder(config, attention=name)
        init_weights(decoder, seed=0)
        tokens = torch.randint(101, (2, 256))
        documents = torch.arange(256).ge(100).long().expand(2, 256).contiguous()
    with torch.autocast("cuda", torch.bfloat16):
        before = decoder(tokens, documents=documents)
        tokens[0, :100] = (tokens[0, :100] + 1) % 101
        after = decoder(tokens, documents=documents)
    assert not torch.equal(before[0, :100], after[0, :100])
    assert torch.equal(before[0, 100:], after[0, 100:])
    assert torch.equal(before[1], after[1])


@pytest.mark.parametrize("name", ["flex", "varlen", "xformers"])
def test_a_decoder_left_on_the_cpu_is_one_line(name):
    build_or_skip(name)
    decoder = Decoder(DecoderConfig(10, 32, 1, 2, 2, 8), attention=name)
    with pytest.raises(UserError, match="needs a CUDA device, the model is on cpu"):
        decoder(torch.zeros(1, 4, dtype=torch.long))
