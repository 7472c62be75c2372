"""The server that the tests of pairs rely on: each fault does to the SDK what it is there for."""

import asyncio
import json
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from chat_server import FAULTS, ChatServer, echo

openai = pytest.importorskip("openai")


def ask(server, *texts, retries=0, at_once=1000, api_key="sk-right", timeout=20.0, **parameters):
    """The replies to the texts, in their order; an exception stands for itself."""

    async def main():
        gate = asyncio.Semaphore(at_once)
        async with openai.AsyncOpenAI(
            base_url=server.url, api_key=api_key, max_retries=retries, timeout=timeout
        ) as client:

            async def one(text):
                async with gate:
                    return await client.chat.completions.create(
                        model="m", messages=[{"role": "user", "content": text}], **parameters
                    )

            return await asyncio.gather(*map(one, texts), return_exceptions=True)

    return asyncio.run(main())


def contents(replies):
    return [reply.choices[0].message.content for reply in replies]


def last_word(body):
    return body["messages"][-1]["content"].split()[-1]


def first_only(fault):
    return lambda number, body: fault if number == 1 else None


def test_answers_reach_those_who_asked_in_whatever_order_they_come():
    texts = [f"say {number}" for number in range(20)]
    with ChatServer(last_word, latency=lambda body: 0.2 - int(last_word(body)) / 100) as server:
        replies = ask(server, *texts)
    assert contents(replies) == [str(number) for number in range(20)]
    assert server.count == server.served == len(server.bodies) == 20
    assert {body["messages"][0]["content"] for body in server.bodies} == set(texts)
    assert server.headers["authorization"] == "Bearer sk-right"
    assert server.drawn == [None] * 20


def test_a_dict_sets_the_choice_the_message_and_the_completion():
    given = {"content": "Once upon", "finish_reason": "length"}
    with ChatServer(lambda body: given) as server:
        [reply] = ask(server, "tell me a story")
    assert reply.choices[0].finish_reason == "length"
    assert reply.choices[0].message.content == "Once upon"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (4, 2, 6)
    with ChatServer(lambda body: {"refusal": "No.", "usage": None, "model": "m-2026"}) as server:
        [reply] = ask(server, "x")
    message = reply.choices[0].message
    assert (message.content, message.refusal, reply.usage, reply.model) == (None, "No.", None, "m-2026")
    assert reply.choices[0].finish_reason == "stop"


def test_echo_depends_on_what_was_asked_only():
    with ChatServer(echo) as server:
        first, again, other, revision = contents(ask(server, "a", "a", "b", "put it in <revision> tags"))
    assert first == again != other
    assert revision.startswith("<reasoning>\n")
    assert revision.endswith("\n</revision>")


def test_what_is_not_honoured_is_ignored_in_silence():
    seen = []

    def answer(body):
        seen.append(body)
        return f"{body.get('seed')} {body['_index']}"

    asked = dict(n=3, seed=7)
    with ChatServer(answer) as server:
        [reply] = ask(server, "x", **asked)
    assert len(reply.choices) == 1
    assert reply.choices[0].message.content == "None 0"
    assert not set(asked) & set(seen[0])
    assert set(asked) <= set(server.bodies[0])

    with ChatServer(answer, honours=("n", "seed")) as server:
        [reply] = ask(server, "x", **asked)
    assert [choice.message.content for choice in reply.choices] == ["7 0", "7 1", "7 2"]
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert reply.usage.completion_tokens == 6


def test_a_refused_parameter_is_named():
    with ChatServer(echo, refuses=("seed",)) as server:
        [refusal] = ask(server, "x", seed=1)
        [reply] = ask(server, "x")
    assert isinstance(refusal, openai.BadRequestError)
    assert (refusal.param, refusal.code) == ("seed", "unsupported_parameter")
    assert "'seed'" in str(refusal)
    assert reply.choices
    assert (server.count, server.served, server.refused) == (2, 1, {"seed": 1})


