"""A model as evaluation sees it."""

import torch
from evaluation_parts import tiny_model

from smol.generation import Sampling
from smol.generation.inference_copy import PackedBlock, can_pack


def test_a_fixed_model_writes_what_others_write_with_a_faster_copy(sources):
    sampling = Sampling(temperature=0, max_new_tokens=12)
    prompts = [[3, 1, 4], [1], [5, 9, 2, 6, 5]]
    trained, fixed = tiny_model(sources), tiny_model(sources, fixed=True)
    expected = trained.generate(prompts, sampling)
    found = fixed.generate(prompts, sampling)
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    assert trained._generator.decoder is trained.decoder  # whose weights may change
    if can_pack(torch.float32, torch.device("cpu")):
        assert isinstance(fixed._generator.decoder.model.layers[0], PackedBlock)
