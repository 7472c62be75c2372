"""Training prompts that are also in evaluation sets.

A prompt matches a set if both have the same text or share 13 words in a row, without case, spaces and punctuation, as
in the GPT-3 paper (arXiv 2005.14165, appendix C). Paraphrases do not match; an instruction before every question does.
"""

import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from apo_trl.errors import InputError
from apo_trl.io.completion import completion_text
from apo_trl.io.readers import check_dataset, read_rows
from apo_trl.pairs.statistics.statistics import words

__all__ = ["EvalSets", "prompt_text"]

_LENGTH = 13
_FIELDS = ("prompt", "question", "instruction", "problem", "text", "messages")


class EvalSets:
    """The hashes of evaluation sets, 8 bytes for each run of words, and the prompts that overlap with them."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._hashes: dict[str, np.ndarray[Any, np.dtype[np.int64]]] = {}
        self._summary: dict[str, dict[str, Any]] = {}
        for path in paths:
            check_dataset(path, "eval_sets")
            hashes, prompts = array("q"), 0
            try:
                for prompts, row in enumerate(read_rows(path), start=1):
                    if (text := prompt_text(row)) is None:
                        fields = f"has no prompt in the fields {', '.join(_FIELDS)}; its fields are {', '.join(row)}"
                        raise InputError(f"row {prompts} (counted from 1) of {path} {fields}. Rename one of them.")
                    hashes.extend(_hashes_of(text))
            except InputError as error:
                raise InputError(f"eval_sets: {error}") from error
            if not hashes:
                raise InputError(f"eval_sets: {path} holds no words. Remove it or fill it.")
            self._hashes[path] = np.unique(np.array(hashes, dtype=np.int64))
            self._summary[path] = {"prompts": prompts, "matches": 0, "ids": []}

    def add(self, id: str, prompt_text: str) -> list[str]:
        """Return the paths of the sets that contain the prompt, or 13 words in a row of it, and count the match."""
        own = np.fromiter(_hashes_of(prompt_text) if self._hashes else (), dtype=np.int64)
        nearest = {path: hashes[hashes.searchsorted(own) % len(hashes)] for path, hashes in self._hashes.items()}
        paths = [path for path, hashes in nearest.items() if (hashes == own).any()]
        for path in paths:
            self._summary[path]["matches"] += 1
            self._summary[path]["ids"] = [*self._summary[path]["ids"], id][:20]
        return paths

    def summary(self) -> dict[str, dict[str, Any]]:
        """Return for each set its number of `prompts`, the `matches` among those added, and their first 20 `ids`."""
        return self._summary


def prompt_text(row: Mapping[str, Any]) -> str | None:
    """Return the prompt in the first field of a row that has one; of messages, the user's turns."""
    for field in _FIELDS:
        value = row.get(field)
        if isinstance(value, str) and value.strip():
            return value
        if isinstance(value, list) and (turns := list(filter(None, map(_turn, value)))):
            return "\n".join(turns)
    return None


def _turn(message: Any) -> str:
    if not isinstance(message, Mapping):
        return message if isinstance(message, str) else ""  # MT-bench has its turns as a list of strings
    return completion_text([message]) if message.get("role") == "user" else ""


def _hashes_of(text: str) -> Iterator[int]:
    """Hash the whole text, and every 13 words in a row."""
    bare = [word for word in words(unicodedata.normalize("NFKC", text).casefold()) if any(map(str.isalnum, word))]
    if bare:
        yield hash(tuple(bare))
    for start in range(len(bare) - _LENGTH + 1):
        yield hash(tuple(bare[start : start + _LENGTH]))
