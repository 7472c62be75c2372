"""Requests for completions: read from the response cache first, else sent, and never sent twice at once."""

import asyncio
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, NamedTuple, TypeVar

from apo_trl.pairs.config.settings import Role, Settings
from apo_trl.pairs.llm.reply import Reply, read_reply
from apo_trl.pairs.llm.response_cache import ResponseCache, reply_key

__all__ = [
    "Dropped", "Request", "RequestFailed", "Requester", "Send", "Stopped", "gather_all", "parameters_of",
]  # fmt: skip

T = TypeVar("T")


class Dropped(Exception):
    """A row ends without a pair; rows are counted by `reason`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class Stopped(Exception):
    """This run sends no further requests."""


class RequestFailed(Exception):
    """A request failed after all retries, with an HTTP `status` and OpenAI's `code` if the server sent them."""

    def __init__(self, message: str, status: int | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.status, self.code = message, status, code


class Request(NamedTuple):
    """A request for one completion; `body` is without `seed`, which some servers refuse.

    `url_key` covers the URL too, as did the keys of earlier versions, whose caches are read.
    """

    key: str
    role: Role
    step: str
    row: str
    sample: int
    body: dict[str, Any]
    seed: int
    url_key: str = ""


Send = Callable[[list[Request]], Awaitable[Mapping[str, Any]]]
"""Send requests that differ in `sample` only; return the body of each response by key. Raises Dropped or Stopped."""


class Requester:
    """Gets completions for the rows, from the cache or by `send`; `thoughts` counts by role those with thoughts.

    Calls `stop` with a message if the first `max_failures` replies of a role, or rows, are dropped for one reason.
    """

    def __init__(
        self, settings: Settings, store: ResponseCache, send: Send, stop: Callable[[str], object] = lambda message: None
    ) -> None:
        self._seed, self._store, self._send, self._stop = settings.seed, store, send, stop
        self._in_flight: dict[str, asyncio.Future[None]] = {}
        self._ends: defaultdict[Role | None, Counter[str]] = defaultdict(Counter)
        self._max_failures, self._by_url = settings.max_failures, settings.cache_by_url
        self.thoughts = Counter[str]()

    async def ask(
        self, role: Role, step: str, messages: list[dict[str, Any]], *, row: str, samples: range = range(1),
        template: str = "",
    ) -> list[Reply]:  # fmt: skip
        """Return a completion of the messages for each sample. Raises Dropped or Stopped, as `send`."""
        requests = [self._request(role, step, messages, row, sample, template) for sample in samples]
        bodies = {request.key: self._store.reply(request.key, request.url_key) for request in requests}
        while missing := [request for request in requests if bodies[request.key] is None]:
            if waiting := {self._in_flight[request.key] for request in missing if request.key in self._in_flight}:
                await asyncio.wait(waiting)  # for another row with an equal request
                bodies |= {request.key: self._store.reply(request.key) for request in missing}
                continue
            done = asyncio.get_running_loop().create_future()
            self._in_flight |= {request.key: done for request in missing}
            try:
                bodies |= await self._send(missing)
            finally:
                done.set_result(None)
                for request in missing:
                    del self._in_flight[request.key]
        limit = role.max_tokens or role.extra_body.get("max_completion_tokens")
        replies = [read_reply(bodies[request.key], limit) for request in requests]
        self.thoughts.update(role.name for reply in replies if reply.thoughts)
        return replies

    def ended(self, role: Role | None, reason: str = "", detail: str = "") -> Dropped:
        """Count a reply of a role, or a row, as used or as dropped for a reason; return the exception to raise then."""
        ends = self._ends[role]
        ends[reason] += 1
        if reason and (count := ends.total()) == ends[reason] == self._max_failures:
            whose = f"{role.name}_model: the first {count} replies" if role else f"prompts: the first {count} rows"
            setting = reason.replace("_truncated", "_max_tokens")
            remedy = (
                "Change the model or its settings" if setting == reason else f"Raise {setting}, or turn thinking off"
            )
            why = f"{reason} ({detail})" if detail else reason
            self._stop(f"{whose} were all dropped as {why}. {remedy}; raise max_failures to go on.")
        return Dropped(reason, detail)

    def fault(self, role: Role, reply: Reply) -> Dropped | None:
        """Count a reply that is empty or not complete, and return the exception to raise."""
        detail = "" if reply.finish == "stop" else f"finish_reason {reply.finish}"
        return self.ended(role, f"{role.name}_{reply.fault}", detail) if reply.fault else None

    def _request(
        self, role: Role, step: str, messages: list[dict[str, Any]], row: str, sample: int, template: str
    ) -> Request:
        parameters = parameters_of(role, role.max_tokens)
        # Serialised once, for the key and for the seed: this runs for every request of every run.
        text = json.dumps([messages, self._seed, sample])
        source = {"step": step, "template": template, "messages": text, "model": role.model, "parameters": parameters}
        url_key = reply_key(**source, base_url=role.base_url)
        key = url_key if self._by_url else reply_key(**source)
        body = {"model": role.model, "messages": messages, **parameters}
        return Request(
            key, role, step, row, sample, body, int(hashlib.sha256(text.encode()).hexdigest()[:7], 16), url_key
        )


def parameters_of(role: Role, max_tokens: int | None) -> dict[str, Any]:
    """Return the parameters that a role sends in every request, without those set to None."""
    values = {"temperature": role.temperature, "top_p": role.top_p, "max_tokens": max_tokens}
    return {name: value for name, value in values.items() if value is not None} | dict(role.extra_body)


async def gather_all(*coroutines: Coroutine[Any, Any, T]) -> list[T]:
    """Wait for all coroutines even if one raises, so that every response is received; then raise the first error."""
    results = await asyncio.gather(*coroutines, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results  # type: ignore[return-value]  # no exception is among them
