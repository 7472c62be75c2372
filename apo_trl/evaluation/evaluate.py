"""Log-ratios of each pair under a policy and a reference, by the forward of training.

The models are scored one after the other, so that two need not fit into memory together.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from apo_trl.datasets.preprocessing import normalise_datasets
from apo_trl.errors import InputError
from apo_trl.evaluation.intervals import mean_interval, wilson
from apo_trl.evaluation.provenance import described, read_record, trained_on
from apo_trl.evaluation.regimes import regime
from apo_trl.evaluation.scoring import pair_logps, tokenize_pairs
from apo_trl.io.files import atomic_write
from apo_trl.io.readers import load_dataset_splits
from apo_trl.metrics import regimes
from apo_trl.models.loading import find_model, is_adapter, load_config, load_policy, pad_token, read_adapter
from apo_trl.reference import base_change
from apo_trl.training.movement import hardly_moved, movement_of

__all__ = ["evaluate", "read_split", "summarise", "table", "write_rows"]

_SHARES = {
    "accuracy": "margin above 0",
    "chosen_up": "the chosen answer became likelier",
    "rejected_down": "the rejected answer became less likely",
    "separated": "both of these: what APO-zero is for",
    "displaced": "margin above 0, but the chosen answer less likely",
    "both_up": "both answers likelier",
}
_MEANS = {
    "chosen_logratio": "change of the chosen answer's log-prob, in nats",
    "rejected_logratio": "that of the rejected answer's",
    "margin": "chosen minus rejected",
}


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

    `model` is the folder of an adapter, or a whole model, which needs the `reference` that training started from, a
    model or an adapter. The default reference of an adapter is `ref` in its folder, which TRL saves if it was trained
    from another adapter, else its base. `dataset` is a file, a folder or a hub name, and `split` "test" by default if
    it exists. `max_length` truncates the end of each row as training does. The default of `device` is "cuda"
    if available, that of `dtype` float32 on a CPU, else the checkpoint's own.

    Returns:
        For each pair: `id`; `chosen_logratio` and `rejected_logratio`, log pi/ref summed over the completion, in nats;
        the same `_per_token`; their difference `margin`; the `regime`; the log-probs `chosen_logp` and `rejected_logp`
        of the policy, and `ref_...` of the reference; the numbers of scored tokens, `..._tokens`; the `dtype` of the
        models; whether the pair was `trained_on`, None if that is not known (`provenance`); and the texts.
        Degenerate pairs are included; a pair whose prompt alone fills `max_length` is skipped.
    """
    model = find_model(model, "--model")
    reference = reference or _reference_of(model)
    rows = read_split(dataset, split, limit)
    policy, tokenizer = load_policy(model, device=device, dtype=dtype)
    pairs = tokenize_pairs(rows, tokenizer, max_length)
    dtypes = [str(policy.dtype)]
    scoring = {"pad_token_id": pad_token(tokenizer), "batch_size": batch_size}
    _check_vocabulary(policy, pairs, f"--model: {model}")
    policy_logps = pair_logps(policy, pairs, **scoring, name="the policy")
    if reference is None:
        with policy.disable_adapter():
            reference_logps = pair_logps(policy, pairs, **scoring, name="its base model")
    else:
        del policy
        other, _ = load_policy(reference, device=device, dtype=dtype, flag="--reference")
        dtypes += [str(other.dtype)]
        _check_vocabulary(other, pairs, f"--reference: {reference}")
        reference_logps = pair_logps(other, pairs, **scoring, name="the reference")
    dtype = " and ".join(dict.fromkeys(dtypes)).replace("torch.", "")
    seen = trained_on(read_record(Path(model)), dataset, pairs)
    rows = [_row(*each) for each in zip(pairs, policy_logps, reference_logps, strict=True)]
    return [row | {"dtype": dtype, "trained_on": known} for row, known in zip(rows, seen, strict=True)]


def _reference_of(model: str) -> str | None:
    """Return the folder of an adapter's reference, or None if that is its base."""
    if not is_adapter(model):
        load_config(model, "--model")  # or there is no such model
        raise InputError(f"--reference: required, because {model} is a whole model. Set the model it started from.")
    if is_adapter(folder := str(Path(model, "ref"))):
        return folder
    if change := base_change(read_adapter(model, "--model")):
        raise InputError(f"--reference: required, because {change} of {model} changes its base. Set the one before.")
    return None


