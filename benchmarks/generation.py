"""Tokens per second of the engine and of transformers' ``generate``, in turn.

python benchmarks/generation.py FOLDER [--repeats 5] [--tokens 128] [--prompt 32] [--no-record]

FOLDER is a Hugging Face folder. Greedy, prompts of random tokens of equal length, no stop. Reading
a prompt and writing are two kinds of work, so each is measured: a call that writes one token is
reading, and what a call that writes all takes longer is writing. Each round runs every way once, so
that what else the machine does falls on all of them; the figures are medians, a ratio the median of
the rounds' ratios. The limit of one stream is memory: each new token reads every weight once, at
the bandwidth measured at the start.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from results import record

from smol.checkpoints.huggingface import load_huggingface
from smol.generation import Generator, Sampling
from smol.model.io import assemble_decoder

BATCHES = (1, 16)


def bandwidth(elements: int = 2**26, repeats: int = 5) -> float:
    """Bytes per second at which this process reads memory: the best of some sums."""
    x = torch.ones(elements)
    best = min(_seconds(x.sum) for _ in range(repeats))
    return x.nbytes / best


def _seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


Way = Callable[[torch.Tensor, int], object]


def ways(folder: str) -> dict[str, Way]:
    """What is compared: functions that continue prompts ``(batch, time)`` by so many tokens."""
    from transformers import AutoModelForCausalLM

    decoder = assemble_decoder(*load_huggingface(folder)).float()
    made = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        model.generation_config.eos_token_id = None
        generator = Generator(decoder, dtype=dtype)

        def theirs(prompts: torch.Tensor, tokens: int, model=model) -> object:
            mask = torch.ones_like(prompts)
            return model.generate(
                prompts, attention_mask=mask, max_new_tokens=tokens, do_sample=False
            )

        def ours(prompts: torch.Tensor, tokens: int, generator=generator) -> object:
            sampling = Sampling(temperature=0, max_new_tokens=tokens)
            return generator.generate(prompts.tolist(), sampling)

        made |= {f"transformers {name}": theirs, f"smol {name}": ours}
    return made


def measure(
    compared: dict[str, Way], prompts: torch.Tensor, tokens: int, repeats: int
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of reading the prompts and of writing all tokens but the first, round by round."""
    for way in compared.values():
        way(prompts, 2)
    found = {name: [] for name in compared}
    for _ in range(repeats):
        for name, way in compared.items():
            reading = _seconds(partial(way, prompts, 1))
            found[name].append((reading, _seconds(partial(way, prompts, tokens)) - reading))
    return found


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """How many times as fast as theirs: the median over the rounds."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--no-record", action="store_true")
    args = parser.parse_args()
    speed = bandwidth()
    compared = ways(args.folder)
    _, _, weights = load_huggingface(args.folder)
    parameters, vocab = sum(w.numel() for w in weights.values()), len(next(iter(weights.values())))
    print(f"{speed / 1e9:.1f} GB/s, {torch.get_num_threads()} threads, {parameters:,} parameters")
    rows = []
    for batch in BATCHES:
        prompts = torch.randint(
            vocab, (batch, args.prompt), generator=torch.Generator().manual_seed(0)
        )
        found = measure(compared, prompts, args.tokens, args.repeats)
        for name in found:
            dtype = name.split()[1]
            (their_reading, their_writing), (reading, writing) = (
                zip(*found[key], strict=True) for key in (f"transformers {dtype}", name)
            )
            rows.append(
                {
                    "way": name,
                    "batch": batch,
                    "tokens/s": batch * (args.tokens - 1) / statistics.median(writing),
                    "ratio to transformers": ratio(their_writing, writing),
                    "prompt tokens/s": prompts.numel() / statistics.median(reading),
                    "ratio of reading": ratio(their_reading, reading),
                    "new tokens": args.tokens,
                    "limit of one stream, tokens/s": speed
                    / (parameters * getattr(torch, dtype).itemsize),
                    "GB/s": speed / 1e9,
                    "threads": torch.get_num_threads(),
                }
            )
            row = rows[-1]
            print(
                f"{name:<24} batch {batch:<3} {row['tokens/s']:>7.1f} tokens/s, "
                f"{row['ratio to transformers']:.2f} x; reads {row['prompt tokens/s']:>7.1f}, "
                f"{row['ratio of reading']:.2f} x"
            )
    if not args.no_record:
        print(f"wrote {record('generation', rows, packages=('torch', 'transformers'))}")


if __name__ == "__main__":
    main()
