"""Load models, adapters and tokenizers; the InputError of a faulty one starts with `field`, the option it is from."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apo_trl.errors import InputError
from apo_trl.io.messages import one_line
from apo_trl.models.packaged import resolve_model

__all__ = ["is_adapter", "load_adapter", "load_base", "load_policy", "load_tokenizer", "pad_token", "read_adapter"]


def load_policy(
    name: str, *, device: str | None = None, dtype: str | None = None, flag: str = "--model"
) -> tuple[Any, Any]:
    """Load a whole model, or an adapter over its base, with TRL's fused head, ready to score, and its tokenizer."""
    import torch
    from trl.trainer.utils import add_fused_lm_head

    from apo_trl.prefix_sharing import enable_prefix_sharing

    name = resolve_model(name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("float32" if device == "cpu" else "auto")
    config = read_adapter(name, flag) if is_adapter(name) else None
    base, revision = (config.base_model_name_or_path, config.revision) if config else (name, None)
    model = load_base(base, flag, revision=revision, dtype=dtype, device_map={"": device})
    tokenizer = load_tokenizer(name, base, flag, revision=revision)
    if config:
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer))
        model = load_adapter(model, name, config, flag)
    add_fused_lm_head(model.get_base_model() if config else model)
    enable_prefix_sharing(model.eval())
    return model, tokenizer


def is_adapter(name: str) -> bool:
    """Return whether a folder holds an adapter."""
    return (Path(name) / "adapter_config.json").is_file()


def read_adapter(folder: str, field: str) -> Any:
    """Read the configuration of an adapter in a local folder."""
    from peft import PeftConfig

    files = ("adapter_config.json", "adapter_model.*")
    if not all(any(Path(folder).glob(file)) for file in files):  # PEFT would search the Hub
        raise InputError(f"{field}: {folder} has no {' and '.join(files)}. Set the folder that training saved.")
    with _loading(f"{field}: {folder} cannot be loaded"):
        return PeftConfig.from_pretrained(folder)


def load_base(
    name: str | None, field: str, *, auto_class: Any = None, unquantised: bool = False, **options: Any
) -> Any:
    """Load a model as `auto_class`, or as the class in its configuration, as TRL does.

    `options` are those of `from_pretrained`. An `auto_class` also loads the folder of an adapter.
    """
    import transformers

    if not name:
        raise InputError(f"{field}: the adapter names no base model. Add base_model_name_or_path to its configuration.")
    with _loading(f"{field}: {name} cannot be loaded"):
        if auto_class is not None:
            return auto_class.from_pretrained(name, **options)
        config = transformers.AutoConfig.from_pretrained(name, revision=options.get("revision"))
        if unquantised and getattr(config, "quantization_config", None):
            raise InputError(f"{field}: {name} is quantised. Set the unquantised model.")
        architecture = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModelForCausalLM)
        return architecture.from_pretrained(name, **options)


def load_adapter(base: Any, folder: str, config: Any, field: str) -> Any:
    """Load an adapter onto its base model, and check that every weight has its layer."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    fault = f"{field}: {folder} does not fit its base model"
    with _loading(fault, "Set the base model that it was trained on."), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")  # the base has more such layers
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # `merge` unties them
        model = PeftModel.from_pretrained(base, folder, config=config)
        weights = Path(folder) / "adapter_model.safetensors"
        if weights.is_file():  # PEFT ignores weights without a layer
            with safe_open(weights, "pt") as file:
                stored = {name for name in file.keys() if "lora_" in name}  # noqa: SIM118
            if unused := stored - get_peft_model_state_dict(model, save_embedding_layers=False).keys():
                raise ValueError(f"no layers for {len(unused)} of its weights, such as {min(unused)}")
        return model


def load_tokenizer(
    folder: str, base: str | None = None, field: str = "tokenizer", *, revision: Any = None, processor: bool = False
) -> Any:
    """Load the tokenizer, or the processor of a vision model, of an adapter's folder if it has one, else the base's."""
    import transformers

    base = folder if base is None else base
    own = folder == base or (Path(folder) / "tokenizer_config.json").is_file()
    source = folder if own else base
    with _loading(f"{field}: the tokenizer of {source} cannot be loaded", "Put the tokenizer's files into it."):
        kind = transformers.AutoProcessor if processor else transformers.AutoTokenizer
        return kind.from_pretrained(source, revision=None if own else revision)


@contextmanager
def _loading(fault: str, remedy: str = "Check the name and the files.") -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # cannot be narrowed: tokenizers raises a bare Exception for a damaged tokenizer.json
        raise InputError(f"{fault}, {type(error).__name__}: {one_line(error)}. {remedy}") from error


def pad_token(tokenizer: Any) -> int:
    """Return the id that fills short rows, where the attention mask hides it."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
