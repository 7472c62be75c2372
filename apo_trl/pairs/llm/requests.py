"""Asking for answers: looked up in the store first, sent only when they are not there, never sent twice at once.

How they are sent is a function passed in: to a server or a model in this process (`servers`), into a batch file
(`batch`), or to nobody, for a dry run (`estimate`).
"""

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, NamedTuple, TypeVar

from apo_trl.io.messages import replace_surrogates
from apo_trl.pairs.config.settings import Role, Settings
from apo_trl.pairs.llm.response_cache import ResponseCache, reply_key

__all__ = ["Dropped", "Reply", "Request", "Requester", "Send", "Stopped", "gather_all", "read_reply"]

T = TypeVar("T")


class Dropped(Exception):
    """A row ends without a pair, under a name that is counted."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class Stopped(Exception):
    """Nothing more is sent in this run."""


class Request(NamedTuple):
    """One answer that is wanted; `body` is that of the request, less `seed`, which not every server takes."""

    key: str
    role: Role
    step: str
    row: str
    sample: int
    body: dict[str, Any]
    seed: int


class Reply(NamedTuple):
    """What a model answered. `finish` is "stop" where it came to its end."""

    text: str
    finish: str
    refused: bool


Send = Callable[[list[Request]], Awaitable[Mapping[str, Any]]]
"""Send requests for samples of one answer and give the body of each by its key; raises Dropped or Stopped."""


class Requester:
    """Asks on behalf of the rows."""

    def __init__(self, settings: Settings, store: ResponseCache, send: Send) -> None:
        self._seed, self._store, self._send = settings.seed, store, send
        self._busy: dict[str, asyncio.Future[None]] = {}

    async def ask(
        self, role: Role, step: str, messages: list[dict[str, Any]], *, row: str, samples: range = range(1),
        template: str = "",
    ) -> list[Reply]:  # fmt: skip
        """Give an answer for each sample.

        Raises Dropped where a request failed for good, Stopped where nothing may be sent any more.
        """
        requests = [self._request(role, step, messages, row, sample, template) for sample in samples]
        bodies = {request.key: self._store.reply(request.key) for request in requests}
        while missing := [request for request in requests if bodies[request.key] is None]:
            if busy := {self._busy[request.key] for request in missing if request.key in self._busy}:
                await asyncio.wait(busy)  # another row asks the same just now
                bodies |= {request.key: self._store.reply(request.key) for request in missing}
                continue
            done = asyncio.get_running_loop().create_future()
            self._busy |= {request.key: done for request in missing}
            try:
                bodies |= await self._send(missing)
            finally:
                done.set_result(None)
                for request in missing:
                    del self._busy[request.key]
        return [read_reply(bodies[request.key]) for request in requests]

    def _request(
        self, role: Role, step: str, messages: list[dict[str, Any]], row: str, sample: int, template: str
    ) -> Request:
        named = {"temperature": role.temperature, "top_p": role.top_p, "max_tokens": role.max_tokens}
        parameters = {name: value for name, value in named.items() if value is not None} | dict(role.extra_body)
        # The text of the messages once, for the key and for the seed: this is done for every request of every run.
        text = json.dumps([messages, self._seed, sample])
        key = reply_key(
            step=step, template=template, messages=text, model=role.model, base_url=role.base_url, parameters=parameters
        )
        body = {"model": role.model, "messages": messages, **parameters}
        return Request(key, role, step, row, sample, body, int(hashlib.sha256(text.encode()).hexdigest()[:7], 16))


def read_reply(body: Any) -> Reply:
    """Read the first answer in a response's body, in the format of OpenAI's chat completions."""
    choice = body["choices"][0]
    message = choice.get("message") or {}
    text = message.get("content")
    return Reply(
        replace_surrogates(text) if isinstance(text, str) else "",
        choice.get("finish_reason") or "unknown",
        bool(message.get("refusal")),
    )


async def gather_all(*coroutines: Coroutine[Any, Any, T]) -> list[T]:
    """Wait for all of them even where one raises, then raise the first exception: what was sent is still received."""
    found = await asyncio.gather(*coroutines, return_exceptions=True)
    for result in found:
        if isinstance(result, BaseException):
            raise result
    return found  # type: ignore[return-value]  # no exception is among them
