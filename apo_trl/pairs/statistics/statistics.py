"""How contrastive the pairs of a preference dataset are, before and after the truncation that training does.

Whatever the pairs came from: rows are read one at a time, measured by pure functions, and only numbers are kept. The
measures are those of the APO paper (arXiv 2408.06266, Table 1), Jaccard similarity of token sets and Levenshtein
distance in characters, and lengths beside them, because a dataset whose chosen answers are longer teaches length.

Left out on purpose: embeddings, and any verdict; how close pairs should be depends on where they came from.
"""

from array import array
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rapidfuzz.distance import Levenshtein

from apo_trl.errors import InputError
from apo_trl.io.messages import completion_text
from apo_trl.io.rows import common_prefix_length, degenerate_reason, normalise_row
from apo_trl.io.tokenization import encode_pair
from apo_trl.pairs.text.words import words

__all__ = ["LENGTHS", "MEASURES", "Statistics", "contrast"]

_SHARES = [step / 10 for step in range(11)]
LENGTHS = [0, *(digit * 10**power for power in range(5) for digit in (1, 2, 5)), 100_000]
_RATIOS = [0, 1 / 8, 1 / 4, 1 / 2, 2 / 3, 4 / 5, 1 / 1.1, 1.1, 5 / 4, 3 / 2, 2, 4, 8]

# What each measure means to a newcomer, and the edges of its histogram (what lies above the last is in the last bin).
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


def contrast(
    prompt: str, chosen: str, rejected: str, tokenize: Callable[[str], Sequence[Hashable]] = words
) -> dict[str, float]:
    """Measure how far apart two answers to a prompt are.

    `tokenize` may be the training tokenizer's. `jaccard` is the intersection over the union
    of the token sets, `levenshtein` counts characters, and `length_ratio` is chosen over rejected.

    Two answers without tokens are the same: Jaccard and `shared_prefix_share` are 1, the distances 0. One beside an
    answer without tokens shares nothing: 0, 0, and a normalised distance of 1. In `length_ratio` an answer without
    tokens counts as one token, so that exchanging the answers always gives the reciprocal.
    """
    return _measure(len(tokenize(prompt)), (tokenize(chosen), tokenize(rejected)), (chosen, rejected))


def _measure(
    prompt_tokens: int, sides: tuple[Sequence[Hashable], Sequence[Hashable]], texts: tuple[str, str]
) -> dict[str, float]:
    chosen, rejected = sides
    one, other = set(chosen), set(rejected)
    longer, prefix = max(len(chosen), len(rejected)), common_prefix_length(chosen, rejected)
    distance = Levenshtein.distance(*texts)
    return {
        "jaccard": len(one & other) / len(one | other) if longer else 1.0,
        "levenshtein": distance,
        "levenshtein_normalised": distance / max(1, *map(len, texts)),
        "shared_prefix": prefix,
        "shared_prefix_share": prefix / longer if longer else 1.0,
        "length_ratio": max(1, len(chosen)) / max(1, len(rejected)),
        "prompt_tokens": prompt_tokens,
        "chosen_tokens": len(chosen),
        "rejected_tokens": len(rejected),
    }


