"""Where a number that is not finite came from."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from callbacks.events import record
from callbacks.parts.collectives import gather
from smol.errors import UserError
from smol.parallel.fsdp import local_part


def find_non_finite(trainer: Any, pl_module: Any, losses: list[Tensor]) -> dict[str, Any]:
    """Processes, micro-batches, gradients and weights with numbers that are not finite.

    Args:
        trainer: Of this process; all of them have to ask.
        pl_module: Whose gradients are there.
        losses: Of the micro-batches of this process, scalars.

    Returns:
        ``losses``, ``gradients`` and ``weights``, each a list with one entry for each process that
        has such: its rank, and the micro-batches or the first ten names.
    """
    micro = [i for i, loss in enumerate(losses) if not math.isfinite(float(loss))]
    named = list(pl_module.named_parameters())
    gradients = [n for n, p in named if p.grad is not None and not _is_finite(p.grad)]
    weights = [name for name, parameter in named if not _is_finite(parameter)]
    mine = {"losses": micro, "gradients": gradients[:10], "weights": weights[:10]}
    every = gather(mine)
    return {
        kind: [
            {"rank": rank, "which": found[kind]} for rank, found in enumerate(every) if found[kind]
        ]
        for kind in mine
    }


@torch.no_grad()
def first_non_finite_module(pl_module: Any, batches: list[Any]) -> str | None:
    """Run micro-batches through the module again, and watch.

    Returns:
        The first submodule whose output is not finite; ``None`` if all are: then the fault does not
        recur, and the hardware is to be suspected rather than data or weights.
    """
    found: list[str] = []
    hooks = []

    def watch(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple | list) else [output]
            if not found and not all(_is_finite(x) for x in outputs if isinstance(x, Tensor)):
                found.append(name)

        return hook

    for name, module in pl_module.named_modules():
        hooks.append(module.register_forward_hook(watch(name)))
    try:
        for i, batch in enumerate(batches):
            pl_module.training_step(batch, i)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def end_diverged(trainer: Any, pl_module: Any, batches: list[Any], verdict: dict) -> NoReturn:
    """End a run that cannot be mended; what is known stays in a folder.

    Raises:
        UserError: Always.
    """
    what = f"{verdict['reason']}; {verdict['why']}"
    record(trainer, "diverged", what, **verdict)
    folder = write_forensics(trainer, pl_module, batches, verdict)
    raise UserError(
        f"training diverged at step {trainer.global_step}: {what}; what is known is in {folder}; "
        "use a lower learning rate, or other data"
    )


def write_forensics(trainer: Any, pl_module: Any, batches: list[Any], verdict: dict) -> Path:
    """Leave what is known of a step that cannot be mended, a folder for each process.

    ``report.json`` holds the verdict, the position and sources of each micro-batch, and the norm of
    each gradient and weight; ``batch-<micro>.safetensors`` the tensors of each micro-batch.

    Returns:
        ``nan_rollback/step-<step>`` in the run folder.
    """
    from safetensors.torch import save_file

    folder = Path(trainer.default_root_dir, "nan_rollback", f"step-{trainer.global_step:08d}")
    mine = folder / f"rank-{trainer.global_rank}"
    mine.mkdir(parents=True, exist_ok=True)
    report = {"verdict": verdict, "batches": []}
    for i, batch in enumerate(batches):
        fields = _fields(batch)
        tensors = {
            k: v.detach().cpu().contiguous().clone()
            for k, v in fields.items()
            if isinstance(v, Tensor)
        }
        save_file(tensors, mine / f"batch-{i}.safetensors")
        report["batches"].append(
            {k: v for k, v in fields.items() if isinstance(v, int | float | str | bool)}
        )
        if "sources" in tensors:
            report["batches"][-1]["sources"] = tensors["sources"].tolist()
    report["norms"] = {
        name: {"weight": _norm(p), "gradient": None if p.grad is None else _norm(p.grad)}
        for name, p in pl_module.named_parameters()
    }
    text = json.dumps(report, indent=1, default=str)
    (mine / "report.json").write_text(text, encoding="utf-8")
    return folder


def _fields(batch: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(batch):
        return vars(batch)
    if isinstance(batch, dict):
        return batch
    items = batch if isinstance(batch, tuple | list) else [batch]
    return {str(i): item for i, item in enumerate(items)}


def _is_finite(tensor: Tensor) -> bool:
    return bool(local_part(tensor).isfinite().all())


def _norm(tensor: Tensor) -> str | float:
    norm = float(torch.linalg.vector_norm(local_part(tensor).float()))
    return norm if math.isfinite(norm) else str(norm)
