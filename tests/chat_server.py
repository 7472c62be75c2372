"""A scripted OpenAI-compatible chat server that goes wrong on purpose: what the tests and benchmarks of pairs talk to.

    with ChatServer(echo, faults=["429", "drop"], fault_share=0.1, latency=0.02) as server:
        client = openai.AsyncOpenAI(base_url=server.url, api_key="any")

Hand-written HTTP/1.1 with keep-alive, so that the server is not what a benchmark measures. Left out on purpose:
streaming, tools, chunked requests, TLS. As a process of its own: `python tests/chat_server.py --latency 0.05`.
"""

import argparse
import asyncio
import hashlib
import json
import random
import signal
import socket
import threading
from collections import Counter
from http import HTTPStatus


def error(kind: str, message: str, code: str | None = None, param: str | None = None) -> dict:
    """The body of an error, in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


OPTIONAL = ("n", "seed")
REPLIES = {  # faults that are a reply of their own
    "400": (400, error("invalid_request_error", "The request is not valid.", "invalid_value")),
    "401": (401, None),  # as for a wrong key
    "429": (429, error("requests", "Rate limit reached.", "rate_limit_exceeded")),
    "429_retry_after": (429, error("requests", "Rate limit reached.", "rate_limit_exceeded")),
    "429_quota": (429, error("insufficient_quota", "You exceeded your current quota.", "insufficient_quota")),
    "500": (500, error("server_error", "The server had an error.")),
    "503": (503, error("server_error", "The engine is overloaded.")),
    "not_chat": (200, {"status": "ok"}),
    "pending": (202, {"status": "pending"}),
    "html": (200, b"<html><body><h1>Bad gateway</h1></body></html>"),
}
FAULTS = (*REPLIES, "drop", "cut", "bad_json", "empty_choices", "slow")  # those here spoil an answer or its delivery


def check(names, known):
    for name in names:
        if name not in known:
            raise ValueError(f"{name!r} is none of {', '.join(map(str, known))}")


def words(message: dict) -> int:
    content = message.get("content") or ""
    return len((content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)).split())


def echo(body: dict) -> str:
    """An answer that only depends on what was asked; a revision in CLAIR's tags where a message asks for one.

    The digest covers the messages, the seed (where the server honours it) and the index among n answers.
    """
    asked = json.dumps([body["messages"], body.get("seed"), body.get("_index", 0)], sort_keys=True)
    digest = hashlib.sha256(asked.encode()).hexdigest()[:12]
    if "<revision>" in asked:
        return f"<reasoning>\nclearer\n</reasoning>\n<revision>\nRevised: {digest}\n</revision>"
    return f"Answer: {digest}"


class Connection(asyncio.Protocol):
    """One client's connection: a request at a time, the next when that one is answered."""

    def __init__(self, server: "ChatServer"):
        self.server, self.buffer, self.waiting = server, b"", None

    def connection_made(self, transport):
        self.transport = transport
        self.server.connections.add(self)

    def connection_lost(self, _error):
        self.server.connections.discard(self)
        if self.waiting is not None:
            self.waiting.cancel()
            self.server.in_flight -= 1
            self.server.abandoned += not self.server.stopping.is_set()

    def data_received(self, data):
        self.buffer += data
        self.read()

    def read(self):
        end = self.buffer.find(b"\r\n\r\n")
        if self.waiting is not None or end < 0:
            return
        start, *lines = self.buffer[:end].decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        stop = end + 4 + int(headers.get("content-length", 0))
        if len(self.buffer) >= stop:
            raw, self.buffer = self.buffer[end + 4 : stop], self.buffer[stop:]
            self.run(self.server.receive, start.rpartition(" ")[0], headers, raw)

    def run(self, function, *arguments):
        """Call a step of the server; what it raises is the test's error, which `stop()` shows."""
        self.waiting = None
        try:
            function(self, *arguments)
        except BaseException as raised:
            self.server.errors.append(raised)
            self.send(400, error("test_error", f"the test's own function raised {raised!r}"))

    def send(self, status, body, *, missing=0, headers=""):
        """Write a reply and announce `missing` bytes too many, which closes the connection before its time."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = "text/html" if data.startswith(b"<") else "application/json"
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: {kind}\r\n{headers}"
        self.transport.write(f"{head}Content-Length: {len(data) + missing}\r\n\r\n".encode() + data)
        if missing:
            self.transport.close()
        elif self.buffer:
            self.server.loop.call_soon(self.read)


class ChatServer:
    """Serve `answer` at `url`, from a thread, as a context manager. What is counted can be read at any time.

    Args:
        answer: takes the body of a request, less what the server ignores, with `_index` from 0 to n - 1. It returns
            the text or a dict: `finish_reason` goes to the choice, `usage` and `model` to the completion, the rest
            (`content`, `refusal`) to the message. What it raises is a 400, and is raised again by `stop()`.
        latency: seconds before every reply but refusals; or a function of the body.
        faults: names from FAULTS, one of which is drawn for a share of `fault_share` of the requests (the same seed
            gives the nth to arrive the same one); or a function of a request's number, from 1, and body to a name.
        key: where it is set, another one is refused by a 401 that repeats what was sent.
        honours: those of OPTIONAL that have an effect; the others are ignored in silence.
        refuses: parameters that are refused by a 400 that names them.

    Attributes:
        count: chat requests received, whose `bodies` are in the order of arrival. Of these `served` were answered
            well (`slow` ones too), and `abandoned` were given up by the client while they waited.
        drawn: a fault or None for each request that was not refused; `faulted` counts them by name.
        refused: counts by reason: "key" or the name of a parameter.
        most_at_once: the highest number of requests that waited for a reply; without latency it is 1.
        headers: of the last request, names in lower case.
    """

    def __init__(
        self, answer=echo, *, latency=0.0, faults=None, fault_share=0.0, seed=0, slow_seconds=1.0, retry_after=0.05,
        key=None, keep_bodies=True, honours=(), refuses=(), model="scripted", port=0,
    ):  # fmt: skip
        check(() if callable(faults) else faults or (), FAULTS)
        check(honours, OPTIONAL)
        self.answer, self.latency, self.faults, self.fault_share = answer, latency, faults, fault_share
        self.random, self.slow_seconds, self.retry_after = random.Random(seed), slow_seconds, retry_after
        self.key, self.keep_bodies, self.refuses, self.model, self.port = key, keep_bodies, refuses, model, port
        self.ignored = set(OPTIONAL) - set(honours)
        self.bodies, self.headers, self.drawn, self.errors = [], {}, [], []
        self.count = self.served = self.abandoned = self.in_flight = self.most_at_once = 0
        self.faulted, self.refused, self.connections, self.thread = Counter(), Counter(), set(), None

    def __enter__(self) -> "ChatServer":
        # The socket listens from here on: a busy port is the caller's error, and nobody has to wait for the thread.
        listener = socket.create_server(("127.0.0.1", self.port), backlog=1024)
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.loop, self.stopping = asyncio.new_event_loop(), asyncio.Event()
        self.thread = threading.Thread(target=self._run, args=(listener,), name="chat-server", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def _run(self, listener):
        async def serve():
            server = await self.loop.create_server(lambda: Connection(self), sock=listener, backlog=1024)
            await self.stopping.wait()
            self.loop.remove_reader(listener)
            await asyncio.sleep(0.01)  # a client being accepted while the server closes would never be closed
            server.close()
            while self.connections:
                for connection in list(self.connections):
                    connection.transport.abort()
                await asyncio.sleep(0)
            await server.wait_closed()

        self.loop.run_until_complete(serve())
        self.loop.close()

    def stop(self):
        """Close all connections and end the thread; raise what `answer`, `latency` or `faults` raised first."""
        thread, self.thread = self.thread, None
        if thread is not None:
            self.loop.call_soon_threadsafe(self.stopping.set)
            thread.join()
            if self.errors:
                raise self.errors[0]

    def receive(self, connection, target, headers, raw):
        """Refuse a request at once, or draw its fault and reply when its time has come."""
        self.headers = headers
        chat = target == "POST /v1/chat/completions"
        if chat:
            body = json.loads(raw)
            self.count += 1
            if self.keep_bodies:
                self.bodies.append(body)
        if self.key is not None and headers.get("authorization") != f"Bearer {self.key}":
            self.refused["key"] += 1
            return connection.send(401, wrong_key(headers))
        if target == "GET /v1/models":
            listed = {"id": self.model, "object": "model", "created": 0, "owned_by": "tests"}
            return connection.send(200, {"object": "list", "data": [listed]})
        if not chat:
            return connection.send(404, error("invalid_request_error", f"Unknown URL: {target}"))
        for name in (name for name in self.refuses if name in body):
            self.refused[name] += 1
            message = f"Unsupported parameter: '{name}' is not supported with this model."
            return connection.send(400, error("invalid_request_error", message, "unsupported_parameter", name))

        wait = self.latency(body) if callable(self.latency) else self.latency
        if fault := self.draw(body):
            self.faulted[fault] += 1
            wait += self.slow_seconds if fault == "slow" else 0
        self.drawn.append(fault)
        self.in_flight += 1
        self.most_at_once = max(self.most_at_once, self.in_flight)
        rest = (body, fault, headers, self.count)
        if not wait:
            return self.reply(connection, *rest)
        connection.waiting = self.loop.call_later(wait, connection.run, self.reply, *rest)
        return None

    def draw(self, body):
        if callable(self.faults):
            fault = self.faults(self.count, body)
            check([fault], (None, *FAULTS))
            return fault
        return self.random.choice(self.faults) if self.faults and self.random.random() < self.fault_share else None

    def reply(self, connection, body, fault, headers, number):
        self.in_flight -= 1
        if fault == "drop":
            return connection.transport.close()
        if fault in REPLIES:
            status, content = REPLIES[fault]
            later = f"Retry-After: {self.retry_after}\r\n" if fault == "429_retry_after" else ""
            return connection.send(status, content or wrong_key(headers), headers=later)
        data = json.dumps(self.completion(body, number, empty=fault == "empty_choices")).encode()
        self.served += fault in (None, "slow")
        sent = data[: len(data) // 2] if fault in ("cut", "bad_json") else data
        return connection.send(200, sent, missing=len(data) - len(sent) if fault == "cut" else 0)

    def completion(self, body, number, empty):
        seen = {name: value for name, value in body.items() if name not in self.ignored}
        top, choices = {}, []
        for index in range(0 if empty else seen.get("n") or 1):
            given = self.answer(seen | {"_index": index})
            given = {"content": given} if isinstance(given, str) else dict(given)
            top |= {name: given.pop(name) for name in ("usage", "model") if name in given}
            choice = {"index": index, "finish_reason": given.pop("finish_reason", "stop")}
            choices.append(choice | {"message": {"role": "assistant", "content": None, "refusal": None} | given})
        asked, written = sum(map(words, body["messages"])), sum(words(choice["message"]) for choice in choices)
        usage = {"prompt_tokens": asked, "completion_tokens": written, "total_tokens": asked + written}
        first = {"id": f"chatcmpl-{number}", "object": "chat.completion", "created": 0, "model": body["model"]}
        return first | {"choices": choices, "usage": usage} | top


def wrong_key(headers):
    sent = headers.get("authorization", "").removeprefix("Bearer ")
    return error("invalid_request_error", f"Incorrect API key provided: {sent}.", "invalid_api_key")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each reply")
    parser.add_argument("--faults", nargs="*", choices=FAULTS)
    parser.add_argument("--fault-share", type=float, default=0.0)
    ends = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # in the thread too: they are for sigwait
    with ChatServer(echo, keep_bodies=False, **vars(parser.parse_args())) as server:
        print(server.url, flush=True)
        signal.sigwait(ends)
    print(json.dumps({"count": server.count, "served": server.served, "most_at_once": server.most_at_once}))


if __name__ == "__main__":
    main()
