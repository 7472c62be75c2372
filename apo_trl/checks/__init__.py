"""Checks of answers by a program: reward functions of TRL's signature, with the columns of the prompts by name."""

from apo_trl.checks.answers import avoids, contains, exact, number
from apo_trl.checks.forms import (
    compiles,
    ends_with,
    json_schema,
    list_items,
    lowercase,
    max_sentences,
    max_words,
    min_sentences,
    min_words,
    starts_with,
    uppercase,
)
from apo_trl.checks.repetition import broken
from apo_trl.checks.rewards import CHECKS, by_kind

__all__ = [
    "CHECKS", "avoids", "broken", "by_kind", "compiles", "contains", "ends_with", "exact", "json_schema", "list_items",
    "lowercase", "max_sentences", "max_words", "min_sentences", "min_words", "number", "starts_with", "uppercase",
]  # fmt: skip
