"""The training script: `accelerate launch [...] -m apo_trl.train --config FILE.yaml [--key value ...]`.

Everything that `trl dpo` takes, it takes: the dataclasses and the parser are TRL's, with `APOConfig` in the place of
`DPOConfig`. On top, `dataset_name` may be a local `.jsonl`, `.json` or `.parquet` file, compressed or not, and bad
input ends in one sentence before anything is written.
"""

import contextlib
import gzip
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from .checkpoints import first_process, last_checkpoint, resume_from
from .inputs import InputError, nearest
from .recipes import accelerate_config, find_recipe, read_yaml
from .run_record import write_run
from .screen import quiet_host, show_own_log

__all__ = ["Run", "launch", "load_named", "load_splits", "main", "make_trainer", "one_message", "parse", "train"]


class Run(NamedTuple):
    """What one command line and one YAML file say, as TRL's dataclasses."""

    script: Any
    training: Any
    model: Any
    mixture: Any


def parse(arguments: Sequence[str], *, unpaired: bool = False) -> tuple[Run, list[str]]:
    """Read a command line and its `--config` file, with TRL's `KTOConfig` for the settings where `unpaired`.

    Gives the run and what is left over: the arguments of `accelerate launch`, from both places. Raises InputError for a
    file that cannot be read, a key that nobody knows (with the nearest known one) and a value of the wrong type.
    """
    from trl import DatasetMixtureConfig, KTOConfig, ModelConfig, ScriptArguments, TrlParser

    from .config import APOConfig

    class Parser(TrlParser):
        def error(self, message: str) -> NoReturn:
            raise InputError(f"{message[0].upper()}{message[1:].rstrip('.')}.")

    dataclasses = (ScriptArguments, KTOConfig if unpaired else APOConfig, ModelConfig, DatasetMixtureConfig)
    parser = Parser(dataclasses, prog="python -m apo_trl.train", allow_abbrev=False)
    arguments = _with_recipe(arguments)
    known = {option for action in parser._actions for option in action.option_strings} | {"--config"}
    launcher = _launcher_options()
    _check_keys(arguments, {option.removeprefix("--") for option in known | launcher})
    *parsed, leftover = parser.parse_args_and_config(arguments, return_remaining_strings=True)
    for before, option in zip(["", *leftover], leftover, strict=False):
        if option.startswith("--") and (name := option.split("=")[0]) not in launcher:
            raise InputError(f"The option {name} does not exist.{nearest(name, known | launcher)}")
        if not option.startswith("-") and not before.startswith("-"):
            raise InputError(f"'{option}' belongs to no option. A recipe or YAML file comes first, or after --config.")
    return Run(*parsed), leftover


def make_trainer(run: Run, trainer_class: Any = None) -> Any:
    """Load the data of a run, build its trainer (`APOTrainer` unless another is given), and load its model."""
    from trl import get_peft_config, get_quantization_config

    from .trainer import APOTrainer

    _check_model(run)
    run.training.model_init_kwargs = {
        "revision": run.model.model_revision,
        "trust_remote_code": run.training.trust_remote_code,
        "attn_implementation": run.model.attn_implementation,
        "dtype": run.model.dtype,
    } | (run.training.model_init_kwargs or {})
    dataset = load_splits(run)
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


@contextlib.contextmanager
def one_message() -> Iterator[None]:
    """Turn an InputError into one line on the first process of a machine and status 2 on all, Ctrl-C into 130."""
    try:
        yield
    except InputError as error:
        if first_process():
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        if first_process():
            print(f"\nInterrupted.{error}", file=sys.stderr)
        _leave(130)


def _leave(status: int) -> NoReturn:
    """Exit; at once where processes exchange tensors, as the way out can wait for one of a process that has gone."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the script."""
    quiet_host()
    show_own_log()
    with one_message():
        run, _ = parse(sys.argv[1:] if arguments is None else arguments)
        train(run)


