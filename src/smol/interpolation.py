"""``${…}`` in a configuration: references to other keys, the environment and a little arithmetic.

``${vars.context}`` is the value of another key, ``${oc.env:HOME}`` a variable of the environment,
``${add:a,b}``, ``${mul:a,b}`` and ``${div:a,b}`` compute, ``${root:data/tokens}`` is a path in the
project.
"""

import re
from collections.abc import Iterator
from math import prod
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import (
    GrammarParseError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
)

from smol.config import Config
from smol.errors import UserError, nearest
from smol.paths import resolve


def _numbers(name: str, values: tuple[Any, ...]) -> tuple[int | float, ...]:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"'{name}' expects numbers, got {value!r}")
    return values


def _add(*values: Any) -> int | float:
    return sum(_numbers("add", values))


def _mul(*values: Any) -> int | float:
    return prod(_numbers("mul", values))


def _div(dividend: Any, divisor: Any) -> int:
    _numbers("div", (dividend, divisor))
    if divisor == 0 or dividend % divisor:
        raise UserError(f"'div' expects an exact division, got {dividend} / {divisor}")
    return int(dividend // divisor)


def _root(path: str = "") -> str:
    return str(resolve(path))


RESOLVERS = {"add": _add, "mul": _mul, "div": _div, "root": _root}


def interpolate(config: Config) -> dict[str, Any]:
    """Replace every interpolation, each seen from the top of the merged configuration.

    Args:
        config: The stacked layers; not changed.

    Returns:
        Plain nested mappings and lists.

    Raises:
        UserError: Where a reference leads nowhere, a resolver is unknown or fails, or a value is
            still ``???``.
    """
    for name, resolver in RESOLVERS.items():
        OmegaConf.register_resolver(name, resolver, replace=True)
    try:
        tree = OmegaConf.create(config.values)
        return OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        path = [part for part in re.split(r"[.\[\]]+", error.full_key or "") if part]
        where = ".".join(path)
        source = config.origin(path)
        place = f" ({source})" if source else ""
        raise UserError(f"{where}{place}: {_explain(error, config.values)}") from None


def _explain(error: OmegaConfBaseException, values: dict[str, Any]) -> str:
    message = str(error.msg or error).splitlines()[0]
    if isinstance(error, MissingMandatoryValue):
        return "has no value yet (???); set it in a file or by a flag"
    if found := re.search(r"key '(.+?)' not found|trying to access ([\w.]+):", message):
        key = found[1] or found[2]
        return f"'${{{key}}}' names no key.{nearest(key, _dotted_keys(values))}"
    if isinstance(error, UnsupportedInterpolationType):
        kind = message.rsplit(" ", 1)[-1]
        return f"unknown resolver '{kind}'.{nearest(kind, [*RESOLVERS, 'oc.env'])}"
    if isinstance(error, GrammarParseError):
        return f"cannot be read as an interpolation, {message}"
    return re.sub(r"^\w+ raised while resolving interpolation: ", "", message)


def _dotted_keys(values: dict[str, Any]) -> Iterator[str]:
    for key, value in values.items():
        yield str(key)
        if isinstance(value, dict):
            yield from (f"{key}.{inner}" for inner in _dotted_keys(value))
