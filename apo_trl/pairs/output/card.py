"""The dataset card: what the pairs are, how they came about, which were dropped and why, and how far apart they are."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from apo_trl.pairs.config.settings import METHODS
from apo_trl.pairs.statistics.table import table
from apo_trl.pairs.text.filters import REVISION_REASONS

__all__ = ["REASONS", "card"]

_SHOWN = 4000  # characters of a text in the example
_REPLY = {
    "truncated": "the answer did not come to its end within max_tokens",
    "filtered": "the server's content filter cut the answer",
    "unfinished": "the server says that the answer did not come to its end",
    "empty": "the answer is empty",
    "error": "the request failed after all tries; it is asked again by the next run",
}
REASONS = {
    **{
        f"{role}_{name}": f"{role}: {text}"
        for role in ("policy", "reviser", "stronger")
        for name, text in _REPLY.items()
    },
    **REVISION_REASONS,
    "judge_error": f"judge: {_REPLY['error']}",
    "judge_invalid": "the judge gave no verdict that can be read, even when asked again",
    "tie": "the judge finds the answers equally good, or their scores too close",
    "disagreement": "the judge's verdict changes with the order in which the answers are shown",
    "malformed": "the reviser's reply has no revision that can be told from the rest, even when asked again",
    "stronger_refused": "the stronger model refuses to answer",
    "identical": "chosen and rejected are the same",
    "identical_answers": "all answers to be ranked are the same",
    "identical_after_truncation": "chosen and rejected are the same once cut to max_length",
    "prompt_fills_max_length": "the prompt alone fills max_length",
    "template_fails": "the tokenizer's chat template cannot render the conversation",
    "bad_row": "the row cannot be used as it is",
    "duplicate_prompt": "the same prompt stands in an earlier row",
    "duplicate_id": "another row has the same id",
    "not_asked": "the run stopped before the row was asked",
    "not_answered": "the row waits for the answers of a batch",
}

_CARD = """\
---
configs:
- config_name: default
  data_files:
  - split: train
    path: pairs.parquet
dataset_info:
- config_name: default
  splits:
  - name: train
    num_bytes: {size}
    num_examples: {pairs}
tags:
- preference
- trl
- apo
---

# Preference pairs: {method}

{kept:,} pairs in TRL's conversational format (`prompt`, `chosen`, `rejected`), built by
`apo-trl`: {what}. {complete}

Train on them with `apo-trl train RECIPE --dataset_name THIS_FOLDER`.

## How they were made

{settings}

{reasons}

## Requests

{requests}
{judge}
## How contrastive the pairs are

Token Jaccard and Levenshtein distance are the measures of the APO paper (arXiv 2408.06266).

```
{contrast}
```
{overlap}{example}"""


def card(report: Mapping[str, Any], example: Mapping[str, Any] | None, size: int) -> str:
    """Write the card of a report, with one pair as an example; `size` are the bytes of the Parquet file."""
    settings = "\n".join(
        f"- `{key}`: {json.dumps(value, ensure_ascii=False)}" for key, value in report["settings"].items()
    )
    complete = "" if report["complete"] else "**Not complete:** running the recipe again asks what is missing."
    return _CARD.format(
        method=report["method"],
        kept=report["kept"],
        pairs=report["kept"],  # without commas
        size=size,
        what=METHODS[report["method"]],
        complete=complete,
        settings=settings,
        reasons=_reasons(report),
        requests=_requests(report),
        judge=_judge(report.get("judge", {})),
        contrast=table(report["contrast"]),
        overlap=_overlap(report.get("overlap", {})),
        example=_example(example),
    )


def _reasons(report: Mapping[str, Any]) -> str:
    lines = [
        f"Of {report['asked']:,} prompts {report['kept']:,} became pairs"
        + (". The others were dropped:" if report["dropped"] else "."),
        "",
    ]
    if report["dropped"]:
        lines += ["| dropped | prompts | why | for example |", "|---|---:|---|---|"]
    for name, count in report["dropped"].items():
        ids = _ids(example["id"] for example in report["examples"][name])
        lines.append(f"| {name} | {count:,} | {REASONS[name]} | {ids} |")
    return "\n".join(lines)


def _requests(report: Mapping[str, Any]) -> str:
    lines = ["| role | requests | prompt tokens | answer tokens | cost |", "|---|---:|---:|---:|---:|"]
    for role, used in report["roles"].items():
        numbers = f"{used['requests']:,} | {used['prompt_tokens']:,} | {used['completion_tokens']:,}"
        lines.append(f"| {role} | {numbers} | {used['cost']:.4g} |")
    return "\n".join(lines)


def _judge(judge: Mapping[str, Any]) -> str:
    if not judge:
        return ""
    words = {
        "comparisons": "comparisons, each in both orders",
        "scores": "answers scored",
        "invalid": "without a readable verdict",
        "orders_agree": "both orders agree",
        "first_position_rate": "verdicts for the answer shown first (0.5: no bias)",
        "ties": "both orders say tie",
    }
    lines = [f"- {words[name]}: {_number(value)}" for name, value in judge.items()]
    return "\n## The judge\n\n" + "\n".join(lines) + "\n"


def _overlap(overlap: Mapping[str, Any]) -> str:
    if not overlap:
        return ""
    lines = [
        f"- {name}: {found['matches']:,} of its {found['prompts']:,} prompts' texts are among ours"
        + (f" ({_ids(found['ids'])})" if found["ids"] else "")
        for name, found in overlap.items()
    ]
    return "\n## Overlap with evaluation sets\n\n" + "\n".join(lines) + "\n"


def _example(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    shown = {
        side: [{**message, "content": _start(message["content"])} for message in row[side]]
        for side in ("prompt", "chosen", "rejected")
    }
    text = json.dumps(shown, ensure_ascii=False, indent=2)
    fence = "`" * (3 + text.count("```"))
    return f"\n## An example\n\n{fence}json\n{text}\n{fence}\n"


def _start(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ... ({len(text):,} characters)"


def _ids(names: Iterable[str]) -> str:
    return ", ".join(f"`{_cell(name)}`" for name in names)


def _number(value: float | None) -> str:
    if value is None:
        return "none"
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'")
