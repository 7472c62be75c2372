"""What will fit: the memory of one training run per GPU, worked out from the model's architecture alone.

No weights are loaded: the parameters are counted on the meta device. Each term, its source and how close it came to
measured memory are in docs/memory.md. Left out on purpose: what depends on the driver and on the order of
allocations (fragmentation, CUDA context, NCCL); `verdict` keeps a reserve for it.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from apo_trl.errors import InputError
from apo_trl.recipes.memory.footprint import activations, count_parameters, part, quantised

__all__ = ["RESERVE", "Plan", "from_recipe", "plan", "table", "verdict"]

RESERVE = 0.10
"""The share of a GPU's memory that `verdict` leaves free for what is not counted."""

BUCKET = 500_000_000
"""DeepSpeed's default `reduce_bucket_size`, in elements; Accelerate's plugin leaves it as it is."""

Method = Literal["full", "lora", "qlora"]
Dtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class _Request:
    """What was asked, so that `verdict` can ask again with one setting changed."""

    config: Any
    settings: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """Memory of one GPU in bytes, and two counts of parameters.

    Attributes:
        weights: The policy, with its adapters; this GPU's share where they are sharded.
        adapters: The part of `weights` that is adapters.
        gradients: Of trainable parameters only.
        optimizer: AdamW's two moments, and DeepSpeed's float32 copy of the trainable parameters.
        reference: The reference model, 0 where none is held.
        activations: The peak of what a forward and backward pass hold, the tile of logits included.
        buffers: Gradient buckets, and the layer that ZeRO-3 or FSDP has gathered.
        host: Bytes in the memory of the machine for what is offloaded, of all GPUs together.
        total_parameters: Parameters of the policy, with its adapters.
        trainable_parameters: Parameters that get a gradient.
    """

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    buffers: int
    host: int
    total_parameters: int
    trainable_parameters: int
    _request: _Request | None = field(default=None, repr=False, compare=False)

    @property
    def total(self) -> int:
        """Bytes on one GPU, all terms together."""
        return self.weights + self.gradients + self.optimizer + self.reference + self.activations + self.buffers


def plan(
    config: Any,
    *,
    method: Method,
    stage: Literal[0, 1, 2, 3],
    gpus: int,
    pairs: int,
    tokens: int,
    checkpointing: bool = True,
    dtype: Dtype = "float32",
    precomputed_reference: bool = False,
    offload: bool = False,
    lora_rank: int = 16,
    lora_targets: str | list[str] | None = "all-linear",
    peft_config: Any = None,
    bits: Literal[4, 8] = 4,
    double_quantisation: bool = False,
    mixed_precision: bool = True,
    fsdp: bool = False,
) -> Plan:
    """Work out what one GPU holds at the peak of a training step.

    Args:
        config: A `transformers.PretrainedConfig` of a causal language model.
        method: Full fine-tuning, LoRA, or LoRA on a quantised model.
        stage: ZeRO stage: 1 shards the optimizer, 2 also gradients, 3 also weights and reference. 0 is one GPU or DDP.
        gpus: Number of processes.
        pairs: `per_device_train_batch_size`; a step holds `2 * pairs` rows.
        tokens: Length of a row after padding, prompt included; `max_length` is the worst case.
        checkpointing: `gradient_checkpointing`.
        dtype: What the weights are loaded in. TRL's command line says float32 where nothing is given.
        precomputed_reference: `precompute_ref_log_probs`, with which full fine-tuning holds no reference model.
        offload: Keep the optimizer, from stage 2 the gradients, at stage 3 the weights in the memory of the machine.
        lora_rank: Rank of the adapters.
        lora_targets: `target_modules` of the adapters; None is peft's choice for the architecture.
        peft_config: A `peft.LoraConfig` in the place of `lora_rank` and `lora_targets`.
        bits: 4 or 8, for `qlora`.
        double_quantisation: `use_bnb_nested_quant`.
        mixed_precision: `bf16` (or `fp16`) of the training arguments, which TRL turns on by default.
        fsdp: Stage 3 is PyTorch's FSDP2 and not DeepSpeed: trainable weights are held in float32.

    Returns:
        The memory by term. Sizes are upper bounds where the data decides: every row is `tokens` long, and the output
        layer sees every position.

    Raises:
        InputError: For a size below 1, an unknown method, stage or dtype, offloading without sharding, FSDP at another
            stage than 3, and an architecture that `transformers` cannot build or `peft` cannot adapt.
    """
    _check(method, stage, gpus, pairs, tokens, dtype, offload, fsdp)
    settings = {name: value for name, value in locals().items() if name != "config"}
    counts = count_parameters(config, method, lora_rank, lora_targets, peft_config)
    deepspeed = stage > 0 and not fsdp
    full = method == "full"
    loaded = 4 if dtype == "float32" else 2
    # DeepSpeed casts the whole model to the training dtype and keeps a float32 copy of what is trained.
    frozen = 2 if deepspeed and mixed_precision else loaded
    trained = _trained_bytes(method, loaded, deepspeed, fsdp, mixed_precision)
    share = gpus if stage == 3 else 1

    if full:
        adapters = 0
        weights = part(counts.total * trained, share)
    else:
        adapters = part(counts.trainable * trained, share)
        base = counts.total * frozen
        if method == "qlora":
            packed = quantised(counts, bits, double_quantisation)
            # FSDP2 leaves 4-bit weights whole: accelerate 1.15 takes them out of sharding.
            packed = packed if fsdp else part(packed, share)
            base = packed + part((counts.total - counts.linear) * frozen, share)
        else:
            base = part(base, share)
        weights = adapters + base
    gradients = part(counts.trainable * trained, gpus if stage >= 2 else 1)
    # torch's AdamW keeps its moments in the dtype of the parameter, DeepSpeed's in float32 beside a float32 copy.
    state = 12 if deepspeed else 2 * trained
    optimizer = part(counts.trainable * state, gpus if stage >= 1 else 1)
    reference = part(counts.total * frozen, share) if full and not precomputed_reference else 0

    buffers = 0
    if deepspeed:
        buffers += BUCKET * (2 if mixed_precision else 4)
    elif stage == 0 and gpus > 1:
        buffers += gradients  # DDP's buckets
    if stage == 3:
        compute = 2 if mixed_precision else loaded
        buffers += counts.largest * compute * (2 if full else 1)  # gathered weights and their unsharded gradients

    host = 0
    if offload:
        host, optimizer = optimizer * gpus, 0
        if stage >= 2:
            host, gradients = host + gradients * gpus, 0
        if stage == 3:
            host, weights, adapters = host + weights * gpus, 0, 0
    kept, passing = activations(
        config=config,
        counts=counts,
        method=method,
        positions=2 * pairs * tokens,
        tokens=tokens,
        checkpointing=checkpointing,
        loaded=loaded,
        trained=trained,
        cast=deepspeed or fsdp,
        mixed_precision=mixed_precision,
    )
    return Plan(
        weights=weights,
        adapters=adapters,
        gradients=gradients,
        optimizer=optimizer,
        reference=reference,
        activations=kept + passing,
        buffers=buffers,
        host=host,
        total_parameters=counts.total + (0 if full else counts.trainable),
        trainable_parameters=counts.trainable,
        _request=_Request(config, settings),
    )


