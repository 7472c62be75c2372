"""Time and memory of a step, stock TRL's padded batch and each distinct token once in turn, with the results compared.

A step is forward and backward of TRL's causal language model with its fused head, and a DPO loss over it. One process,
one model: what differs is only which of the two forwards is called.
"""

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .inputs import InputError
from .prefix_sharing import enable_prefix_sharing, pack

__all__ = ["SHAPES", "Row", "bench", "build_model", "collate", "random_rows", "step", "table"]


_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Shape(NamedTuple):
    """Random pairs: mean tokens of prompt and completions, the share that completions begin with in common, answers."""

    prompt: int
    completion: int
    shared: float = 0.0
    answers: int = 2


SHAPES = {
    "100 / 150 / 150": Shape(100, 150),
    "170 / 250 / 250": Shape(170, 250),
    "500 / 120 / 120": Shape(500, 120),
    "170 / 250 / 250, 30 % shared": Shape(170, 250, 0.3),
    "3 pairs of 3 ranked answers, 170 / 150": Shape(170, 150, 0.0, 3),
}


class Row(NamedTuple):
    """One line of the table: medians. `step_time` is stock TRL's over ours, `peak_memory` ours over stock TRL's."""

    name: str
    tokens_saved: float
    step_time: float
    peak_memory: float
    logps_differ: float
    gradients_differ: float


