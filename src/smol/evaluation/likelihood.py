"""Log-likelihoods of continuations: one scorer for all that compares texts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smol.errors import UserError
from smol.losses import linear_cross_entropy
from smol.model.attention import RowAttention

VOCAB_CHUNK = 16_384  # rows of the head whose logits exist at a time
Request = tuple[Sequence[int], Sequence[int]]
"""Tokens of a context and of a continuation, at least one each."""


@dataclass(frozen=True)
class Score:
    """How likely a continuation is after its context.

    Attributes:
        log_prob: Natural logarithm of the continuation's probability.
        tokens: Tokens of the continuation.
        bytes: UTF-8 bytes of its text; special tokens stand for none.
        greedy: Whether each token is the likeliest one at its place.
    """

    log_prob: float
    tokens: int
    bytes: int
    greedy: bool


@torch.no_grad()
def score(
    decoder: nn.Module,
    requests: Sequence[Request],
    token_bytes: Tensor,
    max_length: int | None = None,
    batch_tokens: int = 4096,
) -> list[Score]:
    """Score continuations under a decoder.

    Requests with the same context are computed together and the context once; all of them lie
    packed in one row, longest first, in which nothing sees another request. Only logits that score
    a token are computed, never those of the whole vocabulary at once.

    Args:
        decoder: Called as :class:`smol.model.Decoder` is, in the mode it is in. Where it is
            sharded, all ranks call together.
        requests: Contexts and continuations.
        token_bytes: Bytes of each token, ``(vocab,)`` int64, as
            :func:`smol.evaluation.bits_per_byte.token_bytes` gives them.
        max_length: How many tokens the decoder may read; a longer context loses its beginning.
            ``None`` for no limit.
        batch_tokens: How many tokens to compute at a time; more only for a longer request.

    Returns:
        One score per request, in their order.

    Raises:
        UserError: If a context or a continuation is empty, a continuation longer than
            ``max_length``, or a log-probability not a number.
    """
    scores: dict[int, Score] = {}
    device = next(decoder.parameters()).device
    sizes = token_bytes.cpu()
    for groups in _batches(_grouped(requests, max_length, batch_tokens), batch_tokens):
        layout = _Layout(groups, device)
        nll, best = decoder(
            layout.tokens,
            layout.positions,
            head=partial(_token_scores, places=layout.places, targets=layout.targets),
            attends=[layout.attention] * decoder.config.num_layers,
        )
        targets = layout.targets.cpu()
        parts = (-nll.double().cpu(), best.cpu() == targets, targets)
        if parts[0].isnan().any():  # of which a comparison would make a result
            raise UserError("log-probabilities are not numbers; expected a model without NaN")
        continuations = [pair for group in groups for pair in group.continuations]
        lengths = [len(tokens) for _, tokens in continuations]
        rows = zip(*(part.split(lengths) for part in parts), strict=True)
        for (index, _), (log_probs, hits, tokens) in zip(continuations, rows, strict=True):
            scores[index] = Score(
                float(log_probs.sum()), len(tokens), int(sizes[tokens].sum()), bool(hits.all())
            )
    return [scores[index] for index in range(len(requests))]


@dataclass
class _Group:
    """A context and the continuations of it, each with the number of its request."""

    context: tuple[int, ...]
    continuations: list[tuple[int, Sequence[int]]] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.context) + sum(len(tokens) - 1 for _, tokens in self.continuations)


def check_requests(requests: Sequence[Request], max_length: int | None) -> None:
    """See that requests can be scored.

    Raises:
        UserError: As :func:`score`, but for what the decoder computes.
    """
    for index, (context, continuation) in enumerate(requests):
        if not context or not continuation:
            empty = "continuation" if context else "context"
            raise UserError(f"request {index} has an empty {empty}, expected at least one token")
        if max_length is not None and len(continuation) > max_length:
            raise UserError(
                f"request {index} continues with {len(continuation)} tokens, expected at most "
                f"{max_length}, the longest text that the model reads"
            )


def _grouped(
    requests: Sequence[Request], max_length: int | None, batch_tokens: int
) -> list[_Group]:
    """Requests by context, longest first; what branches off is masked densely, so it stays short.

    A group ends when it is full, and before a continuation that is longer than the context, with
    which sharing would cost more than it saves.
    """
    check_requests(requests, max_length)
    groups: list[_Group] = []
    latest: dict[tuple[int, ...], _Group] = {}
    for index, (context, continuation) in enumerate(requests):
        if max_length is not None:  # the last token is not read
            context = context[-(max_length + 1 - len(continuation)) :]
        key = tuple(context)
        group, added = latest.get(key), len(continuation) - 1
        if group is None or added > len(key) or group.length + added > batch_tokens:
            groups.append(group := _Group(key))
            latest[key] = group
        group.continuations.append((index, continuation))
    return sorted(groups, key=lambda group: -group.length)


def _batches(groups: list[_Group], batch_tokens: int) -> Iterator[list[_Group]]:
    batch: list[_Group] = []
    length = 0
    for group in groups:
        if batch and length + group.length > batch_tokens:
            yield batch
            batch, length = [], 0
        batch.append(group)
        length += group.length
    if batch:
        yield batch


class _Layout:
    """Where the tokens of some groups lie in one row: each context, then its continuations.

    Attributes:
        tokens: ``(1, time)`` int64; of a continuation all but the last, which nothing follows.
        positions: ``(1, time)`` int64; every continuation counts on from its context.
        places: The place in the row from which each token of a continuation is predicted,
            ``(scored,)`` int64.
        targets: Those tokens, ``(scored,)`` int64.
        attention: Of this layout.
    """

    def __init__(self, groups: list[_Group], device: torch.device) -> None:
        tokens: list[int] = []
        positions: list[int] = []
        places: list[int] = []
        targets: list[int] = []
        for group in groups:
            start, end = len(group.context), len(tokens) + len(group.context)
            tokens += group.context
            positions += range(start)
            for _, continuation in group.continuations:
                places += [end - 1, *range(len(tokens), len(tokens) + len(continuation) - 1)]
                tokens += continuation[:-1]
                positions += range(start, start + len(continuation) - 1)
                targets += continuation
        self.tokens = torch.tensor([tokens], device=device)
        self.positions = torch.tensor([positions], device=device)
        self.places = torch.tensor(places, device=device)
        self.targets = torch.tensor(targets, device=device)
        self.attention = BranchingAttention(
            [(len(g.context), [len(c) - 1 for _, c in g.continuations]) for g in groups], device
        )


class BranchingAttention:
    """Causal attention over texts that share their beginning, laid out in one row.

    A group is a trunk and its branches, one after the other. The trunk sees itself, a branch sees
    the trunk and itself. To be given to the decoder for all of its layers.

    Args:
        groups: Length of the trunk, at least 1, and of its branches; they fill the row.
        device: Of the decoder.
    """

    def __init__(self, groups: list[tuple[int, list[int]]], device: torch.device) -> None:
        self.lengths: list[int] = []  # of trunks and of what branches off, in turn
        self.masks: list[Tensor | None] = []
        for trunk, branches in groups:
            if len(branches) == 1:  # then both are one text
                trunk, branches = trunk + branches[0], []
            self.lengths += [trunk, sum(branches)]
            self.masks.append(_branch_mask(trunk, branches).to(device) if any(branches) else None)

    @torch.compiler.disable  # lengths vary
    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pieces = zip(*(x.split(self.lengths, dim=1) for x in (q, k, v)), strict=True)
        outputs = []
        for mask in self.masks:
            trunk, (q, k, v) = next(pieces), next(pieces)
            outputs.append(RowAttention()(*trunk))
            if mask is not None:
                k, v = torch.cat([trunk[1], k], dim=1), torch.cat([trunk[2], v], dim=1)
                outputs.append(_masked_attention(q, k, v, mask))
        return torch.cat(outputs, dim=1)


def _branch_mask(trunk: int, branches: list[int]) -> Tensor:
    """What the tokens of the branches see, ``(sum(branches), trunk + sum(branches))`` bool."""
    branch = torch.arange(len(branches)).repeat_interleave(torch.tensor(branches))
    own = (branch.unsqueeze(1) == branch).tril()
    return F.pad(own, (trunk, 0), value=True)


def _masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    gqa = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)
    return out.transpose(1, 2)


def _token_scores(
    hidden: Tensor, weight: Tensor, places: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each target, and the likeliest token in its place."""
    hidden = hidden.flatten(0, 1)[places]
    nll, _ = linear_cross_entropy(hidden, weight, targets, ignore_index=None)
    top = hidden.new_full((len(hidden),), -torch.inf)
    best = torch.zeros_like(targets)
    for first in range(0, len(weight), VOCAB_CHUNK):
        logits = F.linear(hidden, weight[first : first + VOCAB_CHUNK].to(hidden.dtype))
        value, column = logits.max(dim=1)
        best = torch.where(value > top, column + first, best)
        top = torch.maximum(top, value)
    return nll, best
