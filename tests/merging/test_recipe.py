"""Recipes: parameters by layer and name, and mistakes in one line."""

import pytest
import torch

from smol.errors import UserError
from smol.merging import load_recipe, parse_recipe

PAIR = "models: [{model: a, parameters: {weight: 0.9}}, {model: b, parameters: {weight: 0.1}}]\n"
LINEAR = PAIR + "merge_method: linear\n"
SLERP = "models: [{model: a}, {model: b}]\nmerge_method: slerp\nbase_model: b\n"


def layer(i: int, name: str = "mlp.up_proj") -> str:
    return f"model.layers.{i}.{name}.weight"


def test_what_a_recipe_says():
    recipe = parse_recipe(SLERP + "parameters: {t: 0.5}\ndtype: float32\nout_dtype: bfloat16\n")
    assert recipe.models == ("b", "a")  # the base first
    assert (recipe.base, recipe.donor, recipe.others) == ("b", "b", ("a",))
    assert (recipe.dtype, recipe.out_dtype) == (torch.float32, torch.bfloat16)
    assert parse_recipe(LINEAR).models == ("a", "b")


def test_a_gradient_runs_over_the_layers():
    recipe = parse_recipe(SLERP + "parameters: {t: [0, 1, 0.5]}\n")
    values = [recipe.parameters(layer(i), layers=9)["t"] for i in range(9)]
    assert values == pytest.approx([0, 0.25, 0.5, 0.75, 1, 0.875, 0.75, 0.625, 0.5])
    assert recipe.parameters("model.norm.weight", layers=9)["t"] == 0
    assert recipe.parameters(layer(0), layers=1)["t"] == 0.5


def test_the_first_filter_that_fits_counts():
    recipe = parse_recipe(
        SLERP + "parameters: {t: [{filter: mlp, value: [0, 1]}, {filter: up, value: 7}, "
        "{filter: '*', value: 1e-1}]}\n"
    )
    assert recipe.parameters(layer(2), layers=3)["t"] == 1
    assert recipe.parameters(layer(2, "self_attn.up"), layers=3)["t"] == 7
    assert recipe.parameters(layer(2, "self_attn.q_proj"), layers=3)["t"] == pytest.approx(0.1)


def test_what_is_nearest_to_the_model_wins():
    recipe = parse_recipe(
        "models:\n"
        "- {model: a, parameters: {weight: 0.9}}\n"
        "- {model: b, parameters: {weight: [{filter: mlp, value: 3}]}}\n"
        "- {model: c}\n"
        "base_model: d\nmerge_method: ties\nparameters: {weight: 1, density: 0.5, lambda: 2}\n"
    )
    found = recipe.parameters(layer(0), layers=2)
    assert (found["weight"], found["density"], found["lambda_"]) == ([0.9, 3, 1], [0.5] * 3, 2)
    assert (found["normalize"], found["rescale"]) == (True, False)
    assert recipe.parameters("lm_head.weight", layers=2)["weight"] == [0.9, 1, 1]


def test_a_slice_over_all_layers_is_a_list_of_models():
    recipe = parse_recipe(
        "slices:\n- sources:\n  - {model: a, layer_range: [0, 3]}\n"
        "  - {model: b, layer_range: [0, 3], parameters: {weight: 2}}\n"
        "  parameters: {weight: 5}\nmerge_method: linear\nparameters: {weight: 1}\n"
    )
    assert (recipe.models, recipe.layers) == (("a", "b"), 3)
    assert recipe.parameters("x", layers=3)["weight"] == [5, 2]


def test_the_tokenizer_of_a_model_can_be_named():
    assert parse_recipe(LINEAR).tokenizer_source is None
    for text, source in (
        ("tokenizer_source: b\n", "b"),
        ("tokenizer: {source: b}\n", "b"),
        ("tokenizer_source: union\n", "a"),
        ("tokenizer_source: base\nbase_model: b\n", "b"),
    ):
        assert parse_recipe(LINEAR + text).tokenizer_source == source


def test_what_may_be_a_mistake_is_told():
    recipe = parse_recipe(SLERP + "parameters: {t: [{filter: mpl, value: 1}, {value: [0, 5]}]}\n")
    assert recipe.notes([layer(0)]) == [
        "t is 5, outside of 0 to 1, and goes beyond the models",
        "the filter 'mpl' of t is part of no tensor's name",
    ]
    assert not parse_recipe(LINEAR + "parameters: {int8_mask: true}\n").notes([layer(0)])


