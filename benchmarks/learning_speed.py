"""Learning per second: held-out bits per byte that a given time of training reaches.

python benchmarks/learning_speed.py [--minutes 8] [--ways speedrun nanochat] [--seeds 6]
    [--data FOLDER | --documents FILES] [--tokenizer FOLDER] [--laptop] [--clock wall|processor]
    [--peer_bits BITS] [--note TEXT] [--runs FOLDER] [--no-record]

Each way is ``train.py fit --config configs/speedrun.yaml`` with some flags, or the peer, a model
with the architecture and settings of nanochat (``nanochat_peer.py``): on the same text, by the same
tokenizer, measured on the same held-out text. The minutes are those of training, shared out evenly
among ways and seeds.

Schedules count in steps. So a probe, the same run in small, measures how long a step takes in each
part of it, and the number of steps follows (for a second seed, from the first one's run); how long
the run took then is in its row. The clock leaves out start-up, the first step, in which models are
compiled, and validation. What a later change of context compiles anew counts.

With ``--laptop`` the configuration is ``speedrun_laptop.yaml``, which reads the embedded corpora
unless told otherwise. Not yet run on a GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from nanochat_peer import Job
from results import record, table

from smol.data.tokenizer import load_tokenizer
from smol.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    "WANDB_MODE": "offline",
    "HF_HUB_OFFLINE": "1",
    "LITDATA_DISABLE_VERSION_CHECK": "1",
    "PYTHONPATH": os.pathsep.join(
        [str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    ),
}
PARTS = ("first", "second", "last")
WEIGHTS = (2, 1, 1)  # quarters of the steps in each part, as configs/speedrun.yaml has them
PROBE_QUARTER, PROBE_WARMUP = 3, 2


@dataclass(frozen=True)
class Scale:
    """What the ways are made of at one size.

    Attributes:
        config: The configuration.
        batches: Tokens of a step in the three parts of a ramp.
        contexts: Tokens of a row in the three parts of a warm-up.
        adamw: Peak learning rate of AdamW.
        muon: Peak learning rate of Muon.
        tied: Whether the head is the embedding, but in ``speedrun``.
        peer: Depth, width and head width of the peer.
    """

    config: str
    batches: tuple[int, int, int]
    contexts: tuple[int, int, int]
    adamw: float
    muon: float
    tied: bool
    peer: tuple[int, int, int]


SCALES = {
    # AdamW's rate is that of GPT-3 Small (Brown et al. 2020, table 2.1), of this width and batch.
    "gpu": Scale(
        "configs/speedrun.yaml",
        (131_072, 262_144, 524_288),
        (512, 1024, 2048),
        0.0006,
        0.0036,
        False,
        (12, 768, 128),
    ),
    # The peer has 3.80 million parameters, the nano decoder 3.94.
    "laptop": Scale(
        "configs/speedrun_laptop.yaml",
        (1024, 2048, 4096),
        (64, 128, 256),
        0.005,
        0.006,
        True,
        (6, 128, 64),
    ),
}
PEERS = ("nanochat", "nanochat_unscaled")
OURS = ("speedrun", "adamw", "muon", "muon_small", "muon_context", "muon_ramp")


def settings(way: str, scale: Scale) -> dict[str, Any]:
    """What a way changes in the configuration: dotted key to value."""
    if way == "speedrun":
        return {}
    last = len(PARTS) - 1
    batches = {
        "muon_ramp": scale.batches,
        "muon_small": (scale.batches[0],) * len(PARTS),
    }.get(way, (scale.batches[last],) * len(PARTS))
    contexts = scale.contexts if way == "muon_context" else (scale.contexts[last],) * len(PARTS)
    optimizer = "adamw" if way == "adamw" else "muon"
    return {
        "vars.batches": dict(zip(PARTS, batches, strict=True)),
        "vars.contexts": dict(zip(PARTS, contexts, strict=True)),
        "model.decoder.tie_embeddings": scale.tied,
        "model.optimizer.groups": None,
        "model.optimizer.name": optimizer,
        "model.optimizer.learning_rate": scale.adamw if optimizer == "adamw" else scale.muon,
    }


def quarter_of(step_seconds: dict[str, float], seconds: float) -> int:
    """A quarter of the steps that fill so many seconds.

    Args:
        step_seconds: Of each part of a run.
        seconds: To be filled.
    """
    parts = zip(WEIGHTS, PARTS, strict=True)
    return max(1, round(seconds / sum(weight * step_seconds[part] for weight, part in parts)))


def seconds_to(bits: float, rows: Sequence[dict[str, float]]) -> float | None:
    """When a curve first is as low as ``bits``, straight lines between its points; None: never.

    Args:
        bits: Bits per byte.
        rows: ``seconds`` and ``bits_per_byte`` of each point, in order.
    """
    before = None
    for row in rows:
        if row["bits_per_byte"] <= bits:
            if before is None:
                return row["seconds"]
            share = (before["bits_per_byte"] - bits) / (
                before["bits_per_byte"] - row["bits_per_byte"]
            )
            return before["seconds"] + share * (row["seconds"] - before["seconds"])
        before = row
    return None


class Benchmark:
    """Trains ways.

    Args:
        args: Of the command line.
        folder: For runs.
        data: What the given text changes in the configuration.
    """

    def __init__(self, args: argparse.Namespace, folder: Path, data: dict[str, Any]) -> None:
        self.args, self.folder, self.data = args, folder, data
        self.scale = SCALES["laptop" if args.laptop else "gpu"]
        self.quarters: dict[str, int] = {}

    def curve(self, way: str, seed: int, seconds: float) -> dict[str, Any]:
        """Train for so long; what :class:`learning_clock.Curve` writes, with the ``steps``.

        Raises:
            RuntimeError: the training failed.
        """
        if way not in self.quarters:
            probe = self._run(way, seed, PROBE_QUARTER, probe=True)
            self.quarters[way] = quarter_of(probe["step_seconds"], seconds)
        quarter = self.quarters[way]
        found = self._run(way, seed, quarter, probe=False) | {"steps": 4 * quarter}
        # A whole run knows better than a probe: the next seed's comes nearer to the time.
        self.quarters[way] = max(1, round(quarter * seconds / found["seconds"]))
        return found

    def _run(self, way: str, seed: int, quarter: int, probe: bool) -> dict[str, Any]:
        name = f"{way}_{seed}{'_probe' if probe else ''}"
        file = self.folder / f"{name}.json"
        file.unlink(missing_ok=True)
        every = max(1, 4 * quarter // self.args.points)
        changes = settings("muon" if way in PEERS else way, self.scale)
        changes |= self.data | {"vars.quarter": quarter, "data.seed": seed}
        if way in PEERS:
            command = self._peer(way, seed, changes, quarter, every, file, probe)
        else:
            command = self._ours(name, seed, changes, every, file, probe)
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True
        )
        if done.returncode or not file.exists():
            raise RuntimeError(f"it ended with {done.returncode}:\n{done.stderr[-2000:]}")
        return json.loads(file.read_text())

    def _ours(
        self, name: str, seed: int, changes: dict[str, Any], every: int, file: Path, probe: bool
    ) -> list[str]:
        arguments = {"file": str(file), "kind": self.args.clock, "probe": probe}
        curve = {"class_path": "learning_clock.LearningCurve", "init_args": arguments}
        changes = changes | {
            "name": name,
            "runs_dir": str(self.folder),
            "seed_everything": seed,
            "model.init_seed": seed,
            "trainer.val_check_interval": every,
            "callbacks.curve": curve,
        }
        if probe:
            changes |= {"trainer.limit_val_batches": 0, "model.schedule.warmup_steps": PROBE_WARMUP}
        command = [sys.executable, str(ROOT / "src/train.py"), "fit", "--config", self.scale.config]
        command += ["--config", "configs/callbacks/none.yaml", "--ckpt_path", "scratch"]
        for key, value in changes.items():
            plain = isinstance(value, str)
            command += [f"--{key}", value if plain else json.dumps(value)]
        return command

    def _peer(
        self,
        way: str,
        seed: int,
        changes: dict[str, Any],
        quarter: int,
        every: int,
        file: Path,
        probe: bool,
    ) -> list[str]:
        depth, width, head_dim = self.scale.peer
        job = Job(
            files=[self.scale.config],
            overrides=changes,
            depth=depth,
            width=width,
            head_dim=head_dim,
            steps=4 * quarter,
            every=every,
            seed=seed,
            file=str(file),
            kind=self.args.clock,
            probe=probe,
            compile=True,
            unscaled=way == "nanochat_unscaled",
        )
        return [sys.executable, str(ROOT / "benchmarks/nanochat_peer.py"), json.dumps(asdict(job))]


def given_text(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What ``--data``, ``--documents`` and ``--tokenizer`` change in the configuration.

    Raises:
        UserError: text or tokenizer is missing.
    """
    if not args.data and not args.documents:
        if args.laptop:
            return {}
        raise UserError(
            "there is no text to train on; type --data FOLDER, --documents FILES, or --laptop for "
            "the embedded corpora at laptop size"
        )
    if not args.tokenizer:
        raise UserError("--tokenizer is missing; expected the folder of the text's tokenizer")
    data = Path(args.data) if args.data else folder / "text"
    if not args.data:
        command = [sys.executable, str(ROOT / "src/prepare.py"), "--documents", *args.documents]
        command += ["--tokenizer", args.tokenizer, "--output", str(data), "--held_out", "0.02"]
        subprocess.run(command, check=True, env=os.environ | ENVIRONMENT)
    rows = -(-load_tokenizer(args.tokenizer).vocab_size // 128) * 128
    names = ("text", *(("prose", "code", "maths") if args.laptop else ()))
    return {
        "data.embedded": None,
        "vars.mixture": dict.fromkeys(names)
        | {"text": {"path": str(data.absolute()), "weight": 1.0}},
        "vars.tokenizer": str(Path(args.tokenizer).absolute()),
        "vars.vocab_size": rows,
    }


def text_digest(benchmark: Benchmark) -> str:
    """Names and first digits of the digests of all sources."""
    from nanochat_peer import build_data

    job = Job([benchmark.scale.config], benchmark.data, 1, 64, 64, 1, 1, 0, "")
    data, _ = build_data(job)
    return " ".join(f"{name} {digest[:8]}" for name, digest in sorted(data.digests.items()))


def rows_of(
    found: dict[tuple[str, int], dict[str, Any]], args: argparse.Namespace, text: str
) -> list[dict[str, Any]]:
    """A row of the table for each way and seed.

    Args:
        found: Curves.
        args: Of the command line.
        text: What was read.
    """
    last = {key: curve["rows"][-1]["bits_per_byte"] for key, curve in found.items()}
    peers = [bits for (way, _), bits in last.items() if way in PEERS]
    best = args.peer_bits or min(peers, default=None)
    rows = []
    for (way, seed), curve in found.items():
        when = None if best is None else seconds_to(best, curve["rows"])
        points = curve["rows"]
        rows.append(
            {
                "way": way,
                "seed": seed,
                "text": text,
                "parameters M": curve["parameters"] / 1e6,
                "clock": args.clock,
                "budget s": curve["budget"],
                "seconds": points[-1]["seconds"],
                "steps": curve["steps"],
                "tokens": points[-1]["tokens"],
                "tokens/s": curve["tokens"] / curve["seconds"],
                "bits per byte": last[way, seed],
                "best peer's": best if best is not None else "",
                "s to best peer's": "" if when is None else when,
                "curve, s: bits": ", ".join(
                    f"{p['seconds']:.0f}: {p['bits_per_byte']:.3f}" for p in points
                ),
                "load": os.getloadavg()[0],
                "threads": torch.get_num_threads(),
                "note": args.note,
            }
        )
    return rows


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--minutes", type=float, default=8, help="of training, ways and seeds together")
    add("--ways", nargs="+", choices=[*OURS, *PEERS], default=["speedrun", "nanochat"])
    add("--seeds", type=int, nargs="+", default=[6])
    add("--data", metavar="FOLDER", help="a source that src/prepare.py has prepared")
    add("--documents", nargs="+", metavar="FILE", help="or text, to be prepared with --tokenizer")
    add("--tokenizer", metavar="FOLDER")
    add("--laptop", action="store_true", help="at laptop size, on a processor")
    add("--clock", choices=["wall", "processor"], default="wall")
    add("--points", type=int, default=8, help="of a curve")
    add("--peer_bits", type=float, help="bits per byte to reach, if no peer is among the ways")
    add("--note", default="", help="for the rows: what else the machine does")
    add("--runs", metavar="FOLDER", help="of the runs; by default a temporary one")
    add("--no-record", action="store_true")
    args = parser.parse_args()
    for name in ("minutes", "points"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name} is {getattr(args, name):g}, expected more than 0")
    return args


def main() -> None:
    """Train, print and record."""
    args = parse()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.runs or temporary).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            benchmark = Benchmark(args, folder, given_text(args, folder))
            text = text_digest(benchmark)
        except UserError as error:
            sys.exit(f"error: {error}")
        seconds = 60 * args.minutes / len(args.ways) / len(args.seeds)
        found: dict[tuple[str, int], dict[str, Any]] = {}
        for seed in args.seeds:  # ways in turn, so that what the machine does besides meets all
            for way in args.ways:
                began = time.monotonic()
                try:
                    found[way, seed] = benchmark.curve(way, seed, seconds) | {"budget": seconds}
                except RuntimeError as failure:  # what the others reach is worth its time
                    print(f"{way}, seed {seed}: {failure}", flush=True)
                    continue
                bits = found[way, seed]["rows"][-1]["bits_per_byte"]
                took = time.monotonic() - began
                print(f"{way}, seed {seed}: {bits:.4f} bits per byte, {took:.0f} s", flush=True)
        rows = rows_of(found, args, text)
        print(table(rows))
        if rows and not args.no_record:
            print(f"kept in {record('learning_speed', rows, ('torch', 'lightning'))}")


if __name__ == "__main__":
    main()
