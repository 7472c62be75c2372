"""`run.json`: what a training run was asked for and what it ran on, for whoever reads its folder later."""

import dataclasses
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from apo_trl.io.files import atomic_write

__all__ = ["write_run"]

_PACKAGES = ("apo-trl", "trl", "transformers", "torch", "accelerate", "peft", "datasets", "deepspeed", "bitsandbytes")
_SECRET = ("token", "api_key")
_PLAIN = (str, int, float, list, dict, type(None))  # and no object that the host made of a setting


def write_run(run: Any) -> Path:
    """Write `run.json` into the output folder of a run (`train.Run`): its settings that differ from the defaults.

    No setting that can hold a key is among them.
    """
    settings: dict[str, Any] = {}
    for part in (run.script, run.training, run.model):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            secret = any(word in field.name for word in _SECRET) and isinstance(value, str)
            if value != _default(field) and not secret and isinstance(value, _PLAIN):
                settings[field.name] = value
    path = Path(run.training.output_dir) / "run.json"
    record = {
        "model": run.model.model_name_or_path,
        "dataset": run.script.dataset_name,
        "settings": settings,
        "versions": {"python": platform.python_version()} | _versions(),
    }
    with atomic_write(path) as beside:
        beside.write_text(json.dumps(record, indent=2, default=str, sort_keys=True) + "\n", encoding="utf-8")
    return path


def _default(field: "dataclasses.Field[Any]") -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
