"""Streamed preference datasets: rows are checked, and degenerate pairs dropped, as they arrive."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from accelerate.logging import get_logger

from apo_trl.errors import InputError
from apo_trl.io.rows import validate_row

__all__ = ["StreamFilter", "check_streamed_row"]

logger = get_logger(__name__)


def check_streamed_row(row: dict[str, Any], number: int, *, name: str, needs_wins: bool) -> dict[str, Any]:
    """Return the row if it is valid, else raise InputError: to be mapped over a stream."""
    if problem := validate_row(row, needs_wins=needs_wins):
        raise InputError(f"Row {number} of the {name} stream {problem}.")
    return row


@dataclass
class StreamFilter:
    """Keep the pairs of a stream that are not degenerate, and warn at the first that is."""

    reason: Callable[[dict[str, Any]], str | None]
    name: str
    warned: bool = False

    def __call__(self, row: dict[str, Any]) -> bool:
        """Return whether the row stays."""
        reason = self.reason(row)
        if reason and not self.warned:
            self.warned = True
            logger.warning(
                f"The {self.name} stream has degenerate pairs, which are dropped as they arrive (first: {reason}). Set "
                "keep_degenerate_pairs=True in APOConfig to keep them."
            )
        return reason is None
