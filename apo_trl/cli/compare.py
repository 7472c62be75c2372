"""`apo-trl compare`."""

from typing import Any

from apo_trl.cli.options import JUDGE, MODEL, OUTPUT, PROMPTS, add_command, answering_keys, exit_if_stopped
from apo_trl.pairs import check_installed
from apo_trl.pairs.config.settings import add_arguments, make_settings


def add(commands: Any) -> None:
    help = "compute the win rate of one model's answers over another's, by a judge"
    example = "--a runs/first --b SmolLM2-135M-Instruct \\\n"
    example += "    --prompts apo_trl/demo/pairs/test.jsonl --judge Qwen/Qwen3-4B"
    files = "prompts, and replies of A, B and the judge", "compare.json, with every prompt, to output_dir"
    usage = "%(prog)s --a MODEL --b MODEL --prompts FILE --judge MODEL\n       [--key value ...]"
    parser = add_command(commands, "compare", run, help, example, *files, usage=usage)
    for name in ("a", "b"):
        parser.add_argument(f"--{name}", required=True, metavar="MODEL", help=MODEL.format(name))
        parser.add_argument(f"--{name}_base_url", metavar="URL", help=f"server of {name} (default: in this process)")
    parser.add_argument("--prompts", required=True, metavar="FILE", help=PROMPTS)
    parser.add_argument("--judge", metavar="MODEL", help=JUDGE)
    parser.add_argument("--output_dir", default="runs/compare", metavar="DIR", help=OUTPUT.format("%(default)s"))
    keys = answering_keys("policy_", "judge_") - {"policy_base_url"}
    add_arguments(parser, keys | {"max_prompts", "prompts_split"})


def run(a: str, b: str, a_base_url: str | None, b_base_url: str | None, judge: str | None, **keys: Any) -> None:
    check_installed()
    from apo_trl.evaluation.compare import compare, table

    keys |= {"method": "off_policy_judge", "num_responses": 2, "judge_model": judge}
    settings = make_settings(keys | {"policy_model": [a, b], "policy_base_url": [a_base_url, b_base_url]})
    report = compare(settings)
    print(f"{table(report)}\nEach prompt: {settings.folder / 'compare.json'}")
    exit_if_stopped(report["stopped"])
