"""Writes texts with a decoder: many at once, or one piece by piece."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from smol.errors import UserError
from smol.generation.cache import KVCache
from smol.generation.choice import choose, penalize_repetition
from smol.generation.inference_copy import inference_copy, linear
from smol.generation.row import Completion, Row
from smol.generation.sampling import Sampling
from smol.generation.text import Decodes
from smol.model import Decoder

PROMPT_TOKENS = 8192
"""Tokens of new prompts, with their padding, in one forward pass; a longer one goes alone."""
CACHE_STEP = 256
"""A cache has a multiple of so many positions, so that the next call may find it large enough."""


class Generator:
    """A decoder, its tokenizer and a cache of keys and values that is used again and again.

    A text depends on its own prompt and settings, not on what else is in the batch or where it
    stands there. (Products of matrices round differently in batches of different sizes; that can
    tip a choice between tokens whose probabilities agree to six digits.) Nothing is drawn from
    torch's random state.

    A sharded decoder is to be called by all ranks together, each with prompts of its own: forward
    passes go on until the last rank is done. Module modes are put back as they were.

    Args:
        decoder: Its current weights are used in each call, so one that is trained may be given.
        tokenizer: Decodes, and ends texts at its ``eos_id``. ``None`` leaves texts empty.
        max_length: Tokens of prompt and text at most; ``None`` sets no limit.
        dtype: Work with a copy of the decoder in this dtype, which is faster and no longer changes
            with the decoder. ``None`` uses the decoder as it is.

    Raises:
        UserError: If a copy is asked for of a decoder that is sharded.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Decodes | None = None,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.decoder = decoder if dtype is None else inference_copy(decoder, dtype)
        self.tokenizer, self.max_length = tokenizer, max_length
        self._fixed = dtype is not None
        self._cache: KVCache | None = None
        # The tokens in the first row of the cache, and the text they were computed for.
        self._held: tuple[Row | None, list[int]] = None, []

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | Sequence[Sampling] = Sampling(),  # noqa: B008 (it is frozen)
        batch_size: int = 16,
    ) -> list[Completion]:
        """Continue prompts of any lengths; a row that is done makes room for the next prompt.

        Args:
            prompts: Each at least one token.
            sampling: For all of them, or one for each. Equal prompts with equal seeds give equal
                texts.
            batch_size: Rows of a forward pass at most.

        Returns:
            One completion for each prompt, in their order.

        Raises:
            UserError: If a prompt is empty, too long or holds no token, or the numbers do not fit.
        """
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        if len(samplings) != len(prompts):
            raise UserError(f"{len(prompts)} prompts have {len(samplings)} samplings.")
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}, expected at least 1.")
        rows = [self._row(*pair) for pair in zip(prompts, samplings, strict=True)]
        capacity = max(1, min(batch_size, len(rows)))
        self._reserve(capacity, max((row.limit for row in rows), default=1))
        # Neighbours of about the same length need little padding.
        waiting = deque(sorted(rows, key=lambda row: len(row.prompt)))
        active: list[Row] = []
        sharded = any(isinstance(weight, DTensor) for weight in self.decoder.parameters())
        with self._passes():
            self._cache.clear()
            while _anybody(bool(active or waiting), sharded, self._device):
                if len(active) < capacity and waiting:
                    self._begin(active, waiting, capacity)
                elif active:
                    self._advance(active)
                else:  # other ranks need this one for their forward pass
                    self._forward(torch.zeros(1, 1, dtype=torch.long), [0])
                self._release(active)
        return [row.completion() for row in rows]

    def stream(self, prompt: Sequence[int], sampling: Sampling = Sampling()) -> "Stream":  # noqa: B008
        """Continue one prompt, piece by piece.

        Where the decoder is a copy (``dtype``), the tokens that a prompt shares with the one before
        and its text are not computed again.

        Returns:
            An iterable of pieces of text; its ``completion`` is there when it ends.

        Raises:
            UserError: As :meth:`generate`.
        """
        return Stream(self, self._row(prompt, sampling))

    def _row(self, prompt: Sequence[int], sampling: Sampling) -> Row:
        prompt = [int(token) for token in prompt]
        vocab = self.decoder.config.vocab_size
        if not prompt:
            raise UserError("a prompt has no tokens, expected at least one to continue.")
        if strangers := [token for token in prompt if not 0 <= token < vocab]:
            raise UserError(
                f"a prompt holds token {strangers[0]}, the decoder knows 0 to {vocab - 1}; "
                "is it another model's tokenizer?"
            )
        if sampling.stop and self.tokenizer is None:
            raise UserError("stop strings need a tokenizer, there is none; expected stop_ids.")
        limit = len(prompt) + sampling.max_new_tokens
        if self.max_length is not None:
            if len(prompt) >= self.max_length:
                raise UserError(
                    f"a prompt of {len(prompt)} tokens leaves no room to write; expected fewer "
                    f"than {self.max_length}, the greatest length."
                )
            limit = min(limit, self.max_length)
        return Row(prompt, sampling, limit, self.tokenizer)

    def _reserve(self, rows: int, length: int) -> bool:
        """Have a cache of this size at least; return whether it is a new one."""
        self._held = None, []
        cache = self._cache
        if cache is not None and cache.rows >= rows and cache.length >= length:
            return False
        length = -(-length // CACHE_STEP) * CACHE_STEP
        if self.max_length is not None:
            length = min(length, self.max_length)
        self._cache = cache = None  # its memory is free before more is taken
        self._cache = KVCache(self.decoder.config.num_layers, rows, length)
        return True

    @contextmanager
    def _passes(self) -> Iterator[None]:
        """Forward passes; one that fails leaves no cache behind that is half there."""
        try:
            with _inference(self.decoder, self._fixed):
                yield
        except BaseException:
            self._cache = None
            raise

    def _begin(self, active: list[Row], waiting: deque[Row], capacity: int) -> None:
        """Take up prompts behind the active rows and choose the first token of each."""
        new = [waiting.popleft()]
        while waiting and len(active) + len(new) < capacity:
            if (len(new) + 1) * len(waiting[0].prompt) > PROMPT_TOKENS:
                break
            new.append(waiting.popleft())
        longest = max(len(row.prompt) for row in new)
        tokens = torch.zeros(len(new), longest, dtype=torch.long)
        for line, row in zip(tokens, new, strict=True):
            line[: len(row.prompt)] = torch.tensor(row.prompt)
        last = torch.tensor([len(row.prompt) - 1 for row in new])
        self._choose(new, self._forward(tokens, [0] * len(new), len(active), last))
        active += new

    def _advance(self, active: list[Row]) -> None:
        """Choose the next token of each active row."""
        tokens = torch.tensor([row.tokens[-1:] for row in active])
        self._choose(active, self._forward(tokens, [row.length - 1 for row in active]))

    def _release(self, active: list[Row]) -> None:
        """Drop rows that are done; the last one fills the gap, so that rows lie side by side."""
        for index in reversed(range(len(active))):
            if active[index].finish_reason is not None:
                last = active.pop()
                if index < len(active):
                    self._cache.move(len(active), index, last.length)
                    active[index] = last

    def _forward(
        self, tokens: Tensor, starts: list[int], first_row: int = 0, last: Tensor | None = None
    ) -> Tensor:
        """Logits of the token that follows the last one of each row.

        Args:
            tokens: ``(rows, time)``.
            starts: Position of the first token of each row.
            first_row: Where the rows lie in the cache.
            last: Index of the last token of each row, ``(rows,)``; ``None`` for the last column.

        Returns:
            ``(rows, vocab)`` float32.
        """
        device, time = self._device, tokens.shape[1]

        def head(hidden: Tensor, weight: Tensor) -> Tensor:
            rows = torch.arange(len(hidden), device=device)
            hidden = hidden[rows, time - 1 if last is None else last.to(device)]
            return linear(hidden, weight.to(hidden.dtype)).float()

        positions = torch.tensor(starts).unsqueeze(1) + torch.arange(time)
        attends = self._cache.place(first_row, starts, time)
        return self.decoder(
            tokens.to(device), positions=positions.to(device), head=head, attends=attends
        )

    @property
    def _device(self) -> torch.device:
        return self.decoder.rotary.inv_freq.device

    def _choose(self, rows: list[Row], logits: Tensor) -> None:
        penalties = [row.sampling.repetition_penalty for row in rows]
        penalized = logits
        if any(penalty != 1.0 for penalty in penalties):
            penalized = logits.clone()
            for line, row, penalty in zip(penalized, rows, penalties, strict=True):
                penalize_repetition(line, row.prompt + row.tokens, penalty)
        uniforms = [row.uniform() for row in rows]
        tokens = choose(penalized, [row.sampling for row in rows], uniforms)
        log_probs = -F.cross_entropy(logits, tokens, reduction="none")
        for row, token, log_prob in zip(rows, tokens.tolist(), log_probs.tolist(), strict=True):
            row.push(token, log_prob)

    def _step(self, row: Row) -> None:
        """Choose the next token of a row that is alone."""
        known = row.prompt + row.tokens
        owner, cached = self._held
        if owner is not row and not self._fixed:
            cached = []
        shared = min(_common(known, cached), len(known) - 1)
        room = self._cache.length if self._cache else 0
        # Twice what was too small, so that a growing conversation seldom begins anew.
        if self._reserve(1, row.limit if row.limit <= room else max(row.limit, 2 * room)):
            shared = 0
        with self._passes():
            self._choose([row], self._forward(torch.tensor([known[shared:]]), [shared]))
        self._held = row, known


class Stream:
    """A text that is being written: iterate over it for its pieces."""

    def __init__(self, generator: Generator, row: Row) -> None:
        self._generator, self._row = generator, row

    def __iter__(self) -> Iterator[str]:
        row, written = self._row, 0
        while row.finish_reason is None:
            self._generator._step(row)
            if piece := row.text[written:]:
                written += len(piece)
                yield piece

    @property
    def completion(self) -> Completion:
        """What was written so far; whole when the iteration has ended."""
        return self._row.completion()


@contextmanager
def _inference(decoder: nn.Module, fixed: bool) -> Iterator[None]:
    """Neither gradients nor dropout, and nothing compiled for lengths that differ at each call.

    The weights of a ``fixed`` decoder are never trained, so it can do without all of autograd.
    """
    modules = list(decoder.modules())
    training = [module for module in modules if module.training]
    compiled = any(module._compiled_call_impl is not None for module in modules)
    for module in training:
        module.training = False
    try:
        # Only where it matters: asking for the stance imports the compiler, which takes seconds.
        eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
        with torch.inference_mode() if fixed else torch.no_grad(), eager:
            yield
    finally:
        for module in training:
            module.training = True


def _anybody(busy: bool, sharded: bool, device: torch.device) -> bool:
    """Whether this rank, or any that shares the decoder, has something to do."""
    if not sharded:
        return busy
    flag = torch.tensor(float(busy), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens two texts begin with in common."""
    size = min(len(one), len(other))
    if one[:size] == other[:size]:
        return size
    return next(i for i in range(size) if one[i] != other[i])
