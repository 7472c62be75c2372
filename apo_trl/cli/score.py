"""`apo-trl score`."""

from pathlib import Path
from typing import Any

from apo_trl.cli.options import MODEL, OUTPUT, PROMPTS, add_command, answering_keys, exit_if_stopped
from apo_trl.pairs import check_installed
from apo_trl.pairs.config.settings import add_arguments, make_settings


def add(commands: Any) -> None:
    help = "score a model's answers by a function: the share that follows, and the worst"
    example = "--model runs/first \\\n    --prompts apo_trl/demo/instructions/test.jsonl \\\n"
    example += "    --judge_function apo_trl.pairs.instructions:reward"
    files = "prompts, and answers of the model", "answers.parquet, a row for each prompt, and score.json to output_dir"
    usage = "%(prog)s --model MODEL --prompts FILE --judge_function FUNCTION\n       [--key value ...]"
    parser = add_command(commands, "score", run, help, example, *files, usage=usage)
    parser.add_argument("--model", required=True, metavar="MODEL", help=MODEL.format("policy"))
    parser.add_argument("--prompts", required=True, metavar="FILE", help=PROMPTS)
    help = "module:function or file.py:function (docs/score.md)"
    parser.add_argument("--judge_function", required=True, metavar="FUNCTION", help=help)
    parser.add_argument("--output_dir", metavar="DIR", help=OUTPUT.format("runs/score/NAME"))
    help = "0 is greedy; null leaves it out (default: %(default)s)"
    parser.add_argument("--policy_temperature", default=0, metavar="FLOAT", help=help)
    add_arguments(parser, answering_keys("policy_") - {"policy_temperature"} | {"max_prompts", "prompts_split"})


def run(model: str, output_dir: str | None, **keys: Any) -> None:
    check_installed()
    from apo_trl.evaluation.score import score, table

    folder = output_dir or str(Path("runs/score", Path(model.rstrip("/")).name))
    settings = make_settings(keys | {"method": "on_policy_judge", "policy_model": model, "output_dir": folder})
    report = score(settings)
    print(f"{table(report)}\nEach answer: {settings.folder / 'answers.parquet'}, the summary: score.json beside it")
    exit_if_stopped(report["stopped"])
