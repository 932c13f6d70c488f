"""From documents to token streams that litdata reads, in parallel, resumable, the same every time.

One shard of the input is one unit of work: a worker tokenises it, writes its chunk files and then
its manifest. A run that was killed starts again at the shards without a manifest. Nothing written
depends on the number of workers, the clock or the place.

Documents follow each other in the chunks, each ended by the end-of-text token; no document crosses
from one chunk into another.
"""

import contextlib
import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smol.data import card as cards
from smol.data.card import SPLITS, Card, Chunk
from smol.data.chunks import DTYPES, ChunkWriter, litdata_index
from smol.data.documents import Documents, Files, Shard
from smol.data.tokenizer import Tokenizer, load_tokenizer
from smol.data.workers import run_shards
from smol.errors import UserError

BATCH_BYTES = 2**20


@dataclass(frozen=True)
class PrepareSettings:
    """What shapes the output, beside the documents and the tokenizer.

    Args:
        held_out: Share of the documents kept from training, chosen by the hash of their text:
            the same text falls on the same side wherever it stands.
        shuffle: Order the documents of a shard by a seeded hash instead of as they came.
        seed: Seed of that order.
        chunk_tokens: About how many tokens go into a chunk file. A chunk wants a hundred times
            the longest block that will be read from it.
        dtype: ``uint16``, ``int32``, or ``auto`` for the smaller one that fits the vocabulary.
        min_tokens: Leave out documents of fewer tokens, the end-of-text token included. With one
            more than a context, each document left has a target that the context did not reach.
    """

    held_out: float = 0.005
    shuffle: bool = True
    seed: int = 0
    chunk_tokens: int = 2**24
    dtype: str = "auto"
    min_tokens: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise UserError(f"held_out is {self.held_out}, expected a share from 0 to below 1.")
        if not 1 <= self.chunk_tokens <= 2**29:
            raise UserError(f"chunk_tokens is {self.chunk_tokens}, expected 1 to {2**29}.")
        if self.min_tokens < 0:
            raise UserError(f"min_tokens is {self.min_tokens}, expected 0 or more.")
        if self.dtype not in ("auto", *DTYPES):
            raise UserError(f"dtype is '{self.dtype}', expected auto, uint16 or int32.")

    def describe(self) -> dict[str, Any]:
        """Return what a card says of the settings: without ``min_tokens`` where it is off.

        So data prepared before there was such a setting keeps its identity.
        """
        described = asdict(self)
        if not self.min_tokens:
            del described["min_tokens"]
        return described

    def dtype_for(self, vocab_size: int) -> str:
        """Return the type of the token ids.

        Raises:
            UserError: The type asked for cannot hold the vocabulary.
        """
        if self.dtype == "auto":
            return "uint16" if vocab_size <= DTYPES["uint16"][1] else "int32"
        if vocab_size > DTYPES[self.dtype][1]:
            raise UserError(
                f"a vocabulary of {vocab_size} does not fit dtype {self.dtype} "
                f"(at most {DTYPES[self.dtype][1]}): use --dtype int32"
            )
        return self.dtype


def prepare(
    documents: Documents | str | Path | Iterable[str | Path],
    output: str | Path,
    tokenizer: str | Path,
    settings: PrepareSettings | None = None,
    *,
    name: str | None = None,
    eos_token: str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    log: Callable[[str], None] = print,
) -> Card:
    """Turn documents into ``output/train``, ``output/held_out`` and ``output/card.json``.

    Run again, it does nothing if the folder is complete, and goes on where it was interrupted if
    it is not.

    Args:
        documents: A source (``Files``, ``HubDataset``), or paths, globs or URLs of files.
        output: A local folder.
        tokenizer: What ``load_tokenizer`` takes.
        settings: What shapes the output.
        name: Name of the source; by default that of the folder.
        eos_token: Overrides the token that ends a document.
        workers: Processes; 0 works in this one; by default one per usable core.
        overwrite: Throw away what the folder holds and start afresh.
        log: Receives what is worth a line.

    Returns:
        The card, also where there was nothing to do.

    Raises:
        UserError: Anything wrong with the input, the tokenizer or the folder, in one line.
    """
    if "://" in str(output):
        raise UserError(f"output is {output}, expected a local folder: prepare there, then copy.")
    if isinstance(documents, str | Path):
        documents = [documents]
    if not hasattr(documents, "shards"):
        documents = Files(tuple(str(path) for path in documents))
    output, settings = Path(output), settings or PrepareSettings()
    loaded = load_tokenizer(tokenizer, eos_token)
    dtype = settings.dtype_for(loaded.vocab_size)
    source = {"source": type(documents).__name__, **documents.settings()}
    plan = {
        "settings": {**settings.describe(), "dtype": dtype, "documents": source},
        "tokenizer": loaded.describe(),
        "inputs": documents.inputs(),
    }
    output.mkdir(parents=True, exist_ok=True)
    with _locked(output):
        if overwrite:
            _remove(output)
        if (output / cards.NAME).exists():
            card = cards.read_card(output)
            _refuse_difference(output, asdict(card), plan)
            shutil.rmtree(_work(output), ignore_errors=True)
            log(f"{output}: already prepared, {card.tokens['train']:,} tokens; nothing to do.")
            return card
        _begin(output, plan)
        started = time.monotonic()
        shards = documents.shards()
        _run(_Worker(output, loaded, settings, dtype), shards, workers, log)
        card = _finish(output, name or output.name, plan, len(shards), dtype, log)
    log(
        f"{output}: {card.documents['train']:,} documents, {card.tokens['train']:,} tokens in "
        f"{len(card.chunks['train'])} chunks; held out: {card.documents['held_out']:,} documents, "
        f"{card.tokens['held_out']:,} tokens ({time.monotonic() - started:.1f} s)."
    )
    return card


