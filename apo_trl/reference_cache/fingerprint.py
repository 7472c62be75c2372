"""The fingerprint of a reference: a hash of its weights and of all else that enters its log-probs."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import transformers
import trl
from accelerate.logging import get_logger
from accelerate.utils import gather_object, is_peft_model
from torch import Tensor, nn

from apo_trl.errors import InputError

__all__ = ["current_fingerprint", "reference_fingerprint", "update_digest"]

logger = get_logger(__name__)

_FORMAT = 1  # increase it if log-probs change


def current_fingerprint(trainer: Any) -> str | None:
    """Return the fingerprint of the reference, computed once for the datasets of a constructor or an `evaluate`."""
    if trainer._reference_fingerprint is None:
        trainer._reference_fingerprint = (reference_fingerprint(trainer),)
    return trainer._reference_fingerprint[0]  # type: ignore[no-any-return]


def reference_fingerprint(trainer: Any) -> str | None:
    """Hash a trainer's reference: weights, buffers, quantisation state, configuration and precision of the forward.

    The reference is `ref_model`; else the policy without its adapter, or with the frozen adapter that TRL names "ref";
    else the policy. Sharded weights are gathered one by one, so the fingerprint is the same for any number of
    processes, except with FSDP 1. If weights are offloaded, returns None, with a warning: the cache is not used. Raises
    InputError if processes hold different weights.
    """
    accelerator = trainer.accelerator
    model = accelerator.unwrap_model(trainer.model if trainer.ref_model is None else trainer.ref_model)
    flat = any(type(module).__name__ == "FullyShardedDataParallel" for module in (trainer.ref_model or model).modules())
    tensors: Iterable[tuple[str, Any]] = _all_tensors(model)
    about: dict[str, Any] = {}
    if is_peft_model(model):
        adapters = dict(model.peft_config)
        if trainer.ref_model is None:
            adapters = {name: config for name, config in adapters.items() if name == "ref"}
            tensors = _reference_tensors(model, next(iter(adapters), None))
        if adapters:
            about["adapters"] = {name: _settings(config.to_dict()) for name, config in adapters.items()}
            about["active"] = "ref" if trainer.ref_model is None else model.active_adapters
        model = model.get_base_model()
    about |= {
        "format": _FORMAT,
        "model": type(model).__name__,
        "config": _settings(model.config.to_dict()),
        "attention": str(model.config._attn_implementation).removeprefix("prefix_sharing_"),  # the same function
        "precision": [accelerator.mixed_precision],
        "device": accelerator.device.type,
        "versions": [transformers.__version__, trl.__version__],
    }
    if accelerator.mixed_precision != "no":  # these cast the weights, others the operations
        about["precision"] += [trainer.is_deepspeed_enabled, trainer.is_fsdp_enabled]

    digest = _digest_of(tensors, about)
    digests = gather_object([digest])
    if None in digests:
        logger.warning(
            "The reference's weights are not all in memory, so its log-probs are neither read from the cache nor "
            "written to it."
        )
        return None
    if flat:
        return hashlib.sha256("".join(digests).encode()).hexdigest()
    if len(set(digests)) > 1:
        raise InputError(
            "precompute_ref_log_probs: processes hold different weights of the reference. Set "
            "precompute_ref_log_probs=False."
        )
    return digest


_UNRELATED = {
    *("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache"),
    *("output_attentions", "output_hidden_states", "return_dict", "output_router_logits"),
    *("base_model_name_or_path", "revision", "inference_mode", "task_type"),
}
"""Settings of a model or adapter that change no log-prob. Its dtype is that of its weights."""


def _settings(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {str(key): _settings(value) for key, value in values.items() if key not in _UNRELATED}
    if isinstance(values, (list, tuple)):
        return [_settings(value) for value in values]
    if isinstance(values, (set, frozenset)):
        return sorted(map(str, values))
    return values if isinstance(values, (int, float, str, type(None))) else str(values)


def _digest_of(tensors: Iterable[tuple[str, Any]], about: Mapping[str, Any]) -> str | None:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    whole = True
    for name, value in tensors:
        digest.update(name.encode())
        with _gathered(value):  # by all processes, so none may return early
            try:
                update_digest(digest, value)
            except NotImplementedError:  # a meta tensor, of offloaded weights; the caller warns
                whole = False
    return digest.hexdigest() if whole else None


def update_digest(digest: Any, value: Any) -> None:
    """Add a value to a hash, a tensor by type, shape and bytes."""
    from torch.distributed.tensor import DTensor

    if isinstance(value, DTensor):
        value = value.full_tensor()
    if not isinstance(value, Tensor):
        digest.update(repr(value).encode())
    elif type(value) is not nn.Parameter and hasattr(value, "__tensor_flatten__"):  # a wrapper, such as torchao's
        names, context = value.__tensor_flatten__()
        digest.update(f"{type(value).__name__} {names} {context}".encode())
        for name in names:
            update_digest(digest, getattr(value, name))
    else:
        plain = value.detach().as_subclass(Tensor)
        digest.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.cpu().reshape(-1).view(torch.uint8).numpy())


def _gathered(value: Any) -> AbstractContextManager[Any]:
    """Gather a parameter that ZeRO-3 has sharded."""
    if not hasattr(value, "ds_id"):
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([value])
    return gathered


def _all_tensors(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield parameters, buffers, and other tensors of the state, such as the scales of quantised weights."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    yield from sorted(named.items())
    if getattr(model, "is_quantized", False):
        yield from sorted((name, value) for name, value in model.state_dict().items() if name not in named)


def _reference_tensors(model: Any, adapter: str | None) -> Iterator[tuple[str, Any]]:
    """Yield the tensors of a PEFT model's base, named as without PEFT, and those of one adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    wrappers = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    base = model.get_base_model()
    wrapped = {name for name, module in base.named_modules() if isinstance(module, wrappers)}
    for name, value in _all_tensors(base):
        parts = name.split(".")
        inside = [index for index in range(1, len(parts)) if ".".join(parts[:index]) in wrapped]
        if all(parts[index] in ("base_layer", "original_module") for index in inside):
            yield ".".join(part for index, part in enumerate(parts) if index not in inside), value
        elif adapter in parts:
            yield name, value
    if adapter is not None:
        yield from (
            (name, value)
            for name, value in model.named_parameters()
            if name.split(".")[0] != "base_model" and adapter in name.split(".")
        )
