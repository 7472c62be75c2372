"""What goes over the wire: clients of the `openai` SDK, bodies that are whole, errors in words, tokens counted."""

import json
from typing import Any

from apo_trl.errors import InputError
from apo_trl.pairs.config.settings import Role

__all__ = ["client_of", "usage_of", "words"]


def client_of(role: Role, connections: int) -> Any:
    """Make the SDK's client for a role, with so many connections at most.

    Over aiohttp, which costs a third less of a processor for each request than the SDK's default.
    """
    try:
        import aiohttp  # noqa: F401  (the SDK's own message for its absence names another extra)
        import httpx2
        import openai
    except ImportError:
        raise InputError(f"{role.name}_base_url needs the openai SDK: run `pip install 'apo-trl[pairs]'`.") from None

    return openai.AsyncOpenAI(
        base_url=role.base_url,
        api_key=role.api_key,
        max_retries=role.max_retries,
        timeout=role.timeout,
        http_client=openai.DefaultAioHttpClient(
            event_hooks={"response": [_whole]},
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
        ),
    )


async def _whole(response: Any) -> None:
    """Read a response to its end; one that says 200 and holds no answer is as good as a broken connection.

    Raised here, it is tried again by the SDK, which tries such a connection again and a 200 never.
    """
    import httpx2

    if response.status_code != 200:
        return
    await response.aread()
    try:
        body = json.loads(response.content)
    except ValueError:
        raise httpx2.RemoteProtocolError("the response is no JSON", request=response.request) from None
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list) or not choices or not all(map(_is_answer, choices)):
        raise httpx2.RemoteProtocolError("the response holds no answer", request=response.request)
    response.extensions["json"] = body


def _is_answer(choice: Any) -> bool:
    return isinstance(choice, dict) and isinstance(choice.get("message") or {}, dict)


def usage_of(body: Any) -> tuple[int, int]:
    """Give the tokens of prompt and answer that a response counts, 0 where it counts none."""
    usage = body.get("usage")
    counts = [usage.get(f"{part}_tokens") if isinstance(usage, dict) else 0 for part in ("prompt", "completion")]
    prompt, completion = (count if isinstance(count, int) and count > 0 else 0 for count in counts)
    return prompt, completion


def words(error: Exception) -> str:
    """Say in one line what went wrong with a request."""
    status = getattr(error, "status_code", None)
    if status is not None:
        body = getattr(error, "body", None)
        message = body.get("message") if isinstance(body, dict) else None
        return f"status {status}: {_line(message or error)}"
    cause = error.__cause__ or error
    if "Timeout" in type(cause).__name__:
        return "no answer in time"
    return f"no connection: {_line(cause) or type(cause).__name__}"


def _line(text: object) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= 300 else line[:300] + " ..."
