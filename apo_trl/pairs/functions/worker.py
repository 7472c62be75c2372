"""The process of a function: it reads calls from standard input, and writes their results to standard output.

What the function prints is discarded, and so is what it reads.
"""

import asyncio
import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any, BinaryIO

from apo_trl.io.error_text import one_line
from apo_trl.io.messages import replace_surrogates

__all__ = ["load", "main", "results_of"]

_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def main(name: str, kind: str, alarm: int) -> None:
    """Load a function, write its hash and its columns, then the results of each call, as a length and JSON.

    Args:
        name: As `load` takes it.
        kind: "text" or "number", what the function returns for a row beside None.
        alarm: Seconds after which the system ends this process during a call, if the run itself cannot.
    """
    calls, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    for file in (calls, replies):  # or the run waits for the end of a child that has them
        os.register_at_fork(after_in_child=file.close)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    sys.path.insert(0, os.getcwd())
    try:
        function, source = load(name)
        needs = _needed_columns(function)
    except BaseException as error:  # importing the user's module may raise anything, or exit
        return _write(replies, {"error": _describe(error)})
    _write(replies, {"source": source, "needs": needs})
    while size := int.from_bytes(calls.read(8)):
        columns = json.loads(calls.read(size))
        signal.alarm(alarm)
        _write(replies, results_of(function, columns, kind))
        signal.alarm(0)
    return None


def load(name: str) -> tuple[Callable[..., Any], str]:
    """Load `module:function` or `file.py:function`; return it, and the SHA-256 of its file and package's version."""
    place, _, attribute = name.rpartition(":")
    if place.endswith(".py"):
        sys.path.insert(0, str(Path(place).parent.resolve()))
        spec: Any = importlib.util.spec_from_file_location("_function", place)
        module = sys.modules["_function"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    function = getattr(module, attribute)
    if not callable(function):
        raise TypeError(f"{attribute} is not a function")
    defined = inspect.unwrap(function) if inspect.isroutine(function) else type(function)
    content = Path(str(inspect.getsourcefile(defined))).read_bytes()
    if (package := defined.__module__.partition(".")[0]) != "_function":
        with contextlib.suppress(PackageNotFoundError):  # editable installs list no packages
            content += version(packages_distributions().get(package, [package])[0]).encode()
    return function, hashlib.sha256(content).hexdigest()


def _needed_columns(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    named = [each.name for each in parameters if each.default is each.empty and each.kind not in _VARIABLE]
    return [name for name in named if name not in ("prompts", "completions")]


def results_of(function: Callable[..., Any], columns: dict[str, list[Any]], kind: str) -> dict[str, Any]:
    """Call a function with the columns that it takes; return its `results`, each with a problem, or an `error`."""
    rows = len(next(iter(columns.values())))
    try:
        parameters = inspect.signature(function).parameters
        if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters.values()):
            columns = {name: values for name, values in columns.items() if name in parameters}
        results = function(**columns)
        if inspect.iscoroutine(results):  # TRL takes such functions too
            results = asyncio.run(results)
        results = results.tolist() if hasattr(results, "tolist") else results  # of NumPy or torch
        if isinstance(results, list | tuple):
            results = [result.item() if hasattr(result, "item") else result for result in results]
    except BaseException as error:  # the user's function may raise anything, or exit
        return {"error": _describe(error)}
    if not isinstance(results, list | tuple):
        return {"error": f"it returned {type(results).__name__} and not a list"}
    if len(results) != rows:
        return {"error": f"it returned {len(results)} results for {rows} rows"}
    return {"results": [_checked(result, kind) for result in results]}


def _checked(result: Any, kind: str) -> tuple[Any, str]:
    if result is None:
        return None, ""
    if kind == "text" and isinstance(result, str):
        return replace_surrogates(result), ""
    if kind == "number" and isinstance(result, int | float) and abs(result) <= sys.float_info.max:
        return float(result), ""
    shown = str(result) if isinstance(result, float) else type(result).__name__
    return None, f"it returned {shown} and not {'a string' if kind == 'text' else 'a finite number'} or None"


def _describe(error: BaseException) -> str:
    *_, frame = traceback.extract_tb(error.__traceback__)
    own = frame.filename == __file__ or not Path(frame.filename).is_file()  # else of the user, or of a library
    place = "" if own else f" ({Path(frame.filename).name}, line {frame.lineno})"
    return f"{type(error).__name__}: {one_line(error)}{place}"


def _write(file: BinaryIO, value: dict[str, Any]) -> None:
    data = json.dumps(value).encode()
    file.write(len(data).to_bytes(8) + data)
    file.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
