"""Suggest a loss for a dataset: do its chosen answers beat the policy's own?

The paper's rule (arXiv 2408.06266) is APO-zero if they do and APO-down if they do not. Likelihoods alone give no
suggestion, because a worse answer may well be the likelier one.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apo_trl.errors import InputError
from apo_trl.evaluation.intervals import mean_interval, probability_between, wilson
from apo_trl.evaluation.judged import POINTS, count_outcomes, judge_records, no_verdict_lines
from apo_trl.io.completion import completion_text
from apo_trl.io.files import atomic_write
from apo_trl.io.messages import content_text
from apo_trl.io.readers import valid_rows
from apo_trl.io.rows import normalise_row
from apo_trl.pairs.config.settings import Settings
from apo_trl.pairs.judging import duel
from apo_trl.pairs.llm.requests import Requester
from apo_trl.pairs.methods import own_answers
from apo_trl.pairs.prompts import Answer, Record, columns_of
from apo_trl.pairs.statistics.statistics import Statistics

__all__ = ["anchor", "contrast", "likelihoods", "read_dataset", "suggest", "table", "write_dataset"]

Rows = Sequence[Mapping[str, Any]]

_RANGES = {  # the shares won by chosen, and the reason for the loss
    "apo_down": (0.0, 0.125, "the policy's own answers beat the chosen ones: rather build pairs from its own answers"),
    "apo_blend": (0.125, 0.75, "chosen answers beat the policy's own in some pairs: choose by chosen_wins in each"),
    "apo_zero": (0.75, 1.0, "chosen answers beat the policy's own: pull them up"),
}


def read_dataset(path: str, split: str = "train") -> list[dict[str, Any]]:
    """Read a preference dataset unchanged; InputError for an invalid row."""
    rows = list(valid_rows(path, split))
    if not rows:
        raise InputError(f"--dataset: {path} has no rows. Add at least one pair.")
    return rows


def anchor(
    rows: Rows, indices: Sequence[int], settings: Settings, response: str | None = None, scores: Sequence[str] = ()
) -> dict[str, Any]:
    """Compare the chosen and rejected answers of the rows at `indices` with the policy's own, and suggest a loss.

    The policy's own answers are sampled, or are in the column `response`. A judge compares, or `scores` does: the names
    of two columns, with the score of the chosen and of the policy's own answer.

    Returns:
        `asked`; the counts of `chosen` and `rejected` against the policy; the fields of `suggest`; `dropped` by reason,
        `judge`, `thoughts` and `stopped`; and, by row index, the `outcomes` of chosen and the policy's own `answers`.
    """
    rest: dict[str, Any] = {"judge": {}, "thoughts": {}, "stopped": ""}
    if scores:
        results = [("", "", "", {"chosen": _by_scores(index, rows[index], scores, settings)}) for index in indices]
    else:
        records = [_record(index, rows[index], response) for index in indices]
        if settings.functions:
            records = [record._replace(columns=columns_of(rows[record.position])) for record in records]
        results, rest = judge_records(settings, records, _compare)
    verdicts = {index: verdict for index, (_, reason, _, verdict) in zip(indices, results, strict=True) if not reason}
    rest["dropped"] = dict(Counter(reason for _, reason, *_ in results if reason))
    sides = {side: [each[side] for each in verdicts.values() if side in each] for side in ("chosen", "rejected")}
    counts = {side: count_outcomes(outcomes, "wins", "losses") for side, outcomes in sides.items() if outcomes}
    chosen = Counter(counts.get("chosen"))
    suggestion = suggest(chosen["wins"], chosen["losses"], chosen["ties"] + chosen["orders_disagree"])
    outcomes = {index: verdict["chosen"] for index, verdict in verdicts.items()}
    answers = {index: verdict["answer"] for index, verdict in verdicts.items() if "answer" in verdict}
    return {"asked": len(indices), **counts, **suggestion, **rest, "outcomes": outcomes, "answers": answers}


def suggest(wins: int, losses: int, undecided: int = 0) -> dict[str, Any]:
    """Suggest a loss from comparisons of chosen answers with the policy's own.

    `apo_zero` if chosen wins more than three quarters of the decided comparisons, `apo_down` below one eighth, else
    `apo_blend`. The paper has no such ranges. In our runs (docs/answers.md) APO-zero beat APO-down where a quarter of
    the winners were better, and not where none was; between `apo_zero` and `apo_blend` they decided nothing.

    Returns:
        `share`, the decided comparisons that chosen won, as [value, low, high] with Wilson's 95 % interval;
        `suggestion`, None if fewer than 20 comparisons are decided or `sure` is below 0.8; `sure`, the probability of
        its range (Jeffreys' posterior); and the reason `why`.
    """
    decided = wins + losses
    chances = {loss: probability_between(wins, losses, low, high) for loss, (low, high, _) in _RANGES.items()}
    second, best = sorted(chances, key=lambda loss: chances[loss])[-2:]
    suggestion, sure = None, chances[best]
    if decided < 20:
        why = f"too little evidence: {decided} comparisons have a winner, 20 are needed; judge more pairs"
        why += ", or take a judge that can tell the answers apart" if undecided > decided else ""
    elif sure < 0.8:
        why = f"too little evidence to tell {best} ({sure:.0%}) from {second} ({chances[second]:.0%}); judge more pairs"
    else:
        suggestion, why = best, _RANGES[best][2]
    share = list(wilson(wins, decided)) if decided else None
    return {"share": share, "suggestion": suggestion, "sure": sure, "why": why}


def _record(index: int, row: Mapping[str, Any], response: str | None) -> Record:
    pair = normalise_row(row)
    prompt = [{"role": "user", "content": pair["prompt"]}] if isinstance(pair["prompt"], str) else pair["prompt"]
    if response is not None and not row.get(response):
        raise InputError(f"--policy_response: row {index + 1} has no '{response}'. Use one of {', '.join(row)}.")
    columns = ("chosen", "rejected", *([response] if response else ()))
    # From `pair`: `rejected` may repeat the prompt in `row`.
    answers = [Answer(completion_text(pair[column]), column) for column in columns]
    identity = str(row.get("id") or f"row-{index + 1}")
    if not prompt or prompt[-1]["role"] == "assistant" or not all(answer.text.strip() for answer in answers):
        return Record(index, identity, [], (), f"Row {index + 1} has no question or an empty answer.", "bad_row")
    messages = [{**message, "content": content_text(message.get("content")) or ""} for message in prompt]
    return Record(index, identity, messages, tuple(answers))


async def _compare(requester: Requester, settings: Settings, record: Record, notes: dict[str, Any]) -> dict[str, str]:
    chosen, rejected, *stored = record.answers
    own = stored[0] if stored else (await own_answers(requester, settings, record._replace(answers=()), 1))[0]
    return {
        "chosen": await duel(requester, settings, record, chosen, own, notes),
        "rejected": await duel(requester, settings, record, rejected, own, notes),
        "answer": own.text,
    }


def _by_scores(index: int, row: Mapping[str, Any], columns: Sequence[str], settings: Settings) -> str:
    chosen, policy = (row.get(column) for column in columns)
    if not isinstance(chosen, (int, float)) or not isinstance(policy, (int, float)):
        fault = f"row {index + 1} has no numbers in both columns, got {chosen!r:.20} and {policy!r:.20}"
        raise InputError(f"--chosen_score, --policy_score: {fault}. Use two of {', '.join(row)}.")
    if chosen == policy or not abs(chosen - policy) >= settings.judge_margin:  # also NaN
        return "tie"
    return "first" if chosen > policy else "second"


def write_dataset(rows: Rows, outcomes: Mapping[int, str], path: Path) -> None:
    """Write the rows as JSONL with `chosen_wins`, the probability that chosen beats the policy's own answer.

    A row without a verdict gets the share of the judged ones, by Laplace's rule of succession; `chosen_wins_from` is
    "judge" or "share".
    """
    judged = {index: POINTS[outcome] for index, outcome in outcomes.items() if outcome in POINTS}
    share = (sum(judged.values()) + 1) / (len(judged) + 2)
    with atomic_write(path) as part, part.open("w", encoding="utf-8", errors="replace") as file:
        for index, row in enumerate(rows):
            source = "judge" if index in judged else "share"
            line = {**row, "chosen_wins": judged.get(index, share), "chosen_wins_from": source}
            file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")


def likelihoods(policy: str, rows: Rows, indices: Sequence[int], answers: Mapping[int, str]) -> dict[str, list[float]]:
    """Compute the policy's mean log-prob per token, as [value, low, high], of `chosen`, `rejected` and `own` answers.

    Each answer counts alike. `answers` are the policy's own by row index.
    """
    from apo_trl.evaluation.scoring import pair_logps, tokenize_pairs
    from apo_trl.models.loading import load_policy, pad_token

    model, tokenizer = load_policy(policy, flag="--policy")
    pairs = [normalise_row(rows[index]) for index in indices]
    for pair, text in zip(pairs[:], map(answers.get, indices), strict=True):
        if text is not None:
            own = text if isinstance(pair["chosen"], str) else [{"role": "assistant", "content": text}]
            pairs.append({**pair, "chosen": own})
    tokenized = tokenize_pairs(pairs, tokenizer)
    logps = pair_logps(model, tokenized, pad_token_id=pad_token(tokenizer), name="the policy")
    values: dict[str, list[float]] = {"chosen": [], "rejected": [], "own": []}
    for number, (pair, (chosen, rejected)) in enumerate(zip(tokenized, logps, strict=True)):
        values["chosen" if number < len(indices) else "own"].append(chosen / max(1, len(pair["chosen_ids"])))
        if number < len(indices):
            values["rejected"].append(rejected / max(1, len(pair["rejected_ids"])))
    return {side: list(mean_interval(each)) for side, each in values.items() if each}


def contrast(rows: Rows) -> dict[str, Any]:
    """Compute how contrastive the pairs are, as `apo-trl pairs stats` does."""
    statistics = Statistics()
    for row in rows:
        statistics.add(row)
    return statistics.summary()


def table(report: Mapping[str, Any]) -> str:
    """Return a report as text for the terminal."""
    sides = {side: report[side] for side in ("chosen", "rejected") if side in report}
    names = sides and "".join(f"{name.replace('_', ' '):>17}" for name in report["chosen"])
    lines = [f"{'against the policy':<20}{names}"] if names else []
    lines += [f"  {side:<18}" + "".join(f"{count:>17,}" for count in counts.values()) for side, counts in sides.items()]
    lines += no_verdict_lines(report["dropped"])
    judge = report.get("judge") or {}
    if judge.get("first_position_rate") is not None:
        text = "Judge: both orders agree in {orders_agree:.0%}, the answer shown first wins {first_position_rate:.0%}"
        lines.append(text.format(**judge) + " of verdicts (50 %: no bias).")
    if report["share"]:
        text = "Chosen wins {:.0%} of the comparisons that have a winner (95 % interval {:.0%} to {:.0%})."
        lines.append(text.format(*report["share"]))
    for side, (value, low, high) in report.get("likelihoods", {}).items():
        whose = "its own answers" if side == "own" else f"{side} answers"
        lines.append(f"The policy gives {whose:<17}{value:+.3f} nats a token ({low:+.3f} to {high:+.3f}).")
    if measures := report.get("contrast", {}).get("before"):
        means = (measures[name]["mean"] for name in ("chosen_tokens", "rejected_tokens", "jaccard"))
        text = "Words and marks: chosen {:.0f}, rejected {:.0f}; shared by both (Jaccard) {:.2f}."
        lines.append(text.format(*means))
    loss, why = report["suggestion"], report["why"]
    lines += [
        "",
        f"loss_type: {loss}   ({report['sure']:.0%} sure; {why})" if loss else f"No loss is suggested: {why}.",
    ]
    return "\n".join(lines)
