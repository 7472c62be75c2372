"""One run of a recipe: every row through its method, many at a time, each ending as a pair or under a reason's name."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from apo_trl.errors import InputError
from apo_trl.pairs.config.settings import Settings
from apo_trl.pairs.llm.requests import Dropped, Requester, Send, Stopped
from apo_trl.pairs.llm.response_cache import ResponseCache
from apo_trl.pairs.llm.servers import Servers
from apo_trl.pairs.methods import Pair, make_pair
from apo_trl.pairs.output.writer import Result, write
from apo_trl.pairs.progress import Progress
from apo_trl.pairs.prompts import PromptSource, Record
from apo_trl.pairs.text.templates import load_template

__all__ = ["End", "Make", "build", "check_templates", "each_row", "process_all", "take_over_shards"]


Make = Callable[[Requester, Settings, Record, dict[str, Any]], Awaitable[Any]]
"""What a row is put through: gives its result, or raises Dropped; the last argument takes notes for the report."""


class End(NamedTuple):
    """How a row ended: its result, mostly a pair, or the reason for none."""

    record: Record
    result: Any
    reason: str = ""
    detail: str = ""
    notes: Mapping[str, Any] = {}


def build(settings: Settings) -> Result:
    """Build the dataset of a recipe in `settings.folder`, going on from what is stored there.

    Raises InputError for a recipe or prompts that cannot be used, before anything is asked. A run that stopped early
    (`Result.stopped`) has written what it has.
    """
    source = PromptSource(settings)
    check_templates(settings)
    total, faults = _count(source)
    with ResponseCache(settings.folder) as store:
        taken = take_over_shards(settings, store)
        progress = Progress(total)
        if taken:
            progress.say(f"Took over {taken} replies from the shards.")
        if faults:
            progress.say(f"{sum(faults.values())} of {total} rows cannot be used: {next(iter(faults))}")
        servers = process_all(settings, source, store, progress, make_pair, _row)
        return write(
            settings, store, stopped=servers.limits.stopped, broken=servers.limits.broken, servers=servers.notes
        )


def check_templates(settings: Settings) -> None:
    """Load and render the templates that the method uses, so that a wrong one stops the run at once."""
    load_template.cache_clear()  # a file may have changed since the last run of this process
    prompt = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2 + 2?"},
    ]
    for role in settings.roles:
        if role.name == "reviser":
            load_template("revise", role.template).ask(prompt, answer="4")
        elif role.name == "judge" and settings.judge_protocol == "pairwise":
            load_template("compare", role.template).ask(prompt, answer_a="4", answer_b="5")
        elif role.name == "judge" and settings.judge_protocol == "pointwise":
            load_template("score", role.template).ask(prompt, answer="4")


def take_over_shards(settings: Settings, store: ResponseCache) -> int:
    """Copy what shards of this recipe were answered into the whole's store."""
    if settings.shard:
        return 0
    return sum(store.take_over(path) for path in sorted(settings.folder.glob("shards/*/store.sqlite")))


def _count(source: Iterable[Record]) -> tuple[int, dict[str, int]]:
    total, faults = 0, dict[str, int]()
    for record in source:
        total += 1
        if record.reason == "bad_row":
            faults[record.fault] = faults.get(record.fault, 0) + 1
    return total, faults


def process_all(
    settings: Settings,
    records: Iterable[Record],
    store: ResponseCache,
    progress: Progress,
    make: Make,
    describe: Callable[[Settings, Record, Any], Any],
) -> Servers:
    """Put every record through `make`, note how it ended in the store, what `describe` says of its result as JSON."""
    return asyncio.run(_ask_all(settings, records, store, progress, make, describe))


async def _ask_all(
    settings: Settings, records: Iterable[Record], store: ResponseCache, progress: Progress, make: Make, describe: Any
) -> Servers:
    servers = Servers(settings, store, progress.say)
    store.begin()

    def end(ended: End) -> None:
        record = ended.record
        row = "" if ended.result is None else json.dumps(describe(settings, record, ended.result))
        store.end_row(
            record.position, record.id, reason=ended.reason, detail=ended.detail, pair=row,
            notes=json.dumps(ended.notes),
        )  # fmt: skip
        progress.ended(ended.reason)

    try:
        with progress.showing(servers.limits):
            await each_row(settings, iter(records), store, servers.send, end, make)
    finally:
        await servers.close()
    return servers


async def each_row(
    settings: Settings,
    records: Iterator[Record],
    store: ResponseCache,
    send: Send,
    end: Callable[[End], None],
    make: Make = make_pair,
) -> None:
    """Put every record through the method, or another `make`, and call `end` for it, as they finish."""
    asker = Requester(settings, store, send)
    # Rows wait at one role while others are at the next: twice what the servers take keeps them busy.
    servers = {role.base_url or role.model for role in settings.roles}
    widest = max([settings.concurrency, *(role.batch_size for role in settings.roles if role.base_url is None)])

    async def work() -> None:
        for record in records:
            notes: dict[str, Any] = {}
            try:
                end(End(record, await make(asker, settings, record, notes), notes=notes))
            except Dropped as dropped:
                end(End(record, None, dropped.reason, dropped.detail, notes))
            except Stopped as stopped:
                end(End(record, None, "not_asked", str(stopped), notes))
            await asyncio.sleep(0)  # a row out of the store waits for nothing, and would let nobody else in

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(2 * widest * max(1, len(servers))):
                group.create_task(work())
    except* InputError as errors:  # a model that cannot be loaded, for one
        raise errors.exceptions[0] from None


def _row(settings: Settings, record: Record, pair: Pair) -> dict[str, Any]:
    """Give a row of the dataset, in TRL's conversational format and with its provenance."""
    judged = "judge" in settings.method
    return {
        "id": record.id,
        "prompt": record.prompt,
        "chosen": [{"role": "assistant", "content": pair.chosen.text}],
        "rejected": [{"role": "assistant", "content": pair.rejected.text}],
        "rationale": pair.rationale,
        "method": settings.method,
        "chosen_model": pair.chosen.model,
        "rejected_model": pair.rejected.model,
        "judge_model": settings.judge.public_model if judged else None,
        "margin": pair.margin,
    }
