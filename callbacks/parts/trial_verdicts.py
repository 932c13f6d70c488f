"""From what the processes measured to what is wrong; the same on all of them."""

import math
from dataclasses import dataclass, field
from statistics import mean, median, median_low
from typing import Any

from callbacks.parts.collectives import AllReduce
from callbacks.parts.trial_data import shared_rows
from callbacks.parts.trial_run import Measured

SHARED = 0.5  # of a process' rows in another one too: repeated text has a few, a fault has all
SLOW_STEP, SLOW_PROCESS = 3.0, 1.5  # times the median
FIRST_LOSS = 1.0  # nats from a uniform guess


@dataclass
class Verdict:
    """The result of one check.

    Attributes:
        name: What was checked.
        passed: Whether it is as it should be.
        seen: What was measured, for people.
        expected: What should be, for people.
        values: The figures.
    """

    name: str
    passed: bool
    seen: str
    expected: str
    values: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}: {self.seen}, expected {self.expected}"


def judge_collectives(ranks: list[AllReduce | None], least_gigabytes: float | None) -> Verdict:
    """Whether sums over all processes are right everywhere, and fast enough."""
    expected = "right sums"
    if least_gigabytes is not None:
        expected += f" at {least_gigabytes:g} GB/s or more"
    if None in ranks:
        return Verdict("collectives", True, "one process", expected)
    wrong = {rank: seen.wrong for rank, seen in enumerate(ranks) if seen.wrong}
    speed = min(seen.bus_bandwidth for seen in ranks) / 1e9
    values = {"processes": len(ranks), "bus_gigabytes_per_second": speed}
    if wrong:
        rank, number = next(iter(wrong.items()))
        seen = f"{number:,} of {ranks[rank].elements:,} sums are wrong in process {rank}"
        seen += f" and in {len(wrong) - 1} others" if len(wrong) > 1 else ""
        return Verdict("collectives", False, seen, expected, values)
    passed = least_gigabytes is None or speed >= least_gigabytes
    seen = f"right sums over {len(ranks)} processes at {speed:.3g} GB/s"
    return Verdict("collectives", passed, seen, expected, values)


def judge_data(ranks: list[Measured], different: int) -> Verdict:
    """Whether batches are sound, and the processes have different ones."""
    faults = [f"{fault} (process {r})" for r, seen in enumerate(ranks) for fault in seen.faults]
    shared = max(shared_rows(list(rows)) for rows in zip(*(m.rows for m in ranks), strict=True))
    steps = len(ranks[0].rows)
    seen, expected = f"{steps} steps, {different} different, sound", "sound batches"
    if len(ranks) > 1:
        seen += f", {shared:.0%} of the rows of a process are another's too"
        expected += f", and less than {SHARED:.0%} shared"
    if faults:
        seen = faults[0] + (f" and {len(faults) - 1} more" if len(faults) > 1 else "")
    values = {"steps": steps, "different": different, "shared_rows": shared, "faults": faults}
    return Verdict("data", not faults and shared < SHARED, seen, expected, values)


def judge_loss(losses: list[float], fall: float | None, begins_anew: bool) -> Verdict:
    """Whether the loss is finite and falls; weights that were trained before need not learn more.

    Args:
        losses: By step.
        fall: By how much the last tenth is to be below the first, in nats; ``None`` for no matter.
        begins_anew: Whether the weights were drawn at random.
    """
    finite = all(map(math.isfinite, losses))
    tenth = max(1, len(losses) // 10)
    first, last = mean(losses[:tenth]), mean(losses[-tenth:])
    values = {"first": _plain(first), "last": _plain(last), "losses": [*map(_plain, losses)]}
    seen = f"{first:.3f} at first and {last:.3f} at last"
    if not finite:
        seen = f"{losses[-1]} at step {len(losses)}"
    if fall is None:
        return Verdict("loss", finite, seen, "finite", values)
    if begins_anew:
        expected, passed = f"a fall by {fall:g} nats", first - last >= fall
    else:
        expected, passed = "no rise by a nat, as the weights are trained", last - first < 1
    return Verdict("loss", finite and passed, seen, f"finite, and {expected}", values)


def judge_throughput(ranks: list[Measured], band: tuple[float, float] | None) -> Verdict:
    """Whether the speed is in its band; the first steps set things up and do not count."""
    steps = len(ranks[0].seconds)
    settled = slice(min(max(1, steps // 10), steps - 1), None)
    seconds = max(sum(m.seconds[settled]) for m in ranks)
    waiting = max(sum(m.data_seconds[settled]) / sum(m.seconds[settled]) for m in ranks)
    tokens = sum(sum(m.tokens[settled]) for m in ranks)
    unit = "tokens/s" if tokens else "steps/s"
    speed = (tokens or steps - settled.start) / seconds
    least, largest = band or (0.0, math.inf)
    expected = f"{least:,g} to {largest:,g} {unit}" if band else "any speed"
    shown = f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"
    seen = f"{shown} {unit}, {waiting:.1%} of the time waiting for data"
    slowest = [max(of_step) for of_step in zip(*(m.seconds[settled] for m in ranks), strict=True)]
    values = {
        "per_second": speed,
        "unit": unit,
        "data_share": waiting,
        "slowest_step": max(slowest) / median(slowest),
        "slowest_process": _slowness([m.product_seconds for m in ranks]),
    }
    return Verdict("throughput", least <= speed <= largest, seen, expected, values)


def judge_memory(ranks: list[Measured], headroom: float) -> Verdict:
    """Whether enough memory was free at the fullest moment of any process."""
    left = [m.memory_left for m in ranks]
    fullest = left.index(min(left))
    seen = f"{min(left):.1%} free at the least"
    seen += f" (process {fullest})" if len(ranks) > 1 else ""
    values = {"least_free": left}
    return Verdict("memory", min(left) >= headroom, seen, f"{headroom:.1%} or more", values)


def unusual(throughput: Verdict, first_loss: float, vocab_size: int | None) -> dict[str, str]:
    """What is worth an event and no reason to stop, by kind.

    Args:
        throughput: What :func:`judge_throughput` returned.
        first_loss: In nats.
        vocab_size: Tokens that fresh weights guess among; ``None`` for others.
    """
    found = {}
    if (times := throughput.values["slowest_step"]) > SLOW_STEP:
        found["slow_step"] = f"the slowest trial step took {times:.1f} times the median"
    rank, times = throughput.values["slowest_process"]
    if times > SLOW_PROCESS:
        found["slow_process"] = f"process {rank} computes {times:.1f} times as long as the median"
    if vocab_size and not abs(first_loss - (guess := math.log(vocab_size))) <= FIRST_LOSS:
        found["first_loss"] = f"the first loss is {first_loss:.3f}, a uniform guess's {guess:.3f}"
    return found


def _slowness(seconds: list[float]) -> tuple[int, float]:
    """The slowest process, and its time as a multiple of the median."""
    slowest = max(seconds)
    return seconds.index(slowest), slowest / median_low(seconds)


def _plain(number: float) -> float | str:
    """JSON has no word for numbers that are not finite."""
    return number if math.isfinite(number) else str(number)
