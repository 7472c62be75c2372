"""Where requests go: to an OpenAI-compatible server, or to a model in this process."""

import asyncio
import json
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import openai

from apo_trl.io.error_text import one_line
from apo_trl.pairs.config.settings import Role, Settings
from apo_trl.pairs.llm.batcher import Batcher
from apo_trl.pairs.llm.reply import failure_of
from apo_trl.pairs.llm.requests import RequestFailed
from apo_trl.training.console import quiet_libraries
from apo_trl.training.threads import choose_threads

__all__ = ["InProcess", "Server"]


class Server:
    """A client of the openai SDK, which retries 408, 409, 429, 5xx and broken connections, honouring Retry-After."""

    def __init__(self, role: Role, settings: Settings) -> None:
        count = settings.concurrency
        limits = httpx2.Limits(max_connections=count, max_keepalive_connections=count)
        # A third less CPU time per request than the SDK's default client.
        http = openai.DefaultAioHttpClient(event_hooks={"response": [_require_completion]}, limits=limits)
        self._client = openai.AsyncOpenAI(base_url=role.base_url, api_key=role.api_key, http_client=http)
        self.close = self._client.close

    async def complete(self, role: Role, body: dict[str, Any]) -> Any:
        """Return the body of the response to a request. Raises RequestFailed."""
        options: Any = {"max_retries": role.max_retries, "timeout": role.timeout}
        try:
            response = await self._client.post("/chat/completions", cast_to=httpx2.Response, body=body, options=options)
        except openai.APIStatusError as error:
            message = error.body.get("message") if isinstance(error.body, dict) else None
            text = f"status {error.status_code}: {one_line(message or error)}"
            raise RequestFailed(text, error.status_code, error.code) from error
        except openai.OpenAIError as error:  # no connection, no response in time
            raise RequestFailed(_unreachable(error).format(role=role.name, timeout=role.timeout)) from error
        return response.extensions["json"]


_UNREACHABLE: tuple[tuple[type[BaseException], str], ...] = (
    (ConnectionRefusedError, "connection refused. Start the server, or correct {role}_base_url"),
    (socket.gaierror, "unknown host name. Correct {role}_base_url"),
    (ssl.SSLError, "TLS failed. Write http:// in {role}_base_url, or correct the server's certificate"),
    (ConnectionAbortedError, "TLS failed. Write http:// in {role}_base_url, or correct the server's certificate"),
    (TimeoutError, "no response within {timeout:g} s. Raise {role}_timeout, or lower concurrency"),
)


def _unreachable(error: BaseException) -> str:
    """Return why no response came: the SDK's error is a timeout for nearly all, so its causes are searched."""
    inner = error
    while cause := inner.__cause__ or inner.__context__:
        inner = cause
        for kind, text in _UNREACHABLE:
            if isinstance(inner, kind):
                return text
    return one_line(error.__cause__ or error).replace("{", "{{").replace("}", "}}")


async def _require_completion(response: Any) -> None:
    """Raise for a 2xx without a completion, or with an error, what the SDK retries: that the connection broke."""
    if not response.is_success:
        return
    try:
        body = json.loads(await response.aread())
    except (ValueError, RecursionError):  # not JSON, or too deep
        body = None
    if failure := failure_of(body):
        raise httpx2.RemoteProtocolError(failure, request=response.request)
    response.extensions["json"] = body


class InProcess:
    """A model in this process, loaded at its first request, in a thread of its own.

    Requests that wait together make one batch. A reward model answers with its score as a judge writes one.
    """

    def __init__(self, role: Role, settings: Settings) -> None:
        self._role, self._scores = role, settings.scores(role)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=role.name)
        self._batches = Batcher(self._run, role.batch_size)
        self._model: Any = None

    async def complete(self, role: Role, body: dict[str, Any]) -> Any:
        """Return the response of the model. Raises RequestFailed."""
        answer = await self._batches.result(body)
        if "error" in answer:
            raise RequestFailed(answer["error"]["message"])
        return answer

    async def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self, batch: list[dict[str, Any]]) -> list[Any]:
        results: list[Any] = await asyncio.get_running_loop().run_in_executor(self._thread, self._answer, batch)
        return results

    def _answer(self, bodies: list[dict[str, Any]]) -> Any:
        if self._model is None:
            choose_threads()
            quiet_libraries()
            from apo_trl.models.packaged import resolve_model
            from apo_trl.pairs.llm.in_process import Generator, RewardModel

            role, kind = self._role, RewardModel if self._scores else Generator
            name = resolve_model(str(role.model))
            self._model = kind(name, dtype=role.dtype, device=role.device, batch_size=role.batch_size)
        return self._model.answer(bodies)
