"""Which anchor fits: do the chosen answers of a dataset beat what the policy itself would answer?

The paper's rule (arXiv 2408.06266) is APO-zero where they do and APO-down where they do not. For a sample of the pairs
a judge compares the chosen answer with the policy's own, in both orders and by the machinery that builds pairs: stored,
resumable, counted. Where the evidence is too little to name a loss, that is what is said.

Left out on purpose: a verdict from likelihoods alone. A worse answer may well be the likelier one.
"""

import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from apo_trl.errors import InputError
from apo_trl.evaluation.intervals import mean_interval, probability_between, wilson
from apo_trl.io.files import atomic_write
from apo_trl.io.messages import completion_text, content_text
from apo_trl.io.readers import read_rows
from apo_trl.io.rows import normalise_row, validate_row
from apo_trl.pairs.build import check_templates, process_all
from apo_trl.pairs.config.settings import Settings
from apo_trl.pairs.judging import duel
from apo_trl.pairs.llm.requests import Dropped, Requester
from apo_trl.pairs.llm.response_cache import ResponseCache
from apo_trl.pairs.methods import own_answers
from apo_trl.pairs.output.writer import judged_summary
from apo_trl.pairs.progress import Progress
from apo_trl.pairs.prompts import Answer, Record
from apo_trl.pairs.statistics.statistics import Statistics

__all__ = [
    "FEWEST",
    "SURE",
    "anchor",
    "contrast",
    "draw",
    "likelihoods",
    "read_dataset",
    "suggest",
    "table",
    "write_dataset",
]

FEWEST = 20
"""Comparisons that must have a winner before a loss is suggested."""
SURE = 0.8
"""How probable the suggested loss must be."""
_ZONES = {"apo_down": (0.0, 0.25), "apo_blend": (0.25, 0.75), "apo_zero": (0.75, 1.0)}
_WHY = {
    "apo_zero": "chosen answers beat the policy's own: pull them up",
    "apo_down": "the policy's own answers beat the chosen ones: do not pull towards these",
    "apo_blend": "some chosen answers beat the policy's own and some do not: choose for each pair, by chosen_wins",
}
WORDS = {
    "first": "wins",
    "second": "losses",
    "tie": "ties",
    "disagreement": "orders_disagree",
    "judge_invalid": "invalid",
}
"""What the outcomes of `duel` are called here: the dataset's answer is shown first."""


def read_dataset(path: str, split: str = "train") -> list[dict[str, Any]]:
    """Read a preference dataset as it is. Raises InputError for a row that is no pair."""
    from apo_trl.io.resources import packaged

    rows = list(read_rows(str(packaged(path) or path), split))
    for number, row in enumerate(rows, start=1):
        if fault := validate_row(row):
            raise InputError(f"Row {number} (counted from 1) of {path} {fault}.")
    if not rows:
        raise InputError(f"{path} has no rows; give it at least one pair.")
    return rows


def draw(count: int, limit: int | None, seed: int) -> list[int]:
    """Draw so many of the rows, by their positions in order."""
    return sorted(random.Random(seed).sample(range(count), count if limit is None else min(limit, count)))


def anchor(
    rows: Sequence[Mapping[str, Any]],
    places: Sequence[int],
    settings: Settings | None = None,
    *,
    response: str | None = None,
    scores: tuple[str, str] | None = None,
    margin: float = 1.0,
) -> dict[str, Any]:
    """Compare chosen and rejected answers with the policy's own, and suggest a loss.

    Args:
        rows: Preference rows, as `read_dataset` gives them.
        places: The positions of those that are compared.
        settings: Of a recipe with policy and judge, for which `settings.folder` holds the store; or there are `scores`.
        response: A column that holds the policy's own answers, which then are not sampled.
        scores: Two columns of scores, of the chosen and of the policy's own answer, in the place of a judge.
        margin: The smallest difference of such scores that is no tie.

    Returns:
        A report, ready for JSON: `asked`, `dropped` by reason, the counts of `chosen` and `rejected` against the
        policy (`wins`, `losses`, `ties`, `orders_disagree`, `invalid`), and what `suggest` says. Beside it `outcomes`,
        what became of the chosen answer of a row by its position, and `answers`, the policy's own.

    Raises:
        InputError: A column is missing, or a model cannot be used.
    """
    if scores is not None:
        found = _by_columns(rows, places, scores, margin)
    elif settings is not None:
        found = _by_judge(settings, [_record(at, rows[at], response) for at in places])
    else:
        raise InputError("There is neither a --judge nor a --chosen_score and --policy_score; give one of them.")
    counts = {
        side: {word: found[side].get(outcome, 0) for outcome, word in WORDS.items()}
        for side in ("chosen", "rejected")
        if found[side]
    }
    rest = {name: found[name] for name in ("dropped", "judge", "stopped", "outcomes", "answers")}
    return {"asked": len(places), **counts, **suggest(**_decided(counts.get("chosen", {}))), **rest}


def _decided(counts: Mapping[str, int]) -> dict[str, int]:
    wins, losses = counts.get("wins", 0), counts.get("losses", 0)
    return {"wins": wins, "losses": losses, "undecided": counts.get("ties", 0) + counts.get("orders_disagree", 0)}


