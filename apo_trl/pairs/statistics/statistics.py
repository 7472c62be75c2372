"""How contrastive the pairs of a dataset are, before and after truncation, by the APO paper's measures and lengths."""

from array import array
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import regex
from rapidfuzz.distance import Levenshtein

from apo_trl.errors import InputError
from apo_trl.io.completion import completion_text
from apo_trl.io.prompt import common_prefix_length
from apo_trl.io.rows import degenerate_reason, normalise_row
from apo_trl.io.tokenization import encode_pair

__all__ = ["LENGTHS", "MEASURES", "Statistics", "contrast", "words"]

# Longer answers take seconds: larger distances of them are estimated from the first 50,000 characters that differ.
_WHOLE, _NEAR = 50_000, 5_000
_SHARES = [step / 10 for step in range(11)]
LENGTHS = [0, *(digit * 10**power for power in range(5) for digit in (1, 2, 5)), 100_000]
_RATIOS = [0, 1 / 8, 1 / 4, 1 / 2, 2 / 3, 4 / 5, 1 / 1.1, 1.1, 5 / 4, 3 / 2, 2, 4, 8]

# The meaning of each measure, and the edges of its histogram (the last bin holds what lies above, too).
MEASURES: dict[str, tuple[str, list[float]]] = {
    "jaccard": ("tokens that both answers use, of all that either uses; higher is closer (1: the same)", _SHARES),
    "levenshtein": ("characters to insert, delete or replace between the answers; lower is closer", LENGTHS),
    "levenshtein_normalised": ("the same, of the longer answer's characters; lower is closer (0: the same)", _SHARES),
    "shared_prefix": ("tokens before the answers first differ; higher is closer", LENGTHS),
    "shared_prefix_share": ("the same, of the longer answer's tokens; higher is closer (1: the same)", _SHARES),
    "length_ratio": ("tokens of chosen over rejected; nearer to 1 is closer, far above 1 teaches length", _RATIOS),
    "prompt_tokens": ("length of the prompt", LENGTHS),
    "chosen_tokens": ("length of the chosen answer", LENGTHS),
    "rejected_tokens": ("length of the rejected answer", LENGTHS),
}

_NO_SPACES = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = regex.compile(rf"[{_NO_SPACES}]\p{{M}}*|(?:(?![{_NO_SPACES}])[\p{{L}}\p{{M}}\p{{N}}_])+|\S")


def words(text: str) -> list[str]:
    """Split a text into words and punctuation marks; scripts without spaces, into characters with their marks."""
    return list(_WORD.findall(text))


def contrast(
    prompt: str, chosen: str, rejected: str, tokenize: Callable[[str], Sequence[Hashable]] = words
) -> dict[str, float]:
    """Compute MEASURES for two answers to a prompt, and whether the edit distance is `estimated`.

    Two empty answers are the same. In `length_ratio` an empty answer counts as one token.
    """
    return _measure(len(tokenize(prompt)), tokenize(chosen), tokenize(rejected), chosen, rejected)


def _measure(
    prompt_tokens: int, chosen: Sequence[Hashable], rejected: Sequence[Hashable], *texts: str
) -> dict[str, float]:
    longer, prefix = max(len(chosen), len(rejected)), common_prefix_length(chosen, rejected)
    distance, estimated = _edit_distance(*texts)
    return {
        "jaccard": len({*chosen} & {*rejected}) / len({*chosen, *rejected}) if longer else 1.0,
        "levenshtein": distance,
        "levenshtein_normalised": distance / max(1, *map(len, texts)),
        "shared_prefix": prefix,
        "shared_prefix_share": prefix / longer if longer else 1.0,
        "length_ratio": max(1, len(chosen)) / max(1, len(rejected)),
        "prompt_tokens": prompt_tokens,
        "chosen_tokens": len(chosen),
        "rejected_tokens": len(rejected),
        "estimated": estimated,
    }


def _edit_distance(first: str, second: str) -> tuple[int, bool]:
    whole = len(first) * len(second) <= _WHOLE**2
    distance = Levenshtein.distance(first, second, score_cutoff=None if whole else _NEAR)
    if whole or distance <= _NEAR:
        return distance, False
    for _ in range(2):  # drop the common prefix, then the common suffix
        shared = common_prefix_length(first, second)
        first, second = first[shared:][::-1], second[shared:][::-1]
    scale = max(1, len(first) / _WHOLE, len(second) / _WHOLE)
    return round(scale * Levenshtein.distance(first[:_WHOLE], second[:_WHOLE])), scale > 1


_Columns = dict[str, "array[float]"]