def bench(
    *,
    files: list[str],
    model: str | None = None,
    layers: int | None = None,
    device: str | None = None,
    dtype: str = "float32",
    checkpointing: bool = False,
    batch_size: int = 2,
    repeats: int = 5,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Measure every shape, the demo's pairs and the pairs of each file.

    Raises InputError for a model or a file that cannot be used.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    network, tokenizer = build_model(model, layers, device, dtype, checkpointing)
    fused = network.forward
    sharing = enable_prefix_sharing(network)
    if sharing.reason:
        raise InputError(f"There is nothing to measure: {sharing.reason}.")
    rows = []
    for name, batches in _data(files, tokenizer, network.config.vocab_size, batch_size):
        row = _measure(name, [_to(batch, device) for batch in batches], network, fused, repeats)
        say(f"{row.name}: {row.tokens_saved:.2f}x fewer tokens, {row.step_time:.2f}x faster")
        rows.append(row)
    return rows


def table(rows: list[Row]) -> str:
    """Lay out the rows for a terminal or a page."""
    lines = [
        "| prompt / chosen / rejected | tokens saved | step time | of the bound | memory | log-probs | gradients |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row.name} | {row.tokens_saved:.2f}x | {row.step_time:.2f}x | {row.step_time / row.tokens_saved:.2f} | "
        f"{row.peak_memory:.2f} | {row.logps_differ:.0e} | {row.gradients_differ:.0e} |"
        for row in rows
    ]
    return "\n".join(lines)


def build_model(model: str | None, layers: int | None, device: str, dtype: str, checkpointing: bool) -> tuple[Any, Any]:
    """Give a model of a shape (SmolLM2-135M's by default), random weights and TRL's fused head, and its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.utils import add_fused_lm_head

    from .demo import smollm2

    place = model or str(smollm2())
    try:
        config = AutoConfig.from_pretrained(place)
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise InputError(f"--model {place} cannot be loaded: {str(error).splitlines()[0]}") from error
    if layers:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    torch.manual_seed(0)  # the weights are random: their values cost no time
    network = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).to(device).train()
    if checkpointing:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    add_fused_lm_head(network)
    return network, tokenizer


def _data(
    files: list[str], tokenizer: Any, vocabulary: int, size: int
) -> Iterator[tuple[str, list[dict[str, Tensor]]]]:
    for name, shape in SHAPES.items():
        generator = torch.Generator().manual_seed(0)
        yield name, [collate(random_rows(shape, vocabulary, size, generator)) for _ in range(3)]
    from .data.reading import read_pairs
    from .data.tokens import encode_pair
    from .demo import PAIRS

    for name in [str(PAIRS / "train.jsonl"), *files]:
        pairs = [encode_pair(tokenizer, row) for row in itertools.islice(read_pairs(name), 6 * size)]
        groups = [pairs[at : at + size] for at in range(0, len(pairs), size)]
        batches = [collate([(p, c) for p, c, _ in group] + [(p, r) for p, _, r in group]) for group in groups]
        yield ("the demo's pairs" if name.startswith(str(PAIRS)) else Path(name).name), batches


def random_rows(
    shape: Shape, vocabulary: int, size: int, generator: torch.Generator
) -> list[tuple[list[int], list[int]]]:
    """Draw pairs of a shape as (prompt, completion): all chosen ones, then all rejected ones."""

    def tokens(mean: int) -> list[int]:
        low, high = round(0.7 * mean), round(1.3 * mean) + 1
        length = int(torch.randint(low, high, (), generator=generator))
        return list(torch.randint(0, vocabulary, (length,), generator=generator).tolist())

    chosen, rejected = [], []
    for _ in range(1 if shape.answers > 2 else size):
        prompt, start = tokens(shape.prompt), tokens(round(shape.completion * shape.shared))
        answers = [start + tokens(round(shape.completion * (1 - shape.shared))) for _ in range(shape.answers)]
        for better, worse in itertools.combinations(answers, 2):
            chosen.append((prompt, better))
            rejected.append((prompt, worse))
    return chosen + rejected


def collate(rows: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    """Pad rows on the right to a batch; every tensor has the shape (rows, longest)."""
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        mask[row, :end] = 1
        labels[row, len(prompt) : end] = ids[row, len(prompt) : end]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _to(batch: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    return {key: value.to(device) for key, value in batch.items()}


def _measure(name: str, batches: list[dict[str, Tensor]], network: Any, fused: Any, repeats: int) -> Row:
    paths = {"host": fused, "ours": network.forward}
    differ = [0.0, 0.0]
    for batch in batches[:1]:  # the first step of each also warms up
        found = {path: step(network, forward, batch) for path, forward in paths.items()}
        differ = [_furthest(found["host"][at], found["ours"][at]) for at in (0, 1)]
    ratios, peaks = [], []
    for _ in range(repeats):
        seconds, memory = {}, {}
        for path, forward in paths.items():  # in turn, so that what else the machine does meets both
            network.zero_grad()
            gc.collect()
            _start_memory(network.device.type)
            began = time.perf_counter()
            for batch in batches:
                step(network, forward, batch, keep=False)
            if network.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[path], memory[path] = time.perf_counter() - began, _peak_memory(network.device.type)
        ratios.append(seconds["host"] / seconds["ours"])
        peaks.append(memory["ours"] / memory["host"])
    layouts = [pack(**batch) for batch in batches]
    saved = sum(layout.padded_tokens for layout in layouts if layout) / sum(
        layout.computed_tokens for layout in layouts if layout
    )
    return Row(name, saved, statistics.median(ratios), statistics.median(peaks), *differ)


def step(network: Any, forward: Any, batch: dict[str, Tensor], keep: bool = True) -> Any:
    """Do a step of DPO against a reference of zeros; give log-probs and gradients where they are kept."""
    network.zero_grad()
    logps = forward(**batch, use_cache=False, fused_lm_head=True).log_probs
    chosen, rejected = logps.sum(dim=1).chunk(2)
    loss = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
    torch.autograd.backward(loss)
    if not keep:
        return None
    gradients = [weight.grad.clone() for weight in network.parameters() if weight.grad is not None]
    return logps.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def _furthest(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / (1 if one.dim() == 2 else other.abs().max()))


def _start_memory(device: str) -> None:
    """Begin to look for the peak."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif _CLEAR.exists():
        _CLEAR.write_text("5")  # Linux: the high-water mark starts anew


def _peak_memory(device: str) -> float:
    """Give the most that was held since, in bytes; nan where the system does not tell."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if not _CLEAR.exists():
        return float("nan")
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
