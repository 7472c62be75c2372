"""Text of chat messages."""

from collections.abc import Mapping
from typing import Any

__all__ = ["BEFORE_AN_ANSWER", "content_text", "replace_surrogates"]

BEFORE_AN_ANSWER = ("system", "developer", "user")
"""Roles of messages that no answer begins with."""


def content_text(content: Any) -> str | None:
    """Return the text of a message's content, which may be a list of text parts, or None for any other content."""
    if isinstance(content, list) and all(
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        return replace_surrogates("".join(part["text"] for part in content))
    return replace_surrogates(content) if isinstance(content, str) else None


def replace_surrogates(text: str) -> str:
    """Return a text that UTF-8 can encode: half of a surrogate pair, which JSON can hold, becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
