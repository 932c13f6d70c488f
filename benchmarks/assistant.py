"""The laptop's assistant, phase by phase over seeds: what each phase gains, and what it costs.

python benchmarks/assistant.py [--runs runs/assistant] [--seeds 6 7 8] [--base runs/stage3]
                               [--page docs/assistant.md]

From one stage 3 run (``make train``, then ``configs/stage2.yaml``, ``stage3.yaml``) every seed is
mid-trained, fine-tuned and preference-optimised by ``src/train.py``; a second preference run, of
another seed, is merged with the first by ``configs/merges/recover.yaml``. Each is evaluated on
held-out tasks by ``src/evaluate.py``. What is finished is not done again. The page holds accuracies
by phase, mode and kind, gains with intervals from the seeds, speed, and a conversation.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

from results import provenance

from smol.config import parse_yaml
from smol.data.card import write_json
from smol.evaluation.results import Results
from smol.experiments.ablation.verdict import paired
from smol.experiments.document import Table, write_document
from smol.experiments.plots import read_metrics
from smol.generation.chat import Conversation
from smol.generation.sampling import Sampling
from smol.paths import project_root, resolve
from smol.runs import replicas
from smol.serving.loading import load_generator

ROOT = project_root()
PHASES = ("mid_training", "sft", "preference", "recovered")  # in the order of the page
SECOND, RECIPE, SECONDS = "preference_2", "configs/merges/recover.yaml", "seconds.json"
OTHER_SEED = 100  # what is added to a seed for the second preference run
TASKS = ("chat", "chat_unseen")
AT_ONCE = 128  # answers
MODES = ("no_think", "think")
QUESTIONS = (
    "Write star 2 times with + in between, then moon.",
    "Which is the largest: 31, 84, 57?",
    "/think",
    "Reverse: k a w",
    "Is 62 larger than 26? Say yes or no.",
)


def script(name: str, *words: str | int | Path) -> float:
    """Run one of the project's scripts; returns how many seconds it took."""
    print("$", f"src/{name}.py", *words, flush=True)
    began = time.monotonic()
    subprocess.run(
        [sys.executable, ROOT / f"src/{name}.py", *map(str, words)], cwd=ROOT, check=True
    )
    return time.monotonic() - began


def is_finished(run: Path) -> bool:
    """Whether a run has a checkpoint of its last step."""
    config = run / "config.yaml"
    if not config.is_file():
        return False
    last = parse_yaml(config.read_text(), str(config))["trainer"]["max_steps"]
    return any(info.manifest.step == last for info in replicas(run).list())


def train(runs: Path, seed: int, base: Path) -> None:
    """All phases of a seed, each from the one before; their seconds are kept beside them."""
    starts = {"mid_training": base, "sft": "mid_training", "preference": "sft", SECOND: "sft"}
    for name, start in starts.items():
        if is_finished(runs / name):
            continue
        own = seed + OTHER_SEED if name == SECOND else seed
        words = ["fit", "--config", f"configs/{name.removesuffix('_2')}.yaml", "--name", name]
        words += ["--runs_dir", runs, "--init_from", start]
        words += ["--seed_everything", str(own), "--data.seed", str(own)]
        write_json(runs / name / SECONDS, {"seconds": script("train", *words)})


def merge(runs: Path) -> None:
    """The shipped recipe, with this seed's runs in the place of those in ``runs/``."""
    if (runs / "recovered").is_dir():
        return
    text = (ROOT / RECIPE).read_text().replace("model: runs/", f"model: {runs}/")
    recipe = runs / "recover.yaml"
    recipe.write_text(text)
    script("merge", recipe, runs / "recovered")


def measured(run: Path) -> dict[str, float]:
    """Values by ``task/metric`` of the newest evaluations of a run."""
    rows = Results(run).rows()
    return {f"{r.task}/{name}": e.value for r in rows for name, e in r.metrics.items()}