class Statistics:
    """What is known of the pairs that were added: of each, nine numbers are kept (eighteen with `max_length`), no text.

    With `tokenizer`, tokens are those that training sees, the template's end marks among them, else `words`. With
    `max_length` too, everything is measured again after truncation as TRL's collator does it: the start of prompt and
    answer is kept, or the end with `keep_end`.
    """

    def __init__(self, tokenizer: Any = None, max_length: int | None = None, keep_end: bool = False) -> None:
        if max_length is not None and tokenizer is None:
            raise InputError("max_length needs a tokenizer, the one of the model that will be trained.")
        self._tokenizer, self._max_length, self._keep_end = tokenizer, max_length, keep_end
        self._before, self._after = _Measured(), _Measured()
        self._filled = self._cut_alike = 0

    def add(self, row: Mapping[str, Any]) -> None:
        """Measure a pair, as `read_pairs` gives it or as any preference dataset has it."""
        row = normalise_row(row)
        texts = completion_text(row["chosen"]), completion_text(row["rejected"])
        if self._tokenizer is None:
            self._before.add(contrast(completion_text(row["prompt"]), *texts), texts[0] == texts[1])
            return
        try:
            start, *sides = encode_pair(self._tokenizer, row)
        except InputError as error:
            raise InputError(f"Row {self._before.pairs + 1} (counted from 1): {error}") from error
        measures = _measure(len(start), (sides[0], sides[1]), texts)
        same = row["chosen"] == row["rejected"] or sides[0] == sides[1]
        self._before.add(measures, same)
        if (limit := self._max_length) is None:
            return
        if len(start) >= limit and not self._keep_end:
            self._filled += 1
            return
        pair = {**row, "prompt_ids": start, "chosen_ids": sides[0], "rejected_ids": sides[1]}
        alike = not degenerate_reason(pair) and bool(degenerate_reason(pair, max_length=limit, keep_end=self._keep_end))
        self._cut_alike += alike
        kept = [side[-limit:] if self._keep_end else side[: limit - len(start)] for side in sides]
        if kept != sides:
            # A whole answer keeps its own text: decoding would set it apart from itself by the template's line ends.
            left = [
                text if part == side else self._tokenizer.decode(part, skip_special_tokens=True)
                for text, part, side in zip(texts, kept, sides, strict=True)
            ]
            measures = _measure(len(start), (kept[0], kept[1]), (left[0], left[1]))
        if self._keep_end:  # answers push the prompt out; counted is what stays before the shorter one
            measures = {**measures, "prompt_tokens": min(len(start), limit - min(map(len, kept)))}
        self._after.add(measures, same or alike)

    def summary(self) -> dict[str, Any]:
        """Give the figures, ready for JSON.

        `before` has `pairs`, the shares `identical`, `chosen_longer` and `rejected_longer` (in tokens), and for each
        measure mean, median, p5, p95, min, max and histogram. With `max_length`, so has `after`, for the pairs that TRL
        keeps: it leaves out those whose prompt alone fills `max_length` (`prompt_fills_max_length`; none with
        `keep_end`). Of the others, `identical_after_truncation` differed only in what is cut away.
        """
        name = getattr(self._tokenizer, "name_or_path", "") or "the given tokenizer's"
        tokens = (
            "words and punctuation" if self._tokenizer is None else Path(name).name if Path(name).exists() else name
        )
        before = self._before.summary()
        if self._max_length is None:
            return {"pairs": before["pairs"], "tokens": tokens, "before": before}
        return {
            "pairs": before["pairs"],
            "tokens": tokens,
            "max_length": self._max_length,
            "truncation_mode": "keep_end" if self._keep_end else "keep_start",
            "prompt_fills_max_length": self._filled,
            "identical_after_truncation": self._cut_alike,
            "before": before,
            "after": self._after.summary(),
        }


class _Measured:
    """The measures of many pairs, a column each."""

    def __init__(self) -> None:
        self.pairs = self._identical = 0
        self._columns = {name: array("d") for name in MEASURES}

    def add(self, measures: Mapping[str, float], identical: bool) -> None:
        self.pairs += 1
        self._identical += identical
        for name, column in self._columns.items():
            column.append(measures[name])

    def summary(self) -> dict[str, Any]:
        if not self.pairs:
            return {"pairs": 0}
        columns = {name: np.array(column) for name, column in self._columns.items()}
        chosen, rejected = columns["chosen_tokens"], columns["rejected_tokens"]
        return {
            "pairs": self.pairs,
            "identical": self._identical / self.pairs,
            "chosen_longer": float((chosen > rejected).mean()),
            "rejected_longer": float((chosen < rejected).mean()),
            **{name: _describe(column, MEASURES[name][1]) for name, column in columns.items()},
        }


def _describe(column: "np.ndarray[Any, np.dtype[np.float64]]", edges: list[float]) -> dict[str, Any]:
    p5, median, p95 = np.quantile(column, [0.05, 0.5, 0.95])
    counts, _ = np.histogram(column.clip(max=edges[-1]), bins=edges)
    numbers = {"mean": column.mean(), "median": median, "p5": p5, "p95": p95, "min": column.min(), "max": column.max()}
    histogram = {"edges": [float(edge) for edge in edges], "counts": counts.tolist()}
    return {**{name: float(number) for name, number in numbers.items()}, "histogram": histogram}
