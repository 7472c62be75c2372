"""The start of a run that trains an adapter further, or that is held to another model than its start."""

from functools import partial
from typing import Any

from apo_trl.models.loading import is_adapter, load_adapter, load_config, read_adapter
from apo_trl.models.packaged import resolve_model

__all__ = ["load_start"]


def load_start(name: str, reference: str | None, arguments: dict[str, Any], init: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a trainer, with the loaded adapter as `model`, and with `ref_model`.

    TRL copies a loaded adapter, as the reference, unless `reference` is set. Only the trained one is saved.

    Args:
        name: A model, or the folder of an adapter to train further.
        reference: The model that the policy is held to, in memory beside it; None is the policy's start.
        arguments: Those of the trainer: `quantization_config` and `peft_config`.
        init: The arguments of `from_pretrained`, for both models.
    """
    from trl.trainer.utils import create_model_from_path

    init = init | {"quantization_config": arguments["quantization_config"]}
    init = {key: value for key, value in init.items() if value is not None}
    start: dict[str, Any] = arguments | {"model": name}
    if is_adapter(name):
        config = read_adapter(name, "model_name_or_path")
        base = resolve_model(config.base_model_name_or_path, "model_name_or_path")
        load_config(base)
        model = load_adapter(create_model_from_path(base, **init), name, config, "model_name_or_path")
        config.inference_mode = False
        model.set_adapter("default")  # its weights are trained
        model.save_pretrained = partial(model.save_pretrained, selected_adapters=["default"])
        start |= {"model": model, "peft_config": None, "quantization_config": None}
    if reference is not None:
        reference = resolve_model(reference, "ref_model_name_or_path")
        load_config(reference, "ref_model_name_or_path")
        start["ref_model"] = create_model_from_path(reference, **init)
    return start
