"""What training did to each pair: its log-ratios under a policy and a reference, one row a pair.

The forward is that of training: TRL's fused head, each distinct token of a batch once. Every model is scored by itself,
so that two need not fit into memory together; an adapter is its own reference once it is switched off.

Left out on purpose: a trainer. It would need a training set, and would average what this keeps apart.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import tqdm
from torch import Tensor

from .data.records import as_text
from .data.tokens import encode_pair
from .files import replacing
from .inputs import InputError
from .intervals import mean_interval, wilson
from .metrics import pair_metrics, regime

__all__ = [
    "encoded",
    "evaluate",
    "load_policy",
    "pad_token",
    "pair_logps",
    "read_split",
    "summarise",
    "table",
    "write_rows",
]

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
    if reference is None and not _is_adapter(model):
        raise InputError(
            f"--model {model} is a whole model, so what it started from is not known; name that with --reference."
        )
    rows = read_split(dataset, split, limit)
    policy, tokenizer = load_policy(model, device=device, dtype=dtype)
    pairs = encoded(rows, tokenizer, max_length)
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
    from .dataset import check_dataset
    from .train import load_named

    splits = load_named(dataset, field="--dataset")
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


def load_policy(
    name: str, *, device: str | None = None, dtype: str | None = None, flag: str = "--model"
) -> tuple[Any, Any]:
    """Load a whole model or an adapter over its base, with TRL's fused head, ready to score, and its tokenizer."""
    import transformers
    from peft import AutoPeftModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    from .demo import local_model
    from .prefix_sharing import enable_prefix_sharing

    name = local_model(name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("float32" if device == "cpu" else "auto")
    adapter = _is_adapter(name)
    kind = AutoPeftModelForCausalLM if adapter else transformers.AutoModelForCausalLM
    try:
        model = kind.from_pretrained(name, dtype=dtype, device_map={"": device}).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(_tokenizer_of(name, model))
    except Exception as error:  # OSError, ValueError, SafetensorError, ...: whatever a missing or damaged model raises
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{flag} {name} cannot be loaded: {lines[0][:200].rstrip('.;:')}.") from error
    add_fused_lm_head(model.get_base_model() if adapter else model)
    enable_prefix_sharing(model)
    return model, tokenizer


def pair_logps(
    model: Any,
    pairs: Sequence[Mapping[str, Any]],
    *,
    pad_token_id: int,
    max_length: int | None = None,
    batch_size: int = 8,
    name: str = "the model",
) -> list[tuple[float, float]]:
    """Give the log-probs of the chosen and the rejected completion of each pair, summed over their tokens, in nats.

    `model` is as `load_policy` gives it, a pair a mapping with `prompt_ids`, `chosen_ids` and `rejected_ids`. The
    longest pairs come first, so that what does not fit into memory shows at once.
    """
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    collate = DataCollatorForPreference(pad_token_id=pad_token_id, max_length=max_length)
    order = sorted(range(len(pairs)), key=lambda at: (-_length(pairs[at]), at))
    found: dict[int, tuple[float, float]] = {}
    with tqdm(total=len(order), desc=f"Log-probs of {name}", unit="pair", delay=2) as bar, torch.inference_mode():
        for first in range(0, len(order), batch_size):
            places = order[first : first + batch_size]
            batch = {key: value.to(model.device) for key, value in collate([dict(pairs[at]) for at in places]).items()}
            chosen, rejected = _completions(model, batch).tolist()
            found |= zip(places, zip(chosen, rejected, strict=True), strict=True)
            bar.update(len(places))
    return [found[at] for at in range(len(pairs))]


def _completions(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Give the summed log-probs of a batch, shape (2, pairs): chosen, then rejected."""
    labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
    logps = model(**batch, labels=labels, use_cache=False, fused_lm_head=True).log_probs
    return torch.stack(logps.double().sum(dim=1).chunk(2))


def _is_adapter(name: str) -> bool:
    return (Path(name) / "adapter_config.json").is_file()


def _tokenizer_of(name: str, model: Any) -> str:
    if (Path(name) / "tokenizer_config.json").is_file() or not _is_adapter(name):
        return name
    return str(model.peft_config["default"].base_model_name_or_path)


def pad_token(tokenizer: Any) -> int:
    """Give what short rows are filled up with, where nothing looks at it."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def _length(pair: Mapping[str, Any]) -> int:
    return len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))


def encoded(rows: Any, tokenizer: Any, max_length: int | None = None) -> list[dict[str, Any]]:
    """Give the tokens of preference rows, as `pair_logps` takes them, with `id` and the texts.

    A row whose prompt alone fills `max_length` is left out. Raises InputError for one with images, or that the chat
    template cannot render, and where no row is left.
    """
    pairs = []
    for number, row in enumerate(rows, start=1):
        if row.get("images") or row.get("image"):
            raise InputError("--dataset: pairs with images cannot be evaluated here; take those of text.")
        try:
            prompt, chosen, rejected = encode_pair(tokenizer, row)
        except InputError as error:
            raise InputError(f"Row {number} (counted from 1): {error}") from error
        if max_length is None or len(prompt) < max_length:
            texts = {side: as_text(row.get(side, "")) for side in ("prompt", "chosen", "rejected")}
            identity = str(row.get("id") or f"row-{number}")
            ids = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
            pairs.append({"id": identity, **texts, **ids, "max_length": max_length})
    if not pairs:
        raise InputError(f"max_length={max_length} is filled by every prompt alone; give a larger one.")
    return pairs


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

    with replacing(path) as beside:
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), beside)
