"""The losses: pure functions of log-ratios, and the table of their names.

A log-ratio is log pi(y|x) - log pi_ref(y|x), summed over the tokens of one completion, in nats. At 0, the anchor,
policy and reference agree. Each function takes log-ratios of shape (pairs,) and returns one loss per pair, shape
(pairs,). Inputs below float32 are computed in float32. Different shapes raise ValueError instead of broadcasting.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["LOSSES", "PER_TOKEN_LOSSES", "apo_blend", "apo_down", "apo_down_norm", "apo_zero", "apo_zero_norm"]
__all__ += ["apply_loss", "pair_columns"]

# sigmoid(-x) and not 1 - sigmoid(x): in bfloat16 at x = 8 its slope is -3.36e-4 (true: -3.35e-4), the other's is 0.


def apo_zero(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """Pull chosen answers above the reference and rejected answers below it.

    APO-zero, equation 7 of arXiv:2408.06266 plus the constant 1 that TRL adds:
    `sigmoid(-beta * chosen) + sigmoid(beta * rejected)`. Use it if chosen answers beat the model. The result lies in
    (0, 2) and is exactly 1 at the anchor.
    """
    chosen, rejected = _as_floats(chosen_logratios, rejected_logratios)
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """Push rejected answers down by the margin, and chosen answers back to the reference or below it.

    APO-down, equation 8 of arXiv:2408.06266 plus the constant 1 that TRL adds:
    `sigmoid(beta * chosen) + sigmoid(-beta * (chosen - rejected))`. Use it if the model already beats the chosen
    answers. The result lies in (0, 2) and is exactly 1 at the anchor, and only the rejected answer is pushed there. A
    chosen answer is pushed down exactly if `|chosen| < |chosen - rejected|`.
    """
    chosen, rejected = _as_floats(chosen_logratios, rejected_logratios)
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))


def apo_zero_norm(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    *,
    beta: float,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
) -> Tensor:
    """Compute APO-zero of length-normalised log-ratios, so that long answers pull no harder.

    `apo_zero` of each log-ratio divided by its number of scored completion tokens, shape (pairs,), at least 1. Our
    extension, after the length-normalised DPO of Tulu 3 (arXiv:2411.15124, section 5). Beta is per token, about 50
    times that of a sum: Tulu 3 and LFM2 (arXiv:2511.23404) use 5.
    """
    chosen, rejected = _per_token(chosen_logratios, chosen_lengths), _per_token(rejected_logratios, rejected_lengths)
    return apo_zero(chosen, rejected, beta=beta)


def apo_down_norm(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    *,
    beta: float,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
) -> Tensor:
    """Compute APO-down of length-normalised log-ratios, with lengths and beta as in `apo_zero_norm`."""
    chosen, rejected = _per_token(chosen_logratios, chosen_lengths), _per_token(rejected_logratios, rejected_lengths)
    return apo_down(chosen, rejected, beta=beta)


def apo_blend(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float, chosen_wins: Tensor) -> Tensor:
    """Weight APO-zero and APO-down for each pair, by the probability that its chosen answer beats the model.

    `chosen_wins * apo_zero + (1 - chosen_wins) * apo_down`. `chosen_wins`, shape (pairs,), in [0, 1], is the
    probability that the chosen answer is better than the policy's own. Our extension: the paper chooses one loss for a
    whole dataset. Exactly `apo_zero` at 1 and `apo_down` at 0, and exactly 1 at the anchor.
    """
    zero = apo_zero(chosen_logratios, rejected_logratios, beta=beta)
    down = apo_down(chosen_logratios, rejected_logratios, beta=beta)
    wins = chosen_wins.to(zero)
    _check_shapes(zero, wins)
    return wins * zero + (1 - wins) * down


LOSSES: dict[str, Callable[..., Tensor]] = {
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "apo_zero_norm": apo_zero_norm,
    "apo_down_norm": apo_down_norm,
    "apo_blend": apo_blend,
}
"""Every loss of this package by its name in `loss_type`. A new loss is a function and a line here."""

PER_TOKEN_LOSSES = frozenset({"apo_zero_norm", "apo_down_norm", "sigmoid_norm", "ipo"})
"""The losses, TRL's included, of length-normalised log-ratios."""


def pair_columns(log_probs: Tensor, batch: Mapping[str, Tensor], ld_alpha: float | None) -> dict[str, Tensor]:
    """Compute log-ratios and lengths, each of shape (pairs,), of the log-probs of tokens in a batch of `DPOTrainer`."""
    scored = batch["completion_mask"][:, 1:]
    # Prompt-learning PEFT prepends virtual tokens to the outputs; the real ones are the last.
    logps = log_probs[:, -scored.size(1) :]
    chosen_lengths, rejected_lengths = scored.sum(dim=1).chunk(2)
    if ld_alpha is not None:
        shorter = torch.minimum(chosen_lengths, rejected_lengths).repeat(2).unsqueeze(1)
        logps = logps * torch.where(scored.cumsum(dim=1) > shorter, ld_alpha, 1.0)
    chosen_logps, rejected_logps = logps.sum(dim=1).chunk(2)
    return {
        "chosen_logratios": chosen_logps - batch["ref_chosen_logps"],
        "rejected_logratios": rejected_logps - batch["ref_rejected_logps"],
        "chosen_lengths": chosen_lengths,
        "rejected_lengths": rejected_lengths,
    }


def apply_loss(loss: Callable[..., Tensor], pairs: Mapping[str, Any], *, beta: float) -> Tensor:
    """Compute a loss of the columns that it takes, out of log-ratios, lengths and `chosen_wins` by their names."""
    parameters = inspect.signature(loss).parameters
    return loss(**{name: value for name, value in pairs.items() if name in parameters}, beta=beta)


def _as_floats(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    _check_shapes(chosen, rejected)
    dtype = torch.promote_types(torch.promote_types(chosen.dtype, rejected.dtype), torch.float32)
    return chosen.to(dtype), rejected.to(dtype)


def _per_token(logratios: Tensor, lengths: Tensor) -> Tensor:
    _check_shapes(logratios, lengths)
    return logratios.to(torch.promote_types(logratios.dtype, torch.float32)) / lengths.clamp(min=1)


def _check_shapes(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape:
        raise ValueError(f"Shapes must be equal, got {tuple(first.shape)} and {tuple(second.shape)}.")
