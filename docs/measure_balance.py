"""Measure how much longer a training step takes than with equal numbers of tokens in all ranks, drawn and balanced.

    python docs/measure_balance.py [--rows 20000] [--max_length 1024] [--seed 0]

Lengths are drawn at random, about as long as UltraFeedback's. Each number is the tokens of the fullest rank over the
mean of all ranks: per micro-step, if ranks wait for each other there (FSDP, ZeRO-3), and per optimizer step.
"""

import argparse

import numpy as np
from torch.utils.data import SequentialSampler

from apo_trl.datasets.balancing import BalancedSampler

RANKS, PAIRS, MICRO_STEPS = (4, 8, 16), (2, 8), (1, 4)


def draw_lengths(rows: int, max_length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the distinct tokens of each pair, and those of its prompt."""
    random = np.random.default_rng(seed)
    prompt = np.minimum(random.lognormal(np.log(90), 1.0, rows), max_length // 2)
    topic = random.normal(0, 0.5, (rows, 1))  # both completions of a prompt tend to be long, or short
    completions = np.exp(np.log(250) + topic + random.normal(0, 0.5, (rows, 2)))
    kept = np.minimum(completions, max_length - prompt[:, None])
    return (prompt + kept.sum(1)).astype(int), prompt.astype(int)


def fullest_over_mean(tokens: np.ndarray, order: list[int], pairs: int, ranks: int, steps: int) -> tuple[float, float]:
    """Compute the tokens of the fullest rank over the mean: per micro-step, and per optimizer step."""
    whole = len(order) - len(order) % (pairs * ranks * steps)
    cells = tokens[order[:whole]].reshape(-1, steps, ranks, pairs).sum(3)
    sums = cells.sum(1)
    return cells.max(2).sum() / cells.mean(2).sum(), sums.max(1).sum() / sums.mean(1).sum()


def measure(tokens: np.ndarray, prompt_tokens: np.ndarray, pairs: int, ranks: int, steps: int) -> list[float]:
    """Compute fullest over mean, per micro-step and per optimizer step: first as drawn, then balanced."""
    drawn = SequentialSampler(tokens)
    sampler = BalancedSampler(drawn, tokens, prompt_tokens, batch_size=pairs, processes=ranks, accumulation=steps)
    return [
        value for order in (drawn, sampler) for value in fullest_over_mean(tokens, list(order), pairs, ranks, steps)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000, help="number of pairs")
    parser.add_argument(
        "--max_length", type=int, default=1024, help="maximum number of tokens of prompt and completion"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the lengths")
    options = parser.parse_args()
    tokens, prompt_tokens = draw_lengths(options.rows, options.max_length, options.seed)
    print(
        "| ranks | pairs | micro-steps | per micro-step: drawn | balanced | gain | per step: drawn | balanced | gain |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for ranks in RANKS:
        for pairs in PAIRS:
            for steps in MICRO_STEPS:
                before, sum_before, after, sum_after = measure(tokens, prompt_tokens, pairs, ranks, steps)
                cells = [before, after, before / after, sum_before, sum_after, sum_before / sum_after]
                print(f"| {ranks} | {pairs} | {steps} | {' | '.join(f'{value:.2f}' for value in cells)} |")


if __name__ == "__main__":
    main()
