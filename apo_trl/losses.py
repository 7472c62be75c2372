"""The losses, as pure functions of log-ratios, and the table that names them.

A log-ratio is log pi(y|x) - log pi_ref(y|x), summed over the tokens of one completion, in nats: 0 is the anchor,
where policy and reference agree. Every function here takes the log-ratios of `pairs` chosen and rejected completions,
shape (pairs,), and gives one loss for each pair, shape (pairs,): the caller takes the mean. Inputs below float32 are
computed in float32; float64 stays float64. Shapes that differ raise ValueError, since broadcasting would hide it.

The terms are written sigmoid(-x) and not 1 - sigmoid(x): in bfloat16 at x = 8 the second has slope 0, the first has
-3.36e-4 against a true -3.35e-4.

Left out on purpose: the other losses of TRL, which are TRL's.
"""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["LOSSES", "PER_TOKEN_LOSSES", "apo_blend", "apo_down", "apo_down_norm", "apo_zero", "apo_zero_norm"]


def apo_zero(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """Pull chosen answers above the reference and rejected answers below it.

    APO-zero, equation 7 of arXiv:2408.06266 plus the constant 1 that TRL adds:
    `sigmoid(-beta * chosen) + sigmoid(beta * rejected)`. Use it when chosen answers beat the model. Each term
    saturates on its own. Lies in (0, 2) and is exactly 1 at the anchor; swapping the arguments gives 2 minus it.
    """
    chosen, rejected = _as_floats(chosen_logratios, rejected_logratios)
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """Push rejected answers down through the margin, and chosen answers back to the reference or below it.

    APO-down, equation 8 of arXiv:2408.06266 plus the constant 1 that TRL adds:
    `sigmoid(beta * chosen) + sigmoid(-beta * (chosen - rejected))`. Use it when the model already beats the chosen
    answers. Lies in (0, 2) and is exactly 1 at the anchor, where only the rejected answer is pushed; a chosen answer is
    pushed down exactly where `|chosen| < |chosen - rejected|`.
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
    """Do what APO-zero does to the mean log-ratio of a token instead of the sum, so that long answers pull no harder.

    `apo_zero` of each log-ratio divided by the number of completion tokens that were scored on its side, shape
    (pairs,); a completion without tokens counts as one token long. Our extension, after the length-normalised DPO of
    Tulu 3 (arXiv:2411.15124, section 5); beta is per token here and about 50 times that of a sum: Tulu 3 and LFM2
    (arXiv:2511.23404) use 5.
    """
    return apo_zero(
        _per_token(chosen_logratios, chosen_lengths),
        _per_token(rejected_logratios, rejected_lengths),
        beta=beta,
    )


def apo_down_norm(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    *,
    beta: float,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
) -> Tensor:
    """Do what APO-down does to the mean log-ratio of a token instead of the sum.

    `apo_down` of each log-ratio divided by its number of scored completion tokens, as in `apo_zero_norm`, with beta on
    the same scale.
    """
    return apo_down(
        _per_token(chosen_logratios, chosen_lengths),
        _per_token(rejected_logratios, rejected_lengths),
        beta=beta,
    )


def apo_blend(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float, chosen_wins: Tensor) -> Tensor:
    """Choose between APO-zero and APO-down for each pair, by how likely its chosen answer beats the model.

    `chosen_wins * apo_zero + (1 - chosen_wins) * apo_down`, where `chosen_wins`, shape (pairs,), in [0, 1], is the
    probability that the chosen answer is better than what the policy itself would answer. Our extension: the paper
    chooses one of the two for a whole dataset. Exactly `apo_zero` at 1 and `apo_down` at 0; exactly 1 at the anchor.
    """
    zero = apo_zero(chosen_logratios, rejected_logratios, beta=beta)
    down = apo_down(chosen_logratios, rejected_logratios, beta=beta)
    wins = chosen_wins.to(zero)
    _same_shape(zero, wins)
    return wins * zero + (1 - wins) * down


LOSSES: dict[str, Callable[..., Tensor]] = {
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "apo_zero_norm": apo_zero_norm,
    "apo_down_norm": apo_down_norm,
    "apo_blend": apo_blend,
}
"""Every loss of this package by the name that `loss_type` takes."""

PER_TOKEN_LOSSES = frozenset({"apo_zero_norm", "apo_down_norm", "sigmoid_norm", "ipo"})
"""The losses, TRL's included, that look at log-ratios per token and not at their sums."""


def _as_floats(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    _same_shape(chosen, rejected)
    dtype = torch.promote_types(torch.promote_types(chosen.dtype, rejected.dtype), torch.float32)
    return chosen.to(dtype), rejected.to(dtype)


def _per_token(logratios: Tensor, lengths: Tensor) -> Tensor:
    _same_shape(logratios, lengths)
    return logratios.to(torch.promote_types(logratios.dtype, torch.float32)) / lengths.clamp(min=1)


def _same_shape(one: Tensor, other: Tensor) -> None:
    if one.shape != other.shape:
        raise ValueError(
            f"One value per pair is needed on both sides, got shapes {tuple(one.shape)} and {tuple(other.shape)}."
        )
