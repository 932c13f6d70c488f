"""Prepare a source: documents to litdata token streams, with a held-out split and a card.

examples:
  python src/prepare.py --documents 'text/*.jsonl.gz' --output data/text --vocab_size 4096
  python src/prepare.py --config configs/data/fineweb_edu.yaml --workers 8
  python src/prepare.py --embedded data/embedded
  python src/prepare.py --verify data/embedded/prose
"""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from smol.cli import user_message
from smol.errors import UserError, nearest
from smol.paths import find, resolve

TOKENIZER = "data/tokenizer"


class Parser(argparse.ArgumentParser):
    """Tells a wrong flag in one line, with the nearest known one."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print below its usage."""
        hint = ""
        if message.startswith("unrecognized"):
            flag = message.split(": ", 1)[1].split()[0].split("=")[0]
            hint = nearest(flag, self._option_string_actions)
        raise UserError(f"{message}.{hint}")


def build_parser() -> Parser:
    """Return the parser of the command line; a ``--config`` file holds the same names as keys."""
    parser = Parser(
        prog="prepare.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", help="YAML whose keys are the flags below; a flag wins over it")
    add("--embedded", metavar="FOLDER", help="prepare the embedded corpora, and nothing else")
    add(
        "--verify",
        nargs="+",
        metavar="FOLDER",
        help="read all chunks of prepared sources and compare them with their cards, no more",
    )
    group = parser.add_argument_group("what to read")
    add = group.add_argument
    add(
        "--documents",
        nargs="+",
        default=[],
        metavar="PATH",
        help="files, globs, folders or fsspec URLs of jsonl, parquet or text",
    )
    add("--format", default="auto", help="jsonl, parquet or text; auto goes by the suffix")
    add("--field", default="text", help="the text's name in a record (default: text)")
    add("--separator", help="cuts a text file into documents; else a file is one document")
    add("--hub", metavar="NAME", help="a hub dataset, or a folder datasets reads, instead of files")
    add("--hub_config", metavar="NAME", help="its configuration")
    add("--hub_split", default="train", metavar="NAME", help="its split (default: train)")
    add("--hub_revision", metavar="NAME", help="its commit or tag")
    add(
        "--shard_bytes",
        type=int,
        default=64 * 2**20,
        metavar="N",
        help="input per unit of work (default: 64 MiB)",
    )
    group = parser.add_argument_group("what to write")
    add = group.add_argument
    add("--output", metavar="FOLDER", help="the folder of the prepared source")
    add("--name", help="name of the source (default: the folder's)")
    add(
        "--tokenizer",
        default=TOKENIZER,
        metavar="PATH",
        help=f"a folder with tokenizer.json, or a hub name (default: {TOKENIZER})",
    )
    add(
        "--vocab_size",
        type=int,
        metavar="N",
        help="train the tokenizer on these documents where its folder has none; multiple of 128",
    )
    add("--eos_token", metavar="TOKEN", help="ends a document (default: what the tokenizer names)")
    add(
        "--held_out",
        type=float,
        default=0.005,
        metavar="SHARE",
        help="share of documents kept from training, by the hash of the text (default: 0.005)",
    )
    add(
        "--min_tokens",
        type=int,
        default=0,
        metavar="N",
        help="leave out documents of fewer tokens, the end-of-text token included (default: 0)",
    )
    add(
        "--shuffle",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="order documents within a shard by a seeded hash",
    )
    add("--seed", type=int, default=0, metavar="N", help="of that order (default: 0)")
    add(
        "--chunk_tokens",
        type=int,
        default=2**24,
        metavar="N",
        help="tokens per chunk file, about (default: 2**24)",
    )
    add("--dtype", default="auto", help="uint16, int32, or auto for the smaller that fits")
    add("--workers", type=int, metavar="N", help="processes (default: one per core)")
    add("--overwrite", action="store_true", help="start afresh, removing what the output holds")
    return parser


