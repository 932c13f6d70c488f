"""Whether a tokenizer and a model fit."""

import math
from typing import Any

from smol.errors import UserError


def check_vocabulary(data: Any, rows: int) -> None:
    """Refuse a tokenizer with more tokens than the model has rows.

    Args:
        data: LightningDataModule; one without a tokenizer passes.
        rows: Of the model's embedding.

    Raises:
        UserError: there are tokens without a row.
    """
    if getattr(data, "tokenizer", None) is None:
        return
    size = data.tokenizer.vocab_size
    if size > rows:
        padded = math.ceil(size / 128) * 128
        raise UserError(
            f"the tokenizer {data.tokenizer_path} has {size} tokens, the model only {rows} rows; "
            f"use --model.decoder.vocab_size {padded}"
        )
