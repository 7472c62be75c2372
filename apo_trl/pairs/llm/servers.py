"""Models behind an OpenAI-compatible API, and models in this process.

Tries after a failure are the SDK's alone: at 408, 409, 429 and 5xx, honouring Retry-After, and at broken connections.
"""

import asyncio
import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any

from apo_trl.pairs.config.settings import Role, Settings
from apo_trl.pairs.llm.limits import Budget, RateLimiter, tokens_of
from apo_trl.pairs.llm.local import Local
from apo_trl.pairs.llm.probe import describe, probe
from apo_trl.pairs.llm.requests import Dropped, Request, Stopped, gather_all
from apo_trl.pairs.llm.response_cache import ResponseCache, reply_key
from apo_trl.pairs.llm.wire import client_of, usage_of, words

__all__ = ["Servers"]

_PROBED = [{"role": "user", "content": "Say a random number of eight digits."}]
_REFUSED = (400, 404, 413, 415, 422)
_START = "Start the server, or correct the URL."
_REMEDIES: dict[int | None, str] = {
    401: "Export the right key in the variable that the role's api_key_env names.",
    403: "Export a key that may use this model in the variable that the role's api_key_env names.",
    429: "Wait, or set the role's requests_per_minute or tokens_per_minute.",
}
_LEAVE_OUT = (
    "Correct the URL or the model's name; a parameter that it refuses is left out by null, as in policy_top_p: null."
)


class _Failed(Dropped):
    """A request failed after all its tries, with its HTTP `status`; `spent` where the account has no money left."""

    def __init__(self, reason: str, detail: str, error: Exception) -> None:
        super().__init__(reason, detail)
        self.status: int | None = getattr(error, "status_code", None)
        self.spent = getattr(error, "code", None) == "insufficient_quota"


def _nowhere(line: str) -> None:
    """Say nothing."""