def from_recipe(
    run: Any, *, gpus: int, stage: Literal[0, 1, 2, 3] = 0, offload: bool = False, fsdp: bool = False
) -> Plan:
    """Plan the run that a recipe describes, as `apo_trl.training.arguments.parse` gives it.

    Method, batch, length, checkpointing, dtype, reference and adapters are the recipe's. The model's configuration is
    read from its folder or the hub; its weights are not.

    Raises:
        InputError: Where the configuration cannot be reached, or the recipe sets no `max_length`; and as `plan` does.
    """
    from transformers import AutoConfig
    from trl import get_peft_config

    training, model = run.training, run.model
    name = model.model_name_or_path
    if not name:
        raise InputError("model_name_or_path is missing; give --model_name_or_path a model folder or a hub name.")
    try:
        config = AutoConfig.from_pretrained(
            name, revision=model.model_revision, trust_remote_code=training.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"The configuration of '{name}' cannot be reached; give --model_name_or_path a local folder that holds its "
            "config.json."
        ) from error
    if training.max_length is None:
        raise InputError("max_length is null, so the longest row is not known; give --max_length a number to plan for.")
    quantised = model.load_in_4bit or model.load_in_8bit
    dtype = model.dtype or "float32"
    if dtype == "auto":
        dtype = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    loaded: Dtype = "bfloat16" if dtype == "bfloat16" else "float16" if dtype == "float16" else "float32"
    return plan(
        config,
        method="qlora" if quantised else "lora" if model.use_peft else "full",
        stage=stage,
        gpus=gpus,
        pairs=training.per_device_train_batch_size,
        tokens=training.max_length,
        checkpointing=training.gradient_checkpointing,
        dtype=loaded,
        precomputed_reference=training.precompute_ref_log_probs,
        offload=offload,
        lora_rank=model.lora_r,
        lora_targets=model.lora_target_modules,
        peft_config=get_peft_config(model),
        bits=8 if model.load_in_8bit else 4,
        double_quantisation=model.use_bnb_nested_quant,
        mixed_precision=bool(training.bf16 or training.fp16),
        fsdp=fsdp,
    )


