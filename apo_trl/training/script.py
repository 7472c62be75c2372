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
    """Build the trainer of a run (`APOTrainer` by default), with its model and data.

    Raises:
        InputError: The model or the dataset cannot be loaded, or a split is missing.
    """
    from trl import get_peft_config, get_quantization_config

    from apo_trl.models.loading import load_config
    from apo_trl.models.packaged import resolve_model
    from apo_trl.trainer import APOTrainer

    script, training, model, _ = run
    name = model.model_name_or_path = resolve_model(model.model_name_or_path or "")
    source = {"revision": model.model_revision, "trust_remote_code": training.trust_remote_code}
    load_config(name, **source)
    source |= {"attn_implementation": model.attn_implementation, "dtype": model.dtype}
    training.model_init_kwargs = source | (training.model_init_kwargs or {})
    dataset = load_run_dataset(run)
    evaluates = training.eval_strategy != "no"
    return (trainer_class or APOTrainer)(
        model=name,
        args=training,
        train_dataset=_split(dataset, "dataset_train_split", script.dataset_train_split),
        eval_dataset=_split(dataset, "dataset_test_split", script.dataset_test_split) if evaluates else None,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )


def train(run: Run) -> None:
    """Train, save the model, and push it to the hub if `push_to_hub` is set."""
    import transformers
    from packaging.version import Version

    output_dir = run.training.output_dir
    start = resume_from(run.training.resume_from_checkpoint, output_dir)
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
        hint = " No checkpoint to resume from yet; save_steps sets how often one is written."
        if checkpoint := last_checkpoint(output_dir):
            hint = f" To resume from {checkpoint}, add --resume_from_checkpoint true to the same command."
        raise KeyboardInterrupt(hint) from error
    trainer.save_model(output_dir)
    trainer.save_state()  # the logs, for `apo-trl report`
    trainer.accelerator.print(f"Saved to {output_dir}.")
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


def _split(dataset: Any, field: str, split: str) -> Any:
    if split not in dataset:
        remedy = f"{nearest(split, dataset)} Set one of {list(dataset)}"
        no_eval = ", or eval_strategy: 'no'" if field == "dataset_test_split" else ""
        raise InputError(f"{field}: the dataset has no split '{split}'.{remedy}{no_eval}.")
    return dataset[split]
