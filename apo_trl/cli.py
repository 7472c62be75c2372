"""The command `apo-trl`: parse, call, print."""

import argparse
import sys
from collections.abc import Sequence

__all__ = ["main"]

_TRAIN = """\
Train with APO: `accelerate launch -m apo_trl.train` in one command.

  apo-trl train --config FILE.yaml [--key value ...] [--accelerate_config NAME_OR_FILE] [--num_processes N ...]

Keys, in the file or on the command line, are those of `trl dpo`: TRL's ScriptArguments, ModelConfig and
DatasetMixtureConfig, and APOConfig, which is DPOConfig with APO as the default loss. What `accelerate launch` takes may
stand among them. The most used:

  --model_name_or_path M     a model folder or hub name
  --dataset_name D           a hub name, a folder, or a local .jsonl, .json or .parquet file
  --loss_type L [L ...]      apo_zero, apo_down, apo_zero_norm, apo_down_norm, apo_blend, or any loss of TRL
  --beta B                   0.1; about 50 times that for the _norm losses
  --use_peft, --load_in_4bit LoRA, QLoRA
  --output_dir DIR

All of them: python -m apo_trl.train --help
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="apo-trl",
        description="Anchored Preference Optimization (APO) for Hugging Face TRL.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    train = commands.add_parser(
        "train", help="train from a YAML file", usage="apo-trl train --config FILE.yaml [--key value ...]",
        description=_TRAIN, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    run = commands.add_parser("run", help="run a TRL script as it is, with the losses registered")
    run.add_argument("script", metavar="SCRIPT", help="the path of a Python file")
    run.add_argument("arguments", nargs=argparse.REMAINDER, help="what the script takes")
    demo = commands.add_parser(
        "demo", help="watch APO train a small model on this CPU, in a few minutes", allow_abbrev=False
    )
    demo.add_argument("--model", help="a model folder or hub name instead of the packaged SmolLM2-135M-Instruct")
    demo.add_argument("--output_dir", default="runs/demo", help="where the results go (default: %(default)s)")
    demo.add_argument("--max_steps", type=int, help="fewer or more steps than the recipe's")

    options, rest = parser.parse_known_args(arguments)
    if rest and options.command != "train":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.version:
        from . import __version__

        print(__version__)
    elif options.command == "train":
        from .train import launch

        launch(rest) if rest else train.print_help()
    elif options.command == "run":
        from .run import main as run_script

        run_script([options.script, *options.arguments])
    elif options.command == "demo":
        from .demo import run_demo
        from .train import one_message

        with one_message():
            run_demo(options.output_dir, model=options.model, max_steps=options.max_steps)
    else:
        parser.print_help()
        sys.exit(2)


if __name__ == "__main__":
    main()