def suggest(wins: int, losses: int, undecided: int = 0) -> dict[str, Any]:
    """Name the loss that the comparisons of chosen answers with the policy's own speak for, and how surely.

    Where more than three quarters of the decided ones are won that is `apo_zero`, below one quarter `apo_down`, between
    them `apo_blend`; how sure it is, is the probability of that (Jeffreys' posterior). There is none where fewer than
    FEWEST are decided, or where it is less sure than SURE. The quarters are ours, the paper gives none.

    Returns `share`, the decided comparisons that chosen won as [value, low, high] with Wilson's 95 % interval, or None;
    `suggestion`, or None; `sure`; and `why`, a sentence.
    """
    decided = wins + losses
    share = list(wilson(wins, decided)) if decided else None
    chances = {loss: probability_between(wins, losses, *zone) for loss, zone in _ZONES.items()}
    best = max(chances, key=lambda loss: chances[loss])
    sure = chances[best]
    if decided < FEWEST:
        why = f"too little evidence: {decided} comparisons have a winner, {FEWEST} are needed; judge more pairs"
        if undecided > decided:
            why += ", or take a judge that can tell the answers apart"
    elif sure < SURE:
        second = sorted(chances, key=lambda loss: chances[loss])[-2]
        why = f"too little evidence to tell {best} ({sure:.0%}) from {second} ({chances[second]:.0%}); judge more pairs"
    else:
        return {"share": share, "suggestion": best, "sure": sure, "why": _WHY[best]}
    return {"share": share, "suggestion": None, "sure": sure, "why": why}


