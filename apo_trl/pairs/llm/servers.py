"""Send requests to servers and to models in this process, and cache the responses.

Of a server's optional features only `n` and `seed` are used; a probe finds out which of them it honours.
"""

import asyncio
import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from apo_trl.pairs.config.settings import Role, Settings
from apo_trl.pairs.functions.process import FunctionProcess, Outcome
from apo_trl.pairs.llm.batcher import Batcher
from apo_trl.pairs.llm.limits import Budget, RateLimiter, tokens_of
from apo_trl.pairs.llm.reply import choices_of, read_reply, usage_of
from apo_trl.pairs.llm.requests import Dropped, Request, Requester, RequestFailed, gather_all, parameters_of
from apo_trl.pairs.llm.response_cache import ResponseCache, reply_key

__all__ = ["Servers"]

Features = Mapping[str, bool | None]  # `n` and `seed`: True if honoured, False if ignored, None if refused

_PROBE = [{"role": "user", "content": "Say a random number of eight digits."}]
_REFUSED = (400, 404, 413, 415, 422)


class Servers:
    """The models and functions of a recipe's roles, which get the `columns` of the prompts. To be closed."""

    def __init__(
        self, settings: Settings, store: ResponseCache, say: Callable[[str], None], columns: Iterable[str] = ()
    ) -> None:
        self.limits = Budget(settings, store)
        self._settings, self._store, self._say = settings, store, say
        self._secrets = [role.api_key for role in settings.roles if role.api_key_env]
        self._limiters = {role: RateLimiter(role) for role in settings.roles}
        self._slots = {  # in this process one batch gathers while another one runs
            role.base_url or role: asyncio.Semaphore(settings.concurrency if role.base_url else 2 * role.batch_size)
            for role in settings.roles
        }
        self.requester = Requester(settings, store, self.send, self.call)
        self._backends: dict[Any, Any] = {}
        self._probes: dict[Role, asyncio.Task[Features]] = {}
        self._processes = {}
        self._calls = {}
        for role in settings.functions:
            kind = "number" if role.name == "judge" else "text"
            self._processes[role] = FunctionProcess(str(role.function), kind, settings.function_timeout, columns)
            self._calls[role] = Batcher(partial(self._call_batch, self._processes[role]), role.batch_size)

    @property
    def notes(self) -> dict[str, str]:
        """The features of each model's server, found by this run or an earlier one."""
        features = {role: self._store.reply(_probe_request(role).key) for role in self._settings.roles}
        return {f"{role.name} {role.public_model}": _describe(found) for role, found in features.items() if found}

    async def close(self) -> None:
        """Close connections, threads and processes."""
        for backend in (*self._backends.values(), *self._processes.values()):
            await backend.close()

    async def call(self, role: Role, columns: dict[str, Any]) -> Outcome:
        """Call the function of a role with the columns of one row, in a batch with other rows."""
        outcome: Outcome = await self._calls[role].result(columns)
        return outcome

    async def _call_batch(self, process: FunctionProcess, rows: list[dict[str, Any]]) -> list[Outcome]:
        self._stop_if_unusable()
        return await process.call(rows)

    def _stop_if_unusable(self) -> None:
        if message := self.requester.unusable():
            raise self.limits.give_up(message)

    async def send(self, requests: list[Request]) -> Mapping[str, Any]:
        """Get completions for samples of one prompt, see `requests.Send`."""
        role = requests[0].role
        if self._settings.max_requests == 0:
            raise Dropped("not_answered")
        self._stop_if_unusable()
        if role not in self._probes:
            self._probes[role] = asyncio.create_task(self._probe(role))
        features = await asyncio.shield(self._probes[role])
        bodies = await self._complete(requests, features) if len(requests) > 1 and features.get("n") else {}
        rest = [request for request in requests if request.key not in bodies]
        for more in await gather_all(*(self._complete([request], features) for request in rest)):
            bodies |= more
        return bodies

    async def _complete(self, requests: list[Request], features: Features) -> dict[str, Any]:
        first, role, count = requests[0], requests[0].role, len(requests)
        seed = {} if features.get("seed") is None else {"seed": first.seed}
        body = first.body | seed | ({"n": count} if count > 1 else {})
        try:
            response = await self._post(first, body)
        except RequestFailed as error:
            if role.base_url:  # a model in this process refuses this request alone
                self.limits.failed(f"{role.name} at {role.base_url}: {error.message}")
            if error.code == "insufficient_quota":
                self.limits.give_up(f"{_place(role)}: {error.message}")
            raise Dropped(f"{role.name}_error", error.message) from error
        return {
            request.key: self._keep(request, response | {"choices": [choice]}, counted=request is first)
            for request, choice in zip(requests, choices_of(response), strict=False)
        }

    async def _post(self, request: Request, body: dict[str, Any]) -> Any:
        role, limiter, count = request.role, self._limiters[request.role], body.get("n", 1)
        estimated = tokens_of(body["messages"]) + body.get("max_tokens", 0) * count
        async with self._slots[role.base_url or role]:
            await limiter.wait(estimated)
            reserved, response = await self.limits.begin(request, count), {}
            try:
                response = await self._backend(role).complete(role, body)
            except RequestFailed as error:
                error.message = _redact(error.message, self._secrets)
                raise
            finally:
                usage = usage_of(response)
                self.limits.end(reserved, role.cost(*usage), sum(usage), answered=bool(response))
                limiter.settle(estimated, sum(usage))
        return response

    def _backend(self, role: Role) -> Any:
        key = (role.base_url, role.api_key) if role.base_url else role
        if key not in self._backends:
            from apo_trl.pairs.llm.backends import InProcess, Server  # which import the openai SDK

            if not role.base_url:
                self._say(f"{role.name}: loading {role.public_model} in this process.")
            self._backends[key] = (Server if role.base_url else InProcess)(role, self._settings)
        return self._backends[key]

    def _keep(self, request: Request, response: Any, *, counted: bool = True) -> Any:
        """Store a response without keys; return it. The first of several samples is counted with the usage of all."""
        usage = usage_of(response) if counted else (0, 0)
        text = _redact(json.dumps(response), list(filter(_looks_like_key, self._secrets)))
        self._store.add(
            request.key, text, role=request.role.name, step=request.step, row=request.row, sample=request.sample,
            model=str(request.role.model), requests=int(counted), usage=usage, cost=request.role.cost(*usage),
        )  # fmt: skip
        return json.loads(text)

    async def _probe(self, role: Role) -> Features:
        """Find out once per server, model and set of parameters which features work there, or stop the run."""
        probe = _probe_request(role)
        known: Features | None = self._store.reply(probe.key) if role.base_url else {"seed": True}
        if known:
            return known
        number = itertools.count()
        refusal, status = "", None

        async def post(features: dict[str, int]) -> Any:  # None if the server refuses the parameters
            nonlocal refusal, status
            request = probe._replace(key=f"{probe.key}-{next(number)}", body=probe.body | features)
            for _ in range(3):  # one refused key among many accepted ones may be a fault of the server
                try:
                    return self._keep(request, await self._post(request, request.body))
                except RequestFailed as error:
                    status, refusal = error.status, error.message
                if status in _REFUSED:
                    return None
                if status not in (401, 403):
                    break
            raise self.limits.give_up(f"{_place(role)} cannot be used: {refusal}.{_remedy(role, status)}")

        for sent in ({"n": 2, "seed": 7}, {"seed": 7}, {"n": 2}, {}):
            if (first := await post(sent)) and (second := await post(sent)):
                break
        else:
            raise self.limits.give_up(f"{_place(role)} refuses every request: {refusal}.{_remedy(role, status)}")
        # Without finish reasons the usage shows whether a reply is complete, and that of several replies is one sum.
        several = len(choices_of(first)) == 2 and bool(choices_of(first)[0].get("finish_reason"))
        works = {"n": several, "seed": any(read_reply(first)[::3]) and read_reply(first) == read_reply(second)}
        features: Features = {name: works[name] if name in sent else None for name in works}
        self._keep(probe, features, counted=False)
        self._say(f"{role.name} {role.public_model}: {_describe(features)}.")
        return features


