"""Prompts that are also in evaluation sets: what is trained on should not be what is measured by.

A prompt matches a set where both are the same text or share 13 words in a row, whatever their case, spaces and
punctuation. Thirteen is the length of the GPT-3 paper's decontamination (arXiv 2005.14165, appendix C). It finds copies
and no paraphrases; a long instruction that stands before every question of a set matches as well, so look at what was
found before leaving it out.
"""

import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from apo_trl.errors import InputError
from apo_trl.io.readers import read_rows
from apo_trl.pairs.text.words import words

__all__ = ["LENGTH", "EvalSets", "prompt_text"]

LENGTH = 13
_FIELDS = ("prompt", "question", "instruction", "problem", "text", "messages")
_IDS = 20


class EvalSets:
    """Evaluation sets by their paths, and which of the prompts that were added are in them.

    Of the sets only hashes are kept, 8 bytes for each run of words. They are Python's, which differ between processes:
    not to be stored.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self._sets: dict[str, np.ndarray[Any, np.dtype[np.int64]]] = {}
        self._prompts: dict[str, int] = {}
        self._found: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}
        for path in paths:
            hashes, prompts = array("q"), 0
            for text in _prompts(path):
                hashes.extend(_hashes(text))
                prompts += 1
            if not hashes:
                raise InputError(f"The evaluation set {path} holds no words; leave it out or fill it.")
            self._sets[path], self._prompts[path] = np.unique(np.array(hashes, dtype=np.int64)), prompts
            self._found[path], self._counts[path] = [], 0

    def matches(self, prompt_text: str) -> list[str]:
        """Name the sets that hold the prompt, or 13 words in a row of it."""
        if not self._sets:
            return []
        asked = np.fromiter(_hashes(prompt_text), dtype=np.int64)
        return [name for name, hashes in self._sets.items() if _any_in(asked, hashes)]

    def add(self, id: str, prompt_text: str) -> list[str]:
        """Do as `matches`, and keep count for `summary`."""
        names = self.matches(prompt_text)
        for name in names:
            self._counts[name] += 1
            if len(self._found[name]) < _IDS:
                self._found[name].append(id)
        return names

    def summary(self) -> dict[str, dict[str, Any]]:
        """Give for each set its number of prompts, how many of ours it holds, and the first 20 ids of these."""
        return {
            name: {"prompts": self._prompts[name], "matches": self._counts[name], "ids": list(self._found[name])}
            for name in self._sets
        }


def prompt_text(row: Mapping[str, Any]) -> str | None:
    """Give what a row asks, from the first of its fields that holds any; of messages, the user's turns."""
    for field in _FIELDS:
        value = row.get(field)
        if isinstance(value, str) and value.strip():
            return value
        if isinstance(value, list):
            turns = [turn for turn in map(_turn, value) if turn]
            if turns:
                return "\n".join(turns)
    return None


def _turn(message: Any) -> str:
    if not isinstance(message, Mapping):
        return message if isinstance(message, str) else ""  # MT-bench has its turns as a list of texts
    content = message.get("content") if message.get("role") == "user" else None
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else ""


def _prompts(path: str) -> Iterator[str]:
    if not Path(path).exists():
        raise InputError(f"There is no evaluation set {path}; give the path of a .jsonl, .json, .parquet or .txt file.")
    if ".txt" in Path(path).suffixes:
        yield from _lines(path)
        return
    for number, row in enumerate(read_rows(path), start=1):
        text = prompt_text(row)
        if text is None:
            raise InputError(
                f"Row {number} (counted from 1) of the evaluation set {path} has no prompt in any of the fields "
                f"{', '.join(_FIELDS)}; its fields are {', '.join(map(str, row))}."
            )
        yield text


def _lines(path: str) -> Iterator[str]:
    """Give the lines of a text file, each a prompt."""
    import fsspec

    try:
        with fsspec.open(path, "rt", encoding="utf-8-sig", compression="infer") as file:
            yield from filter(str.strip, file)
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f"The evaluation set {path} cannot be read: {error}") from error


def _hashes(text: str) -> Iterator[int]:
    """Hash every 13 words in a row, or the whole of a shorter text; and the whole of any."""
    bare = [word for word in words(unicodedata.normalize("NFKC", text).casefold()) if any(map(str.isalnum, word))]
    if bare:
        yield hash(tuple(bare))
    for at in range(len(bare) - LENGTH + 1):
        yield hash(tuple(bare[at : at + LENGTH]))


def _any_in(asked: "np.ndarray[Any, np.dtype[np.int64]]", hashes: "np.ndarray[Any, np.dtype[np.int64]]") -> bool:
    at = np.searchsorted(hashes, asked).clip(max=len(hashes) - 1)
    return bool((hashes[at] == asked).any())
