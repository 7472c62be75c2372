"""Time and memory of a step, TRL's padded batches and ours in turn, with the results compared.

A step is forward and backward of a causal language model with TRL's fused head, and a DPO loss. Both sides use one
model in one process; they differ only in which of the two forwards is called.
"""

import gc
import itertools
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from apo_trl.benchmark import cases
from apo_trl.errors import InputError
from apo_trl.io.resources import DEMO_PAIRS
from apo_trl.prefix_sharing import PrefixSharing, enable_prefix_sharing, pack

__all__ = ["Row", "bench", "layout_times", "step", "table"]

Batches = list[dict[str, Tensor]]
_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Row(NamedTuple):
    """One line of the table: medians."""

    name: str
    tokens_saved: float
    step_time: float  # stock TRL's over ours
    peak_memory: float  # ours over stock TRL's
    logps_differ: float
    gradients_differ: float
    error: float  # our log-probs' mean distance from float32 over that of stock TRL's
    kernel: str  # of our attention and of TRL's
    seconds: float  # of our step


def bench(
    *, files: list[str], model: str | None, batch_size: int, repeats: int, only: str | None, **building: Any
) -> list[Row]:
    """Measure `CASES`, the CLAIR pairs, the pairs of each file and `WIDE`; on CUDA without a model, `LARGE`.

    `building` are the other arguments of `build_model`; a device or dtype of None has a default.
    """
    device = building["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    sources: dict[str, Any] = dict(cases.LARGE)
    if model or not device.startswith("cuda"):
        paths = {"the CLAIR pairs": str(DEMO_PAIRS / "train.jsonl")} | {Path(file).name: file for file in files}
        sources = cases.CASES | paths | ({} if model else cases.WIDE)
    selected = [(name, source) for name, source in sources.items() if only is None or only in name]
    rows: list[Row] = []
    for shape, group in itertools.groupby(selected, lambda item: getattr(item[1], "network", "")):
        gc.collect()
        torch.cuda.empty_cache()
        config, tokenizer = cases.load_shape(model, shape)
        dtype = building["dtype"] or ("bfloat16" if shape else "float32")
        network = cases.build_model(config, **(building | {"dtype": dtype, "device": device}))
        padded = network.forward
        sharing = enable_prefix_sharing(network)
        if sharing.reason:
            raise InputError(f"--model: not supported, {sharing.reason}. Choose another model.")
        for name, source in group:
            if isinstance(source, str):
                batches = cases.file_batches(source, tokenizer, batch_size)
            else:
                batches = cases.random_batches(source, config.vocab_size, batch_size)
            rows.append(row := _measure(name, batches, network, padded, sharing, repeats))
            times = f"{row.tokens_saved:.2f}x fewer tokens, {row.step_time:.2f}x faster"
            print(f"{name}: {times} ({row.seconds:.2f} s a step; {row.kernel})")
        del network, padded, sharing  # the next model needs their memory
    return rows


def _measure(name: str, batches: Batches, network: Any, padded: Any, sharing: PrefixSharing, repeats: int) -> Row:
    batches = [{key: value.to(network.device) for key, value in batch.items()} for batch in batches]
    forwards = (padded, network.forward)
    differences = (*_differences(network, forwards, batches), _error(network, forwards, batches[0]))
    # In turn, so that other load on the machine affects both.
    figures = [[_measure_once(network, forward, batches) for forward in forwards] for _ in range(repeats)]
    (seconds, our_seconds), (memory, our_memory) = np.array(figures).transpose(2, 1, 0)
    tokens = [(layout.padded_tokens, layout.computed_tokens) for batch in batches if (layout := pack(**batch))]
    return Row(
        name,
        float(np.divide(*np.sum(tokens, axis=0))),
        float(np.median(seconds / our_seconds)),
        float(np.median(our_memory / memory)),
        *differences,
        kernel=f"{sharing.kernel}; TRL: {network.config._attn_implementation}",
        seconds=float(np.median(our_seconds)) / len(batches),
    )


def _measure_once(network: Any, forward: Any, batches: Batches) -> tuple[float, float]:
    """Return the time in seconds and the peak of memory, or NaN on a system that does not report it."""
    on_cuda = network.device.type == "cuda"
    network.zero_grad()
    gc.collect()  # without emptying the allocator's cache: filling it again would be timed
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    elif _RESET.exists():
        _RESET.write_text("5")  # Linux: the process's high-water mark
    began = time.perf_counter()
    for batch in batches:
        step(network, forward, batch)
    if on_cuda:
        torch.cuda.synchronize()
        return time.perf_counter() - began, torch.cuda.max_memory_allocated()
    seconds = time.perf_counter() - began
    return seconds, float(_STATUS.read_text().split("VmHWM:")[1].split()[0]) if _RESET.exists() else float("nan")


def step(network: Any, forward: Any, batch: dict[str, Tensor]) -> Tensor:
    """Run one DPO step against a reference of zeros, and return the log-probs."""
    network.zero_grad()
    logps: Tensor = forward(**batch, use_cache=False, fused_lm_head=True).log_probs
    chosen, rejected = logps.sum(dim=1).chunk(2)
    loss = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
    torch.autograd.backward(loss)
    return logps.detach()


def _differences(network: Any, forwards: Any, batches: Batches) -> tuple[float, float]:
    """Return `logps_differ` and `gradients_differ` of a row, after warming up."""
    embedding = network.get_input_embeddings().weight
    weights = [weight for weight in network.parameters() if weight.shape != embedding.shape]
    if sum(weight.numel() for weight in weights) > 500_000_000:
        weights = weights[:10] + weights[-10:]  # first and last layers: two copies of all would not fit
    results = []
    for forward in forwards:
        logps = [step(network, forward, batch) for batch in batches[::-1]][-1]
        results.append((logps, torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None])))
    (logps, gradients), (our_logps, our_gradients) = results
    relative = (gradients - our_gradients).abs().max() / gradients.abs().max()
    return float((logps - our_logps).abs().max()), float(relative)


