"""The command `apo-trl`: parse, call, print."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apo_trl.cli.judged import add as add_judged
from apo_trl.cli.options import positive_int
from apo_trl.cli.pairs import add as add_pairs
from apo_trl.errors import nearest
from apo_trl.training.screen import exit_on_error, quiet_libraries

__all__ = ["main"]

_TRAIN = """\
Train with APO: `accelerate launch -m apo_trl.train` in one command.

  apo-trl train RECIPE_OR_FILE [--key value ...] [--accelerate_config NAME_OR_FILE] [--num_processes N ...]

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
        "train", help="train from a recipe or a YAML file", usage="apo-trl train RECIPE_OR_FILE [--key value ...]",
        description=_TRAIN, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    run = commands.add_parser("run", help="run a TRL script as it is, with the losses registered")
    run.add_argument("script", metavar="SCRIPT", help="the path of a Python file")
    run.add_argument("arguments", nargs=argparse.REMAINDER, help="what the script takes")
    _add_recipes(commands)
    add_pairs(commands)
    add_judged(commands)
    merge = commands.add_parser("merge", help="merge an adapter into its base model")
    merge.add_argument("adapter", metavar="ADAPTER", help="the folder of a trained adapter")
    merge.add_argument(
        "--output_dir", required=True, help="the folder of the merged model, which must not hold anything"
    )
    merge.add_argument("--dtype", help="float32, bfloat16 or float16 (default: that of the base model)")
    merge.add_argument("--base", help="the base model (default: the one that the adapter names)")
    evaluate = commands.add_parser("evaluate", help="say what training did to each pair of a dataset")
    evaluate.add_argument("--model", required=True, help="the trained model or adapter: a folder or hub name")
    evaluate.add_argument("--reference", help="the model that it started from (default: an adapter's base)")
    evaluate.add_argument("--dataset", required=True, help="pairs: a file, a folder or a hub name")
    evaluate.add_argument("--split", help="(default: test where there is one, else train)")
    evaluate.add_argument("--limit", type=positive_int, metavar="N", help="only the first N pairs")
    evaluate.add_argument(
        "--max_length", type=positive_int, metavar="N", help="cut rows as in training (default: not cut)"
    )
    evaluate.add_argument(
        "--batch_size", type=positive_int, default=8, metavar="N", help="pairs (default: %(default)s)"
    )
    evaluate.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    evaluate.add_argument("--dtype", help="float32, bfloat16, ... (default: float32 on a CPU, else the checkpoint's)")
    evaluate.add_argument(
        "--output", metavar="FILE", help="(default: evaluation.parquet in the model's folder, where it has one)"
    )
    report = commands.add_parser("report", help="a page with figures of a run, or of several side by side")
    report.add_argument("runs", metavar="RUN", nargs="+", help="the output folder of a training run")
    report.add_argument("--output", default="report.html", metavar="FILE", help="(default: %(default)s)")
    bench = commands.add_parser("bench", help="time a step against stock TRL's, and compare the results")
    bench.add_argument("files", metavar="FILE", nargs="*", help="pairs of your own, as for `apo-trl pairs stats`")
    bench.add_argument("--model", help="a model whose shape is taken, with random weights (default: SmolLM2-135M)")
    bench.add_argument("--layers", type=positive_int, help="only so many of its layers")
    bench.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    bench.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="(default: float32; bfloat16 for large models)"
    )
    bench.add_argument("--attention", default="sdpa", help="attn_implementation of both sides (default: %(default)s)")
    bench.add_argument("--only", metavar="TEXT", help="only the rows whose name contains this")
    bench.add_argument("--checkpointing", action="store_true", help="with activation checkpointing")
    bench.add_argument("--batch_size", type=positive_int, default=2, help="pairs (default: %(default)s)")
    bench.add_argument(
        "--repeats", type=positive_int, default=5, help="of which the median is told (default: %(default)s)"
    )
    bench.add_argument("--json", metavar="FILE", help="write the figures there too")
    demo = commands.add_parser(
        "demo", help="watch APO train a small model on this CPU, in a few minutes", allow_abbrev=False
    )
    demo.add_argument("--model", help="a model folder or hub name instead of the packaged SmolLM2-135M-Instruct")
    demo.add_argument("--output_dir", default="runs/demo", help="where the results go (default: %(default)s)")
    demo.add_argument("--max_steps", type=positive_int, help="fewer or more steps than the recipe's")

    options, rest = parser.parse_known_args(arguments)
    planning = options.command == "recipes" and options.action == "plan"
    if rest and options.command != "train" and not planning:
        command = commands.choices.get(options.command, parser)
        name = rest[0].split("=")[0] if rest[0].startswith("-") else "one argument more"  # which might be a key
        known = nearest(name, command._option_string_actions)
        parser.exit(2, f"error: `{command.prog}` does not take {name}.{known} See `{command.prog} --help`.\n")
    if options.version:
        from apo_trl import __version__

        print(__version__)
    elif options.command == "train":
        from apo_trl.training.launcher import launch

        launch(rest) if rest else train.print_help()
    elif options.command == "run":
        from apo_trl.run import main as run_script

        run_script([options.script, *options.arguments])
    elif options.command == "recipes":
        with exit_on_error():
            _recipes(options, rest)
    elif options.command == "pairs":
        from apo_trl.cli.pairs import run as run_pairs

        with exit_on_error():
            run_pairs(options)
    elif options.command == "merge":
        from apo_trl.models.merge import merge as merge_adapter

        with exit_on_error():
            folder = merge_adapter(options.adapter, options.output_dir, dtype=options.dtype, base=options.base)
            print(f"Merged into {folder}.")
    elif options.command in ("anchor", "compare"):
        from apo_trl.cli import judged as judged_cli

        with exit_on_error():
            (judged_cli.run_anchor if options.command == "anchor" else judged_cli.run_compare)(options)
    elif options.command == "evaluate":
        with exit_on_error():
            _evaluate(options)
    elif options.command == "report":
        from apo_trl.evaluation.report import report as make_report

        with exit_on_error():
            print(f"Look at {make_report(options.runs, options.output)}.")
    elif options.command == "bench":
        with exit_on_error():
            _bench(options)
    elif options.command == "demo":
        from apo_trl.demo import run_demo

        with exit_on_error():
            run_demo(options.output_dir, model=options.model, max_steps=options.max_steps)
    else:
        parser.print_help()
        sys.exit(2)


