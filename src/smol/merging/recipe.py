"""Recipes in mergekit's vocabulary: which models are merged, how, and with which parameters.

A parameter is a number, a gradient (numbers spread evenly over the layers, interpolated between),
or a list of these with a ``filter`` each, of which the first that is part of the tensor's name
counts. It stands with a model, with a slice, or on top for all; the nearest to the model wins.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from smol.errors import UserError, nearest, shown
from smol.merging.methods import METHODS, REQUIRED, Method

KEYS = ("merge_method", "base_model", "models", "slices", "parameters")
KEYS += ("dtype", "out_dtype", "tokenizer_source", "tokenizer")
REFUSED = {
    "modules": "write models",
    "chat_template": "the tokenizer's own goes along, see tokenizer_source",
}
NO_EFFECT = {"int8_mask"}  # saves memory in mergekit, and changes no value
DTYPES = ("float32", "bfloat16", "float16", "float64")
SHARES = ("density", "gamma")  # between 0 and 1

_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Rule:
    """What a parameter is for some tensors.

    Attributes:
        filter: Part of the tensor's name; None for all.
        values: One value, or a gradient over the layers.
    """

    filter: str | None
    values: tuple[Any, ...]

    def matches(self, tensor: str) -> bool:
        """Whether it is for this tensor."""
        return self.filter is None or self.filter in tensor

    def at(self, position: float) -> Any:
        """The value at a share of the way from the first to the last layer."""
        scaled = position * (len(self.values) - 1)
        low = int(scaled)
        if scaled == low:
            return self.values[low]
        return (low + 1 - scaled) * self.values[low] + (scaled - low) * self.values[low + 1]


Scope = Mapping[str, tuple[Rule, ...]]


@dataclass(frozen=True)
class Recipe:
    """A merge, as a file describes it.

    Attributes:
        text: The file.
        method_name: Key of ``METHODS``.
        models: Names as they are written; the base model comes first where the method has one.
        base: The base model.
        shared: Parameters of the whole merge, the most particular scope first.
        each: The same by model.
        layers: What a slice says of the number of layers.
        dtype: Of the arithmetic; None for what the tensors have.
        out_dtype: Of the result; None for that of the arithmetic.
        tokenizer_source: The model whose tokenizer goes along; None for the base or the first one.
    """

    text: str
    method_name: str
    models: tuple[str, ...]
    base: str | None
    shared: tuple[Scope, ...]
    each: Mapping[str, tuple[Scope, ...]]
    layers: int | None
    dtype: torch.dtype | None
    out_dtype: torch.dtype | None
    tokenizer_source: str | None

    @property
    def method(self) -> Method:
        """How the tensors of one name become one."""
        return METHODS[self.method_name]

    @property
    def others(self) -> tuple[str, ...]:
        """The models that have parameters of their own."""
        return self.models[1:] if self.method.has_base else self.models

    @property
    def donor(self) -> str:
        """The model whose configuration the result has."""
        return self.base or self.models[0]

    def parameters(self, tensor: str, layers: int) -> dict[str, Any]:
        """The arguments of the method's function for one tensor.

        Args:
            tensor: Name. What belongs to no layer has the first value of a gradient.
            layers: Number of layers.

        Raises:
            UserError: If a parameter without a default is missing.
        """
        found = _LAYER.search(tensor)
        position = 0.0 if found is None else 1.0 if layers == 1 else int(found[1]) / (layers - 1)
        result: dict[str, Any] = {}
        for name, default in self.method.shared.items():
            result[name] = self._value(name, default, self.shared, tensor, position)
        for name, default in self.method.each.items():
            result[name] = [
                self._value(name, default, self.each[model], tensor, position, model)
                for model in self.others
            ]
        if "lambda" in result:
            result["lambda_"] = result.pop("lambda")
        return result

    def check_effects(self) -> None:
        """See that every parameter does something where it is written.

        Raises:
            UserError: If the method has no such parameter, or not for a single model.
        """
        shared, each = self.method.shared.keys(), self.method.each.keys()
        own = {model: scopes[0].keys() - NO_EFFECT for model, scopes in self.each.items()}
        for key in sorted({key for scope in (*self.shared, *own.values()) for key in scope}):
            if key not in shared | each | NO_EFFECT:
                raise UserError(
                    f"{key} has no effect in {self.method_name}; expected "
                    f"{', '.join(sorted(shared | each)) or 'no parameter'}"
                )
        for model, keys in own.items():
            if model not in self.others and keys:
                raise UserError(
                    f"{min(keys)} of {model} has no effect, for it is the base; remove it"
                )
            if keys & shared:
                raise UserError(
                    f"{min(keys & shared)} of {model} has no effect, for it counts for all models; "
                    "write it under parameters on top"
                )

    def notes(self, tensors: Iterable[str]) -> list[str]:
        """What is written and may be a mistake.

        Args:
            tensors: Names of all tensors.
        """
        tensors = list(tensors)
        scopes = {id(scope): scope for scopes in self.each.values() for scope in scopes}.values()
        notes = [
            f"t is {value:g}, outside of 0 to 1, and goes beyond the models"
            for scope in self.shared
            for rule in scope.get("t", ())
            for value in rule.values
            if not 0 <= value <= 1
        ]
        notes += [
            f"the filter '{rule.filter}' of {key} is part of no tensor's name"
            for scope in scopes
            for key, rules in scope.items()
            for rule in rules
            if not any(map(rule.matches, tensors))
        ]
        return sorted(set(notes))

    def _value(
        self,
        name: str,
        default: Any,
        scopes: Iterable[Scope],
        tensor: str,
        position: float,
        model: str | None = None,
    ) -> Any:
        for scope in scopes:
            for rule in scope.get(name, ()):
                if rule.matches(tensor):
                    return rule.at(position)
        if default is REQUIRED:
            whose, where = (
                ("", "parameters") if model is None else (f" of {model}", "its parameters")
            )
            raise UserError(
                f"{self.method_name} lacks {name}{whose} for {tensor}; write it under {where}, "
                f"such as {name}: 0.5"
            )
        return default


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe from a YAML file.

    Raises:
        UserError: If it is missing, is no YAML, or says something that cannot be done.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no recipe at {path}; examples are in configs/merges")
    try:
        text = path.read_text(encoding="utf-8")
        return parse_recipe(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def parse_recipe(text: str) -> Recipe:
    """Read a recipe from the text of its file.

    Raises:
        UserError: If it says something that cannot be done.
        yaml.YAMLError: If it is no YAML.
    """
    content = _mapping(yaml.safe_load(text), "a recipe", KEYS, REFUSED)
    name = content.get("merge_method")
    if not isinstance(name, str) or name not in METHODS:
        raise UserError(
            f"merge_method {shown(name)} is not supported; expected one of {', '.join(METHODS)}."
            f"{nearest(str(name), METHODS, 0.7)}"
        )
    method = METHODS[name]
    top = _scope(content, "parameters")
    entries, scopes, base, layers = _entries(content)
    base = content.get("base_model", base)
    if method.has_base and base is None:
        raise UserError(f"{name} needs a base_model; add base_model: FOLDER")
    if base is not None and not isinstance(base, str):
        raise UserError(f"base_model is {shown(base)}; expected the name of a model")
    if base is not None and base not in entries:
        entries |= {base: {}}
    if method.has_base:
        entries = {base: entries[base]} | entries
    least, most = method.others
    if not least <= (others := len(entries) - method.has_base) <= most:
        wanted = f"{least} model" if least == most else f"{least} or more models"
        raise UserError(f"{name} takes {wanted} beside its base; the recipe names {others}")
    recipe = Recipe(
        text,
        name,
        tuple(entries),
        base,
        (*scopes, top),
        {model: (scope, *scopes, top) for model, scope in entries.items()},
        layers,
        _dtype(content, "dtype"),
        _dtype(content, "out_dtype"),
        _tokenizer_source(content, tuple(entries), base),
    )
    recipe.check_effects()
    return recipe


def _entries(
    content: Mapping[str, Any],
) -> tuple[dict[str, Scope], tuple[Scope, ...], str | None, int | None]:
    """Models and their parameters; those of a slice, its base model and its number of layers."""
    if ("models" in content) == ("slices" in content):
        raise UserError("a recipe has either models or slices; write models: [{model: FOLDER}, …]")
    if "models" in content:
        return _models(content["models"], "models", ("model", "parameters")), (), None, None
    slices = content["slices"]
    if not isinstance(slices, list) or len(slices) != 1:
        raise UserError(
            "slices: only a single slice over all layers is supported, no layers are stacked; "
            "write models"
        )
    piece = _mapping(slices[0], "a slice", ("sources", "parameters", "base_model"), {})
    sources = piece.get("sources")
    entries = _models(sources, "sources", ("model", "parameters", "layer_range"))
    ranges = [source.get("layer_range") for source in sources]
    whole = all(isinstance(r, list) and len(r) == 2 and r == [0, ranges[0][1]] for r in ranges)
    if not whole:
        raise UserError(
            f"slices: layer_range is {', '.join(map(str, ranges))}; expected all layers of every "
            "model, such as [0, 30]; write models"
        )
    return entries, (_scope(piece, "parameters"),), piece.get("base_model"), ranges[0][1]


def _models(items: Any, what: str, keys: Iterable[str]) -> dict[str, Scope]:
    if not isinstance(items, list) or not items:
        raise UserError(f"{what} is {shown(items)}; expected a list of model: FOLDER")
    entries: dict[str, Scope] = {}
    for item in items:
        item = _mapping(item, f"an entry of {what}", keys, {})
        name = item.get("model")
        if not isinstance(name, str):
            raise UserError(f"{what}: model is {shown(name)}; expected a folder or a hub name")
        if name in entries:
            raise UserError(f"{what}: {name} is there twice; add up its weights")
        entries[name] = _scope(item, f"parameters of {name}")
    return entries


def _scope(content: Mapping[str, Any], what: str) -> Scope:
    known = {"weight": 0.0} | {
        k: v for m in METHODS.values() for k, v in (m.shared | m.each).items()
    }
    parameters = content.get("parameters")
    found = _mapping({} if parameters is None else parameters, what, [*known, *NO_EFFECT], {})
    return {
        name: _rules(setting, f"{what}: {name}", name, isinstance(known.get(name, True), bool))
        for name, setting in found.items()
    }


def _rules(setting: Any, where: str, name: str, is_bool: bool) -> tuple[Rule, ...]:
    conditional = setting if isinstance(setting, list) else [setting]
    if not all(isinstance(item, dict) for item in conditional) or not conditional:
        return (Rule(None, _values(setting, where, name, is_bool)),)
    rules = []
    for item in conditional:
        item = _mapping(item, where, ("filter", "value"), {})
        part = item.get("filter")
        if "value" not in item or not isinstance(part, str | None):
            raise UserError(f"{where} has {shown(item)}; expected {{filter: mlp, value: 0.5}}")
        values = _values(item["value"], where, name, is_bool)
        rules.append(Rule(None if part == "*" else part, values))
    return tuple(rules)


def _values(setting: Any, where: str, name: str, is_bool: bool) -> tuple[Any, ...]:
    if is_bool:
        if not isinstance(setting, bool):
            raise UserError(f"{where} is {shown(setting)}; expected true or false")
        return (setting,)
    items = setting if isinstance(setting, list) and setting else [setting]
    try:
        # YAML reads 1e-3 as a text.
        values = tuple(float(item) for item in items if not isinstance(item, bool))
    except (TypeError, ValueError):
        values = ()
    if len(values) < len(items) or not all(map(math.isfinite, values)):
        raise UserError(f"{where} is {shown(setting)}; expected a number or a list of numbers")
    if name in SHARES and not all(0 <= value <= 1 for value in values):
        raise UserError(f"{where} is {shown(setting)}; expected a share between 0 and 1")
    return values


def _dtype(content: Mapping[str, Any], key: str) -> torch.dtype | None:
    name = content.get(key)
    if name is None:
        return None
    if str(name).removeprefix("torch.") not in DTYPES:
        raise UserError(f"{key} is {shown(name)}; expected one of {', '.join(DTYPES)}")
    return getattr(torch, name.removeprefix("torch."))


def _tokenizer_source(
    content: Mapping[str, Any], models: tuple[str, ...], base: str | None
) -> str | None:
    """The model whose tokenizer goes along. All vocabularies are equal, and so is their union."""
    source = content.get("tokenizer_source")
    if content.get("tokenizer") is not None:
        keys = ("tokens", "pad_to_multiple_of")
        refused = dict.fromkeys(keys, "all vocabularies must be equal")
        source = _mapping(content["tokenizer"], "tokenizer", ("source",), refused).get("source")
    if source in (None, "base", "union"):
        return source and (base or models[0])
    if source not in models:
        raise UserError(
            f"tokenizer_source is {shown(source)}; expected base, union or one of "
            f"{', '.join(models)}"
        )
    return source


def _mapping(
    value: Any, what: str, keys: Iterable[str], refused: Mapping[str, str]
) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{what} is {shown(value)}; expected keys and values")
    keys = list(keys)
    for key in value:
        if key in refused:
            raise UserError(f"{what} has the key '{key}', which is not supported; {refused[key]}")
        if key not in keys:
            raise UserError(
                f"{what} has the key '{key}'; expected {', '.join(keys)}.{nearest(str(key), keys)}"
            )
    return value
