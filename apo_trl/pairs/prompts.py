"""Read prompts: one record for each row of a file or dataset, identified by its id; an unusable row has a `fault`."""

import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from apo_trl.errors import InputError, InvalidRow
from apo_trl.io.columns import parse_messages
from apo_trl.io.messages import content_text, replace_surrogates
from apo_trl.io.readers import file_builder, open_text, read_rows
from apo_trl.io.resources import packaged
from apo_trl.io.rows import normalise_messages
from apo_trl.pairs.config.keys import Settings, shard_of

__all__ = ["Answer", "PromptSource", "Record", "columns_of", "read_records"]

_ANSWERS = ("responses", "response", "completions", "completion")
_IDS = ("id", "prompt_id", "custom_id")
_CONVERSATION = ("prompt", "messages", *_ANSWERS)
_FIELDS = (*_CONVERSATION, *_IDS)
_SET_BY_TRL = ("prompts", "completion_ids", "trainer_state", "log_extra", "log_metric")  # when it calls a function


class Answer(NamedTuple):
    """An answer to a prompt, and its model ("given" for one of the row)."""

    text: str
    model: str


class Record(NamedTuple):
    """One row: its position, id, conversation and own answers, or its fault and the reason that is counted.

    `columns` has the row's other columns if a function judges or revises, which gets them by name.
    """

    position: int
    id: str
    prompt: list[dict[str, Any]]
    answers: tuple[Answer, ...] = ()
    fault: str = ""
    reason: str = ""
    columns: Mapping[str, Any] = {}


class _Unusable(ValueError):
    """An unusable row; the message follows "Row 3"."""


class PromptSource:
    """The records of this shard of `settings.prompts`, up to `max_prompts` rows, read anew by each iteration."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._path = Path(packaged(settings.prompts) or settings.prompts)
        if bool(file_builder(str(self._path))) != self._path.is_file():
            raise InputError(f"prompts: no .jsonl, .json or .parquet file: {settings.prompts}. Check the path.")

    def __iter__(self) -> Iterator[Record]:
        if self._path.is_file() and ".jsonl" in self._path.suffixes:
            return read_records(_lines(self._path), self._settings)
        return read_records(enumerate(read_rows(str(self._path), self._settings.prompts_split), 1), self._settings)


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        # Bytes that are not UTF-8 become surrogates, which UTF-8 itself never gives.
        with open_text(path, errors="surrogateescape") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        yield number, json.loads(line.encode())
                    except (ValueError, RecursionError) as error:
                        yield number, _Unusable(f"is not JSON in UTF-8: {error}")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"prompts: {path} cannot be read: {str(error)[:300]}. Check the file.") from error


def read_records(rows: Iterable[tuple[int, Any]], settings: Settings) -> Iterator[Record]:
    """Yield a record for each numbered row; raises InputError if no row is usable."""
    index, count = shard_of(settings.shard or "0/1")
    needs_answers = not any(role.model for role in settings.policy)
    numbers: dict[str, int] = {}  # of rows, by the hash of prompt and answers
    ids: set[str] = set()
    first_fault = ""
    for position, (number, row) in enumerate(itertools.islice(rows, settings.max_prompts)):
        fault = reason = ""
        try:
            name, prompt, answers, columns = _read(row, bool(settings.functions))
            if needs_answers and not answers:
                raise _Unusable("has no 'responses', and policy_model is not set")
        except (_Unusable, RecursionError) as error:
            record = Record(position, f"row-{number}", [], (), f"Row {number} {error}.", "bad_row")
            first_fault = first_fault or record.fault
        else:
            digest = hashlib.sha256(json.dumps([prompt, answers], sort_keys=True).encode()).hexdigest()
            name = str(name) or digest[:16]
            if digest in numbers:
                fault, reason = f"has the same prompt and answers as row {numbers[digest]}", "duplicate_prompt"
            elif name in ids:
                fault, reason = f"has the id {name!r} of an earlier row; ids must be unique", "duplicate_id"
            numbers.setdefault(digest, number)
            ids.add(name)
            record = Record(position, name, prompt, answers, fault and f"Row {number} {fault}.", reason, columns)
        if int(hashlib.sha256(record.id.encode()).hexdigest()[:8], 16) % count == index:
            yield record
    if not numbers:
        raise InputError(f"prompts: {settings.prompts} has no usable row. {first_fault or 'It is empty.'}")


def _read(row: Any, whole: bool) -> tuple[Any, list[dict[str, Any]], tuple[Answer, ...], dict[str, Any]]:
    if isinstance(row, _Unusable):
        raise row
    if not isinstance(row, Mapping):
        raise _Unusable("is not a JSON object")
    fields = _through_json({key: row[key] for key in (row if whole else _FIELDS) if key in row})
    field = "messages" if fields.get("prompt") is None and fields.get("messages") else "prompt"
    prompt, answers = _messages(fields.get(field), field), tuple(_answers(fields))
    if field == "messages" and prompt[-1]["role"] == "assistant":  # a whole conversation ends with the answer
        last = prompt.pop()["content"]
        answers = answers or ((Answer(last, "given"),) if last.strip() else ())
    if not prompt or prompt[-1]["role"] == "assistant" or not prompt[-1]["content"].strip():
        raise _Unusable(f"needs a '{field}' that ends with text before the assistant's turn, which is in 'responses'")
    name = next((fields[key] for key in _IDS if fields.get(key) not in (None, "")), "")
    return name, prompt, answers, _without_conversation(fields)


def columns_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of a row that a function gets by name: those that TRL's trainers would give it."""
    return _without_conversation(_through_json(row))


def _without_conversation(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key not in (*_CONVERSATION, *_SET_BY_TRL)}


def _through_json(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row as requests send it: NaN and half of a surrogate pair are no JSON, a date becomes a string."""
    text = json.dumps(dict(row), ensure_ascii=False, default=str, skipkeys=True)
    fields: dict[str, Any] = json.loads(replace_surrogates(text), parse_constant=lambda name: None)
    return fields


def _messages(value: Any, field: str) -> list[dict[str, Any]]:
    if isinstance(value, str) and isinstance(value := parse_messages(value), str) and field == "prompt":
        value = [{"role": "user", "content": value}]
    try:
        messages = normalise_messages(value, field)
    except InvalidRow as error:
        raise _Unusable(str(error)) from error
    if not messages:
        raise _Unusable(f"needs a string or a list of messages as '{field}'")
    for message in messages:
        if message["content"] is None and message.get("tool_calls"):
            message["content"] = ""
        if message["content"] is None or not re.fullmatch(r"[A-Za-z][A-Za-z_-]{0,30}", message["role"]):
            raise _Unusable(f"has a message in '{field}' without a 'role' such as user, or without text as 'content'")
    return messages


def _answers(fields: Mapping[str, Any]) -> Iterator[Answer]:
    values: Any = next((fields[key] for key in _ANSWERS if fields.get(key)), [])
    for answer in values if isinstance(values, list) else [values]:
        if isinstance(answer, str):
            answer = {"text": answer}
        elif isinstance(answer, list) and answer:
            answer = answer[-1]  # TRL's format of a completion: messages, the last of them the answer
        if not isinstance(answer, dict) or answer.get("role") not in (None, "assistant"):
            answer = {}
        content = next((answer[key] for key in ("content", "text", "response") if answer.get(key)), None)
        text = content_text(content) or ""
        if not text.strip():
            raise _Unusable("has an answer in 'responses' that is not an assistant's text")
        yield Answer(text, str(answer.get("model") or "given"))
