"""Serve a model on 127.0.0.1 as OpenAI's interface does: models, completions, chat completions.

python src/serve.py RUN|FOLDER [--port 8000]
"""

import argparse
import sys

from smol.errors import UserError
from smol.serving.flags import add_model_flags


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Serve a model on 127.0.0.1 as OpenAI does.")
    add_model_flags(parser)
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    args = parser.parse_args(arguments)
    try:
        if not 0 <= args.port <= 65535:
            raise UserError(f"port is {args.port}, expected 0 to 65535.")
        try:
            from aiohttp import web

            from smol.serving.loading import load_generator
            from smol.serving.server import Server
        except ModuleNotFoundError:
            raise UserError("serving needs aiohttp; type pip install aiohttp") from None
        server = Server(*load_generator(args.model, args.tokenizer, args.max_length, args.dtype))
        try:
            # A client that has gone ends its request, which makes room for the next one.
            web.run_app(server.app, host="127.0.0.1", port=args.port, handler_cancellation=True)
        except OSError as error:
            raise UserError(f"cannot listen on port {args.port}: {error.strerror}") from None
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
