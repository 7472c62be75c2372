"""`apo-trl bench`."""

from pathlib import Path
from typing import Any

from apo_trl.cli.options import add_command, positive_int
from apo_trl.io.files import write_json
from apo_trl.training.console import quiet_libraries


def add(commands: Any) -> None:
    help = "time a training step against stock TRL's, and compare the results"
    files = "pairs of FILE, if any, beside random ones", "nothing; prints a table (--json FILE keeps it)"
    parser = add_command(commands, "bench", run, help, "--layers 4 --repeats 3", *files)
    parser.add_argument("files", metavar="FILE", nargs="*", help="more pairs, as for `apo-trl pairs stats`")
    parser.add_argument("--model", help="shape of the model, with random weights (default: SmolLM2-135M)")
    parser.add_argument("--layers", type=positive_int, metavar="N", help="number of layers (default: the model's)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if available)")
    dtypes = ["float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", choices=dtypes, help="(default: float32; bfloat16 for large models)")
    parser.add_argument("--attention", default="sdpa", help="attn_implementation of both sides (default: %(default)s)")
    parser.add_argument("--only", metavar="TEXT", help="only rows with this in their name")
    parser.add_argument("--checkpointing", action="store_true", help="use activation checkpointing")
    parser.add_argument("--batch_size", type=positive_int, default=2, metavar="N", help="pairs (default: %(default)s)")
    parser.add_argument("--repeats", type=positive_int, default=5, metavar="N", help="timed steps (default: 5)")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON too")


def run(json: str | None, **options: Any) -> None:
    quiet_libraries()
    from apo_trl.benchmark.measure import bench, layout_times, table

    rows = bench(**options)
    print(table(rows))
    for name, milliseconds in layout_times().items():
        print(f"Time to build the layout of {name}: {milliseconds:.1f} ms on the CPU.")
    if json:
        write_json(Path(json), [row._asdict() for row in rows])
