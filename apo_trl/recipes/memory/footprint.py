"""What of a model takes memory: its parameters, counted on the meta device, and what a step keeps of one position.

The terms of `plan`, worked out from the architecture alone; their sources and how close they came to measured memory
are in docs/memory.md.
"""

from typing import Any, NamedTuple

from apo_trl.errors import InputError

__all__ = ["TILE_COLUMNS", "TILE_TOKENS", "Counts", "activations", "count_parameters", "part", "quantised"]

TILE_TOKENS, TILE_COLUMNS = 4096, 32768
"""The tile of logits that TRL 1.16 computes at a time: `TOKEN_CHUNK_SIZE`, `_CHUNKED_LOGPROB_CHUNK_SIZE`."""


class Counts(NamedTuple):
    """Parameters of a model, by what becomes of them."""

    total: int  # parameters of the model, without adapters
    linear: int  # those in linear layers below the output layer: what is quantised, and what autocast casts
    rows: int  # output rows of those layers, each with one scale in 8 bits
    blocks: int  # blocks of 64 in those layers, each with one scale in 4 bits
    largest: int  # parameters of the largest decoder layer or embedding
    trainable: int  # parameters of the adapters, or all


def part(size: int, number: int) -> int:
    """Give the largest of the equal parts of a size, in whole bytes."""
    return -(-size // number)


_COUNTED: dict[tuple[str, ...], Counts] = {}


def count_parameters(config: Any, method: str, rank: int, targets: str | list[str] | None, peft_config: Any) -> Counts:
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


def _count_anew(config: Any, method: str, rank: int, targets: str | list[str] | None, peft_config: Any) -> Counts:
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
    return Counts(
        total=total,
        linear=sum(weight.numel() for weight in linear),
        rows=sum(weight.shape[0] for weight in linear),
        blocks=sum(part(weight.numel(), 64) for weight in linear),
        largest=max(sizes, default=total),
        trainable=trainable,
    )


def quantised(counts: Counts, bits: int, double: bool) -> int:
    """Give the bytes of the linear layers as bitsandbytes 0.45 to 0.49 packs them.

    In 4 bits each block of 64 weights has a float32 scale, 4.5 bits a weight; with double quantisation an 8-bit scale
    and one float32 for 256 of those, 4.127 bits (arXiv:2305.14314, section 3). In 8 bits each output row has one
    float32 scale (arXiv:2208.07339). The code tables, 64 to 1088 bytes a layer, are left out.
    """
    if bits == 8:
        return counts.linear + 4 * counts.rows
    scales = counts.blocks + 4 * part(counts.blocks, 256) if double else 4 * counts.blocks
    return part(counts.linear, 2) + scales


def activations(
    *,
    config: Any,
    counts: Counts,
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
        return kept + ends, max(head, layer + backward + part(copies, layers), early)
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
