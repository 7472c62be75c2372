"""What makes a check a reward function of TRL's signature, and the table of all checks."""

import inspect
import json
import re
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from apo_trl.errors import InputError, nearest

__all__ = ["CHECKS", "FOLLOWED", "Reward", "by_kind", "completion_text", "listed", "reward_function"]

Check = Callable[[str, Any], bool]
Reward = Callable[..., list[float | None]]
CHECKS: dict[str, Reward] = {}
"""The checks by name."""

FOLLOWED = 0.5
"""A score above it counts as followed."""


def reward_function(column: str | None = "") -> Callable[[Check], Reward]:
    """Return a decorator: from a check of a text and a column's value to a reward function, listed in `CHECKS`.

    Args:
        column: The column; by default of the check's own name. None for a check that needs none.
    """

    def decorate(check: Check) -> Reward:
        name = check.__name__
        values_of = name if column == "" else column

        @wraps(check)
        def reward(completions: Sequence[Any], **columns: Any) -> list[float | None]:
            if values_of and values_of not in columns:
                raise InputError(f"{values_of}: column required by the check '{name}', not found. Add it to the rows.")
            values = columns[values_of] if values_of else [True] * len(completions)
            return [_score(reward, *row) for row in zip(completions, values, strict=True)]

        parameters = ["completions", *([values_of] if values_of else [])]
        kind, rest = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_KEYWORD
        reward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # else that of the check
            [*(inspect.Parameter(each, kind) for each in parameters), inspect.Parameter("columns", rest)]
        )
        CHECKS[name] = reward
        return reward

    return decorate


def _score(reward: Any, completion: Any, value: Any) -> float | None:
    if value is None:
        return None
    text = completion_text(completion)
    try:
        return float(bool(text) and reward.__wrapped__(text, value))
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        name = reward.__name__
        raise InputError(f"{name}: cannot check with {str(value)[:60]!r}: {error}. Correct the row.") from error


def by_kind(
    completions: Sequence[Any], kind: Sequence[Any], argument: Sequence[Any] | None = None, **columns: Any
) -> list[float | None]:
    """Check each row by the check that its column `kind` names, with the value in its column `argument`.

    A row with a list of kinds needs a list of arguments of the same length, and all of its checks must hold. A row
    without a kind gets None.

    Raises:
        InputError: A kind is unknown, or has no argument and needs one.
    """
    rows = zip(completions, kind, argument or [None] * len(completions), strict=True)
    return [None if name in (None, []) else _lowest(completion, name, value) for completion, name, value in rows]


def _lowest(completion: Any, kind: Any, argument: Any) -> float:
    if not isinstance(kind, str):
        arguments = listed(argument) if argument is not None else [None] * len(kind)
        return min(_lowest(completion, *each) for each in zip(kind, arguments, strict=True))
    if kind not in CHECKS:
        raise InputError(f"kind: unknown check '{kind[:60]}'.{nearest(kind, CHECKS)} Use one of {', '.join(CHECKS)}.")
    needs_none = len(inspect.signature(CHECKS[kind]).parameters) == 2
    if (score := _score(CHECKS[kind], completion, True if needs_none else argument)) is None:
        raise InputError(f"argument: required by the check '{kind}', not set. Add it to the row.")
    return score


def completion_text(completion: Any) -> str:
    """Return the text of a completion, a string or a list of messages, without blank lines before and after it."""
    content = completion if isinstance(completion, str) else completion[-1].get("content") if completion else None
    if isinstance(content, list):
        content = "".join(str(part.get("text") or "") for part in content)
    return re.sub(r"\A\s*\n", "", str(content or "")).rstrip()


def listed(value: Any) -> list[Any]:
    """Return the values of a column that holds one value, a list, or a list as JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return [value]
    return list(value) if isinstance(value, list | tuple) else [value]
