"""What to change after a run that kept few pairs, or pairs that share almost nothing."""

from collections.abc import Mapping
from typing import Any

from apo_trl.pairs.config.settings import Settings
from apo_trl.pairs.text.reasons import REASONS, WAITING, remedy

__all__ = ["advice", "commonest"]

_FAR = 0.8  # of the longer answer's characters; of the pairs of GPT-4 that the APO paper published, 1 of 20 is as far


def commonest(dropped: Mapping[str, int]) -> str:
    """Return the most frequent reason of drops, without those that a further run removes, or an empty string."""
    return max((reason for reason in dropped if reason not in WAITING), key=dropped.__getitem__, default="")


def advice(report: Mapping[str, Any], settings: Settings) -> list[str]:
    """Return why fewer than half of the rows were kept, and whether most revisions are other answers, as sentences."""
    lines, kept, asked = [], report["kept"], report["asked"]
    asked -= kept and report["dropped"].get("no_revision", 0)  # a function leaves out rows on purpose
    if (reason := commonest(report["dropped"])) and 2 * kept < asked:
        count, why = report["dropped"][reason], REASONS[reason][0].removesuffix(".")
        lines.append(f"{count:,} of {asked:,} rows were dropped as {reason}: {why}. {remedy(reason, settings)}")
    far = report["contrast"]["before"].get("levenshtein_normalised", {}).get("histogram")
    if settings.method == "clair" and far:
        count = sum(n for edge, n in zip(far["edges"], far["counts"], strict=False) if edge >= _FAR)
        if 2 * count > kept:
            lines.append(
                f"{count:,} of {kept:,} revisions share almost nothing with the answer that they revise (edit distance "
                f"from {_FAR} on). Compare `chosen` and `rejected` in pairs.jsonl; a revision should be a small change."
            )
    return lines
