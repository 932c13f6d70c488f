"""Muon on matrices and AdamW on everything else, in one optimiser."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Optimizer

from smol.precision import multiplies_bfloat16

# The quintic's coefficients, chosen for a steep slope at zero: Keller Jordan et al., "Muon: An
# optimizer for hidden layers in neural networks", https://kellerjordan.github.io/posts/muon/
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz(matrix: Tensor, steps: int = 5) -> Tensor:
    """Orthogonalise a matrix approximately, in the device's fastest dtype.

    With the singular value decomposition U S V^T, the result is about U V^T: the singular values
    that are not tiny end up between roughly 0.7 and 1.2, which trains as well as exact ones.

    Args:
        matrix: Floating-point matrix, ``(rows, columns)``.
        steps: Iterations.

    Returns:
        ``(rows, columns)`` in bfloat16, or in float32 where that multiplies faster.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.bfloat16() if multiplies_bfloat16(matrix.device.type) else matrix.float()
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(Optimizer):
    """Muon for groups with ``algorithm: muon`` and AdamW for groups with ``algorithm: adamw``.

    Lightning counts every call of ``optimizer.step`` as a step of training, so both update rules
    live in one optimiser. Muon's update is scaled by ``0.2 * sqrt(max(rows, columns))``, so that it
    has the root mean square of AdamW's and the same learning rate and weight decay serve both
    (Liu et al., "Muon is Scalable for LLM Training", arXiv 2502.16982).

    A sharded gradient (``DTensor``) is gathered, orthogonalised on every rank and sharded again.

    Args:
        params: Parameter groups, each with an ``algorithm``.
        lr: Learning rate.
        betas: AdamW's betas.
        eps: AdamW's epsilon.
        weight_decay: Decoupled weight decay of both rules.
        momentum: Decay rate of Muon's momentum, which is Nesterov's.
        ns_steps: Newton–Schulz iterations.
        fused: Whether AdamW uses its fused kernel; None leaves it to torch.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        ns_steps: int = 5,
        fused: bool | None = None,
    ) -> None:
        groups = [{**group, "params": list(group["params"])} for group in params]
        # AdamW's own defaults belong in every group, so it is built first and over all of them.
        self._adamw = AdamW(
            [dict(group) for group in groups],
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            fused=fused,
        )
        super().__init__(
            groups, {**self._adamw.defaults, "momentum": momentum, "ns_steps": ns_steps}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Recomputes the loss and the gradients.

        Returns:
            What ``closure`` returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Shared anew every time: loading a state dict replaces both.
        self._adamw.state = self.state
        self._adamw.param_groups = [g for g in self.param_groups if g["algorithm"] == "adamw"]
        self._adamw.step()
        for group in self.param_groups:
            if group["algorithm"] == "muon":
                self._muon_step(group)
        return loss

    def _muon_step(self, group: dict[str, Any]) -> None:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            buffer = state["momentum_buffer"]
            buffer.lerp_(gradient, 1 - group["momentum"])
            update = _orthogonalised(gradient.lerp(buffer, group["momentum"]), group["ns_steps"])
            scale = 0.2 * math.sqrt(max(parameter.shape))
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update.to(parameter.dtype), alpha=-group["lr"] * scale)


def _orthogonalised(update: Tensor, steps: int) -> Tensor:
    """Apply :func:`newton_schulz` to a matrix or, whole, to a sharded matrix."""
    if not isinstance(update, DTensor):
        return newton_schulz(update, steps)
    whole = newton_schulz(update.full_tensor(), steps)
    # Every rank has computed the same matrix, so each cuts its own shard without communication.
    return distribute_tensor(whole, update.device_mesh, update.placements, src_data_rank=None)
