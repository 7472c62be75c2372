"""The output of a run: the pairs in two formats, a report and a dataset card, each file whole or not at all."""

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
from apo_trl.io.tokenization import encode_pair
from apo_trl.models.loading import load_tokenizer
from apo_trl.pairs.config.settings import Settings
from apo_trl.pairs.functions.process import source_of
from apo_trl.pairs.llm.response_cache import ResponseCache
from apo_trl.pairs.output.advice import advice
from apo_trl.pairs.output.card import card
from apo_trl.pairs.output.parquet import to_parquet
from apo_trl.pairs.statistics.overlap import EvalSets, prompt_text
from apo_trl.pairs.statistics.statistics import Statistics

__all__ = ["Result", "functions_used", "judged_summary", "write"]

_FILES = ("pairs.jsonl", "pairs.parquet", "report.json", "README.md")


class Result(NamedTuple):
    """The result of a run; `stopped` is why it ended early, `broken` whether because of a server."""

    folder: Path
    report: dict[str, Any]
    stopped: str
    broken: bool


def write(
    settings: Settings, store: ResponseCache, stopped: str = "", broken: bool = False,
    servers: Mapping[str, str] = {}, thoughts: Mapping[str, int] = {}, repairs: Mapping[str, int] = {},
) -> Result:  # fmt: skip
    """Write `pairs.jsonl`, `pairs.parquet`, `report.json` and `README.md` from the rows of the cache."""
    folder = settings.folder
    tokenizer = load_tokenizer(settings.tokenizer) if settings.tokenizer else None
    statistics, overlap = Statistics(tokenizer, settings.max_length), EvalSets(settings.eval_sets)
    dropped, examples = Counter[str](), defaultdict[str, list[dict[str, str]]](list)
    example = None
    with contextlib.ExitStack() as stack:  # all files are put in their places together, when all are whole
        lines, parquet, reported, readme = (stack.enter_context(atomic_write(folder / name)) for name in _FILES)
        with _text_file(lines) as file:
            for name, reason, detail, text, _ in store.rows():
                row = json.loads(text) if text else {}
                if not reason:
                    reason, detail = _lost_in_training(row, tokenizer, settings.max_length)
                if reason:
                    dropped[reason] += 1
                    if len(examples[reason]) < 3:
                        examples[reason].append({"id": name, "detail": _without_urls(detail, settings)})
                    continue
                example = example or row
                statistics.add(row)
                overlap.add(name, prompt_text(row) or "")
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        to_parquet(lines, parquet)
        roles, contrast = store.usage(), statistics.summary()
        judged = judged_summary(json.loads(notes) for *_, notes in store.rows())
        report: dict[str, Any] = {
            "method": settings.method,
            "asked": contrast["pairs"] + dropped.total(),
            "kept": contrast["pairs"],
            "dropped": dict(dropped.most_common()),
            "complete": not stopped and not any(name.endswith("_error") or name == "not_answered" for name in dropped),
            "stopped": _without_urls(stopped, settings),
            "examples": dict(examples),
            "roles": roles,
            "cost": sum(role["cost"] for role in roles.values()),
            "servers": dict(servers),
            "thoughts": dict(thoughts),
            "repairs": {role: count for role, count in repairs.items() if count},
            "contrast": contrast,
            "settings": settings.described(),
            "functions": functions_used(settings, store),
            **({"judge": judged} if judged else {}),
            **({"overlap": _by_file_name(overlap.summary())} if settings.eval_sets else {}),
        }
        report["advice"] = [] if stopped else advice(report, settings)
        with _text_file(reported) as file:
            file.write(json.dumps(report, ensure_ascii=False, indent=2) + "\n")
        with _text_file(readme) as file:
            file.write(card(report, example, parquet.stat().st_size))
    return Result(folder, report, stopped, broken)


def functions_used(settings: Settings, store: ResponseCache) -> dict[str, dict[str, Any]]:
    """Return the function of each role that has one: its name, the hash of its source, and its results of all runs."""
    return {
        role.name: {
            "function": role.public_model,
            "source": source_of(str(role.function)),
            "results": store.results(role.name),
        }
        for role in settings.functions
    }


def _text_file(path: Path) -> TextIO:
    # Half of a surrogate pair in a name or a tool call, which UTF-8 cannot hold, becomes "?".
    return path.open("w", encoding="utf-8", errors="replace", newline="\n")


def _without_urls(text: str, settings: Settings) -> str:
    """Remove the servers' URLs: a report is published with the pairs."""
    for url in {role.base_url for role in settings.roles if role.base_url}:
        host = urllib.parse.urlsplit(url).netloc
        text = text.replace(url, "[its URL]")
        text = text.replace(host, "[its URL]") if re.search(r"[.:]", host) else text  # else it may be any word
    return text


def _by_file_name(overlap: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the paths of evaluation sets by their file names, with the folder's name if two are the same."""
    names = Counter(Path(path).name for path in overlap)
    parts = {path: Path(path).parts[-2 if names[Path(path).name] > 1 else -1 :] for path in overlap}
    return {"/".join(parts[path]): matches for path, matches in overlap.items()}


def _lost_in_training(row: Mapping[str, Any], tokenizer: Any, max_length: int | None) -> tuple[str, str]:
    """Return the reason and the details if training would fail on a pair, drop it, or learn nothing from it."""
    if tokenizer is None:
        return "", ""
    try:
        ids = dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), encode_pair(tokenizer, row), strict=True))
    except InputError as error:
        return "template_fails", str(error)
    if max_length and (length := len(ids["prompt_ids"])) >= max_length:
        return "prompt_fills_max_length", f"{length} tokens"
    detail = max_length and degenerate_reason({**row, **ids}, max_length=max_length)
    return ("identical_after_truncation", detail) if detail else ("", "")


def judged_summary(notes: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the counts of the judge's verdicts or scores in the notes of all rows, empty if there are none.

    `orders_agree`, `first_position_rate` and `ties` are shares of the comparisons with two verdicts, or None.
    """
    orders, scores = Counter[tuple[str, str]](), Counter[bool]()
    for note in notes:
        orders.update(map(tuple, note.get("comparisons", ())))
        scores.update(score is not None for score in note.get("scores", ()))
    if not orders:
        return {"scores": scores[True], "invalid": scores[False]} if scores else {}
    valid = Counter({pair: count for pair, count in orders.items() if "INVALID" not in pair})
    ties, total = valid["TIE", "TIE"], valid.total()
    first, second = (sum(pair.count(side) * count for pair, count in valid.items()) for side in "AB")
    return {
        "comparisons": orders.total(),
        "invalid": orders.total() - total,
        "orders_agree": (valid["A", "B"] + valid["B", "A"] + ties) / total if total else None,
        "first_position_rate": first / (first + second) if first + second else None,
        "ties": ties / total if total else None,
    }
