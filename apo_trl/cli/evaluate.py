"""`apo-trl evaluate`."""

from pathlib import Path
from typing import Any

from apo_trl.cli.options import add_command, positive_int
from apo_trl.training.console import quiet_libraries
from apo_trl.training.threads import choose_threads


def add(commands: Any) -> None:
    help = "score each pair of a dataset under the policy and the reference"
    files = "a trained model, its reference and pairs", "a row for each pair; prints means and shares"
    parser = add_command(commands, "evaluate", run, help, "--model runs/first --dataset apo_trl/demo/pairs", *files)
    parser.add_argument("--model", required=True, metavar="MODEL", help="trained model or adapter")
    parser.add_argument(
        "--reference", metavar="MODEL", help="what training started from (default: an adapter's `ref`, else its base)"
    )
    parser.add_argument("--dataset", required=True, metavar="PAIRS", help="a file, a folder or a hub name")
    parser.add_argument("--split", help="split of the dataset (default: test if it exists, else train)")
    parser.add_argument("--limit", type=positive_int, metavar="N", help="maximum number of pairs")
    parser.add_argument("--max_length", type=positive_int, metavar="N", help="truncate as in training (default: off)")
    parser.add_argument("--batch_size", type=positive_int, default=8, metavar="N", help="pairs (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if available)")
    parser.add_argument("--dtype", help="float32, bfloat16, ... (default: float32 on a CPU, else the checkpoint's)")
    parser.add_argument(
        "--output", metavar="FILE", help="Parquet file of the pairs (default: evaluation.parquet in MODEL)"
    )


def run(model: str, output: str | None, **options: Any) -> None:
    choose_threads()
    quiet_libraries()
    from apo_trl.evaluation.evaluate import evaluate, summarise, table, write_rows
    from apo_trl.evaluation.provenance import read_record

    rows = evaluate(model, **options)
    path = Path(output or Path(model if Path(model).is_dir() else "", "evaluation.parquet"))
    write_rows(rows, path)
    print(f"{table(summarise(rows, read_record(Path(model))))}\nEach pair: {path}")
