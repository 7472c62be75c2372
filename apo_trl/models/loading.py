"""Load models, adapters and tokenizers; the InputError of a faulty one starts with `field`, the option it is from."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apo_trl.errors import InputError
from apo_trl.io.error_text import one_line
from apo_trl.io.resources import nearest_path
from apo_trl.models.packaged import resolve_model

__all__ = [
    "find_model", "is_adapter", "load_adapter", "load_base", "load_config", "load_model", "load_policy",
    "load_tokenizer", "pad_token", "read_adapter",
]  # fmt: skip

_CONFIGS = ("adapter_config.json", "config.json")
_PREFIX = "base_model.model."  # of a base model's names in the files of an adapter
_ROWS = {  # what an adapter stores of an embedding layer, and the dimension that is the vocabulary
    "weight": 0,
    "base_layer.weight": 0,
    "token_adapter.base_layer.weight": 0,
    "lora_embedding_A": 1,
    "lora_B.weight": 0,
}


def load_policy(
    name: str, *, device: str | None = None, dtype: str | None = None, flag: str = "--model"
) -> tuple[Any, Any]:
    """Load a model or an adapter as `load_model` does, with TRL's fused head, ready to score, and its tokenizer."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import TrainableTokensWrapper
    from trl.trainer.utils import add_fused_lm_head

    from apo_trl.prefix_sharing import enable_prefix_sharing

    model, tokenizer = load_model(name, flag, device=device, dtype=dtype)
    if isinstance(model.get_output_embeddings(), (BaseTunerLayer, TrainableTokensWrapper)):
        remedy = "Merge it with `apo-trl merge`, and set the result and --reference"
        raise InputError(f"{flag}: {name} adapts the output layer, which TRL's fused head does not support. {remedy}.")
    add_fused_lm_head(model.get_base_model() if hasattr(model, "peft_config") else model)
    enable_prefix_sharing(model.eval())
    return model, tokenizer


def load_model(
    name: str, field: str, *, auto_class: Any = None, device: str | None = None, dtype: str | None = None
) -> tuple[Any, Any]:
    """Load a whole model, or an adapter over its base, and its tokenizer.

    `device` is "cuda" by default if available, and `dtype` float32 on a CPU, else the checkpoint's own.
    """
    import torch

    name = find_model(name, field)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = {"dtype": dtype or ("float32" if device == "cpu" else "auto")}
    options |= {"device_map": {"": device}, "auto_class": auto_class}
    if not is_adapter(name):
        return load_base(name, field, **options), load_tokenizer(name, field=field)
    config = read_adapter(name, field)
    base, options["revision"] = config.base_model_name_or_path, config.revision
    model = load_adapter(load_base(base, field, **options), name, config, field)
    return model, load_tokenizer(name, base, field, revision=config.revision)


def load_config(name: str | None, field: str = "model_name_or_path", **options: Any) -> Any:
    """Load the configuration of a whole model, as a run trains it; `options` are those of `from_pretrained`."""
    from transformers import AutoConfig

    if not name:
        raise InputError(f"{field}: required, not set. Set a local folder or a hub name.")
    if is_adapter(name):
        from apo_trl.reference import adapter_as_model

        raise adapter_as_model(field, name)
    name = _local(name, field)
    with _loading(f"{field}: '{name}' cannot be loaded", _suggestion(name)):
        return AutoConfig.from_pretrained(name, **options)


def find_model(name: str, field: str) -> str:
    """Return the folder of the packaged model or of an adapter on the Hub; any other folder or name is unchanged.

    Raises:
        InputError: The folder holds no model, the path does not exist, or the adapter cannot be loaded.
    """
    from huggingface_hub import snapshot_download
    from transformers.utils.peft_utils import find_adapter_config_file

    name = _local(name, field)
    if Path(name).exists() or name.count("/") != 1:
        return name
    with _loading(f"{field}: {name} cannot be loaded", _suggestion(name)):
        return str(snapshot_download(name)) if find_adapter_config_file(name) else name


def _local(name: str, field: str) -> str:
    """Return the folder of the packaged model by its name, or the name itself, unless it is a path without a model."""
    name = resolve_model(name, field)
    if Path(name).exists() and not any(Path(name, config).is_file() for config in _CONFIGS):
        raise InputError(f"{field}: {name} has no {' or '.join(_CONFIGS)}. {_suggestion(name)}")
    return name


def _suggestion(name: str) -> str:
    """Return what to set instead of a name: models in that folder, the newest first, or the nearest path beside it."""
    configs = [path for depth in ("*", "*/*") for config in _CONFIGS for path in Path(name).glob(f"{depth}/{config}")]
    configs.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    if models := list(dict.fromkeys(str(path.parent) for path in configs)):
        return f"Set {' or '.join(models[:3])}."
    near = "" if Path(name).exists() else nearest_path(name)
    return f"{near} Check the name, or set the folder of a model or adapter.".lstrip()


def is_adapter(name: str) -> bool:
    """Return whether a folder holds an adapter."""
    return (Path(name) / "adapter_config.json").is_file()