class Statistics:
    """The measures of many pairs, as numbers only.

    Tokens are those of `tokenizer`, or else `words`. With `max_length`, everything is measured again after truncation
    by TRL's collator, which keeps the start.
    """

    def __init__(self, tokenizer: Any = None, max_length: int | None = None) -> None:
        if max_length is not None and tokenizer is None:
            raise InputError("max_length: needs a tokenizer. Set that of the model to be trained.")
        self._tokenizer, self._max_length = tokenizer, max_length
        names = ("identical", "estimated", *MEASURES)
        self._before, self._after = ({name: array("d") for name in names} for _ in range(2))
        self._filled = self._cut_alike = 0

    def add(self, row: Mapping[str, Any]) -> None:
        """Measure a pair of any preference dataset."""
        row = normalise_row(row)
        texts = completion_text(row["chosen"]), completion_text(row["rejected"])
        if self._tokenizer is None:
            _append(self._before, contrast(completion_text(row["prompt"]), *texts), texts[0] == texts[1])
            return
        try:
            prompt, *sides = encode_pair(self._tokenizer, row)
        except InputError as error:
            raise InputError(f"Row {len(self._before['identical']) + 1} (counted from 1): {error}") from error
        measures = _measure(len(prompt), sides[0], sides[1], *texts)
        same = row["chosen"] == row["rejected"] or sides[0] == sides[1]
        _append(self._before, measures, same)
        limit = self._max_length
        if limit is None or len(prompt) >= limit:
            self._filled += limit is not None
            return
        pair = {**row, "prompt_ids": prompt, "chosen_ids": sides[0], "rejected_ids": sides[1]}
        alike = not degenerate_reason(pair) and bool(degenerate_reason(pair, max_length=limit))
        self._cut_alike += alike
        kept = [side[: limit - len(prompt)] for side in sides]
        if kept != sides:
            # A whole answer keeps its own text: decoding adds the template's line ends.
            kept_texts = [
                text if part == side else self._tokenizer.decode(part, skip_special_tokens=True)
                for text, part, side in zip(texts, kept, sides, strict=True)
            ]
            measures = _measure(len(prompt), kept[0], kept[1], *kept_texts)
        _append(self._after, measures, same or alike)

    def summary(self) -> dict[str, Any]:
        """Return the figures, ready for JSON.

        `before` has `pairs`, of these with an `estimated` edit distance, the shares `identical`, `chosen_longer` and
        `rejected_longer` (in tokens), and for each measure mean, median, p5, p95, min, max and histogram; so has
        `after`, without the pairs that TRL drops.
        """
        tokens = "words and punctuation"
        if self._tokenizer is not None:
            tokens = getattr(self._tokenizer, "name_or_path", "") or "the given tokenizer's"
            tokens = Path(tokens).name if Path(tokens).exists() else tokens  # not where its user keeps files
        before = _summary(self._before)
        summary: dict[str, Any] = {"pairs": before["pairs"], "tokens": tokens, "before": before}
        if self._max_length is not None:
            summary |= {"max_length": self._max_length, "truncation_mode": "keep_start"}
            summary |= {"prompt_fills_max_length": self._filled, "identical_after_truncation": self._cut_alike}
            summary |= {"after": _summary(self._after)}
        return summary


def _append(columns: _Columns, measures: Mapping[str, float], identical: bool) -> None:
    for name, value in {**measures, "identical": identical}.items():
        columns[name].append(value)


def _summary(columns: _Columns) -> dict[str, Any]:
    if not columns["identical"]:
        return {"pairs": 0}
    longer = np.subtract(columns["chosen_tokens"], columns["rejected_tokens"])
    return {
        "pairs": len(longer),
        "identical": float(np.mean(columns["identical"])),
        "chosen_longer": float((longer > 0).mean()),
        "rejected_longer": float((longer < 0).mean()),
        "estimated": int(sum(columns["estimated"])),
        **{name: _describe(np.array(columns[name]), edges) for name, (_, edges) in MEASURES.items()},
    }


def _describe(column: "np.ndarray[Any, np.dtype[np.float64]]", edges: list[float]) -> dict[str, Any]:
    p5, median, p95 = np.quantile(column, [0.05, 0.5, 0.95])
    counts, _ = np.histogram(column.clip(max=edges[-1]), bins=edges)
    numbers = {"mean": column.mean(), "median": median, "p5": p5, "p95": p95, "min": column.min(), "max": column.max()}
    histogram = {"edges": list(map(float, edges)), "counts": counts.tolist()}
    return {**{name: float(number) for name, number in numbers.items()}, "histogram": histogram}