def _settings(options: argparse.Namespace, *left_out: str) -> dict[str, Any]:
    return {key: value for key, value in vars(options).items() if key not in ("command", "version", *left_out)}


def _evaluate(options: argparse.Namespace) -> None:
    quiet_libraries()
    from apo_trl.evaluation.evaluate import evaluate, summarise, table, write_rows

    folder = Path(options.model) if Path(options.model).is_dir() else Path()
    output = Path(options.output) if options.output else folder / "evaluation.parquet"
    rows = evaluate(**_settings(options, "output"))
    write_rows(rows, output)
    print(table(summarise(rows)))
    print(f"Each pair: {output}")


def _bench(options: argparse.Namespace) -> None:
    quiet_libraries()
    from apo_trl.benchmark.bench import bench, layout_times, table
    from apo_trl.io.files import write_json

    rows = bench(**_settings(options, "json"))
    print(table(rows))
    for name, milliseconds in layout_times().items():
        print(f"Time to build the layout of {name}: {milliseconds:.1f} ms on the CPU.")
    if options.json:
        write_json(Path(options.json), [row._asdict() for row in rows])


def _add_recipes(commands: Any) -> None:
    recipes = commands.add_parser("recipes", help="list, show, copy, check and plan with recipes").add_subparsers(
        dest="action", metavar="ACTION"
    )
    recipes.add_parser("list", help="list them (as without an action)")
    show = recipes.add_parser("show", help="print one")
    show.add_argument("name", metavar="NAME")
    copy = recipes.add_parser("copy", help="copy one, to be changed")
    copy.add_argument("name", metavar="NAME")
    copy.add_argument("file", metavar="FILE", type=Path)
    check = recipes.add_parser(
        "check", help="check files against the installed classes; status 1 where one has an error"
    )
    check.add_argument("files", metavar="FILE", nargs="+", help="a file, or the name of a recipe")
    plan = recipes.add_parser(
        "plan",
        help="say what will fit",
        description="Say how much memory a run takes on each GPU, and what to change where it does not fit. Any key of "
        "the recipe can be given after it, as for `apo-trl train`.",
        allow_abbrev=False,
    )
    plan.add_argument("name", metavar="NAME", help="a recipe or a YAML file")
    plan.add_argument("--gpus", type=positive_int, default=1, help="how many (default: %(default)s)")
    plan.add_argument("--gpu-memory", type=float, required=True, metavar="GB", help="of each, in GB")
    plan.add_argument(
        "--accelerate_config", default="ddp", help="a hardware file by name or path (default: %(default)s)"
    )


def _recipes(options: argparse.Namespace, rest: list[str]) -> None:
    from apo_trl.errors import InputError
    from apo_trl.io.resources import find_recipe, pairs_names, recipe_names
    from apo_trl.recipes.catalog import describe
    from apo_trl.recipes.check import check

    if options.action in (None, "list"):
        rows = [describe(name) for name in recipe_names()]
        table = [{column: column for column in rows[0]}, *rows]
        widths = {column: max(len(row[column]) for row in table) for column in rows[0]}
        for row in table:
            print("  ".join(row[column].ljust(width) for column, width in widths.items()).rstrip())
        print(f"\nFor `apo-trl pairs build`: {', '.join(pairs_names())}")
    elif options.action == "show":
        print(find_recipe(options.name).read_text(encoding="utf-8"), end="")
    elif options.action == "copy":
        if options.file.exists():
            raise InputError(f"{options.file} exists; choose another FILE or remove it.")
        options.file.write_text(find_recipe(options.name).read_text(encoding="utf-8"), encoding="utf-8")
    elif options.action == "plan":
        quiet_libraries()
        from apo_trl.io.resources import hardware
        from apo_trl.recipes.catalog import is_unpaired
        from apo_trl.recipes.memory import plan as planning
        from apo_trl.training.arguments import parse

        run, _ = parse([options.name, "--use_cpu", *rest], unpaired=is_unpaired(find_recipe(options.name)))
        plan = planning.from_recipe(run, gpus=options.gpus, **hardware(options.accelerate_config))
        print(f"{planning.table(plan)}\n{planning.verdict(plan, options.gpu_memory)}")
    elif options.action == "check":
        quiet_libraries()
        errors = 0
        for name in options.files:
            findings = check(name)
            errors += sum(finding.level == "error" for finding in findings)
            print(f"{name}: {'errors' if any(f.level == 'error' for f in findings) else 'ok'}")
            for finding in findings:
                print(f"  {finding.level}: {finding.text}")
        sys.exit(1 if errors else 0)


if __name__ == "__main__":
    main()
