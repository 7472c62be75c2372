"""What training did to each pair: its log-ratios under a policy and a reference, one row a pair.

The forward is that of training: TRL's fused head, each distinct token of a batch once. Every model is scored by itself,
so that two need not fit into memory together; an adapter is its own reference once it is switched off.

Left out on purpose: a trainer. It would need a training set, and would average what this keeps apart.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from apo_trl.errors import InputError
from apo_trl.evaluation.intervals import mean_interval, wilson
from apo_trl.evaluation.scoring import pair_logps, tokenize_pairs
from apo_trl.io.files import atomic_write
from apo_trl.metrics import pair_metrics, regime
from apo_trl.models.loading import is_adapter, load_policy, pad_token

__all__ = ["evaluate", "read_split", "summarise", "table", "write_rows"]

_SHARES = ("accuracy", "chosen_up", "rejected_down", "separated", "displaced", "both_up")
_MEANS = ("chosen_logratio", "rejected_logratio", "margin")
_SHOWN = 10


def evaluate(
    model: str,
    dataset: str,
    *,
    reference: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
    device: str | None = None,
    dtype: str | None = None,
) -> list[dict[str, Any]]:
    """Score every pair of a dataset under a policy and its reference; the same call gives the same numbers.

    Args:
        model: The policy: the folder or hub name of a whole model, or the folder of an adapter.
        dataset: As `dataset_name` of training: a file, a folder or a hub name.
        reference: The model that the policy started from. Default: an adapter's base; a whole model needs it named.
        split: Default: "test" where there is one, else "train".
        limit: Only the first so many pairs.
        max_length: Cut each row's end as training does. Default: nothing is cut.
        batch_size: Pairs of a forward.
        device: Default: "cuda" where there is one, else "cpu".
        dtype: Default: "float32" on a CPU, else the checkpoint's own.

    Returns:
        For each pair, in the dataset's order, `id`; `chosen_logratio` and `rejected_logratio`, log pi/ref summed over
        the completion, in nats; the same `_per_token`; `margin`, their difference; `regime`, as `metrics.regime` names
        it; `chosen_logp` and `rejected_logp` of the policy, `ref_chosen_logp` and `ref_rejected_logp`; `chosen_tokens`
        and `rejected_tokens`, as many as were scored; and the texts `prompt`, `chosen` and `rejected`. Pairs that
        teach nothing are in it too; one whose prompt alone fills `max_length` is not.

    Raises:
        InputError: A model or the dataset cannot be used.
    """
    if reference is None and not is_adapter(model):
        raise InputError(
            f"--model {model} is a whole model, so what it started from is not known; name that with --reference."
        )
    rows = read_split(dataset, split, limit)
    policy, tokenizer = load_policy(model, device=device, dtype=dtype)
    pairs = tokenize_pairs(rows, tokenizer, max_length)
    scoring: dict[str, Any] = {"pad_token_id": pad_token(tokenizer), "max_length": max_length, "batch_size": batch_size}
    scores = [pair_logps(policy, pairs, **scoring, name="the policy")]
    if reference is None:
        with policy.disable_adapter():
            scores.append(pair_logps(policy, pairs, **scoring, name="its base model"))
    else:
        del policy
        other, _ = load_policy(reference, device=device, dtype=dtype, flag="--reference")
        words, needed = other.get_input_embeddings().weight.shape[0], len(tokenizer)
        if words < needed:
            raise InputError(
                f"--reference {reference} knows {words} tokens, the policy's tokenizer has {needed}; name the model"
                " that the policy started from."
            )
        scores.append(pair_logps(other, pairs, **scoring, name="the reference"))
    return [_row(pair, *logps) for pair, *logps in zip(pairs, *scores, strict=True)]


def read_split(dataset: str, split: str | None, limit: int | None = None) -> Any:
    """Load the split to be scored and check its rows, the first `limit` of them."""
    from apo_trl.datasets.preprocessing import check_dataset
    from apo_trl.io.readers import load_dataset_splits

    splits = load_dataset_splits(dataset, field="--dataset")
    name = split or ("test" if "test" in splits else "train")
    if name not in splits:
        raise InputError(f"--split: {dataset} has no split '{name}'; it has {', '.join(splits)}.")
    rows = splits[name]
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    if not len(rows):
        raise InputError(f"--dataset: {dataset} has no pairs in '{name}'; give it at least one.")
    check_dataset(rows, name, False)
    return rows


def _row(pair: Mapping[str, Any], policy: tuple[float, float], reference: tuple[float, float]) -> dict[str, Any]:
    row: dict[str, Any] = {"id": pair["id"]}
    limit = pair["max_length"]
    for at, side in enumerate(("chosen", "rejected")):
        count = len(pair[f"{side}_ids"])
        tokens = count if limit is None else min(count, limit - len(pair["prompt_ids"]))
        row[f"{side}_logratio"] = policy[at] - reference[at]
        row[f"{side}_logratio_per_token"] = row[f"{side}_logratio"] / max(1, tokens)
        row[f"{side}_logp"], row[f"ref_{side}_logp"], row[f"{side}_tokens"] = policy[at], reference[at], tokens
    row["margin"] = row["chosen_logratio"] - row["rejected_logratio"]
    row["regime"] = regime(row["chosen_logratio"], row["rejected_logratio"])
    return row | {side: pair[side] for side in ("prompt", "chosen", "rejected")}


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sum up the rows of `evaluate`.

    `means` (nats, with the normal approximation's interval) and `shares` (with Wilson's) each hold [value, low, high],
    95 %; `displaced` are the pairs whose chosen answer fell furthest although their margin is right.
    """
    sides = [torch.tensor([row[f"{side}_logratio"] for row in rows]) for side in ("chosen", "rejected")]
    ones = torch.ones(len(rows))
    shares = pair_metrics(*sides, chosen_lengths=ones, rejected_lengths=ones)
    shares["accuracy"] = (sides[0] > sides[1]).float()
    worst = sorted((row for row in rows if row["regime"] == "displaced"), key=lambda row: row["chosen_logratio"])
    return {
        "pairs": len(rows),
        "means": {name: list(mean_interval([row[name] for row in rows])) for name in _MEANS},
        "shares": {name: list(wilson(shares[name].sum().item(), len(rows))) for name in _SHARES},
        "displaced": [
            {name: row[name] for name in ("id", "chosen_logratio", "rejected_logratio")} for row in worst[:_SHOWN]
        ],
    }


def table(summary: Mapping[str, Any]) -> str:
    """Lay out a summary for the terminal."""
    lines = [f"{summary['pairs']:,} pairs" + " " * 24 + "95 % interval"]
    lines += [
        f"  {name:<20}{value:>+9.3f}   {low:>+9.3f} to {high:<+9.3f}".rstrip()
        for name, (value, low, high) in summary["means"].items()
    ]
    lines += [
        f"  {name:<20}{value:>9.0%}   {low:>9.0%} to {high:<9.0%}".rstrip()
        for name, (value, low, high) in summary["shares"].items()
    ]
    if summary["displaced"]:
        lines.append("Displaced most: the margin is right, and still the chosen answer fell.")
    lines += [
        f"  {row['id']:<20} chosen {row['chosen_logratio']:+.2f}, rejected {row['rejected_logratio']:+.2f}"
        for row in summary["displaced"]
    ]
    return "\n".join(lines)


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows as Parquet, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with atomic_write(path) as beside:
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), beside)
