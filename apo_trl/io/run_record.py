"""`run.json` in the output folder of a training: its model, data and settings, and the versions of its packages."""

import dataclasses
import json
import platform
import re
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from datasets import Dataset

__all__ = ["changed_settings", "write_run"]

_PACKAGES = ("apo-trl", "trl", "transformers", "torch", "accelerate", "peft", "datasets", "deepspeed", "bitsandbytes")
_ALWAYS = ("loss_type", "beta", "learning_rate")
_PLAIN = (str, int, float, list, dict, type(None))  # TRL turns some settings into objects


def changed_settings(config: Any) -> dict[str, Any]:
    """Return the settings of a dataclass that differ from its defaults, and those of `_ALWAYS`."""
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if (value != default or field.name in _ALWAYS) and isinstance(value, _PLAIN):
            settings[field.name] = value
    return settings


def write_run(trainer: Any) -> None:
    """Write the record of a training that starts, without API keys."""
    config, model, dataset = trainer.args, trainer.model, trainer.train_dataset
    name = getattr(getattr(dataset, "info", None), "dataset_name", None) or type(dataset).__name__
    autocast = "bfloat16" if config.bf16 else "float16" if config.fp16 else "no"
    precision = f"{str(model.dtype).removeprefix('torch.')}, {autocast} autocast"
    versions = {package: found.version for package in _PACKAGES for found in distributions(name=package)}
    versions["python"] = platform.python_version()
    device = f"{config.world_size} x {config.device.type}"
    record = {"model": model.config._name_or_path, "versions": versions, "device": device}
    rows = f", {len(dataset):,} rows" if isinstance(dataset, Dataset) else ""
    record |= {"dataset": f"{name}{rows}"} | trainer.run_record
    record["settings"] = changed_settings(config) | {"precision": precision} | record.get("settings", {})
    record["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    record = json.loads(json.dumps(record, default=str, skipkeys=True), object_hook=_without_keys)
    beside = Path(config.output_dir, "run.json.part")
    beside.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    beside.replace(beside.with_suffix(""))


def _without_keys(settings: dict[str, Any]) -> dict[str, Any]:
    secret = re.compile("token|api_key")
    return {key: value for key, value in settings.items() if not (isinstance(value, str) and secret.search(key))}