def points(before: dict[int, float], after: dict[int, float]) -> list[str]:
    """Mean gain of a share over the seeds in points, its interval, and what that says."""
    d = paired(before, after, 1)
    if d is None or d.low is None:
        return ["", "", ""]
    said = "gains" if d.low > 0 else "loses" if d.high < 0 else "no difference seen"
    return [f"{100 * d.mean:+.1f}", f"{100 * d.low:+.1f} to {100 * d.high:+.1f}", said]


class Chains:
    """What was measured, by phase and seed."""

    def __init__(self, runs: Path, seeds: Sequence[int]):
        self.runs, self.seeds = runs, seeds
        self.values = {p: {s: measured(runs / f"seed{s}" / p) for s in seeds} for p in PHASES}

    def by_seed(self, phase: str, metric: str) -> dict[int, float]:
        found = self.values[phase]
        return {seed: values[metric] for seed, values in found.items() if metric in values}

    def mean(self, phase: str, metric: str, spec: str = ".1%") -> str:
        found = self.by_seed(phase, metric).values()
        return format(fmean(found), spec) if found else ""

    def accuracy(self, phase: str, modes: Sequence[str]) -> dict[int, float]:
        """Mean accuracy on trained kinds over the modes, by seed; all modes have the same tasks."""
        found = [self.by_seed(phase, f"chat/{mode}/accuracy") for mode in modes]
        return {s: fmean(f[s] for f in found) for s in self.seeds if all(s in f for f in found)}

    def gain(self, before: str, after: str, modes: Sequence[str]) -> list[str]:
        """What a phase gains in accuracy over another one, see :func:`points`."""
        return points(self.accuracy(before, modes), self.accuracy(after, modes))

    def pairs(self, metric: str) -> tuple[dict[int, float], dict[int, float]]:
        """A measure of held-out pairs before and after preference optimisation, by seed."""
        found = {
            seed: read_metrics(self.runs / f"seed{seed}/preference/metrics.csv")[metric][1]
            for seed in self.seeds
        }
        return tuple({seed: values[end] for seed, values in found.items()} for end in (0, -1))

    def seconds(self) -> list[list[str]]:
        """How long phases took that this script trained, by seed."""
        rows = []
        for seed in self.seeds:
            files = [self.runs / f"seed{seed}" / p / SECONDS for p in PHASES[:3]]
            if all(file.is_file() for file in files):
                each = [json.loads(file.read_text())["seconds"] for file in files]
                rows.append([str(seed), *(f"{s:.0f}" for s in (*each, sum(each)))])
        return rows


def conversation(run: Path) -> str:
    """A conversation that begins in no_think and is switched, greedy, as a terminal shows it."""
    generator, model = load_generator(run)
    sampling = Sampling(temperature=0, max_new_tokens=120)
    chat = Conversation(
        generator, model.tokenizer, model.template, sampling, model.begin, mode="no_think"
    )
    lines = []
    for question in QUESTIONS:
        lines.append(f"> {question}")
        if question.startswith("/"):
            lines.append(chat.command(question))
            continue
        for _ in chat.ask(question):
            pass
        reply = chat.reply
        thought = [f"  ({line})" for line in (reply.reasoning or "").splitlines()]
        lines += [*thought, reply.text]
    return "```text\n" + "\n".join(lines) + "\n```"


