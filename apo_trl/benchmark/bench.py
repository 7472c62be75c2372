"""Time and memory of a step, TRL's padded batches and ours in turn, with the results compared.

A step is forward and backward of TRL's causal language model with its fused head, and a DPO loss over it. One process,
one model: what differs is only which of the two forwards is called.
"""

import contextlib
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apo_trl.errors import InputError
from apo_trl.prefix_sharing import PrefixSharing, enable_prefix_sharing, pack
from apo_trl.prefix_sharing.sdpa import without_cudnn

__all__ = ["SHAPES", "Row", "bench", "build_model", "collate", "layout_times", "random_rows", "step", "table"]


_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Shape(NamedTuple):
    """Random pairs: mean tokens of prompt and completions, the share that completions begin with in common, answers.

    `prompts` is the number of prompts of a batch, by default that of the benchmark.
    """

    prompt: int
    completion: int
    shared: float = 0.0
    answers: int = 2
    prompts: int | None = None


SHAPES = {
    "100 / 150 / 150": Shape(100, 150),
    "170 / 250 / 250": Shape(170, 250),
    "500 / 120 / 120": Shape(500, 120),
    "170 / 250 / 250, 30 % shared": Shape(170, 250, 0.3),
    "3 pairs of 3 ranked answers, 170 / 150": Shape(170, 150, 0.0, 3, 1),
}

# Public shapes of models, for rows of models that are too large to be made by default.
NETWORKS: dict[str, dict[str, Any]] = {
    "1.7B": {
        "model_type": "qwen3", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "8B": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    },
}  # fmt: skip


class Case(NamedTuple):
    """One benchmark row with a built-in model: its name in `NETWORKS`, layers, random pairs, and number of batches."""

    network: str
    shape: Shape
    layers: int | None = None
    batches: int = 1
    vocab_size: int | None = None


WIDE = {
    "one layer of 1.7B, bf16, 8 pairs, 170 / 250 / 250": Case("1.7B", Shape(170, 250, prompts=8), 1, vocab_size=1000)
}
"""A row for CPUs: wide layers, as models for GPUs have them, without a vocabulary that would hide them."""

LARGE = {
    "1.7B, 16 pairs, 170 / 250 / 250": Case("1.7B", Shape(170, 250, prompts=16), batches=2),
    "8B, 8 pairs, 1000 / 500 / 500": Case("8B", Shape(1000, 500, prompts=8)),
    "8B, 4 ranked answers to 4 prompts, 2000 / 500": Case("8B", Shape(2000, 500, 0.0, 4, 4)),
}
"""Rows for GPUs; `--checkpointing` for those of 8B."""


class Row(NamedTuple):
    """One line of the table: medians.

    `step_time` is stock TRL's over ours, `peak_memory` ours over stock TRL's, `error` the mean distance of our
    log-probs from float32 over that of stock TRL's. `kernel` names our attention and TRL's.
    """

    name: str
    tokens_saved: float
    step_time: float
    peak_memory: float
    logps_differ: float
    gradients_differ: float
    error: float
    kernel: str
    seconds: float


