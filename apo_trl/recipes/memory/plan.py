"""The memory of one training run per GPU, estimated before anything is loaded; docs/memory.md has the sources."""

from dataclasses import dataclass, replace
from itertools import islice
from math import ceil
from typing import Any

from apo_trl.errors import InputError
from apo_trl.recipes.memory.footprint import Setup, activations, count_parameters

__all__ = ["BUCKET", "RESERVE", "Plan", "from_recipe", "plan", "table", "verdict"]

RESERVE = 0.10  # of a GPU's memory stays free for what is not counted: fragmentation, CUDA context, NCCL
SHARED = 0.25  # of `max_length` is what both rows of a pair are assumed to begin with, if the data is not at hand
BUCKET = 500_000_000  # DeepSpeed's default `reduce_bucket_size`, in elements, which accelerate keeps


@dataclass(frozen=True)
class Plan:
    """Memory of one GPU in bytes by term, and two counts of parameters."""

    weights: int  #: the policy, with its adapters; this GPU's share if they are sharded
    adapters: int  #: the part of `weights` that is adapters
    gradients: int  #: of trainable parameters only
    optimizer: int  #: AdamW's two moments, and DeepSpeed's float32 copy of the trainable parameters
    reference: int  #: the reference model, or 0
    activations: int  #: the peak of a forward and backward pass, the tile of logits included
    buffers: int  #: gradient buckets, and the layer that ZeRO-3 or FSDP has gathered
    host: int  #: in the memory of the machine for what is offloaded, of all GPUs together
    total_parameters: int  #: of the policy, with its adapters
    trainable_parameters: int
    config: Any
    setup: Setup

    @property
    def total(self) -> int:
        """Bytes on one GPU, all terms together."""
        return self.weights + self.gradients + self.optimizer + self.reference + self.activations + self.buffers