def test_a_wrong_key_is_repeated_in_the_error():
    with ChatServer(echo, key="sk-right") as server:
        [wrong] = ask(server, "x", api_key="sk-wrong-123", retries=2)
        [reply] = ask(server, "x")
    assert isinstance(wrong, openai.AuthenticationError)
    assert "sk-wrong-123" in str(wrong)
    assert reply.choices
    assert (server.count, server.served, server.refused) == (2, 1, {"key": 1})


def test_models_are_listed_and_other_addresses_are_not_found():
    with ChatServer(echo, model="tiny") as server:
        with openai.OpenAI(base_url=server.url, api_key="k", max_retries=0) as client:
            assert [model.id for model in client.models.list()] == ["tiny"]
            with pytest.raises(openai.NotFoundError, match="POST /v1/embeddings"):
                client.embeddings.create(model="m", input="x")
    assert server.count == 0


# The exception without retries (or a type that is returned), and whether the SDK asks again by itself.
EFFECTS = {
    "400": (openai.BadRequestError, False),
    "401": (openai.AuthenticationError, False),
    "429": (openai.RateLimitError, True),
    "429_retry_after": (openai.RateLimitError, True),
    "429_quota": (openai.RateLimitError, True),
    "500": (openai.InternalServerError, True),
    "503": (openai.InternalServerError, True),
    "drop": (openai.APIConnectionError, True),
    "cut": (openai.APIConnectionError, True),
    "bad_json": (json.JSONDecodeError, False),
    "not_chat": (openai.types.chat.ChatCompletion, False),
    "pending": (openai.types.chat.ChatCompletion, False),
    "empty_choices": (openai.types.chat.ChatCompletion, False),
    "html": (str, False),
    "slow": (openai.APITimeoutError, True),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_has_its_effect_on_the_sdk(fault):
    expected, retried = EFFECTS[fault]
    with ChatServer(echo, faults=first_only(fault), slow_seconds=60) as server:
        timeout = 1.0 if fault == "slow" else 20.0
        [spoiled] = ask(server, "x", timeout=timeout)
        [fine] = ask(server, "x")
        assert type(spoiled) is expected
        assert contents([fine]) == [echo({"messages": [{"role": "user", "content": "x"}]})]
        assert (server.count, server.served, dict(server.faulted)) == (2, 1, {fault: 1})
        assert server.drawn == [fault, None]
    with ChatServer(echo, faults=first_only(fault), slow_seconds=60) as server:
        [reply] = ask(server, "x", retries=1, timeout=timeout)
    assert server.count == (2 if retried else 1)
    assert type(reply) is (type(fine) if retried else expected)
    assert server.served == retried


def test_faults_say_what_they_are():
    with ChatServer(echo, faults=["429_quota"], fault_share=1) as server:
        [quota] = ask(server, "x")
    with ChatServer(echo, faults=["429_retry_after"], fault_share=1, retry_after=0.25) as server:
        [later] = ask(server, "x")
    with ChatServer(echo, faults=["not_chat", "empty_choices"], fault_share=1) as server:
        assert not any(reply.choices for reply in ask(server, *"abcdefgh"))
    assert quota.code == "insufficient_quota"
    assert "retry-after" not in quota.response.headers
    assert later.response.headers["retry-after"] == "0.25"
    assert server.served == 0


def test_a_slow_answer_is_an_answer_and_a_client_that_leaves_is_counted():
    with ChatServer(echo, faults=["slow"], fault_share=1, slow_seconds=0.3) as server:
        began = time.perf_counter()
        [reply] = ask(server, "x")
        assert time.perf_counter() - began >= 0.3
        assert reply.choices
        assert (server.served, server.abandoned) == (1, 0)
    with ChatServer(echo, latency=60) as server:
        [late] = ask(server, "x", timeout=0.5)
        assert isinstance(late, openai.APITimeoutError)
        ends = time.monotonic() + 20
        while not server.abandoned and time.monotonic() < ends:
            time.sleep(0.01)
        assert (server.count, server.served, server.abandoned, server.in_flight) == (1, 0, 1, 0)


def test_the_same_seed_spoils_the_same_requests():
    def drawn(seed):
        options = dict(faults=["429", "500", "drop", "empty_choices"], fault_share=0.3)
        with ChatServer(echo, seed=seed, **options) as server:
            ask(server, *map(str, range(200)), at_once=16)
        assert server.served == 200 - server.faulted.total() == server.drawn.count(None)
        return server.drawn

    first = drawn(1)
    assert first == drawn(1)
    assert first != drawn(2)
    assert set(first) == {None, "429", "500", "drop", "empty_choices"}
    assert 30 <= 200 - first.count(None) <= 90  # 60 expected, standard deviation 6.5


def test_most_at_once_counts_those_that_wait():
    texts = [str(number) for number in range(64)]
    with ChatServer(echo, latency=2.0) as server:
        ask(server, *texts)
    assert (server.most_at_once, server.served) == (64, 64)
    with ChatServer(echo, latency=0.05) as server:
        ask(server, *texts, at_once=8)
        ask(server, "one more, alone")
    assert (server.most_at_once, server.served) == (8, 65)


def test_an_error_of_the_test_is_not_taken_for_a_fault_of_the_server():
    def broken(body):
        raise KeyError("my own")

    for wrong, expected, match in (
        (dict(answer=broken), KeyError, "my own"),
        (dict(faults=lambda number, body: "418"), ValueError, "'418' is none of None, 400, 401"),
        (dict(latency=broken), KeyError, "my own"),
    ):
        server = ChatServer(**wrong).__enter__()
        [reply] = ask(server, "x", retries=2)
        assert isinstance(reply, openai.BadRequestError)
        assert server.count == 1
        with pytest.raises(expected, match=match):
            server.stop()
    with pytest.raises(ValueError, match="'418' is none of 400, 401"):
        ChatServer(faults=["429", "418"])
    with pytest.raises(ValueError, match="'tools' is none of n, seed"):
        ChatServer(honours=("tools",))


def test_requests_in_pieces_and_in_a_row_on_one_connection():
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "a b"}]}]})
    request = f"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()
    for latency in (0, 0.02):
        with ChatServer(lambda body: "END", latency=latency) as server:
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                sent = request * 3
                for piece in (sent[:20], sent[20:150], sent[150 : len(request) + 40], sent[len(request) + 40 :]):
                    client.sendall(piece)
                    time.sleep(0.02)
                received = b""
                while received.count(b'"total_tokens": 3') < 3 and (data := client.recv(65536)):
                    received += data
        assert received.count(b"HTTP/1.1 200 OK") == 3
        assert (server.served, server.most_at_once) == (3, 1)


