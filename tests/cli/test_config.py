"""Layered files: how they merge, what a flag sets, what is refused."""

import random
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smol.cli import parse_command_line
from smol.config import Config, Layer, compose, dump_yaml, load_config, merge, parse_yaml
from smol.errors import UserError
from smol.interpolation import interpolate
from smol.paths import is_url, project_root, resolve

LEAVES = st.none() | st.integers(-9, 9) | st.text(max_size=3) | st.lists(st.integers(0, 3))


def trees(depth: int = 3) -> st.SearchStrategy[dict[str, Any]]:
    """Mappings in which a key always holds the same kind: ``k…`` a leaf, ``m…`` a mapping."""
    leaves = st.dictionaries(st.sampled_from(["k0", "k1", "k2"]), LEAVES)
    if depth == 0:
        return leaves
    inner = st.dictionaries(st.sampled_from(["m0", "m1"]), trees(depth - 1))
    return st.builds(lambda a, b: {**a, **b}, leaves, inner)


def leaves_of(tree: dict[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Path to leaf, in which an empty mapping counts as a leaf."""
    found = {}
    for key, value in tree.items():
        inner = leaves_of(value, (*path, key)) if isinstance(value, dict) and value else None
        found.update(inner if inner is not None else {(*path, key): value})
    return found


class TestMerge:
    @given(trees(), trees(), trees())
    def test_is_associative_where_kinds_agree(self, a: dict, b: dict, c: dict) -> None:
        assert merge(merge(a, b), c) == merge(a, merge(b, c))

    @given(trees(), trees())
    def test_leaves_above_win_and_others_stay(self, below: dict, above: dict) -> None:
        expected = {**leaves_of(below), **leaves_of(above)}
        got = leaves_of(merge(below, above))
        for path, value in got.items():
            assert expected.get(path, {}) == value
        assert {p for p, v in expected.items() if v != {}} <= got.keys()

    @given(trees(), trees())
    def test_changes_neither_side_and_shares_nothing_with_above(self, a: dict, b: dict) -> None:
        kept = deepcopy(a), deepcopy(b)
        merged = merge(a, b)
        assert (a, b) == kept
        for key in merged:
            if isinstance(merged[key], list):
                merged[key].append("changed")
        assert b == kept[1]

    @given(trees())
    def test_neutral_and_idempotent(self, a: dict) -> None:
        assert merge(a, {}) == merge({}, a) == merge(a, a) == a

    def test_a_list_replaces(self) -> None:
        assert merge({"x": [1, 2, 3]}, {"x": [4]}) == {"x": [4]}

    def test_null_then_set_again_starts_afresh(self) -> None:
        full, none, again = {"x": {"a": 1, "b": 2}}, {"x": None}, {"x": {"b": 3}}
        assert merge(full, none) == {"x": None}
        assert merge(merge(full, none), again) == {"x": {"b": 3}}

    def test_class_swap_drops_arguments(self) -> None:
        below = {"class_path": "p.A", "init_args": {"a": 1}, "dict_kwargs": {"b": 2}}
        assert merge(below, {"class_path": "p.B"}) == {"class_path": "p.B"}
        assert merge(below, {"class_path": "p.B", "init_args": {"c": 3}}) == {
            "class_path": "p.B",
            "init_args": {"c": 3},
        }
        assert merge(below, "p.B") == {"class_path": "p.B"}

    def test_same_class_keeps_arguments(self) -> None:
        below = {"class_path": "p.A", "init_args": {"a": 1}}
        for above in ({"class_path": "p.A"}, "p.A", {}):
            assert merge(below, above) == below
        assert merge(below, {"init_args": {"b": 2}})["init_args"] == {"a": 1, "b": 2}
        assert merge("p.A", {"init_args": {"b": 2}}) == {
            "class_path": "p.A",
            "init_args": {"b": 2},
        }

    def test_a_word_over_a_class_is_a_word(self) -> None:
        assert merge({"class_path": "p.FSDP", "init_args": {"a": 1}}, "auto") == "auto"

    def test_swap_applies_at_any_depth(self) -> None:
        below = {"m": {"init_args": {"att": {"class_path": "p.A", "init_args": {"a": 1}}}}}
        above = {"m": {"init_args": {"att": {"class_path": "p.B"}}}}
        assert merge(below, above) == above


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


class TestFiles:
    @pytest.fixture(autouse=True)
    def in_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("SMOL_ROOT", str(tmp_path))

    def test_extends_lies_below_and_is_relative_to_its_file(self, tmp_path: Path) -> None:
        (tmp_path / "sub").mkdir()
        write(tmp_path, base="a: 1\nb: 1\nc: 1")
        write(tmp_path / "sub", mid="extends: ../base.yaml\nb: 2\nc: 2")
        write(tmp_path / "sub", top="extends: [mid.yaml]\nc: 3")
        assert load_config(["sub/top.yaml"]) == {"a": 1, "b": 2, "c": 3}

    def test_order_of_overlays_decides(self, tmp_path: Path) -> None:
        write(tmp_path, base="x: 0\nonly: base", left="x: 1\nl: 1", right="x: 2\nr: 2")
        one = load_config(["base.yaml", "left.yaml", "right.yaml"])
        two = load_config(["base.yaml", "right.yaml", "left.yaml"])
        assert one == {"x": 2, "only": "base", "l": 1, "r": 2}
        assert two == {**one, "x": 1}

    def test_shared_base_does_not_undo_the_first_overlay(self, tmp_path: Path) -> None:
        write(tmp_path, base="x: 0\ny: 0", left="extends: base.yaml\nx: 1")
        write(tmp_path, right="extends: base.yaml\ny: 2", both="extends: [left.yaml, right.yaml]")
        assert load_config(["left.yaml", "right.yaml"]) == {"x": 1, "y": 2}
        assert load_config(["both.yaml"]) == {"x": 1, "y": 2}

    def test_a_file_named_again_applies_again(self, tmp_path: Path) -> None:
        write(tmp_path, one="x: 1", two="x: 2")
        assert load_config(["one.yaml", "two.yaml", "one.yaml"]) == {"x": 1}

    def test_looked_up_in_the_working_directory_then_in_the_root(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "away").mkdir()
        write(tmp_path, both="x: root", root="x: root")
        write(tmp_path / "away", both="x: away")
        monkeypatch.chdir(tmp_path / "away")
        assert load_config(["both.yaml"]) == {"x": "away"}
        assert load_config(["root.yaml"]) == {"x": "root"}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a: 1\nb: [2", "f.yaml:2: bad YAML, expected ',' or ']', but got '<stream end>'"),
            ("a:\n  b: 1\n  b: 2", "f.yaml:3: bad YAML, duplicate key 'b'"),
            ("- a", "f.yaml: expected a mapping, got a list"),
            ("a: &x {b: *x}", "f.yaml: bad YAML, nested too deeply or within itself"),
            (f"a: {'[' * 3000}", "f.yaml: bad YAML, nested too deeply or within itself"),
            ("a: 1\nnull: 2", "f.yaml:2: bad YAML, expected a name before the colon"),
            ("[1, 2]: 2", "f.yaml:1: bad YAML, expected a name before the colon"),
            ("extends: 3", "extends (f.yaml): expected a file or a list, got 3 (int)"),
            ("extends: [3]", "extends (f.yaml): expected a file or a list, got [3] (list)"),
            (
                "extends: bse.yaml",
                "f.yaml: extends file 'bse.yaml' not found in {root}. Did you mean 'base.yaml'?",
            ),
            ("extends: f.yaml", "extends goes round in a circle: f.yaml -> f.yaml"),
            (
                "extends: loop.yaml",
                "extends goes round in a circle: f.yaml -> loop.yaml -> f.yaml",
            ),
        ],
    )
    def test_refused(self, tmp_path: Path, text: str, message: str) -> None:
        write(tmp_path, f=text, base="a: 1", loop="extends: f.yaml")
        with pytest.raises(UserError) as error:
            load_config(["f.yaml"])
        assert str(error.value) == message.format(root=tmp_path)

    def test_missing_file(self, tmp_path: Path) -> None:
        write(tmp_path, stage1="a: 1")
        with pytest.raises(UserError) as error:
            load_config(["stge1.yaml"])
        assert str(error.value) == (
            f"config file 'stge1.yaml' not found in {tmp_path}. Did you mean 'stage1.yaml'?"
        )

    def test_origin_is_the_highest_layer_that_sets_a_key(self, tmp_path: Path) -> None:
        write(tmp_path, low="a: {x: 1, y: 1}", high="a: {x: 2}")
        config = compose(["low.yaml", "high.yaml"], {"b": 3})
        origins = [config.origin(path) for path in (["a", "x"], ["a", "y"], ["b"], ["c"])]
        assert origins == ["high.yaml", "low.yaml", "--b", None]


class TestOverrides:
    BELOW: ClassVar = {
        "vars": {"x": 1, "y": {"z": 2}},
        "model": {"class_path": "p.M", "init_args": {"decoder": {"hidden": 3, "layers": 1}}},
        "callbacks": {"a": {"class_path": "p.A", "init_args": {"every": 5}}, "b": {}},
        "list": [1],
    }

    def load(self, **flags: Any) -> dict[str, Any]:
        config = {key.replace("__", "."): value for key, value in flags.items()}
        self.path.write_text(dump_yaml(self.BELOW))
        return load_config([self.path], config)

    @pytest.fixture(autouse=True)
    def below(self, tmp_path: Path) -> None:
        self.path = tmp_path / "below.yaml"

    def test_one_entry_of_a_mapping(self) -> None:
        assert self.load(vars__x=9)["vars"] == {"x": 9, "y": {"z": 2}}
        assert self.load(vars__y__z=9)["vars"] == {"x": 1, "y": {"z": 9}}
        assert self.load(vars__new=9)["vars"] == {"x": 1, "y": {"z": 2}, "new": 9}

    def test_init_args_may_be_left_out(self) -> None:
        short = self.load(model__decoder__hidden=7)
        assert short == self.load(model__init_args__decoder__hidden=7)
        assert short["model"]["init_args"]["decoder"] == {"hidden": 7, "layers": 1}
        assert self.load(callbacks__a__every=7)["callbacks"]["a"]["init_args"] == {"every": 7}

    def test_swap_remove_and_add_by_name(self) -> None:
        swapped = self.load(callbacks__a="p.Other")["callbacks"]
        assert swapped == {"a": {"class_path": "p.Other"}, "b": {}}
        assert self.load(callbacks__a=None)["callbacks"] == {"a": None, "b": {}}
        added = self.load(callbacks__c="p.C", callbacks__c__every=2)["callbacks"]
        assert added["c"] == {"class_path": "p.C", "init_args": {"every": 2}}
        again = self.load(callbacks__a=None, callbacks__a__class_path="p.A")["callbacks"]
        assert again["a"] == {"class_path": "p.A"}

    def test_a_list_has_no_entries_to_set(self) -> None:
        with pytest.raises(UserError) as error:
            self.load(list__0=2)
        assert str(error.value) == "--list.0: 'list' is a list; give it whole, as --list '[…]'"

    @given(st.lists(trees(2), max_size=4), trees(2))
    def test_flags_win_over_any_files(self, files: list[dict], flags: dict) -> None:
        config = Config()
        for values in files:
            config.add(Layer("file", values))
        self.path.write_text(dump_yaml(config.values))
        wanted = {path: value for path, value in leaves_of(flags).items() if value != {}}
        result = load_config([self.path], {".".join(path): wanted[path] for path in wanted})
        assert all(self.at(result, path) == value for path, value in wanted.items())

    @staticmethod
    def at(tree: dict, path: tuple[str, ...]) -> Any:
        for key in path:
            tree = tree[key]
        return tree


class TestYaml:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("1e-4", 1e-4),
            ("-1.5E+3", -1500.0),
            (".5", 0.5),
            ("1_000", 1000),
            ("0x1f", 31),
            ("true", True),
            ("null", None),
            ("no", "no"),
            ("on", "on"),
            ("007", "007"),
            ("12:30", "12:30"),
            ("2024-01-01", "2024-01-01"),
            ("'12'", "12"),
            ("${vars.x}", "${vars.x}"),
        ],
    )
    def test_scalars(self, text: str, value: Any) -> None:
        got = parse_yaml(text, "flag")
        assert got == value
        assert type(got) is type(value)

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=12,
        )
    )
    def test_what_is_written_is_read_back(self, value: Any) -> None:
        assert parse_yaml(dump_yaml({"value": value}), "dump") == {"value": value}

    @given(st.sampled_from("0123456789.eExX_+-:~nNtTfF"), st.text("0123456789.eExX_+-:"))
    def test_strings_that_look_like_numbers_stay_strings(self, first: str, rest: str) -> None:
        assert parse_yaml(dump_yaml({"value": first + rest}), "dump") == {"value": first + rest}


class TestInterpolation:
    def resolve(self, **values: Any) -> dict[str, Any]:
        config = Config()
        config.add(Layer("f.yaml", values))
        return interpolate(config)

    def test_references_and_arithmetic(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SMOL_ROOT", "/project")
        monkeypatch.setenv("SMOL_TEST_WORD", "word")
        got = self.resolve(
            vars={"x": 12, "y": "${mul:${vars.x},2}", "name": "run"},
            deep=[{"a": "${vars.y}"}, "${div:${vars.y},6}", "${add:${vars.x},1,0.5}"],
            text="${vars.name}_${vars.x}",
            word="${oc.env:SMOL_TEST_WORD}",
            path="${root:runs/${vars.name}}",
        )
        assert got == {
            "vars": {"x": 12, "y": 24, "name": "run"},
            "deep": [{"a": 24}, 4, 13.5],
            "text": "run_12",
            "word": "word",
            "path": "/project/runs/run",
        }

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ("${vars.blok}", "'${vars.blok}' names no key. Did you mean 'vars.block'?"),
            ("${vras.block}", "'${vras.block}' names no key. Did you mean 'vars.block'?"),
            ("${div:${vars.block},3}", "'div' expects an exact division, got 64 / 3"),
            ("${div:1,0}", "'div' expects an exact division, got 1 / 0"),
            ("${mul:a,2}", "'mul' expects numbers, got 'a'"),
            ("${mull:1,2}", "unknown resolver 'mull'. Did you mean 'mul'?"),
            ("???", "has no value yet (???); set it in a file or by a flag"),
        ],
    )
    def test_refused(self, value: str, message: str) -> None:
        with pytest.raises(UserError) as error:
            self.resolve(vars={"block": 64}, model={"sizes": [1, {"a": value}]})
        assert str(error.value) == f"model.sizes.1.a (f.yaml): {message}"


class TestPaths:
    def test_relative_to_the_root_whatever_the_working_directory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("SMOL_ROOT", raising=False)
        repository = Path(__file__).resolve().parents[2]
        monkeypatch.chdir(tmp_path)
        assert project_root() == repository
        assert resolve("runs/a") == repository / "runs" / "a"
        monkeypatch.setenv("SMOL_ROOT", str(tmp_path))
        assert resolve("runs/a") == tmp_path / "runs" / "a"

    def test_absolute_paths_and_urls_are_left_alone(self) -> None:
        assert resolve("/data/a") == Path("/data/a")
        assert resolve("s3://bucket/a/../b") == "s3://bucket/a/../b"
        assert [is_url(x) for x in ("s3://b", "file:///x", "/x", "a:b", Path("x"))] == [
            True,
            True,
            False,
            False,
            False,
        ]


def test_shuffling_flags_among_files_changes_nothing() -> None:
    files = [["--config", "a.yaml"], ["--config=b.yaml"], ["-c", "c.yaml"]]
    flags = [["--vars.x", "12"], ["--model.lr=1e-3"], ["--callbacks.a", "null"]]
    expected = parse_command_line(["fit", *chain(*files, *flags)])
    assert expected.files == ["a.yaml", "b.yaml", "c.yaml"]
    assert expected.flags == {"vars.x": 12, "model.lr": 1e-3, "callbacks.a": None}
    rng = random.Random(0)
    for _ in range(50):
        # Files and flags each keep their order; only how they interleave changes.
        picks = rng.sample([0] * 3 + [1] * 3, 6)
        queues = [iter(files), iter(flags)]
        words = list(chain(*(next(queues[pick]) for pick in picks)))
        words.insert(rng.choice([0, len(words)]), "fit")
        assert parse_command_line(words) == expected
