"""Limits of a run: requests and tokens per minute, requests and cost in total, failures in a row."""

import asyncio
import math
from collections.abc import Iterable, Mapping
from typing import Any

from apo_trl.pairs.config.settings import Role, Settings
from apo_trl.pairs.llm.requests import Request, Stopped
from apo_trl.pairs.llm.response_cache import ResponseCache

__all__ = ["Budget", "RateLimiter", "tokens_of"]


def tokens_of(messages: Iterable[Mapping[str, Any]]) -> int:
    """Estimate the tokens of a prompt before a server counts them: 4 characters each, and 4 tokens per message."""
    return sum(len(message["content"]) // 4 + 4 for message in messages)


class RateLimiter:
    """Delays requests to stay within `requests_per_minute` and `tokens_per_minute` of a role."""

    def __init__(self, role: Role) -> None:
        self._per_request = 60 / (role.requests_per_minute or math.inf)  # seconds
        self._per_token = 60 / (role.tokens_per_minute or math.inf)
        self._next_by_requests = self._next_by_tokens = 0.0  # when the next request may start

    async def wait(self, tokens: int) -> None:
        """Wait until a request of an estimated number of tokens may start."""
        now = asyncio.get_running_loop().time()
        start = max(now, self._next_by_requests, self._next_by_tokens)
        self._next_by_requests = start + self._per_request
        self._next_by_tokens = start + tokens * self._per_token
        if start > now:
            await asyncio.sleep(start - now)

    def settle(self, estimated: int, tokens: int) -> None:
        """Replace the estimate by the tokens that the server counted."""
        self._next_by_tokens += (tokens - estimated) * self._per_token


class Budget:
    """`max_requests` and `max_cost`, counted over all runs, and `max_failures`.

    `stopped` is the reason of an early end, `broken` whether it is a server; `answered` and `tokens` are this run's.
    """

    def __init__(self, settings: Settings, store: ResponseCache) -> None:
        usage = store.usage().values()
        self.requests = int(sum(role["requests"] for role in usage))
        self.cost = sum(role["cost"] for role in usage)
        self.answered = self.tokens = self._failures = 0
        self.stopped, self.broken = "", False
        self._settings, self._reserved, self._ended = settings, 0.0, asyncio.Event()

    async def begin(self, request: Request, count: int = 1) -> float:
        """Reserve the highest cost of a request for `count` completions; return it, for `end`. Raises Stopped."""
        settings = self._settings
        # Without max_tokens a completion has no bound; the usual one is better than none.
        completion = request.body.get("max_tokens") or request.role.limit or 1024
        highest = count * request.role.cost(tokens_of(request.body["messages"]), completion)
        limit = math.inf if settings.max_cost is None else settings.max_cost
        while not self.stopped and self.cost + self._reserved + highest > limit:
            if not self._reserved:
                self.stopped = f"max_cost {limit:g} would be exceeded ({self.cost:.4g} spent so far)"
            else:  # requests in flight mostly cost less than was reserved
                self._ended.clear()
                await self._ended.wait()
        if not self.stopped and settings.max_requests is not None and self.requests >= settings.max_requests:
            self.stopped = f"max_requests {settings.max_requests} is reached ({self.requests} sent so far)"
        if self.stopped:
            raise Stopped(self.stopped)
        self.requests += 1
        self._reserved += highest
        return highest

    def end(self, reserved: float, cost: float, tokens: int, *, answered: bool) -> None:
        """Count a request that has ended, with its true cost in place of the reserved one."""
        self._reserved -= reserved
        self._reserved *= self._reserved > 1e-12  # a rounding error would be waited for
        self.cost += cost
        self.tokens += tokens
        self.answered += answered
        self._failures *= not answered
        self._ended.set()

    def failed(self, message: str) -> None:
        """Count a request that failed after all retries; stop after `max_failures` in a row."""
        self._failures += 1
        if self._failures >= self._settings.max_failures:
            self.give_up(f"{self._failures} requests in a row failed, the last one with: {message}")

    def give_up(self, message: str) -> Stopped:
        """Stop the run, since the server cannot be used; return the exception to raise."""
        if not self.stopped:
            self.broken, self.stopped = True, message
        return Stopped(message)