def _check_vocabulary(model: Any, pairs: Sequence[Mapping[str, Any]], fault: str) -> None:
    highest = max(max(pair[ids], default=0) for pair in pairs for ids in ("prompt_ids", "chosen_ids", "rejected_ids"))
    if highest >= (known := model.get_input_embeddings().weight.shape[0]):
        raise InputError(f"{fault} has {known} tokens, the pairs have token {highest}. Set a model of this tokenizer.")


def read_split(dataset: str, split: str | None, limit: int | None = None) -> Any:
    """Load a split and check its rows, the first `limit` of them."""
    splits = load_dataset_splits(dataset, field="--dataset")
    name = split or ("test" if "test" in splits else "train")
    if name not in splits or not len(splits[name]):
        raise InputError(f"--split: {dataset} has no pairs in '{name}'. Use one of {', '.join(splits)}.")
    return normalise_datasets(splits[name].select(range(len(splits[name]))[:limit]), name)


def _row(pair: Mapping[str, Any], policy: tuple[float, float], reference: tuple[float, float]) -> dict[str, Any]:
    row: dict[str, Any] = {"id": pair["id"]}
    for side, logp, ref_logp in zip(("chosen", "rejected"), policy, reference, strict=True):
        tokens = len(pair[f"{side}_ids"])
        row[f"{side}_logratio"] = logp - ref_logp
        row[f"{side}_logratio_per_token"] = row[f"{side}_logratio"] / max(1, tokens)
        row[f"{side}_logp"], row[f"ref_{side}_logp"], row[f"{side}_tokens"] = logp, ref_logp, tokens
    row["margin"] = row["chosen_logratio"] - row["rejected_logratio"]
    row["regime"] = regime(row["chosen_logratio"], row["rejected_logratio"])
    return row | {side: pair[side] for side in ("prompt", "chosen", "rejected")}


def summarise(rows: Sequence[Mapping[str, Any]], record: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Summarise the rows of `evaluate`; `record` is the run.json of the model, if it has one.

    Returns:
        `pairs`, their number; `described`, with what they are called; `dtype`; `means` in nats and `shares`, each as
        [value, low, high] with a 95 % interval (the normal approximation, Wilson); `displaced`, those ten displaced
        pairs whose chosen answers fell furthest; and `hardly_moved`, a sentence if that is so.
    """
    chosen, rejected = (np.array([row[f"{side}_logratio"] for row in rows]) for side in ("chosen", "rejected"))
    shares = regimes(chosen, rejected) | {"accuracy": chosen > rejected}
    worst = sorted((row for row in rows if row["regime"] == "displaced"), key=lambda row: row["chosen_logratio"])
    settings = record["settings"] if record else {}
    now = {"learning_rate": settings.get("learning_rate"), "steps": settings.get("max_steps")}
    return {
        "pairs": len(rows),
        "described": described([row["trained_on"] for row in rows]),
        "dtype": rows[0]["dtype"],
        "means": {name: list(mean_interval([row[name] for row in rows])) for name in _MEANS},
        "shares": {name: list(wilson(int(shares[name].sum()), len(rows))) for name in _SHARES},
        "displaced": [
            {name: row[name] for name in ("id", "chosen_logratio", "rejected_logratio")} for row in worst[:10]
        ],
        "hardly_moved": hardly_moved(movement_of(rows), **now),
    }


def table(summary: Mapping[str, Any]) -> str:
    """Return a summary as text for the terminal."""
    lines = [f"{summary['described']}, computed in {summary['dtype']}", " " * 33 + "95 % interval"]
    for group, style, meanings in (("means", "+9.3f", _MEANS), ("shares", "9.0%", _SHARES)):
        for name, (value, low, high) in summary[group].items():
            interval = f"{low:{style}} to {high:<{style}}"
            lines.append(f"  {name:<20}{value:{style}}   {interval:<22}  {meanings[name]}")
    if summary["hardly_moved"]:
        return "\n".join([*lines, summary["hardly_moved"]])
    if summary["displaced"]:
        lines.append("Displaced most: the margin is right, and still the chosen answer fell.")
    for row in summary["displaced"]:
        lines.append("  {id:<20} chosen {chosen_logratio:+.2f}, rejected {rejected_logratio:+.2f}".format(**row))
    return "\n".join(lines)


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the rows of `evaluate` as Parquet, complete or not at all."""
    with atomic_write(path) as part:
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), part)
