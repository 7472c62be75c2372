"""Merge a LoRA adapter into its base model: one plain model folder for any engine."""

import tempfile
from pathlib import Path
from typing import Any

from apo_trl.errors import InputError, nearest

__all__ = ["DTYPES", "merge"]

DTYPES = ("float32", "bfloat16", "float16")


def merge(adapter: str, output_dir: str, *, dtype: str | None = None, base: str | None = None) -> Path:
    """Add an adapter's weights to its base model and save the result as a plain model folder; return its path.

    An adapter that was trained on a quantised base is merged into the unquantised one. The sum is computed in the wider
    of the base's dtype and `dtype`, and rounded once. The tokenizer is the adapter's if its folder has one, else the
    base's; the generation config is the base's.

    `adapter` is a local folder, and `base` by default the model in its configuration. `output_dir` must be new or
    empty; it appears only when it is complete. `dtype` is one of `DTYPES`, by default the base checkpoint's own.
    """
    import torch

    from apo_trl.models.loading import load_adapter, load_base, load_tokenizer, read_adapter

    target = Path(output_dir)
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype: unknown '{dtype}'.{nearest(dtype, DTYPES)} Use one of {', '.join(DTYPES)}.")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"--output_dir: {target} is not an empty folder. Remove it or set another.")
    config = read_adapter(adapter, "adapter")
    name, revision = (base, None) if base else (config.base_model_name_or_path, config.revision)
    model = load_base(name, "--base", unquantised=True, revision=revision, dtype="auto")
    if dtype is not None:
        model.to(torch.promote_types(model.dtype, getattr(torch, dtype)))
    model = load_adapter(model, adapter, config, "adapter")
    if not hasattr(model.base_model, "merge_and_unload"):
        kind = config.peft_type.value
        raise InputError(f"adapter: type {kind} has no weights to merge. Load it beside its base with PEFT.")
    _untie(model)
    try:
        model = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise InputError(f"adapter: {adapter} cannot be merged, {error}. Save the adapter again.") from error
    if dtype is not None:
        model.to(getattr(torch, dtype))
    processor = load_tokenizer(adapter, name, "adapter", revision=revision, processor=True)

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as beside:
            complete = Path(beside) / "model"
            model.save_pretrained(complete)
            processor.save_pretrained(complete)
            complete.rename(target)  # also onto an empty folder
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"--output_dir: {target} cannot be written, {reason}. Set another.") from error
    return target


def _untie(model: Any) -> None:
    """Copy the output weights if the adapter changes one of two tied layers: PEFT merges in place, into both."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    base = model.get_base_model()
    inputs, outputs = base.get_input_embeddings(), base.get_output_embeddings()
    adapted = (BaseTunerLayer, ModulesToSaveWrapper)
    if not isinstance(inputs, adapted) and not isinstance(outputs, adapted):
        return
    if not isinstance(outputs, ModulesToSaveWrapper):
        layer = outputs.get_base_layer() if isinstance(outputs, BaseTunerLayer) else outputs
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
    elif outputs.weight.data_ptr() == inputs.weight.data_ptr():  # one copy for both, of `ensure_weight_tying`
        return
    for config in (base.config, base.config.get_text_config()):
        config.tie_word_embeddings = False
