"""The five methods that build a pair from a prompt (arXiv 2408.06266, equations 1 to 4, and LFM2's, arXiv 2511.23404).

A row without a pair raises Dropped with the name of the reason.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import chain, cycle, islice
from typing import Any

from apo_trl.pairs.config.settings import Role, Settings
from apo_trl.pairs.judging import Notes, Pair, rank
from apo_trl.pairs.llm.requests import Dropped, Requester, gather_all
from apo_trl.pairs.prompts import Answer, Record
from apo_trl.pairs.text.filters import RevisionLimits, is_refusal, revision_reason
from apo_trl.pairs.text.revisions import Malformed, Revision, parse_revision
from apo_trl.pairs.text.templates import load_template

__all__ = ["make_pair", "own_answers", "sample", "with_system"]


async def make_pair(asker: Requester, settings: Settings, record: Record, notes: Notes) -> Pair:
    """Build the pair of one row by the recipe's method; `notes` receives the judge's results, for the report."""
    pair = await _METHODS[settings.method](asker, settings, record, notes)
    if pair.chosen.text == pair.rejected.text:
        raise Dropped("identical")
    return pair


async def _clair(asker: Requester, settings: Settings, record: Record, notes: Notes) -> Pair:
    answer = (await own_answers(asker, settings, record, settings.responses))[0]
    return await _revise(asker, settings, record, Pair(answer, answer))


async def _judge(asker: Requester, settings: Settings, record: Record, notes: Notes) -> Pair:
    answers = await own_answers(asker, settings, record, settings.responses)
    return await rank(asker, settings, record, answers, notes)


async def _judge_then_clair(asker: Requester, settings: Settings, record: Record, notes: Notes) -> Pair:
    return await _revise(asker, settings, record, await _judge(asker, settings, record, notes))


async def _stronger(asker: Requester, settings: Settings, record: Record, notes: Notes) -> Pair:
    role = settings.stronger
    answer = (await own_answers(asker, settings, record, settings.responses))[0]
    (reply,) = await asker.ask(role, "sample", with_system(role, record), row=record.id)
    if reply.refused or (not reply.fault and is_refusal(reply.text)):
        raise asker.ended(role, record.id, "stronger_refused")
    if fault := asker.fault(role, record.id, reply):
        raise fault
    asker.ended(role, record.id)
    return Pair(Answer(reply.text, role.public_model), answer)


_METHODS = {
    "clair": _clair,
    "on_policy_judge": _judge,
    "off_policy_judge": _judge,
    "stronger_preferred": _stronger,
    "judge_then_clair": _judge_then_clair,
}


async def own_answers(asker: Requester, settings: Settings, record: Record, wanted: int) -> Sequence[Answer]:
    """Return the different answers that came with the row, or sample up to `wanted` of them.

    Raises:
        Dropped: All answers are the same, though more than one is wanted, or sampling failed.
    """
    answers, problem = list(record.answers), "the row's own answers are all the same"
    if not answers:
        turns = Counter(islice(cycle(settings.policy), wanted))  # the models take turns
        sampled = await gather_all(*(sample(asker, role, record, count) for role, count in turns.items()))
        answers = list(chain.from_iterable(sampled))
        problem = f"{len(answers)} samples are all the same; raise policy_temperature or check that the server samples"
    distinct = list({answer.text: answer for answer in answers}.values())
    if wanted > 1 and len(distinct) < 2:
        raise Dropped("identical_answers", problem)
    return distinct if record.answers and wanted > 1 else distinct[:wanted]


async def sample(asker: Requester, role: Role, record: Record, count: int) -> list[Answer]:
    """Sample `count` answers of one model; usable ones that repeat are requested once more.

    Raises:
        Dropped: No answer is complete, or only one of several.
    """
    messages = with_system(role, record)
    replies = await asker.ask(role, "sample", messages, row=record.id, samples=range(count))
    texts = [reply.text for reply in replies if not reply.fault]
    if same := len(texts) - len(set(texts)):
        # Two equal samples: the same seed used twice, a caching proxy, or a very sure model.
        replies += await asker.ask(role, "sample", messages, row=record.id, samples=range(count, count + same))
    usable = [reply for reply in replies if not reply.fault]
    faults = [fault for reply in replies if (fault := asker.fault(role, record.id, reply))]
    if usable:
        asker.ended(role, record.id)
    if len(usable) < min(count, 2):
        raise faults[0]
    return [Answer(reply.text, role.public_model) for reply in usable]


async def _revise(asker: Requester, settings: Settings, record: Record, pair: Pair) -> Pair:
    """Replace the chosen answer by its minimal revision."""
    role, row, answer = settings.reviser, record.id, pair.chosen.text
    revised = _function_revision if role.function else _model_revision
    revision = await revised(asker, role, record, answer)
    limits = RevisionLimits(max_edit_distance=settings.max_edit_distance, max_length_ratio=settings.max_length_ratio)
    if reason := revision_reason(record.prompt[-1]["content"], answer, revision.text, limits):
        raise asker.ended(role, row, reason)
    asker.ended(role, row)
    return pair._replace(chosen=Answer(revision.text, role.public_model), rationale=revision.rationale)


async def _function_revision(asker: Requester, role: Role, record: Record, answer: str) -> Revision:
    text = await asker.call(role, record, answer)
    if text is None:
        asker.ended(role, record.id)
        raise Dropped("no_revision")
    return Revision("", text)


async def _model_revision(asker: Requester, role: Role, record: Record, answer: str) -> Revision:
    """Return the revision of a model, which is requested once more if the reply is malformed."""
    row = record.id
    template = load_template("revise", role.template)
    asked = template.ask(record.prompt, answer=answer)
    revision, repaired = None, False
    while revision is None:
        (reply,) = await asker.ask(role, "revise", asked.messages, row=row, template=template.digest, repair=repaired)
        if reply.refused:
            raise asker.ended(role, row, "refused")
        if fault := asker.fault(role, row, reply):
            raise fault
        try:
            revision = parse_revision(reply.text, f"revision{asked.suffix}")
        except Malformed as error:
            if is_refusal(reply.text) or repaired:
                raise asker.ended(role, row, "refused" if is_refusal(reply.text) else "malformed", str(error)) from None
            asked, repaired = template.ask_again(record.prompt, asked, reply.text, str(error), answer=answer), True
    return revision


def with_system(role: Role, record: Record) -> list[dict[str, Any]]:
    """Return the conversation of a row, which begins with the role's system prompt if it has none of its own."""
    if role.system_prompt and record.prompt[0]["role"] != "system":
        return [{"role": "system", "content": role.system_prompt}, *record.prompt]
    return record.prompt
