"""The embedded corpora: text that any Python environment holds or can compute.

There are three: prose, code and maths. Beside each, ``long_N/prose`` and so on hold its documents
of more than N tokens, for stages with a longer context; since problems are short, those of
``long_N/maths`` are generated for the purpose. What is held out of a corpus is held out of its long
documents, too, whatever N: the split goes by the text.
"""

import json
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

from smol.paths import resolve

# A module of code is long, so its share is larger: fewer than a dozen would say little.
HELD_OUT = {"prose": 0.03, "code": 0.05, "maths": 0.02}
HELD_OUT_LONG_MATHS = 0.05
LONG = re.compile(rf"long_(\d+)/({'|'.join(HELD_OUT)})")
MATHS_PROBLEMS, LONG_MATHS = 20_000, 300  # documents


def ensure_embedded(
    data_dir: str | Path,
    vocab_size: int = 4096,
    workers: int = 2,
    log: Callable[[str], None] = print,
    paths: Iterable[str | Path] | None = None,
) -> dict[str, Path]:
    """Prepare what is missing of the embedded corpora and of their tokenizer.

    Args:
        data_dir: Receives ``tokenizer/``, ``raw/`` (the documents as jsonl, to look at) and one
            prepared source per corpus.
        vocab_size: Of the tokenizer that is trained when there is none; a multiple of 128.
        workers: Processes.
        log: Receives what is worth a line; nothing when all is there.
        paths: Prepare only the corpora that belong at these paths, ``data_dir/long_256/prose`` for
            one, and pass over other paths; by default ``prose``, ``code`` and ``maths``.

    Returns:
        The prepared folder of each corpus by its name.

    Raises:
        UserError: The tokenizer that is there has another vocabulary size.
    """
    from smol.data.card import NAME
    from smol.data.documents import Files
    from smol.data.prepare import PrepareSettings, prepare
    from smol.data.tokenizer import load_tokenizer
    from smol.errors import UserError

    data_dir = Path(data_dir)
    names = HELD_OUT if paths is None else filter(None, (_name(data_dir, path) for path in paths))
    folders = {name: data_dir / name for name in names}
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
            raw, held_out, min_tokens = _recipe(name)
            prepare(
                Files((str(_raw(data_dir, raw, workers)),), shard_bytes=3 * 2**19),
                folder,
                tokenizer,
                PrepareSettings(held_out, chunk_tokens=450_000, min_tokens=min_tokens),
                name=name,
                workers=workers,
                log=log,
            )
    return folders


def documents(name: str, map_files: Callable = map) -> Iterable[str]:
    """Return the documents of a corpus by its name.

    Args:
        name: ``prose``, ``code``, ``maths`` or ``long_maths``.
        map_files: Like the built-in ``map``, for work on many files.
    """
    from smol.data.corpora import code, long_maths, maths, prose

    match name:
        case "prose":
            return prose.documents(map_files)
        case "code":
            return code.documents()
        case "maths":
            return maths.documents(MATHS_PROBLEMS)
        case "long_maths":
            return long_maths.documents(LONG_MATHS, after=MATHS_PROBLEMS)
    raise ValueError(f"no corpus '{name}'")


def _name(data_dir: Path, path: str | Path) -> str | None:
    """Return the name of the corpus that belongs at a path, if one does."""
    path, data_dir = Path(resolve(path)), Path(resolve(data_dir))
    name = path.relative_to(data_dir).as_posix() if path.is_relative_to(data_dir) else ""
    return name if name in HELD_OUT or LONG.fullmatch(name) else None


def _recipe(name: str) -> tuple[str, float, int]:
    """Return of a corpus where its documents come from, the share held out, and ``min_tokens``."""
    long = LONG.fullmatch(name)
    if long is None:
        return name, HELD_OUT[name], 0
    more_than, kind = int(long[1]), long[2]
    if kind == "maths":
        return "long_maths", HELD_OUT_LONG_MATHS, more_than + 1
    return kind, HELD_OUT[kind], more_than + 1


def _pool(workers: int) -> ProcessPoolExecutor:
    from smol.data.workers import leave_with_parent

    return ProcessPoolExecutor(max(1, workers), get_context("spawn"), leave_with_parent)


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
