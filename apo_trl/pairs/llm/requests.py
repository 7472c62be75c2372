"""Requests for completions: read from the response cache first, else sent, and never sent twice at once."""

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, NamedTuple, TypeVar

from apo_trl.io.messages import replace_surrogates
from apo_trl.pairs.config.settings import Role, Settings
from apo_trl.pairs.llm.response_cache import ResponseCache, reply_key

__all__ = [
    "Dropped", "Reply", "Request", "RequestFailed", "Requester", "Send", "Stopped", "gather_all", "parameters_of",
    "read_reply", "usage_of",
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
    """A request for one completion; `body` is without `seed`, which some servers refuse."""

    key: str
    role: Role
    step: str
    row: str
    sample: int
    body: dict[str, Any]
    seed: int


class Reply(NamedTuple):
    """A completion; `finish` is "stop" if it is complete."""

    text: str
    finish: str
    refused: bool


Send = Callable[[list[Request]], Awaitable[Mapping[str, Any]]]
"""Send requests that differ in `sample` only; return the body of each response by key. Raises Dropped or Stopped."""


class Requester:
    """Gets completions for the rows, from the cache or by `send`."""

    def __init__(self, settings: Settings, store: ResponseCache, send: Send) -> None:
        self._seed, self._store, self._send = settings.seed, store, send
        self._in_flight: dict[str, asyncio.Future[None]] = {}

    async def ask(
        self, role: Role, step: str, messages: list[dict[str, Any]], *, row: str, samples: range = range(1),
        template: str = "",
    ) -> list[Reply]:  # fmt: skip
        """Return a completion of the messages for each sample. Raises Dropped or Stopped, as `send`."""
        requests = [self._request(role, step, messages, row, sample, template) for sample in samples]
        bodies = {request.key: self._store.reply(request.key) for request in requests}
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
        return [read_reply(bodies[request.key]) for request in requests]

    def _request(
        self, role: Role, step: str, messages: list[dict[str, Any]], row: str, sample: int, template: str
    ) -> Request:
        parameters = parameters_of(role, role.max_tokens)
        # Serialised once, for the key and for the seed: this runs for every request of every run.
        text = json.dumps([messages, self._seed, sample])
        source = {"model": role.model, "base_url": role.base_url, "parameters": parameters}
        key = reply_key(step=step, template=template, messages=text, **source)
        body = {"model": role.model, "messages": messages, **parameters}
        return Request(key, role, step, row, sample, body, int(hashlib.sha256(text.encode()).hexdigest()[:7], 16))


def parameters_of(role: Role, max_tokens: int | None) -> dict[str, Any]:
    """Return the parameters that a role sends in every request, without those set to None."""
    values = {"temperature": role.temperature, "top_p": role.top_p, "max_tokens": max_tokens}
    return {name: value for name, value in values.items() if value is not None} | dict(role.extra_body)


def read_reply(body: Any) -> Reply:
    """Read the first choice of a response."""
    choice = body["choices"][0]
    message = choice.get("message") or {}
    text = message["content"] if isinstance(message.get("content"), str) else ""
    return Reply(replace_surrogates(text), choice.get("finish_reason") or "unknown", bool(message.get("refusal")))


def usage_of(body: Any) -> tuple[int, int]:
    """Return the tokens of prompt and completion that a response reports, 0 if it reports none."""
    usage = body.get("usage")
    counts = [usage.get(f"{part}_tokens") if isinstance(usage, dict) else 0 for part in ("prompt", "completion")]
    prompt, completion = (count if isinstance(count, int) and count > 0 else 0 for count in counts)
    return prompt, completion


async def gather_all(*coroutines: Coroutine[Any, Any, T]) -> list[T]:
    """Wait for all coroutines even if one raises, so that every response is received; then raise the first error."""
    results = await asyncio.gather(*coroutines, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results  # type: ignore[return-value]  # no exception is among them
