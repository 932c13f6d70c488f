"""Instructions on the form of an answer that a function can check.

Names and arguments are those of IFEval (Zhou et al. 2023, https://arxiv.org/abs/2311.07911), so
that its records (``google/IFEval``) can be read as they are. The checks are written from the
paper's list of instructions and the wording of its prompts; they are the strict ones. Where the
reference implementation uses nltk to count words and sentences, these count with regular
expressions, so single verdicts may differ. The language of an answer is not checked.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from smol.errors import UserError, nearest

Check = Callable[..., bool]
CHECKS: dict[str, Check] = {}


def follows(text: str, name: str, arguments: Mapping[str, Any] | None = None) -> bool:
    """Whether a text follows an instruction.

    Args:
        text: The answer, without reasoning.
        name: Of the instruction, such as ``keywords:existence``.
        arguments: Of the instruction by name; those that are ``None`` count as not given.

    Raises:
        UserError: If the instruction is unknown or its arguments do not fit.
    """
    if name not in CHECKS:
        raise UserError(
            f"instruction {name!r} is not one that can be checked, expected one of "
            f"{', '.join(CHECKS)}.{nearest(name, CHECKS)}"
        )
    given = {key: value for key, value in (arguments or {}).items() if value is not None}
    try:
        return bool(text.strip()) and CHECKS[name](text, **given)
    except TypeError as error:
        reason = str(error).partition("() ")[2]
        raise UserError(f"instruction {name} has other arguments than it needs: {reason}") from None


def _check(name: str) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        CHECKS[name] = check
        return check

    return register


def _compare(count: int, relation: str, wanted: int) -> bool:
    return count < wanted if relation == "less than" else count >= wanted


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def _occurrences(text: str, word: str) -> int:
    return len(re.findall(re.escape(word), text, re.IGNORECASE))


def _lines(text: str) -> list[str]:
    return text.strip().splitlines()


@_check("keywords:existence")
def _existence(text: str, keywords: list[str]) -> bool:
    return all(_occurrences(text, word) for word in keywords)


@_check("keywords:frequency")
def _frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _compare(_occurrences(text, keyword), relation, frequency)


@_check("keywords:forbidden_words")
def _forbidden(text: str, forbidden_words: list[str]) -> bool:
    return not any(
        re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words
    )


@_check("keywords:letter_frequency")
def _letters(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compare(text.lower().count(letter.lower()), let_relation, let_frequency)


@_check("length_constraints:number_words")
def _number_words(text: str, num_words: int, relation: str) -> bool:
    return _compare(len(_words(text)), relation, num_words)


@_check("length_constraints:number_sentences")
def _number_sentences(text: str, num_sentences: int, relation: str) -> bool:
    sentences = [part for part in re.split(r"[.!?]+(?=\s|$)", text) if part.strip()]
    return _compare(len(sentences), relation, num_sentences)


@_check("length_constraints:number_paragraphs")
def _number_paragraphs(text: str, num_paragraphs: int) -> bool:
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text.strip())]
    parts = parts[not parts[0] : len(parts) - (not parts[-1])]  # a divider at either end
    return all(parts) and len(parts) == num_paragraphs


@_check("length_constraints:nth_paragraph_first_word")
def _first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = [part.strip() for part in text.split("\n\n") if part.strip()]
    if len(parts) != num_paragraphs or not 1 <= nth_paragraph <= len(parts):
        return False
    words = _words(parts[nth_paragraph - 1])
    return bool(words) and words[0].lower() == first_word.lower()


@_check("detectable_content:number_placeholders")
def _placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


@_check("detectable_content:postscript")
def _postscript(text: str, postscript_marker: str) -> bool:
    dotted = r"\s*".join(re.escape(c) for c in postscript_marker.replace(" ", ""))
    return re.search(rf"^\s*{dotted}.*$", text, re.IGNORECASE | re.MULTILINE) is not None


@_check("detectable_format:number_bullet_lists")
def _bullets(text: str, num_bullets: int) -> bool:
    return len(re.findall(r"^\s*(?:\*[^*]|-).*$", text, re.MULTILINE)) == num_bullets


@_check("detectable_format:number_highlighted_sections")
def _highlights(text: str, num_highlights: int) -> bool:
    found = re.findall(r"\*\*([^\n*]+)\*\*|\*([^\n*]+)\*", text)
    return sum(bool((double or single).strip()) for double, single in found) >= num_highlights


@_check("detectable_format:multiple_sections")
def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", text)) >= num_sections


@_check("detectable_format:title")
def _title(text: str) -> bool:
    return any(title.strip() for title in re.findall(r"<<([^\n]+?)>>", text))


@_check("detectable_format:json_format")
def _json(text: str) -> bool:
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text.strip(), re.DOTALL | re.IGNORECASE)
    try:
        json.loads(fenced[1] if fenced else text)
    except ValueError:
        return False
    return True


@_check("detectable_format:constrained_response")
def _constrained(text: str) -> bool:
    return any(f"My answer is {word}." in text for word in ("yes", "no", "maybe"))


@_check("startend:end_checker")
def _end(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


@_check("startend:quotation")
def _quotation(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text.startswith('"') and text.endswith('"')


@_check("change_case:english_capital")
def _capital(text: str) -> bool:
    return text.isupper()


@_check("change_case:english_lowercase")
def _lowercase(text: str) -> bool:
    return text.islower()


@_check("change_case:capital_word_frequency")
def _capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    capitals = sum(word.isupper() for word in _words(text))
    return _compare(capitals, capital_relation, capital_frequency)


@_check("punctuation:no_comma")
def _no_comma(text: str) -> bool:
    return "," not in text


@_check("combination:two_responses")
def _two_responses(text: str) -> bool:
    parts = [part.strip() for part in text.split("******") if part.strip()]
    return len(parts) == 2 and parts[0] != parts[1]


@_check("combination:repeat_prompt")
def _repeat(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())
