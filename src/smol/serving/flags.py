"""Flags of scripts that put a model to work; no torch, so that ``--help`` is there at once."""

from argparse import ArgumentParser

DTYPES = ("auto", "float32", "bfloat16")


def add_model_flags(parser: ArgumentParser) -> None:
    """Add what :func:`smol.serving.loading.load_generator` asks for."""
    parser.add_argument("model", help="run, checkpoint, or Hugging Face folder")
    parser.add_argument("--tokenizer", help="folder of the tokenizer; a run knows its own")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the computation")
    parser.add_argument("--max_length", type=int, help="tokens of prompts and answers at most")
