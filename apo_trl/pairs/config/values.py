"""A recipe's values in the types of their keys: as YAML reads them, or as texts from the command line, all the same.

No message repeats what stands where a text is due: it might be a key that was written into the wrong place.
"""

import json
import math
import re
import typing
from collections.abc import Callable
from dataclasses import field
from typing import Any

from apo_trl.errors import InputError

__all__ = ["key", "read"]

# What `extra_body` would send in the place of what the run itself sends, and where that is said instead.
_OURS = {
    "model": "name it in {role}_model",
    "messages": "the run writes them",
    "temperature": "set {role}_temperature",
    "top_p": "set {role}_top_p",
    "max_tokens": "set {role}_max_tokens",
    "n": "set num_responses",
    "seed": "set seed",
    "stream": "answers are taken whole",
}
_SECRET = re.compile(r"api.?key|secret|password|authorization", re.IGNORECASE)


def key(default: Any, help: str, kind: str = "str") -> Any:
    """Make a dataclass field that is a key of the recipe, of the kind str, int, float, bool, map or list (of texts)."""
    if kind == "map":
        return field(default_factory=dict, metadata={"help": help, "kind": kind})
    return field(default=default, metadata={"help": help, "kind": kind})


def read(name: str, entry: Any, value: Any, *, many: bool) -> Any:
    """Give a value in the type of its key, or a list of them where it may have several. Raises InputError."""
    if not many:
        return _one(name, entry, value)
    return [_one(name, entry, item) for item in (value if isinstance(value, (list, tuple)) else [value])]


def _one(name: str, entry: Any, value: Any) -> Any:
    kind = entry.metadata["kind"]
    if value is None or (isinstance(value, str) and value in ("null", "none", "None")):
        if kind == "map":
            return {}
        if type(None) not in typing.get_args(entry.type):
            raise InputError(f"{name} cannot be null; leave it out for its default.")
        return None
    try:
        found = _CONVERT[kind](value)
    except (TypeError, ValueError, OverflowError, RecursionError):
        raise InputError(f"{name}: {_shown(kind, value)} is not {_WORDS[kind]}.") from None
    if kind == "map":
        _check_body(name, found)
    return found


def _shown(kind: str, value: Any) -> str:
    number = kind in ("int", "float", "bool") and isinstance(value, str)
    if (number or isinstance(value, (bool, int, float))) and len(shown := repr(value)) <= 20:
        return shown
    names: dict[type, str] = {dict: "a map", list: "a list", tuple: "a list", str: "the text", int: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")


def _str(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise TypeError
    str(value).encode()
    return str(value)


def _int(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    if isinstance(value, int) or (isinstance(value, str) and re.fullmatch(r"\s*[-+]?\d+\s*", value)):
        return int(value)  # and not by way of a float, which holds 53 bits
    number = float(value)
    if not number.is_integer():
        raise ValueError
    return int(number)


def _float(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise ValueError
    return float(value)


def _bool(value: Any) -> bool:
    if str(value).lower() not in ("true", "false"):
        raise ValueError
    return str(value).lower() == "true"


def _map(value: Any) -> dict[str, Any]:
    value = json.loads(value) if isinstance(value, str) else value
    if not isinstance(value, dict):
        raise TypeError
    text = json.dumps(value, allow_nan=False, ensure_ascii=False)  # YAML has dates and more, which no request can hold
    text.encode()
    read: dict[str, Any] = json.loads(text)
    return read


def _check_body(name: str, body: dict[str, Any]) -> None:
    for part in body:
        if part in _OURS:
            raise InputError(f"{name}: '{part}' cannot stand in it; {_OURS[part].format(role=name.split('_')[0])}.")
        if _SECRET.search(part):
            raise InputError(
                f"{name}: '{part}' looks like a key, which does not belong in a recipe; put it into an environment "
                f"variable and name that in {name.split('_')[0]}_api_key_env."
            )


_CONVERT: dict[str, Callable[[Any], Any]] = {
    "str": _str,
    "list": _str,
    "int": _int,
    "float": _float,
    "bool": _bool,
    "map": _map,
}
_WORDS = {
    "str": "a plain text; write one, in quotes where it could be something else",
    "list": "a text; write one, or a list of them",
    "int": "a whole number; write one, as 8",
    "float": "a number; write one, as 0.5",
    "bool": "true or false; write one of the two",
    "map": "a map of what JSON can hold; write one as {min_p: 0.05}, or its JSON",
}
