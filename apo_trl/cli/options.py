"""Types of command-line options."""

import argparse

__all__ = ["positive_int"]


def positive_int(text: str) -> int:
    """Read a whole number from a command line: the `type` of an option that cannot be less than 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of 1 or more")
    return int(text)
