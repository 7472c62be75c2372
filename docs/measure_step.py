"""Where the time of a step goes, and how it grows with length and batch: stock TRL's padded batch and ours.

    python docs/measure_step.py [--layers 30] [--growth_layers 4]

SmolLM2-135M's shape with random weights, float32. The profile is torch's, of one forward and backward after a warm-up;
growth is the median of three steps of each path in turn.
"""

import argparse
import statistics
import time

from torch.profiler import ProfilerActivity, profile

from apo_trl.benchmark.cases import CASES, Case, build_model, load_shape, random_batches
from apo_trl.benchmark.measure import step
from apo_trl.prefix_sharing import enable_prefix_sharing, pack
from apo_trl.training.console import quiet_libraries

# What torch's profiler calls them: TRL's head is one autograd function, attention one operator on each way.
PARTS = {
    "the head": ("ChunkedLogProbFunction", "ChunkedLogProbFunctionBackward"),
    "attention": ("aten::scaled_dot_product_attention", "ScaledDotProductFlashAttentionForCpuBackward0"),
    "other matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
}


def batch_of(network, case, pairs):
    return random_batches(case._replace(batches=1), network.config.vocab_size, pairs)[0]


def small_model(layers):
    return build_model(load_shape()[0], layers, "float32", "cpu")


def parts(network, forward, batch):
    """Seconds of each part of a step, and of the whole."""
    step(network, forward, batch)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        began = time.perf_counter()
        step(network, forward, batch)
        whole = time.perf_counter() - began
    times = {}
    for event in profiled.key_averages():
        for part, names in PARTS.items():
            if event.key in names:
                times[part] = times.get(part, 0) + event.cpu_time_total / 1e6
    head = sum(
        event.cpu_time_total / 1e6
        for event in profiled.events()
        if event.name in PARTS["other matrix products"] and _within(event, PARTS["the head"])
    )
    times["other matrix products"] -= head
    times["norms, activations, copies, the layout"] = whole - sum(times.values())
    return times, whole


def _within(event, names):
    while event is not None:
        if event.name in names:
            return True
        event = event.cpu_parent
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--growth_layers", type=int, default=4, help="0: the profile alone")
    options = parser.parse_args()
    quiet_libraries()

    network = small_model(options.layers)
    fused = network.forward
    enable_prefix_sharing(network)
    batch = batch_of(network, CASES["170 / 250 / 250"], 2)
    host, whole = parts(network, fused, batch)
    ours, shorter = parts(network, network.forward, batch)
    began = time.perf_counter()
    for _ in range(20):
        packed = pack(**batch)
    layout = (time.perf_counter() - began) / 20
    tokens = f"{packed.padded_tokens} padded tokens, {packed.computed_tokens} computed"
    print(f"170 / 250 / 250, 2 pairs, {tokens}, {options.layers} layers")
    print("| part | TRL | ours |\n|---|---:|---:|")
    for part in host:
        print(f"| {part} | {host[part] / whole:.0%} | {ours[part] / whole:.0%} |")
    print(f"| a step | 100% | {shorter / whole:.0%} |")
    print(f"Making the layout of that batch: {1000 * layout:.1f} ms, {layout / shorter:.2%} of our step.\n")

    if not options.growth_layers:
        return
    network = small_model(options.growth_layers)
    fused = network.forward
    enable_prefix_sharing(network)
    print(f"{options.growth_layers} layers")
    print("| prompt / completions | pairs | tokens saved | step time |\n|---|---:|---:|---:|")
    for prompt, completion, pairs in (
        (60, 60, 2),
        (120, 120, 2),
        (240, 240, 2),
        (480, 480, 2),
        (120, 120, 1),
        (120, 120, 4),
        (120, 120, 8),
    ):
        batch = batch_of(network, Case(prompt, completion), pairs)
        packed, seconds = pack(**batch), {"host": [], "ours": []}
        for repeat in range(4):
            for name, forward in (("host", fused), ("ours", network.forward)):
                began = time.perf_counter()
                step(network, forward, batch)
                if repeat:
                    seconds[name].append(time.perf_counter() - began)
        ratio = statistics.median(seconds["host"]) / statistics.median(seconds["ours"])
        saved = packed.padded_tokens / packed.computed_tokens
        print(f"| {prompt} / {completion} | {pairs} | {saved:.2f}x | {ratio:.2f}x |")


if __name__ == "__main__":
    main()