def verdict(plan: Plan, gpu_memory_gb: float) -> str:
    """Say in one sentence whether a plan fits, and if not what to change first.

    The changes are tried in the order of what they cost the run, each on top of those before, until the plan fits; one
    that frees less than a hundredth is passed over. `gpu_memory_gb` is in 10^9 bytes.

    Raises:
        InputError: Where `gpu_memory_gb` is not above 0.
    """
    if not gpu_memory_gb > 0:
        raise InputError(f"gpu_memory must be above 0 GB, not {gpu_memory_gb:g}.")
    room = gpu_memory_gb * 1e9 * (1 - RESERVE)
    kept = f"with {RESERVE:.0%} of {gpu_memory_gb:g} GB kept in reserve"
    needs = f"{plan.total / 1e9:.1f} GB a GPU"
    if plan.total <= room:
        return f"Fits: needs {needs}, which leaves {(room - plan.total) / 1e9:.1f} GB {kept}."
    missing = f"Does not fit: needs {needs}, {(plan.total - room) / 1e9:.1f} GB too much {kept}"
    changes, best = _changes(plan, room)
    if not changes:
        return f"{missing}; shorten max_length, or take more or larger GPUs."
    advice = ", then ".join(changes)
    if best.total <= room:
        return f"{missing}; change first: {advice} (needs {best.total / 1e9:.1f} GB)."
    return f"{missing}; even with {advice} it needs {best.total / 1e9:.1f} GB: take more or larger GPUs."


def table(plan: Plan) -> str:
    """Show a plan as a plain table, one term a line, in GB (10^9 bytes) per GPU."""
    terms = [
        ("weights", plan.weights),
        ("  of which adapters", plan.adapters),
        ("gradients", plan.gradients),
        ("optimizer", plan.optimizer),
        ("reference", plan.reference),
        ("activations", plan.activations),
        ("buffers", plan.buffers),
        ("total", plan.total),
    ]
    if not plan.adapters:
        terms = [term for term in terms if "adapters" not in term[0]]
    if plan.host:
        terms.append(("host, all GPUs", plan.host))
    lines = [f"{name:<20}{size / 1e9:>9.2f} GB" for name, size in terms]
    counts = f"{plan.total_parameters:,} parameters, {plan.trainable_parameters:,} of them trained"
    return "\n".join([*lines, counts])


def _check(method: str, stage: int, gpus: int, pairs: int, tokens: int, dtype: str, offload: bool, fsdp: bool) -> None:
    for name, value in {"gpus": gpus, "pairs": pairs, "tokens": tokens}.items():
        if value < 1:
            raise InputError(f"{name} must be at least 1, not {value}.")
    known = {
        "method": (method, ("full", "lora", "qlora")),
        "stage": (stage, (0, 1, 2, 3)),
        "dtype": (dtype, ("bfloat16", "float16", "float32")),
    }
    for name, (given, choices) in known.items():
        if given not in choices:
            raise InputError(f"{name} {given!r} does not exist; take one of {', '.join(map(str, choices))}.")
    if fsdp and stage != 3:
        raise InputError(f"fsdp shards everything, which is stage 3; stage {stage} was given.")
    if offload and stage == 0:
        raise InputError("Offloading needs ZeRO or FSDP; give a stage of 1 to 3, or leave it off.")


def _trained_bytes(method: str, loaded: int, deepspeed: bool, fsdp: bool, mixed_precision: bool) -> int:
    if method == "qlora":
        return 2  # TRL casts the adapters of a quantised model to bfloat16
    if deepspeed and mixed_precision:
        return 2
    if fsdp and mixed_precision:
        return 4  # accelerate's FSDP2 casts what is trained to float32
    return 4 if method == "lora" and not deepspeed else loaded  # peft casts adapters to float32


def _changes(first: Plan, room: float) -> tuple[list[str], Plan]:
    """Change one setting after the other, cheapest first, until the plan fits; give the changes and the last plan."""
    request = first._request
    if request is None:
        return [], first
    now = request.settings
    widest = now["gpus"] > 1
    options: list[tuple[str, dict[str, Any], bool]] = [
        ("gradient_checkpointing: true", {"checkpointing": True}, not now["checkpointing"]),
        ("precompute_ref_log_probs: true", {"precomputed_reference": True}, bool(first.reference)),
        ("dtype: bfloat16", {"dtype": "bfloat16"}, now["dtype"] == "float32" and now["method"] != "full"),
        ("per_device_train_batch_size: 1", {"pairs": 1}, now["pairs"] > 1),
        ("ZeRO-2", {"stage": 2}, widest and now["stage"] < 2),
        ("ZeRO-3", {"stage": 3}, widest and now["stage"] < 3),
        ("LoRA", {"method": "lora", "dtype": "bfloat16"}, now["method"] == "full"),
        ("QLoRA", {"method": "qlora", "dtype": "bfloat16"}, now["method"] != "qlora"),
    ]
    changes: list[str] = []
    for name, change, possible in options:
        if not possible or first.total <= room:
            continue
        changed = plan(request.config, **(now | change))
        if changed.total > 0.99 * first.total:
            continue
        first, now = replace(changed), now | change
        changes.append(name)
    return changes, first
