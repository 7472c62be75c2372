"""A summary of `stats` as text of about 100 columns, with small histograms, for a terminal or a dataset card."""

from collections.abc import Mapping, Sequence
from typing import Any

from apo_trl.pairs.statistics.statistics import LENGTHS, MEASURES

__all__ = ["table"]

_NUMBERS = ("mean", "median", "p5", "p95", "min", "max")

_HEAD = """\
How far apart the chosen and the rejected answers are (tokens: {tokens}).
{pairs:,} pairs. {shares}.
"""
_SIDES = "{identical:.1%} identical; chosen longer in {chosen_longer:.1%}, rejected longer in {rejected_longer:.1%}"
_AFTER = """\
Cut to max_length={max_length} as in training ({truncation_mode}):
{prompt_fills_max_length:,} lost because the prompt alone fills it, {identical_after_truncation:,} made identical.
What is left: {shares}.
"""


def table(summary: Mapping[str, Any]) -> str:
    """Lay out a summary as text of about 100 columns, with small histograms, for a terminal or a dataset card."""
    if not summary["pairs"]:
        return "No pairs."
    lines = [_HEAD.format(**summary, shares=_SIDES.format(**summary["before"])).rstrip()]
    parts = {"": summary["before"]}
    if summary.get("after", {}).get("pairs"):
        parts["  after"] = summary["after"]
        lines += [_AFTER.format(**summary, shares=_SIDES.format(**summary["after"])).rstrip()]
    elif "after" in summary:
        lines += [f"Nothing is left after cutting to max_length={summary['max_length']}: every prompt alone fills it."]
    lines += ["", f"{'':<23}" + "".join(f"{head:>9}" for head in _NUMBERS) + "  how many pairs lie where"]
    for name, (meaning, edges) in MEASURES.items():
        for label, part in parts.items():
            figures = part[name]
            form = ",.3f" if edges is not LENGTHS else ",.1f"
            numbers = "".join(f"{figures[number]:>9{form}}" for number in _NUMBERS)
            lines.append(f"{label or name:<23}{numbers}  {_bars(**figures['histogram'])}")
        lines.append(f"    {meaning}")
    return "\n".join(lines)


def _bars(edges: Sequence[float], counts: Sequence[int]) -> str:
    """Draw the bins from the first to the last that holds anything, between their edges."""
    held = [at for at, count in enumerate(counts) if count]
    first, last, top = held[0], held[-1], max(counts)
    bars = "".join("▁▂▃▄▅▆▇█"[(8 * count - 1) // top] if count else " " for count in counts[first : last + 1])
    low, high = (f"{edge:,.0f}" if edge >= 10 else f"{edge:.2g}" for edge in (edges[first], edges[last + 1]))
    return f"{low} {bars} {high}"