TIES = """
models: [{model: a, parameters: {%s}}, {model: b, parameters: {%s}}]
base_model: b
merge_method: ties
parameters: {weight: 1, %s}
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            SLERP + "parameters: {t: 0.5, density: 0.5}",
            "density has no effect in slerp; expected t",
        ),
        (LINEAR + "parameters: {lambda: 2}", "lambda .* in linear; expected normalize, weight"),
        (PAIR.replace("weight: 0.1", "t: 1") + "merge_method: linear", "t has no effect in linear"),
        (TIES % ("lambda: 0.1", "", ""), "lambda of a has no effect, for it counts for all models"),
        (TIES % ("normalize: false", "", ""), "normalize of a .* under parameters on top"),
        (TIES % ("", "density: 0.5", ""), "density of b has no effect, for it is the base"),
        (TIES % ("", "", "t: 0.5"), "t has no effect in ties; expected density, lambda, normalize"),
    ],
)
def test_what_has_no_effect_is_refused(text, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_recipe(text)
    assert "\n" not in str(caught.value)
    parse_recipe(TIES % ("weight: 2", "", "density: 0.5, int8_mask: true"))


MISTAKES = {
    "nothing": ("", "a recipe is null; expected keys and values"),
    "key": (LINEAR + "paramters: {}", "'paramters'; .* Did you mean 'parameters'"),
    "method": (PAIR + "merge_method: tis", "'tis' .* is not supported.* Did you mean 'ties'"),
    "method list": (PAIR + "merge_method: [linear]", "merge_method .* is not supported; expected"),
    "passthrough": (PAIR + "merge_method: passthrough", "'passthrough' .* is not supported"),
    "both": (LINEAR + "slices: []", "either models or slices"),
    "modules": (LINEAR + "modules: {}", "'modules', which is not supported; write models"),
    "template": (LINEAR + "chat_template: auto", "'chat_template', which is not supported"),
    "models": ("models: a\nmerge_method: linear", "models is 'a' .*; expected a list"),
    "model": ("models: [{name: a}]\nmerge_method: linear", "an entry of models has the key 'name'"),
    "twice": ("models: [{model: a}, {model: a}]\nmerge_method: linear", "a is there twice"),
    "base": (PAIR + "merge_method: ties", "ties needs a base_model"),
    "count": (PAIR + "merge_method: slerp\nbase_model: c", "takes 1 model beside its base; .* 2"),
    "stock": (PAIR + "merge_method: model_stock\nbase_model: a", "2 or more models beside"),
    "parameter": (LINEAR + "parameters: {wieght: 1}", "'wieght'; .* Did you mean 'weight'"),
    "number": (LINEAR + "parameters: {weight: much}", "weight is 'much' .*; expected a number"),
    "gradient": (LINEAR + "parameters: {weight: [1, x]}", "weight is .*; expected a number"),
    "infinite": (LINEAR + "parameters: {weight: .inf}", "expected a number"),
    "bool": (LINEAR + "parameters: {normalize: 0.5}", "normalize is 0.5 .*; expected true or"),
    "share": (LINEAR + "parameters: {density: 50}", "density is 50 .*; expected a share between"),
    "filter": (LINEAR + "parameters: {weight: [{filter: 3, value: 1}]}", "expected {filter: mlp"),
    "dtype": (LINEAR + "dtype: fp16", "dtype is 'fp16' .*; expected one of float32"),
    "tokenizer": (LINEAR + "tokenizer_source: c", "'c' .*; expected base, union or one of a, b"),
    "tokens": (LINEAR + "tokenizer: {tokens: {}}", "'tokens', which is not supported"),
    "stack": (
        "slices: [{sources: [{model: a, layer_range: [0, 2]}]}, {sources: []}]\n"
        "merge_method: linear",
        "only a single slice over all layers",
    ),
    "part": (
        "slices: [{sources: [{model: a, layer_range: [1, 2]}]}]\nmerge_method: linear",
        r"layer_range is \[1, 2\]; expected all layers",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name):
    text, message = MISTAKES[name]
    with pytest.raises(UserError, match=message) as caught:
        parse_recipe(text)
    assert "\n" not in str(caught.value)


def test_a_parameter_without_a_default_must_be_there():
    recipe = parse_recipe("models: [{model: a}, {model: b}]\nmerge_method: linear\n")
    with pytest.raises(UserError, match=r"linear lacks weight of a for lm_head.weight; write it"):
        recipe.parameters("lm_head.weight", layers=2)
    with pytest.raises(UserError, match="slerp lacks t for .* under parameters"):
        parse_recipe(SLERP).parameters("lm_head.weight", layers=2)


def test_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no recipe at .*none\.yaml; examples are in"):
        load_recipe(tmp_path / "none.yaml")
    for text, message in (("a: [", "r.yaml is not YAML"), ("a: 1", "r.yaml: a recipe has the key")):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(UserError, match=message) as caught:
            load_recipe(tmp_path / "r.yaml")
        assert "\n" not in str(caught.value)
