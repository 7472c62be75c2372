"""Which of several answers is best and which worst: by comparisons in both orders, by scores, by a reward model.

A win counts only if both orders agree on it (MT-Bench, arXiv 2306.05685: the order alone decides a third of GPT-4's
verdicts). Whatever is no win is told apart and never guessed: tie, disagreement, invalid, error.
"""

import itertools
import math
from collections.abc import Sequence
from enum import Enum
from typing import Any, NamedTuple

from apo_trl.pairs.config.settings import Settings
from apo_trl.pairs.llm.requests import Dropped, Reply, Requester, gather_all
from apo_trl.pairs.prompts import Answer, Record
from apo_trl.pairs.text.templates import load_template
from apo_trl.pairs.text.verdicts import Verdict, parse_score, parse_verdict

__all__ = ["NO_WIN", "Outcome", "Ranking", "duel", "rank", "settle"]


class Outcome(Enum):
    """What both orders together say of a first and a second answer."""

    FIRST = "first"
    SECOND = "second"
    TIE = "tie"
    DISAGREEMENT = "disagreement"
    INVALID = "invalid"


class Ranking(NamedTuple):
    """The best and the worst answer, why, and by how much (scores) or how many wins (comparisons)."""

    best: Answer
    worst: Answer
    rationale: str
    margin: float


_WINS = {
    (Verdict.A, Verdict.B): Outcome.FIRST,  # the second order shows the second answer as A
    (Verdict.B, Verdict.A): Outcome.SECOND,
    (Verdict.TIE, Verdict.TIE): Outcome.TIE,
}


def settle(forward: Verdict, backward: Verdict) -> Outcome:
    """Put the verdicts of both orders together; `backward` was given with the second answer shown as A."""
    if Verdict.INVALID in (forward, backward):
        return Outcome.INVALID
    return _WINS.get((forward, backward), Outcome.DISAGREEMENT)


async def rank(
    asker: Requester, settings: Settings, record: Record, answers: Sequence[Answer], notes: dict[str, Any]
) -> Ranking:
    """Find the best and the worst of at least two answers.

    Raises Dropped under `tie`, `disagreement`, `judge_invalid` or `judge_error` where there is no such pair. What was
    judged goes into `notes`: `comparisons` or `scores`.
    """
    if settings.judge_protocol == "pairwise":
        return await _by_comparisons(asker, settings, record, answers, notes)
    return await _by_scores(asker, settings, record, answers, notes)


NO_WIN = ("tie", "disagreement", "judge_invalid")
"""What `duel` says beside "first" and "second"."""


async def duel(
    asker: Requester, settings: Settings, record: Record, first: Answer, second: Answer, notes: dict[str, Any]
) -> str:
    """Say which of two answers wins: "first", "second", or one of NO_WIN; the same text twice is a tie.

    Raises Dropped where the judge could not be asked. `notes` goes on over several duels.
    """
    if first.text.strip() == second.text.strip():
        return "tie"
    judged: dict[str, Any] = {}
    try:
        ranking = await rank(asker, settings, record, [first, second], judged)
    except Dropped as dropped:
        if dropped.reason not in NO_WIN:
            raise
        return dropped.reason
    finally:
        for name, found in judged.items():
            notes.setdefault(name, []).extend(found)
    return "first" if ranking.best is first else "second"


