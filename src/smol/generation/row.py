"""One text that is being written."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from smol.generation.sampling import Sampling
from smol.generation.text import Decodes, TextStream

FinishReason = Literal["stop", "length"]


@dataclass
class Completion:
    """What was written after a prompt.

    Attributes:
        tokens: The new tokens; if a token ended the text, it is the last of them.
        text: Their text, without that token, and up to the stop string.
        log_probs: Of each token in nats, by the model itself: of the softmax over the whole
            vocabulary at temperature 1, before penalty and filters. The negative of what
            :func:`smol.losses.linear_cross_entropy` gives for the same tokens.
        finish_reason: ``stop`` by a token or a string; ``length`` by ``max_new_tokens`` or the
            generator's ``max_length``.
    """

    tokens: list[int]
    text: str
    log_probs: list[float]
    finish_reason: FinishReason


class Row:
    """A prompt and what was written after it so far.

    Args:
        prompt: At least one token.
        sampling: How it is continued.
        limit: Tokens of prompt and text at most; more than the prompt has.
        tokenizer: Decodes, and ends the text at its ``eos_id``; ``None`` does neither.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        limit: int,
        tokenizer: Decodes | None,
    ) -> None:
        self.prompt, self.sampling, self.limit = list(prompt), sampling, limit
        self.tokens: list[int] = []
        self.log_probs: list[float] = []
        self.finish_reason: FinishReason | None = None
        self._stop_ids = set(sampling.stop_ids)
        self._stream = None
        if tokenizer is not None:
            self._stop_ids.add(tokenizer.eos_id)
            self._stream = TextStream(tokenizer, sampling.stop)
        # A generator of its own, so that neither torch's state nor other rows matter.
        self._uniforms = np.random.default_rng(sampling.seed)

    @property
    def length(self) -> int:
        """Tokens of prompt and text."""
        return len(self.prompt) + len(self.tokens)

    @property
    def text(self) -> str:
        """What is certain of the text."""
        return self._stream.text if self._stream else ""

    def uniform(self) -> float:
        """The number in [0, 1) that the next token is drawn with; another one at each call."""
        return self._uniforms.random()

    def push(self, token: int, log_prob: float) -> None:
        """Add a token and see whether the text ends with it."""
        self.tokens.append(token)
        self.log_probs.append(log_prob)
        if token in self._stop_ids:
            self.finish_reason = "stop"
            self._finish_text()
        elif self._stream and self._stream.push(token):
            self.finish_reason = "stop"
        elif self.length >= self.limit:
            self.finish_reason = "length"
            self._finish_text()

    def _finish_text(self) -> None:
        if self._stream:
            self._stream.finish()

    def completion(self) -> Completion:
        """What was written."""
        return Completion(self.tokens, self.text, self.log_probs, self.finish_reason)
