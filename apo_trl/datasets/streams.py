"""Streamed preference datasets: rows are normalised, and degenerate pairs dropped, as they arrive."""

import functools
from dataclasses import dataclass
from typing import Any

from accelerate.logging import get_logger

from apo_trl.config import has_option
from apo_trl.errors import InputError, InvalidRow
from apo_trl.io.rows import OTHER_FORMATS, degenerate_reason, normalise_row, row_form
from apo_trl.io.tokenization import encode_pair

__all__ = ["StreamError", "StreamFilter", "check_first_row", "check_settings", "normalise_stream"]

logger = get_logger(__name__)


class StreamError(InputError):
    """An invalid row of a stream, which only the process that reads it finds, and therefore prints."""

    everywhere = True


def check_settings(config: Any) -> None:
    """Raise InputError if the settings of a run rule out that it trains on a stream."""
    if config.max_steps <= 0:
        raise InputError("max_steps: required for a stream, whose length is unknown. Set the number of steps.")
    if has_option(config, "group_by_prompt"):
        raise InputError(
            "group_by_prompt: not supported for a stream. Set it to False, or load the dataset without streaming."
        )


def check_first_row(dataset: Any, name: str, needs_wins: bool) -> None:
    """Raise InputError if the first row of a stream is invalid or missing."""
    first = next(iter(dataset), None)
    if first is None:
        raise InputError(f"The {name} stream has no rows. Use one with at least one pair.")
    _normalise(first, 0, name=name, needs_wins=needs_wins, kind=InputError)


def normalise_stream(dataset: Any, name: str, needs_wins: bool, processor: Any) -> Any:
    """Return a stream whose rows are normalised as they arrive, and rendered, so that an error names the row."""
    first = next(iter(dataset))
    form, others = row_form(first), [column for column in OTHER_FORMATS if column in first]
    function = functools.partial(_normalise, name=name, form=form, needs_wins=needs_wins, processor=processor)
    return dataset.map(function, with_indices=True).remove_columns(others)


def _normalise(
    row: dict[str, Any],
    number: int,
    *,
    name: str,
    processor: Any = None,
    kind: type[InputError] = StreamError,
    **options: Any,
) -> dict[str, Any]:
    try:
        normal = normalise_row(row, **options)
        if processor is not None and "images" not in normal and not isinstance(normal["prompt"], str):
            encode_pair(processor, normal)
    except InvalidRow as error:
        raise kind(f"Row {number} of the {name} stream {error}.") from error
    except InputError as error:
        raise kind(f"Row {number} of the {name} stream: {error}") from error
    return normal


@dataclass
class StreamFilter:
    """Keep the pairs of a stream that are not degenerate by `degenerate_reason`, and warn at the first that is."""

    options: dict[str, Any]
    name: str
    warned: bool = False

    def __call__(self, row: dict[str, Any]) -> bool:
        """Return whether the row stays."""
        reason = degenerate_reason(row, **self.options)
        if reason and not self.warned:
            self.warned = True
            logger.warning(
                f"The {self.name} stream has degenerate pairs, which are dropped as they arrive (first: {reason}). Set "
                "keep_degenerate_pairs=True in APOConfig to keep them."
            )
        return reason is None
