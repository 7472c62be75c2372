"""Run a recipe: every row goes through its method, many at a time, and ends as a pair or under a reason."""

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any, NamedTuple

from apo_trl.errors import InputError
from apo_trl.io.readers import check_dataset
from apo_trl.models.loading import load_tokenizer
from apo_trl.pairs.config.settings import Settings
from apo_trl.pairs.functions.process import load_function
from apo_trl.pairs.judging import Notes
from apo_trl.pairs.llm.requests import Dropped, Requester, Stopped
from apo_trl.pairs.llm.response_cache import ResponseCache
from apo_trl.pairs.llm.servers import Servers
from apo_trl.pairs.methods import make_pair
from apo_trl.pairs.output.writer import Result, write
from apo_trl.pairs.progress import Progress
from apo_trl.pairs.prompts import PromptSource, Record
from apo_trl.pairs.text.templates import load_template

__all__ = ["End", "Make", "build", "check_columns", "check_inputs", "check_templates", "each_row", "process_all"]
__all__ += ["take_over_shards"]

_SHOWN = 200  # characters of a prompt that `apo-trl pairs show` has
Make = Callable[[Requester, Settings, Record, Notes], Awaitable[Any]]
"""Compute the result of a row, or raise Dropped; the dictionary receives notes for the report."""


class End(NamedTuple):
    """The end of a row: its result, or why it has none."""

    record: Record
    result: Any
    notes: Notes
    reason: str = ""
    detail: str = ""


def build(settings: Settings) -> Result:
    """Build the dataset of a recipe in `settings.folder`, resuming from its response cache.

    Raises:
        InputError: The recipe or its prompts cannot be used; nothing has been requested.
    """
    source = check_inputs(settings)
    if settings.tokenizer:
        load_tokenizer(settings.tokenizer)
    records = Counter(record.fault if record.reason == "bad_row" else "" for record in source)
    with ResponseCache(settings.folder) as store:
        progress = Progress(records.total())
        if taken := take_over_shards(settings, store):
            progress.say(f"Took over {taken} replies from the shards.")
        if bad := records.total() - records[""]:
            progress.say(f"{bad} of {records.total()} rows cannot be used: {next(filter(None, records))}")
        servers = process_all(settings, source, store, progress, _make_row)
        limits = servers.limits
        counts = servers.requester.thoughts, servers.requester.repairs
        return write(settings, store, limits.stopped, limits.broken, servers.notes, *counts)


def check_inputs(settings: Settings) -> PromptSource:
    """Return the prompts of a run; raise InputError if a file, template or function that the run reads is unusable."""
    source = PromptSource(settings)
    check_templates(settings)
    for path in settings.eval_sets:
        check_dataset(path, "eval_sets")
    return source


def check_templates(settings: Settings) -> None:
    """Load the templates and functions that the method uses, so that an invalid one stops the run at once."""
    load_template.cache_clear()  # a file may have changed since the last run of this process
    load_function.cache_clear()
    for role in settings.functions:
        try:
            load_function(str(role.function))
        except InputError as error:
            raise InputError(f"{role.name}_{error}") from error
    prompt = [{"role": role, "content": "2 + 2?"} for role in ("system", "user", "assistant", "user")]
    judge_step = {"pairwise": "compare", "pointwise": "score"}.get(settings.judge_protocol)
    for role in settings.roles:
        if step := {"reviser": "revise", "judge": judge_step}.get(role.name):
            answers = {"answer_a": "4", "answer_b": "5"} if step == "compare" else {"answer": "4"}
            load_template(step, role.template).ask(prompt, **answers)


def check_columns(settings: Settings, records: Iterable[Record]) -> set[str]:
    """Return the columns of all records, if functions get them. Raises InputError for one that a function lacks."""
    columns = {name for record in (records if settings.functions else ()) for name in record.columns}
    for role in settings.functions:
        for name in load_function(str(role.function))["needs"]:
            if name not in columns:
                text = f"{role.name}_function: {role.public_model} needs the column '{name}', which no prompt has"
                remedy = "Add it to the prompts, or give the parameter a default"
                raise InputError(f"{text}, got {', '.join(sorted(columns)) or 'no column'}. {remedy}.")
    return columns


def take_over_shards(settings: Settings, store: ResponseCache) -> int:
    """Copy the replies of this recipe's shards into the whole recipe's cache, and return how many."""
    paths = [] if settings.shard else sorted(settings.folder.glob("shards/*/store.sqlite"))
    return sum(map(store.take_over, paths))


def process_all(
    settings: Settings, records: Iterable[Record], store: ResponseCache, progress: Progress, make: Make
) -> Servers:
    """Process every record with `make`, and store its end, with the result as JSON."""
    columns = check_columns(settings, records)

    def end(ended: End) -> None:
        (position, id, *_), result, notes, reason, detail = ended
        row = "" if result is None else json.dumps(result)
        store.end_row(position, id, reason=reason, detail=detail, pair=row, notes=json.dumps(notes))
        progress.ended(reason)

    async def commit() -> None:
        while True:
            await asyncio.sleep(2)
            store.commit()

    async def run() -> Servers:
        servers = Servers(settings, store, progress.say, columns)
        store.begin()
        committing = asyncio.create_task(commit())
        try:
            with progress.showing(servers.limits):
                await each_row(settings, iter(records), servers.requester, end, make)
        finally:
            committing.cancel()
            await servers.close()
        with contextlib.suppress(asyncio.CancelledError):
            await committing  # which may have failed
        return servers

    return asyncio.run(run())


async def each_row(
    settings: Settings,
    records: Iterator[Record],
    requester: Requester,
    end: Callable[[End], None],
    make: Make = make_pair,
) -> None:
    """Process every record with `make`, and call `end` as each of them finishes."""
    # Rows wait at one role while others are at the next: twice what the servers take keeps them busy.
    servers = {role.base_url or role.model for role in settings.roles}
    widest = max([settings.concurrency, *(role.batch_size for role in settings.roles if role.base_url is None)])

    async def work() -> None:
        for record in records:
            notes: Notes = {"prompt": record.prompt[-1]["content"].strip()[:_SHOWN]} if record.prompt else {}
            result, reason, detail = None, "", ""
            try:
                if record.fault:
                    raise Dropped(record.reason, record.fault)
                result = await make(requester, settings, record, notes)
            except Dropped as dropped:
                reason, detail = dropped.reason, dropped.detail
            except Stopped as stopped:
                reason, detail = "not_asked", str(stopped)
            notes["replies"] = requester.row_ended(record.id)
            end(End(record, result, notes, reason, detail))
            await asyncio.sleep(0)  # a row out of the cache never waits, and would block all others

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(2 * widest * max(1, len(servers))):
                group.create_task(work())
    except* InputError as errors:  # such as a model that cannot be loaded
        raise errors.exceptions[0] from None


async def _make_row(asker: Requester, settings: Settings, record: Record, notes: Notes) -> dict[str, Any]:
    pair = await make_pair(asker, settings, record, notes)
    return {
        "id": record.id,
        "prompt": record.prompt,
        "chosen": [{"role": "assistant", "content": pair.chosen.text}],
        "rejected": [{"role": "assistant", "content": pair.rejected.text}],
        "rationale": pair.rationale,
        "method": settings.method,
        "chosen_model": pair.chosen.model,
        "rejected_model": pair.rejected.model,
        "judge_model": settings.judge.public_model if "judge" in settings.method else None,
        "margin": pair.margin,
    }
