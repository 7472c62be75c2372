"""Checks of how an answer is written: its length, case, beginning and end, lists, JSON, code."""

import ast
import json
import re
import textwrap
import warnings
from itertools import pairwise
from typing import Any, NoReturn

from apo_trl.checks.repetition import words
from apo_trl.checks.rewards import reward_function
from apo_trl.errors import InputError

__all__ = [
    "compiles", "ends_with", "json_schema", "list_items", "lowercase", "max_sentences", "max_words", "min_sentences",
    "min_words", "starts_with", "uppercase",
]  # fmt: skip

_FENCED = re.compile(r"^[ \t]*(```+|~~~+)[^\n]*\n(.*?)^[ \t]*\1[ \t]*$", re.M | re.S)
_ITEM = re.compile(r"^([ \t]*)(?:\*\*|__)?(?:(\d{1,3})[.)]|[-*+•–])(?:\*\*|__)?[ \t]+(?=.*\w)", re.M)
_END = re.compile(r"(?<=[.!?…])[\"'”’)\]*_]*\s+|(?<=[。！？])")
_ABBREVIATED = re.compile(
    r"(?:\b(?i:mr|mrs|ms|dr|prof|st|mt|vs|fig|approx|cf|(?:[a-z]\.)+[a-z])|\b[A-HJ-Z]|^\W*\d{1,3})\.$"
)
_MAY_END = re.compile(r"\b(?i:jr|sr|inc|ltd|co|corp|etc|al)\.$")  # a sentence, unless a small letter follows


@reward_function()
def min_words(text: str, number: Any) -> bool:
    """Score 1 for at least as many words as the column `min_words` says; a Chinese character counts as a word."""
    return len(words(text)) >= int(number)


@reward_function()
def max_words(text: str, number: Any) -> bool:
    """Score 1 for at most as many words as the column `max_words` says."""
    return len(words(text)) <= int(number)


@reward_function()
def min_sentences(text: str, number: Any) -> bool:
    """Score 1 for at least as many sentences as the column `min_sentences` says; a line ends its last sentence."""
    return _sentences(text) >= int(number)


@reward_function()
def max_sentences(text: str, number: Any) -> bool:
    """Score 1 for at most as many sentences as the column `max_sentences` says."""
    return _sentences(text) <= int(number)


def _sentences(text: str) -> int:
    count = 0
    for line in text.splitlines():
        parts = _END.split(line)
        # An abbreviation, an initial or the number of an item ends no sentence.
        ends = [
            part
            for part, after in pairwise(parts)
            if words(part) and not _ABBREVIATED.search(part) and not (_MAY_END.search(part) and after[:1].islower())
        ]
        count += len(ends) + bool(words(parts[-1]))
    return count


@reward_function(None)
def lowercase(text: str, _: Any) -> bool:
    """Score 1 for a text without capital letters."""
    return text == text.lower()


@reward_function(None)
def uppercase(text: str, _: Any) -> bool:
    """Score 1 for a text without small letters."""
    return text == text.upper()


@reward_function()
def starts_with(text: str, start: Any) -> bool:
    """Score 1 for a text that begins with the column `starts_with`, in the same case, and goes on with a word."""
    match = re.match(rf"\s*{_whole(str(start))}(.*)", text, re.S)
    return bool(match and words(match[1]))


@reward_function()
def ends_with(text: str, end: Any) -> bool:
    """Score 1 for words and then the column `ends_with`, in the same case; a full stop may follow."""
    match = re.fullmatch(rf"(.*?){_whole(str(end))}\.?", text, re.S)
    return bool(match and words(match[1]))


def _whole(text: str) -> str:
    """Return the pattern of a text that no word crosses the ends of."""
    start, end = (r"\b" if re.match(r"\w", edge) else "" for edge in (text[:1], text[-1:]))
    return start + re.escape(text) + end


@reward_function()
def list_items(text: str, number: Any) -> bool:
    """Score 1 for a list of as many items as the column `list_items` says.

    An item is a line that begins with a number (1. or 1)) or a bullet (`-`, `*`, `+`, `•`, `–`) and has a word. Lists
    inside items are not counted: deeper lines, and bullets if the first item has a number.
    """
    lines = [(len(match[1].expandtabs(4)), bool(match[2])) for match in _ITEM.finditer(text)]
    least = min((depth for depth, _ in lines), default=0)
    kinds = [numbered for depth, numbered in lines if depth <= least + 1]
    return kinds.count(kinds[0]) == int(number) if kinds else int(number) == 0


@reward_function()
def json_schema(text: str, schema: Any) -> bool:
    """Score 1 for JSON that matches the JSON schema of the column `json_schema`: an object, or one as JSON text.

    The JSON is the last fenced block, or else the whole text. The schema `{}` matches all JSON. Needs `jsonschema`.
    """
    try:
        from jsonschema import SchemaError
        from jsonschema.validators import validator_for
    except ImportError as error:
        raise InputError("jsonschema: required, not installed. Run `pip install 'apo-trl[checks]'`.") from error
    schema = json.loads(schema) if isinstance(schema, str) else schema
    validator = validator_for(schema)
    try:
        validator.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"it is no JSON schema ({error.message[:100]})") from error
    try:
        value = json.loads(_block(text), parse_constant=_no_json)
    except (ValueError, RecursionError):
        return False
    return bool(validator(schema).is_valid(value))


def _no_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


@reward_function(None)
def compiles(text: str, _: Any) -> bool:
    """Score 1 for Python code that compiles, and is more than a name or a constant. It is not run.

    The code is the last fenced block, or else the whole text.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of code such as `"\\d"`
            tree = ast.parse(textwrap.dedent(_block(text)))
            compile(tree, "<answer>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return not all(isinstance(part, ast.Expr) and isinstance(part.value, ast.Name | ast.Constant) for part in tree.body)


def _block(text: str) -> str:
    return next((match[2] for match in reversed(list(_FENCED.finditer(text)))), text)
