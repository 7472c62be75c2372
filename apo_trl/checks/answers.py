"""Checks of what an answer says: the right answer, a number, words that must or must not be in it."""

import math
import re
from typing import Any

from apo_trl.checks.repetition import CHINESE
from apo_trl.checks.rewards import listed, reward_function

__all__ = ["avoids", "contains", "exact", "number"]

_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
_HASHES = re.compile(r"####\s*(\S.*)")
_STATED = re.compile(r"\banswer\b(?:[^\n.:]{0,60}?\bis\b|[*_ ]*:)[\s:]*(.+?)(?=[.!?](?:\s|$)|\n|$)", re.I)
_AROUND = ".,;:!?\"'“”‘’`*_()[]$"
_FRACTION = re.compile(r"(\d?)\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_NUMBER = re.compile(
    rf"(?<![\w.)])(?P<sign>[-−]?)[$€£]?(?P<whole>{_DIGITS}?(?:\.\d+|(?<=\d)))(?P<power>e[-+]?\d+)?"
    rf"(?:(?P<mixed> \d+)?\s?/\s?(?P<below>\d+(?![\d/])))?\s*(?P<percent>\\?%|percent\b)?",
    re.I,
)


def final_answer(text: str) -> str:
    """Return the last LaTeX box, else what follows `####`, else the last "answer is" or "answer:", else the text."""
    for pattern in (_BOXED, _HASHES, _STATED):
        if matches := pattern.findall(text):
            return str(matches[-1])
    return text


@reward_function("answer")
def exact(text: str, expected: Any) -> bool:
    """Score 1 for the answer in the column `answer`, a string or a list of accepted ones.

    Compared is what the text gives as its answer: what is in the last LaTeX box, else what follows `####`, else what
    follows the last "the answer is" or "Answer:" in its sentence, else the whole text. Case, whitespace, punctuation
    and markup around words make no difference.
    """
    given = _plain_words(final_answer(text))
    accepted = [_plain_words(str(value)) for value in listed(expected)]
    return given in accepted or _plain_words(text) in accepted


def _plain_words(text: str) -> list[str]:
    return [word for part in text.casefold().split() if (word := part.strip(_AROUND))] or [text.strip()]


@reward_function("answer")
def number(text: str, expected: Any) -> bool:
    """Score 1 for the number in the column `answer`, also at the end of a text such as GSM8K's "... #### 18".

    Compared is the last number of what `exact` takes for the answer, with a relative tolerance of one millionth. Read
    are signs, thousands separators, decimals, powers (1e5), fractions (3/4, 1 1/2, LaTeX's) and currency signs before a
    number. A percentage equals its number and its hundredth: 50% is 50 and 0.5. Number words are not read.
    """
    given, wanted = last_number(final_answer(text)), last_number(final_answer(str(expected)))
    if not wanted:
        raise ValueError("it is no number")
    return any(math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-12) for one in given for other in wanted)


def last_number(text: str) -> list[float]:
    """Return the last number of a text: none, one value, or two for a percentage."""
    text = _FRACTION.sub(lambda match: f"{match[1]} {match[2]}/{match[3]}".lstrip(), text.replace("{,}", ","))
    for match in reversed(list(_NUMBER.finditer(text))):
        value = float(match["whole"].replace(",", "") + (match["power"] or ""))
        if match["below"]:
            below = float(match["below"])
            above = float(match["mixed"]) if match["mixed"] else value
            value = (value if match["mixed"] else 0) + (above / below if below else math.inf)
        if math.isfinite(value):
            value = -value if match["sign"] else value
            return [value, value / 100] if match["percent"] else [value]
    return []


@reward_function()
def contains(text: str, phrases: Any) -> bool:
    """Score 1 if all words or phrases of the column `contains` are in the text: whole words, in any case."""
    return all(_phrase(phrase).search(_folded(text)) for phrase in listed(phrases))


@reward_function()
def avoids(text: str, phrases: Any) -> bool:
    """Score 1 if no word or phrase of the column `avoids` is in the text: whole words, in any case."""
    return not any(_phrase(phrase).search(_folded(text)) for phrase in listed(phrases))


def _folded(text: Any) -> str:
    return " ".join(str(text).casefold().replace("’", "'").split())


def _phrase(phrase: Any) -> re.Pattern[str]:
    folded = _folded(phrase)
    if not folded:
        raise ValueError("it is empty")
    letter = rf"[^\W{CHINESE}]"  # between Chinese characters there is no end of a word
    start, end = (re.match(letter, edge) is not None for edge in (folded[0], folded[-1]))
    return re.compile(f"(?<!{letter})" * start + re.escape(folded) + f"(?!{letter})" * end)