def split_of(digest: bytes, held_out: float) -> str:
    """Return the split of the document whose text has this SHA-256 digest."""
    return "held_out" if int.from_bytes(digest[:8]) < held_out * 2**64 else "train"


def sample_texts(documents: Documents, held_out: float, most_bytes: int = 10**8) -> Iterator[str]:
    """Yield training documents from every shard, to train a tokenizer on.

    Args:
        documents: The source.
        held_out: As in ``PrepareSettings``: what is held out is not looked at.
        most_bytes: About how many UTF-8 bytes to yield in all.
    """
    shards = documents.shards()
    for shard in shards:
        left = most_bytes / len(shards)
        for text in itertools.chain.from_iterable(_batches(shard)):
            encoded = text.encode()
            if split_of(hashlib.sha256(encoded).digest(), held_out) == "train":
                yield text
                left -= len(encoded)
            if left <= 0:
                break


@dataclass
class _Worker:
    """Tokenises shards, in whatever process it is copied to."""

    output: Path
    tokenizer: Tokenizer
    settings: PrepareSettings
    dtype: str

    def run(self, number: int, shard: Shard, count: Callable[[int, int], None]) -> None:
        """Write the chunks of one shard, its held-out tokens, and last its manifest.

        Args:
            number: The shard's place among the shards.
            shard: What to read.
            count: Called with documents and bytes done, now and then.
        """
        settings = self.settings
        stem = f"chunk-{number:05d}"
        train = ChunkWriter(self.output / "train", stem, settings.chunk_tokens, settings.shuffle)
        held = []
        documents, size = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
        left_out = 0
        for texts in _batches(shard):
            batch_bytes = 0
            for text, ids in zip(texts, self.tokenizer.encode_batch(texts), strict=True):
                encoded = text.encode()
                tokens = np.array([*ids, self.tokenizer.eos_id], f"<{np.dtype(self.dtype).str[1:]}")
                batch_bytes += len(encoded)
                if len(tokens) < settings.min_tokens:
                    left_out += 1
                    continue
                digest = hashlib.sha256(encoded).digest()
                split = split_of(digest, settings.held_out)
                if split == "train":
                    train.add(tokens, hashlib.sha256(b"%d:" % settings.seed + digest).digest())
                else:
                    held.append(tokens)
                documents[split] += 1
                size[split] += len(encoded)
            count(len(texts), batch_bytes)
        chunks = [asdict(chunk) for chunk in train.close()]
        held_out = b"".join(tokens.tobytes() for tokens in held)
        cards.write_atomic(_work(self.output) / f"held_out-{number:05d}.bin", held_out)
        manifest = {
            "documents": documents, "left_out": left_out, "bytes": size, "chunks": chunks
        }  # fmt: skip
        cards.write_json(_manifest(self.output, number), manifest)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Group texts to about ``BATCH_BYTES``, with what UTF-8 cannot say replaced by U+FFFD."""
    batch, size = [], 0
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, as JSON's escapes can spell
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _run(
    worker: _Worker, shards: list[Shard], workers: int | None, log: Callable[[str], None]
) -> None:
    """Tokenise every shard that has no manifest yet."""
    output = worker.output
    left = [number for number in range(len(shards)) if not _shard_done(output, number)]
    if len(left) < len(shards):
        log(f"{output}: resuming, {len(shards) - len(left)} of {len(shards)} shards done.")
    jobs = {number: shards[number] for number in left}
    run_shards(worker.run, jobs, workers, output.name, log)


def _work(output: Path) -> Path:
    return output / ".work"


def _manifest(output: Path, number: int) -> Path:
    return _work(output) / f"shard-{number:05d}.json"


def _shard_done(output: Path, number: int) -> bool:
    path = _manifest(output, number)
    if not path.exists():
        return False
    train = output / "train"
    return all(
        (train / chunk["file"]).is_file()
        and (train / chunk["file"]).stat().st_size == chunk["bytes"]
        for chunk in json.loads(path.read_text())["chunks"]
    )


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Let one process at a time prepare a folder; the lock goes with the process that holds it."""
    import fcntl

    with open(output / ".lock", "a") as stream:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _remove(output: Path) -> None:
    (output / cards.NAME).unlink(missing_ok=True)
    for folder in (_work(output), *(output / split for split in SPLITS)):
        shutil.rmtree(folder, ignore_errors=True)