def bench(
    *,
    files: list[str],
    model: str | None = None,
    layers: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    checkpointing: bool = False,
    batch_size: int = 2,
    repeats: int = 5,
    attention: str = "sdpa",
    only: str | None = None,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Measure every shape, the demo's pairs and the pairs of each file; on CUDA without a model, the rows of `LARGE`.

    Raises InputError for a model or a file that cannot be used.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[Row] = []

    def measure(named_batches: Any, network: Any) -> None:
        fused = network.forward
        sharing = enable_prefix_sharing(network)
        if sharing.reason:
            raise InputError(f"There is nothing to measure: {sharing.reason}.")
        for name, batches in named_batches:
            if only is None or only in name:
                batches = [_to(batch, device) for batch in batches]
                row = _measure(name, batches, network, fused, sharing, repeats)
                say(
                    f"{row.name}: {row.tokens_saved:.2f}x fewer tokens, {row.step_time:.2f}x faster "
                    f"({row.seconds:.2f} s a step; {row.kernel})"
                )
                rows.append(row)

    built = (device, checkpointing, attention)
    if device.startswith("cuda") and model is None:
        cases = LARGE
    else:
        cases = WIDE if model is None else {}
        network, tokenizer = build_model(model, layers, dtype or "float32", *built)
        measure(_data(files, tokenizer, network.config.vocab_size, batch_size), network)
    for key, named in itertools.groupby(cases.items(), _network):
        wanted = [(name, case) for name, case in named if only is None or only in name]
        if wanted:
            case = wanted[0][1]
            _free(device)
            network = build_network(key, layers or case.layers, dtype or "bfloat16", *built, case.vocab_size)
            measure([(name, _random_batches(case, network.config.vocab_size)) for name, case in wanted], network)
    return rows


def _network(item: tuple[str, Case]) -> str:
    return item[1].network


def _random_batches(case: Case, vocabulary: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [collate(random_rows(case.shape, vocabulary, 1, generator)) for _ in range(case.batches)]


def table(rows: list[Row]) -> str:
    """Lay out the rows for a terminal or a page."""
    lines = [
        "| prompt / chosen / rejected | tokens saved | step time | of the bound | memory | log-probs | gradients "
        "| error |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row.name} | {row.tokens_saved:.2f}x | {row.step_time:.2f}x | {row.step_time / row.tokens_saved:.2f} | "
        f"{row.peak_memory:.2f} | {row.logps_differ:.0e} | {row.gradients_differ:.0e} | {row.error:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def layout_times(repeats: int = 9) -> dict[str, float]:
    """Return the median time to build the layout of a batch on the CPU, in milliseconds, for two batch sizes."""
    times = {}
    for rows, length in ((16, 2000), (64, 4000)):
        generator = torch.Generator().manual_seed(0)
        batch = collate(random_rows(Shape(length // 2, length // 2), 32_000, rows // 2, generator))
        found = []
        for _ in range(repeats):
            began = time.perf_counter()
            pack(**batch)
            found.append(1000 * (time.perf_counter() - began))
        times[f"{rows} rows of {length} tokens"] = statistics.median(found)
    return times


def build_model(
    model: str | None, layers: int | None, dtype: str, device: str, checkpointing: bool, attention: str = "sdpa"
) -> tuple[Any, Any]:
    """Build a model of a shape (SmolLM2-135M's by default), random weights and TRL's fused head, and its tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    from apo_trl.models.packaged import smollm2

    place = model or str(smollm2())
    try:
        config = AutoConfig.from_pretrained(place)
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise InputError(f"--model {place} cannot be loaded: {str(error).splitlines()[0]}") from error
    return _build(config, layers, dtype, device, checkpointing, attention), tokenizer


def build_network(
    name: str, layers: int | None, dtype: str, device: str, checkpointing: bool, attention: str, vocab_size: int | None
) -> Any:
    """Build a model of a shape of `NETWORKS`, with random weights and TRL's fused head."""
    from transformers import AutoConfig

    shape = NETWORKS[name] | ({"vocab_size": vocab_size} if vocab_size else {})
    config = AutoConfig.for_model(**shape, max_position_embeddings=8192)
    return _build(config, layers, dtype, device, checkpointing, attention)


def _build(config: Any, layers: int | None, dtype: str, device: str, checkpointing: bool, attention: str) -> Any:
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    if layers:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    torch.manual_seed(0)  # the weights are random: their values cost no time
    with torch.device(device):
        network = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation=attention)
    network.train()
    if checkpointing:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    add_fused_lm_head(network)
    return network


def _data(
    files: list[str], tokenizer: Any, vocabulary: int, size: int
) -> Iterator[tuple[str, list[dict[str, Tensor]]]]:
    for name, shape in SHAPES.items():
        generator = torch.Generator().manual_seed(0)
        yield name, [collate(random_rows(shape, vocabulary, size, generator)) for _ in range(3)]
    from apo_trl.io.readers import read_pairs
    from apo_trl.io.resources import DEMO_PAIRS
    from apo_trl.io.tokenization import encode_pair

    for name in [str(DEMO_PAIRS / "train.jsonl"), *files]:
        pairs = [encode_pair(tokenizer, row) for row in itertools.islice(read_pairs(name), 6 * size)]
        groups = [pairs[at : at + size] for at in range(0, len(pairs), size)]
        batches = [collate([(p, c) for p, c, _ in group] + [(p, r) for p, _, r in group]) for group in groups]
        yield ("the demo's pairs" if name.startswith(str(DEMO_PAIRS)) else Path(name).name), batches


def random_rows(
    shape: Shape, vocabulary: int, size: int, generator: torch.Generator
) -> list[tuple[list[int], list[int]]]:
    """Draw pairs of a shape as (prompt, completion): all chosen ones, then all rejected ones."""

    def tokens(mean: int) -> list[int]:
        low, high = round(0.7 * mean), round(1.3 * mean) + 1
        length = int(torch.randint(low, high, (), generator=generator))
        return list(torch.randint(0, vocabulary, (length,), generator=generator).tolist())

    chosen, rejected = [], []
    for _ in range(shape.prompts or size):
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


def _measure(
    name: str, batches: Sequence[dict[str, Tensor]], network: Any, fused: Any, sharing: PrefixSharing, repeats: int
) -> Row:
    device = network.device.type
    stock: dict[str, Any] = {"": contextlib.nullcontext}
    if device == "cuda" and network.config._attn_implementation == "sdpa":  # the better of two is stock TRL's best
        stock = {"cuDNN allowed": contextlib.nullcontext, "without cuDNN": without_cudnn}
    first = next(iter(stock))

    def run(path: str, batch: dict[str, Tensor]) -> None:
        with stock.get(path, contextlib.nullcontext)():
            step(network, network.forward if path == "ours" else fused, batch, keep=False)

    paths = [*stock, "ours"]
    expected = step(network, fused, batches[0])
    got = step(network, network.forward, batches[0])
    differ = [_furthest(expected[at], got[at]) for at in (0, 1)]
    del expected, got
    error = _error(network, fused, batches[0])
    for path in paths:  # warm up, and build what is built for each shape; the first batch has been there
        for batch in batches if path not in (first, "ours") else batches[1:]:
            run(path, batch)
    seconds: dict[str, list[float]] = {path: [] for path in paths}
    memory: dict[str, list[float]] = {path: [] for path in paths}
    for _ in range(repeats):
        for path in paths:  # in turn, so that what else the machine does meets both
            network.zero_grad()
            gc.collect()  # the allocator keeps what it has: to empty it would be timed as allocations
            _start_memory(device)
            began = time.perf_counter()
            for batch in batches:
                run(path, batch)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[path].append(time.perf_counter() - began)
            memory[path].append(_peak_memory(device))
    best = min(stock, key=lambda path: statistics.median(seconds[path]))
    ratio = statistics.median(one / other for one, other in zip(seconds[best], seconds["ours"], strict=True))
    peak = statistics.median(one / other for one, other in zip(memory["ours"], memory[first], strict=True))
    layouts = [pack(**batch) for batch in batches]
    saved = sum(layout.padded_tokens for layout in layouts if layout) / sum(
        layout.computed_tokens for layout in layouts if layout
    )
    kernels = f"{sharing.kernel}; TRL: {network.config._attn_implementation}{' ' * bool(best)}{best}"
    mean = statistics.median(seconds["ours"]) / len(batches)
    return Row(name, saved, ratio, peak, differ[0], differ[1], error, kernels, mean)


def step(network: Any, forward: Any, batch: dict[str, Tensor], keep: bool = True) -> Any:
    """Run one DPO step against a reference of zeros. Return log-probs and gradients if `keep` is set.

    Of a large model, the gradients are those of the first and the last layers: the others lie on their way.
    """
    network.zero_grad()
    logps = forward(**batch, use_cache=False, fused_lm_head=True).log_probs
    chosen, rejected = logps.sum(dim=1).chunk(2)
    loss = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
    torch.autograd.backward(loss)
    if not keep:
        return None
    embedding = network.get_input_embeddings().weight
    weights = [weight for weight in network.parameters() if weight.shape != embedding.shape]
    if sum(weight.numel() for weight in weights) > 500_000_000:
        weights = weights[:10] + weights[-10:]
    gradients = [weight.grad.clone() for weight in weights if weight.grad is not None]
    return logps.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def _furthest(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / (1 if one.dim() == 2 else other.abs().max()))


def _error(network: Any, fused: Any, batch: dict[str, Tensor]) -> float:
    """Return our mean distance from float32 over TRL's, on the first two pairs; 1 in float32."""
    dtype = network.dtype
    if dtype == torch.float32:
        return 1.0
    half = batch["input_ids"].size(0) // 2
    rows = [*range(min(2, half)), *range(half, half + min(2, half))]
    inputs: dict[str, Any] = {key: value[rows] for key, value in batch.items()}
    inputs |= {"use_cache": False, "fused_lm_head": True}
    network.zero_grad()
    with torch.no_grad():
        found = [forward(**inputs).log_probs.float() for forward in (fused, network.forward)]
        network.float()  # and back below: every bfloat16 is a float32
        truth = fused(**inputs).log_probs
        network.to(dtype)
    theirs, ours = (float((logps - truth).abs().sum()) for logps in found)
    return ours / theirs


def _free(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def _start_memory(device: str) -> None:
    """Begin to look for the peak."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif _CLEAR.exists():
        _CLEAR.write_text("5")  # Linux: the high-water mark starts anew


def _peak_memory(device: str) -> float:
    """Return the most that was held since, in bytes; nan where the system does not tell."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if not _CLEAR.exists():
        return float("nan")
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
