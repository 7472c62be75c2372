"""Start commands and a server in processes of their own, and leave none behind, however this process ends."""

import contextlib
import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from urllib.error import HTTPError

from apo_trl.errors import InputError

__all__ = ["COMMAND", "Server", "run_command"]

COMMAND = (sys.executable, "-m", "apo_trl.cli.main")
_GRACE = 20.0  # seconds in which an ended process may write its last lines


def run_command(arguments: Sequence[str], log: Path, field: str) -> None:
    """Run a command of `apo-trl`, with its output appended to a log file; InputError if it fails."""
    process = _start([*COMMAND, *arguments], log, signal.SIGKILL)
    try:
        status = process.wait()
    finally:
        _end(process)
    if status:
        raise InputError(f"{field}: {_ended(status)}; {_tail(log)} See {log}. Then run the same command again.")


class Server:
    """A server of one model at a time, started by any command line with `{model}` and `{port}`. To be stopped."""

    def __init__(self, command: str, timeout: float, log: Path) -> None:
        self._command, self._timeout, self._log = command, timeout, log
        self._process: subprocess.Popen[bytes] | None = None
        self._serves = self._root = ""

    def url(self, model: str) -> str:
        """Return the URL of a server of a model, started and waited for unless it runs.

        Raises:
            InputError: It cannot be started, ends, or is not ready in time.
        """
        if self._process is not None and self._serves == model and self._process.poll() is None:
            return f"{self._root}/v1"
        self.stop()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = [word.replace("{model}", model).replace("{port}", str(port)) for word in shlex.split(self._command)]
        try:
            self._process = _start(words, self._log, signal.SIGTERM)
        except OSError as error:
            raise InputError(f"policy_serve: '{words[0]}' cannot be started ({error.strerror}). Install it.") from error
        self._serves, self._root = model, f"http://127.0.0.1:{port}"
        self._wait(self._process)
        return f"{self._root}/v1"

    def _wait(self, process: "subprocess.Popen[bytes]") -> None:
        end = time.monotonic() + self._timeout
        while not _is_ready(f"{self._root}/health"):
            if (status := process.poll()) is not None:
                raise InputError(
                    f"policy_serve: {_ended(status)} before it was ready; {_tail(self._log)} See {self._log}."
                )
            if time.monotonic() > end:
                text = f"must be ready within {self._timeout:g} s, no response yet; {_tail(self._log)}"
                raise InputError(f"policy_serve_timeout: {text} Raise it, or see {self._log}.")
            time.sleep(0.2)

    def stop(self) -> None:
        """End the server and the processes that it started."""
        process, self._process = self._process, None
        if process is not None:
            _end(process)


def _start(command: Sequence[str], log: Path, at_our_end: signal.Signals) -> "subprocess.Popen[bytes]":
    def die_with_parent() -> None:
        if sys.platform == "linux":  # SIGKILL of this process lets nothing here run
            ctypes.CDLL(None).prctl(1, at_our_end)  # PR_SET_PDEATHSIG

    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process alone, which ends the group
            preexec_fn=die_with_parent,
        )


def _end(process: "subprocess.Popen[bytes]") -> None:
    try:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except HTTPError as error:  # llama.cpp lists its model while it loads it, with 503 at /health
        return error.code == 404 and url.endswith("/health") and _is_ready(url.replace("/health", "/v1/models"))
    except (OSError, ValueError):
        return False


def _ended(status: int) -> str:
    return f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((f"'{line.strip()[-300:]}'." for line in reversed(lines) if line.strip()), "it printed nothing.")