def plan(config: Any, **settings: Any) -> Plan:
    """Compute what one GPU needs at the peak of a training step, with all rows of the largest size.

    `config` is a `transformers.PretrainedConfig`; `settings` are the fields of `Setup`.

    Raises:
        InputError: A setting is invalid, `transformers` cannot build the architecture, or `peft` cannot adapt it.
    """
    setup, text = Setup(**settings), config.get_text_config()
    total, linear, trainable, padded_reason = count_parameters(config, setup)
    if setup.pair_tokens and padded_reason:
        setup = replace(setup, pair_tokens=None, source=padded_reason)
    full, never, (compute, frozen, trained) = setup.method == "full", 4, setup.widths
    weight, adapters = (trained, 0) if full else (frozen, trainable * trained)
    base = linear * (setup.bits / 8 if setup.method == "qlora" else weight) + (total - linear) * weight
    ddp = setup.stage == 0 and setup.gpus > 1
    buffers = trainable * trained if ddp else BUCKET * compute if setup.deepspeed else 0
    if setup.stage == 3:  # the gathered layer or embedding, in full fine-tuning with its gradient
        largest = max(text.vocab_size * text.hidden_size, total // text.num_hidden_layers)
        buffers += largest * compute * (2 if full else 1)
    terms = {  # bytes, and the first stage of ZeRO that shards them; accelerate's FSDP2 leaves quantised weights whole
        "weights": (base + adapters, never if setup.fsdp and setup.method == "qlora" else 3),
        "adapters": (adapters, 3),
        "gradients": (trainable * trained, 2),
        "optimizer": (trainable * (12 if setup.deepspeed else 2 * trained), 1),
        "reference": (total * frozen if full and not setup.precomputed_reference else 0, 3),
        "activations": (sum(activations(config, linear, setup)), never),
        "buffers": (buffers, never),
    }
    sizes = {name: ceil(size / (setup.gpus if setup.stage >= first else 1)) for name, (size, first) in terms.items()}
    policy = ("weights", "gradients", "optimizer")
    moved = {name: sizes[name] for name in policy if setup.offload and setup.stage >= terms[name][1]}
    sizes |= dict.fromkeys(moved, 0) | {"host": setup.gpus * sum(moved.values())}
    sizes["adapters"] = min(sizes["adapters"], sizes["weights"])
    parameters = total + (0 if full else trainable)
    return Plan(**sizes, total_parameters=parameters, trainable_parameters=trainable, config=config, setup=setup)


def from_recipe(run: Any, **sharding: Any) -> Plan:
    """Plan the run of a recipe on `gpus`, with `stage`, `offload` and `fsdp` of `Setup`. Weights are not read.

    Raises InputError as `plan` does, and if the configuration cannot be read or `max_length` is not set.
    """
    from trl import get_peft_config

    from apo_trl.models.loading import load_config

    training, model = run.training, run.model
    if run.trl_script in ("reward", "rloo"):
        fault = f"plan: not supported for TRL's {run.trl_script} script, which has other models in memory"
        raise InputError(f"{fault}. docs/rlhf.md lists them; plan an APO recipe of the same size, and add those.")
    code = training.trust_remote_code
    config = load_config(model.model_name_or_path, revision=model.model_revision, trust_remote_code=code)
    if training.max_length is None:
        raise InputError("max_length: null, so the longest row is unknown. Set --max_length to a number to plan for.")
    dtype = config.dtype if model.dtype == "auto" else model.dtype
    pair_tokens, source = _pair_tokens(run) if getattr(training, "padding_free", False) else (None, "")
    return plan(
        config,
        method="qlora" if model.load_in_4bit or model.load_in_8bit else "lora" if model.use_peft else "full",
        pairs=training.per_device_train_batch_size,
        tokens=training.max_length,
        pair_tokens=pair_tokens,
        source=source,
        checkpointing=training.gradient_checkpointing,
        dtype=str(dtype or "float32").removeprefix("torch."),
        precomputed_reference=training.precompute_ref_log_probs,
        peft_config=get_peft_config(model),
        bits=8 if model.load_in_8bit else 4.127 if model.use_bnb_nested_quant else 4.5,
        mixed_precision=bool(training.bf16 or training.fp16),
        **({"stage": 0} | sharding),
    )


def _pair_tokens(run: Any) -> tuple[int, str]:
    from apo_trl.datasets.balancing import count_tokens
    from apo_trl.io.tokenization import encode_pair
    from apo_trl.models.loading import load_tokenizer
    from apo_trl.recipes.catalog import local_dataset

    longest, keep_end = run.training.max_length, run.training.truncation_mode == "keep_end"
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    try:
        rows = islice(local_dataset(run)[run.script.dataset_train_split], 2000)
        tokenizer = load_tokenizer(run.model.model_name_or_path)
        pairs = [dict(zip(columns, encode_pair(tokenizer, row), strict=True)) for row in rows]
        largest = max(count_tokens(pair, max_length=longest, keep_end=keep_end)["tokens"] for pair in pairs)
        return largest, f"the largest of the first {len(pairs):,} pairs of {run.script.dataset_name}"
    except (InputError, KeyError):  # the data or the tokenizer is not here
        return round((2 - SHARED) * longest), f"assuming that a pair shares {SHARED:.0%} of max_length"


def verdict(estimate: Plan, gpu_memory_gb: float) -> str:
    """Return in one sentence whether a plan fits in `gpu_memory_gb` (10^9 bytes), and if not what to change first.

    Changes are tried in the order of what they cost the run, until the plan fits; those of less than 1 % are skipped.
    """
    room = gpu_memory_gb * 1e9 * (1 - RESERVE)
    kept = f"with {RESERVE:.0%} of {gpu_memory_gb:g} GB kept in reserve"
    needs = f"{estimate.total / 1e9:.1f} GB a GPU"
    if estimate.total <= room:
        return f"Fits: needs {needs}, which leaves {(room - estimate.total) / 1e9:.1f} GB {kept}."
    missing = f"Does not fit: needs {needs}, {(estimate.total - room) / 1e9:.1f} GB too much {kept}"
    setup, best = estimate.setup, estimate
    changes: list[str] = []
    options: list[tuple[bool, str, dict[str, Any]]] = [
        (not setup.checkpointing, "gradient_checkpointing: true", {"checkpointing": True}),
        (estimate.reference > 0, "precompute_ref_log_probs: true", {"precomputed_reference": True}),
        (setup.dtype == "float32" and setup.method != "full", "dtype: bfloat16", {"dtype": "bfloat16"}),
        (setup.pairs > 1, "per_device_train_batch_size: 1", {"pairs": 1}),
        (setup.gpus > 1 and setup.stage < 2, "ZeRO-2", {"stage": 2}),
        (setup.gpus > 1 and setup.stage < 3, "ZeRO-3", {"stage": 3}),
        (setup.method == "full", "LoRA", {"method": "lora", "dtype": "bfloat16"}),
        (setup.method != "qlora", "QLoRA", {"method": "qlora", "dtype": "bfloat16"}),
    ]
    for possible, name, change in options:
        if possible and best.total > room:
            changed = plan(best.config, **(vars(best.setup) | change))
            if changed.total <= 0.99 * best.total:
                best, changes = changed, [*changes, name]
    advice, needs = ", then ".join(changes), f"needs {best.total / 1e9:.1f} GB"
    if best.total <= room:
        return f"{missing}; change first: {advice} ({needs})."
    rest = f"even with {advice} it {needs}:" if changes else "shorten max_length, or"
    return f"{missing}; {rest} take more or larger GPUs."


def table(plan: Plan) -> str:
    """Lay out a plan as a plain table, one term a line, in GB (10^9 bytes) per GPU."""
    names = ("weights", "adapters", "gradients", "optimizer", "reference", "activations", "buffers", "total", "host")
    labels = {"adapters": "  of which adapters", "host": "host, all GPUs"}  # only if there are any
    sizes = {labels.get(name, name): getattr(plan, name) for name in names if name not in labels or getattr(plan, name)}
    tokens, kind = plan.setup.pair_tokens or 2 * plan.setup.tokens, "packed" if plan.setup.pair_tokens else "padded"
    return "\n".join(
        [
            *(f"{name:<20}{size / 1e9:>9.2f} GB" for name, size in sizes.items()),
            f"{plan.total_parameters:,} parameters, {plan.trainable_parameters:,} of them trained",
            ": ".join(filter(None, [f"{tokens:,} tokens a pair, {kind} batches", plan.setup.source])),
        ]
    )
