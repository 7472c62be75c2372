"""Text of errors."""

from apo_trl.io.messages import replace_surrogates

__all__ = ["one_line"]


def one_line(error: object) -> str:
    """Return an error's message on one line, shortened, without its full stop, or its class if it has no message."""
    return " ".join(replace_surrogates(str(error)).split())[:300].rstrip(".;: ") or type(error).__name__
