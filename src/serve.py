"""Serve a model on 127.0.0.1 as OpenAI's interface does: models, completions, chat completions.

python src/serve.py RUN|FOLDER [--port 8000]
"""

import argparse
import sys

from smol.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    from smol.serving.loading import DTYPES, load_generator

    parser = argparse.ArgumentParser(description="Serve a model on 127.0.0.1 as OpenAI does.")
    parser.add_argument("model", help="run, checkpoint, or Hugging Face folder")
    parser.add_argument("--tokenizer", help="folder of the tokenizer; a run knows its own")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the computation")
    parser.add_argument("--max_length", type=int, help="tokens of prompt and text at most")
    args = parser.parse_args(arguments)
    try:
        try:
            from aiohttp import web

            from smol.serving.server import Server
        except ModuleNotFoundError:
            raise UserError("serving needs aiohttp; type pip install aiohttp") from None
        server = Server(*load_generator(args.model, args.tokenizer, args.max_length, args.dtype))
        try:
            web.run_app(server.app, host="127.0.0.1", port=args.port)
        except OSError as error:
            raise UserError(f"cannot listen on port {args.port}: {error.strerror}") from None
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
