"""Talk to a model: a run, a checkpoint, or a Hugging Face folder.

python src/chat.py RUN|FOLDER [--mode think|no_think] [--system TEXT] [--show_reasoning]
python src/chat.py RUN|FOLDER --prompt TEXT [--json [--log_probs]]
"""

import argparse
import json
import sys
from typing import get_args, get_type_hints

from smol.errors import UserError

DIM, PLAIN = ("\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    args = _parser().parse_args(arguments)
    try:
        if args.json and args.prompt is None:
            raise UserError("--json answers one question; expected --prompt TEXT with it.")
        conversation = _conversation(args)
        if args.prompt is None:
            _talk(conversation, args.show_reasoning)
        else:
            _answer_once(conversation, args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    from smol.generation.sampling import Sampling
    from smol.serving.loading import DTYPES

    parser = argparse.ArgumentParser(description="Talk to a model; /help lists what to type.")
    parser.add_argument("model", help="run, checkpoint, or Hugging Face folder")
    parser.add_argument("--tokenizer", help="folder of the tokenizer; a run knows its own")
    parser.add_argument("--mode", choices=["think", "no_think"], help="reason first, or not")
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--show_reasoning", action="store_true", help="print the reasoning too")
    parser.add_argument("--prompt", help="answer this and end")
    parser.add_argument("--json", action="store_true", help="with --prompt: print one JSON object")
    parser.add_argument("--log_probs", action="store_true", help="with --json: of each token")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the computation")
    parser.add_argument("--max_length", type=int, help="tokens of the conversation at most")
    defaults = Sampling(top_p=0.95)
    for name, hint in get_type_hints(Sampling).items():
        default = getattr(defaults, name)
        kind = next((t for t in (*get_args(hint), hint) if t in (int, float, str)), str)
        many = {"nargs": "+"} if isinstance(default, tuple) else {}
        parser.add_argument(f"--{name}", type=kind, default=default, **many)
    return parser


def _conversation(args: argparse.Namespace):
    from smol.generation import Sampling
    from smol.generation.chat import Conversation
    from smol.serving.loading import load_generator

    sampling = Sampling(**{name: getattr(args, name) for name in get_type_hints(Sampling)})
    generator, model = load_generator(args.model, args.tokenizer, args.max_length, args.dtype)
    return Conversation(
        generator, model.tokenizer, model.template, sampling, model.begin, args.system, args.mode
    )


def _answer_once(conversation, args: argparse.Namespace) -> None:
    if args.json:
        for _ in conversation.ask(args.prompt):
            pass
        print(json.dumps(conversation.reply.as_dict(args.log_probs), ensure_ascii=False))
    else:
        _show(conversation, args.prompt, args.show_reasoning)


def _talk(conversation, show_reasoning: bool) -> None:
    if conversation.template is None:
        print("no chat template: what you type is continued as plain text. /exit leaves.")
    else:
        print("type a message, or /help; /exit leaves.")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if line == "/exit":
            return
        if not line:
            continue
        try:
            if line.startswith("/"):
                print(conversation.command(line))
            else:
                _show(conversation, line, show_reasoning)
        except UserError as error:
            print(f"error: {error}")


def _show(conversation, question: str, show_reasoning: bool) -> None:
    """Print an answer while it is written; Ctrl-C ends the answer, not the conversation."""
    from smol.generation.chat import split_reasoning

    written, shown, thinking = "", 0, False
    pieces = conversation.ask(question)
    try:
        for piece in pieces:
            written += piece
            reasoning, answer = split_reasoning(written)
            if show_reasoning and reasoning and not answer:
                print(f"{DIM}{piece}{PLAIN}" if thinking else f"{DIM}{reasoning}", end="")
                thinking = True
            elif answer:
                print("\n\n" if thinking else "", answer[shown:], sep="", end="")
                shown, thinking = len(answer), False
            sys.stdout.flush()
    except KeyboardInterrupt:
        pieces.close()
    reply = conversation.reply
    if reply.completion.tokens:
        count, reason = len(reply.completion.tokens), reply.completion.finish_reason
        ended = {"length": ", cut off at the greatest length", None: ", interrupted"}.get(
            reason, ""
        )
        print(f"\n{DIM}[{count} tokens, {reply.tokens_per_second:.1f} tokens/s{ended}]{PLAIN}")


if __name__ == "__main__":
    sys.exit(main())
