"""A fault as it stands in a configuration."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

from torch import nn

from callbacks.parts.fault_kinds import KINDS, Kind
from smol.errors import UserError, nearest


@dataclass
class Fault:
    """One fault; :class:`callbacks.FaultInjection` tells of the kinds.

    Args:
        kind: What goes wrong.
        step: Completed optimiser steps when it strikes.
        rank: The process it strikes in; null for all.
        micro: The micro-batch of the optimiser step, from 0; null for the last, or for the first
            where the kind strikes between two steps.
        times: In how many optimiser steps it strikes, from ``step`` on; one that is done again is
            another.
        target: Regular expression searched for in names of parameters, or of modules. The first
            match is struck; null for the first parameter, or the last module that has any.
        value: What is written or multiplied with; null for the kind's own.
        seconds: How much longer a slow step takes; null for 1.

    Raises:
        UserError: There is no such kind, a number is too small, or an argument is not for the kind.
    """

    kind: str
    step: int
    rank: int | None = 0
    micro: int | None = None
    times: int = 1
    target: str | None = None
    value: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            hint = nearest(self.kind, KINDS) or f" Expected one of {', '.join(KINDS)}"
            raise UserError(f"there is no fault '{self.kind}'.{hint}")
        first = 1 if self.kind == "nan_moment" else 0  # which a first step has to make
        for name, least in {"step": first, "rank": 0, "micro": 0, "times": 1, "seconds": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"fault {self.kind}: {name} is {value}, expected at least {least}")
        needless = {
            "micro": self.about.when == "reduced",
            "target": self.about.names is None,
            "value": self.about.value is None,
            "seconds": self.kind != "slow_step",
        }
        for name, is_needless in needless.items():
            if is_needless and getattr(self, name) is not None:
                raise UserError(f"fault {self.kind}: it has no {name}; leave that out")
        try:
            re.compile(self.target or "")
        except re.error as error:
            raise UserError(f"fault {self.kind}: target '{self.target}': {error}") from None
        self.value = self.about.value if self.value is None else self.value

    def __str__(self) -> str:
        """In one line, the same after a restart; how often it strikes is no part of it."""
        fields = asdict(self) | {"rank": "all" if self.rank is None else self.rank}
        told = {k: v for k, v in fields.items() if v is not None and k not in ("kind", "times")}
        return ", ".join([self.kind, *(f"{name} {value}" for name, value in told.items())])

    @property
    def about(self) -> Kind:
        return KINDS[self.kind]

    def is_at(self, micro: int, last: bool) -> bool:
        """Whether it strikes in this micro-batch of an optimiser step."""
        if self.micro is not None:
            return micro == self.micro
        return micro == 0 if self.about.when == "between" else last

    def check_target(self, module: nn.Module) -> None:
        """Raise a UserError if the module has nothing of the name of the target."""
        if self.about.names == "parameter":
            next(self.parameters(module))
        elif self.about.names == "module":
            self.submodule(module)

    def parameters(self, module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and trainable parameters that the target matches, at least one."""
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        for name in self._matching(trained, "parameters"):
            yield name, trained[name]

    def submodule(self, module: nn.Module) -> str:
        """Name of the submodule to strike."""
        modules = {name: part for name, part in module.named_modules() if name}
        if self.target is not None:
            return self._matching(modules, "modules")[0]
        owners = (name for name, part in modules.items() if part._parameters)
        return self._matching(owners, "modules with parameters")[-1]

    def _matching(self, names: Iterable[str], what: str) -> list[str]:
        names, target = list(names), self.target or ""
        found = [name for name in names if re.search(target, name)]
        if not found:
            parts = [part for name in names for part in name.split(".")]
            hint = nearest(target, names) or nearest(target.split(".")[-1], parts)
            message = f"target '{target}' matches none of {len(names)} {what}.{hint}"
            raise UserError(f"fault {self.kind}: {message}")
        return found
