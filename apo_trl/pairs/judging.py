"""Which of several answers is best and which worst: by comparisons in both orders, or by scores, also of a function.

A win counts only if both orders agree (MT-Bench, arXiv 2306.05685: the order alone decides a third of GPT-4's
verdicts). Ties, disagreements, unreadable verdicts and failed requests are counted apart, never guessed.
"""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from apo_trl.pairs.config.settings import Settings
from apo_trl.pairs.llm.requests import Dropped, Requester, gather_all
from apo_trl.pairs.prompts import Answer, Record
from apo_trl.pairs.text.templates import load_template

__all__ = ["NO_WIN", "Notes", "Pair", "duel", "parse_score", "parse_verdict", "rank", "settle"]

Notes = dict[str, Any]
"""The judge's `comparisons` or `scores` of one row, for the report."""

NO_WIN = ("tie", "disagreement", "judge_invalid")
"""The results of `settle` and `duel` beside "first" and "second"."""

_VERDICT = re.compile(
    r"\[\[\s*(?:(?P<A>A(?:\s*>>?\s*B)?)|(?P<B>B(?:\s*>>?\s*A)?)|(?P<TIE>C|TIE|A\s*=\s*B))\s*\]\]", re.I
)


def parse_verdict(reply: str) -> str | None:
    """Return "A", "B" or "TIE" for the last of [[A]], [[B]], [[C]], [[tie]], or Arena's five from [[A>>B]] on."""
    *_, last = [None, *_VERDICT.finditer(reply)]
    return last.lastgroup if last else None


def parse_score(reply: str) -> float | None:
    """Read the last number in double brackets, as in [[7]], [[7.5]] or [[7/10]]; None if it is not from 1 to 10."""
    numbers = re.findall(r"\[\[\s*([-+]?[0-9][^\[\]]*)\]\]", reply)
    score = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(?:/\s*10\s*)?", numbers[-1]) if numbers else None
    return float(score[1]) if score and 1 <= float(score[1]) <= 10 else None


_PARSERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "compare": (parse_verdict, "it does not end with a verdict in double brackets."),
    "score": (parse_score, "it does not end with a score from 1 to 10 in double brackets."),
}


class Pair(NamedTuple):
    """A better and a worse answer; `margin` is the judge's, in points or wins."""

    chosen: Answer
    rejected: Answer
    rationale: str = ""
    margin: float | None = None


def settle(forward: str | None, backward: str | None) -> str:
    """Combine the verdicts with the first and with the second answer as A into "first", "second" or one of NO_WIN."""
    if not forward or not backward:
        return "judge_invalid"
    agreed = {("A", "B"): "first", ("B", "A"): "second", ("TIE", "TIE"): "tie"}
    return agreed.get((forward, backward), "disagreement")


async def rank(asker: Requester, settings: Settings, record: Record, answers: Sequence[Answer], notes: Notes) -> Pair:
    """Return the best and the worst of at least two answers, and add the `comparisons` or the `scores` to `notes`.

    Raises:
        Dropped: No answer wins (under one of NO_WIN), or a request failed (`judge_error`).
    """
    by = _by_comparisons if settings.judge_protocol == "pairwise" else _by_scores
    return await by(asker, settings, record, answers, notes)


async def duel(
    asker: Requester, settings: Settings, record: Record, first: Answer, second: Answer, notes: Notes
) -> str:
    """Compare two answers like `rank`, and return "first", "second" or one of NO_WIN; the same text twice is a tie."""
    if first.text.strip() == second.text.strip():
        return "tie"
    try:
        pair = await rank(asker, settings, record, [first, second], notes)
    except Dropped as dropped:
        if dropped.reason not in NO_WIN:
            raise
        return dropped.reason
    return "first" if pair.chosen is first else "second"


async def _by_comparisons(
    asker: Requester, settings: Settings, record: Record, answers: Sequence[Answer], notes: Notes
) -> Pair:
    pairs = list(itertools.combinations(range(len(answers)), 2))
    verdicts = await gather_all(
        *(
            _judged(asker, settings, record, "compare", answer_a=answers[first].text, answer_b=answers[second].text)
            for pair in pairs
            for first, second in (pair, pair[::-1])
        )
    )
    wins = [0] * len(answers)
    outcomes, agreed = [], []
    for (first, second), (forward, why), (backward, _) in zip(pairs, verdicts[::2], verdicts[1::2], strict=True):
        notes.setdefault("comparisons", []).append([forward or "INVALID", backward or "INVALID"])
        outcomes.append(outcome := settle(forward, backward))
        if outcome not in NO_WIN:
            winner, loser = (first, second) if outcome == "first" else (second, first)
            wins[winner] += 1
            wins[loser] -= 1
            agreed.append((winner, loser, why))
    if not agreed:
        raise Dropped(max(NO_WIN, key=outcomes.count))
    # Of the pairs that both orders agree on, the one whose answers are furthest apart in wins over losses.
    winner, loser, why = max(agreed, key=lambda pair: (wins[pair[0]] - wins[pair[1]], -pair[0], -pair[1]))
    return Pair(answers[winner], answers[loser], why, float(wins[winner] - wins[loser]))


async def _by_scores(
    asker: Requester, settings: Settings, record: Record, answers: Sequence[Answer], notes: Notes
) -> Pair:
    if scored_by := {"reward_model": _reward, "function": _function_score}.get(settings.judge_protocol):
        results = await gather_all(*(scored_by(asker, settings, record, answer.text) for answer in answers))
    else:
        results = await gather_all(*(_judged(asker, settings, record, "score", answer=item.text) for item in answers))
    notes.setdefault("scores", []).extend(score for score, _ in results)
    scored = [(score, -index) for index, (score, _) in enumerate(results) if score is not None]
    if len(scored) < 2:
        raise Dropped("judge_invalid", "fewer than two answers have a score")
    (high, best), (low, worst) = max(scored), min(scored)
    if high - low < settings.judge_margin or high == low:
        raise Dropped("tie", f"scores {low:g} to {high:g}, judge_margin {settings.judge_margin:g}")
    return Pair(answers[-best], answers[-worst], results[-best][1], high - low)


async def _reward(asker: Requester, settings: Settings, record: Record, answer: str) -> tuple[float | None, str]:
    messages = [*record.prompt, {"role": "assistant", "content": answer}]
    (reply,) = await asker.ask(settings.judge, "reward", messages, row=record.id)
    score = float(reply.text.strip("[]"))
    return (score if math.isfinite(score) else None), ""


async def _function_score(
    asker: Requester, settings: Settings, record: Record, answer: str
) -> tuple[float | None, str]:
    score = await asker.call(settings.judge, record, answer)
    asker.ended(settings.judge, record.id)
    return score, ""


async def _judged(asker: Requester, settings: Settings, record: Record, step: str, **answers: str) -> tuple[Any, str]:
    """Return the judge's result, if any, and its reply; a complete reply without a result is requested once more."""
    judge, (parse, problem) = settings.judge, _PARSERS[step]
    template = load_template(step, judge.template)
    asked = template.ask(record.prompt, **answers)
    (reply,) = await asker.ask(judge, step, asked.messages, row=record.id, template=template.digest)
    if not reply.fault and parse(reply.text) is None:
        asked = template.ask_again(record.prompt, asked, reply.text, problem, **answers)
        (reply,) = await asker.ask(judge, step, asked.messages, row=record.id, template=template.digest, repair=True)
    result = parse(reply.text) if reply.finish == "stop" else None
    if not asker.fault(judge, record.id, reply):  # which notes the others
        asker.ended(judge, record.id, "judge_invalid" if result is None else "")
    return result, reply.text
