"""Parameters of a model, and the activations of a training step; docs/memory.md has the sources."""

import warnings
from dataclasses import dataclass
from typing import Any, Literal

from apo_trl.errors import InputError

__all__ = ["TILE_COLUMNS", "TILE_TOKENS", "Setup", "activations", "count_parameters"]

# The tile of logits that TRL 1.16 computes at a time: `TOKEN_CHUNK_SIZE`, `_CHUNKED_LOGPROB_CHUNK_SIZE`.
TILE_TOKENS, TILE_COLUMNS = 4096, 32768


@dataclass(frozen=True)
class Setup:
    """What decides the memory of a run, besides the model."""

    method: Literal["full", "lora", "qlora"]
    stage: Literal[0, 1, 2, 3]  #: of ZeRO: 1 shards the optimizer, 2 also gradients, 3 also weights and the reference
    gpus: int
    pairs: int  #: `per_device_train_batch_size`; a step has two rows for each
    tokens: int  #: length of the longest row, prompt included: `max_length`
    pair_tokens: int | None = None  #: distinct tokens of a pair with `padding_free`; None: padded, 2 * `tokens`
    source: str = ""  #: where `pair_tokens` is from, or why batches are padded
    checkpointing: bool = True
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  #: what the weights are loaded in
    precomputed_reference: bool = False  #: with which full fine-tuning holds no reference model
    offload: bool = False  #: keep what is sharded of the policy in the memory of the machine
    peft_config: Any = None  #: a `peft.LoraConfig`; by default rank 16 on all linear layers
    bits: float = 4.5  #: of a quantised weight with its scales: 4.5, 4.127 with double quantisation, or 8
    mixed_precision: bool = True  #: `bf16` or `fp16` of the training arguments; TRL turns bf16 on by default
    fsdp: bool = False  #: stage 3 is PyTorch's FSDP2 and not DeepSpeed

    def __post_init__(self) -> None:
        for field in ("gpus", "pairs", "tokens"):
            if getattr(self, field) < 1:
                raise InputError(f"{field}: must be at least 1, got {getattr(self, field)}. Set a positive number.")
        for field in ("method", "stage", "dtype"):
            if getattr(self, field) not in (known := self.__annotations__[field].__args__):
                raise InputError(f"{field}: unknown value {getattr(self, field)!r}. Set one of {known}.")

    @property
    def deepspeed(self) -> bool:
        """Whether DeepSpeed shards."""
        return self.stage > 0 and not self.fsdp

    @property
    def widths(self) -> tuple[int, int, int]:
        """Bytes of a number in matrix products, of a frozen weight and of a trained one."""
        loaded = 4 if self.dtype == "float32" else 2
        compute = 2 if self.mixed_precision else loaded
        if self.deepspeed:  # casts the whole model
            return compute, compute, compute
        # accelerate's FSDP2 casts what is trained to float32, peft its adapters, but TRL those of QLoRA to bfloat16.
        full = 4 if self.fsdp and self.mixed_precision else loaded
        return compute, loaded, {"full": full, "lora": 4, "qlora": 2}[self.method]


def count_parameters(config: Any, setup: Setup) -> tuple[int, int, int, str]:
    """Build the model on the meta device, where it takes no memory, and count its parameters.

    Returns those without adapters, in linear layers below the output layer, and trained; and why batches are padded.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from apo_trl.prefix_sharing.support import unsupported_reason

    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # training shows them
            model = AutoModelForCausalLM.from_config(config)
            layers = {part for part in model.modules() if isinstance(part, torch.nn.Linear)}
            linear = sum(layer.weight.numel() for layer in layers - {model.get_output_embeddings()})
            total, reason = model.num_parameters(), unsupported_reason(model)
            if setup.method == "full":
                return total, linear, total, reason
            adapters = setup.peft_config or LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
            return total, linear, get_peft_model(model, adapters).get_nb_trainable_parameters()[0], reason
    except (ValueError, ImportError) as error:
        raise InputError(f"model_name_or_path, lora_target_modules: not supported, {error}. Set others.") from error


def activations(config: Any, linear: int, setup: Setup) -> tuple[int, int]:
    """Compute the bytes that the forward pass leaves, and the most that comes on top of them.

    Counted as in Korthikanti et al. (arXiv:2205.05198, section 4.1), for RMSNorm, rotary embedding, fused attention
    and a gated MLP, and without dropout, which TRL switches off.
    """
    text, full, sharded = config.get_text_config(), setup.method == "full", setup.stage > 0
    hidden, heads, layers = int(text.hidden_size), int(text.num_attention_heads), int(text.num_hidden_layers)
    queries = heads * int(getattr(text, "head_dim", None) or hidden // heads)
    mlp = getattr(text, "moe_intermediate_size", None) or getattr(text, "intermediate_size", None) or 4 * hidden
    mlp *= getattr(text, "num_experts_per_tok", None) or 1  # a token is in these experts only
    compute, loaded, trained = setup.widths
    residual = compute if sharded else loaded  # 4 between layers if float32 weights run under autocast
    # Linear layers with the same input share it, unless autocast or each adapter makes a copy in its own dtype.
    inputs = 2 if sharded or residual == compute == trained else 5 if full else 6
    positions = setup.pairs * (setup.pair_tokens or 2 * setup.tokens)
    layer = positions * (
        hidden * (8 + 2 * residual * full)  # norms, in float32
        + compute * 4 * queries  # queries, keys, values, output
        + compute * (0 if setup.pair_tokens else setup.tokens)  # the padding mask, as a bias
        + compute * 3 * mlp  # gate, its activation, up
        + (inputs * hidden + mlp) * (compute if sharded or setup.mixed_precision else trained)
    )
    backward = positions * 2 * (compute * mlp + residual * hidden)
    ends = positions * hidden * (4 + residual * (2 if full else 1))  # the last norm, and the input of the output layer
    # The tile of logits, and gradients in float32 of hidden states and output layer.
    logits = min(positions, TILE_TOKENS) * TILE_COLUMNS * compute + positions * hidden * (4 + residual)
    logits += int(text.vocab_size) * hidden * (4 if trained == 4 else 6) * full
    # Autocast's copies of the weights, kept for the backward pass; with checkpointing made anew for each layer, and
    # those of trained weights freed only at the end of the forward pass.
    copies = linear * compute if residual != compute and setup.method != "qlora" else 0
    if setup.checkpointing:
        kept = layers * positions * hidden * residual
        return kept + ends, max(logits, full * (backward + copies), layer + backward + copies // layers)
    return layers * layer + ends + copies, max(logits, backward)
