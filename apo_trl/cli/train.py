"""`apo-trl train`."""

from typing import Any

from apo_trl.cli.options import add_command


def add(commands: Any) -> None:
    usage = "%(prog)s RECIPE_OR_FILE [--key value ...] [--accelerate_config NAME_OR_FILE] [--num_processes N]"
    help, example = "train from a recipe or a YAML file", "smollm2-135m/apo_zero_lora --output_dir runs/first"
    text = "Train from a recipe or a YAML file, with the keys of `trl dpo` and the options of `accelerate launch`.\n"
    text += "Common keys: model_name_or_path, dataset_name, loss_type, beta, use_peft, output_dir.\n"
    text += "All of them: python -m apo_trl.train --help"
    parser = add_command(commands, "train", run, help, example, description=text, usage=usage)
    parser.keeps_rest = True
    parser.set_defaults(print_help=parser.print_help)


def run(rest: list[str], print_help: Any) -> None:
    from apo_trl.training.launcher import launch

    launch(rest) if rest else print_help()
