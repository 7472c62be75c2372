"""Requests in files and back, in the format of OpenAI's Batch API and of `vllm run-batch`.

One line is one request; its answer is joined by `custom_id`: a line that is missing, or stands elsewhere, shifts no
other. A method that asks in turn (the policy, then the reviser) takes as many rounds of export and import.
"""

import asyncio
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from apo_trl.errors import InputError
from apo_trl.pairs.build import End, check_templates, each_row, take_over_shards
from apo_trl.pairs.config.settings import Role, Settings
from apo_trl.pairs.llm.requests import Dropped, Request
from apo_trl.pairs.llm.response_cache import ResponseCache
from apo_trl.pairs.llm.wire import usage_of
from apo_trl.pairs.prompts import PromptSource

__all__ = ["export_batch", "import_batch"]

# OpenAI's limits for one file: https://platform.openai.com/docs/guides/batch
_LINES = 50_000
_BYTES = 190_000_000
_LONGEST_NAME = 100  # of a model, in the name of a file


def export_batch(settings: Settings, store: ResponseCache) -> dict[Path, int]:
    """Write every request that can be asked now and has no answer yet to `batch/`; give the requests of each file.

    Request files of an earlier export go; whatever else lies in the folder stays. What a reward model is asked is left
    to `build`, which runs it in this process.
    """
    source = PromptSource(settings)
    check_templates(settings)
    take_over_shards(settings, store)
    folder = settings.folder / "batch"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.jsonl"):
        if _holds_requests(old):
            old.unlink()
    writer = _Writer(folder, store)
    try:
        asyncio.run(each_row(settings, iter(source), store, writer.send, _nothing))
    finally:
        writer.close()
    return writer.written


def _holds_requests(path: Path) -> bool:
    """Say whether a file is one that was exported: answers have a `custom_id` too, and no `body` of their own."""
    try:
        with path.open(encoding="utf-8") as file:
            entry = json.loads(file.readline())
    except (OSError, ValueError):
        return False
    return isinstance(entry, dict) and {"custom_id", "method", "url", "body"} == set(entry)


def _nothing(ended: End) -> None:
    """Leave how rows end to `build`."""


class _Part(NamedTuple):
    """The file that is being written for one model."""

    file: TextIO
    path: Path
    size: int


class _Writer:
    """Takes requests in the place of a server, and writes them down."""

    def __init__(self, folder: Path, store: ResponseCache) -> None:
        self._folder, self._store = folder, store
        self._parts: dict[Role, _Part] = {}  # a batch is for one model
        self._keys: set[str] = set()
        self.written: Counter[Path] = Counter()

    async def send(self, requests: list[Request]) -> Any:
        for request in requests:
            if request.step != "reward" and request.key not in self._keys:
                self._keys.add(request.key)
                self._write(request)
        raise Dropped("not_answered")

    def _write(self, request: Request) -> None:
        role = request.role
        line = json.dumps(
            {"custom_id": request.key, "method": "POST", "url": "/v1/chat/completions", "body": request.body}
        )
        part = self._parts.get(role)
        if part is None or self.written[part.path] >= _LINES or part.size + len(line) + 1 > _BYTES:
            if part is not None:
                part.file.close()
            path = self._free(role)
            part = _Part(path.open("x", encoding="utf-8"), path, 0)
        part.file.write(line + "\n")
        self._parts[role] = part._replace(size=part.size + len(line) + 1)
        self.written[part.path] += 1
        self._store.export(
            request.key, role=role.name, step=request.step, row=request.row, sample=request.sample,
            model=str(role.model),
        )  # fmt: skip

    def _free(self, role: Role) -> Path:
        """Find a name that no file has: another model's may look the same, and answers may lie here."""
        model = re.sub(r"[^A-Za-z0-9.]+", "-", str(role.model))[-_LONGEST_NAME:].strip("-.") or "model"
        number = 1
        while (path := self._folder / f"{role.name}-{model}-{number:03d}.jsonl").exists():
            number += 1
        return path

    def close(self) -> None:
        for part in self._parts.values():
            part.file.close()


def import_batch(settings: Settings, store: ResponseCache, files: Sequence[str]) -> Counter[str]:
    """Take the answers of output files into the store.

    Counts lines as `taken`, `there already`, `failed` (the batch's own word for them), `not ours` (no request of this
    folder has that custom_id) and `not readable`.
    """
    missing = [file for file in files if not Path(file).is_file()]
    if missing:
        raise InputError(f"There is no file {missing[0]}; give the output files of the batch.")
    counts: Counter[str] = Counter()
    roles = {role.name: role for role in settings.roles}
    for name in files:
        with Path(name).open(encoding="utf-8-sig", errors="replace") as file:
            for line in filter(str.strip, file):
                counts[_take(store, line, roles)] += 1
    return counts


def _take(store: ResponseCache, line: str, roles: Mapping[str, Role]) -> str:
    try:
        entry = json.loads(line)
    except ValueError:
        return "not readable"
    if not isinstance(entry, dict) or "custom_id" not in entry or not {"response", "error"} & set(entry):
        return "not readable"
    key = str(entry["custom_id"])
    asked = store.exported(key)
    if asked is None:
        return "not ours"
    if store.reply(key) is not None:
        return "there already"
    response = entry.get("response")
    body, status = (response.get("body"), response.get("status_code", 200)) if isinstance(response, dict) else (None, 0)
    if entry.get("error") or status != 200 or not _is_reply(body):
        message = json.dumps(entry.get("error") or body or response)[:300]
        store.fail(key, role=asked["role"], row=asked["row"], message=message)
        return "failed"
    try:
        usage = usage_of(body)
    except (AttributeError, TypeError, ValueError, OverflowError):  # the answer is worth more than its count
        usage = (0, 0)
    role = roles.get(asked["role"])
    store.add(key, json.dumps(body), **asked, usage=usage, cost=role.cost(*usage) if role else 0.0)
    return "taken"


def _is_reply(body: Any) -> bool:
    """Say whether a body has an answer in the place where `read_reply` will look for it."""
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return False
    return isinstance(choices[0].get("message"), dict)