def test_a_stopped_server_leaves_its_port_to_the_next():
    with ChatServer(echo) as server:
        ask(server, "x")
        with pytest.raises(OSError, match="in use"), ChatServer(echo, port=server.port):
            pass
    server.stop()  # a second time does nothing
    [gone] = ask(server, "x")
    assert isinstance(gone, openai.APIConnectionError)
    with ChatServer(echo, port=server.port) as second:
        assert second.url == server.url
        assert contents(ask(second, "x"))


@contextmanager
def process(*arguments):
    command = [sys.executable, str(Path(__file__).with_name("chat_server.py")), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            yield child, child.stdout.readline().strip()
        finally:
            child.terminate()


def load(url, connections, each):
    """Seconds that it takes to ask `each` questions on each of so many connections, by a client that does no more."""
    port = int(url.split(":")[2].split("/")[0])
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "word " * 200}]})
    request = f"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()

    async def one():
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(each):
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            assert b"Answer: " in await reader.readexactly(int(head.rpartition(b": ")[2]))
        writer.close()
        await writer.wait_closed()

    async def main():
        began = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(connections)))
        return time.perf_counter() - began

    return asyncio.run(main())


def test_as_a_process_it_is_fast_and_ends_when_it_is_told_to():
    with process("--latency", "0") as (child, url):
        seconds = load(url, connections=64, each=30)
        child.terminate()
        output, errors = child.communicate(timeout=60)
    assert child.returncode == 0
    assert errors == ""
    assert json.loads(output) == {"count": 1920, "served": 1920, "most_at_once": 1}
    assert 1920 / seconds > 300  # tens of thousands on an idle core: a floor for the busiest machine
