"""YaRN from the checkpoint of a training that knew nothing of it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import make_data, make_module, make_stages, make_trainer

from smol.checkpoints.huggingface import export_huggingface, load_huggingface
from smol.errors import UserError
from smol.model import RopeConfig, load_decoder
from smol.model.io import assemble_decoder, read_description, with_trained_context
from smol.modules import LanguageModeling

TRAINED = 32  # tokens of context
FACTOR = 2.0


def stretched(checkpoint: Path | None, **rope) -> LanguageModeling:
    """A module that YaRN stretches, as the command line makes it for this checkpoint."""
    module = make_module()
    module.rope_config = with_trained_context(RopeConfig(yarn_factor=FACTOR, **rope), checkpoint)
    return module


@pytest.fixture(scope="module")
def trained(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(folder, max_steps=30)
    # What counts is the context trained at last, neither the data module's nor the longest.
    stages = make_stages(
        sources,
        one={"start_step": 0, "cats": 1.0, "context_length": TRAINED // 2},
        two={"start_step": 10, "cats": 1.0, "context_length": TRAINED},
    )
    data = make_data(sources, stages, context_length=64, longest_context=64)
    trainer.fit(make_module(), data)
    trainer.save_checkpoint(folder / "ck")
    return folder / "ck"


def validate(folder: Path, sources: Path, module: LanguageModeling, checkpoint: Path) -> float:
    trainer = make_trainer(folder, max_steps=1, limit_val_batches=None)
    data = make_data(sources, context_length=2 * TRAINED)
    (metrics,) = trainer.validate(module, data, ckpt_path=checkpoint, verbose=False)
    return metrics["held_out/loss"]


def test_the_factor_alone_stretches_a_checkpoint(trained, sources, tmp_path):
    assert read_description(trained)[1] == RopeConfig(original_context=TRAINED)
    named = validate(tmp_path, sources, stretched(None, original_context=TRAINED), trained)
    alone = stretched(trained)
    assert validate(tmp_path, sources, alone, trained) == named
    assert alone.decoder.rope == RopeConfig(yarn_factor=FACTOR, original_context=TRAINED)
    assert validate(tmp_path, sources, make_module(), trained) != named
    other = stretched(trained, original_context=7)
    assert validate(tmp_path, sources, other, trained) != named


def test_training_with_yarn_keeps_the_context_that_it_stretches(trained, sources, tmp_path):
    module = stretched(trained)
    module.initial_weights = trained
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(module, make_data(sources, context_length=2 * TRAINED))
    trainer.save_checkpoint(tmp_path / "ck")
    described = read_description(tmp_path / "ck")[1]
    assert described == RopeConfig(yarn_factor=FACTOR, original_context=TRAINED)
    again = make_trainer(tmp_path, max_steps=2)
    resumed = stretched(tmp_path / "ck")
    again.fit(resumed, make_data(sources, context_length=2 * TRAINED), ckpt_path=tmp_path / "ck")
    assert resumed.decoder.rope == described


def test_without_a_checkpoint_the_context_must_be_given(sources, tmp_path):
    with pytest.raises(UserError, match="original_context is missing") as caught:
        make_trainer(tmp_path, max_steps=1).fit(stretched(None), make_data(sources))
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_stretched_checkpoint_equals_transformers_beyond_its_context(trained, tmp_path):
    """Both ways: exported with YaRN, and exported without and asked for in ``config.json``."""
    from transformers import AutoModelForCausalLM

    plain = load_decoder(trained)
    rope = with_trained_context(RopeConfig(yarn_factor=FACTOR), trained)
    ours = assemble_decoder(plain.config, rope, plain.state_dict())
    for name, exported in {"plain": plain.rope, "yarn": rope}.items():
        export_huggingface(plain.config, exported, plain.state_dict(), tmp_path / name)
    file = tmp_path / "plain" / "config.json"
    config = json.loads(file.read_text())
    del config["rope_parameters"]
    config["rope_scaling"] = {
        "rope_type": "yarn",
        "factor": FACTOR,
        "original_max_position_embeddings": TRAINED,
    }
    file.write_text(json.dumps(config))

    tokens = torch.randint(plain.config.vocab_size, (2, 2 * TRAINED))
    logits = ours(tokens)
    beyond = slice(TRAINED, None)
    assert (logits - plain(tokens))[:, beyond].abs().max() > 1e-2, "YaRN does nothing"
    for name in ("plain", "yarn"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        difference = (model(tokens).logits - logits)[:, beyond].abs().max().item()
        print(f"{name}: max difference of logits beyond {TRAINED} tokens {difference:.2e}")
        assert difference < 1e-4
    config, back, weights = load_huggingface(tmp_path / "yarn")
    assert back == replace(rope, theta=plain.rope.theta)
    assert torch.equal(assemble_decoder(config, back, weights)(tokens), logits)
