"""Instructions that a program can check, for the prompts in `apo_trl/demo/instructions`: a reward and a reviser.

Both have the signature of TRL's `reward_funcs`, and take the columns `kind` and `argument` of the prompts.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["INSTRUCTIONS", "revise", "reward"]


def reward(completions: Sequence[Any], kind: Sequence[str], argument: Sequence[Any], **columns: Any) -> list[float]:
    """Return 1.0 for each completion that follows its instruction, else 0.0."""
    rows = zip(map(_text, completions), kind, argument, strict=True)
    return [float(INSTRUCTIONS[name][0](text, value)) for text, name, value in rows]


def revise(
    completions: Sequence[Any], kind: Sequence[str], argument: Sequence[Any], **columns: Any
) -> list[str | None]:
    """Return each completion with the smallest change that makes it follow its instruction.

    The result is None if the completion follows already, or if no small change is enough.
    """
    return [_revised(*row) for row in zip(map(_text, completions), kind, argument, strict=True)]


def _text(completion: Any) -> str:
    return str(completion if isinstance(completion, str) else completion[-1]["content"]).strip()


def _revised(text: str, kind: str, argument: Any) -> str | None:
    follows, change = INSTRUCTIONS[kind]
    revision = None if follows(text, argument) else change(text, argument)
    return revision if revision and follows(revision, argument) else None


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


def _begun(text: str, start: str) -> str:
    near = rf"^\W*{re.escape(start.rstrip(':'))}[ ,:.]+"  # as "In short," for "In short:"
    return f"{start} {re.sub(near, '', text, flags=re.I)}"


def _ended(text: str, end: str) -> str:
    near = rf"[^.!?]*{re.escape(end)}[^a-z]*$"  # as the last sentence "Done!" for "DONE"
    return f"{re.sub(near, '', text, flags=re.I).strip()} {end}".strip()


INSTRUCTIONS: dict[str, tuple[Callable[[str, Any], bool], Callable[[str, Any], str]]] = {
    "lowercase": (lambda text, _: text == text.lower(), lambda text, _: text.lower()),
    "max_words": (lambda text, words: len(text.split()) <= int(words), _shortened),
    "starts_with": (lambda text, start: text.startswith(start), _begun),
    "ends_with": (lambda text, end: text.removesuffix(".").endswith(end), _ended),
}
"""The check and the change of each kind, which take a text and the instruction's argument."""
