"""The five ways from a prompt to a pair (arXiv 2408.06266, equations 1 to 4, and LFM2's in arXiv 2511.23404).

Each takes a row and what may ask models, and gives a pair or raises Dropped under the name of the reason.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from apo_trl.pairs.config.settings import Role, Settings
from apo_trl.pairs.judging import rank
from apo_trl.pairs.llm.requests import Dropped, Reply, Requester, gather_all
from apo_trl.pairs.prompts import Answer, Record
from apo_trl.pairs.text.filters import RevisionLimits, is_refusal, revision_reason
from apo_trl.pairs.text.revisions import Malformed, Revision, parse_revision
from apo_trl.pairs.text.templates import load_template

__all__ = ["Pair", "make_pair", "own_answers", "sample"]


class Pair(NamedTuple):
    """What one row became: two answers and where they are from."""

    chosen: Answer
    rejected: Answer
    rationale: str = ""
    margin: float | None = None


async def make_pair(asker: Requester, settings: Settings, record: Record, notes: dict[str, Any]) -> Pair:
    """Make the pair of one row by the recipe's method; `notes` takes what the report counts beside it."""
    if record.fault:
        raise Dropped(record.reason or "bad_row", record.fault)
    pair = await _METHODS[settings.method](asker, settings, record, notes)
    if pair.chosen.text == pair.rejected.text:
        raise Dropped("identical")
    return pair


async def _clair(asker: Requester, settings: Settings, record: Record, notes: dict[str, Any]) -> Pair:
    answer = (await own_answers(asker, settings, record, settings.responses))[0]
    revision = await _revise(asker, settings, record, answer.text)
    return Pair(Answer(revision.text, settings.reviser.public_model), answer, revision.rationale)


async def _judge(asker: Requester, settings: Settings, record: Record, notes: dict[str, Any]) -> Pair:
    answers = await own_answers(asker, settings, record, settings.responses)
    ranking = await rank(asker, settings, record, answers, notes)
    return Pair(ranking.best, ranking.worst, ranking.rationale, ranking.margin)


async def _stronger(asker: Requester, settings: Settings, record: Record, notes: dict[str, Any]) -> Pair:
    role = settings.stronger
    answer = (await own_answers(asker, settings, record, settings.responses))[0]
    (reply,) = await asker.ask(role, "sample", _with_system(role, record), row=record.id)
    _need(role, reply)
    if reply.refused or is_refusal(reply.text):
        raise Dropped("stronger_refused")
    return Pair(Answer(reply.text, role.public_model), answer)


async def _judge_then_clair(asker: Requester, settings: Settings, record: Record, notes: dict[str, Any]) -> Pair:
    ranked = await _judge(asker, settings, record, notes)
    revision = await _revise(asker, settings, record, ranked.chosen.text)
    chosen = Answer(revision.text, settings.reviser.public_model)
    return Pair(chosen, ranked.rejected, revision.rationale, ranked.margin)


_METHODS = {
    "clair": _clair,
    "on_policy_judge": _judge,
    "off_policy_judge": _judge,
    "stronger_preferred": _stronger,
    "judge_then_clair": _judge_then_clair,
}


async def own_answers(asker: Requester, settings: Settings, record: Record, wanted: int) -> Sequence[Answer]:
    """Give the answers that came with the row, or sample as many different ones as are wanted."""
    if record.answers:
        distinct = list({answer.text: answer for answer in record.answers}.values())
        if wanted > 1 and len(distinct) < 2:
            raise Dropped("identical_answers", "the row's own answers are all the same")
        return distinct if wanted > 1 else distinct[:1]
    models = settings.policy
    shares = [range(at, wanted, len(models)) for at in range(len(models))]  # sample numbers, taken in turn
    sampled = await gather_all(
        *(sample(asker, role, record, len(share)) for role, share in zip(models, shares, strict=True) if share)
    )
    answers = [answer for of_one in sampled for answer in of_one]
    distinct = list({answer.text: answer for answer in answers}.values())[:wanted]
    if wanted > 1 and len(distinct) < 2:
        raise Dropped(
            "identical_answers",
            f"{len(answers)} samples are all the same; raise policy_temperature or look whether the server samples",
        )
    return distinct


async def sample(asker: Requester, role: Role, record: Record, count: int) -> list[Answer]:
    """Sample so many answers of one model; those that come out the same are asked for once more."""
    messages = _with_system(role, record)
    replies = await asker.ask(role, "sample", messages, row=record.id, samples=range(count))
    if same := count - len({reply.text for reply in replies}):
        # Two samples alike: the same seed taken twice, a proxy that remembers, or a very sure model.
        replies += await asker.ask(role, "sample", messages, row=record.id, samples=range(count, count + same))
    usable = [reply for reply in replies if reply.finish == "stop" and reply.text.strip()]
    if len(usable) < min(count, 2):
        for reply in replies:
            _need(role, reply)  # says why
    return [Answer(reply.text, role.public_model) for reply in usable]


async def _revise(asker: Requester, settings: Settings, record: Record, answer: str) -> Revision:
    """Ask for a minimal revision of an answer, and once more where the reply is badly formed."""
    role = settings.reviser
    template = load_template("revise", role.template)
    asked = template.ask(record.prompt, answer=answer)
    (reply,) = await asker.ask(role, "revise", asked.messages, row=record.id, template=template.digest)
    try:
        revision = _read_revision(role, reply, asked.suffix)
    except Malformed as error:
        if is_refusal(reply.text):
            raise Dropped("refused") from None
        asked = template.ask_again(record.prompt, asked, reply.text, str(error), answer=answer)
        (reply,) = await asker.ask(role, "revise", asked.messages, row=record.id, template=template.digest)
        try:
            revision = _read_revision(role, reply, asked.suffix)
        except Malformed as again:
            raise Dropped("refused" if is_refusal(reply.text) else "malformed", str(again)) from None
    limits = RevisionLimits(max_edit_distance=settings.max_edit_distance, max_length_ratio=settings.max_length_ratio)
    if fault := revision_reason(record.prompt[-1]["content"], answer, revision.text, limits):
        raise Dropped(fault)
    return revision


def _read_revision(role: Role, reply: Reply, suffix: str) -> Revision:
    if reply.refused:
        raise Dropped("refused")
    _need(role, reply)
    return parse_revision(reply.text, f"revision{suffix}")


def _need(role: Role, reply: Reply) -> None:
    """Raise Dropped for an answer that did not come to its end, or is empty."""
    if reply.finish != "stop":
        names = {"length": "truncated", "content_filter": "filtered"}
        raise Dropped(f"{role.name}_{names.get(reply.finish, 'unfinished')}", f"finish_reason {reply.finish}")
    if not reply.text.strip():
        raise Dropped(f"{role.name}_empty")


def _with_system(role: Role, record: Record) -> list[dict[str, Any]]:
    if role.system_prompt and record.prompt[0]["role"] != "system":
        return [{"role": "system", "content": role.system_prompt}, *record.prompt]
    return record.prompt
