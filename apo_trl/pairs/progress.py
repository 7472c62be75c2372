"""How far a run is: a live table in a terminal, a line now and then elsewhere. Counts only, never what a model said."""

import asyncio
import contextlib
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, TextIO

from apo_trl.pairs.llm.limits import Budget

__all__ = ["Progress"]

_EVERY = 10.0  # seconds between log lines
_WINDOW = 60.0  # seconds that the rate is taken over


class Progress:
    """Counts rows as they end, and shows them on standard error."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self._total, self._stream = total, stream or sys.stderr
        self._ended: Counter[str] = Counter()
        self._marks: deque[tuple[float, int, int]] = deque([(time.monotonic(), 0, 0)])
        self._live: Any = None

    def ended(self, reason: str) -> None:
        """Count a row: kept where there is no reason."""
        self._ended[reason or "kept"] += 1

    def say(self, line: str) -> None:
        """Write a line that stays, above the table where there is one."""
        if self._live is not None:
            self._live.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=self._stream, flush=True)

    @contextlib.contextmanager
    def showing(self, limits: Budget) -> Iterator[None]:
        """Show the state until the block ends."""
        live = self._table(limits) if self._stream.isatty() and find_spec("rich") else None
        task = asyncio.get_running_loop().create_task(self._refresh(live) if live else self._lines(limits))
        try:
            with live or contextlib.nullcontext() as self._live:
                yield
        finally:
            self._live = None
            task.cancel()
            self.say(self._line(limits))

    async def _lines(self, limits: Budget) -> None:
        said, count = -1, 0
        while True:
            await asyncio.sleep(_EVERY)
            count += 1
            if self._ended.total() != said and (count <= 6 or count % 6 == 0):  # each 10 s at first, then each minute
                said = self._ended.total()
                self.say(self._line(limits))

    def _line(self, limits: Budget) -> str:
        return "; ".join(f"{name} {value}" for name, value in self._state(limits).items())

    def _table(self, limits: Budget) -> Any:
        from rich.console import Console
        from rich.live import Live
        from rich.table import Table

        def table() -> Any:
            grid = Table.grid(padding=(0, 2))
            for name, value in self._state(limits).items():
                grid.add_row(name, value)
            return grid

        # Drawn by `_refresh` and not by a thread of rich's: rows end in this one.
        console = Console(file=self._stream)
        return Live(get_renderable=table, console=console, auto_refresh=False, transient=True)

    async def _refresh(self, live: Any) -> None:
        while True:
            await asyncio.sleep(0.25)
            live.refresh()

    def _state(self, limits: Budget) -> dict[str, str]:
        now, done = time.monotonic(), self._ended.total()
        self._marks.append((now, done, limits.answered))
        while len(self._marks) > 2 and now - self._marks[0][0] > _WINDOW:
            self._marks.popleft()
        began, before, answered = self._marks[0]
        seconds = max(now - began, 1e-9)
        rate = (done - before) / seconds
        left = (self._total - done) / rate if rate else None
        dropped = {name: count for name, count in self._ended.most_common() if name != "kept"}
        state = {
            "rows": f"{done} of {self._total}",
            "kept": str(self._ended["kept"]),
            "dropped": f"{sum(dropped.values())}"
            + (f" ({', '.join(f'{count} {name}' for name, count in dropped.items())})" if dropped else ""),
            "requests": f"{limits.answered} ({(limits.answered - answered) / seconds:.1f}/s)",
            "tokens": f"{limits.tokens:,}",
            "cost": f"{limits.cost:.4g}" if limits.cost else "",
            "left": "?" if left is None else _clock(left),
        }
        return {name: value for name, value in state.items() if value}


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