def _redact(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, "[api key]")
    return text


def _looks_like_key(secret: str) -> bool:
    """Return False for words that servers without keys are given, such as EMPTY, which a completion may contain."""
    return secret.startswith("sk-") or len(secret) >= 20 or (len(secret) >= 8 and any(map(str.isdigit, secret)))


def _place(role: Role) -> str:
    return f"{role.name}_base_url: {role.base_url} with {role.name}_model {role.model}"


def _remedy(role: Role, status: int | None) -> str:
    """Return what to do about a status; the message about a server that sent none has a remedy of its own."""
    if status in (401, 403):
        return f" Set {role.name}_api_key_env to the name of a variable with a valid key."
    if status == 404:
        return f" End {role.name}_base_url in /v1, as most servers do, or correct {role.name}_model."
    if status in _REFUSED:
        return f" Correct {role.name}_model; null leaves a parameter out, as in {role.name}_top_p: null."
    return f" Check the server of {role.name}_base_url." if status else ""


def _probe_request(role: Role) -> Request:
    body = {"model": role.model, "messages": _PROBE, **parameters_of(role, role.max_tokens and 32)}
    return Request(reply_key(step="probe", base_url=role.base_url, body=body), role, "probe", "", 0, body, 0)


def _describe(features: Features) -> str:
    verbs = {True: "honours", False: "ignores", None: "refuses"}
    groups = {verb: [name for name in ("n", "seed") if features.get(name) is works] for works, verb in verbs.items()}
    return "; ".join(f"{verb} {', '.join(names)}" for verb, names in groups.items() if names)
