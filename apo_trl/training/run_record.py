"""`run.json`: the settings of a training run and the versions of its packages."""

import dataclasses
import json
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from apo_trl.io.files import atomic_write

__all__ = ["write_run"]

_PACKAGES = ("apo-trl", "trl", "transformers", "torch", "accelerate", "peft", "datasets", "deepspeed", "bitsandbytes")
_PLAIN = (str, int, float, list, dict, type(None))  # TRL turns some settings into objects


def write_run(run: Any) -> None:
    """Write `run.json` of an `arguments.Run`: its settings that differ from the defaults, without API keys."""
    settings: dict[str, Any] = {}
    for part in (run.script, run.training, run.model):
        for field in dataclasses.fields(part):
            value, factory = getattr(part, field.name), field.default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            secret = isinstance(value, str) and ("token" in field.name or "api_key" in field.name)
            if value != default and not secret and isinstance(value, _PLAIN):
                settings[field.name] = value
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):  # of an extra
            versions[name] = version(name)
    record = {"model": run.model.model_name_or_path, "dataset": run.script.dataset_name}
    record |= {"settings": settings, "versions": versions}
    with atomic_write(Path(run.training.output_dir) / "run.json") as beside:
        beside.write_text(json.dumps(record, indent=2, default=str, sort_keys=True) + "\n", encoding="utf-8")
