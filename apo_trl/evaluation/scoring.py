"""Log-probs of preference pairs under one model, by the forward of training."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import tqdm
from torch import Tensor

from apo_trl.errors import InputError
from apo_trl.io.messages import completion_text
from apo_trl.io.tokenization import encode_pair

__all__ = ["pair_logps", "tokenize_pairs"]


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


def _length(pair: Mapping[str, Any]) -> int:
    return len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))


def tokenize_pairs(rows: Any, tokenizer: Any, max_length: int | None = None) -> list[dict[str, Any]]:
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
            texts = {side: completion_text(row.get(side, "")) for side in ("prompt", "chosen", "rejected")}
            identity = str(row.get("id") or f"row-{number}")
            ids = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
            pairs.append({"id": identity, **texts, **ids, "max_length": max_length})
    if not pairs:
        raise InputError(f"max_length={max_length} is filled by every prompt alone; give a larger one.")
    return pairs
