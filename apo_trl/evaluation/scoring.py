"""Log-probs of preference pairs under one model, by the forward of training."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import tqdm

from apo_trl.errors import InputError
from apo_trl.io.completion import completion_text
from apo_trl.io.tokenization import encode_pair

__all__ = ["pair_logps", "tokenize_pairs"]


def pair_logps(
    model: Any, pairs: Sequence[Mapping[str, Any]], *, pad_token_id: int, batch_size: int = 8, name: str = "the model"
) -> list[tuple[float, float]]:
    """Compute the log-probs of the chosen and the rejected completion of each pair, summed over their tokens, in nats.

    `model` is one of `load_policy`, `pairs` have `prompt_ids`, `chosen_ids` and `rejected_ids`, and `name` is shown on
    the progress bar. The longest pairs come first, so that a lack of memory shows at once.
    """
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    collate = DataCollatorForPreference(pad_token_id=pad_token_id)
    lengths = [len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"])) for pair in pairs]
    order = sorted(range(len(pairs)), key=lambda index: (-lengths[index], index))
    logps: dict[int, tuple[float, float]] = {}
    with tqdm(total=len(order), desc=f"Log-probs of {name}", unit="pair", delay=2) as bar, torch.inference_mode():
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = {key: value.to(model.device) for key, value in collate([dict(pairs[at]) for at in indices]).items()}
            labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
            token_logps = model(**batch, labels=labels, use_cache=False, fused_lm_head=True).log_probs
            chosen, rejected = token_logps.double().sum(dim=1).chunk(2)  # all chosen answers come first
            logps |= zip(indices, zip(chosen.tolist(), rejected.tolist(), strict=True), strict=True)
            bar.update(len(indices))
    return [logps[index] for index in range(len(pairs))]


def tokenize_pairs(rows: Any, tokenizer: Any, max_length: int | None = None) -> list[dict[str, Any]]:
    """Tokenize preference rows for `pair_logps`, with `id` and the texts.

    The end of a row is truncated to `max_length` as in training; a row whose prompt alone fills it is skipped.
    """
    pairs = []
    for number, row in enumerate(rows, start=1):
        if row.get("images") or row.get("image"):
            raise InputError("--dataset: pairs with images are not supported. Use pairs of text.")
        try:
            prompt, chosen, rejected = encode_pair(tokenizer, row)
        except InputError as error:
            raise InputError(f"Row {number} (counted from 1): {error}") from error
        room = None if max_length is None else max_length - len(prompt)
        if room is None or room > 0:
            texts = {side: completion_text(row.get(side, "")) for side in ("prompt", "chosen", "rejected")}
            ids = {"prompt_ids": prompt, "chosen_ids": chosen[:room], "rejected_ids": rejected[:room]}
            pairs.append({"id": str(row.get("id") or f"row-{number}"), **texts, **ids})
    if not pairs:
        raise InputError(f"max_length: every prompt alone fills {max_length} tokens. Set a larger value.")
    return pairs
