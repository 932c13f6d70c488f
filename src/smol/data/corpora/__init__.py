"""The embedded corpora: text that any Python environment holds or can compute."""

import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

# A module of code is long, so its share is larger: fewer than a dozen would say little.
HELD_OUT = {"prose": 0.03, "code": 0.05, "maths": 0.02}
MATHS_PROBLEMS = 20_000


def ensure_embedded(
    data_dir: str | Path,
    vocab_size: int = 4096,
    workers: int = 2,
    log: Callable[[str], None] = print,
) -> dict[str, Path]:
    """Prepare what is missing of the embedded corpora and of their tokenizer.

    Args:
        data_dir: Receives ``tokenizer/``, ``raw/`` (the documents as jsonl, to look at) and one
            prepared source per corpus.
        vocab_size: Of the tokenizer that is trained when there is none; a multiple of 128.
        workers: Processes.
        log: Receives what is worth a line; nothing when all is there.

    Returns:
        The prepared folder of each corpus by its name: prose, code, maths.

    Raises:
        UserError: The tokenizer that is there has another vocabulary size.
    """
    from smol.data.card import NAME
    from smol.data.documents import Files
    from smol.data.prepare import PrepareSettings, prepare
    from smol.data.tokenizer import load_tokenizer
    from smol.errors import UserError

    data_dir = Path(data_dir)
    folders = {name: data_dir / name for name in HELD_OUT}
    tokenizer = data_dir / "tokenizer"
    if not (tokenizer / "tokenizer.json").exists():
        log(f"{data_dir}: training a tokenizer of {vocab_size:,} tokens on the embedded corpora.")
        raw = [_raw(data_dir, name, workers) for name in HELD_OUT]
        _train_tokenizer(raw, tokenizer, vocab_size)
    loaded = load_tokenizer(tokenizer)
    if loaded.vocab_size != vocab_size:
        raise UserError(
            f"{tokenizer} has {loaded.vocab_size} tokens, expected {vocab_size}: set the "
            f"vocabulary to {loaded.vocab_size}, or remove {data_dir} to make it anew."
        )
    for name, folder in folders.items():
        if not (folder / NAME).exists():
            prepare(
                Files((str(_raw(data_dir, name, workers)),), shard_bytes=3 * 2**19),
                folder,
                tokenizer,
                PrepareSettings(held_out=HELD_OUT[name], chunk_tokens=450_000),
                workers=workers,
                log=log,
            )
    return folders


def documents(name: str, map_files: Callable = map) -> Iterable[str]:
    """Return the documents of a corpus by its name.

    Args:
        name: ``prose``, ``code`` or ``maths``.
        map_files: Like the built-in ``map``, for work on many files.
    """
    from smol.data.corpora import code, maths, prose

    if name == "prose":
        return prose.documents(map_files)
    return code.documents() if name == "code" else maths.documents(MATHS_PROBLEMS)


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(max(1, workers), get_context("spawn"))


def _raw(data_dir: Path, name: str, workers: int) -> Path:
    """Return the corpus as a jsonl file, written when it is missing."""
    path = data_dir / "raw" / f"{name}.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        with _pool(workers) as pool, open(part, "w", encoding="utf-8") as stream:
            for text in documents(name, partial(pool.map, chunksize=32)):
                stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        os.replace(part, path)
    return path


def _train_tokenizer(raw: list[Path], folder: Path, vocab_size: int) -> None:
    # In a process of its own: the library's threads and a later fork do not go together.
    with _pool(1) as pool:
        pool.submit(_train_on, raw, folder, vocab_size).result()


def _train_on(raw: list[Path], folder: Path, vocab_size: int) -> None:
    from smol.data.documents import Files
    from smol.data.prepare import sample_texts
    from smol.data.tokenizer import train_tokenizer

    texts = (
        sample_texts(Files((str(path),)), held_out)
        for path, held_out in zip(raw, HELD_OUT.values(), strict=True)
    )
    train_tokenizer(chain.from_iterable(texts), folder, vocab_size)
