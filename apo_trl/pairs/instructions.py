"""Instructions that a program can check, for the prompts in `apo_trl/demo/instructions`: a reward and a reviser.

Both have the signature of TRL's `reward_funcs`, and take the columns `kind` and `argument` of the prompts.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from apo_trl.checks.repetition import broken, words
from apo_trl.checks.rewards import by_kind, completion_text

__all__ = ["INSTRUCTIONS", "revise", "reward"]

_LEAST_WORDS = 3


def reward(completions: Sequence[Any], kind: Sequence[Any], argument: Sequence[Any], **columns: Any) -> list[float]:
    """Return 1.0 for each completion that follows its instruction, as `apo_trl.checks.by_kind` finds, else 0.0.

    It must answer too: with three words beside what the instruction itself demands, and without repeating itself.
    """
    followed = by_kind(completions, kind, argument)
    rows = zip(map(completion_text, completions), kind, argument, followed, strict=True)
    return [float(bool(score) and _answers(text, name, value)) for text, name, value, score in rows]


def revise(
    completions: Sequence[Any], kind: Sequence[Any], argument: Sequence[Any], **columns: Any
) -> list[str | None]:
    """Return each completion with the smallest change that makes it follow its instruction.

    The result is None if the completion follows already or is broken, or if no small change is enough.
    """
    return [_revised(*row) for row in zip(map(completion_text, completions), kind, argument, strict=True)]


def _answers(text: str, kind: str, argument: Any) -> bool:
    demanded = str(argument) if kind == "ends_with" else ""
    return len(words(text)) >= len(words(demanded)) + _LEAST_WORDS and not broken(text)


def _revised(text: str, kind: str, argument: Any) -> str | None:
    if broken(text) or reward([text], [kind], [argument])[0]:
        return None
    revision = INSTRUCTIONS[kind](text.strip(), argument)
    return revision if revision and reward([revision], [kind], [argument])[0] else None


_SENTENCE = re.compile(r"[.!?](?=[\"')]*\s)")
_CLAUSE = re.compile(
    r"[,;:](?=\s+(?:and|but|or|so|yet|which|who|where|while|because|as|though|although|with|including|making)\b)"
)


def _shortened(text: str, words: str) -> str:
    """Return the sentences that fit into a number of words, or else the clauses of the first one that fit."""
    for end in (_SENTENCE, _CLAUSE):
        starts = [text[: match.start()] for match in end.finditer(text)]
        if fitting := [start for start in starts if 4 <= len(start.split()) <= int(words)]:
            return f"{fitting[-1]}."
    return ""


def _first_sentences(text: str, sentences: str) -> str:
    ends = [match.end() for match in _SENTENCE.finditer(text)]
    return text[: ends[int(sentences) - 1]] if len(ends) >= int(sentences) else ""


def _ended(text: str, end: str) -> str:
    near = rf"[^.!?]*{re.escape(end)}[^a-z]*$"  # as the last sentence "Done!" for "DONE"
    return f"{re.sub(near, '', text, flags=re.I).strip()} {end}".strip()


INSTRUCTIONS: dict[str, Callable[[str, Any], str]] = {
    "lowercase": lambda text, _: text.lower(),
    "max_words": _shortened,
    "max_sentences": _first_sentences,
    "ends_with": _ended,
}
"""The change of each kind of instruction, which takes a text and the instruction's argument."""
