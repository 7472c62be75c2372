"""The commands `apo-trl anchor` and `apo-trl compare`: parse, call, print."""

import argparse
import sys
from pathlib import Path
from typing import Any

from apo_trl.cli.options import positive_int
from apo_trl.errors import InputError
from apo_trl.io.files import write_json
from apo_trl.pairs import check_installed
from apo_trl.pairs.config.settings import Settings, add_arguments, known_keys, make_settings
from apo_trl.pairs.config.values import read
from apo_trl.training.screen import quiet_libraries

__all__ = ["add", "run_anchor", "run_compare"]

_RUN = ("seed", "concurrency", "max_requests", "max_cost", "max_failures", "judge_protocol", "judge_margin")


def add(commands: Any) -> None:
    """Add both commands."""
    roles = [key for key in known_keys() if key.startswith(("policy_", "judge_"))]
    anchor = commands.add_parser(
        "anchor", allow_abbrev=False, help="say whether chosen answers beat the policy's own, and which loss fits",
        usage="apo-trl anchor --dataset PAIRS --policy MODEL [--judge MODEL] [--key value ...]",
    )  # fmt: skip
    anchor.add_argument("--dataset", required=True, metavar="PAIRS", help="pairs: a file, a folder or a hub name")
    anchor.add_argument("--policy", required=True, metavar="MODEL", help="the model to be trained; policy_model")
    anchor.add_argument(
        "--judge", metavar="MODEL", help="who compares; judge_model, at judge_base_url or in this process"
    )
    anchor.add_argument("--split", default="train", help="(default: %(default)s)")
    anchor.add_argument(
        "--limit", type=positive_int, default=200, metavar="N", help="pairs that are judged (default: %(default)s)"
    )
    anchor.add_argument("--output_dir", metavar="DIR", help="(default: runs/anchor and the dataset's name)")
    anchor.add_argument(
        "--policy_response", metavar="COLUMN", help="the policy's own answers, which are not sampled then"
    )
    anchor.add_argument("--chosen_score", metavar="COLUMN", help="scores of chosen, in the place of a judge")
    anchor.add_argument("--policy_score", metavar="COLUMN", help="scores of the policy's own answers")
    add_arguments(anchor, {*_RUN, *roles} - {"policy_model", "judge_model"})
    compare = commands.add_parser(
        "compare", allow_abbrev=False, help="let a judge compare the answers of two models",
        usage="apo-trl compare --a MODEL --b MODEL --prompts FILE --judge MODEL [--key value ...]",
    )  # fmt: skip
    compare.add_argument("--a", required=True, metavar="MODEL", help="a folder, a hub name, or a name at --a_base_url")
    compare.add_argument("--b", required=True, metavar="MODEL", help="the same")
    compare.add_argument("--prompts", required=True, metavar="FILE", help="as for `apo-trl pairs build`")
    compare.add_argument(
        "--judge", required=True, metavar="MODEL", help="who compares, at judge_base_url or in process"
    )
    compare.add_argument("--a_base_url", metavar="URL", help="where A is served (default: in this process)")
    compare.add_argument("--b_base_url", metavar="URL", help="where B is served (default: in this process)")
    compare.add_argument("--output_dir", default="runs/compare", metavar="DIR", help="(default: %(default)s)")
    hidden = {"policy_model", "policy_base_url", "judge_model"}
    add_arguments(compare, {*_RUN, "max_prompts", "prompts_split", *roles} - hidden)


def _keys(options: argparse.Namespace) -> dict[str, Any]:
    """Give the recipe's keys among the options."""
    return {key: value for key, value in vars(options).items() if key in known_keys()}


def run_anchor(options: argparse.Namespace) -> None:
    """Do what `apo-trl anchor` was asked for."""
    from apo_trl.evaluation.anchor import (
        anchor,
        contrast,
        draw,
        likelihoods,
        read_dataset,
        suggest,
        table,
        write_dataset,
    )

    check_installed()
    if bool(options.chosen_score) != bool(options.policy_score):
        raise InputError("--chosen_score and --policy_score belong together; give both columns, or a --judge.")
    folder = Path(options.output_dir or Path("runs/anchor") / Path(options.dataset.rstrip("/")).name.split(".")[0])
    keys = _keys(options)
    known = known_keys()
    seed, margin = (
        read(key, known[key], keys.get(key, known[key].default), many=False) for key in ("seed", "judge_margin")
    )
    rows = read_dataset(options.dataset, options.split)
    settings = _anchor_settings(options, folder)
    places = draw(len(rows), options.limit, seed)
    report: dict[str, Any]
    if options.chosen_score:
        columns = (options.chosen_score, options.policy_score)
        report = anchor(rows, range(len(rows)), scores=columns, margin=margin)
    elif settings:
        report = anchor(rows, places, settings, response=options.policy_response)
    else:
        report = {"asked": 0, "dropped": {}, "outcomes": {}, "answers": {}, "stopped": "", **suggest(0, 0)}
        report["why"] = "there is neither a --judge nor a --chosen_score with a --policy_score"
    outcomes, answers = report.pop("outcomes"), report.pop("answers")
    if not keys.get("policy_base_url") and not report["stopped"]:
        quiet_libraries()
        report["likelihoods"] = likelihoods(options.policy, rows, places, answers)
    report["contrast"] = contrast(rows)
    write_json(folder / "anchor.json", report)
    print(table(report))
    if outcomes:
        write_dataset(rows, outcomes, folder / "pairs.jsonl")
        print(f"Written: {folder / 'pairs.jsonl'} with chosen_wins, for apo_blend; {folder / 'anchor.json'}")
    _stop(report)


def _anchor_settings(options: argparse.Namespace, folder: Path) -> Settings | None:
    """Give the settings of asking, or None where nobody is asked."""
    if not options.judge or options.chosen_score:
        return None
    keys = _keys(options) | {"method": "on_policy_judge", "prompts": options.dataset, "output_dir": str(folder)}
    return make_settings(keys | {"policy_model": options.policy, "judge_model": options.judge})


def run_compare(options: argparse.Namespace) -> None:
    """Do what `apo-trl compare` was asked for."""
    from apo_trl.evaluation.compare import compare, table

    check_installed()
    keys = _keys(options) | {"method": "off_policy_judge", "num_responses": 2, "judge_model": options.judge}
    keys |= {"policy_model": [options.a, options.b], "policy_base_url": [options.a_base_url, options.b_base_url]}
    settings = make_settings(keys)
    report = compare(settings)
    print(table(report))
    print(f"Each prompt: {settings.folder / 'compare.json'}")
    _stop(report)


def _stop(report: dict[str, Any]) -> None:
    if report["stopped"]:
        print(f"Stopped early: {report['stopped']} The same command again goes on.", file=sys.stderr)
        sys.exit(1)
