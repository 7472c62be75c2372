"""The dataset card: what the pairs are, how they were made, which were dropped and why."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from apo_trl.pairs.config.settings import METHODS
from apo_trl.pairs.statistics.table import table
from apo_trl.pairs.text.filters import REVISION_REASONS

__all__ = ["REASONS", "card"]

_SHOWN = 4000  # characters of a text in the example, as card.jinja says
_REPLY = {
    "truncated": "the answer was cut at max_tokens",
    "filtered": "the server's content filter cut the answer",
    "unfinished": "the server reports that the answer is not complete",
    "empty": "the answer is empty",
    "error": "the request failed after all retries; the next run sends it again",
}
REASONS = {
    **{f"{role}_{end}": f"{role}: {why}" for role in ("policy", "reviser", "stronger") for end, why in _REPLY.items()},
    **REVISION_REASONS,
    "judge_error": f"judge: {_REPLY['error']}",
    "judge_invalid": "the judge gave no readable verdict, even after a repair request",
    "tie": "the judge finds the answers equally good, or their scores too close",
    "disagreement": "the judge's verdict changes with the order in which the answers are shown",
    "malformed": "the reviser's reply has no clear revision, even after a repair request",
    "stronger_refused": "the stronger model refuses to answer",
    "identical": "chosen and rejected are the same",
    "identical_answers": "all answers to be ranked are the same",
    "identical_after_truncation": "chosen and rejected are the same once cut to max_length",
    "prompt_fills_max_length": "the prompt alone fills max_length",
    "template_fails": "the tokenizer's chat template cannot render the conversation",
    "bad_row": "the row cannot be used as it is",
    "duplicate_prompt": "an earlier row has the same prompt",
    "duplicate_id": "another row has the same id",
    "not_asked": "the run stopped before this row",
    "not_answered": "the row waits for the answers of a batch",
}


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
