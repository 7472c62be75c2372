"""`apo-trl train`."""

from typing import Any

from apo_trl.cli.options import add_command

_KEYS = """\
model_name_or_path, dtype  a folder or hub name; bfloat16 (default: float32)
dataset_name               pairs: a file, a folder or a hub name
loss_type, beta            (defaults: apo_zero, 0.1)
learning_rate              (default: 1e-6; with LoRA 5e-6 to 5e-5)
num_train_epochs           (default: 3); or max_steps
use_peft, load_in_4bit     LoRA; both: QLoRA
output_dir                 folder of the results
accelerate_config          hardware: cpu, single_gpu, ddp, zero3, ...
num_processes              number of GPUs
All keys of `trl dpo` and `accelerate launch`: python -m apo_trl.train --help
KTO, reward models and RLOO: a file with keys of `trl kto`, `reward` or `rloo`"""


def add(commands: Any) -> None:
    usage = "%(prog)s RECIPE_OR_FILE [--key value ...]"
    help, example = "train from a recipe or a YAML file", "smollm2-135m/apo_zero_lora --output_dir runs/first"
    files = "a recipe, and the model and the pairs that it names", "the model or adapter, and its logs, to output_dir"
    parser = add_command(commands, "train", run, help, example, *files, usage=usage)
    parser.add_argument_group("keys, in the file or as options", _KEYS)
    parser.keeps_rest = True
    parser.set_defaults(print_help=parser.print_help)


def run(rest: list[str], print_help: Any) -> None:
    from apo_trl.training.launcher import launch

    launch(rest) if rest else print_help()
