"""A summary of `stats` as text with small histograms, for a terminal or a dataset card."""

from collections.abc import Mapping, Sequence
from typing import Any

from apo_trl.pairs.statistics.statistics import LENGTHS, MEASURES

__all__ = ["table"]

_NUMBERS = ("mean", "median", "p5", "p95", "min", "max")
_SHARES = "{identical:.1%} identical; chosen longer in {chosen_longer:.1%}, rejected longer in {rejected_longer:.1%}."
_ESTIMATED = "\nlevenshtein of {estimated:,} pairs: estimated from the first 50,000 characters that differ."
_HEAD = """\
How far apart the chosen and the rejected answers are (tokens: {tokens}).
{pairs:,} pairs. """
_AFTER = """\
Truncated to max_length={max_length} as in training ({truncation_mode}):
{prompt_fills_max_length:,} dropped because the prompt fills it, {identical_after_truncation:,} made identical.
The rest: """


def table(summary: Mapping[str, Any]) -> str:
    """Return a summary as text, with the numbers after truncation under those before."""
    if not summary["pairs"]:
        return "No pairs."
    parts = {"": summary["before"]}
    lines = [_HEAD.format(**summary) + _shares(summary["before"])]
    if (after := summary.get("after")) and after["pairs"]:
        parts["  after"] = after
        lines.append(_AFTER.format(**summary) + _shares(after))
    elif after:
        lines.append(f"Nothing is left after truncation to max_length={summary['max_length']}: every prompt fills it.")
    lines += ["", f"{'':<23}" + "".join(f" {head:>8}" for head in _NUMBERS) + "  how many pairs lie where"]
    for name, (meaning, edges) in MEASURES.items():
        form = ",.1f" if edges is LENGTHS else ",.3f"
        for label, part in parts.items():
            numbers = "".join(f" {part[name][number]:>8{form}}" for number in _NUMBERS)
            lines.append(f"{label or name:<23}{numbers}  {_bars(**part[name]['histogram'])}")
        lines.append(f"    {meaning}")
    return "\n".join(lines)


def _shares(part: Mapping[str, Any]) -> str:
    return (_SHARES + _ESTIMATED * bool(part["estimated"])).format(**part)


def _bars(edges: Sequence[float], counts: Sequence[int]) -> str:
    """Draw the bins from the first to the last filled one, between their edges."""
    filled = [index for index, count in enumerate(counts) if count]
    first, last, top = filled[0], filled[-1], max(counts)
    bars = "".join("▁▂▃▄▅▆▇█"[(8 * count - 1) // top] if count else " " for count in counts[first : last + 1])
    low, high = (f"{edge:,.0f}" if edge >= 10 else f"{edge:.2g}" for edge in (edges[first], edges[last + 1]))
    return f"{low} {bars} {high}"
