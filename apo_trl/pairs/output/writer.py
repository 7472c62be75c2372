"""What a run leaves behind: the pairs in two formats, a report and a dataset card, each file whole or not at all."""

import contextlib
import json
import re
import urllib.parse
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from apo_trl.errors import InputError
from apo_trl.io.files import atomic_write
from apo_trl.io.rows import degenerate_reason
from apo_trl.io.tokenization import encode_pair, load_tokenizer
from apo_trl.pairs.config.settings import Settings
from apo_trl.pairs.llm.response_cache import ResponseCache
from apo_trl.pairs.output.card import card
from apo_trl.pairs.output.parquet import to_parquet
from apo_trl.pairs.statistics.overlap import EvalSets, prompt_text
from apo_trl.pairs.statistics.statistics import Statistics

__all__ = ["Result", "judged_summary", "write"]

_FILES = ("pairs.jsonl", "pairs.parquet", "report.json", "README.md")
_EXAMPLES = 3


class Result(NamedTuple):
    """What a run came to. `stopped` says why it ended early, and `broken` that a server is the reason."""

    folder: Path
    report: dict[str, Any]
    stopped: str
    broken: bool


def write(
    settings: Settings,
    store: ResponseCache,
    *,
    stopped: str = "",
    broken: bool = False,
    servers: Mapping[str, str] | None = None,
) -> Result:
    """Write `pairs.jsonl`, `pairs.parquet`, `report.json` and `README.md` from how the rows ended."""
    folder = settings.folder
    tokenizer = load_tokenizer(settings.tokenizer) if settings.tokenizer else None
    statistics = Statistics(tokenizer, settings.max_length)
    overlap = EvalSets(settings.eval_sets)
    dropped: Counter[str] = Counter()
    examples: dict[str, list[dict[str, str]]] = defaultdict(list)
    judged = _Judged()
    kept, example = 0, None
    with contextlib.ExitStack() as stack:  # all files are put in their places together, when all are whole
        lines, parquet, reported, readme = (stack.enter_context(atomic_write(folder / name)) for name in _FILES)
        with _text_file(lines) as file:
            for name, reason, detail, text, notes in store.rows():
                judged.add(json.loads(notes))
                row = json.loads(text) if text else {}
                if not reason:
                    reason, detail = _lost_in_training(row, tokenizer, settings.max_length)
                if reason:
                    dropped[reason] += 1
                    if len(examples[reason]) < _EXAMPLES:
                        examples[reason].append({"id": name, "detail": _without_places(detail, settings)})
                    continue
                kept += 1
                example = example or row
                statistics.add(row)
                overlap.add(name, prompt_text(row) or "")
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        to_parquet(lines, parquet)
        roles = store.usage()
        report: dict[str, Any] = {
            "method": settings.method,
            "asked": kept + dropped.total(),
            "kept": kept,
            "dropped": dict(dropped.most_common()),
            "complete": not stopped and not any(name.endswith("_error") or name == "not_answered" for name in dropped),
            "stopped": _without_places(stopped, settings),
            "examples": dict(examples),
            "roles": roles,
            "cost": sum(role["cost"] for role in roles.values()),
            "servers": dict(servers or {}),
            "contrast": statistics.summary(),
            "settings": settings.described(),
        }
        if judged.seen:
            report["judge"] = judged.summary()
        if settings.eval_sets:
            report["overlap"] = _named(overlap.summary())
        with _text_file(reported) as file:
            json.dump(report, file, ensure_ascii=False, indent=2)
            file.write("\n")
        with _text_file(readme) as file:
            file.write(card(report, example, parquet.stat().st_size))
    return Result(folder, report, stopped, broken)


def _text_file(path: Path) -> TextIO:
    # Half of a surrogate pair in a name or a tool call, which UTF-8 cannot hold, becomes "?".
    return path.open("w", encoding="utf-8", errors="replace", newline="\n")


def _without_places(text: str, settings: Settings) -> str:
    """Leave out where servers are: a report is published with the pairs."""
    for url in {role.base_url for role in settings.roles if role.base_url}:
        host = urllib.parse.urlsplit(url).netloc
        text = text.replace(url, "[its URL]")
        text = text.replace(host, "[its URL]") if re.search(r"[.:]", host) else text  # else it may be any word
    return text


def _named(overlap: Mapping[str, Any]) -> dict[str, Any]:
    """Name evaluation sets by their files, and by more of their paths only where names are the same."""
    names = Counter(Path(path).name for path in overlap)
    return {
        Path(path).name if names[Path(path).name] == 1 else "/".join(Path(path).parts[-2:]): found
        for path, found in overlap.items()
    }


def _lost_in_training(row: Mapping[str, Any], tokenizer: Any, max_length: int | None) -> tuple[str, str]:
    """Name why training would fail on a pair, learn nothing from it when it is cut to `max_length`, or leave it out."""
    if tokenizer is None:
        return "", ""
    try:
        prompt, chosen, rejected = encode_pair(tokenizer, row)
    except InputError as error:
        return "template_fails", str(error)
    if max_length is None:
        return "", ""
    if len(prompt) >= max_length:
        return "prompt_fills_max_length", f"{len(prompt)} tokens"
    ids = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
    fault = degenerate_reason({**row, **ids}, max_length=max_length)
    return ("identical_after_truncation", fault) if fault else ("", "")


def judged_summary(notes: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Sum up what the judge did over rows, from their notes: empty where it did nothing."""
    judged = _Judged()
    for note in notes:
        judged.add(note)
    return judged.summary() if judged.seen else {}


class _Judged:
    """What the judge did, over all rows: kept or not."""

    def __init__(self) -> None:
        self.orders: Counter[tuple[str, str]] = Counter()
        self.scores = self.unscored = 0

    def add(self, notes: Mapping[str, Any]) -> None:
        self.orders.update((forward, backward) for forward, backward in notes.get("comparisons", ()))
        self.scores += sum(score is not None for score in notes.get("scores", ()))
        self.unscored += sum(score is None for score in notes.get("scores", ()))

    @property
    def seen(self) -> bool:
        return bool(self.orders or self.scores or self.unscored)

    def summary(self) -> dict[str, Any]:
        """Shares are of the comparisons in which both orders gave a verdict; None where there is none."""
        if not self.orders:
            return {"scores": self.scores, "invalid": self.unscored}
        valid = {pair: count for pair, count in self.orders.items() if "INVALID" not in pair}
        total = sum(valid.values())

        def share(part: int, whole: int) -> float | None:
            return part / whole if whole else None

        agreed = sum(valid.get(pair, 0) for pair in (("A", "B"), ("B", "A"), ("TIE", "TIE")))
        decided = sum((pair[0] != "TIE") * count + (pair[1] != "TIE") * count for pair, count in valid.items())
        first = sum((pair[0] == "A") * count + (pair[1] == "A") * count for pair, count in valid.items())
        return {
            "comparisons": self.orders.total(),
            "invalid": self.orders.total() - total,
            "orders_agree": share(agreed, total),
            "first_position_rate": share(first, decided),
            "ties": share(valid.get(("TIE", "TIE"), 0), total),
        }
