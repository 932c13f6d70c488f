"""Import a Hugging Face folder or a GGUF file as a decoder folder, or export a run.

python src/convert.py import FOLDER|FILE.gguf OUT
python src/convert.py export RUN|CHECKPOINT|FOLDER OUT [--tokenizer FOLDER] [--dtype bfloat16]
"""

import argparse
import sys
from pathlib import Path

from smol.errors import UserError
from smol.paths import find, resolve


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description="Convert between decoder folders and Hugging Face."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    importing = commands.add_parser("import", help="Hugging Face folder or GGUF file to decoder")
    importing.add_argument("source", help="folder with config.json, or a .gguf file")
    importing.add_argument("out", help="decoder folder to write")
    exporting = commands.add_parser("export", help="run or decoder to Hugging Face folder")
    exporting.add_argument("source", help="run folder, checkpoint or decoder folder")
    exporting.add_argument("out", help="new Hugging Face folder")
    exporting.add_argument(
        "--tokenizer", help="folder of the tokenizer to copy along; a run knows its own"
    )
    exporting.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of the written weights"
    )
    args = parser.parse_args(arguments)
    args.source, args.out = find(args.source), resolve(args.out)
    if args.command == "export" and args.tokenizer:
        args.tokenizer = find(args.tokenizer)
    try:
        (_import if args.command == "import" else _export)(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}")
    return 0


def _import(args: argparse.Namespace) -> None:
    from smol.checkpoints.huggingface import copy_tokenizer, load_gguf, load_huggingface
    from smol.model.io import save_decoder

    load = load_gguf if args.source.endswith(".gguf") else load_huggingface
    save_decoder(args.out, *load(args.source))
    if not copy_tokenizer(args.source, Path(args.out, "tokenizer")):
        print(f"note: {args.source} has no tokenizer.json, so {args.out} has no tokenizer")


def _export(args: argparse.Namespace) -> None:
    import torch

    from smol.checkpoints.huggingface import export_decoder
    from smol.runs import decoder_folder, tokenizer_of

    tokenizer = args.tokenizer or tokenizer_of(args.source)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    export_decoder(decoder_folder(args.source), args.out, tokenizer, dtype)


if __name__ == "__main__":
    sys.exit(main())
