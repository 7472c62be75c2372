"""Requests as batch files and responses from them, in the format of OpenAI's Batch API and of `vllm run-batch`.

A method whose steps depend on each other (the policy, then the reviser) takes as many rounds of export and import.
"""

import asyncio
import contextlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NoReturn

from apo_trl.errors import InputError
from apo_trl.io.messages import replace_surrogates
from apo_trl.pairs.build import check_columns, check_templates, each_row, take_over_shards
from apo_trl.pairs.config.settings import Role, Settings
from apo_trl.pairs.llm.reply import choices_of, usage_of
from apo_trl.pairs.llm.requests import Dropped, Request, Requester
from apo_trl.pairs.llm.response_cache import ResponseCache
from apo_trl.pairs.prompts import PromptSource

__all__ = ["export_batch", "import_batch"]

_LINES, _BYTES = 50_000, 190_000_000  # OpenAI's limits for one file: https://platform.openai.com/docs/guides/batch
# Of a request as written here. Responses have a `custom_id` too, but no `method`.
_START = re.compile(r'\{"custom_id": "\w+", "method": "POST", "url": "/v1/chat/completions", "body": ')


def export_batch(settings: Settings, store: ResponseCache) -> dict[Path, int]:
    """Write every request that has no response yet to `batch/`; return the number of requests by file.

    Replaces the request files of an earlier export. Requests to a reward model are left to `build`.
    """
    source = PromptSource(settings)
    check_templates(settings)
    check_columns(settings, source)
    take_over_shards(settings, store)
    folder = settings.folder / "batch"
    folder.mkdir(exist_ok=True)
    for path in folder.glob("*.jsonl"):
        with path.open(encoding="utf-8", errors="replace") as file:
            exported = _START.match(file.readline())
        if exported:
            path.unlink()
    files: dict[Role, BinaryIO] = {}  # a batch is for one model
    written: Counter[Path] = Counter()
    keys: set[str] = set()

    def write(request: Request) -> None:
        role = request.role
        entry = {"custom_id": request.key, "method": "POST", "url": "/v1/chat/completions", "body": request.body}
        line = json.dumps(entry).encode() + b"\n"
        file = files.get(role)
        if file is None or written[Path(file.name)] >= _LINES or file.tell() + len(line) > _BYTES:
            file = files[role] = stack.enter_context(_new_path(folder, role).open("xb"))
        file.write(line)
        written[Path(file.name)] += 1
        columns = {name: getattr(request, name) for name in ("step", "row", "sample")}
        store.export(request.key, role=role.name, model=str(role.model), **columns)

    async def send(requests: list[Request]) -> NoReturn:
        for request in requests:
            if request.step != "reward" and request.key not in keys:
                keys.add(request.key)
                write(request)
        raise Dropped("not_answered")

    with contextlib.ExitStack() as stack:
        asyncio.run(each_row(settings, iter(source), Requester(settings, store, send), lambda ended: None))
    return written


def _new_path(folder: Path, role: Role) -> Path:
    # Another model's file may have the same name, and responses may lie here.
    model = re.sub(r"[^A-Za-z0-9.]+", "-", str(role.model))[-100:].strip("-.") or "model"
    paths = (folder / f"{role.name}-{model}-{number:03d}.jsonl" for number in itertools.count(1))
    return next(path for path in paths if not path.exists())


def import_batch(settings: Settings, store: ResponseCache, files: Sequence[str]) -> Counter[str]:
    """Store the responses of output files; return the number of lines that were imported, failed, and so on."""
    if missing := [file for file in files if not Path(file).is_file()]:
        raise InputError(f"{missing[0]}: file not found. Name the output files of the batch.")
    roles = {role.name: role for role in settings.roles}
    counts: Counter[str] = Counter()
    for name in files:
        with Path(name).open(encoding="utf-8-sig", errors="replace") as file:
            counts.update(_import_line(store, line, roles) for line in file if line.strip())
    return counts


def _import_line(store: ResponseCache, line: str, roles: Mapping[str, Role]) -> str:
    try:
        entry = json.loads(line)
        key, response = replace_surrogates(str(entry["custom_id"])), entry["response"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return "unreadable"
    request = store.exported(key)
    if request is None:
        return "unknown custom_id"
    if store.reply(key) is not None:
        return "imported before"
    body = response.get("body") if isinstance(response, dict) else None
    if not choices_of(body) or entry.get("error") or response.get("status_code", 200) != 200:
        return "failed"
    role, usage = roles.get(request["role"]), usage_of(body)
    store.add(key, json.dumps(body), **request, usage=usage, cost=role.cost(*usage) if role else 0.0)
    return "imported"
