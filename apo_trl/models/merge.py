"""Merge a LoRA adapter into its base model: one plain model folder that any engine can serve.

Weights are added by PEFT. What is ours is around it: the base is loaded unquantised, the sum is rounded once, the
tokenizer, its chat template and the generation config come along, and nothing half written stays behind. Adapters on
the Hub are left out; download them first.
"""

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

from apo_trl.errors import InputError, nearest

__all__ = ["DTYPES", "merge"]

DTYPES = ("float32", "bfloat16", "float16")


def merge(adapter: str, output_dir: str, *, dtype: str | None = None, base: str | None = None) -> Path:
    """Add an adapter's weights to its base model and save the result as a plain model folder.

    An adapter that was trained on a quantised base is merged into the unquantised one. The sum is taken in the wider of
    the base's dtype and the one asked for, and rounded once. The tokenizer is the adapter's where its folder has one,
    else the base's; the generation config is the base's.

    Args:
        adapter: A folder with an `adapter_config.json`, as PEFT and the trainer save it.
        output_dir: A folder that does not exist yet, or is empty. It appears only when it is whole.
        dtype: One of `DTYPES`. Default: the base checkpoint's own.
        base: A model folder or hub name. Default: the one that `adapter_config.json` names.

    Returns:
        The path of the merged model.

    Raises:
        InputError: The adapter, the base, the folder or the dtype cannot be used.
    """
    source, target = Path(adapter), Path(output_dir)
    settings = _read_adapter(source)
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"The dtype '{dtype}' is not known;{nearest(dtype, DTYPES)} Use one of {', '.join(DTYPES)}.")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"output_dir {target} exists and is not an empty folder; remove it or give another.")
    name = base or settings.get("base_model_name_or_path")
    if not name:
        raise InputError(f"The adapter {source} names no base model; give one with --base.")
    revision = None if base else settings.get("revision")

    model = _load_base(name, revision)
    if dtype is not None:
        import torch

        model.to(torch.promote_types(model.dtype, getattr(torch, dtype)))
    model = _merged(model, source, name)
    if dtype is not None:
        model.to(getattr(torch, dtype))
    processor = _load_processor(source, name, revision)

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as beside:
            whole = Path(beside) / "model"
            model.save_pretrained(whole)
            processor.save_pretrained(whole)
            if target.exists():
                target.rmdir()
            whole.rename(target)
    except OSError as error:
        raise InputError(f"output_dir {target} cannot be written: {error.strerror or error}.") from error
    return target


def _read_adapter(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{folder} is not an adapter: there is no {path.name} in it; give the folder that training with"
            " --use_peft saved."
        ) from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); save the adapter again.") from error
    if not any((folder / f"adapter_model.{suffix}").is_file() for suffix in ("safetensors", "bin")):
        raise InputError(f"{folder} has no adapter_model.safetensors; save the adapter again.")
    return dict(settings)


def _load_base(name: str, revision: str | None) -> Any:
    """Load a base model in its own dtype, as the class that its config names, as TRL does."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name, revision=revision)
        if getattr(config, "quantization_config", None):
            raise InputError(f"The base '{name}' is quantised itself; give the unquantised model with --base.")
        named = (config.architectures or [""])[0]
        architecture = getattr(transformers, named, transformers.AutoModelForCausalLM)
        return architecture.from_pretrained(name, revision=revision, dtype="auto")
    except InputError:
        raise
    except Exception as error:  # OSError, ValueError, SafetensorError, ...: whatever a missing or damaged model raises
        raise InputError(
            f"The base '{name}' cannot be loaded: {_first_line(error)}; give its folder or hub name with --base."
        ) from error


def _merged(base: Any, adapter: Path, name: str) -> Any:
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")  # the base has more such layers
            warnings.filterwarnings("ignore", message="Model (has|with) `tie_word_embeddings=True`")  # see _untie
            model = PeftModel.from_pretrained(base, str(adapter))
    except Exception as error:  # RuntimeError for shapes, ValueError for names, SafetensorError for a cut file
        raise InputError(
            f"The adapter {adapter} does not fit the base '{name}': {_first_line(error)}; give its own with --base."
        ) from error
    if not hasattr(model.base_model, "merge_and_unload"):
        kind = model.peft_config["default"].peft_type.value
        raise InputError(f"A {kind} adapter has no weights to merge; load it beside its base with PEFT.")
    if unused := _unused(model, adapter):
        raise InputError(
            f"The adapter {adapter} does not fit the base '{name}', which has no place for {unused[0]} and"
            f" {len(unused) - 1} more of its weights; give its own with --base."
        )
    _untie(model)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Model (has|with) `tie_word_embeddings=True`")
            return model.merge_and_unload(safe_merge=True)
    except ValueError as error:  # NaN in the adapter
        raise InputError(f"The adapter {adapter} cannot be merged: {_first_line(error)}.") from error


def _unused(model: Any, adapter: Path) -> list[str]:
    """Name the LoRA weights in the file that found no layer, which PEFT passes over in silence."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    path = adapter / "adapter_model.safetensors"
    if not path.is_file():
        return []
    with safe_open(path, "pt") as file:
        stored = [name for name in file.keys() if "lora_" in name]  # noqa: SIM118
    return sorted(set(stored) - get_peft_model_state_dict(model, save_embedding_layers=False).keys())


def _untie(model: Any) -> None:
    """Give the output layer weights of its own where the adapter changes one of two tied layers and not the other."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    base = model.get_base_model()
    inputs, outputs = base.get_input_embeddings(), base.get_output_embeddings()
    adapted = (BaseTunerLayer, ModulesToSaveWrapper)
    tied = base.config.get_text_config().tie_word_embeddings
    if not tied or not (isinstance(inputs, adapted) or isinstance(outputs, adapted)):
        return
    if not isinstance(outputs, ModulesToSaveWrapper):  # that one holds a copy already
        layer = outputs.get_base_layer() if isinstance(outputs, BaseTunerLayer) else outputs
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
    for config in (base.config, base.config.get_text_config()):
        config.tie_word_embeddings = False


def _load_processor(adapter: Path, name: str, revision: str | None) -> Any:
    """Load the adapter's tokenizer (or processor, for a model that sees), else the base's."""
    from transformers import AutoProcessor

    own = (adapter / "tokenizer_config.json").is_file()
    try:
        return AutoProcessor.from_pretrained(str(adapter) if own else name, revision=None if own else revision)
    except Exception as error:
        raise InputError(
            f"The tokenizer of {adapter if own else name} cannot be loaded: {_first_line(error)}; put the base's"
            f" tokenizer files into {adapter}."
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(".;:")