class Servers:
    """Sends requests to where their role's model is, and stores what comes back. To be closed."""

    def __init__(self, settings: Settings, store: ResponseCache, say: Callable[[str], None] = _nowhere) -> None:
        self._say = say
        self.limits = Budget(settings, store)
        probed = {role: store.honours(_probe_of(role)[0]) for role in settings.roles if role.base_url}
        self.notes = {_named(role): describe(found) for role, found in probed.items() if found}  # by earlier runs too
        self._settings, self._store = settings, store
        self._secrets = [role.api_key for role in settings.roles if role.api_key_env]
        self._slots = {role.base_url: asyncio.Semaphore(settings.concurrency) for role in settings.roles}
        self._paces = {role: RateLimiter(role) for role in settings.roles}
        self._clients: dict[Role, Any] = {}
        self._locals: dict[Role, Local] = {}
        self._probes: dict[Role, asyncio.Task[Mapping[str, Any]]] = {}

    async def close(self) -> None:
        """Close connections and threads."""
        for model in self._locals.values():
            model.close()
        for client in self._clients.values():
            await client.close()

    async def send(self, requests: list[Request]) -> Mapping[str, Any]:
        """Get samples of one answer; see `asking.Send`."""
        role = requests[0].role
        if self._settings.max_requests == 0:
            raise Dropped("not_answered")
        if role.base_url is None:
            return dict(await gather_all(*(self._in_process(request) for request in requests)))
        if role not in self._probes:
            self._probes[role] = asyncio.create_task(self._probe(role))
        honours = await asyncio.shield(self._probes[role])
        found: dict[str, Any] = {}
        if len(requests) > 1 and honours.get("n"):
            found = await self._answers(requests, honours)
        rest = [request for request in requests if request.key not in found]
        for more in await gather_all(*(self._answers([request], honours) for request in rest)):
            found |= more
        return found

    async def _answers(self, requests: list[Request], honours: Mapping[str, Any]) -> dict[str, Any]:
        """Send one request of the API for one or more samples."""
        first, count = requests[0], len(requests)
        body = first.body | ({"n": count} if count > 1 else {})
        if honours.get("seed") is not None:
            body = {"seed": first.seed} | body
        try:
            text, answer = await self._post(first, body)
        except _Failed as error:
            self._store.fail(first.key, role=first.role.name, row=first.row, message=error.detail)
            self.limits.failed(f"{first.role.name} at {first.role.base_url}: {error.detail}")
            if error.spent:
                self.limits.give_up(f"{_place(first.role)}: {error.detail}")
            raise
        found = {}
        for request, choice in zip(requests, answer["choices"], strict=False):
            one = answer if count == 1 else answer | {"choices": [choice]}
            # The first of several answers carries the tokens of all: they cannot be told apart.
            counted = (1, usage_of(answer)) if request is first else (0, (0, 0))
            found[request.key] = self._keep(request, text if count == 1 else json.dumps(one), one, *counted)
        return found

    async def _post(self, request: Request, body: dict[str, Any]) -> tuple[str, Any]:
        """Send one request of the API; give the response as text and as what it says."""
        import httpx2
        import openai

        role, pace = request.role, self._paces[request.role]
        if role not in self._clients:
            self._clients[role] = client_of(role, self._settings.concurrency)
        count = int(body.get("n", 1))
        guessed = tokens_of(request) + int(body.get("max_tokens") or 0) * count
        async with self._slots[role.base_url]:
            await pace.wait(guessed)
            reserved, tokens = await self.limits.begin(request, count), (0, 0)
            try:
                response = await self._clients[role].post("/chat/completions", cast_to=httpx2.Response, body=body)
                tokens = usage_of(response.extensions["json"])
            except openai.OpenAIError as error:
                message = words(error)
                for secret in self._secrets:
                    message = message.replace(secret, "[api key]")
                raise _Failed(f"{role.name}_error", message, error) from error
            finally:
                self.limits.end(reserved, role.cost(*tokens))
                pace.settle(guessed, sum(tokens))
        return response.text, response.extensions["json"]

    def _keep(self, request: Request, text: str, body: Any, requests: int, tokens: tuple[int, int]) -> Any:
        """Store a reply, and give what a later run will read."""
        self.limits.succeeded(sum(tokens))
        for secret in self._secrets:
            if secret in text and _is_key(secret):  # a server that sends back what it was sent
                text = text.replace(secret, "[api key]")
                body = json.loads(text)
        self._store.add(
            request.key, text, role=request.role.name, step=request.step, row=request.row, sample=request.sample,
            model=str(request.role.model), requests=requests, usage=tokens, cost=request.role.cost(*tokens),
        )  # fmt: skip
        return body

    async def _in_process(self, request: Request) -> tuple[str, Any]:
        role = request.role
        if role not in self._locals:
            self._locals[role] = Local(role, scores=self._settings.scores(role))
        reserved = await self.limits.begin(request)
        try:
            body = await self._locals[role].answer(request.body | {"seed": request.seed})
        finally:
            self.limits.end(reserved, 0.0)
        if "error" in body:  # this one request cannot be answered; the model itself is well
            message = body["error"]["message"]
            self._store.fail(request.key, role=role.name, row=request.row, message=message)
            raise Dropped(f"{role.name}_error", message)
        return request.key, self._keep(request, json.dumps(body), body, 1, usage_of(body))

    async def _probe(self, role: Role) -> Mapping[str, Any]:
        """Find out once for each server, model and set of parameters what works there, or stop the run."""
        key, body = _probe_of(role)
        honours = self._store.honours(key)
        if honours is None:
            refusals: list[str] = []
            number = itertools.count()

            async def post(body: dict[str, Any]) -> Any:
                request = Request(f"{key}-{next(number)}", role, "probe", "", 0, body, 0)
                return await self._try(request, refusals)

            honours = await probe(post, body)
            if not any(works is not None for works in honours.values()) and await post(body) is None:
                raise self._give_up(f"{_place(role)} refuses every request: {refusals[-1]}. {_LEAVE_OUT}")
            self._store.set_honours(key, honours)
            self.notes[_named(role)] = describe(honours)
            self._say(f"{_named(role)}: {describe(honours)}.")
        return honours

    async def _try(self, request: Request, refusals: list[str]) -> Any:
        """Send a probe: the body of the answer, or None where the server refuses what it is asked for."""
        for _ in range(3):  # one refused key among many taken ones is a fault, three are an answer
            try:
                text, body = await self._post(request, request.body)
            except _Failed as error:
                failure = error
                if error.status in _REFUSED:
                    refusals.append(error.detail)
                    return None
                if error.status not in (401, 403):
                    break  # the SDK has tried often enough
            else:
                return self._keep(request, text, body, 1, usage_of(body))
        raise self._give_up(
            f"{_place(request.role)} cannot be used: {failure.detail}. {_REMEDIES.get(failure.status, _START)}"
        )

    def _give_up(self, why: str) -> Stopped:
        self.limits.give_up(why)
        return Stopped(why)


def _is_key(secret: str) -> bool:
    """Tell a key from the words that servers without keys are given, such as EMPTY, which a text may hold."""
    return secret.startswith("sk-") or len(secret) >= 20 or (len(secret) >= 8 and any(map(str.isdigit, secret)))


def _named(role: Role) -> str:
    return f"{role.name} {role.public_model}"


def _probe_of(role: Role) -> tuple[str, dict[str, Any]]:
    """Give the key that a probe's result is kept under, and the body that is sent."""
    named = {"temperature": role.temperature, "top_p": role.top_p, "max_tokens": role.max_tokens and 32}
    body = {"model": role.model, "messages": _PROBED}
    body |= {name: value for name, value in named.items() if value is not None} | dict(role.extra_body)
    return reply_key(step="probe", base_url=role.base_url, body=body), body


def _place(role: Role) -> str:
    return f"{role.name}_base_url {role.base_url} with {role.name}_model {role.model}"