def flags_of(config: str) -> list[str]:
    """Return the keys of a YAML file as flags, to stand before those of the command line.

    Raises:
        UserError: The file is missing or is not a mapping.
    """
    import yaml

    config = find(config)
    if not Path(config).is_file():
        raise UserError(f"{config}: no such file.")
    try:
        content = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{config}: not YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(content, dict):
        raise UserError(f"{config}: expected keys and values, such as 'output: data/text'.")
    flags = []
    for key, value in content.items():
        if isinstance(value, dict):
            raise UserError(f"{config}: {key} is a mapping, expected a value; is it of train.py?")
        if isinstance(value, bool):
            flags += [f"--{key}"] if value else [f"--no-{key}"] * (key == "shuffle")
        elif value is not None:
            values = value if isinstance(value, list) else [value]
            flags += [f"--{key}", *map(str, values)]
    return flags


def verify(folders: list[str]) -> int:
    """Tell of each prepared source whether it is whole, and each thing that is wrong with it.

    Returns:
        The exit status: 0 if all are whole, else 1.
    """
    from smol.data.card import verify as problems_of

    status = 0
    for folder in map(find, folders):
        try:
            problems = problems_of(folder)
        except UserError as error:
            problems = [str(error)]
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        if not problems:
            print(f"{folder}: whole.")
        status |= bool(problems)
    return status


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line says."""
    from smol.data.corpora import ensure_embedded
    from smol.data.documents import Files
    from smol.data.hub import HubDataset
    from smol.data.prepare import PrepareSettings, prepare, sample_texts
    from smol.data.tokenizer import train_tokenizer

    given = arguments
    tokenizer = given.tokenizer and find(given.tokenizer)
    if given.vocab_size is not None and tokenizer and not Path(tokenizer).exists():
        tokenizer = str(resolve(tokenizer))  # it will be made
    if given.embedded is not None:
        workers = 2 if given.workers is None else given.workers
        ensure_embedded(resolve(given.embedded), given.vocab_size or 4096, workers)
        return
    for name, least in {"workers": 0, "shard_bytes": 1}.items():
        if (value := getattr(given, name)) is not None and value < least:
            raise UserError(f"--{name} is {value}, expected {least} or more.")
    if not given.output:
        raise UserError("--output is missing: give the folder to write, such as data/my_text")
    if Path(resolve(given.output)).is_file():
        raise UserError(f"--output is {given.output}, a file: give the folder to write")
    if tokenizer == TOKENIZER and given.vocab_size is None and not Path(tokenizer).exists():
        raise UserError(
            f"there is no {TOKENIZER} yet: train it on these documents with --vocab_size 4096, or "
            "name another with --tokenizer, such as data/embedded/tokenizer"
        )
    if given.hub is not None:
        source = HubDataset(
            given.hub,
            config=given.hub_config,
            split=given.hub_split,
            field=given.field,
            revision=given.hub_revision,
            shard_bytes=given.shard_bytes,
        )
    else:
        separator = given.separator and given.separator.replace("\\n", "\n")  # as a shell gives it
        source = Files(
            tuple(map(find, given.documents)),
            given.format,
            given.field,
            separator,
            given.shard_bytes,
        )
    if given.vocab_size is not None and not (Path(tokenizer) / "tokenizer.json").exists():
        print(f"{tokenizer}: training a tokenizer of {given.vocab_size:,} tokens.")
        train_tokenizer(sample_texts(source, given.held_out), tokenizer, given.vocab_size)
    prepare(
        source,
        resolve(given.output),
        tokenizer,
        PrepareSettings(
            given.held_out,
            given.shuffle,
            given.seed,
            given.chunk_tokens,
            given.dtype,
            given.min_tokens,
        ),
        name=given.name,
        eos_token=given.eos_token,
        workers=given.workers,
        overwrite=given.overwrite,
    )


def main(words: list[str] | None = None) -> int:
    """Parse, prepare, and tell a user's mistake in one line.

    Returns:
        The exit status: 0, 1 where ``--verify`` found damage, or 2 after a mistake of the user's.
    """
    words = sys.argv[1:] if words is None else words
    parser = build_parser()
    try:
        arguments = parser.parse_args(words)
        if arguments.config is not None:
            arguments = parser.parse_args([*flags_of(arguments.config), *words])
        if arguments.verify is not None:
            return verify(arguments.verify)
        run(arguments)
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
