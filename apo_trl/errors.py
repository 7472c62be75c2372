"""The error for unusable input, and the suggestion of a known name."""

import difflib
from collections.abc import Iterable

__all__ = ["InputError", "InvalidRow", "nearest"]


class InputError(ValueError):
    """Unusable input of the user. The message names the field, what is wrong, and what to do."""


class InvalidRow(InputError):
    """An invalid row of a dataset; the message follows "Row 3 of the train dataset"."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" with the known name closest to `name`, or an empty string if none is close."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean '{match[0]}'?" if match else ""
