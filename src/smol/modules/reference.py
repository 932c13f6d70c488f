"""The reference of a preference run: the weights that it begins with.

Their log-probabilities are computed before the first step and kept on disk, or computed anew for
each batch by a second decoder. A checkpoint names the weights by their digest, so that a restart
goes on with the same ones and not with those that it has trained.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from smol.checkpoints.weights import copy_weights
from smol.errors import UserError, one_line
from smol.parallel.fsdp import local_part

FORMAT = 1  # of the cache; part of its key


@dataclass(frozen=True)
class ReferenceWeights:
    """Which weights are the reference.

    Attributes:
        digest: SHA-256 of the parameters.
        folder: Where they can be read again; ``None`` if nowhere.
    """

    digest: str
    folder: str | None

    @classmethod
    def of(cls, decoder: nn.Module, folder: str | Path | None) -> "ReferenceWeights":
        """Those that a decoder holds now; all ranks act together."""
        digest = hashlib.sha256()
        for name, parameter in sorted(decoder.named_parameters()):
            value = parameter.detach()
            value = value.full_tensor() if isinstance(value, DTensor) else value
            digest.update(f"{name} {tuple(value.shape)} {value.dtype} ".encode())
            digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return cls(digest.hexdigest(), None if folder is None else str(folder))

    @contextmanager
    def inside(self, decoder: nn.Module) -> Iterator[None]:
        """Lend them to a decoder, which has its own weights back afterwards.

        Raises:
            UserError: they are not to be found any more, or have changed.
        """
        if ReferenceWeights.of(decoder, None).digest == self.digest:
            yield
            return
        remedy = "restore them, or give their folder: --model.reference_weights FOLDER"
        if self.folder is None or not Path(self.folder).is_dir():
            where = self.folder or "nowhere, since the run began with random ones"
            raise UserError(f"the weights of the reference are needed, but were {where}; {remedy}")
        with lent(decoder, self.folder):
            if ReferenceWeights.of(decoder, None).digest != self.digest:
                raise UserError(
                    f"{self.folder} holds other weights than the reference of this run; {remedy}"
                )
            yield


@contextmanager
def lent(decoder: nn.Module, folder: str | Path) -> Iterator[None]:
    """Put the weights of a folder into a decoder for a while; its own wait on the host."""
    own = [local_part(p).to("cpu", copy=True) for p in decoder.parameters()]
    try:
        copy_weights(decoder, folder)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(decoder.parameters(), own, strict=True):
                local_part(parameter).copy_(value)


def cached_log_probs(
    folder: Path,
    key: dict[str, Any],
    used: Tensor,
    compute: Callable[[], Tensor],
    strategy: Any,
) -> Tensor:
    """Log-probabilities of the answers of pairs under the reference, from disk if possible.

    Args:
        folder: Of the cache. The first process reads and writes it.
        key: All they depend on, as JSON.
        used: Whether a pair is wanted, ``(pairs,)`` bool.
        compute: Called on all ranks if they are not there.
        strategy: Of the trainer; tells the other ranks.

    Returns:
        ``(pairs, 2)`` float32, the chosen answer first.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    text = json.dumps({"format": FORMAT, **key}, sort_keys=True)
    file = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
    table = None
    if strategy.is_global_zero and file.is_file():
        try:
            table = load_file(file).get("log_probs")
        except (SafetensorError, OSError):
            rank_zero_info(f"reference: {file} is damaged and is made anew")
    table = strategy.broadcast(table)
    size = int(used.sum())
    if table is not None and table.shape == (len(used), 2) and table[used].isfinite().all():
        rank_zero_info(f"reference: log-probabilities of {size:,} pairs from {file}")
        return table
    rank_zero_info(f"reference: computing the log-probabilities of {size:,} pairs")
    started = time.monotonic()
    table = compute().cpu()
    kept = f"kept in {file}"
    if strategy.is_global_zero:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(f".{os.getpid()}.part")
            save_file({"log_probs": table}, part, metadata={"key": text})
            os.replace(part, file)
        except (SafetensorError, OSError) as error:  # they are in memory all the same
            kept = f"not kept in {folder}: {one_line(error)}"
    rank_zero_info(f"reference: took {time.monotonic() - started:.0f} s, {kept}")
    return table


def gather_log_probs(
    parts: Iterable[tuple[Tensor, Tensor]], used: Tensor, add_up: Callable[[Tensor], Tensor]
) -> Tensor:
    """Put together what the ranks have computed.

    Args:
        parts: Numbers of pairs, ``(n,)`` int64, and the log-probabilities of their answers,
            ``(n, 2)``, on this rank.
        used: Whether a pair is wanted, ``(pairs,)`` bool.
        add_up: Sum over the ranks.

    Returns:
        ``(pairs, 2)`` float32, not a number where a pair is not used.

    Raises:
        UserError: a pair was left out or came twice, or a log-probability is not finite.
    """
    table = used.new_zeros(len(used), 2, dtype=torch.float32)
    times = used.new_zeros(len(used), dtype=torch.int64)
    for numbers, log_probs in parts:
        table.index_add_(0, numbers, log_probs.float())
        times.index_add_(0, numbers, torch.ones_like(numbers))
    table, times = add_up(table), add_up(times)
    wrong = (times != used) | ~table.isfinite().all(1)
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise UserError(
            f"reference: {int(wrong.sum())} of {int(used.sum())} pairs have no log-probabilities, "
            f"the first is number {first}: seen {int(times[first])} times with "
            f"{table[first].tolist()}, expected {int(used[first])} times with finite ones"
        )
    table[~used] = torch.nan
    return table


def cache_key(weights: ReferenceWeights, module: Any, data_digest: str) -> dict[str, Any]:
    """All that the log-probabilities of a reference depend on.

    Args:
        weights: The reference.
        module: A :class:`~smol.modules.base.DecoderModule` with its decoder.
        data_digest: Of the tokens of all pairs, of what is trained on in them, and of their order.
    """
    return {
        "weights": weights.digest,
        "data": data_digest,
        "precision": str(module.trainer.precision),
        "attention": module.attention,
        "decoder": asdict(module.decoder_config),
        "rope": asdict(module.decoder.rope),
    }
