"""`apo-trl rounds`."""

from typing import Any

from apo_trl.cli.options import add_command
from apo_trl.training.console import quiet_libraries

_KEYS = """\
model_name_or_path     the policy of the first round
output_dir             a folder for each round, and the page
rounds                 (default: 3)
reference, adapter     (defaults: round_start, continue)
keep                   weights of the `last` round (default) or of `all`
prompts_per_round      (default: all)
seed                   (default: 0)
policy_serve           command line of a server with {model} and {port}
policy_serve_timeout   seconds until it must respond (default: 600)
pairs, train, score    a section of keys for each of these commands"""


def add(commands: Any) -> None:
    usage = "%(prog)s RECIPE_OR_FILE [--key value ...] [--section.key value ...]"
    help, example = "answer, build pairs, train and score, in rounds", "rounds/instructions --rounds 2"
    files = "a recipe, and the model and the prompts that it names", "one folder a round and rounds.html to output_dir"
    parser = add_command(commands, "rounds", run, help, example, *files, usage=usage)
    parser.add_argument_group("keys, in the file or as options (docs/rounds.md)", _KEYS)
    parser.add_argument("recipe", metavar="RECIPE_OR_FILE", help="a YAML file or the name of a recipe")
    parser.keeps_rest = True


def run(recipe: str, rest: list[str]) -> None:
    from apo_trl.pairs import check_installed
    from apo_trl.rounds.settings import parse

    check_installed()
    settings = parse(recipe, rest)
    quiet_libraries()
    from apo_trl.evaluation.report.figures import style
    from apo_trl.rounds.page import disk_use
    from apo_trl.rounds.run import run_rounds

    with style():  # an error without matplotlib, before hours of work
        pass
    page = run_rounds(settings)
    print(f"Written: {page}. {page.parent} uses {disk_use(page.parent) / 1e6:,.0f} MB.")
