"""A tiny model that chats, as a folder."""

from pathlib import Path

import pytest
from tiny import prepare_sources

from smol.checkpoints.huggingface import export_huggingface, load_huggingface
from smol.data.chat import default_source
from smol.data.tokenizer import load_tokenizer
from smol.model import Decoder, DecoderConfig, RopeConfig, init_weights
from smol.model.io import assemble_decoder

SRC = Path(__file__).parents[2] / "src"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny Hugging Face folder with the project's chat template; beside it one without."""
    root = tmp_path_factory.mktemp("model")
    tokenizer = prepare_sources(root / "sources") / "tokenizer"
    vocab = load_tokenizer(tokenizer).vocab_size
    decoder = Decoder(DecoderConfig(vocab, 32, 2, 2, 1, 64, nope=2))
    init_weights(decoder, std=0.3, seed=1)
    for name in ("base", "chat"):
        export_huggingface(
            decoder.config, RopeConfig(), decoder.state_dict(), root / name, tokenizer
        )
    (root / "chat" / "chat_template.jinja").write_text(default_source())
    return root / "chat"


def load_decoder_of(folder: Path) -> Decoder:
    return assemble_decoder(*load_huggingface(folder)).eval()
