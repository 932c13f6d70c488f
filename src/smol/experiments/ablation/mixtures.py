"""Mixtures as one factor: who replaces one, who is measured on which, and what is repeated."""

from collections.abc import Iterable, Mapping
from typing import Any

from smol.data.card import read_card
from smol.data.pretraining import EPOCHS_TO_WARN
from smol.errors import UserError, nearest, shown
from smol.paths import resolve

Sources = dict[str, dict[str, Any]]


def mixture_of(variant: str, value: Any, below: dict[str, Any]) -> dict[str, Any]:
    """The flags that replace a mixture.

    Args:
        variant: Whose it is.
        value: Weight by source; a new source as ``{path: …, weight: …}``.
        below: The baseline's configuration, with a single stage.

    Raises:
        UserError: There are several stages, or a source is not known.
    """
    stages = {k: s for k, s in (below["data"]["init_args"].get("stages") or {}).items() if s}
    if len(stages) != 1:
        raise UserError(
            f"variant '{variant}' changes the mixture, and the baseline has {len(stages)} stages "
            f"({', '.join(stages) or 'none'}); name the one, as data.stages.NAME.mixture"
        )
    ((stage, settings),) = stages.items()
    named = sources_of(f"variant '{variant}'", value, settings["mixture"])
    gone = {name: None for name in settings["mixture"] if name not in named}
    return {f"data.stages.{stage}.mixture": named | gone}


def sources_of(where: str, value: Any, known: Mapping[str, Any]) -> Sources:
    """Path and weight of each source.

    Args:
        where: For messages.
        value: Weight by source; one that is not known as ``{path: …, weight: …}``.
        known: Sources whose paths are known.

    Raises:
        UserError: A source is not known, or weights are no weights.
    """
    if not isinstance(value, dict) or not value:
        raise UserError(f"{where} expects weights by source, got {shown(value)}")
    named: Sources = {}
    for name, source in value.items():
        source = source if isinstance(source, dict) else {"weight": source}
        path = source.get("path") or (known.get(name) or {}).get("path")
        if path is None:
            raise UserError(
                f"{where}: unknown source '{name}', expected one of {', '.join(known)}, or "
                f"{{path: FOLDER, weight: 1}}.{nearest(name, known)}"
            )
        weight = source.get("weight")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or weight < 0:
            raise UserError(
                f"{where}: the weight of '{name}' is {shown(weight)}, expected 0 or more"
            )
        named[name] = {"path": path, "weight": float(weight)}
    if not sum(source["weight"] for source in named.values()):
        raise UserError(f"{where}: all weights are 0")
    return named


def measured_alike(configs: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """A stage after the end with the sources of all arms, so that all are measured on the same.

    Held-out text is read of every source that a stage names.
    """
    stages = [config["data"]["init_args"].get("stages") or {} for config in configs]
    sources: dict[str, Any] = {}
    names = set()
    for arm in stages:
        mixtures = [stage["mixture"] for stage in arm.values() if stage]
        own = {k: s for mixture in mixtures for k, s in mixture.items() if s and s["weight"]}
        names.add(frozenset(own))
        sources |= own
    if len(names) < 2:
        return {}
    last = next(reversed([stage for stage in stages[0].values() if stage]))
    in_tokens = any((stage or {}).get("start_tokens") for stage in stages[0].values())
    start = {"start_tokens": 10**18} if in_tokens else {"start_step": 10**12}
    same = {key: last[key] for key in ("context_length", "global_batch_tokens") if last.get(key)}
    return {"data.stages.measured": {**start, **same, "mixture": sources}}


def repetition(resolved: dict[str, Any]) -> dict[str, tuple[int, float]]:
    """How much each source of a run is read.

    Args:
        resolved: Complete configuration of a run of one stage.

    Returns:
        Tokens read and epochs by source; without the sources that are not there yet.
    """
    data = resolved["data"]["init_args"]
    stages = [stage for stage in (data.get("stages") or {}).values() if stage]
    first = next((stage for stage in stages if stage.get("start_step") == 0), None)
    if first is None:
        return {}
    batch = first.get("global_batch_tokens") or data["global_batch_tokens"]
    sources = {name: source for name, source in first["mixture"].items() if source}
    total = sum(source["weight"] for source in sources.values())
    read = {}
    for name, source in sources.items():
        tokens = round(resolved["trainer"]["max_steps"] * batch * source["weight"] / total)
        try:
            there = read_card(resolve(source["path"]), data.get("storage_options")).tokens["train"]
        except UserError:
            continue
        read[name] = tokens, tokens / there
    return read


def repetition_warnings(name: str, resolved: dict[str, Any]) -> Iterable[str]:
    """A line for each source that one arm reads too often."""
    for source, (tokens, epochs) in repetition(resolved).items():
        if epochs > EPOCHS_TO_WARN:
            yield (
                f"{name} will read '{source}' {epochs:.1f} times ({tokens:,} tokens); more than "
                f"{EPOCHS_TO_WARN} repetitions are reported to stop helping"
            )
