"""Losses over pairs of answers to one prompt, a chosen and a rejected one.

Each loss is a function of a score of both answers. The score is the log-probability of the answer
under the policy less that under the reference, in nats, summed over the tokens of the answer; some
losses divide it by the number of those tokens, and SimPO has no reference. :class:`PreferenceLoss`
knows which is which. The implicit reward of an answer is ``beta`` times its score.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from smol.errors import UserError


def dpo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Logistic loss of the difference of rewards (Rafailov et al. 2023, arXiv 2305.18290).

    Args:
        chosen: Scores of the chosen answers, ``(pairs,)``; in this and in all other losses.
        rejected: Scores of the rejected answers, ``(pairs,)``.
        beta: Scale of the rewards.

    Returns:
        ``(pairs,)``, log 2 where both scores are the same.
    """
    return -F.logsigmoid(beta * (chosen - rejected))


def cdpo(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """DPO where a share of the labels is wrong: the expected loss (Mitchell 2023, cDPO).

    https://ericmitchell.ai/cdpo.pdf. The margin is pulled to a finite value, unlike in DPO and in
    :func:`robust`.
    """
    right, wrong = dpo(chosen, rejected, beta), dpo(rejected, chosen, beta)
    return (1 - label_smoothing) * right + label_smoothing * wrong


def robust(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """DPO where a share of the labels is wrong: an unbiased estimate of the loss on right ones.

    Robust DPO (Chowdhury et al. 2024, arXiv 2403.00409); it may be negative.
    """
    right, wrong = dpo(chosen, rejected, beta), dpo(rejected, chosen, beta)
    return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)


def hinge(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """How far the difference of rewards falls short of 1.

    SLiC-HF (Zhao et al. 2023, arXiv 2305.10425), on log-ratios as in RSO (Liu et al. 2023, arXiv
    2309.06657).
    """
    return F.relu(1 - beta * (chosen - rejected))


def ipo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Squared distance of the difference of scores from ``1 / (2 beta)``.

    Azar et al. 2023, arXiv 2310.12036; of scores per token, as its authors have confirmed to TRL.
    """
    return (chosen - rejected - 1 / (2 * beta)).square()


def apo_zero(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Raise the chosen answers and lower the rejected ones, each by itself.

    Anchored preference optimisation (D'Oosterlinck et al. 2024, arXiv 2408.06266), for chosen
    answers that are better than the model's own. Between 0 and 2; its gradient vanishes at both
    ends, so that no pair is pushed for ever.
    """
    return (-beta * chosen).sigmoid() + (beta * rejected).sigmoid()


def apo_down(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Lower the chosen answers, and the rejected ones even more.

    From the paper of :func:`apo_zero`, for chosen answers that are worse than the model's own.
    Between 0 and 2; where policy and reference are the same, chosen answers have no gradient.
    """
    return (beta * chosen).sigmoid() + (-beta * (chosen - rejected)).sigmoid()


def simpo(chosen: Tensor, rejected: Tensor, beta: float, gamma: float) -> Tensor:
    """Logistic loss of the difference of rewards less a margin (Meng et al. 2024).

    SimPO, arXiv 2405.14734; its scores are log-probabilities per token, without a reference.
    """
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


Name = Literal["apo_zero", "apo_down", "dpo", "dpo_norm", "cdpo", "robust", "hinge", "ipo", "simpo"]


class _Kind(NamedTuple):
    function: Callable[..., Tensor]
    per_token: bool = False
    needs_reference: bool = True
    options: tuple[str, ...] = ()


_KINDS = {
    "dpo": _Kind(dpo),
    # Length-normalised DPO, of Tulu 3 (Lambert et al. 2024, arXiv 2411.15124).
    "dpo_norm": _Kind(dpo, per_token=True),
    "cdpo": _Kind(cdpo, options=("label_smoothing",)),
    "robust": _Kind(robust, options=("label_smoothing",)),
    "hinge": _Kind(hinge),
    "ipo": _Kind(ipo, per_token=True),
    "apo_zero": _Kind(apo_zero),
    "apo_down": _Kind(apo_down),
    "simpo": _Kind(simpo, per_token=True, needs_reference=False, options=("gamma",)),
}


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss by name, with its settings.

    Scores per token are some hundred times smaller than their sums, so ``dpo_norm`` and ``simpo``
    want a ``beta`` of a few units where the others want a tenth.

    Args:
        name: Which loss.
        beta: Scale of the rewards; the larger, the sooner the loss is content.
        label_smoothing: Share of pairs whose labels are wrong, of ``cdpo`` and ``robust``.
        gamma: Margin between the rewards that ``simpo`` asks for.

    Raises:
        UserError: a value is out of its range, or is not one of this loss.
    """

    name: Name = "apo_zero"
    beta: float = 0.05
    label_smoothing: float = 0.0
    gamma: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in _KINDS:
            raise UserError(f"loss name is {self.name!r}; expected one of {', '.join(_KINDS)}")
        if not 0 < self.beta < math.inf:
            raise UserError(f"loss beta is {self.beta}; expected a number above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(
                f"loss label_smoothing is {self.label_smoothing}; expected 0 <= it < 0.5"
            )
        for option in ("label_smoothing", "gamma"):
            value = getattr(self, option)
            if value and option not in _KINDS[self.name].options:
                owners = " and ".join(name for name, k in _KINDS.items() if option in k.options)
                raise UserError(
                    f"loss {option} is {value}, which '{self.name}' lacks; it belongs to {owners}: "
                    "leave it out, or change loss.name"
                )

    @property
    def needs_reference(self) -> bool:
        """Whether the score is relative to a reference model."""
        return _KINDS[self.name].needs_reference

    def __call__(
        self, log_probs: Tensor, reference: Tensor | None, lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute the loss and the rewards of pairs.

        Args:
            log_probs: Log-probability of the answers under the policy in nats, summed over their
                tokens; ``(pairs, 2)``, the chosen one first, float32.
            reference: The same under the reference model; not looked at by a loss without one.
            lengths: Tokens of the answers, ``(pairs, 2)``, at least 1.

        Returns:
            Loss of each pair, ``(pairs,)``, and reward of each answer, ``(pairs, 2)``, detached.
        """
        kind = _KINDS[self.name]
        scores = log_probs - reference if kind.needs_reference else log_probs
        if kind.per_token:
            scores = scores / lengths
        options = {option: getattr(self, option) for option in kind.options}
        loss = kind.function(*scores.unbind(1), self.beta, **options)
        return loss, self.beta * scores.detach()
