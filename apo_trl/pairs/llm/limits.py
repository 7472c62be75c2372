"""What keeps a run within bounds: requests and tokens a minute, requests and money in all, failures in a row."""

import asyncio

from apo_trl.pairs.config.settings import Role, Settings
from apo_trl.pairs.llm.requests import Request, Stopped
from apo_trl.pairs.llm.response_cache import ResponseCache

__all__ = ["Budget", "RateLimiter", "tokens_of"]


def tokens_of(request: Request) -> int:
    """Guess the tokens of a prompt before a server has counted them: 4 characters each, and 4 tokens a message."""
    messages = request.body["messages"]
    return sum(len(message["content"]) // 4 + 4 for message in messages)


class RateLimiter:
    """Hold requests back so that no minute has more of them, or of their tokens, than the server allows."""

    def __init__(self, role: Role) -> None:
        limits = (role.requests_per_minute, role.tokens_per_minute)
        self._seconds = [60 / limit if limit else 0.0 for limit in limits]  # for one request, for one token
        self._free = [0.0, 0.0]

    async def wait(self, tokens: int) -> None:
        """Wait until one more request, of so many tokens, is due."""
        now = asyncio.get_running_loop().time()
        start = max(now, *self._free)
        for at, amount in enumerate((1, tokens)):
            if self._seconds[at]:
                self._free[at] = start + amount * self._seconds[at]
        if start > now:
            await asyncio.sleep(start - now)

    def settle(self, guessed: int, tokens: int) -> None:
        """Put right what `wait` was told, once the server has counted."""
        self._free[1] += (tokens - guessed) * self._seconds[1]


class Budget:
    """`max_requests`, `max_cost` and `max_failures` of one run. Raises Stopped for what would go beyond."""

    def __init__(self, settings: Settings, store: ResponseCache) -> None:
        usage = store.usage().values()
        self.requests = int(sum(role["requests"] for role in usage))
        self.cost = sum(role["cost"] for role in usage)
        self.answered = self.tokens = 0  # in this run
        self.stopped = ""
        self.broken = False
        self._settings = settings
        self._reserved = 0.0
        self._ended = asyncio.Event()
        self._failures = 0

    async def begin(self, request: Request, count: int = 1) -> float:
        """Reserve what a request for so many answers can cost at most, and give that, to be given back to `end`."""
        settings, role = self._settings, request.role
        # Without max_tokens an answer has no bound; what is usual is better than nothing.
        answer = request.body.get("max_tokens", request.body.get("max_completion_tokens", 1024))
        most = count * role.cost(tokens_of(request), answer)
        while (
            not self.stopped and settings.max_cost is not None and self.cost + self._reserved + most > settings.max_cost
        ):
            if not self._reserved:
                self._stop(f"max_cost {settings.max_cost:g} would be passed ({self.cost:.4g} spent so far)")
            self._ended.clear()
            await self._ended.wait()  # what is in flight mostly costs less than it may
        if self.stopped:
            raise Stopped(self.stopped)
        if settings.max_requests is not None and self.requests >= settings.max_requests:
            self._stop(f"max_requests {settings.max_requests} is reached ({self.requests} sent so far)")
        self.requests += 1
        self._reserved += most
        return most

    def end(self, reserved: float, cost: float) -> None:
        """Account for a request that was answered, or failed (`cost` 0)."""
        self._reserved -= reserved
        self._reserved *= self._reserved > 1e-12  # no rest of rounding, which would be waited for
        self.cost += cost
        self._ended.set()

    def succeeded(self, tokens: int) -> None:
        """Note an answer and its tokens: the server is up."""
        self.answered += 1
        self.tokens += tokens
        self._failures = 0

    def failed(self, message: str) -> None:
        """Note a request that failed after all its tries; too many in a row stop the run."""
        self._failures += 1
        if self._failures >= self._settings.max_failures and not self.stopped:
            self.broken = True
            self.stopped = f"{self._failures} requests in a row failed, the last with: {message}"

    def give_up(self, message: str) -> None:
        """Stop the run: the server cannot be used at all."""
        if not self.stopped:
            self.broken, self.stopped = True, message

    def _stop(self, why: str) -> None:
        self.stopped = why
        raise Stopped(why)
