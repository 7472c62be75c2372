"""What `anchor`, `compare` and `score` share: records put before a judge, and what each outcome counts."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from apo_trl.pairs.build import Make, check_templates, process_all
from apo_trl.pairs.config.settings import Settings
from apo_trl.pairs.llm.response_cache import ResponseCache
from apo_trl.pairs.output.writer import functions_used, judged_summary
from apo_trl.pairs.progress import Progress
from apo_trl.pairs.prompts import Record

__all__ = ["POINTS", "count_outcomes", "judge_records", "no_verdict_lines"]

POINTS = {"first": 1.0, "second": 0.0, "tie": 0.5, "disagreement": 0.5}
"""Points of the answer shown first: ties and orders that disagree count half (MT-Bench, arXiv 2306.05685)."""


def judge_records(
    settings: Settings, records: Sequence[Record], make: Make
) -> tuple[list[tuple[str, str, str, Any]], dict[str, Any]]:
    """Run `make` on every record, with the response cache of `settings.folder`.

    Returns the id, the reason and the detail of a dropped record, and the result of each record; and a report with
    `judge`, the judge's statistics, `functions`, `thoughts`, how many replies of each role had some, and `stopped`, the
    reason of an early end.
    """
    check_templates(settings)
    with ResponseCache(settings.folder) as cache:
        servers = process_all(settings, records, cache, Progress(len(records)), make)
        rows, functions = list(cache.rows()), functions_used(settings, cache)
    results = [(name, why, detail, json.loads(result) if result else None) for name, why, detail, result, _ in rows]
    judge = judged_summary(json.loads(notes) for *_, notes in rows)
    thoughts = dict(servers.requester.thoughts)
    return results, {"judge": judge, "functions": functions, "thoughts": thoughts, "stopped": servers.limits.stopped}


def count_outcomes(outcomes: Iterable[str], wins: str, losses: str) -> dict[str, int]:
    """Count the outcomes of `duel`, with `wins` and `losses` as the names of those of the answer shown first."""
    counts = Counter(outcomes)
    names = {wins: "first", losses: "second", "ties": "tie", "orders_disagree": "disagreement"}
    return {name: counts[outcome] for name, outcome in names.items()} | {"invalid": counts["judge_invalid"]}


def no_verdict_lines(dropped: Mapping[str, int]) -> list[str]:
    """Return the line of a text report that counts the dropped records by reason, if there are any."""
    counts = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
    return [f"No verdict: {counts}."] if dropped else []
