"""The commands `apo-trl pairs ...`."""

import json as jsonlib
import shlex
import sys
from typing import Any

from apo_trl.cli.options import add_command, positive_int, stopped_line
from apo_trl.pairs import check_installed
from apo_trl.pairs.config.settings import add_arguments, parse


def add(commands: Any) -> None:
    pairs = add_command(commands, "pairs", None, "build preference pairs, and measure them", "stats apo_trl/demo/pairs")
    actions = pairs.add_subparsers(title="actions", metavar="ACTION", required=True)
    built = "prompts, and replies of models", "pairs.jsonl, pairs.parquet, README.md and the reply cache to output_dir"
    exported = "prompts, and cached replies", "requests to output_dir/batch"
    imported = "the output files of a batch", "their replies to the cache in output_dir"
    for name, run, help, example, files in (
        ("build", build, "build the pairs of a recipe, or resume", "--max_prompts 16", built),
        ("export-batch", export_batch, "write the due requests to batch files, not to servers", "", exported),
        ("import-batch", import_batch, "read the responses of batch files, for `build`", "output.jsonl", imported),
    ):
        usage = f"%(prog)s RECIPE {'FILE ... ' * (run is import_batch)}[--key value ...]"
        action = add_command(actions, name, run, help, f"pairs/clair_local {example}", *files, usage=usage)
        action.add_argument("recipe", metavar="RECIPE", help="a YAML file or the name of a recipe")
        if run is import_batch:
            action.add_argument("files", metavar="FILE", nargs="+", help="an output file of the batch")
        add_arguments(action)
    help, files = "show why rows were dropped, and raw replies", ("the folder of `build`", "nothing; prints text")
    action = add_command(actions, "show", show, help, "runs/pairs/clair_local --reason kept", *files)
    action.add_argument("folder", metavar="FOLDER", help="the output_dir of `build`, or its report.json")
    action.add_argument("--reason", metavar="NAME", help="show rows that were dropped for it, or `kept` ones")
    action.add_argument("--limit", type=positive_int, metavar="N", default=5, help="maximum number of rows")
    help = "measure how contrastive the pairs of a preference dataset are"
    action = add_command(actions, "stats", stats, help, "apo_trl/demo/pairs", "a dataset", "nothing; prints a table")
    action.add_argument("dataset", metavar="FILE", help="a .jsonl, .json or .parquet file, a folder or a hub name")
    action.add_argument("--tokenizer", metavar="MODEL", help="measure in tokens of this model")
    action.add_argument("--max_length", type=positive_int, metavar="N", help="measure after truncation too")
    action.add_argument("--eval_sets", nargs="+", metavar="FILE", default=[], help="files to search for the prompts")
    action.add_argument("--json", action="store_true", help="print all figures as JSON")


def build(recipe: str, **keys: Any) -> None:
    check_installed()
    from apo_trl.pairs.build import build as build_pairs
    from apo_trl.pairs.estimate import estimate, table
    from apo_trl.pairs.llm.response_cache import open_read_only
    from apo_trl.pairs.output.advice import commonest
    from apo_trl.pairs.text.reasons import RETRY

    settings = parse(recipe, keys)
    if settings.dry_run:
        with open_read_only(settings.folder) as cache:
            print(table(estimate(settings, cache)))
        print("Requests still to send. Lengths are the mean of cached responses, or max_tokens if there are none.")
        print("Each malformed reply is requested once more: repairs is the largest number of these requests.")
        return
    result = build_pairs(settings)
    report = result.report
    if not (result.stopped and report["dropped"].get("not_asked") == report["asked"]):
        _print_counts(report, result.folder)
    folder = shlex.quote(str(result.folder))
    if result.stopped:
        print(stopped_line(result.stopped), file=sys.stderr)
    elif "not_answered" in report["dropped"]:
        print("Some rows wait for a batch: `apo-trl pairs import-batch`, then the same command.", file=sys.stderr)
    elif not report["complete"]:
        print(RETRY, file=sys.stderr)
    elif report["advice"]:
        print(f"Read the replies: apo-trl pairs show {folder} --reason {commonest(report['dropped']) or 'kept'}")
    else:
        print(f"Train on them: apo-trl train RECIPE --dataset_name {folder}")
    if result.broken or not report["kept"]:
        sys.exit(1)


def _print_counts(report: dict[str, Any], folder: Any) -> None:
    print(f"Kept {report['kept']:,} of {report['asked']:,}: pairs.jsonl, pairs.parquet, README.md in {folder}.")
    if report["dropped"]:
        print("Dropped: " + ", ".join(f"{count:,} {name}" for name, count in report["dropped"].items()) + ".")
    for role, used in report["roles"].items():
        cost = f", cost {used['cost']:.4g}" if used["cost"] else ""
        repairs = f" ({count:,} to repair a malformed reply)" if (count := report["repairs"].get(role)) else ""
        tokens = f"{used['prompt_tokens']:,} + {used['completion_tokens']:,} tokens"
        print(f"{role}: {used['requests']:,} requests in all runs{repairs}, {tokens}{cost}.")
    for line in report["advice"]:
        print(line)


def export_batch(recipe: str, **keys: Any) -> None:
    check_installed()
    from apo_trl.pairs import batch
    from apo_trl.pairs.llm.response_cache import ResponseCache

    settings = parse(recipe, keys, environment=False)
    with ResponseCache(settings.folder) as cache:
        written = batch.export_batch(settings, cache)
    for path, count in written.items():
        print(f"{path}: {count:,} requests")
    if written:
        print("Run them, then `apo-trl pairs import-batch` with the output files, before the next export.")
    else:
        print("All responses are cached: `apo-trl pairs build` writes the dataset.")


def import_batch(recipe: str, files: list[str], **keys: Any) -> None:
    check_installed()
    from apo_trl.pairs import batch
    from apo_trl.pairs.llm.response_cache import ResponseCache

    settings = parse(recipe, keys, environment=False)
    with ResponseCache(settings.folder) as cache:
        counts = batch.import_batch(settings, cache, files)
    print("Lines: " + (", ".join(f"{count:,} {name}" for name, count in counts.items()) or "none") + ".")
    print("Then: `apo-trl pairs export-batch` for the next requests, or `apo-trl pairs build`.")


def show(folder: str, reason: str | None, limit: int) -> None:
    check_installed()
    from apo_trl.pairs.output.show import show as lines

    for line in lines(folder, reason, limit):
        print(line)


def stats(dataset: str, tokenizer: str | None, max_length: int | None, eval_sets: list[str], json: bool) -> None:
    check_installed()
    from apo_trl.io.readers import read_pairs
    from apo_trl.models.loading import load_tokenizer
    from apo_trl.pairs.statistics.overlap import EvalSets, prompt_text
    from apo_trl.pairs.statistics.statistics import Statistics
    from apo_trl.pairs.statistics.table import table

    statistics = Statistics(load_tokenizer(tokenizer) if tokenizer else None, max_length)
    overlap = EvalSets(eval_sets)
    for number, row in enumerate(read_pairs(dataset), start=1):
        statistics.add(row)
        overlap.add(str(row.get("id", number)), prompt_text(row) or "")
    summary, matches = statistics.summary(), overlap.summary()
    if json:
        print(jsonlib.dumps({**summary, "overlap": matches}, ensure_ascii=False, indent=2))
        return
    print(table(summary))
    for name, match in matches.items():
        print(f"{name}: {match['matches']:,} overlapping prompts ({', '.join(match['ids']) or 'none'}).")
