"""Tokens per second of the engine and of transformers' ``generate``, in turn.

python benchmarks/generation.py FOLDER [--repeats 5] [--tokens 48] [--prompt 32] [--no-record]

FOLDER is a Hugging Face folder. Greedy, prompts of random tokens of equal length, no stop. Each
round runs every way once, so that what else the machine does falls on all of them; the figures are
medians, the ratio the median of the rounds' ratios. The limit of one stream is memory: each new
token reads every weight once, at the bandwidth measured at the start.
"""

import argparse
import statistics
import time
from collections.abc import Callable
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


def ways(folder: str, tokens: int) -> dict[str, Callable[[torch.Tensor], object]]:
    """What is compared: functions that continue prompts ``(batch, time)`` by ``tokens`` each."""
    from transformers import AutoModelForCausalLM

    decoder = assemble_decoder(*load_huggingface(folder)).float()
    sampling = Sampling(temperature=0, max_new_tokens=tokens)
    made = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        model.generation_config.eos_token_id = None
        generator = Generator(decoder, dtype=dtype)

        def theirs(prompts: torch.Tensor, model=model) -> object:
            mask = torch.ones_like(prompts)
            return model.generate(
                prompts, attention_mask=mask, max_new_tokens=tokens, do_sample=False
            )

        def ours(prompts: torch.Tensor, generator=generator) -> object:
            return generator.generate(prompts.tolist(), sampling)

        made |= {f"transformers {name}": theirs, f"smol {name}": ours}
    return made


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--no-record", action="store_true")
    args = parser.parse_args()
    speed = bandwidth()
    compared = ways(args.folder, args.tokens)
    _, _, weights = load_huggingface(args.folder)
    parameters, vocab = sum(w.numel() for w in weights.values()), len(next(iter(weights.values())))
    print(f"{speed / 1e9:.1f} GB/s, {torch.get_num_threads()} threads, {parameters:,} parameters")
    rows = []
    for batch in BATCHES:
        prompts = torch.randint(
            vocab, (batch, args.prompt), generator=torch.Generator().manual_seed(0)
        )
        for way in compared.values():
            way(prompts)
        seconds = {name: [] for name in compared}
        for _ in range(args.repeats):
            for name, way in compared.items():
                seconds[name].append(_seconds(partial(way, prompts)))
        for name, times in seconds.items():
            dtype = name.split()[1]
            pairs = zip(seconds[f"transformers {dtype}"], times, strict=True)
            rows.append(
                {
                    "way": name,
                    "batch": batch,
                    "tokens/s": batch * args.tokens / statistics.median(times),
                    "ratio to transformers": statistics.median(a / b for a, b in pairs),
                    "limit of one stream, tokens/s": speed
                    / (parameters * getattr(torch, dtype).itemsize),
                    "GB/s": speed / 1e9,
                    "threads": torch.get_num_threads(),
                }
            )
            print(
                f"{name:<24} batch {batch:<3} {rows[-1]['tokens/s']:>7.1f} tokens/s, "
                f"{rows[-1]['ratio to transformers']:.2f} x"
            )
    if not args.no_record:
        print(f"wrote {record('generation', rows, packages=('torch', 'transformers'))}")


if __name__ == "__main__":
    main()
