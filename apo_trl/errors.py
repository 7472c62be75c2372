"""The error for unusable input, and the suggestion of a known name."""

import difflib
from collections.abc import Iterable

__all__ = ["InputError", "nearest", "one_line"]


class InputError(ValueError):
    """Unusable input of the user. The message names the field, what is wrong, and what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" with the known name closest to `name`, or an empty string if none is close."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean '{match[0]}'?" if match else ""


def one_line(error: object) -> str:
    """Return an error's message on one line, shortened, without its full stop, or its class if it has no message."""
    return " ".join(str(error).split())[:300].rstrip(".;: ") or type(error).__name__
