"""Score a model's answers by a function of the user: the share that follows, the score of each answer, the worst."""

import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from apo_trl.checks.repetition import broken, words
from apo_trl.checks.rewards import FOLLOWED
from apo_trl.evaluation.intervals import wilson
from apo_trl.evaluation.judged import judge_records
from apo_trl.io.files import atomic_write, write_json
from apo_trl.pairs.config.settings import Settings
from apo_trl.pairs.llm.requests import Dropped, Requester
from apo_trl.pairs.methods import with_system
from apo_trl.pairs.output.parquet import is_writable
from apo_trl.pairs.prompts import PromptSource, Record
from apo_trl.pairs.text.reasons import RETRY, WAITING

__all__ = ["score", "summarise", "table"]

_PACKAGES = ("apo-trl", "transformers", "torch", "peft")


def score(settings: Settings) -> dict[str, Any]:
    """Answer every prompt once with the policy, score the answers with `judge_function`, and return `score.json`.

    Writes `answers.parquet`, a row for each prompt with `id`, `prompt`, `answer`, `score`, `problem`, `broken`,
    `words`, `finish` and the prompt's other columns, and `score.json`: the fields of `summarise`, and `model`,
    `function`, `settings`, `versions`, `date` and `stopped`, the reason of an early end. The same call again resumes.
    """
    records = list(PromptSource(settings))
    results, judged = judge_records(settings, records, _answer)
    rows = []
    for record, (name, reason, detail, result) in zip(records, results, strict=True):
        end = result or {"problem": ": ".join(filter(None, (reason, detail)))}
        answer = end.get("answer")
        rows.append({
            "id": name, "prompt": record.prompt, "answer": answer, "score": end.get("score"),
            "problem": end.get("problem") or None, "broken": None if answer is None else broken(answer),
            "words": None if answer is None else len(words(answer)), "finish": end.get("finish"),
            **{key: value for key, value in record.columns.items() if key not in _OWN},
        })  # fmt: skip
    _write(rows, settings.folder / "answers.parquet")
    role, judge = settings.policy[0], settings.judge
    report = {
        "model": role.public_model,
        "function": judge.public_model,
        **summarise(rows),
        "stopped": judged["stopped"],
        "settings": {"prompts": Path(settings.prompts).name, **settings.described()},
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(settings.folder / "score.json", report)
    return report


_OWN = ("id", "prompt", "answer", "score", "problem", "broken", "words", "finish")


async def _answer(requester: Requester, settings: Settings, record: Record, notes: dict[str, Any]) -> dict[str, Any]:
    role = settings.policy[0]
    messages = with_system(role, record)
    (reply,) = await requester.ask(role, "sample", messages, row=record.id)
    requester.ended(role, record.id)  # an empty or cut answer counts as the model gave it
    result = {"answer": reply.text, "finish": reply.finish, "score": None, "problem": ""}
    try:
        result["score"] = await requester.call(settings.judge, record, reply.text)
        requester.ended(settings.judge, record.id)
    except Dropped as dropped:
        result["problem"] = f"{dropped.reason}: {dropped.detail}"
    return result


def _write(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pa.array(values)
            is_plain = is_writable(columns[name].type)
        except (pa.ArrowException, OverflowError):  # values of different types
            is_plain = False
        if not is_plain:
            columns[name] = pa.array([None if value is None else json.dumps(value, default=str) for value in values])
        if pa.types.is_null(columns[name].type):
            columns[name] = columns[name].cast(pa.float64() if name in ("score", "words") else pa.string())
    with atomic_write(path) as part:
        pq.write_table(pa.table(columns), part)


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summarise rows with `id`, `score`, `problem`, `broken`, `words` and maybe `kind`.

    Returns:
        `prompts`, their number; `scored`, those with a score; `mean`, of the scores; `followed`, the share of scored
        ones above `FOLLOWED` as [value, low, high] with Wilson's 95 % interval; `by_kind`, `prompts` and `followed` of
        each kind; `broken`, the share of answers that are, and `empty` and `repetition`, their numbers; `words`, the
        mean; `problems` by reason; and `worst`, the ids of the ten answers with the lowest scores that do not follow.
    """
    scored = [row for row in rows if row["score"] is not None]
    answered = [row for row in rows if row["words"] is not None]
    kinds = sorted({_kind(row) for row in scored if row.get("kind") not in (None, [])})
    faults = Counter(row["broken"] for row in answered)
    low = sorted((row for row in scored if row["score"] <= FOLLOWED), key=lambda row: row["score"])
    of_kinds = {kind: [row for row in scored if _kind(row) == kind] for kind in kinds}
    return {
        "prompts": len(rows),
        "scored": len(scored),
        "mean": fmean(row["score"] for row in scored) if scored else None,
        "followed": _followed(scored),
        "by_kind": {kind: {"prompts": len(part), "followed": _followed(part)} for kind, part in of_kinds.items()},
        "broken": (faults["empty"] + faults["repetition"]) / len(answered) if answered else None,
        "empty": faults["empty"],
        "repetition": faults["repetition"],
        "words": fmean(row["words"] for row in answered) if answered else None,
        "problems": dict(Counter(str(row["problem"]).partition(":")[0] for row in rows if row["problem"])),
        "worst": [row["id"] for row in low[:10]],
    }


def _kind(row: Mapping[str, Any]) -> str:
    kind = row.get("kind")
    return " + ".join(map(str, kind)) if isinstance(kind, list) else str(kind)


def _followed(rows: Sequence[Mapping[str, Any]]) -> list[float] | None:
    return list(wilson(sum(row["score"] > FOLLOWED for row in rows), len(rows))) if rows else None


def table(report: Mapping[str, Any]) -> str:
    """Return a report as text for the terminal."""
    lines = [f"{report['model']}, scored by {report['function']}"]
    lines.append(f"{report['prompts']:,} prompts, {report['scored']:,} scored" + " " * 10 + "95 % interval")
    parts = {"followed": report["followed"], **{f"  {k}": part["followed"] for k, part in report["by_kind"].items()}}
    for name, share in parts.items():
        if share:
            value, low, high = share
            lines.append(f"  {name:<22}{value:7.0%}   {low:.0%} to {high:.0%}")
    if report["mean"] is not None:
        lines.append(f"  {'mean score':<22}{report['mean']:7.3g}")
    if report["words"] is not None:
        counts = f"{report['empty']:,} empty, {report['repetition']:,} with repetition"
        lines.append(f"  {'broken answers':<22}{report['broken']:7.0%}   {counts}")
        lines.append(f"  {'words, mean':<22}{report['words']:7.3g}")
    if report["problems"]:
        lines.append("No score: " + ", ".join(f"{count:,} {name}" for name, count in report["problems"].items()) + ".")
    if WAITING.intersection(report["problems"]) and not report.get("stopped"):
        lines.append(RETRY)
    if report["worst"]:
        lines.append(f"Lowest scores: {', '.join(report['worst'])}")
    return "\n".join(lines)