def read_adapter(folder: str, field: str) -> Any:
    """Read the configuration of an adapter in a local folder.

    Raises:
        InputError: It cannot be loaded, or only over a changed base that its files do not restore.
    """
    from peft import PeftConfig

    files = ("adapter_config.json", "adapter_model.*")
    if not all(any(Path(folder).glob(file)) for file in files):  # PEFT would search the Hub
        raise InputError(f"{field}: {folder} has no {' and '.join(files)}. {_suggestion(folder)}")
    with _loading(f"{field}: {folder} cannot be loaded"):
        config = PeftConfig.from_pretrained(folder)
    init = str(getattr(config, "init_lora_weights", ""))  # PEFT repeats "pissa" and "olora", which are deterministic
    if init.lower().startswith(("pissa_niter", "corda", "loftq", "lora_ga")):
        remedy = "Save it with PEFT's path_initial_model_for_weight_conversion"
        raise InputError(f"{field}: {folder} needs the base that init_lora_weights='{init}' changed. {remedy}.")
    return config


def load_base(
    name: str | None, field: str, *, auto_class: Any = None, unquantised: bool = False, **options: Any
) -> Any:
    """Load a model as `auto_class`, or as the class in its configuration, as TRL does, with all of its weights.

    `options` are those of `from_pretrained`.
    """
    import transformers

    if not name:
        raise InputError(f"{field}: the adapter names no base model. Add base_model_name_or_path to its configuration.")
    name = _local(name, field)
    with _loading(f"{field}: {name} cannot be loaded", _suggestion(name)):
        config = transformers.AutoConfig.from_pretrained(name, revision=options.get("revision"))
        if unquantised and getattr(config, "quantization_config", None):
            raise InputError(f"{field}: {name} is quantised. Set the unquantised model.")
        named = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModelForCausalLM)
        model, info = (auto_class or named).from_pretrained(name, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):  # transformers initialises them at random
        kind = (auto_class or type(model)).__name__
        raise InputError(f"{field}: '{name}' has no weights for {missing[0]}. Set a complete {kind}.")
    return model


def load_adapter(base: Any, folder: str, config: Any, field: str) -> Any:
    """Load an adapter onto its base model, resized to its vocabulary, and check that every weight has its layer."""
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    fault = f"{field}: {folder} does not fit its base model"
    with _loading(fault, "Set the base model that it was trained on."), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")  # the base has more such layers
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # `merge` unties them
        weights = load_peft_weights(folder, device="cpu")
        _fit_vocabulary(base, weights)
        model = PeftModel.from_pretrained(base, folder, config=config)
        lora = {name for name in weights if "lora_" in name}  # PEFT ignores weights without a layer
        if unused := lora - get_peft_model_state_dict(model, save_embedding_layers=False).keys():
            raise ValueError(f"no layers for {len(unused)} of its weights, such as {min(unused)}")
        return model


def _fit_vocabulary(base: Any, weights: Mapping[str, Any]) -> None:
    """Resize the embeddings to the rows of those that an adapter stores: tokens were added, or rows for padding."""
    inputs, outputs = base.get_input_embeddings(), base.get_output_embeddings()
    rows = {}
    for name, module in base.named_modules():
        if module is inputs or module is outputs:
            stored = {suffix: weights.get(f"{_PREFIX}{name}.{suffix}") for suffix in _ROWS}
            sizes = [weight.shape[_ROWS[suffix]] for suffix, weight in stored.items() if weight is not None]
            rows[module] = max(sizes, default=0)
    known, wanted = inputs.weight.shape[0], max(rows.values(), default=0)
    if wanted > known and outputs is not None and outputs.weight is not inputs.weight and not all(rows.values()):
        raise ValueError(f"only one of its two embeddings has the {wanted - known} added tokens")
    if wanted not in (0, known):
        base.resize_token_embeddings(wanted, mean_resizing=False)  # the new rows are loaded next


def load_tokenizer(
    folder: str,
    base: str | None = None,
    field: str = "tokenizer",
    *,
    revision: Any = None,
    processor: bool = False,
    only_here: bool = False,
) -> Any:
    """Load the tokenizer, or the processor of a vision model, of an adapter's folder if it has one, else the base's.

    With `only_here` it must be a folder or in the cache, and the Hub is not asked.
    """
    import transformers

    folder = resolve_model(folder, field)
    base = folder if base is None else resolve_model(base, field)
    own = folder == base or (Path(folder) / "tokenizer_config.json").is_file()
    source = folder if own else base
    with _loading(f"{field}: the tokenizer of {source} cannot be loaded", "Put the tokenizer's files into it."):
        kind = transformers.AutoProcessor if processor else transformers.AutoTokenizer
        return kind.from_pretrained(source, revision=None if own else revision, local_files_only=only_here)


@contextmanager
def _loading(fault: str, remedy: str = "Check the name and the files.") -> Iterator[None]:
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        yield
    except InputError:
        raise
    except Exception as error:  # cannot be narrowed: tokenizers raises a bare Exception for a damaged tokenizer.json
        if isinstance(error.__cause__, LocalEntryNotFoundError):
            fault += ", because it is not a local folder or in the cache, and the Hub cannot be reached"
            raise InputError(f"{fault}. {remedy}") from error
        raise InputError(f"{fault}, {type(error).__name__}: {one_line(error)}. {remedy}") from error


def pad_token(tokenizer: Any) -> int:
    """Return the id that fills short rows, where the attention mask hides it."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
