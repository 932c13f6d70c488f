"""``src/merge.py`` as a user types it."""

import json
from pathlib import Path

import pytest
from merge_inputs import write_models
from warm_python import python

SCRIPT = Path(__file__).parents[2] / "src" / "merge.py"
LINEAR = """
models: [{model: one, parameters: {weight: 0.9}}, {model: two, parameters: {weight: 0.1}}]
merge_method: linear
"""


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs a recipe's text; returns exit status, output and error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SMOL_ROOT", str(tmp_path))
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import merge

    write_models(tmp_path)

    def run(recipe: str, *flags: str) -> tuple[int, str, str]:
        Path("recipe.yaml").write_text(recipe)
        status = merge.main(["recipe.yaml", *(flags or ["out"])])
        return status, *capsys.readouterr()

    return run


def test_merge(tmp_path):
    """In a process of its own; a relative output lies under the project root."""
    write_models(tmp_path)
    (tmp_path / "recipe.yaml").write_text(
        LINEAR + "parameters: {normalize: {filter: mpl, value: false}}\n"
    )
    words = ("recipe.yaml", "merges/out", "--max_shard_size", "6KB")
    result = python(SCRIPT, *words, cwd=tmp_path, SMOL_ROOT=str(tmp_path))
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines == [
        "note: the filter 'mpl' of normalize is part of no tensor's name",
        f"reads one: {tmp_path / 'one'}",
        f"reads two: {tmp_path / 'two'}",
        f"wrote {tmp_path / 'merges' / 'out'}",
    ]
    index = json.loads((tmp_path / "merges/out/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1


MISTAKES = {
    "no model": (LINEAR.replace("two", "tow"), "there is no model tow: expected a folder, a run"),
    "no hub model": (
        LINEAR.replace("two", "owner/name@v1"),
        "(hf download owner/name --revision v1)",
    ),
    "method": (LINEAR.replace("linear", "liner"), "Did you mean 'linear'?"),
    "base": (LINEAR.replace("linear", "ties"), "ties needs a base_model"),
    "weight": (LINEAR.replace("weight: 0.1", ""), "linear lacks weight of two for"),
    "no effect": (
        LINEAR.replace("weight: 0.1", "t: 0.1"),
        "recipe.yaml: t has no effect in linear",
    ),
    "sum": (LINEAR.replace("0.9", "-0.1"), "lm_head.weight: the weights -0.1, 0.1 add"),
    "slices": (
        "merge_method: slerp\nbase_model: one\nparameters: {t: 0.5}\nslices: [{sources: "
        "[{model: one, layer_range: [0, 3]}, {model: two, layer_range: [0, 3]}]}]",
        "layer_range ends at 3, the models have 4 layers",
    ),
    "yaml": ("models: [", "recipe.yaml is not YAML"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_in_one_line(name, command, tmp_path):
    recipe, message = MISTAKES[name]
    status, _, error = command(recipe)
    assert status == 2
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_mistaken_flags(command, tmp_path):
    assert command(LINEAR, "one")[2].count("would replace or lie in one") == 1
    assert (
        "--max_shard_size is big; expected bytes"
        in command(LINEAR, "out", "--max_shard_size", "big")[2]
    )
    assert command(LINEAR)[0] == 0
    assert "exists and is not empty; name a new folder, or add --force" in command(LINEAR)[2]
    assert command(LINEAR, "out", "--force")[0] == 0
    (tmp_path / "two" / "model.safetensors").write_bytes(b"cut off")
    status, _, error = command(LINEAR, "new")
    assert status == 2
    assert "cannot read the tensors in" in error
    assert "two/model.safetensors" in error
    assert error.count("\n") == 1
