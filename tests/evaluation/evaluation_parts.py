"""A small model with a tokenizer, and files of records, for the tests of evaluation."""

import json
from pathlib import Path

import torch
from tiny import VOCAB

from smol.data.tokenizer import load_tokenizer
from smol.evaluation.language_model import LanguageModel
from smol.model import Decoder, DecoderConfig, init_weights


def tiny_decoder(vocab_size: int = VOCAB, **changes) -> Decoder:
    """Grouped queries, query norms, a layer without rotary embedding; logits far from uniform."""
    shape = {"hidden_size": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2}
    more = {"intermediate_size": 48, "nope": 2, "qk_norm": True, "init_std": 0.3}
    decoder = Decoder(DecoderConfig(vocab_size=vocab_size, **(shape | more | changes)))
    init_weights(decoder, seed=1)
    return decoder.eval()


def tiny_model(sources: Path, **fields) -> LanguageModel:
    tokenizer = load_tokenizer(sources / "tokenizer")
    return LanguageModel(tiny_decoder(), tokenizer, "tiny", (tokenizer.eos_id,), 128, **fields)


def write_records(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@torch.no_grad()
def brute_force(decoder: Decoder, context, continuation) -> tuple[float, bool]:
    """Log-probability and greediness of one continuation from whole logits, token by token."""
    total, greedy, text = 0.0, True, list(context)
    for token in continuation:
        logits = decoder(torch.tensor([text]))[0, -1].double()
        total += float(logits.log_softmax(-1)[token])
        greedy &= int(logits.argmax()) == token
        text.append(token)
    return total, greedy
