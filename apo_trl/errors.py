"""The error for unusable input, and the suggestion of a known name."""

import difflib
from collections.abc import Iterable

__all__ = ["InputError", "nearest"]


class InputError(ValueError):
    """Something the user gave cannot be used; the message names the field and the remedy."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Say " Did you mean 'x'?" for the known name closest to `name`, or nothing where none is close."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean '{match[0]}'?" if match else ""
