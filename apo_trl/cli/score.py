"""`apo-trl score`."""

import argparse
from pathlib import Path
from typing import Any

from apo_trl.cli.options import add_command, exit_if_stopped
from apo_trl.pairs import check_installed
from apo_trl.pairs.config.keys import Role, kind_of
from apo_trl.pairs.config.settings import add_arguments, make_settings

_RUN = {"prompts_split", "max_prompts", "seed", "concurrency", "max_requests", "max_cost", "max_failures"}
_NOT_OF_POLICY = ("name", "model", "function", "template")


def add(commands: Any) -> None:
    help = "score a model's answers by a function: the share that follows, and the worst"
    example = "--model runs/first \\\n    --prompts apo_trl/demo/instructions/test.jsonl \\\n"
    example += "    --judge_function apo_trl.pairs.instructions:reward"
    files = "prompts, and answers of the model", "answers.parquet, a row for each prompt, and score.json to output_dir"
    usage = "%(prog)s --model MODEL --prompts FILE --judge_function FUNCTION\n       [--key value ...]"
    parser = add_command(commands, "score", run, help, example, *files, usage=usage)
    parser.add_argument("--model", required=True, metavar="MODEL", help="model or adapter, or a name at --base_url")
    parser.add_argument("--prompts", required=True, metavar="FILE", help="prompts, as for `apo-trl pairs build`")
    parser.add_argument(
        "--judge_function",
        required=True,
        metavar="FUNCTION",
        help="module:function or file.py:function (docs/score.md)",
    )
    parser.add_argument("--output_dir", metavar="DIR", help="(default: runs/score/NAME)")
    add_arguments(parser, _RUN | {"function_timeout"})
    group = parser.add_argument_group("the model")
    for name, field in Role.model_fields.items():
        if name not in _NOT_OF_POLICY:
            help = f"{field.description} (default: 0)" if name == "temperature" else str(field.description)
            flags = f"--{name}", f"--policy_{name}"  # the second as in `apo-trl pairs`
            group.add_argument(*flags, dest=name, metavar=kind_of(field), default=argparse.SUPPRESS, help=help)


def run(model: str, output_dir: str | None, **keys: Any) -> None:
    check_installed()
    from apo_trl.evaluation.score import score, table

    policy = {f"policy_{name}": keys.pop(name) for name in Role.model_fields if name in keys}
    folder = output_dir or str(Path("runs/score", Path(model.rstrip("/")).name))
    settings = make_settings(
        {"policy_temperature": 0} | policy | keys
        | {"method": "on_policy_judge", "policy_model": model, "output_dir": folder}
    )  # fmt: skip
    report = score(settings)
    print(f"{table(report)}\nEach answer: {settings.folder / 'answers.parquet'}, the summary: score.json beside it")
    exit_if_stopped(report["stopped"])
