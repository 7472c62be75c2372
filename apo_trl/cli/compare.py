"""`apo-trl compare`."""

from typing import Any

from apo_trl.cli.options import add_command, exit_if_stopped, judging_keys
from apo_trl.pairs import check_installed
from apo_trl.pairs.config.settings import add_arguments, make_settings


def add(commands: Any) -> None:
    help = "compute the win rate of one model's answers over another's, by a judge"
    example = "--a runs/first --b SmolLM2-135M-Instruct \\\n"
    example += "    --prompts apo_trl/demo/pairs/test.jsonl --judge Qwen/Qwen3-4B"
    files = "prompts, and replies of A, B and the judge", "compare.json, with every prompt, to output_dir"
    usage = "%(prog)s --a MODEL --b MODEL --prompts FILE --judge MODEL\n       [--key value ...]"
    parser = add_command(commands, "compare", run, help, example, *files, usage=usage)
    parser.add_argument("--a", required=True, metavar="MODEL", help="a folder, a hub name, or a name at a_base_url")
    parser.add_argument("--b", required=True, metavar="MODEL", help="a folder, a hub name, or a name at b_base_url")
    parser.add_argument("--prompts", required=True, metavar="FILE", help="prompts, as for `apo-trl pairs build`")
    parser.add_argument("--judge", metavar="MODEL", help="model that judges; or set --judge_function")
    parser.add_argument("--a_base_url", metavar="URL", help="server of A (default: in this process)")
    parser.add_argument("--b_base_url", metavar="URL", help="server of B (default: in this process)")
    parser.add_argument("--output_dir", default="runs/compare", metavar="DIR", help="(default: %(default)s)")
    add_arguments(parser, judging_keys() - {"policy_base_url"} | {"max_prompts", "prompts_split"})


def run(a: str, b: str, a_base_url: str | None, b_base_url: str | None, judge: str | None, **keys: Any) -> None:
    check_installed()
    from apo_trl.evaluation.compare import compare, table

    keys |= {"method": "off_policy_judge", "num_responses": 2, "judge_model": judge}
    settings = make_settings(keys | {"policy_model": [a, b], "policy_base_url": [a_base_url, b_base_url]})
    report = compare(settings)
    print(f"{table(report)}\nEach prompt: {settings.folder / 'compare.json'}")
    exit_if_stopped(report["stopped"])
