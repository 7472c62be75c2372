"""The commands `apo-trl pairs ...`: parse, call, print."""

import argparse
import json
import sys
from typing import Any, NoReturn

from apo_trl.cli.options import positive_int
from apo_trl.pairs import check_installed
from apo_trl.pairs.config.settings import Settings, add_arguments, parse, unknown_key

__all__ = ["add", "run"]


def add(commands: Any) -> None:
    """Add `pairs` and what it can do."""
    pairs = commands.add_parser("pairs", help="build preference pairs, and measure them")
    actions = pairs.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=_Parser)
    for name, text in (
        ("build", "build the pairs of a recipe, or go on with them"),
        ("export-batch", "write the requests that are due to batch files instead of sending them"),
        ("import-batch", "take the answers of batch files; then `build` goes on from them"),
    ):
        action = actions.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False,
            usage=f"apo-trl pairs {name} RECIPE {'FILE ... ' if name == 'import-batch' else ''}[--key value ...]",
        )  # fmt: skip
        action.add_argument(
            "recipe", metavar="RECIPE", help="a YAML file or the name of a recipe, as pairs/clair_local"
        )
        if name == "import-batch":
            action.add_argument("files", metavar="FILE", nargs="+", help="an output file of the batch")
        add_arguments(action)
    stats = actions.add_parser("stats", help="say how contrastive the pairs of any preference dataset are")
    stats.add_argument("dataset", metavar="FILE", help="a .jsonl, .json or .parquet file, a folder or a hub name")
    stats.add_argument("--tokenizer", help="the training model's: measures tokens as training sees them")
    stats.add_argument("--max_length", type=positive_int, help="measure again after truncation to it, as in training")
    stats.add_argument("--eval_sets", nargs="+", metavar="FILE", default=[], help="look for their prompts among these")
    stats.add_argument("--json", action="store_true", help="print all figures as JSON")


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, and repeats no value: it might be a key."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            name = rest[0].split("=")[0]
            if not name.startswith("--"):
                self.error("there is one argument too many; RECIPE or FILE stands first, then --key value")
            known = [option[2:] for option in self._option_string_actions if option.startswith("--")]
            self.error(unknown_key(name[2:], known))
        return found, rest

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}{'' if message.endswith(('.', '?')) else '.'}\n")


def run(options: argparse.Namespace) -> None:
    """Do what the command line says."""
    check_installed()
    if options.action == "stats":
        _stats(options)
        return
    flags = {
        key: value
        for key, value in vars(options).items()
        if key not in ("command", "action", "version", "recipe", "files")
    }
    settings = parse(options.recipe, flags, environment=options.action == "build")
    if options.action == "build" and settings.dry_run:
        _dry_run(settings)
    elif options.action == "build":
        _build(settings, options.recipe)
    elif options.action == "export-batch":
        _export(settings)
    else:
        _import(settings, options)


def _build(settings: Settings, recipe: str) -> None:
    from apo_trl.pairs.build import build

    result = build(settings)
    report = result.report
    print(
        f"Kept {report['kept']:,} of {report['asked']:,}: pairs.jsonl, pairs.parquet and README.md in {result.folder}."
    )
    if report["dropped"]:
        print("Dropped: " + ", ".join(f"{count:,} {name}" for name, count in report["dropped"].items()) + ".")
    for role, used in report["roles"].items():
        cost = f", cost {used['cost']:.4g}" if used["cost"] else ""
        print(
            f"{role}: {used['requests']:,} requests in all runs, {used['prompt_tokens']:,} + "
            f"{used['completion_tokens']:,} tokens{cost}."
        )
    if result.stopped:
        print(f"Stopped early: {result.stopped} The same command again goes on.", file=sys.stderr)
    elif "not_answered" in report["dropped"]:
        print("Some rows wait for the answers of a batch: `apo-trl pairs import-batch`, then again.", file=sys.stderr)
    elif not report["complete"]:
        print("Some requests failed; the same command again asks for those only.", file=sys.stderr)
    else:
        print(f"Train on them: apo-trl train RECIPE --dataset_name {result.folder}")
    if result.broken or not report["kept"]:
        sys.exit(1)


def _dry_run(settings: Settings) -> None:
    from apo_trl.pairs.estimate import estimate, table
    from apo_trl.pairs.llm.response_cache import open_read_only

    with open_read_only(settings.folder) as store:
        found = estimate(settings, store)
    print(table(found))
    print(
        "Still to be asked. Answers are counted as long as those in the store, or as max_tokens where there are none."
    )


def _export(settings: Settings) -> None:
    from apo_trl.pairs.batch import export_batch
    from apo_trl.pairs.llm.response_cache import ResponseCache

    with ResponseCache(settings.folder) as store:
        written = export_batch(settings, store)
    for path, count in written.items():
        print(f"{path}: {count:,} requests")
    print(
        "Run them, then `apo-trl pairs import-batch` with the output files, before anything is exported again."
        if written else "Every request has its answer: `apo-trl pairs build` writes the dataset."
    )  # fmt: skip


def _import(settings: Settings, options: argparse.Namespace) -> None:
    from apo_trl.pairs.batch import import_batch
    from apo_trl.pairs.llm.response_cache import ResponseCache

    with ResponseCache(settings.folder) as store:
        counts = import_batch(settings, store, options.files)
    print("Lines: " + (", ".join(f"{count:,} {name}" for name, count in counts.items()) or "none") + ".")
    print("Then: `apo-trl pairs export-batch` for what is due next, or `apo-trl pairs build`.")


def _stats(options: argparse.Namespace) -> None:
    from apo_trl.io.readers import read_pairs
    from apo_trl.io.tokenization import load_tokenizer
    from apo_trl.pairs.statistics.overlap import EvalSets, prompt_text
    from apo_trl.pairs.statistics.statistics import Statistics
    from apo_trl.pairs.statistics.table import table

    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
    statistics = Statistics(tokenizer, options.max_length)
    overlap = EvalSets(options.eval_sets)
    for number, row in enumerate(read_pairs(options.dataset), start=1):
        statistics.add(row)
        overlap.add(str(row.get("id", number)), prompt_text(row) or "")
    summary = statistics.summary()
    if options.json:
        print(json.dumps({**summary, "overlap": overlap.summary()}, ensure_ascii=False, indent=2))
        return
    print(table(summary))
    for name, found in overlap.summary().items():
        print(f"{name}: {found['matches']:,} prompts overlap with it ({', '.join(found['ids']) or 'none'}).")
