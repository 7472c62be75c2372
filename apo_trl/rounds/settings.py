"""Read and check the settings of `apo-trl rounds`: keys of the run, and a section of keys for each command."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from apo_trl.errors import InputError, nearest
from apo_trl.io.files import read_json, write_json
from apo_trl.io.resources import find_recipe, packaged, read_yaml
from apo_trl.pairs.functions.process import load_function, source_of

__all__ = ["SECTIONS", "Settings", "keep_settings", "parse"]

SECTIONS = {  # the keys of each command that the run sets
    "pairs": ("output_dir", "policy_model", "policy_base_url", "seed", "shard", "dry_run"),
    "train": ("output_dir", "model_name_or_path", "ref_model_name_or_path", "dataset_name", "resume_from_checkpoint"),
    "score": ("output_dir", "model", "policy_base_url"),
}
_MAY_CHANGE = {"rounds", "keep", "policy_serve", "policy_serve_timeout", "output_dir"}


class Settings(BaseModel):
    """The settings of one run of rounds."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    model_name_or_path: str
    output_dir: str
    pairs: dict[str, Any]
    train: dict[str, Any]
    score: dict[str, Any]
    rounds: int = Field(3, ge=1)
    seed: int = 0
    reference: Literal["round_start", "first_model"] = "round_start"
    adapter: Literal["continue", "merge"] = "continue"
    keep: Literal["last", "all"] = "last"
    prompts_per_round: int | None = Field(None, ge=1)
    policy_serve: str | None = None
    policy_serve_timeout: float = Field(600, gt=0)

    @property
    def merges(self) -> bool:
        """Whether each round ends with a whole model: a server gets no adapter."""
        return bool(self.train.get("use_peft")) and (self.adapter == "merge" or self.policy_serve is not None)


def parse(recipe: str, options: Sequence[str] = ()) -> Settings:
    """Read a YAML file or a recipe, with `--key value` and `--section.key value` in place of its values.

    Raises:
        InputError: A key is unknown, missing or set by the run, or a value is invalid.
    """
    values = read_yaml(find_recipe(recipe))
    words = [word for option in options for word in (option.split("=", 1) if option.startswith("--") else [option])]
    if len(words) % 2 or any(not word.startswith("--") for word in words[::2]):
        raise InputError("options: must be `--key value` pairs. For several values, write a list, as '[a, b]'.")
    for option, text in zip(words[::2], words[1::2], strict=True):
        section, _, key = option.removeprefix("--").partition(".")
        target = values.setdefault(section, {}) if key else values
        if not isinstance(target, dict):
            raise InputError(f"{option}: {section} has no keys. Correct the option.")
        try:
            target[key or section] = yaml.safe_load(text)
        except yaml.YAMLError:
            target[key or section] = text  # such as a prompt with a colon
    try:
        settings = Settings.model_validate(values)
    except ValidationError as invalid:
        error = invalid.errors(include_url=False)[0]
        name, known = ".".join(map(str, error["loc"])), [*Settings.model_fields]
        if error["type"] == "extra_forbidden":
            raise InputError(f"{name}: unknown key.{nearest(name, known)} Use one of {', '.join(known)}.") from None
        raise InputError(f"{name}: {error['msg'][0].lower()}{error['msg'][1:]}. Correct the file.") from None
    for section, keys in SECTIONS.items():
        if taken := [key for key in getattr(settings, section) if key in keys]:
            raise InputError(f"{section}.{taken[0]}: set by the run. Remove it.")
    for placeholder in ("{model}", "{port}"):
        if settings.policy_serve is not None and placeholder not in settings.policy_serve:
            raise InputError(f"policy_serve: {placeholder} is missing. Write 'vllm serve {{model}} --port {{port}}'.")
    return settings


def keep_settings(settings: Settings, folder: Path) -> None:
    """Store the settings of a run in its folder, or check that they are those of the run that it holds.

    Raises:
        InputError: A setting that determines results, or the content of a file or function that it names, has changed.
    """
    values = json.loads(json.dumps(settings.model_dump(exclude=_MAY_CHANGE), default=str))
    flat = {f"{section}.{key}": value for section in SECTIONS for key, value in values.pop(section).items()} | values
    flat |= {f"{name} (content)": content for name, value in flat.items() if (content := _content(name, value))}
    stored = read_json(folder / "settings.json")
    if isinstance(stored, dict):
        changed = sorted(key for key in flat.keys() | stored if flat.get(key) != stored.get(key))
        if changed:
            text = f"{', '.join(changed)}: changed since the run in {folder} began"
            raise InputError(f"{text}. Set another output_dir, or the old values.")
    elif any(folder.glob("round-*")):
        raise InputError(f"output_dir: {folder} holds rounds without a settings.json. Set another folder.")
    else:
        write_json(folder / "settings.json", flat)


def _content(name: str, value: Any) -> str:
    """Return the SHA-256 of the function or file that a setting names, or "" if it names none."""
    if value and name.endswith("_function"):
        load_function.cache_clear()  # it may have changed since the last stage
        try:
            return source_of(str(value))
        except InputError as error:
            raise InputError(f"{name.removesuffix('function')}{error}") from error
    path = packaged(str(value)) or Path(str(value))
    is_file = name.endswith((".prompts", "_template")) and path.is_file()
    return hashlib.sha256(path.read_bytes()).hexdigest() if is_file else ""
