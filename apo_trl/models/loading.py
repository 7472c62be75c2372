"""Load a model or an adapter over its base, ready to score."""

from pathlib import Path
from typing import Any

import torch

from apo_trl.errors import InputError

__all__ = ["is_adapter", "load_policy", "pad_token"]


def load_policy(
    name: str, *, device: str | None = None, dtype: str | None = None, flag: str = "--model"
) -> tuple[Any, Any]:
    """Load a whole model or an adapter over its base, with TRL's fused head, ready to score, and its tokenizer."""
    import transformers
    from peft import AutoPeftModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    from apo_trl.models.packaged import resolve_model
    from apo_trl.prefix_sharing import enable_prefix_sharing

    name = resolve_model(name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("float32" if device == "cpu" else "auto")
    adapter = is_adapter(name)
    kind = AutoPeftModelForCausalLM if adapter else transformers.AutoModelForCausalLM
    try:
        model = kind.from_pretrained(name, dtype=dtype, device_map={"": device}).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(_tokenizer_of(name, model))
    except Exception as error:  # OSError, ValueError, SafetensorError, ...: whatever a missing or damaged model raises
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{flag} {name} cannot be loaded: {lines[0][:200].rstrip('.;:')}.") from error
    add_fused_lm_head(model.get_base_model() if adapter else model)
    enable_prefix_sharing(model)
    return model, tokenizer


def is_adapter(name: str) -> bool:
    """Return whether a folder holds an adapter."""
    return (Path(name) / "adapter_config.json").is_file()


def _tokenizer_of(name: str, model: Any) -> str:
    if (Path(name) / "tokenizer_config.json").is_file() or not is_adapter(name):
        return name
    return str(model.peft_config["default"].base_model_name_or_path)


def pad_token(tokenizer: Any) -> int:
    """Give what short rows are filled up with, where nothing looks at it."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
