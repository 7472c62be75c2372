"""Checks of what an answer says: the right answer, a number, words that must or must not be in it."""

import math
import re
from typing import Any

from apo_trl.checks.repetition import CHINESE
from apo_trl.checks.rewards import listed, reward_function

__all__ = ["avoids", "contains", "exact", "number"]

_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
# GSM8K's mark, and not a heading: a number alone, or whatever is in the last line.
_HASHES = re.compile(
    r"####[ \t]*([-−]?[$€£]?\d(?:[\d,./]*\d)?(?:[ \t]*[%\w]+)?)[ \t.]*$|####[ \t]*([^\n]*\S)\s*\Z", re.M
)
_STATED = re.compile(
    r"(?:\banswer\b(?:[^\n.:]{0,60}?\bis\b|[*_ ]*:)|^[#*_]+ *(?:the |final )*answer[*_ ]*$)"
    r"(?:```\w*\n|\\[\[(]|[\s:*_`$#>\[(])*(.+?)(?=[.!?](?:\s|$)|$)",
    re.I | re.M,
)
_REMARK = re.compile(r"\b(?:hope|if|whether)\b[^.!?\n]*\Z", re.I)  # "I hope this answer is helpful"
_WRAPPED = re.compile(r"\\(?:text|math|m)(?:bf|it|rm|box)?\s*\{([^{}]*)\}")
_AROUND = ".,;:!?\"'“”‘’`*_()[]$\\"
_SPACE = re.compile(r"\{,\}|(?<=[\d,])\\[!,](?=\d)")  # between thousands, in LaTeX
_NOT_A_VALUE = re.compile(r"\^\s*(?:\{[^{}]*\}|[-−]?\d+)|\\sqrt\s*(?:\[[^]]*\]\s*)?\{[^{}]*\}")
_FRACTION = re.compile(r"([-−]?)(\d?)\\[dt]?frac\s*\{\s*([-−]?)\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_NUMBER = re.compile(
    rf"(?<![\w.)])(?P<sign>[-−]?)[$€£]?(?P<whole>{_DIGITS}?(?:\.\d+|(?<=\d)))(?P<power>e[-+]?\d+)?"
    rf"(?:(?P<mixed> \d+)?\s?/\s?(?P<below>\d+(?![\d/])))?\s*(?P<percent>\\?%|percent\b)?",
    re.I,
)


def final_answers(text: str) -> list[str]:
    """Return what a text may give as its answer, the likeliest first.

    That is the last LaTeX box; else what follows the last `####`; else what follows the last "answer is", "answer:" or
    heading "Answer", to the end of its sentence or of its line, then the one before; else the whole text.
    """
    if boxes := _BOXED.findall(text):
        return boxes[-1:]
    if marks := _HASHES.findall(text):
        return [next(filter(None, marks[-1]))]
    found = [match for match in _STATED.finditer(text) if not _REMARK.search(text[: match.start()])]
    lines = {match: text[match.start(1) :].partition("\n")[0] for match in found}
    return [each for match in reversed(found) for each in (match[1], lines[match])] or [text]


@reward_function("answer")
def exact(text: str, expected: Any) -> bool:
    """Score 1 for the answer in the column `answer`, a string or a list of accepted ones.

    Compared is what the text gives as its answer: what is in the last LaTeX box, else what follows `####`, else what
    follows the last "the answer is" or "Answer:" in its sentence, else the whole text. Case, whitespace, punctuation
    and markup around words make no difference.
    """
    accepted = [_plain_words(str(value)) for value in listed(expected)]
    return any(_plain_words(given) in accepted for given in (*final_answers(text)[:2], text))


def _plain_words(text: str) -> list[str]:
    text = _WRAPPED.sub(r"\1", text)
    return [word for part in text.casefold().split() if (word := part.strip(_AROUND))] or [text.strip()]


@reward_function("answer")
def number(text: str, expected: Any) -> bool:
    """Score 1 for the number in the column `answer`, also at the end of a text such as GSM8K's "... #### 18".

    Compared is the last number of what `exact` takes for the answer, with a relative tolerance of one millionth. Read
    are signs, thousands separators, decimals, powers (1e5), fractions (3/4, 1 1/2, LaTeX's) and currency signs before a
    number. A percentage equals its number and its hundredth: 50% is 50 and 0.5. Number words are not read, nor
    exponents, as of "cm^2", and roots.
    """
    given, wanted = (next(filter(None, map(last_number, final_answers(str(each)))), []) for each in (text, expected))
    if not wanted:
        raise ValueError("it is no number")
    return any(math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-12) for one in given for other in wanted)


def last_number(text: str) -> list[float]:
    """Return the last number of a text: none, one value, or two for a percentage."""
    text = _NOT_A_VALUE.sub("", _SPACE.sub("", text))
    text = _FRACTION.sub(
        lambda match: f"{match[1] or match[3]}{f'{match[2]} ' * bool(match[2])}{match[4]}/{match[5]}", text
    )
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
