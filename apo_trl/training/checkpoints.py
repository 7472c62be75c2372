"""The newest complete checkpoint of an interrupted run.

transformers resumes from the folder with the highest number, complete or not. It writes `trainer_state.json` last, so a
killed process leaves a folder without it; a full disk or a power cut may shorten any other file.
"""

import json
import warnings
import zipfile
from pathlib import Path

from apo_trl.errors import InputError
from apo_trl.training.console import is_local_main_process

__all__ = ["last_checkpoint", "resume_from"]


def resume_from(requested: str | None, output_dir: str) -> str | None:
    """Return the checkpoint for `resume_from_checkpoint`: a folder, "true" for the newest, None or "false" for none.

    Raises:
        InputError: The folder is not a complete checkpoint.
    """
    if requested is None or str(requested).lower() == "false":
        return None
    if str(requested).lower() == "true":
        checkpoint = last_checkpoint(output_dir)
        if checkpoint is None and is_local_main_process():
            print(f"No checkpoint in {output_dir}; training starts from the beginning.")
        return checkpoint
    if problem := _problem(Path(requested)):
        raise InputError(f"resume_from_checkpoint: {requested} {problem}. Set another, or 'true' for the newest.")
    return requested


def last_checkpoint(output_dir: str) -> str | None:
    """Find the newest complete checkpoint of a run, with a warning for each incomplete one that is newer."""
    numbers = {path: path.name.removeprefix("checkpoint-") for path in Path(output_dir).glob("checkpoint-*")}
    folders = {int(number): path for path, number in numbers.items() if number.isdecimal()}
    for _, folder in sorted(folders.items(), reverse=True):
        problem = _problem(folder)
        if problem is None:
            return str(folder)
        if is_local_main_process():
            warnings.warn(f"Skipping the checkpoint {folder}: it {problem}.", stacklevel=2)
    return None


def _problem(folder: Path) -> str | None:
    """Return why training cannot resume from a folder, in words that follow its name, or None."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    if "trainer_state.json" not in names:
        return "has no trainer_state.json, which is written last"
    for name in sorted(names):
        if _is_truncated(folder / name):
            return f"holds only a part of {name}"
    for index in folder.glob("*.index.json"):
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if not shards <= names:
            return f"has no {min(shards - names)}"
    # A sharded FSDP checkpoint may have .distcp files alone, and one of ZeRO-3 its global_step folder.
    weights = ("*.safetensors", "*model*.bin", "*.distcp", "global_step*/*.pt")
    return None if any(any(folder.rglob(pattern)) for pattern in weights) else "has no weights"


def _is_truncated(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            safe_open(path, "numpy")
    except (SafetensorError, ValueError):
        return True
    # torch.save writes a zip file, with its table at the end.
    return path.suffix in (".bin", ".pt", ".pth") and not zipfile.is_zipfile(path)