async def _by_comparisons(
    asker: Requester, settings: Settings, record: Record, answers: Sequence[Answer], notes: dict[str, Any]
) -> Ranking:
    """Compare every pair of answers: with ties and disagreements about, a tournament has no winner."""
    pairs = list(itertools.combinations(range(len(answers)), 2))
    orders = [order for first, second in pairs for order in ((first, second), (second, first))]
    verdicts = await gather_all(
        *(_verdict(asker, settings, record, answers[first].text, answers[second].text) for first, second in orders)
    )
    notes["comparisons"] = [[verdicts[at][0].name, verdicts[at + 1][0].name] for at in range(0, len(verdicts), 2)]
    outcomes = {pair: settle(verdicts[2 * at][0], verdicts[2 * at + 1][0]) for at, pair in enumerate(pairs)}
    wins = [0] * len(answers)
    agreed = []
    for at, ((first, second), outcome) in enumerate(outcomes.items()):
        if outcome in (Outcome.FIRST, Outcome.SECOND):
            winner, loser = (first, second) if outcome is Outcome.FIRST else (second, first)
            wins[winner] += 1
            wins[loser] -= 1
            agreed.append((winner, loser, verdicts[2 * at][1]))
    if not agreed:
        raise Dropped(_no_win(list(outcomes.values())))
    # Of the pairs that both orders agree on, the one whose answers are furthest apart in wins over losses.
    winner, loser, why = max(agreed, key=lambda pair: (wins[pair[0]] - wins[pair[1]], -pair[0], -pair[1]))
    return Ranking(answers[winner], answers[loser], why, float(wins[winner] - wins[loser]))


def _no_win(outcomes: Sequence[Outcome]) -> str:
    """Name the reason: what most of the comparisons were."""
    names = {Outcome.TIE: "tie", Outcome.DISAGREEMENT: "disagreement", Outcome.INVALID: "judge_invalid"}
    return names[max(names, key=lambda outcome: outcomes.count(outcome))]


async def _verdict(
    asker: Requester, settings: Settings, record: Record, first: str, second: str
) -> tuple[Verdict, str]:
    reply = await _judged(
        asker, settings, record, "compare", lambda text: parse_verdict(text) is not Verdict.INVALID,
        "it does not end with a verdict in double brackets.", answer_a=first, answer_b=second,
    )  # fmt: skip
    return (parse_verdict(reply.text), reply.text) if reply.finish == "stop" else (Verdict.INVALID, reply.text)


async def _by_scores(
    asker: Requester, settings: Settings, record: Record, answers: Sequence[Answer], notes: dict[str, Any]
) -> Ranking:
    ask = _reward if settings.scores(settings.judge) else _score
    found = await gather_all(*(ask(asker, settings, record, answer.text) for answer in answers))
    notes["scores"] = [score for score, _ in found]
    scored = [(score, -at) for at, (score, _) in enumerate(found) if score is not None]
    if len(scored) < 2:
        raise Dropped("judge_invalid", "fewer than two answers have a score")
    (high, best), (low, worst) = max(scored), min(scored)
    if high - low < settings.judge_margin or high == low:
        raise Dropped("tie", f"scores {low:g} to {high:g}, judge_margin {settings.judge_margin:g}")
    return Ranking(answers[-best], answers[-worst], found[-best][1], high - low)


async def _score(asker: Requester, settings: Settings, record: Record, answer: str) -> tuple[float | None, str]:
    reply = await _judged(
        asker, settings, record, "score", lambda text: parse_score(text) is not None,
        "it does not end with a score from 1 to 10 in double brackets.", answer=answer,
    )  # fmt: skip
    return (parse_score(reply.text) if reply.finish == "stop" else None), reply.text


async def _reward(asker: Requester, settings: Settings, record: Record, answer: str) -> tuple[float | None, str]:
    messages = [*record.prompt, {"role": "assistant", "content": answer}]
    reply = (await asker.ask(settings.judge, "reward", messages, row=record.id))[0]
    score = float(reply.text.strip("[]"))
    return (score if math.isfinite(score) else None), ""


async def _judged(
    asker: Requester, settings: Settings, record: Record, step: str, usable: Any, problem: str, **answers: str
) -> Reply:
    """Ask the judge, and once more where it came to its end without a verdict."""
    template = load_template(step, settings.judge.template)
    asked = template.ask(record.prompt, **answers)
    judge = settings.judge
    reply = (await asker.ask(judge, step, asked.messages, row=record.id, template=template.digest))[0]
    if reply.finish == "stop" and not usable(reply.text):
        asked = template.ask_again(record.prompt, asked, reply.text, problem, **answers)
        reply = (await asker.ask(judge, step, asked.messages, row=record.id, template=template.digest))[0]
    return reply
