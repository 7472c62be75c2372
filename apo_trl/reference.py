"""The reference that a run is held to without `ref_model`: the policy's own start.

Imported only if a run has an adapter, or if its first log-ratios are not 0.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger

from apo_trl.errors import InputError
from apo_trl.prefix_sharing import dropout_names

__all__ = ["adapter_as_model", "base_change", "check_models", "check_start", "complete_reference"]

logger = get_logger(__name__)

_DOUBTFUL, _WRONG = 0.05, 0.25  # nats per token: below float32, other batches and compiled kernels round differently


def base_change(config: Any) -> str:
    """Return the setting of an adapter by which its base is no longer the base model, or an empty string."""
    init, bias = str(getattr(config, "init_lora_weights", "")), getattr(config, "bias", "none")
    if init.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        return f"init_lora_weights='{init}'"
    return "" if bias == "none" else f"bias='{bias}'"


def adapter_as_model(field: str, folder: str) -> InputError:
    """Return the error for an adapter in the place of a model."""
    return InputError(
        f"{field}: {folder} is an adapter. Merge it with `apo-trl merge`, or, to train it further, pass "
        "PeftModel.from_pretrained(base, folder, is_trainable=True) to APOTrainer."
    )


def check_models(model: Any, peft_config: Any, ref_model: Any, precomputed: bool) -> None:
    """Raise InputError if a trainer's model is an adapter's folder, or if without its adapter it is not itself."""
    if isinstance(ref_model, str) or hasattr(ref_model, "peft_config"):
        raise InputError("ref_model: must be a loaded model without an adapter. Load it, and merge its adapter.")
    if isinstance(model, str) and Path(model, "adapter_config.json").is_file():
        raise adapter_as_model("model", model)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise adapter_as_model("model", model.config.name_or_path)
    adapters = [peft_config] if peft_config else list(getattr(model, "peft_config", {}).values())
    if not (isinstance(model, str) or adapters or ref_model or precomputed or model.config.name_or_path):
        fault = "required, because the model is from no folder or hub name, from which TRL loads its start again"
        raise InputError(f"ref_model: {fault}. Pass a copy of the model.")
    change = next(filter(None, map(base_change, adapters)), "")
    if change and ref_model is None and not (precomputed and change.startswith("bias")):  # it trains only later
        raise InputError(
            f"{change.partition('=')[0]}: {change} changes the base model, so the reference would not be the policy's "
            "start. Use PEFT's default, or pass ref_model."
        )


def complete_reference(model: Any) -> None:
    """Copy into the adapter `ref` what TRL 1.16 leaves out: parameters whose names end in that of the adapter.

    They are those of IA3 and VeRA, and of LoRA on embeddings.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(".default"):
            model.get_parameter(f"{name.removesuffix('default')}ref").data.copy_(parameter.data)


def check_start(trainer: Any, distance: float, own_start: bool) -> None:
    """Check how far the policy starts from its reference, in nats per token.

    Raises:
        InputError: They should be the same, which `own_start` says, and rounding does not explain the distance.
    """
    model, args, precision = trainer.accelerator.unwrap_model(trainer.model), trainer.args, trainer.accelerator
    adapter = next(iter(getattr(model, "peft_config", {}).values()), None)
    exact = precision.mixed_precision == "no" and not _rounds_float32()
    exact &= all(parameter.dtype == torch.float32 for parameter in model.parameters())
    jitter = getattr(model.config.get_text_config(), "router_jitter_noise", 0)
    start = f"The policy starts {distance:.2g} nats per token away from its reference"
    if not own_start:
        logger.info(f"{start}, which is the given ref_model.")
    elif adapter is not None and adapter.is_prompt_learning:
        logger.warning(f"{start}, the model without its prompt. Pass a PeftModel to start from the prompt.")
    elif jitter or args.neftune_noise_alpha or dropout_names(model):
        logger.info(f"{start}, because dropout or noise is on.")
    elif exact or distance > _WRONG:
        fault = f"not set, so the policy should start at its reference, got {distance:.2g} nats per token away"
        raise InputError(f"ref_model: {fault}. {_remedy(args, model, adapter)}")
    elif distance > _DOUBTFUL:
        logger.warning(f"{start}, more than rounding usually explains.")


def _rounds_float32() -> bool:
    """Return whether matrix products of float32 use TF32, set by the interface of torch 2.9 or by the older one."""
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", "")
    return precision == "tf32" if precision else torch.get_float32_matmul_precision() != "highest"


def _remedy(args: Any, model: Any, adapter: Any) -> str:
    if getattr(adapter, "init_lora_weights", True) is False:
        return "Set init_lora_weights=True, which starts the adapter without effect, or pass ref_model."
    if args.precompute_ref_log_probs:
        return "Weights that changed after its log-probs were computed must be set before, or pass ref_model."
    if adapter is not None:
        return f"Without its {adapter.peft_type.value} adapter the model is not its start. Pass ref_model."
    return f"TRL loads it from {model.config.name_or_path}, and the model has other weights. Pass ref_model."
