"""Settings without effect are told where the name is close to one that has an effect."""

from typing import Any

from smol.config import Config, Layer, unused


def lines(*files: dict[str, Any]) -> list[str]:
    config = Config()
    for number, values in enumerate(files):
        config.add(Layer(f"{number}.yaml", values))
    return list(unused(config))


def test_variables() -> None:
    below = {"vars": {"context": 1, "sizes": {"wide": 2}, "for_another": 3}}
    reads = {"a": ["${mul:${vars.context},2}"], "b": {"c": "${vars.sizes.wide}"}}
    assert lines(below, reads) == []
    above = {"vars": {"contxt": 4, "sizes": {"wid": 5}}}
    assert lines(below, reads, above) == [
        "vars.sizes.wid (2.yaml): no file reads 'vars.sizes.wid'. Did you mean 'sizes.wide'?",
        "vars.contxt (2.yaml): no file reads 'vars.contxt'. Did you mean 'context'?",
    ]
    # What reads a mapping reads all of it.
    assert lines(below, reads, above, {"b": "${vars.sizes}"}) == [
        "vars.contxt (2.yaml): no file reads 'vars.contxt'. Did you mean 'context'?"
    ]
    assert lines({"vars": {"x1": 1, "x2": "${vars.x1}"}, "a": "${vars.x2}"}) == []


def test_removals() -> None:
    below = {"callbacks": {"events": {"class_path": "a.B"}, 7: {"class_path": "a.C"}}}
    none = {"callbacks": {"events": None, "unlike": None, 7: None, 8: None}}
    assert lines(below, none) == []
    assert lines(none, below) == []
    assert lines(below, {"callbacks": {"evnts": None}}) == [
        "callbacks.evnts (1.yaml): there is no 'evnts' to remove. Did you mean 'events'?"
    ]
    sources = {"web": {"path": "p"}, "code": None, "wob": None}
    stages = {"stages": {1: {"mixture": sources}, "two": None}}
    assert lines({"data": {"init_args": stages}}) == []
    # Elsewhere a null is a value.
    assert lines({"trainer": {"min_steps": None, "max_steps": 5}}) == []
