"""The progress of a run on standard error: live in a terminal, else a line now and then. Never a model's text."""

import asyncio
import contextlib
import datetime
import sys
import time
from collections import Counter
from collections.abc import Iterator

from rich import progress
from rich.console import Console, Group
from rich.live import Live

from apo_trl.pairs.llm.limits import Budget

__all__ = ["Progress"]

_EVERY = 30.0  # seconds between log lines


class Progress:
    """Counts rows as they end, and shows the counts, the requests and the time left."""

    def __init__(self, total: int) -> None:
        self._outcomes: Counter[str] = Counter()
        self._console = Console(stderr=True, force_terminal=sys.stderr.isatty())
        self._bar = progress.Progress(progress.BarColumn(), console=self._console)
        self._bar.add_task("", total=total)
        self._task = self._bar.tasks[0]
        self._limits: Budget | None = None
        self._began = time.monotonic(), 0  # when the first request was about to be sent, and the rows until then

    def ended(self, reason: str) -> None:
        """Count a row: kept if `reason` is empty, else dropped."""
        self._outcomes[reason or "kept"] += 1
        self._bar.advance(self._task.id)
        if not self._limits or not self._limits.answered:
            self._began = time.monotonic(), self._outcomes.total()

    def say(self, line: str) -> None:
        """Print a line that stays, above the live display if there is one."""
        self._console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)

    @contextlib.contextmanager
    def showing(self, limits: Budget) -> Iterator[None]:
        """Show the progress until the block ends, then print it once more as one line."""
        self._limits, self._began = limits, (time.monotonic(), self._outcomes.total())

        def screen() -> Group:
            return Group(self._bar, *self._facts(limits))

        # Refreshed by a task and not by rich's thread, since rows are counted in this thread.
        live = Live(get_renderable=screen, console=self._console, auto_refresh=False, transient=True)
        task = asyncio.get_running_loop().create_task(self._refresh(limits, live))
        try:
            with live:
                yield
        finally:
            task.cancel()
            self.say("; ".join(self._facts(limits)))

    async def _refresh(self, limits: Budget, live: Live) -> None:
        logged = (0.0, 0)
        while True:
            await asyncio.sleep(0.25 if self._console.is_terminal else _EVERY)
            live.refresh()
            if not self._console.is_terminal and logged != (state := (self._task.completed, limits.answered)):
                logged = state
                self.say("; ".join(self._facts(limits)))

    def _facts(self, limits: Budget) -> Iterator[str]:
        task, kept = self._task, self._outcomes["kept"]
        reasons = ", ".join(f"{count} {reason}" for reason, count in self._outcomes.most_common() if reason != "kept")
        yield f"rows {task.completed} of {task.total}"
        yield f"kept {kept}"
        yield f"dropped {self._outcomes.total() - kept}" + (reasons and f" ({reasons})")
        yield f"requests {limits.answered} ({limits.answered / max(task.elapsed or 0, 1e-9):.1f}/s)"
        yield f"tokens {limits.tokens:,}"
        if limits.cost:
            yield f"cost {limits.cost:.4g}"
        began, cached = self._began
        if 0 < (done := task.completed - cached) < (task.total or 0) - cached:
            # Not rich's estimate, of the latest rows: those of one batch end together.
            left = (time.monotonic() - began) / done * ((task.total or 0) - task.completed)
            yield f"left {datetime.timedelta(seconds=round(left))}"
