"""Build the trainer of a run, train, and save."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from apo_trl.errors import InputError, nearest
from apo_trl.io.disk import full_disk_error
from apo_trl.io.error_text import one_line
from apo_trl.io.files import read_json
from apo_trl.io.readers import load_dataset_splits, loading_errors
from apo_trl.io.run_record import changed_settings
from apo_trl.training.arguments import Run
from apo_trl.training.checkpoints import resume_from, resume_hint, start_line, write_older_checkpoints
from apo_trl.training.console import ignore_signals, is_local_main_process
from apo_trl.training.lock import output_lock
from apo_trl.training.movement import hardly_moved_after, loses_updates

__all__ = ["load_run_dataset", "make_trainer", "select_splits", "train"]


def make_trainer(run: Run, trainer_class: Any = None) -> Any:
    """Build the trainer of a run (`APOTrainer` by default), with its model and data.

    Raises:
        InputError: The model or the dataset cannot be loaded, or a split is missing.
    """
    from trl import get_peft_config, get_quantization_config

    from apo_trl.models.loading import is_adapter, load_config
    from apo_trl.models.packaged import resolve_model
    from apo_trl.trainer import APOTrainer

    script, training, model, _ = run
    name = model.model_name_or_path = resolve_model(model.model_name_or_path or "")
    source = {"revision": model.model_revision, "trust_remote_code": training.trust_remote_code}
    reference, start = getattr(script, "ref_model_name_or_path", None), {"model": name}
    if not (continues := is_adapter(name)):
        load_config(name, **source)
    source |= {"attn_implementation": model.attn_implementation, "dtype": model.dtype}
    training.model_init_kwargs = source | (training.model_init_kwargs or {})
    train_dataset, eval_dataset = select_splits(load_run_dataset(run), run)
    with _library_errors():
        start |= {"quantization_config": get_quantization_config(model), "peft_config": get_peft_config(model)}
        if continues or reference:
            from apo_trl.training.start import load_start

            start = load_start(name, reference, start, training.model_init_kwargs)
        trainer = (trainer_class or APOTrainer)(
            args=training, train_dataset=train_dataset, eval_dataset=eval_dataset, **start
        )
    trainer.run_record["settings"] = changed_settings(script) | changed_settings(model)
    if data := script.dataset_name:
        trainer.run_record["dataset"] = str(Path(data).resolve()) if Path(data).exists() else data
    return trainer


@contextlib.contextmanager
def _library_errors() -> Iterator[None]:
    """Turn what a library raises for a setting, while the trainer is built, into an InputError of one line."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, TypeError, RuntimeError, ImportError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk
            raise
        fault = f"The trainer cannot be built, {type(error).__name__}: {one_line(error)}"
        raise InputError(f"{fault}. Change the setting; --traceback shows where.") from error


def train(run: Run) -> None:
    """Train, save the model, and push it to the hub if `push_to_hub` is set."""
    output_dir, is_writer = run.training.output_dir, run.training.process_index == 0
    start = resume_from(run.training.resume_from_checkpoint, output_dir)
    lock = output_lock(output_dir) if is_writer else contextlib.nullcontext()
    with contextlib.ExitStack() as stack:
        if exists := Path(output_dir).exists():
            stack.enter_context(lock)
        try:
            train_from = _prepare(run)
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(" Training had not started. Run the same command again.") from error
        if not exists:  # until here nothing is written
            stack.enter_context(lock)
        with _with_resume_hint(output_dir):
            if is_writer:
                print(start_line(start, output_dir), flush=True)
                write_older_checkpoints(start, output_dir)
            train_from(start)


def _prepare(run: Run) -> Callable[[str | None], None]:
    """Build what a run needs, and return the function that trains from a checkpoint or from the start."""
    if run.trl_script != "dpo":
        from apo_trl.training.trl_script import prepare

        dataset = None if run.mixture.datasets else load_run_dataset(run)
        if dataset is not None:
            select_splits(dataset, run)  # raises an error for one that is missing
        return prepare(run, dataset)
    return functools.partial(_train, make_trainer(run), run)


@contextlib.contextmanager
def _with_resume_hint(output_dir: str) -> Iterator[None]:
    """End an interruption and a full disk in one line that says how to resume."""
    try:
        yield
    except KeyboardInterrupt as error:
        ignore_signals()
        raise KeyboardInterrupt(f" {resume_hint(output_dir)}") from error
    except Exception as error:  # safetensors, torch and transformers each raise another one for a full disk
        problem = full_disk_error(Path(output_dir), error)
        if problem is None or not is_local_main_process():
            raise
        raise InputError(f"{problem} {resume_hint(output_dir)}") from error


def _train(trainer: Any, run: Run, start: str | None) -> None:
    import transformers
    from packaging.version import Version

    output_dir = run.training.output_dir
    if run.script.ignore_bias_buffers:
        masks = [name for name, buffer in trainer.model.named_buffers() if str(buffer.dtype) == "torch.bool"]
        trainer.model._ddp_params_and_buffers_to_ignore = masks
    before = read_json(Path(output_dir, "run.json")) if start else None
    if before and before.get("dataset") != (data := trainer.run_record.get("dataset")):
        trainer.run_record["dataset"] = f"{before.get('dataset')}, then {data}"
    if warning := loses_updates(trainer):
        trainer.accelerator.print(f"Warning: {warning}")
    trainer.train(resume_from_checkpoint=start)
    trainer.save_model(output_dir)
    trainer.save_state()  # the logs, for `apo-trl report`
    trainer.create_model_card(Path(output_dir).name, run.script.dataset_name)  # in the place of PEFT's empty one
    trainer.accelerator.print(f"Saved to {output_dir}. {hardly_moved_after(trainer)}".rstrip())
    if run.training.push_to_hub:
        trainer.push_to_hub(dataset_name=run.script.dataset_name)
    if Version(transformers.__version__) >= Version("5.18"):  # goes when that is the floor
        trainer.end()


def load_run_dataset(run: Run) -> Any:
    """Load the data of `datasets` or `dataset_name`, as a dictionary of splits."""
    from trl import get_dataset

    name = run.script.dataset_name
    if run.mixture.datasets:
        if name:
            warnings.warn(f"dataset_name: ignored ({name}), because `datasets` is set too. Unset one.", stacklevel=2)
        with loading_errors("datasets"):
            return get_dataset(run.mixture)
    if not name:
        raise InputError("dataset_name: required, not set. Set a hub name, a folder, or a file of pairs.")
    return load_dataset_splits(name, config=run.script.dataset_config, streaming=run.script.dataset_streaming)


def select_splits(dataset: Any, run: Run) -> tuple[Any, Any]:
    """Return the splits that a run trains and evaluates on, the second None without evaluation."""
    train = _split(dataset, "dataset_train_split", run.script.dataset_train_split)
    evaluates = run.training.eval_strategy != "no"
    return train, _split(dataset, "dataset_test_split", run.script.dataset_test_split) if evaluates else None


def _split(dataset: Any, field: str, name: str) -> Any:
    if name not in dataset:
        remedy = f"{nearest(name, dataset)} Set one of {list(dataset)}"
        no_eval = ", or eval_strategy: 'no'" if field == "dataset_test_split" else ""
        raise InputError(f"{field}: the dataset has no split '{name}'.{remedy}{no_eval}.")
    return dataset[name]
