"""A decoder with its tokenizer: what evaluation asks questions of."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from smol.data.chat import ChatTemplate, load_chat_template
from smol.data.tokenizer import Tokenizer, load_tokenizer
from smol.errors import UserError
from smol.evaluation.bits_per_byte import token_bytes
from smol.evaluation.likelihood import Request, Score, score
from smol.evaluation.model_folder import ModelFolder
from smol.generation import Completion, Generator, Sampling
from smol.generation.inference_copy import can_pack
from smol.model import Decoder

DEFAULT_LENGTH = 2048


@dataclass
class LanguageModel:
    """A decoder with its tokenizer, as evaluation sees it.

    Attributes:
        decoder: The decoder.
        tokenizer: Its tokenizer.
        name: For tables.
        begin: Tokens that every text begins with.
        max_length: How many tokens the decoder may read.
        template: Of chats; ``None`` for a model that knows none.
        batch_tokens: How many tokens to score at a time, about.
        batch_size: How many texts to write at a time.
        fixed: Nobody trains the decoder, so a copy that writes faster may take its place.
    """

    decoder: Decoder
    tokenizer: Tokenizer
    name: str = ""
    begin: tuple[int, ...] = ()
    max_length: int = DEFAULT_LENGTH
    template: ChatTemplate | None = None
    batch_tokens: int = 4096
    batch_size: int = 16
    fixed: bool = False

    @cached_property
    def token_bytes(self) -> Tensor:
        """UTF-8 bytes of each token, ``(vocab,)`` int64."""
        return token_bytes(self.tokenizer)

    def encode_pair(self, context: str, continuation: str) -> Request:
        """The tokens of a context and its continuation.

        They are tokenised together, as they would stand in a text, and cut where the context ends.
        Blanks at the end of the context go to the continuation, for most tokenizers have them at
        the beginning of a word. Where a token would span the cut, the parts are tokenised apart.
        """
        kept = context.rstrip()
        continuation, context = context[len(kept) :] + continuation, kept
        both, before = self.tokenizer.encode_batch([context + continuation, context])
        after = both[len(before) :]
        if both[: len(before)] != before or not after:
            after = self.tokenizer.encode(continuation)
        return [*self.begin, *before] or [self.tokenizer.eos_id], after

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
        """Score continuations after their contexts, both as text."""
        return self.score_tokens([self.encode_pair(*pair) for pair in pairs])

    def score_tokens(self, requests: Sequence[Request]) -> list[Score]:
        """Score continuations, see :func:`smol.evaluation.likelihood.score`."""
        return score(self.decoder, requests, self.token_bytes, self.max_length, self.batch_tokens)

    def score_texts(self, texts: Sequence[str]) -> list[Score]:
        """Score whole texts, each from its beginning."""
        prefix = self.begin[-1] if self.begin else self.tokenizer.eos_id
        return self.score_whole(self.tokenizer.encode_batch(list(texts)), prefix)

    def score_whole(self, texts: Sequence[Sequence[int]], prefix: int) -> list[Score]:
        """Score all tokens of texts, the first of them after ``prefix``.

        A text longer than ``max_length`` is read in :func:`windows`.
        """
        pieces = [list(windows(tokens, prefix, self.max_length)) for tokens in texts]
        scores = iter(self.score_tokens([piece for several in pieces for piece in several]))
        return [_total([next(scores) for _ in several]) for several in pieces]

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """Continue prompts; one that leaves too little room to write loses its beginning."""
        room = max(1, self.max_length - sampling.max_new_tokens)
        prompts = [prompt[-room:] for prompt in prompts]
        return self._generator.generate(prompts, sampling, batch_size=self.batch_size)

    @cached_property
    def _generator(self) -> Generator:
        weight = self.decoder.head_weight
        copied = self.fixed and can_pack(weight.dtype, weight.device)
        dtype = weight.dtype if copied else None
        return Generator(self.decoder, self.tokenizer, self.max_length, dtype)


def _total(scores: Sequence[Score]) -> Score:
    return Score(
        math.fsum(score.log_prob for score in scores),
        sum(score.tokens for score in scores),
        sum(score.bytes for score in scores),
        all(score.greedy for score in scores),
    )


def windows(tokens: Sequence[int], prefix: int, max_length: int) -> Iterator[Request]:
    """Cut a text into requests that score each of its tokens once.

    Args:
        tokens: The text.
        prefix: The token before it.
        max_length: How many tokens a decoder reads at a time.

    Yields:
        Contexts and continuations. The last one's context is as long as ``max_length`` allows, that
        of those before it one token, as in EleutherAI's lm-evaluation-harness.
    """
    before = [prefix, *tokens]
    for start in range(0, len(tokens), max_length):
        end = min(start + max_length, len(tokens))
        yield before[max(0, end - max_length) : start + 1], tokens[start:end]


def load_language_model(
    folder: ModelFolder,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    max_length: int | None = None,
    batch_size: int = 16,
) -> LanguageModel:
    """Load a model with its tokenizer and, if there is one, its chat template.

    Args:
        folder: Where it is.
        device: Where to compute.
        dtype: Of the weights; ``None`` keeps what they are stored in.
        max_length: How many tokens the decoder may read; by default what it was trained with.
        batch_size: How many texts to write at a time.

    Raises:
        UserError: If a file is missing or does not fit the others.
    """
    from smol.checkpoints.huggingface import load_huggingface
    from smol.model.io import assemble_decoder, load_decoder

    tokenizer = load_tokenizer(folder.tokenizer)
    if folder.is_huggingface:
        config, rope, weights = load_huggingface(folder.weights)
        weights = {name: weight.to(device) for name, weight in weights.items()}
        decoder = assemble_decoder(config, rope, weights, device)
        described = json.loads((folder.weights / "config.json").read_text())
        context = described.get("max_position_embeddings")
        begin = tokenizer.backend.encode("").ids  # what it puts before a text
    else:
        decoder = load_decoder(folder.weights, device)
        context = int((decoder.rope.original_context or 0) * (decoder.rope.yarn_factor or 1))
        begin = [tokenizer.eos_id]  # as in training, where it stands between texts
    if tokenizer.vocab_size > decoder.config.vocab_size:
        raise UserError(
            f"the tokenizer {folder.tokenizer} has {tokenizer.vocab_size} tokens, the model "
            f"{folder.name} only {decoder.config.vocab_size} rows; name its own with --tokenizer"
        )
    if dtype is not None:  # but for the rotary embedding, which is float32 always
        weights = {name: weight.to(dtype) for name, weight in decoder.state_dict().items()}
        decoder = assemble_decoder(decoder.config, decoder.rope, weights, device)
    return LanguageModel(
        decoder.eval(),
        tokenizer,
        folder.name,
        tuple(begin),
        max_length or context or DEFAULT_LENGTH,
        load_chat_template(folder.template, tokenizer),
        batch_size=batch_size,
        fixed=True,
    )