def page(chains: Chains) -> Iterable[str | Table]:
    """The blocks of the page."""
    origin = provenance(("torch",))
    seeds = f"{len(chains.seeds)} seeds ({', '.join(map(str, chains.seeds))})"
    yield (
        "Made by `python benchmarks/assistant.py`: a model of 4 million parameters, mid-trained, "
        "fine-tuned and preference-optimised from one stage 3 run, then merged, on "
        f"{seeds}. {', '.join(f'{k} {v}' for k, v in origin.items())}."
    )
    yield "## Accuracy on held-out tasks"
    splits = ("accuracy", "accuracy/instances", "accuracy/sizes")
    names = {f"chat/{m}/{s}": f"{m}, {s.removeprefix('accuracy/')}" for m in MODES for s in splits}
    names |= {f"chat_unseen/{m}/accuracy": f"{m}, unseen kinds" for m in MODES}
    rows = [[label, *(chains.mean(p, metric) for p in PHASES)] for metric, label in names.items()]
    yield Table(
        ["", *PHASES],
        rows,
        "Means over the seeds, greedy. Instances: unseen tasks of trained kinds and sizes; sizes: "
        "larger ones than any in training; unseen kinds are reported apart.",
    )
    yield "## What each phase gains"
    pairs = [("mid_training", "sft"), ("sft", "preference"), ("preference", "recovered")]
    rows = [
        [f"{a} → {b}", label, *chains.gain(a, b, modes)]
        for a, b in pairs
        for label, modes in {"both": MODES, **{mode: (mode,) for mode in MODES}}.items()
    ]
    yield Table(
        ["", "mode", "points", "95 % interval", ""],
        rows,
        "Accuracy on trained kinds; the interval is that of the t test paired by seed.",
    )
    yield (
        "Preference optimisation is for telling better answers from worse: of the two answers of a "
        "held-out pair, most of them a right one and a near miss, the better is to be the likelier."
    )
    before, after = chains.pairs("held_out/ranking")
    _, margins = chains.pairs("held_out/rewards/margins")
    rows = [
        [str(seed), f"{before[seed]:.1%}", f"{after[seed]:.1%}", f"{margins[seed]:+.2f}"]
        for seed in chains.seeds
    ]
    yield Table(
        ["seed", "the better one is likelier, sft", "preference", "margin of rewards"],
        rows,
        "Gain in points: {}, 95 % interval {}: {}.".format(*points(before, after)),
    )
    yield "## Modes"
    rows = [
        [f"{label}, {mode}", *(chains.mean(p, f"chat/{mode}/{metric}", spec) for p in PHASES)]
        for metric, label, spec in (
            ("in_mode", "in the mode asked for", ".1%"),
            ("in_mode_after_switch", "after a switch in the third turn", ".1%"),
            ("ended", "ended by itself", ".1%"),
            ("answer_tokens", "tokens of an answer", ".1f"),
            ("tokens_per_second", f"tokens/s, {AT_ONCE} at a time", ",.0f"),
        )
        for mode in MODES
    ]
    yield Table(["", *PHASES], rows)
    yield "## By kind, after fine-tuning"
    prefix = "chat/no_think/accuracy/"
    groups = sorted({name for v in chains.values["sft"].values() for name in v})
    kinds = [n.removeprefix(prefix) for n in groups if n.startswith(prefix)]
    kinds = [kind for kind in kinds if kind not in ("instances", "sizes")]
    rows = [[k, *(chains.mean("sft", f"chat/{m}/accuracy/{k}") for m in MODES)] for k in kinds]
    yield Table(["kind", *MODES], rows)
    if seconds := chains.seconds():
        yield "## How long it takes"
        yield Table(["seed", *PHASES[:3], "together"], seconds, "Seconds, start-up included.")
    yield f"## A conversation\n\nWith `sft` of seed {chains.seeds[0]}, reasoning in brackets:"
    yield conversation(chains.runs / f"seed{chains.seeds[0]}" / "sft")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path(resolve("runs/assistant")))
    parser.add_argument("--seeds", type=int, nargs="+", default=[6, 7, 8])
    parser.add_argument("--base", type=Path, default=Path(resolve("runs/stage3")))
    parser.add_argument("--page", type=Path, default=ROOT / "docs/assistant.md")
    args = parser.parse_args()
    runs = args.runs.absolute()
    for seed in args.seeds:
        folder = runs / f"seed{seed}"
        train(folder, seed, args.base.absolute())
        merge(folder)
        for phase in PHASES:
            script("evaluate", folder / phase, "--batch_size", AT_ONCE, "--tasks", *TASKS)
    chains = Chains(runs, args.seeds)
    write_document(args.page.parent, "The laptop's assistant", list(page(chains)), args.page.stem)
    print(f"wrote {args.page}")


if __name__ == "__main__":
    main()
