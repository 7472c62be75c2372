"""What a run would take, by a run that asks nobody: every row goes through its method and is answered by a sketch."""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from apo_trl.pairs.build import End, check_templates, each_row
from apo_trl.pairs.config.settings import Role, Settings
from apo_trl.pairs.llm.limits import tokens_of
from apo_trl.pairs.llm.requests import Request
from apo_trl.pairs.llm.response_cache import ResponseCache
from apo_trl.pairs.prompts import PromptSource

__all__ = ["estimate", "table"]

_TOKENS = 1024  # of an answer, where max_tokens is left out
_NO_WIN = ("tie", "disagreement", "judge_invalid")


def estimate(settings: Settings, store: ResponseCache) -> dict[str, dict[str, float]]:
    """Say for each role how many `requests`, `prompt_tokens` and `completion_tokens` are to come, and their `cost`.

    An answer is taken to be as long as those of its role in the store are on average, or as max_tokens allows while
    there are none: then the figures are the most it can be. Every judge is taken to find a winner, and every sample to
    be a request of its own. Probes of servers, repairs and tries after failures are not among them.
    """
    source = PromptSource(settings)
    check_templates(settings)
    sketcher = _Sketcher(settings, store.mean_tokens())
    asyncio.run(each_row(settings, iter(source), store, sketcher.send, sketcher.end))
    return {
        role.name: {
            **sketcher.counts[role.name],
            "cost": role.cost(
                sketcher.counts[role.name]["prompt_tokens"], sketcher.counts[role.name]["completion_tokens"]
            ),
        }
        for role in settings.roles
    }


class _Sketcher:
    """Answers as a model would that never fails, and counts."""

    def __init__(self, settings: Settings, means: Mapping[str, float]) -> None:
        self._settings, self._means = settings, means
        self._keys: set[str] = set()  # rows may ask the same, and it is sent once
        self._turns: Counter[str] = Counter()  # verdicts for each row
        self.counts: dict[str, dict[str, float]] = defaultdict(
            lambda: {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0}
        )

    async def send(self, requests: list[Request]) -> dict[str, Any]:
        found = {}
        for request in requests:
            tokens = self._tokens(request)
            # Which answer a sketched verdict prefers says nothing: its revision is not another row's.
            if request.key not in self._keys or (request.step == "revise" and self._turns[request.row]):
                self._keys.add(request.key)
                self._count(request.role, tokens_of(request), tokens)
            found[request.key] = {"choices": [self._sketch(request, tokens)]}
        return found

    def end(self, ended: End) -> None:
        """Count a revision after verdicts that do not agree only because some are sketched and some stored."""
        role = self._settings.reviser
        if ended.reason in _NO_WIN and self._turns[ended.record.id] and role in self._settings.roles:
            answer = self._means.get("policy") or _TOKENS
            prompt = sum(len(message["content"]) // 4 + 4 for message in ended.record.prompt)
            self._count(role, prompt + round(answer), self._answer(role, role.max_tokens))

    def _count(self, role: Role, prompt_tokens: int, completion_tokens: int) -> None:
        counts = self.counts[role.name]
        counts["requests"] += 1
        counts["prompt_tokens"] += prompt_tokens
        counts["completion_tokens"] += completion_tokens

    def _tokens(self, request: Request) -> int:
        if request.step == "reward":
            return 0  # a score, and no text
        most = request.body.get("max_tokens", request.body.get("max_completion_tokens"))
        return self._answer(request.role, most)

    def _answer(self, role: Role, most: int | None) -> int:
        return round(self._means.get(role.name) or most or _TOKENS)

    def _sketch(self, request: Request, tokens: int) -> dict[str, Any]:
        """Give the choice of a response: whatever leads to the most requests."""
        if request.step == "revise":  # nothing is asked after it, unless it could be repaired
            return {"message": {"content": ""}, "finish_reason": "length"}
        text = f"{request.role.model} {request.sample} " + "abc " * max(0, tokens - 4)
        if request.step in ("compare", "score", "reward"):
            self._turns[request.row] += 1
            turn = self._turns[request.row]
            if request.step == "compare":  # the first of two answers wins in both orders
                text = "[[A]]" if turn % 2 else "[[B]]"
            else:
                text = "[[10]]" if turn == 1 else "[[1]]"
        return {"message": {"content": text}, "finish_reason": "stop"}


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """Lay out an estimate for the terminal."""
    lines = [f"{'role':<10}{'requests':>12}{'prompt tokens':>16}{'answer tokens':>16}{'cost':>12}"]
    lines += [
        f"{role:<10}{use['requests']:>12,}{use['prompt_tokens']:>16,}{use['completion_tokens']:>16,}{use['cost']:>12.4g}"
        for role, use in found.items()
    ]
    return "\n".join(lines)
