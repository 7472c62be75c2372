"""A side of a pair as one text, for judges, statistics and reports."""

import json
from collections.abc import Mapping
from typing import Any

from apo_trl.io.messages import replace_surrogates

__all__ = ["completion_text"]


def completion_text(side: Any) -> str:
    """Return a side of a pair as text: several messages each after its role, tool calls as JSON."""
    if isinstance(side, str):
        return side
    texts = []
    for message in side:
        content, calls = message.get("content") or "", message.get("tool_calls")
        if not isinstance(content, str):  # parts, of which some may be no text
            content = "".join(str(part.get("text") or "") for part in content if isinstance(part, Mapping))
        parts = [replace_surrogates(content), json.dumps(calls, ensure_ascii=False, default=str) if calls else ""]
        texts.append("\n".join(filter(None, parts)))
    if len(texts) == 1:
        return texts[0]
    return "\n\n".join(f"{message.get('role')}: {text}" for message, text in zip(side, texts, strict=True))
