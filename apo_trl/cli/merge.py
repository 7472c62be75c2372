"""`apo-trl merge`."""

from typing import Any

from apo_trl.cli.options import add_command
from apo_trl.training.console import quiet_libraries


def add(commands: Any) -> None:
    help, example = "merge an adapter into its base model", "runs/first --output_dir merged"
    files = "the folder of an adapter, and its base model", "a whole model to output_dir"
    parser = add_command(commands, "merge", run, help, example, *files)
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of a trained adapter")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="new or empty folder for the merged model")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: that of the base model)")
    parser.add_argument("--base", metavar="MODEL", help="base model (default: the adapter's)")


def run(**options: Any) -> None:
    quiet_libraries()
    from apo_trl.models.merge import merge

    print(f"Merged into {merge(**options)}.")
