"""What will fit: the memory of one training run per GPU, worked out from the model's architecture alone.

No weights are loaded: the parameters are counted on the meta device. Each term, its source and how close it came to
measured memory are in docs/memory.md. Left out on purpose: what depends on the driver and on the order of
allocations (fragmentation, CUDA context, NCCL); `verdict` keeps a reserve for it.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from .inputs import InputError

__all__ = ["RESERVE", "Plan", "from_recipe", "plan", "table", "verdict"]

RESERVE = 0.10
"""The share of a GPU's memory that `verdict` leaves free for what is not counted."""

TILE_TOKENS, TILE_COLUMNS = 4096, 32768
"""The tile of logits that TRL 1.16 computes at a time: `TOKEN_CHUNK_SIZE`, `_CHUNKED_LOGPROB_CHUNK_SIZE`."""

BUCKET = 500_000_000
"""DeepSpeed's default `reduce_bucket_size`, in elements; Accelerate's plugin leaves it as it is."""

Method = Literal["full", "lora", "qlora"]
Dtype = Literal["bfloat16", "float16", "float32"]


class _Counts(NamedTuple):
    total: int  # parameters of the model, without adapters
    linear: int  # those in linear layers below the output layer: what is quantised, and what autocast casts
    rows: int  # output rows of those layers, each with one scale in 8 bits
    blocks: int  # blocks of 64 in those layers, each with one scale in 4 bits
    largest: int  # parameters of the largest decoder layer or embedding
    trainable: int  # parameters of the adapters, or all


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
    counts = _count(config, method, lora_rank, lora_targets, peft_config)
    deepspeed = stage > 0 and not fsdp
    full = method == "full"
    loaded = 4 if dtype == "float32" else 2
    # DeepSpeed casts the whole model to the training dtype and keeps a float32 copy of what is trained.
    frozen = 2 if deepspeed and mixed_precision else loaded
    trained = _trained_bytes(method, loaded, deepspeed, fsdp, mixed_precision)
    share = gpus if stage == 3 else 1

    if full:
        adapters = 0
        weights = _share(counts.total * trained, share)
    else:
        adapters = _share(counts.trainable * trained, share)
        base = counts.total * frozen
        if method == "qlora":
            packed = _quantised(counts, bits, double_quantisation)
            # FSDP2 leaves 4-bit weights whole: accelerate 1.15 takes them out of sharding.
            packed = packed if fsdp else _share(packed, share)
            base = packed + _share((counts.total - counts.linear) * frozen, share)
        else:
            base = _share(base, share)
        weights = adapters + base
    gradients = _share(counts.trainable * trained, gpus if stage >= 2 else 1)
    # torch's AdamW keeps its moments in the dtype of the parameter, DeepSpeed's in float32 beside a float32 copy.
    state = 12 if deepspeed else 2 * trained
    optimizer = _share(counts.trainable * state, gpus if stage >= 1 else 1)
    reference = _share(counts.total * frozen, share) if full and not precomputed_reference else 0

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
    kept, passing = _activations(
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
    """Plan the run that a recipe describes, as `apo_trl.train.parse` gives it.

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


def _share(size: int, gpus: int) -> int:
    return -(-size // gpus)


def _trained_bytes(method: str, loaded: int, deepspeed: bool, fsdp: bool, mixed_precision: bool) -> int:
    if method == "qlora":
        return 2  # TRL casts the adapters of a quantised model to bfloat16
    if deepspeed and mixed_precision:
        return 2
    if fsdp and mixed_precision:
        return 4  # accelerate's FSDP2 casts what is trained to float32
    return 4 if method == "lora" and not deepspeed else loaded  # peft casts adapters to float32


_COUNTED: dict[tuple[str, ...], _Counts] = {}


def _count(config: Any, method: str, rank: int, targets: str | list[str] | None, peft_config: Any) -> _Counts:
    """Build the model on the meta device, where it has shapes and no memory, and count."""
    key = (
        type(config).__name__,
        config.to_json_string(),
        str(method == "full"),
        str((rank, targets)),
        str(peft_config),
    )
    if key not in _COUNTED:
        _COUNTED[key] = _count_anew(config, method, rank, targets, peft_config)
    return _COUNTED[key]


def _count_anew(config: Any, method: str, rank: int, targets: str | list[str] | None, peft_config: Any) -> _Counts:
    import warnings

    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, ImportError) as error:
        raise InputError(
            f"transformers cannot build a causal language model of this configuration: {error}."
        ) from error
    total = sum(parameter.numel() for parameter in model.parameters())
    head = model.get_output_embeddings()
    linear = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    whole = set(getattr(model, "_no_split_modules", None) or ())
    sizes = [
        sum(parameter.numel() for parameter in module.parameters())
        for module in model.modules()
        if type(module).__name__ in whole or isinstance(module, torch.nn.Embedding) or module is head
    ]
    trainable = total
    if method != "full":
        from peft import LoraConfig, get_peft_model

        adapters = peft_config or LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM")
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the trainer will say it, where it matters
                adapted = get_peft_model(model, adapters)
        except ValueError as error:
            raise InputError(f"lora_target_modules does not suit this model: {error}.") from error
        trainable = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    return _Counts(
        total=total,
        linear=sum(weight.numel() for weight in linear),
        rows=sum(weight.shape[0] for weight in linear),
        blocks=sum(_share(weight.numel(), 64) for weight in linear),
        largest=max(sizes, default=total),
        trainable=trainable,
    )


def _quantised(counts: _Counts, bits: int, double: bool) -> int:
    """Give the bytes of the linear layers as bitsandbytes 0.45 to 0.49 packs them.

    In 4 bits each block of 64 weights has a float32 scale, 4.5 bits a weight; with double quantisation an 8-bit scale
    and one float32 for 256 of those, 4.127 bits (arXiv:2305.14314, section 3). In 8 bits each output row has one
    float32 scale (arXiv:2208.07339). The code tables, 64 to 1088 bytes a layer, are left out.
    """
    if bits == 8:
        return counts.linear + 4 * counts.rows
    scales = counts.blocks + 4 * _share(counts.blocks, 256) if double else 4 * counts.blocks
    return _share(counts.linear, 2) + scales


def _activations(
    *,
    config: Any,
    counts: _Counts,
    method: str,
    positions: int,
    tokens: int,
    checkpointing: bool,
    loaded: int,
    trained: int,
    cast: bool,
    mixed_precision: bool,
) -> tuple[int, int]:
    """Give the bytes that the forward pass leaves, and the most that comes on top of them, for rows * tokens positions.

    `residual` is the width of the hidden states between layers, `compute` that of matrix products. They differ where
    float32 weights run under autocast; ZeRO and FSDP cast the whole model instead (`cast`).
    """
    text = config.get_text_config()
    hidden, layers = int(text.hidden_size), int(text.num_hidden_layers)
    compute = 2 if mixed_precision or loaded == 2 else 4
    residual = compute if cast else loaded
    # What an adapter sees: its own dtype, where neither autocast nor the cast of the whole model decides.
    seen = compute if cast or mixed_precision else trained
    shared = residual == compute and (cast or trained == compute)
    # The padding mask is widened to a bias for the attention kernel, once in every layer.
    layer = positions * (_layer(text, method, residual, compute, seen, shared) + tokens * compute)
    # Autocast's copies of the weights are kept for the backward pass. With checkpointing it makes them anew for each
    # layer, and those of trained weights outlive the forward pass of theirs, until autocast ends.
    copies = counts.linear * compute if residual != compute and method != "qlora" else 0
    rows = min(positions, TILE_TOKENS)
    vocabulary = int(text.vocab_size) * hidden
    head = rows * TILE_COLUMNS * compute + positions * hidden * (4 + residual)
    if method == "full":
        head += vocabulary * (4 + (trained if trained != 4 else 0))
    # The last norm, whose own input is kept only where its weight is trained, and the input of the output layer.
    ends = positions * hidden * (4 + residual * (2 if method == "full" else 1))
    backward = positions * (compute * 2 * _intermediate(text) + residual * 2 * hidden)
    if checkpointing:
        kept = layers * positions * hidden * residual
        # All copies at the end of the forward pass, with no layer's activations; one layer's of both later.
        early = copies + backward if method == "full" else 0
        return kept + ends, max(head, layer + backward + _share(copies, layers), early)
    return layers * layer + ends + copies, max(head, backward)


def _intermediate(text: Any) -> int:
    """Give the width inside an MLP; of a mixture of experts, that of the experts that see a token."""
    experts = getattr(text, "num_experts_per_tok", None)
    width = getattr(text, "moe_intermediate_size", None) if experts else None
    width = width or getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return int(width) * int(experts or 1)


def _layer(text: Any, method: str, residual: int, compute: int, seen: int, shared: bool) -> int:
    """Give the bytes that autograd keeps for one position in one decoder layer.

    Counted as in Korthikanti et al. (arXiv:2205.05198, section 4.1), for RMSNorm, rotary embedding, fused attention
    and a gated MLP, and without dropout, which TRL switches off. `seen` is the width of what an adapter keeps of
    its input; `shared` says that the adapters of one input keep one copy.
    """
    h, i = int(text.hidden_size), _intermediate(text)
    heads = int(text.num_attention_heads)
    q = heads * int(getattr(text, "head_dim", None) or h // heads)
    norms = 2 * 4 * h  # float32 inputs
    attention = 4 * q * compute + 4 * heads  # queries, keys, values repeated to all heads, output; log-sum-exp
    mlp = 3 * i * compute  # gate, its activation, up
    if method == "full":
        norms += 2 * h * residual
        inputs = (2 * h + i) * compute if residual == compute else (5 * h + i) * compute
    else:
        inputs = (2 * h + i) * seen if shared else (5 * h + q + i) * seen  # or each adapter casts its own
    return norms + attention + mlp + inputs


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
