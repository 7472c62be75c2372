"""`apo-trl anchor`."""

import random
from pathlib import Path
from typing import Any

from apo_trl.cli.options import JUDGE, MODEL, OUTPUT, add_command, answering_keys, exit_if_stopped, positive_int
from apo_trl.errors import InputError
from apo_trl.io.files import write_json
from apo_trl.pairs import check_installed
from apo_trl.pairs.config.settings import add_arguments, make_settings
from apo_trl.training.console import quiet_libraries
from apo_trl.training.threads import choose_threads


def add(commands: Any) -> None:
    help = "measure whether chosen answers beat the policy's own, and suggest a loss"
    example = "--policy SmolLM2-135M-Instruct --dataset apo_trl/demo/pairs \\\n"
    example += "    --chosen_score chosen_score --policy_score rejected_score"
    files = "pairs, and answers and verdicts of models or columns", "anchor.json, and pairs.jsonl with chosen_wins"
    usage = "%(prog)s --policy MODEL --dataset PAIRS [--key value ...]"
    parser = add_command(commands, "anchor", run, help, example, *files, usage=usage)
    parser.add_argument("--policy", required=True, metavar="MODEL", help=MODEL.format("policy"))
    parser.add_argument("--dataset", required=True, metavar="PAIRS", help="a file, a folder or a hub name")
    parser.add_argument("--split", default="train", help="split of the dataset (default: %(default)s)")
    parser.add_argument("--limit", type=positive_int, default=200, metavar="N", help="pairs (default: %(default)s)")
    parser.add_argument("--judge", metavar="MODEL", help=JUDGE)
    parser.add_argument("--output_dir", metavar="DIR", help=OUTPUT.format("runs/anchor/NAME"))
    parser.add_argument("--policy_response", metavar="COLUMN", help="the policy's answers, if not sampled")
    parser.add_argument("--chosen_score", metavar="COLUMN", help="scores of chosen answers, without a judge")
    parser.add_argument("--policy_score", metavar="COLUMN", help="scores of the policy's own answers")
    add_arguments(parser, answering_keys("policy_", "judge_"))


def run(
    *, dataset: str, policy: str, judge: str | None, split: str, limit: int, output_dir: str | None,
    policy_response: str | None, chosen_score: str | None, policy_score: str | None, **keys: Any,
) -> None:  # fmt: skip
    check_installed()
    from apo_trl.evaluation import anchor as module

    if bool(chosen_score) != bool(policy_score):
        raise InputError("chosen_score: requires policy_score, and vice versa. Set both columns, or a judge.")
    folder = Path(output_dir or Path("runs/anchor") / Path(dataset.rstrip("/")).name.split(".")[0])
    keys |= {"method": "on_policy_judge", "prompts": dataset, "output_dir": str(folder), "policy_model": policy}
    by_function = "judge_function" in keys
    settings = make_settings(keys | {"judge_model": judge or (None if by_function else "unused")})
    rows = module.read_dataset(dataset, split)
    indices = sorted(random.Random(settings.seed).sample(range(len(rows)), min(limit, len(rows))))
    if chosen_score and policy_score:
        report = module.anchor(rows, range(len(rows)), settings, scores=(chosen_score, policy_score))
    elif judge or by_function:
        report = module.anchor(rows, indices, settings, response=policy_response)
    else:
        report = {"asked": 0, "dropped": {}, "outcomes": {}, "answers": {}, "stopped": "", **module.suggest(0, 0)}
        report["why"] = "neither --judge, --judge_function nor --chosen_score with --policy_score is set"
    outcomes, answers = report.pop("outcomes"), report.pop("answers")
    if not settings.policy[0].base_url and not report["stopped"]:
        choose_threads()
        quiet_libraries()
        report["likelihoods"] = module.likelihoods(policy, rows, indices, answers)
    report["contrast"] = module.contrast(rows)
    write_json(folder / "anchor.json", report)
    print(module.table(report))
    if outcomes:
        module.write_dataset(rows, outcomes, folder / "pairs.jsonl")
        print(f"Written: {folder / 'pairs.jsonl'} with chosen_wins, for apo_blend; {folder / 'anchor.json'}")
    exit_if_stopped(report["stopped"])
