"""Build the trainer of a run, train, and save."""

import signal
import warnings
from typing import Any

from apo_trl.errors import InputError, nearest
from apo_trl.io.readers import load_dataset_splits, loading_errors
from apo_trl.training.arguments import Run
from apo_trl.training.checkpoints import last_checkpoint, resume_from
from apo_trl.training.run_record import write_run

__all__ = ["load_run_dataset", "make_trainer", "train"]


def make_trainer(run: Run, trainer_class: Any = None) -> Any:
    """Load the data of a run, build its trainer (`APOTrainer` unless another is given), and load its model."""
    from trl import get_peft_config, get_quantization_config

    from apo_trl.trainer import APOTrainer

    _check_model(run)
    run.training.model_init_kwargs = {
        "revision": run.model.model_revision,
        "trust_remote_code": run.training.trust_remote_code,
        "attn_implementation": run.model.attn_implementation,
        "dtype": run.model.dtype,
    } | (run.training.model_init_kwargs or {})
    dataset = load_run_dataset(run)
    evaluates = run.training.eval_strategy != "no"
    return (trainer_class or APOTrainer)(
        model=run.model.model_name_or_path,
        args=run.training,
        train_dataset=_split(dataset, "dataset_train_split", run.script.dataset_train_split),
        eval_dataset=_split(dataset, "dataset_test_split", run.script.dataset_test_split) if evaluates else None,
        quantization_config=get_quantization_config(run.model),
        peft_config=get_peft_config(run.model),
    )


def train(run: Run) -> None:
    """Train, save the model, and push it where the run says so."""
    import transformers
    from packaging.version import Version

    start = resume_from(run.training.resume_from_checkpoint, run.training.output_dir)
    trainer = make_trainer(run)
    if run.script.ignore_bias_buffers:
        masks = [name for name, buffer in trainer.model.named_buffers() if str(buffer.dtype) == "torch.bool"]
        trainer.model._ddp_params_and_buffers_to_ignore = masks
    if trainer.accelerator.is_main_process:
        write_run(run)
    try:
        trainer.train(resume_from_checkpoint=start)
    except KeyboardInterrupt as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # torch's launcher sends a second one
        raise KeyboardInterrupt(_how_to_go_on(run.training.output_dir)) from error
    trainer.save_model(run.training.output_dir)
    trainer.save_state()  # the logs, for `apo-trl report`
    trainer.accelerator.print(f"Saved to {run.training.output_dir}.")
    if run.training.push_to_hub:
        trainer.push_to_hub(dataset_name=run.script.dataset_name)
    if Version(transformers.__version__) >= Version("5.18"):  # goes when that is the floor
        trainer.end()


def _how_to_go_on(output_dir: str) -> str:
    if checkpoint := last_checkpoint(output_dir):
        return f" To go on from {checkpoint}, add --resume_from_checkpoint true to the same command."
    return " There is no checkpoint to go on from; save_steps says how often one is written."


def _check_model(run: Run) -> None:
    from transformers import AutoConfig

    from apo_trl.models.packaged import resolve_model

    name = run.model.model_name_or_path
    if not name:
        raise InputError("model_name_or_path is missing; give a model folder or a hub name.")
    name = run.model.model_name_or_path = resolve_model(name)
    try:
        AutoConfig.from_pretrained(
            name, revision=run.model.model_revision, trust_remote_code=run.training.trust_remote_code
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise InputError(f"model_name_or_path '{name}' cannot be loaded: {reason}.") from error


def load_run_dataset(run: Run) -> Any:
    """Load what `datasets` or `dataset_name` name, as a dictionary of splits."""
    from trl import get_dataset

    name = run.script.dataset_name
    if not run.mixture.datasets and not name:
        raise InputError("dataset_name is missing; give a hub name, a folder, or a .jsonl, .json or .parquet file.")
    if not run.mixture.datasets:
        return load_dataset_splits(name, config=run.script.dataset_config, streaming=run.script.dataset_streaming)
    if name:
        warnings.warn(
            f"dataset_name={name} is not used, because `datasets` is given too. Remove one of them.", stacklevel=2
        )
    with loading_errors("datasets"):
        return get_dataset(run.mixture)


def _split(dataset: Any, field: str, split: str) -> Any:
    if split not in dataset:
        remedy = f"{nearest(split, dataset)} Set {field} to one of {list(dataset)}"
        no_eval = ", or eval_strategy to 'no'" if field == "dataset_test_split" else ""
        raise InputError(f"The dataset has no split '{split}'.{remedy}{no_eval}.")
    return dataset[split]
