"""What a server honours, found out by asking it: nothing here relies on what it does not.

`n` saves sending a prompt again for each sample, `seed` makes sampling repeatable. `response_format` and `logprobs` are
told to the user and not used: tagged text works with every server.
"""

import json
from collections.abc import Awaitable, Callable
from typing import Any

__all__ = ["FEATURES", "describe", "probe"]

_NUMBER = {"type": "object", "properties": {"number": {"type": "integer"}}, "required": ["number"]}
_SCHEMA = {"type": "json_schema", "json_schema": {"name": "answer", "schema": _NUMBER}}
FEATURES: dict[str, Any] = {"n": 2, "seed": 7, "logprobs": True, "response_format": _SCHEMA}

Honours = dict[str, bool | None]
"""True where a feature works, False where it is ignored, None where it is refused."""


async def probe(post: Callable[[dict[str, Any]], Awaitable[Any]], body: dict[str, Any]) -> Honours:
    """Find out which of the features a server honours.

    `post` sends a body and gives the response's, or None where the server refused it; `body` is one that it takes.
    """
    if (both := [await post(body | FEATURES) for _ in range(2)])[0] is not None:
        return {name: _works(name, both) for name in FEATURES}
    found: Honours = {}
    for name, value in FEATURES.items():
        alone = [await post({**body, name: value}) for _ in range(2 if name == "seed" else 1)]
        found[name] = None if alone[0] is None else _works(name, alone)
    return found


def _works(name: str, bodies: list[Any]) -> bool:
    choices = bodies[0]["choices"]
    texts = [(body["choices"][0].get("message") or {}).get("content") for body in bodies if body is not None]
    if name == "n":
        return len(choices) == 2
    if name == "seed":
        return len(texts) == 2 and texts[0] == texts[1]
    if name == "logprobs":
        return bool(choices[0].get("logprobs"))
    try:
        return isinstance(json.loads(texts[0] or ""), dict)
    except ValueError:
        return False


def describe(honours: Honours) -> str:
    """Say it in a line."""
    groups = {
        "honours": [name for name, works in honours.items() if works],
        "ignores": [name for name, works in honours.items() if works is False],
        "refuses": [name for name, works in honours.items() if works is None],
    }
    return "; ".join(f"{verb} {', '.join(names)}" for verb, names in groups.items() if names)
