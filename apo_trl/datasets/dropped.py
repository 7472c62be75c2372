"""The report of degenerate pairs, for datasets that have some."""

from collections import Counter

from accelerate.logging import get_logger

from apo_trl.errors import InputError

__all__ = ["report_dropped"]

logger = get_logger(__name__)


def report_dropped(dropped: Counter[str], total: int, name: str) -> None:
    """Warn of the number of dropped pairs for each reason; raise InputError if no pair is left."""
    counts = ", ".join(f"{count} because {why}" for why, count in dropped.most_common() if count)
    if dropped.total() == total:
        raise InputError(
            f"All pairs of the {name} dataset are degenerate: {counts}. Check the data, or raise max_length."
        )
    logger.warning(
        f"Dropped {dropped.total()} of {total} pairs of the {name} dataset: {counts}. Set keep_degenerate_pairs=True "
        "in APOConfig to keep those that fit into max_length."
    )
