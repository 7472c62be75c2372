"""Requests for completions: read from the response cache first, else sent, and never sent twice at once."""

import asyncio
import functools
import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from apo_trl.pairs.config.settings import Role, Settings
from apo_trl.pairs.functions.process import Outcome, source_of
from apo_trl.pairs.llm.reply import Reply, read_reply
from apo_trl.pairs.llm.response_cache import ResponseCache, reply_key
from apo_trl.pairs.prompts import Record
from apo_trl.pairs.text.reasons import remedy

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
    """A request for one completion; `body` is without `seed`, which some servers refuse."""

    key: str
    role: Role
    step: str
    row: str
    sample: int
    body: dict[str, Any]
    seed: int


Send = Callable[[list[Request]], Awaitable[Mapping[str, Any]]]
"""Send requests that differ in `sample` only; return the body of each response by key. Raises Dropped or Stopped."""


Call = Callable[[Role, dict[str, Any]], Awaitable[Outcome]]
"""Call the function of a role with the columns of one row."""


async def _call_none(role: Role, columns: dict[str, Any]) -> Outcome:
    raise Dropped("not_answered")


class Requester:
    """Gets completions for the rows, from the cache or by `send`.

    Counted by role: `thoughts`, the replies with thoughts, and `repairs`, the requests after a malformed reply.
    """

    def __init__(self, settings: Settings, store: ResponseCache, send: Send, call: Call = _call_none) -> None:
        self._seed, self._store, self._send, self._call = settings.seed, store, send, call
        self._in_flight: dict[str, asyncio.Future[None]] = {}
        self._usable: set[Role] = set()  # a reply of theirs was used
        self._open: defaultdict[str, dict[Role, tuple[str, str]]] = defaultdict(dict)  # drops in rows that go on
        self._drops: defaultdict[Role, list[tuple[str, str]]] = defaultdict(list)  # in the first rows that ended
        self._max_failures, self._by_url = settings.max_failures, settings.cache_by_url
        self._used: defaultdict[str, list[str]] = defaultdict(list)  # keys of the replies of each open row
        self._settings = settings
        self._weights = functools.cache(_weights)  # of each model once, not for every request
        self.thoughts, self.repairs = Counter[str](), Counter[str]()

    async def ask(
        self, role: Role, step: str, messages: list[dict[str, Any]], *, row: str, samples: range = range(1),
        template: str = "", repair: bool = False,
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
        self._used[row] += bodies
        self.repairs[role.name] += repair
        replies = [read_reply(bodies[request.key], role.limit) for request in requests]
        self.thoughts.update(role.name for reply in replies if reply.thoughts)
        return replies

    async def call(self, role: Role, record: Record, answer: str) -> Any:
        """Return what the function of a role returns for an answer and the row's columns, in TRL's format of messages.

        The result comes from the cache if the function's file and what it gets are the same.

        Raises:
            Dropped: The function failed, which is not cached.
        """
        row, function = record.id, str(role.function)
        completion = [{"role": "assistant", "content": answer}]
        columns = {"prompts": record.prompt, "completions": completion, **record.columns}
        key = reply_key(step="function", function=function, source=source_of(function), columns=columns)
        self._used[row].append(key)
        if (cached := self._store.reply(key)) is not None:
            return cached[0]
        value, problem = await self._call(role, columns)
        if problem:
            raise self.ended(role, row, f"{role.name}_failed", problem)
        self._store.add(
            key, json.dumps([value]), role=role.name, step="function", row=row, sample=0, model=role.public_model,
            usage=(0, 0), cost=0.0,
        )  # fmt: skip
        return value

    def ended(self, role: Role, row: str, reason: str = "", detail: str = "") -> Dropped:
        """Note that a reply was used for a row, or dropped for a reason; return the exception to raise then."""
        if reason:
            self._open[row].setdefault(role, (reason, detail))
        else:
            self._usable.add(role)
        return Dropped(reason, detail)

    def fault(self, role: Role, row: str, reply: Reply) -> Dropped | None:
        """Note a reply that is empty or not complete, and return the exception to raise."""
        detail = "" if reply.finish == "stop" else f"finish_reason {reply.finish}"
        return self.ended(role, row, f"{role.name}_{reply.fault}", detail) if reply.fault else None

    def row_ended(self, row: str) -> list[str]:
        """Count a row for each role that had a reply dropped, and return the keys of the row's replies."""
        for role, drop in self._open.pop(row, {}).items():
            if len(self._drops[role]) < self._max_failures:
                self._drops[role].append(drop)
        return self._used.pop(row, [])

    def unusable(self) -> str:
        """Return a message if all replies of a role to the first `max_failures` rows were dropped for one reason."""
        for role in self._drops.keys() - self._usable:
            (reason, detail), *others = self._drops[role]
            if len(others) + 1 < self._max_failures or any(other != reason for other, _ in others):
                continue
            why = f"{reason} ({detail.rstrip('.')})" if detail else reason
            field = "function" if role.function else "model"
            rows = f"{role.name}_{field}: the replies to the first {self._max_failures} rows"
            return f"{rows} were all dropped as {why}. {remedy(reason, self._settings)} Or raise max_failures."
        return ""

    def _request(
        self, role: Role, step: str, messages: list[dict[str, Any]], row: str, sample: int, template: str
    ) -> Request:
        parameters = parameters_of(role, role.max_tokens)
        # Serialised once, for the key and for the seed: this runs for every request of every run.
        text = json.dumps([messages, self._seed, sample])
        source: dict[str, Any] = {"step": step, "template": template, "messages": text, "model": role.model}
        source["parameters"] = parameters
        if self._by_url:
            source["base_url"] = role.base_url
        if weights := self._weights(role.model or ""):  # a server may name it by its folder, too
            source["weights"] = weights
        body = {"model": role.model, "messages": messages, **parameters}
        seed = int(hashlib.sha256(text.encode()).hexdigest()[:7], 16)
        return Request(reply_key(**source), role, step, row, sample, body, seed)


def _weights(model: str) -> list[tuple[str, int, int]]:
    """Return what shows that the weights in a folder are others, as after another training: names, sizes and times."""
    if not os.path.isdir(model):  # Path.is_dir raises an error for a long name
        return []
    folder = Path(model)
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    return sorted((path.name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in files)


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
