"""Talk to a model: a run, a checkpoint, or a Hugging Face folder.

python src/chat.py RUN|FOLDER [--mode think|no_think] [--system TEXT] [--show_reasoning]
python src/chat.py RUN|FOLDER --prompt TEXT [--json [--log_probs]]
"""

import argparse
import json
import sys
from dataclasses import replace
from typing import get_args, get_type_hints

from smol.errors import UserError
from smol.generation.sampling import Sampling
from smol.serving.flags import add_model_flags

DIM, PLAIN = ("\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    args = _parser().parse_args(arguments)
    try:
        if args.json and args.prompt is None:
            raise UserError("--json answers one question; expected --prompt TEXT with it.")
        if args.log_probs and not args.json:
            raise UserError("--log_probs is printed as JSON only; expected --json with it.")
        if args.show_reasoning and args.json:
            raise UserError("--json shows the reasoning anyway; leave --show_reasoning out.")
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
    parser = argparse.ArgumentParser(description="Talk to a model; /help lists what to type.")
    add_model_flags(parser)
    parser.add_argument("--mode", choices=["think", "no_think"], help="reason first, or not")
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--show_reasoning", action="store_true", help="print the reasoning too")
    parser.add_argument("--prompt", help="answer this and end")
    parser.add_argument("--json", action="store_true", help="with --prompt: print one JSON object")
    parser.add_argument("--log_probs", action="store_true", help="with --json: of each token")
    defaults = Sampling(top_p=0.95)
    for name, hint in get_type_hints(Sampling).items():
        default = getattr(defaults, name)
        kind = next((t for t in (*get_args(hint), hint) if t in (int, float, str)), str)
        many = {"nargs": "+"} if isinstance(default, tuple) else {}
        if name == "max_new_tokens":  # reasoning takes what it takes
            default, many = None, {"help": "of an answer at most (default: all there is room for)"}
        parser.add_argument(f"--{name}", type=kind, default=default, **many)
    return parser


def _conversation(args: argparse.Namespace):
    from smol.generation.chat import Conversation
    from smol.serving.loading import load_generator

    given = {name: getattr(args, name) for name in get_type_hints(Sampling)}
    rest = given["max_new_tokens"] is None
    sampling = Sampling(**given | ({"max_new_tokens": 1} if rest else {}))
    generator, model = load_generator(args.model, args.tokenizer, args.max_length, args.dtype)
    if rest:
        sampling = replace(sampling, max_new_tokens=generator.max_length)
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

    written, thought, answered = "", 0, 0

    def show(finished: bool) -> None:
        nonlocal thought, answered
        reasoning, answer = split_reasoning(written, finished)
        if show_reasoning and reasoning and len(reasoning) > thought:
            print(f"{DIM}{reasoning[thought:]}{PLAIN}", end="")
            thought = len(reasoning)
        if len(answer) > answered:
            print("\n\n" if thought and not answered else "", answer[answered:], sep="", end="")
            answered = len(answer)
        sys.stdout.flush()

    pieces = conversation.ask(question)
    try:
        for piece in pieces:
            written += piece
            show(finished=False)
    except KeyboardInterrupt:
        pieces.close()
    show(finished=True)
    reply = conversation.reply
    if reply.completion.tokens:
        count, reason = len(reply.completion.tokens), reply.completion.finish_reason
        ended = {"length": ", cut off at the greatest length", None: ", interrupted"}.get(
            reason, ""
        )
        print(f"\n{DIM}[{count} tokens, {reply.tokens_per_second:.1f} tokens/s{ended}]{PLAIN}")


if __name__ == "__main__":
    sys.exit(main())