def _record(position: int, row: Mapping[str, Any], response: str | None) -> Record:
    """Make the record of a row: its answers are chosen, rejected, and the policy's own where it is there already."""
    whole = normalise_row(row)
    identity, prompt = str(row.get("id") or f"row-{position + 1}"), whole["prompt"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    answers = [Answer(completion_text(whole[side]), side) for side in ("chosen", "rejected")]
    if response is not None:
        if not row.get(response):
            raise InputError(
                f"--policy_response: row {position + 1} has no '{response}'; its fields are {', '.join(row)}."
            )
        # `rejected` without its prompt, where the row repeats that.
        answers.append(Answer(completion_text(whole[response]), "policy"))
    if not prompt or prompt[-1]["role"] == "assistant" or not all(answer.text.strip() for answer in answers):
        return Record(position, identity, [], (), f"Row {position + 1} has no question or an empty answer.", "bad_row")
    messages = [{**message, "content": content_text(message.get("content")) or ""} for message in prompt]
    return Record(position, identity, messages, tuple(answers))


async def _compare(asker: Requester, settings: Settings, record: Record, notes: dict[str, Any]) -> dict[str, str]:
    """Hold the chosen and the rejected answer of a row to the policy's own."""
    if record.fault:
        raise Dropped(record.reason, record.fault)
    chosen, rejected, *given = record.answers
    own = given[0] if given else (await own_answers(asker, settings, record._replace(answers=()), 1))[0]
    return {
        "chosen": await duel(asker, settings, record, chosen, own, notes),
        "rejected": await duel(asker, settings, record, rejected, own, notes),
        "answer": own.text,
    }


def _by_judge(settings: Settings, records: Sequence[Record]) -> dict[str, Any]:
    check_templates(settings)
    with ResponseCache(settings.folder) as store:
        servers = process_all(settings, records, store, Progress(len(records)), _compare, lambda *row: row[-1])
        ended = [(position, *row) for position, row in _rows(store, records)]
    counts = {"chosen": Counter[str](), "rejected": Counter[str]()}
    dropped: Counter[str] = Counter()
    outcomes, answers, notes = {}, {}, []
    for position, reason, result, note in ended:
        notes.append(note)
        if reason:
            dropped[reason] += 1
            continue
        outcomes[position], answers[position] = result["chosen"], result["answer"]
        for side, counted in counts.items():
            counted[result[side]] += 1
    return counts | {
        "dropped": dict(dropped), "outcomes": outcomes, "answers": answers, "judge": judged_summary(notes),
        "stopped": servers.limits.stopped,
    }  # fmt: skip


def _rows(store: ResponseCache, records: Sequence[Record]) -> Iterator[tuple[int, tuple[str, Any, Any]]]:
    for record, (_, reason, _, result, notes) in zip(records, store.rows(), strict=True):
        yield record.position, (reason, json.loads(result) if result else None, json.loads(notes))


def _by_columns(
    rows: Sequence[Mapping[str, Any]], places: Sequence[int], columns: tuple[str, str], margin: float
) -> dict[str, Any]:
    outcomes = {}
    for at in places:
        values = []
        for flag, column in zip(("chosen_score", "policy_score"), columns, strict=True):
            value = rows[at].get(column)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise InputError(
                    f"--{flag}: row {at + 1} has no number in '{column}'; its fields are {', '.join(rows[at])}."
                )
            values.append(value)
        difference = values[0] - values[1]
        outcomes[at] = (
            "tie" if not abs(difference) >= margin or not difference else "first" if difference > 0 else "second"
        )
    return {
        "chosen": Counter(outcomes.values()), "rejected": Counter(), "dropped": {}, "outcomes": outcomes,
        "answers": {}, "judge": {}, "stopped": "",
    }  # fmt: skip


def write_dataset(rows: Sequence[Mapping[str, Any]], outcomes: Mapping[int, str], path: Path) -> None:
    """Write the rows as JSONL with `chosen_wins`, the probability that chosen beats the policy's own answer.

    1 and 0 are wins and losses, 1/2 is what the judge cannot tell (a tie, or orders that disagree). A row without a
    verdict gets the share of the judged ones, drawn towards 1/2 as Laplace does; `chosen_wins_from` says which it is.
    """
    known = {"first": 1.0, "second": 0.0, "tie": 0.5, "disagreement": 0.5}
    judged = {at: known[outcome] for at, outcome in outcomes.items() if outcome in known}
    share = (sum(judged.values()) + 1) / (len(judged) + 2)
    with atomic_write(path) as beside, beside.open("w", encoding="utf-8", errors="replace") as file:
        for at, row in enumerate(rows):
            wins = {"chosen_wins": judged.get(at, share), "chosen_wins_from": "judge" if at in judged else "share"}
            file.write(json.dumps({**row, **wins}, ensure_ascii=False, default=str) + "\n")


def likelihoods(
    policy: str, rows: Sequence[Mapping[str, Any]], places: Sequence[int], answers: Mapping[int, str], **options: Any
) -> dict[str, list[float]]:
    """Give the policy's mean log-prob of a token, in nats with its interval, of `chosen`, `rejected` and `own` answers.

    `answers` are the policy's own by the position of their row. A token's mean is that of its answer, and each answer
    counts alike. `options` are those of `evaluate.load_policy`.
    """
    from apo_trl.evaluation.scoring import pair_logps, tokenize_pairs
    from apo_trl.models.loading import load_policy, pad_token

    model, tokenizer = load_policy(policy, flag="--policy", **options)
    whole = {at: normalise_row(rows[at]) for at in places}
    own = [{**whole[at], "chosen": _as(whole[at]["chosen"], answers[at])} for at in places if at in answers]
    given = tokenize_pairs([*whole.values(), *own], tokenizer)
    logps = pair_logps(model, given, pad_token_id=pad_token(tokenizer), name="the policy")
    means = [
        [logp / max(1, len(pair[f"{side}_ids"])) for side, logp in zip(("chosen", "rejected"), both, strict=True)]
        for pair, both in zip(given, logps, strict=True)
    ]
    ours, theirs = means[: len(whole)], means[len(whole) :]
    sides = {"chosen": [one for one, _ in ours], "rejected": [other for _, other in ours]}
    sides["own"] = [one for one, _ in theirs]
    return {side: list(mean_interval(values)) for side, values in sides.items() if values}


def _as(side: Any, text: str) -> Any:
    return text if isinstance(side, str) else [{"role": "assistant", "content": text}]


def contrast(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Measure how contrastive the pairs are, as `apo-trl pairs stats` does."""
    statistics = Statistics()
    for row in rows:
        statistics.add(row)
    return statistics.summary()


def table(report: Mapping[str, Any]) -> str:
    """Lay out a report for the terminal."""
    lines = []
    if "chosen" in report:
        lines.append(
            f"{'against the policy':<20}" + "".join(f"{word.replace('_', ' '):>17}" for word in WORDS.values())
        )
    for side in ("chosen", "rejected"):
        if side in report:
            lines.append(f"  {side:<18}" + "".join(f"{report[side][word]:>17,}" for word in WORDS.values()))
    if report["dropped"]:
        lines.append("No verdict: " + ", ".join(f"{count:,} {name}" for name, count in report["dropped"].items()) + ".")
    judge = report.get("judge") or {}
    if judge.get("first_position_rate") is not None:
        lines.append(
            f"The judge: both orders agree in {judge['orders_agree']:.0%}, the answer shown first wins "
            f"{judge['first_position_rate']:.0%} of verdicts (50 %: no bias)."
        )
    if report["share"]:
        value, low, high = report["share"]
        lines.append(
            f"Chosen wins {value:.0%} of the comparisons that have a winner (95 % interval {low:.0%} to {high:.0%})."
        )
    for side, (value, low, high) in report.get("likelihoods", {}).items():
        whose = "its own answers" if side == "own" else f"{side} answers"
        lines.append(f"The policy gives {whose:<17}{value:+.3f} nats a token ({low:+.3f} to {high:+.3f}).")
    if measures := report.get("contrast", {}).get("before"):
        lines.append(
            f"Words and marks: chosen {measures['chosen_tokens']['mean']:.0f}, rejected "
            f"{measures['rejected_tokens']['mean']:.0f}; shared by both (Jaccard) {measures['jaccard']['mean']:.2f}."
        )
    if report["suggestion"]:
        lines.append(f"\nloss_type: {report['suggestion']}   ({report['sure']:.0%} sure; {report['why']})")
    else:
        lines.append(f"\nNo loss is suggested: {report['why']}.")
    return "\n".join(lines)
