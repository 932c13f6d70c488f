"""Whether to train, what and how: the playbook's checklist, with figures.

python src/decide.py                         asks; enter takes the default
python src/decide.py --goal research ...     asks what no flag says
python src/decide.py --goal learn --yes      asks nothing
"""

import argparse
import json
import re
import sys
import textwrap
from dataclasses import asdict, fields
from typing import Any

from smol.errors import UserError

UNITS = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
TRIED = ("untried", "enough", "not_enough")
CHOICES = {
    "goal": ("learn", "research", "product", "open_source"),
    "prompting": TRIED,
    "fine_tuning": TRIED,
    "deployment": ("edge", "server"),
    "experience": ("first", "dense", "expert"),
}
QUESTIONS = {
    "goal": "What is it for?",
    "prompting": "Does prompting a model that exists do?",
    "fine_tuning": "Does fine-tuning one do?",
    "deployment": "Where will it run?",
    "experience": "What has the team trained? (first: nothing yet)",
    "team": "How many people?",
    "weeks": "Weeks until it has to be there?",
    "model": "Which model: nano, 135m, 3b or a YAML file with model.init_args.decoder?",
    "tokens": "Tokens to train on, as 100B?",
    "context": "Tokens of a sequence?",
    "micro_batch_tokens": "Tokens in one pass of a process?",
    "unique_tokens": "Tokens of the data without repetition?",
    "device": "On what: cpu, a100, h100, h200, l40s, rtx4090, ...?",
    "devices": "How many of them?",
    "memory_gib": "GiB of memory, if not those of the device?",
    "mfu": "Share of the peak that training reaches (MFU)?",
    "price": "Price of an hour of one device?",
    "checkpoint_hours": "Hours between checkpoints?",
    "store_bandwidth": "Bytes per second to the store, as 1G?",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status, 2 after a mistake."""
    parser = argparse.ArgumentParser(description="Whether to train, what and how, with figures.")
    for name, question in QUESTIONS.items():
        parser.add_argument(f"--{name}", help=question, choices=CHOICES.get(name))
    parser.add_argument("--yes", action="store_true", help="ask nothing, take the defaults")
    parser.add_argument("--json", action="store_true", help="print JSON; asks nothing")
    args = vars(parser.parse_args(arguments))
    quiet, as_json = args.pop("yes"), args.pop("json")
    given = {name: text for name, text in args.items() if text is not None}
    try:
        from smol.planning.checklist import Answers, decide

        answers = Answers()
        kinds = {item.name: str(item.type) for item in fields(Answers)}
        for name, text in given.items():
            setattr(answers, name, _parse(name, text, kinds[name]))
        if not (quiet or as_json):
            _ask(answers, given, kinds)
        decision = decide(answers)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (EOFError, KeyboardInterrupt):
        print("\nerror: no answer; --yes takes the defaults", file=sys.stderr)
        return 2
    print(json.dumps(_as_json(answers, decision), indent=2) if as_json else _page(decision))
    return 0


def _ask(answers: Any, given: dict[str, str], kinds: dict[str, str]) -> None:
    """Ask what no flag says, as far as it matters."""
    for name, question in QUESTIONS.items():
        if name in given or not _matters(name, answers):
            continue
        default = getattr(answers, name)
        hint = "/".join(CHOICES[name]) + " " if name in CHOICES else ""
        while True:
            text = input(
                f"{question} {hint}[{'as the configuration' if default is None else default}] "
            )
            if not text.strip():
                break
            try:
                value = _parse(name, text, kinds[name])
            except UserError as error:
                print(error)
                continue
            setattr(answers, name, value)
            break


def _matters(name: str, answers: Any) -> bool:
    if answers.goal == "learn":
        return name not in ("prompting", "fine_tuning", "deployment", "experience", "team")
    if name == "goal":
        return True
    if answers.prompting != "not_enough":
        return name == "prompting"
    if answers.fine_tuning != "not_enough":
        return name in ("prompting", "fine_tuning", "model")
    return True


def _parse(name: str, text: str, kind: str) -> Any:
    """Read an answer.

    Raises:
        UserError: It is none of the choices, or no number.
    """
    text = text.strip()
    if name in CHOICES and text not in CHOICES[name]:
        raise UserError(f"{name} is {text!r}; expected one of {', '.join(CHOICES[name])}")
    if name in CHOICES or name in ("model", "device"):
        return text
    found = re.fullmatch(r"(\d+\.?\d*|\d*\.\d+)(?:e\+?(\d+))? ?([kmbgt]?)", text.lower())
    if found is None:
        raise UserError(f"{name} is {text!r}; expected a number, as 4096, 2.4M, 100B or 11T")
    value = float(found[1]) * 10 ** int(found[2] or 0) * UNITS[found[3]]
    if "int" not in kind:
        return value
    if value != int(value):
        raise UserError(f"{name} is {text!r}; expected a whole number")
    return int(value)


def _page(decision: Any) -> str:
    """The decision as text for a terminal."""
    lines = [decision.verdict]
    lines += [f"  {reason}" for reason in decision.reasons]
    if decision.figures:
        wide = max(len(figure.name) for figure in decision.figures)
        values = max(len(figure.value) for figure in decision.figures)
        lines += ["", "What it takes"]
        for figure in decision.figures:
            formula = textwrap.wrap(figure.formula, 110 - wide - values)
            lines.append(f"  {figure.name:{wide}}  {figure.value:{values}}  {formula[0]}")
            lines += [" " * (wide + values + 6) + line for line in formula[1:]]
    if decision.options:
        wide = max(len(option.name) for option in decision.options)
        lines += [
            "",
            "GiB per process at the worst moment of a step; tokens at a time and in a step",
        ]
        lines += [
            f"  {option.name:{wide}}  {option.plan.total / 2**30:7.1f}  {option.work.tokens:>9,}  "
            f"{option.batch:>10,}  {'fits' if option.fits else 'does not fit'}"
            for option in decision.options
        ]
    if decision.warnings:
        lines += ["", "Warnings"]
        lines += [f"  - {warning}" for warning in decision.warnings]
    lines += ["", "Start with"]
    lines += [f"  {command}" for command in decision.commands]
    return "\n".join(lines)


def _as_json(answers: Any, decision: Any) -> dict[str, Any]:
    content = asdict(decision) | {"commands": decision.commands}
    for option, made in zip(content["options"], decision.options, strict=True):
        option["plan"]["total"] = made.plan.total
    return {"answers": asdict(answers)} | content


if __name__ == "__main__":
    sys.exit(main())
