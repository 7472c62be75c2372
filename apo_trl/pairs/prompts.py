"""Prompts on their way in: one record for each row of a file or dataset, joined by id ever after.

A row that cannot be used is no reason to stop: it comes out as a record with a `fault`, and is counted. A file of which
no row can be used is.
"""

import hashlib
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from apo_trl.errors import InputError
from apo_trl.io.messages import content_text, replace_surrogates
from apo_trl.io.readers import file_builder, open_text, read_rows
from apo_trl.io.resources import packaged
from apo_trl.pairs.config.settings import Settings, shard_of

__all__ = ["Answer", "PromptSource", "Record", "read_records"]

_ANSWERS = ("responses", "response", "completions", "completion")
_FIRST = ("id", "prompt_id", "custom_id")


class Answer(NamedTuple):
    """An answer to a prompt, and the model that gave it (or "given")."""

    text: str
    model: str


class Record(NamedTuple):
    """One row: its place in the file, its id, the conversation to be answered, and answers that came with it."""

    position: int
    id: str
    prompt: list[dict[str, Any]]
    answers: tuple[Answer, ...] = ()
    fault: str = ""
    reason: str = ""


class PromptSource:
    """The rows of `settings.prompts`, readable more than once without being held."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._path = str(packaged(settings.prompts) or settings.prompts)
        builder = file_builder(self._path)
        self._lines = builder == "json" and ".jsonl" in Path(self._path).suffixes
        if builder and not Path(self._path).exists():
            raise InputError(f"prompts: there is no file {settings.prompts}; give one that there is.")
        if not builder and Path(self._path).is_file():
            raise InputError(f"prompts: {settings.prompts} is no .jsonl, .json or .parquet file; give one of these.")

    def __iter__(self) -> Iterator[Record]:
        """Give the records of this shard, in order, up to `max_prompts` rows."""
        rows = _lines(self._path) if self._lines else enumerate(read_rows(self._path, self._settings.prompts_split), 1)
        return read_records(rows, self._settings)


def _lines(path: str) -> Iterator[tuple[int, Any]]:
    """Give lines by number; one that is no JSON comes as its error."""
    try:
        # Bytes that are no UTF-8 come as halves of surrogate pairs, which UTF-8 itself never gives.
        with open_text(path, errors="surrogateescape") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _json(line.rstrip())
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"prompts: {path} cannot be read: {' '.join(str(error).split())[:300]}.") from error


def _json(line: str) -> Any:
    try:
        line.encode()
        return json.loads(line)
    except json.JSONDecodeError as error:
        return _Bad(f"is not JSON ({error.msg} at character {error.pos + 1})")
    except UnicodeEncodeError:
        return _Bad("is not in UTF-8")
    except (ValueError, RecursionError):  # a number of thousands of digits, thousands of brackets
        return _Bad("is JSON that cannot be read (its numbers or its nesting)")


def read_records(rows: Iterable[tuple[int, Any]], settings: Settings) -> Iterator[Record]:
    """Make records of numbered rows; one that is bad or was there before has a `fault` and the `reason` it counts as.

    Raises InputError where no row at all can be used.
    """
    index, count = shard_of(settings.shard) if settings.shard else (0, 1)
    seen: dict[bytes, int] = {}  # what a row asks, by hash
    ids: dict[str, bytes] = {}
    good, first = 0, ""
    for position, (number, row) in enumerate(rows):
        if settings.max_prompts is not None and position >= settings.max_prompts:
            break
        name = f"row-{number}"
        try:
            name = _id(row) or name
            prompt, answers = _read(row, settings)
            digest = hashlib.sha256(json.dumps([prompt, answers], sort_keys=True).encode()).digest()
            name = _id(row) or digest.hex()[:16]
        except _Bad as error:
            record = Record(position, name, [], (), f"Row {number} {error}.", "bad_row")
            first = first or record.fault
        else:
            record = Record(position, name, prompt, answers)
            if digest in seen:
                fault = f"Row {number} asks the same as row {seen[digest]}."
                record = record._replace(fault=fault, reason="duplicate_prompt")
            elif ids.get(name, digest) != digest:
                fault = f"Row {number} has the id {name!r} of an earlier row; ids must be unique."
                record = record._replace(fault=fault, reason="duplicate_id")
            seen.setdefault(digest, number)
            ids.setdefault(name, digest)
            good += 1
        if int(hashlib.sha256(record.id.encode()).hexdigest()[:8], 16) % count == index:
            yield record
    if not good:
        raise InputError(f"prompts: no row of {settings.prompts} can be used. {first or 'It has none.'}")


class _Bad(ValueError):
    """A row that cannot be used; the message goes on after "Row 3"."""


def _id(row: Any) -> str:
    if not isinstance(row, Mapping):
        return ""
    value = next((row[key] for key in _FIRST if row.get(key) not in (None, "")), "")
    return _text(value, "id")


def _text(value: Any, field: str) -> str:
    """Give a text or a number as text."""
    try:
        if isinstance(value, (str, int, float)):
            return replace_surrogates(str(value))
    except ValueError:  # a number of thousands of digits
        pass
    raise _Bad(f"has a '{field}' that is neither a text nor a number")


def _read(row: Any, settings: Settings) -> tuple[list[dict[str, Any]], tuple[Answer, ...]]:
    if isinstance(row, _Bad):
        raise row
    if not isinstance(row, Mapping):
        raise _Bad("is no JSON object; it needs a field 'prompt'")
    prompt, last = row.get("prompt"), ""
    if prompt is None and row.get("messages"):
        prompt = _messages(row["messages"], "messages")
        if prompt[-1]["role"] == "assistant":  # a whole conversation: its last turn is the policy's answer
            last = prompt.pop()["content"]
        if not prompt:
            raise _Bad("has 'messages' with nothing before the assistant's turn")
    elif prompt is None:
        fields = ", ".join(repr(str(name)[:40]) for name in list(row)[:20])
        raise _Bad(f"has no 'prompt' and no 'messages'; its fields are {fields or 'none'}")
    elif isinstance(prompt, str):
        prompt = [{"role": "user", "content": replace_surrogates(prompt)}]
    else:
        prompt = _messages(prompt, "prompt")
    if prompt[-1]["role"] == "assistant":
        raise _Bad("has a 'prompt' that ends with the assistant's turn; put that into 'responses'")
    if not prompt[-1]["content"].strip():
        raise _Bad("has an empty 'prompt'")
    answers = tuple(_answers(row)) or ((Answer(last, "given"),) if last.strip() else ())
    if not answers and not any(role.model for role in settings.policy):
        raise _Bad("has no 'responses', and the recipe no policy_model to ask for one")
    return prompt, answers


def _messages(value: Any, field: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(message, Mapping) for message in value):
        raise _Bad(f"has a '{field}' that is neither a text nor a list of messages")
    messages = []
    for message in value:
        role = message.get("role")
        if not isinstance(role, str) or not re.fullmatch(r"[A-Za-z][A-Za-z_-]{0,30}", role):
            raise _Bad(f"has a message in '{field}' without a 'role', as user or assistant")
        # Parquet fills what a message lacks with None; servers refuse that.
        rest = {key: part for key, part in message.items() if key not in ("role", "content") and part is not None}
        content = message.get("content")
        text = "" if content is None and rest.get("tool_calls") else content_text(content)
        if text is None:
            raise _Bad(f"has a message in '{field}' whose 'content' is no text (images cannot be revised or judged)")
        messages.append({"role": role, "content": text, **(_plain(rest, field) if rest else {})})
    return messages


def _plain(rest: dict[str, Any], field: str) -> dict[str, Any]:
    """Give what a message holds beside its text as JSON that any server can read."""
    try:
        plain: dict[str, Any] = json.loads(replace_surrogates(json.dumps(rest, ensure_ascii=False, allow_nan=False)))
    except (TypeError, ValueError, RecursionError):
        fields = ", ".join(map(repr, rest))[:80]
        raise _Bad(f"has a message in '{field}' with {fields}, which cannot be sent") from None
    return plain


def _answers(row: Mapping[str, Any]) -> Iterator[Answer]:
    given: Any = next((row[key] for key in _ANSWERS if row.get(key)), [])
    for answer in given if isinstance(given, list) else [given]:
        model = "given"
        if isinstance(answer, list) and answer and isinstance(answer[-1], Mapping):
            answer = answer[-1]  # a completion as TRL has it: messages, the last of them the answer
        if isinstance(answer, Mapping):
            if answer.get("role") not in (None, "assistant"):
                raise _Bad("has an answer in 'responses' that is not the assistant's")
            if answer.get("model"):
                model = _text(answer["model"], "model")
            answer = content_text(
                next((answer[key] for key in ("content", "text", "response") if answer.get(key)), None)
            )
        if not isinstance(answer, str) or not answer.strip():
            raise _Bad("has an answer in 'responses' that is empty or no text")
        yield Answer(replace_surrogates(answer), model)
