"""Broken answers: none at all, or one that repeats itself."""

import re

__all__ = ["CHINESE", "broken", "words"]

CHINESE = r"\u3040-\u30ff\u3400-\u9fff"
"""The Chinese and Japanese characters, for a class of a regular expression. Each counts as a word."""

_WORD = re.compile(rf"[{CHINESE}]|[^\W_{CHINESE}]+(?:['’.,-][^\W_{CHINESE}]+)*")
_TOKEN = re.compile(rf"[{CHINESE}]|\w+|[^\w\s]")
_LETTERS = re.compile(r"([^\W_]{1,4}|[!?])\1{19,}")
_LONGEST_LOOP = 200  # tokens
_PASSAGE = 12  # tokens


def broken(text: str) -> str | None:
    """Return what is wrong with an answer as a text: "empty", "repetition", or None.

    Repetition is one of: the same passage three times in a row, with six words or more after the first time; half of
    the words in passages of twelve words and signs that occur earlier in the text; the same letters or digits
    twenty times.
    """
    if not text.strip():
        return "empty"
    tokens = _TOKEN.findall(text.lower())
    return "repetition" if _LETTERS.search(text) or _loops(tokens) or _repeats(tokens) else None


def words(text: str) -> list[str]:
    """Return the words of a text: "it's", "3.5" and "well-known" are one word each, signs are none."""
    return _WORD.findall(text)


def _loops(tokens: list[str]) -> bool:
    for period in range(1, min(_LONGEST_LOOP, len(tokens) // 2) + 1):
        same = letters = 0
        for token, earlier in zip(tokens[period:], tokens, strict=False):
            if token != earlier:
                same = letters = 0
                continue
            same += 1
            letters += _is_word(token)  # in sums and tables, signs and numbers do repeat
            if same >= 2 * period - 1 and letters >= 6:  # the last full stop may be missing
                return True
    return False


def _repeats(tokens: list[str]) -> bool:
    seen: set[tuple[str, ...]] = set()
    repeated: set[int] = set()
    for start in range(len(tokens) - _PASSAGE + 1):
        passage = tuple(tokens[start : start + _PASSAGE])
        if passage in seen:
            repeated.update(range(start, start + _PASSAGE))
        seen.add(passage)
    again = sum(_is_word(tokens[index]) for index in repeated)
    return again > 0 and 2 * again >= sum(map(_is_word, tokens))


def _is_word(token: str) -> bool:
    return token.isalpha() and (len(token) > 1 or not token.isascii())