def launch(arguments: Sequence[str]) -> None:
    """Start this script under `accelerate launch`, after reading its arguments where an error is still one line.

    The script gets all of them, and passes over those of the launcher.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    quiet_host()
    with one_message():
        arguments = _with_recipe(arguments)
        _, launcher = parse(arguments)
        if "--accelerate_config" in launcher[:-1]:
            at = launcher.index("--accelerate_config") + 1
            launcher[at] = accelerate_config(launcher[at])
        try:
            launcher = resolve_accelerate_config_argument(launcher)
        except ValueError as error:
            raise InputError(str(error)) from error
    # --quiet: the script has said what went wrong; accelerate would add a traceback of its own.
    launched = launch_command_parser().parse_args(["--quiet", *launcher, "--module", "apo_trl.train", *arguments])
    try:
        launch_command(launched)
    except (KeyboardInterrupt, SignalException) as error:  # the script has said how to go on
        sys.exit(128 + getattr(error, "sigval", signal.SIGINT))


def _how_to_go_on(output_dir: str) -> str:
    if checkpoint := last_checkpoint(output_dir):
        return f" To go on from {checkpoint}, add --resume_from_checkpoint true to the same command."
    return " There is no checkpoint to go on from; save_steps says how often one is written."


def _config_in_two(argument: str) -> list[str]:
    return argument.split("=", 1) if argument.startswith("--config=") else [argument]


def _launcher_options() -> set[str]:
    from accelerate.commands.launch import launch_command_parser

    options = {option for action in launch_command_parser()._actions for option in action.option_strings}
    return {option for option in options if option.startswith("--")} | {"--accelerate_config"}


def _with_recipe(arguments: Sequence[str]) -> list[str]:
    """Put the file in the place of a recipe's name, given first or after `--config`."""
    given = [part for argument in arguments for part in _config_in_two(argument)]
    if given and not given[0].startswith("-"):
        given.insert(0, "--config")
    if "--config" in given:
        at = given.index("--config") + 1
        if at == len(given):
            raise InputError("--config needs the path of a YAML file or the name of a recipe after it.")
        given[at] = str(find_recipe(given[at]))
    return given


def _check_keys(arguments: Sequence[str], known: set[str]) -> None:
    if "--config" in arguments:
        path = Path(arguments[list(arguments).index("--config") + 1])
        unknown = [str(key) for key in read_yaml(path) if key not in known | {"env"}]
        if len(unknown) == 1:
            raise InputError(f"The key '{unknown[0]}' in {path} does not exist.{nearest(unknown[0], known)}")
        if unknown:
            each = " ".join(f"'{key}'.{nearest(key, known)}" for key in unknown)
            raise InputError(f"{len(unknown)} keys in {path} do not exist: {each}")


def _check_model(run: Run) -> None:
    from transformers import AutoConfig

    from .demo import local_model

    name = run.model.model_name_or_path
    if not name:
        raise InputError("model_name_or_path is missing; give a model folder or a hub name.")
    name = run.model.model_name_or_path = local_model(name)
    try:
        AutoConfig.from_pretrained(
            name, revision=run.model.model_revision, trust_remote_code=run.training.trust_remote_code
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise InputError(f"model_name_or_path '{name}' cannot be loaded: {reason}.") from error


def load_splits(run: Run) -> Any:
    """Load what `datasets` or `dataset_name` name, as a dictionary of splits."""
    from trl import get_dataset

    name = run.script.dataset_name
    if not run.mixture.datasets and not name:
        raise InputError("dataset_name is missing; give a hub name, a folder, or a .jsonl, .json or .parquet file.")
    if not run.mixture.datasets:
        return load_named(name, config=run.script.dataset_config, streaming=run.script.dataset_streaming)
    if name:
        warnings.warn(
            f"dataset_name={name} is not used, because `datasets` is given too. Remove one of them.", stacklevel=2
        )
    with _one_sentence("datasets"):
        return get_dataset(run.mixture)


def load_named(name: str, *, config: str | None = None, streaming: bool = False, field: str = "dataset_name") -> Any:
    """Load a dataset by name, a file or a folder among them, as a dictionary of splits; `field` is what named it."""
    from .dataset import builder_of, is_local, load_dataset

    if builder_of(name) and not is_local(name):
        raise InputError(f"{field}: there is no file {name}.")
    with _one_sentence(name):
        return load_dataset(name, name=config, streaming=streaming)


@contextlib.contextmanager
def _one_sentence(name: str) -> Iterator[None]:
    """Say in one sentence whatever a loader of `datasets` raises."""
    try:
        yield
    except Exception as error:
        fault = _first_bad_line(Path(name)) if Path(name).is_file() else None
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        reason = fault or f"{type(root).__name__}: {root}".rstrip(": ")
        raise InputError(f"The dataset '{name}' cannot be loaded: {reason}.") from error


def _first_bad_line(path: Path) -> str | None:
    if ".jsonl" not in path.suffixes:
        return None
    number = 0
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f"line {number} is not a JSON object"
    except json.JSONDecodeError as error:
        return f"line {number} is not JSON ({error})"
    except (OSError, EOFError, UnicodeDecodeError) as error:
        return f"the file breaks off or is damaged after line {number} ({error})"
    return "the file has no rows" if number == 0 else None


def _split(dataset: Any, field: str, split: str) -> Any:
    if split not in dataset:
        remedy = f"{nearest(split, dataset)} Set {field} to one of {list(dataset)}"
        no_eval = ", or eval_strategy to 'no'" if field == "dataset_test_split" else ""
        raise InputError(f"The dataset has no split '{split}'.{remedy}{no_eval}.")
    return dataset[split]


if __name__ == "__main__":
    main()
