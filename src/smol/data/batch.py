"""What a training step is given."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

IGNORE = -100  # target of a token that is not trained on


@dataclass
class TokenBatch:
    """Rows of packed documents, and where they stand in the run.

    Attributes:
        tokens: Inputs, ``(rows, time)`` int64.
        targets: The token after each input, ``(rows, time)`` int64; ``IGNORE`` where not trained.
        documents: Number of the document within the row, ``(rows, time)`` int32.
        positions: Place of the token in its document, ``(rows, time)`` int64.
        sources: Index of each row's source, ``(rows,)`` int64.
        position: Tokens consumed by the run before this optimiser step.
        next_position: Tokens consumed after it.
        micro: Which of the step's micro-batches this is on this rank.
        accumulation: How many micro-batches of this rank make this optimiser step.
        step_tokens: Trained tokens in the whole global batch, or an upper bound of it.
        exact: Whether ``step_tokens`` is the exact number.
        stage: Name of the stage.
    """

    tokens: Tensor
    targets: Tensor
    documents: Tensor
    positions: Tensor
    sources: Tensor
    position: int = 0
    next_position: int = 0
    micro: int = 0
    accumulation: int = 1
    step_tokens: int = 0
    exact: bool = True
    stage: str = ""

    def pin_memory(self) -> "TokenBatch":
        """Put the tensors where a GPU copies from without waiting; called by torch's loader."""
        names = ("tokens", "targets", "documents", "positions", "sources")
        return replace(self, **{name: getattr(self, name).pin_memory() for name in names})


def token_tensors(
    blocks: np.ndarray, eos_id: int, document_masking: bool = True
) -> dict[str, Tensor]:
    """Inputs, targets, documents and positions of blocks of a token stream.

    A document begins at the end-of-text token before it, which so serves as its begin-of-text:
    every target, the first token of a document included, is predicted from its own document alone.

    Args:
        blocks: ``(rows, time + 1)``, any integer type.
        eos_id: The token that stands after each document.
        document_masking: Whether documents are kept apart; if not, each row counts as one.

    Returns:
        ``tokens``, ``targets``, ``documents``, ``positions`` as :class:`TokenBatch` describes them.
    """
    blocks = blocks.astype(np.int64)
    tokens, targets = blocks[:, :-1], blocks[:, 1:]
    begins = (tokens == eos_id) & document_masking
    time = np.arange(tokens.shape[1])
    last_begin = np.maximum.accumulate(np.where(begins, time, 0), axis=1)
    return {
        # Copies: tokens and targets overlap, and whoever masks a target must not change an input.
        "tokens": torch.from_numpy(tokens.copy()),
        "targets": torch.from_numpy(targets.copy()),
        "documents": torch.from_numpy(np.cumsum(begins, axis=1, dtype=np.int32)),
        "positions": torch.from_numpy(time - last_begin),
    }
