"""Batches of what waits at the same time."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

__all__ = ["Batcher"]

_GATHER = 0.02  # seconds in which other items may join a batch


class Batcher:
    """Passes items to `run` in batches of up to `size`, one batch after the other."""

    def __init__(self, run: Callable[[list[Any]], Awaitable[list[Any]]], size: int) -> None:
        self._run, self._size = run, size
        self._busy = asyncio.Lock()
        self._open: list[Any] = []  # the batch that further items may join
        self._results: asyncio.Task[list[Any]]  # of the open batch

    async def result(self, item: Any) -> Any:
        """Return the result for one item."""
        if not 0 < len(self._open) < self._size:
            self._open = []
            self._results = asyncio.create_task(self._run_next(self._open))
        index, results = len(self._open), self._results
        self._open.append(item)
        return (await asyncio.shield(results))[index]

    async def _run_next(self, batch: list[Any]) -> list[Any]:
        async with self._busy:
            await asyncio.sleep(_GATHER)
            if self._open is batch:
                self._open = []
            return await self._run(batch)
