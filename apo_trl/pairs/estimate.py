"""Estimate what a run still has to send, without probes of servers and retries; repairs are an upper limit.

Requests that can be sent now are counted as `build` sends them, later ones as if every judge found a winner.
"""

import asyncio
from collections import Counter
from collections.abc import Mapping
from typing import Any, NoReturn

from apo_trl.pairs.build import End, check_columns, check_templates, each_row
from apo_trl.pairs.config.settings import Role, Settings
from apo_trl.pairs.llm.limits import tokens_of
from apo_trl.pairs.llm.requests import Dropped, Request, Requester
from apo_trl.pairs.llm.response_cache import ResponseCache
from apo_trl.pairs.prompts import PromptSource
from apo_trl.pairs.text.templates import load_template

__all__ = ["estimate", "table"]

Messages = list[dict[str, Any]]
_STAGES = ("policy", "stronger", "judge", "reviser")  # each needs the answers of those before


def estimate(settings: Settings, store: ResponseCache) -> dict[str, dict[str, float]]:
    """Estimate by role; an answer is as long as the role's mean in the cache, or else as max_tokens allows."""
    source, means = PromptSource(settings), store.mean_tokens()
    check_templates(settings)
    check_columns(settings, source)
    counts = {role.name: Counter(requests=0, prompt_tokens=0, completion_tokens=0) for role in settings.roles}
    seen: set[str] = set()
    missing: dict[str, str] = {}  # rows with the role whose answers they lack

    def answer_tokens(role: Role) -> int:
        return round(means.get(role.name) or role.limit or 1024)

    def count(role: Role, number: int, messages: Messages) -> None:
        prompt = number * tokens_of(messages)
        completion = 0 if settings.scores(role) else number * answer_tokens(role)
        counts[role.name].update(requests=number, prompt_tokens=prompt, completion_tokens=completion)

    async def send(requests: list[Request]) -> NoReturn:
        for request in requests:
            missing[request.row] = request.role.name
            if request.key not in seen:  # rows with the same request share its answer
                seen.add(request.key)
                count(request.role, 1, request.body["messages"])
        raise Dropped("not_answered")

    def end(ended: End) -> None:
        if ended.reason == "not_answered":  # of a function, unless it is in `missing`
            stage = missing.get(ended.record.id) or settings.functions[0].name
            answer = "abc " * answer_tokens(settings.policy[0])
            for role in settings.roles:
                if _STAGES.index(role.name) > _STAGES.index(stage):
                    count(role, *_later(settings, role, ended.record.prompt, answer))

    asyncio.run(each_row(settings, iter(source), Requester(settings, store, send), end))
    tokens = {name: (use["prompt_tokens"], use["completion_tokens"]) for name, use in counts.items()}
    repairs = {role.name: counts[role.name]["requests"] * _can_be_repaired(settings, role) for role in settings.roles}
    return {
        role.name: {**counts[role.name], "repairs": repairs[role.name], "cost": role.cost(*tokens[role.name])}
        for role in settings.roles
    }


def _can_be_repaired(settings: Settings, role: Role) -> bool:
    return role.name in ("reviser", "judge") and not settings.scores(role)


def _later(settings: Settings, role: Role, prompt: Messages, answer: str) -> tuple[int, Messages]:
    judge, pairwise = role.name == "judge", settings.judge_protocol == "pairwise"
    number = settings.responses * (settings.responses - 1 if pairwise else 1) if judge else 1
    if role.name == "stronger" or settings.scores(role):
        return number, [*prompt, {"role": "assistant", "content": answer}] if judge else prompt
    template = load_template(("compare" if pairwise else "score") if judge else "revise", role.template)
    return number, template.ask(prompt, answer=answer, answer_a=answer, answer_b=answer).messages


def table(counts: Mapping[str, Mapping[str, float]]) -> str:
    """Format an estimate for the terminal."""
    row = "{role:<10}{requests:>12,}{repairs:>12,}{prompt_tokens:>16,}{completion_tokens:>16,}{cost:>12.4g}"
    head = f"{'role':<10}{'requests':>12}{'repairs':>12}{'prompt tokens':>16}{'answer tokens':>16}{'cost':>12}"
    return "\n".join([head, *(row.format(role=role, **use) for role, use in counts.items())])
