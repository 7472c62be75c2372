"""The newest complete checkpoint of an interrupted run.

transformers resumes from the folder with the highest number, complete or not, of whichever run. It writes
`trainer_state.json` last, so a killed process leaves a folder without it; a full disk or a power cut may shorten any
other file. What an older run left in the folder is in a list that each start writes, with the times of its files.
"""

import json
import warnings
import zipfile
from pathlib import Path

from apo_trl.errors import InputError
from apo_trl.io.files import read_json, write_json
from apo_trl.training.console import is_local_main_process
from apo_trl.training.lock import hidden_file

__all__ = ["last_checkpoint", "resume_from", "resume_hint", "start_line", "write_older_checkpoints"]


_STATE = "trainer_state.json"
_OLDER = "apo-trl-older-checkpoints.json"


def resume_from(requested: str | None, output_dir: str) -> str | None:
    """Return the checkpoint for `resume_from_checkpoint`: a folder, "true" for the newest, None or "false" for none.

    Raises:
        InputError: The folder is not a complete checkpoint.
    """
    if requested is None or str(requested).lower() == "false":
        return None
    if str(requested).lower() == "true":
        return last_checkpoint(output_dir)
    if problem := _problem(Path(requested)):
        raise InputError(f"resume_from_checkpoint: {requested} {problem}. Set another, or 'true' for the newest.")
    return requested


def last_checkpoint(output_dir: str, *, of_any_run: bool = False, warn: bool = True) -> str | None:
    """Find the newest complete checkpoint of the last run, with a warning for each incomplete one that is newer."""
    older = {} if of_any_run else _older_checkpoints(output_dir)
    for _, folder in sorted(_checkpoints(output_dir).items(), reverse=True):
        if _time(folder) == older.get(folder.name):
            continue
        problem = _problem(folder)
        if problem is None:
            return str(folder)
        if warn and is_local_main_process():
            warnings.warn(f"Skipping the checkpoint {folder}: it {problem}.", stacklevel=2)
    return None


def start_line(start: str | None, output_dir: str) -> str:
    """Return one line on where a run starts, and on what it writes over."""
    if start:
        return f"Training resumes from {start}."
    line, checkpoint = "Training starts from step 0.", last_checkpoint(output_dir, of_any_run=True, warn=False)
    if (finished := _time(Path(output_dir))) and not (checkpoint and _time(Path(checkpoint)) > finished):
        return f"{line} {output_dir} holds a finished run, which is written over."
    if checkpoint:
        resume = f"To resume that one, stop and set --resume_from_checkpoint {checkpoint}."
        return f"{line} {checkpoint} is of an earlier run, which is not resumed. {resume}"
    return line


def resume_hint(output_dir: str) -> str:
    """Return one line on how to resume the run of a folder."""
    if checkpoint := last_checkpoint(output_dir, warn=False):
        return f"To resume from {checkpoint}, add --resume_from_checkpoint true to the same command."
    return "No checkpoint to resume from yet; save_steps sets how often one is written."


def write_older_checkpoints(start: str | None, output_dir: str) -> None:
    """Write the list of the checkpoints that are not of the run that starts now, which `last_checkpoint` skips."""
    before, checkpoints = _older_checkpoints(output_dir), _checkpoints(output_dir)
    first = next((step for step, folder in checkpoints.items() if start and folder.samefile(start)), -1)
    older = {
        folder.name: _time(folder)
        for step, folder in checkpoints.items()
        if step > first or (step < first and _time(folder) == before.get(folder.name))
    }
    write_json(hidden_file(output_dir, _OLDER), older)


def _older_checkpoints(output_dir: str) -> dict[str, int]:
    older = read_json(hidden_file(output_dir, _OLDER))
    return older if isinstance(older, dict) else {}


def _checkpoints(output_dir: str) -> dict[int, Path]:
    numbers = {path: path.name.removeprefix("checkpoint-") for path in Path(output_dir).glob("checkpoint-*")}
    return {int(number): path for path, number in numbers.items() if number.isdecimal()}


def _time(folder: Path) -> int:
    """Return when a checkpoint was complete, in nanoseconds, or 0."""
    state = folder / _STATE
    return state.stat().st_mtime_ns if state.is_file() else 0


def _problem(folder: Path) -> str | None:
    """Return why training cannot resume from a folder, in words that follow its name, or None."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    if _STATE not in names:
        return f"has no {_STATE}, which is written last"
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
