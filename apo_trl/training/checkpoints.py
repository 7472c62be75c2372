"""The checkpoints of an interrupted run: which is the newest that can be gone on from.

transformers takes the folder with the highest number, whole or not, and then dies in whichever file is missing. It
writes `trainer_state.json` last, after weights, optimizer and random state, with LoRA and DeepSpeed too; so a killed
process leaves a folder without it. The other files are looked at because a full disk or a power cut may shorten any.
"""

import json
import os
import warnings
import zipfile
from pathlib import Path

from apo_trl.errors import InputError

__all__ = ["checkpoint_problem", "is_local_main_process", "last_checkpoint", "resume_from"]


def resume_from(asked: str | None, output_dir: str) -> str | None:
    """Find the checkpoint that `resume_from_checkpoint` asks for: a folder, or "true" for the newest whole one.

    Gives None, which is the beginning, for None and "false", and says so where "true" finds no checkpoint. Raises
    InputError for a folder that is not a whole checkpoint.
    """
    if asked is None or str(asked).lower() == "false":
        return None
    if str(asked).lower() == "true":
        found = last_checkpoint(output_dir)
        if found is None and is_local_main_process():
            print(f"There is no checkpoint in {output_dir}; training starts from the beginning.")
        return found
    if fault := checkpoint_problem(Path(asked)):
        raise InputError(f"resume_from_checkpoint: {asked} {fault}; give another, or 'true' for the newest whole one.")
    return str(asked)


def last_checkpoint(output_dir: str) -> str | None:
    """Find the newest whole checkpoint of a run, and warn about newer ones that broke off, by name."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.partition("-")[2].isdecimal()]
    for folder in sorted(folders, key=lambda path: int(path.name.partition("-")[2]), reverse=True):
        fault = checkpoint_problem(folder)
        if fault is None:
            return str(folder)
        if is_local_main_process():
            warnings.warn(f"The checkpoint {folder} is passed over: it {fault}.", stacklevel=2)
    return None


def checkpoint_problem(folder: Path) -> str | None:
    """Say why training cannot go on from a folder, in words that follow its name, or None."""
    if not (folder / "trainer_state.json").is_file():
        return "has no trainer_state.json, which is written last"
    wanted = {".safetensors", ".bin", ".pt", ".pth", ".json"}
    for path in sorted(path for path in folder.rglob("*") if path.suffix in wanted):
        if _cut_short(path):
            return f"holds only a part of {path.relative_to(folder)}"
    for index in folder.glob("*.index.json"):
        for shard in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())):
            if not (folder / shard).is_file():
                return f"has no {shard}"
    # A sharded FSDP checkpoint may have .distcp files alone, and one of ZeRO-3 its global_step folder.
    weights = ("*.safetensors", "*model*.bin", "*.distcp", "global_step*/*.pt")
    if not any(path for pattern in weights for path in folder.rglob(pattern)):
        return "has no weights"
    return None


def _cut_short(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, "numpy"):
                return False
        else:
            return not zipfile.is_zipfile(path)  # what torch.save writes; its table is at the end
    except (SafetensorError, ValueError):
        return True
    return False


def is_local_main_process() -> bool:
    """Say whether this is the process of its machine that speaks for all."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
