"""The dataset card: what the pairs are, how they were made, which were dropped and why."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from apo_trl.pairs.config.settings import METHODS
from apo_trl.pairs.statistics.table import table
from apo_trl.pairs.text.reasons import REASONS

__all__ = ["card"]

_SHOWN = 4000  # characters of a text in the example, as card.jinja says


def card(report: Mapping[str, Any], example: Mapping[str, Any] | None, size: int) -> str:
    """Render the card of a report, with one pair as an example; `size` is that of the Parquet file in bytes."""
    environment = Environment(undefined=StrictUndefined)  # Markdown: nothing to escape
    environment.filters["json"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.filters["cell"] = lambda text: " ".join(text.split()).replace("|", "\\|").replace("`", "'")
    sides = {
        side: [{**message, "content": message["content"][:_SHOWN]} for message in messages]
        for side, messages in (example or {}).items()
        if side in ("prompt", "chosen", "rejected")
    }
    shown = json.dumps(sides, ensure_ascii=False, indent=2) if sides else ""
    return environment.from_string((Path(__file__).parent / "card.jinja").read_text(encoding="utf-8")).render(
        report,
        size=size,
        what=METHODS[report["method"]],
        reasons=REASONS,
        contrast=table(report["contrast"]),
        example=shown,
        fence="`" * (3 + shown.count("```")),
    )
