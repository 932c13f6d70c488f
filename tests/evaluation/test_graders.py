"""Verdicts on written answers."""

import pytest

from smol.errors import UserError
from smol.evaluation.constraints import CHECKS, follows
from smol.evaluation.graders import (
    GRADERS,
    constraints,
    exact_match,
    generated_task,
    maths,
    number,
)


@pytest.mark.parametrize(
    ("text", "expected", "right"),
    [(" Paris.\n", "Paris", True), ("a  b", "a b", True), ("It is Paris", "Paris", False),
     ("paris", "Paris", False), ("7", 7, True)],
)  # fmt: skip
def test_exact_match(text, expected, right):
    assert exact_match(text, expected) is right


@pytest.mark.parametrize(
    ("text", "expected", "right"),
    [("so 3 + 4 = 7.", "7", True), ("1,200 dollars", "1200", True), ("$1200.00", 1200, True),
     ("-3", "3", False), ("7 of 8", "7", False), ("none", "7", False), (".5", "0.5", True),
     ("in 1999, 12", "12", True)],
)  # fmt: skip
def test_the_last_number_counts(text, expected, right):
    assert number(text, expected) is right


def test_a_number_needs_a_number_to_compare_with():
    with pytest.raises(UserError, match="a task's answer is 'x', expected a number"):
        number("7", "x")


@pytest.mark.parametrize(
    ("text", "expected", "right"),
    [
        (r"so \boxed{\frac{1}{2}}", "0.5", True),
        (r"the answer is $\frac{2}{4}$", r"\frac{1}{2}", True),
        (r"\boxed{2x + 2}", "2(x + 1)", True),
        (r"\boxed{1200}", "1,200", True),
        (r"\boxed{3}", "4", False),
        ("no idea", "4", False),
    ],
)
def test_maths(text, expected, right):
    pytest.importorskip("math_verify")
    assert maths(text, expected) is right


def test_without_the_library_maths_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "math_verify", None)
    with pytest.raises(UserError, match="needs the package math-verify: pip install math-verify"):
        maths("1", "1")


# An instruction, its arguments, an answer that follows it and one that does not.
EXAMPLES = {
    "keywords:existence": ({"keywords": ["cat", "dog"]}, "A Cat and a dog.", "A cat."),
    "keywords:frequency": (
        {"keyword": "cat", "frequency": 2, "relation": "at least"}, "cat, Cat", "cat",
    ),
    "keywords:forbidden_words": ({"forbidden_words": ["cat"]}, "a catalogue", "a Cat!"),
    "keywords:letter_frequency": (
        {"letter": "a", "let_frequency": 3, "let_relation": "less than"}, "A cat", "A cat ran",
    ),
    "length_constraints:number_words": (
        {"num_words": 4, "relation": "at least"}, "one two three four", "one two three",
    ),
    "length_constraints:number_sentences": (
        {"num_sentences": 3, "relation": "less than"}, "One is 1.5. Two!", "One. Two! Three?",
    ),
    "length_constraints:number_paragraphs": (
        {"num_paragraphs": 2}, "one\n***\ntwo", "one\n***\n\n***\ntwo",
    ),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "second"},
        "The first.\n\nSecond, this.", "Second.\n\nThe first.",
    ),
    "detectable_content:number_placeholders": (
        {"num_placeholders": 2}, "[name] lives in [town]", "[name] lives here",
    ),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, "Hi.\nP.S. Bye", "Hi. Bye"),
    "detectable_format:number_bullet_lists": (
        {"num_bullets": 2}, "* one\n* two", "* one\n* two\n- three",
    ),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2}, "*one* and **two**", "*one* and two",
    ),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Part", "num_sections": 2}, "Part 1\na\nPart 2\nb", "Part 1",
    ),
    "detectable_format:title": ({}, "<<A title>>\ntext", "<< >>\ntext"),
    "detectable_format:json_format": ({}, '```json\n{"a": 1}\n```', "{a: 1}"),
    "detectable_format:constrained_response": ({}, "My answer is yes.", "Yes."),
    "startend:end_checker": ({"end_phrase": "The end."}, "So.\nThe end.", "The end. No"),
    "startend:quotation": ({}, '"All of it."', '"Some" of it'),
    "change_case:english_capital": ({}, "ALL OF IT 1", "ALL of it"),
    "change_case:english_lowercase": ({}, "all of it", "All of it"),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"}, "TWO words LOUD", "ONE word Loud",
    ),
    "punctuation:no_comma": ({}, "one two", "one, two"),
    "combination:two_responses": ({}, "one\n******\ntwo", "one\n******\none"),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say hi"}, "Say hi\nHi", "Hi"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
def test_every_instruction_has_answers_that_follow_it_or_not(name):
    arguments, good, bad = EXAMPLES[name]
    # The published records hold the arguments of all instructions, most of them null.
    padded = {"keywords": None, "num_words": None} | arguments
    assert follows(good, name, padded)
    assert not follows(bad, name, padded)
    assert not follows(" \n", name, padded)


def test_all_of_several_instructions_count():
    names = ["punctuation:no_comma", "change_case:english_lowercase"]
    assert constraints("all small", (names, [{}, None]))
    assert not constraints("all, small", (names, [{}, None]))


def test_mistakes_in_instructions_are_one_line():
    with pytest.raises(UserError, match=r"'no_comma' is not one that .* 'punctuation:no_comma'\?"):
        follows("a", "no_comma")
    with pytest.raises(UserError, match="startend:end_checker has other arguments than it needs"):
        follows("a", "startend:end_checker", {"end": "b"})


@pytest.mark.parametrize("expected", ["ab", ["ab", []], [["a"], []], None])
def test_constraints_need_two_lists(expected):
    with pytest.raises(UserError, match="expected two lists for metric constraints"):
        constraints("a", expected)


@pytest.mark.parametrize("expected", ["ab", {"kind": "sum"}])
def test_a_generated_task_needs_its_fields(expected):
    with pytest.raises(UserError, match="expected a dictionary for metric generated_task, of ans"):
        generated_task("a", expected)


def test_graders_go_by_their_names():
    assert set(GRADERS) == {"exact_match", "number", "maths", "constraints", "generated_task"}
