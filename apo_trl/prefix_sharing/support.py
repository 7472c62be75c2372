"""Which models and runs can train on packed batches, decided before the first batch."""

from typing import Any

import torch
from accelerate.utils import is_peft_model

from apo_trl.prefix_sharing.attention import supports_packing

__all__ = ["TESTED", "dropout_names", "padded_reason", "unsupported_reason"]

# Architectures that the tests compare with the padded batch; any other is compared on its first batch.
TESTED = {
    "llama", "qwen2", "qwen3", "mistral", "smollm3", "olmo2", "phi3", "gemma3_text", "gpt_neox", "gpt2", "qwen3_moe",
    "cohere", "cohere2", "olmo3", "gemma", "granite", "ernie4_5", "exaone4", "glm4_moe", "deepseek_v3",
}  # fmt: skip


def unsupported_reason(model: Any) -> str:
    """Return why a model cannot compute packed batches, or an empty string."""
    if is_peft_model(model) and any(adapter.is_prompt_learning for adapter in model.peft_config.values()):
        return "prompt learning puts tokens before each row"
    base = model.get_base_model() if is_peft_model(model) else model
    config = base.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "the model caps attention logits"
    if config is not base.config:
        return "the model takes more than text"
    if getattr(config, "output_router_logits", False):
        return "the router's auxiliary loss needs the padded batch"
    if not supports_packing(config._attn_implementation):
        return f"the attention implementation {config._attn_implementation} takes no packed batch"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"the model has layers that are not attention ({', '.join(sorted(kinds))})"
    if getattr(base, "_is_stateful", False):
        return "the model is recurrent"
    if any(getattr(module, "is_causal", True) is False for module in base.modules()):
        return "the model's attention is not causal"
    return ""


def padded_reason(trainer: Any) -> str:
    """Return the setting of a run of TRL that requires padded batches, or an empty string."""
    if trainer.aux_loss_enabled:
        return "the router's auxiliary loss needs the padded batch"
    if trainer.args.neftune_noise_alpha:
        return "neftune_noise_alpha scales its noise by the padded length"
    if names := dropout_names(trainer.model):
        remedy = "Set disable_dropout=True, and attention_dropout=0 in the model's configuration"
        return f"dropout is on ({', '.join(names)}) and its noise depends on the layout. {remedy}"
    for kind, name in (("tp", "tensor"), ("cp", "context"), ("sp", "sequence")):
        if getattr(trainer.accelerator.parallelism_config, f"{kind}_size", 1) > 1:
            return f"{name} parallelism splits the padded batch"
    return ""


def dropout_names(model: Any) -> list[str]:
    """Return the names of active dropout: modules, and probabilities in attention layers."""
    names = set[str]()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and module.p:
            # PEFT names the module after its adapter, inside one that is named dropout.
            names.add(next((part for part in reversed(name.split(".")) if "drop" in part), name))
        names |= {
            key for key, value in vars(module).items() if key.endswith("dropout") and isinstance(value, float) and value
        }
    return sorted(names)
