"""Call a function of the user in a process of its own, with a time limit, whatever the function does."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

from apo_trl.errors import InputError

__all__ = ["FunctionProcess", "Outcome", "load_function", "source_of"]

_COMMAND = (sys.executable, "-P", "-m", "apo_trl.pairs.functions.worker")
_LOADING = 120.0  # seconds for the imports of the function's module


class Outcome(NamedTuple):
    """The result of a function for one row, or the problem in its place."""

    value: Any
    problem: str = ""


class FunctionProcess:
    """A function `module:function` or `file.py:function` with the signature of TRL's `reward_funcs`. To be closed.

    Args:
        function: Its name. Modules and files are found from the current folder.
        kind: "text" or "number", what it returns for a row beside None.
        timeout: Seconds for one call.
        columns: The columns of all rows. A row that lacks one has None there, as in a dataset.
    """

    def __init__(self, function: str, kind: str, timeout: float, columns: Iterable[str] = ()) -> None:
        self._function, self._timeout, self._columns = function, timeout, tuple(columns)
        self._arguments = (function, kind, str(int(timeout) + 10))
        self._process: asyncio.subprocess.Process | None = None

    async def call(self, rows: list[dict[str, Any]]) -> list[Outcome]:
        """Return the outcome for each row. A failed call is repeated row by row, to find the row.

        Raises:
            InputError: The function cannot be loaded, or its file has changed.
        """
        reply = await self._call(rows)
        if "results" in reply:
            return [Outcome(*result) for result in reply["results"]]
        if len(rows) == 1:
            return [Outcome(None, reply["error"])]
        return [(await self.call([row]))[0] for row in rows]

    async def _call(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        if self._process is None:
            await self._start()
        names = dict.fromkeys(chain(*rows, self._columns))
        columns = {name: [row.get(name) for row in rows] for name in names}
        try:
            async with asyncio.timeout(self._timeout):
                return await self._exchange(json.dumps(columns, default=str).encode())
        except TimeoutError:
            problem = f"it returned nothing within {self._timeout:g} seconds (function_timeout)"
        except (OSError, EOFError, ValueError):  # the last: it wrote to a file of the worker
            problem = "it ended its process"
        if (code := await self.close()) not in (0, -signal.SIGKILL):
            problem += f" ({signal.Signals(-code).name})" if code < 0 else f" (exit status {code})"
        return {"error": problem}

    async def _start(self) -> None:
        pipe, null = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
        self._process = await asyncio.create_subprocess_exec(
            *_COMMAND, *self._arguments, stdin=pipe, stdout=pipe, stderr=null, start_new_session=True
        )
        reply: dict[str, Any] = {}
        with contextlib.suppress(TimeoutError, EOFError):
            async with asyncio.timeout(_LOADING):
                reply = await self._exchange()
        if reply.get("source") != source_of(self._function):
            await self.close()
            problem = "has changed during the run" if "source" in reply else "cannot be loaded again"
            raise InputError(f"function: the file of '{self._function}' {problem}. Run again.")

    async def close(self) -> int:
        """Kill the process and those it has started; return its exit status."""
        if (process := self._process) is None:
            return 0
        self._process = None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        return await process.wait()

    async def _exchange(self, data: bytes = b"") -> dict[str, Any]:
        process: Any = self._process
        if data:
            process.stdin.write(len(data).to_bytes(8) + data)
            await process.stdin.drain()
        size = int.from_bytes(await process.stdout.readexactly(8))
        reply: dict[str, Any] = json.loads(await process.stdout.readexactly(size))
        return reply


def source_of(function: str) -> str:
    """Return the SHA-256 of a function, as `worker.load` computes it. Raises InputError, as `load_function`."""
    return str(load_function(function)["source"])


@lru_cache
def load_function(function: str) -> dict[str, Any]:
    """Load a function in a process; return its `source`, a SHA-256, and the columns that it `needs`.

    Raises:
        InputError: It cannot be loaded.
    """
    null = subprocess.DEVNULL
    try:
        done = subprocess.run(
            [*_COMMAND, function, "text", "0"], stdin=null, stdout=subprocess.PIPE, stderr=null, timeout=_LOADING
        )
        reply: dict[str, Any] = json.loads(done.stdout[8:] or '{"error": "its module ends the process"}')
    except subprocess.TimeoutExpired:
        reply = {"error": f"its module takes more than {_LOADING:g} seconds"}
    if "error" in reply:
        remedy = "Set module:function or file.py:function, and correct what fails."
        raise InputError(f"function: '{function}' cannot be loaded: {reply['error']}. {remedy}")
    return reply
