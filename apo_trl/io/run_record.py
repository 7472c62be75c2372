"""`run.json` in the output folder of a training: its model, data and settings, and the versions of its packages."""

import dataclasses
import json
import platform
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["changed_settings", "write_run"]

_PACKAGES = ("apo-trl", "trl", "transformers", "torch", "accelerate", "peft", "datasets", "deepspeed", "bitsandbytes")
_ALWAYS = ("loss_type", "beta", "learning_rate")
_PLAIN = (str, int, float, list, dict, type(None))  # TRL turns some settings into objects


def changed_settings(config: Any) -> dict[str, Any]:
    """Return the settings of a dataclass that differ from its defaults, and those of `_ALWAYS`."""
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, factory = getattr(config, field.name), field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        if (value != default or field.name in _ALWAYS) and isinstance(value, _PLAIN):
            settings[field.name] = value
    return settings


def write_run(trainer: Any, *, resumed: bool) -> None:
    """Write the record of a training that starts, without API keys; a resumed one keeps the date of its first start.

    Raises InputError if it cannot be written.
    """
    config, model, path = trainer.args, trainer.model, Path(trainer.args.output_dir, "run.json")
    autocast = "bfloat16" if config.bf16 else "float16" if config.fp16 else "no"
    precision = f"{str(model.dtype).removeprefix('torch.')}, {autocast} autocast"
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):  # of an extra
            versions[name] = version(name)
    device = f"{config.world_size} x {config.device.type}"
    record = {"model": model.config._name_or_path, "versions": versions, "device": device} | trainer.run_record
    record["settings"] = changed_settings(config) | {"precision": precision} | record.get("settings", {})
    record["date"] = now = datetime.now(UTC).isoformat(timespec="seconds")
    if resumed:
        with suppress(OSError, ValueError, LookupError, TypeError):  # the first start may have written none
            record |= {"date": json.loads(path.read_text(encoding="utf-8"))["date"], "resumed": now}
    record = json.loads(json.dumps(record, default=str, sort_keys=True), object_hook=_without_keys)
    beside = path.with_name("run.json.part")
    try:
        beside.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        from apo_trl.io.disk import write_error  # a default run does not load the writers of the tools

        raise write_error(path, error.strerror or str(error)) from error


def _without_keys(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in settings.items()
        if not isinstance(value, str) or ("token" not in name and "api_key" not in name)
    }
