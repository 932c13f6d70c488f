"""What memory a training process takes, beside what smol.planning.memory says it takes.

python benchmarks/memory_plan.py [--only NAME] [--no_record] [FLAGS OF TRAIN]

Every case is a process (or two) of its own that trains three steps by ``src/train.py``'s own code.
Measured is the highest sum of bytes that PyTorch's allocator has given out: on a GPU by
``torch.cuda.max_memory_allocated``, on a processor by the profiler, which sees every allocation,
kernels' own included. The prediction knows the run's configuration.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from typing import Any

import torch
from results import record, table

NANO = "--config configs/stage1.yaml --data.global_batch_tokens 2048 --data.micro_batch_tokens 2048"
SMOL = f"{NANO} --config configs/model/smollm2_135m.yaml --model.decoder.num_layers 6"
TWO = f"{SMOL} --data.micro_batch_tokens 1024 --trainer.devices 2"
SHARDED = f"{TWO} --config configs/hardware/cpu_2.yaml"
FLOAT32 = "--trainer.precision 32-true"
CASES = {
    "nano": NANO,
    "nano, float32": f"{NANO} {FLOAT32}",
    "nano, context 2048": f"{NANO} --data.context_length 2048",
    "nano, 2 passes": f"{NANO} --data.micro_batch_tokens 1024",
    "nano, selective": f"{NANO} --model.activation_checkpointing selective",
    "nano, full": f"{NANO} --model.activation_checkpointing full",
    "135M of 6 layers": SMOL,
    "135M of 6 layers, float32": f"{SMOL} {FLOAT32}",
    "135M of 6 layers, full": f"{SMOL} --model.activation_checkpointing full",
    "135M of 6 layers, DDP of 2": f"{TWO} --trainer.strategy ddp",
    "135M of 6 layers, FSDP2 of 2": SHARDED,
    "135M of 6 layers, FSDP2 of 2, float32": f"{SHARDED} {FLOAT32}",
    "135M of 6 layers, tensor parallel of 2": f"{SHARDED} "
    "--trainer.strategy.init_args.tensor_parallel_size 2 "
    "--model.decoder.num_heads 10 --model.decoder.num_kv_heads 2 --model.decoder.hidden_size 640",
}
BIG = "--data.global_batch_tokens 16384 --data.micro_batch_tokens 16384"
GPU = f"{NANO} --config configs/hardware/gpu.yaml {BIG} --model.compile false"
GPU_CASES = {
    "135M": f"{GPU} --config configs/model/smollm2_135m.yaml",
    "135M, context 4096": f"{GPU} --config configs/model/smollm2_135m.yaml "
    "--data.context_length 4096",
    "135M, 2 passes": f"{GPU} --config configs/model/smollm2_135m.yaml "
    "--data.global_batch_tokens 32768",
    "135M, compiled": f"{GPU} --config configs/model/smollm2_135m.yaml --model.compile true",
    "3B, full": f"{GPU} --config configs/model/smollm3_3b.yaml "
    "--model.activation_checkpointing full",
}


def measure(flags: list[str]) -> dict[str, Any] | None:
    """Train three steps in this process, and compare.

    Args:
        flags: Of ``train.py fit``.

    Returns:
        Figures of the process of rank 0; None in others.
    """
    from smol.cli import main as train

    flags = [*flags, "--config", "configs/callbacks/none.yaml", "--trainer.max_steps", "3"]
    flags += ["--trainer.limit_val_batches", "0"]
    with tempfile.TemporaryDirectory() as folder:
        run = train(["fit", *flags, "--runs_dir", folder], run=False)
        run.run_folder.mkdir(parents=True, exist_ok=True)
        if torch.cuda.is_available() and run.trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            run.trainer.fit(run.model, run.datamodule)
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = profiled_peak(lambda: run.trainer.fit(run.model, run.datamodule))
    if not run.trainer.is_global_zero:
        return None
    plan = predict(run)
    return {
        "parameters M": sum(p.numel() for p in run.model.parameters()) / 1e6,
        "tokens": run.datamodule.micro_batch_tokens,
        "measured MiB": peak / 2**20,
        "predicted MiB": plan.total / 2**20,
        "error %": (plan.total / peak - 1) * 100,
        "activations MiB": plan.parts.get("activations", 0) / 2**20,
        "worst moment": plan.moment,
    }


def profiled_peak(function: Any) -> int:
    """Bytes of host memory that tensors made by ``function`` take at most at one time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False
    ) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    alive = peak = 0
    for _, size in changes:
        alive += size
        peak = max(peak, alive)
    return peak


def predict(run: Any) -> Any:
    """The plan of a run that was set up by the command line."""
    from lightning.pytorch.strategies import DDPStrategy

    from smol.parallel import FSDP2Strategy
    from smol.planning.memory import Sharding, Work, training_memory

    strategy, data, sharding = run.trainer.strategy, run.datamodule, Sharding()
    if isinstance(strategy, FSDP2Strategy):
        tensor = strategy._tensor_parallel_size
        ranks = run.trainer.world_size // tensor
        sharding = Sharding("fsdp", strategy.shard_size or ranks, tensor)
    elif isinstance(strategy, DDPStrategy):
        sharding = Sharding("ddp")
    work = Work(
        tokens=data.micro_batch_tokens,
        accumulation=data.accumulation,
        precision=run.trainer.precision,
        checkpointing=run.model.activation_checkpointing,
        device=strategy.root_device.type,
    )
    return training_memory(run.model.decoder_config, sharding, work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAME", help="the cases whose name holds this")
    parser.add_argument("--no_record", action="store_true", help="print the figures only")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options, flags = parser.parse_known_args()
    if options.measure:
        if (row := measure(flags)) is not None:
            print(json.dumps(row), flush=True)
        return
    rows, failed = [], []
    for name, case in (GPU_CASES if torch.cuda.is_available() else CASES).items():
        if options.only and options.only not in name:
            continue
        command = [sys.executable, __file__, "--measure", *case.split(), *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            failed.append(f"{name}: {done.stderr.strip().splitlines()[-1]}")
            continue
        (line,) = (line for line in done.stdout.splitlines() if line.startswith('{"parameters M"'))
        rows.append({"case": name} | json.loads(line))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    print("", table(rows), *failed, sep="\n")
    if rows and not options.no_record:
        print(f"kept in {record('memory_plan', rows, ('torch', 'lightning'))}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