def _error(network: Any, forwards: Any, batch: dict[str, Tensor]) -> float:
    """Compute our mean distance from float32 over TRL's, on the first two pairs; 1 in float32."""
    dtype, options = network.dtype, {"use_cache": False, "fused_lm_head": True}
    if dtype == torch.float32:
        return 1.0
    pairs = {key: torch.cat([side[:2] for side in value.chunk(2)]) for key, value in batch.items()}
    network.zero_grad()
    with torch.no_grad():
        theirs, ours = (forward(**pairs, **options).log_probs.float() for forward in forwards)
        attention = network.config._attn_implementation
        network.float()  # and back below: float32 holds every bfloat16
        network.set_attn_implementation("sdpa")  # flash kernels take no float32
        exact = forwards[0](**pairs, **options).log_probs
        network.to(dtype)
        network.set_attn_implementation(attention)
    return float((ours - exact).abs().sum() / (theirs - exact).abs().sum())


def table(rows: list[Row]) -> str:
    """Lay out the rows for a terminal or a page."""
    columns = "prompt / chosen / rejected | tokens saved | step time | of the bound | memory | log-probs | gradients"
    lines = [f"| {columns} | error |", "|---" + "|---:" * 7 + "|"]
    lines += [
        f"| {row.name} | {row.tokens_saved:.2f}x | {row.step_time:.2f}x | {row.step_time / row.tokens_saved:.2f} | "
        f"{row.peak_memory:.2f} | {row.logps_differ:.0e} | {row.gradients_differ:.0e} | {row.error:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def layout_times() -> dict[str, float]:
    """Return the median time to build the layout of a batch on the CPU, in milliseconds, for two batch sizes."""
    times = {}
    for rows, length in ((16, 2000), (64, 4000)):
        case = cases.Case(length // 2, length // 2, prompts=rows // 2, batches=1)
        timer = Timer("pack(**batch)", globals={"pack": pack, "batch": cases.random_batches(case, 32_000)[0]})
        times[f"{rows} rows of {length} tokens"] = 1000 * timer.blocked_autorange(min_run_time=0.1).median
    return times