def _begin(output: Path, plan: dict[str, Any]) -> None:
    """Write down what is being made, or check that the interrupted run made the same."""
    path = _work(output) / "plan.json"
    if path.exists():
        _refuse_difference(output, json.loads(path.read_text()), plan)
    elif any((output / split).exists() for split in SPLITS):
        raise UserError(
            f"{output} holds data but neither a card nor an interrupted run: give another "
            "--output, or --overwrite to remove it."
        )
    for part in output.rglob("*.part"):
        part.unlink()
    path.parent.mkdir(exist_ok=True)
    cards.write_json(path, plan)


def _refuse_difference(output: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    for part in ("settings", "tokenizer", "inputs"):
        before, now = _flat(old[part]), _flat(new[part])
        for key in dict.fromkeys([*now, *before]):
            if before.get(key) != now.get(key):
                raise UserError(
                    f"{output} was prepared with {part} {key} = {before.get(key)}, now it is "
                    f"{now.get(key)}: give --overwrite to prepare it again, or another "
                    "--output."
                )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def _finish(
    output: Path, name: str, plan: dict[str, Any], shards: int, dtype: str, log: Callable
) -> Card:
    """Join the held-out tokens, write both indexes, then the card, then clear the work folder."""
    manifests = [json.loads(_manifest(output, number).read_text()) for number in range(shards)]
    count = {s: sum(manifest["documents"][s] for manifest in manifests) for s in SPLITS}
    size = {s: sum(manifest["bytes"][s] for manifest in manifests) for s in SPLITS}
    left_out = sum(manifest.get("left_out", 0) for manifest in manifests)
    min_tokens = plan["settings"].get("min_tokens", 0)
    if min_tokens:
        log(f"{output}: left out {left_out:,} documents of fewer than {min_tokens:,} tokens.")
    if count["train"] == 0:
        _remove(output)
        short = f", {left_out:,} are shorter than min_tokens {min_tokens}" if left_out else ""
        raise UserError(f"{output}: no documents for training in the input ({count} found{short}).")
    if count["held_out"] == 0 and plan["settings"]["held_out"]:
        log(f"{output}: no document was held out, {sum(count.values())} are too few.")
    writer = ChunkWriter(output / "held_out", "chunk", plan["settings"]["chunk_tokens"], False)
    eos_id = plan["tokenizer"]["eos_id"]
    for number in range(shards):
        tokens = np.fromfile(_work(output) / f"held_out-{number:05d}.bin", np.dtype(dtype))
        ends = np.flatnonzero(tokens == eos_id) + 1
        for document in np.split(tokens, ends[:-1]) if len(ends) else ():
            writer.add(document)
    chunks = {
        "train": [Chunk(**chunk) for manifest in manifests for chunk in manifest["chunks"]],
        "held_out": writer.close(),
    }
    digest = cards.identity(chunks, plan["tokenizer"], plan["settings"])
    for split in SPLITS:
        cards.write_json(output / split / "index.json", litdata_index(chunks[split], dtype, digest))
    card = Card(
        name=name,
        documents=count,
        tokens={split: sum(chunk.tokens for chunk in chunks[split]) for split in SPLITS},
        bytes=size,
        tokenizer=plan["tokenizer"],
        dtype=dtype,
        settings=plan["settings"],
        inputs=plan["inputs"],
        chunks=chunks,
        digest=digest,
    )
    cards.write_card(output, card)
    shutil.rmtree(_work(output))
    return card
