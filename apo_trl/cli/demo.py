"""`apo-trl demo`."""

from typing import Any

from apo_trl.cli.options import add_command, positive_int


def add(commands: Any) -> None:
    help = "train a small model with APO on a CPU, and score its answers before and after"
    files = "packaged pairs and prompts", "an adapter, the answers before and after, and report.png"
    parser = add_command(commands, "demo", run, help, "--seed 1", *files)
    parser.add_argument("--model", help="a model folder or hub name (default: the packaged SmolLM2-135M-Instruct)")
    parser.add_argument("--output_dir", default="runs/demo", metavar="DIR", help="(default: %(default)s)")
    parser.add_argument("--max_steps", type=positive_int, metavar="N", help="(default: the recipe's)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of training (default: %(default)s)")


def run(output_dir: str, **options: Any) -> None:
    from apo_trl.demo import run_demo
    from apo_trl.training.lock import output_lock

    with output_lock(output_dir):
        run_demo(output_dir, **options)
