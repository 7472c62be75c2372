"""`apo-trl report`."""

from typing import Any

from apo_trl.cli.options import add_command


def add(commands: Any) -> None:
    help = "write a page with figures of one or several runs"
    files = "output folders of training runs, or of `apo-trl score`", "one HTML file, and its figures as PNG"
    parser = add_command(commands, "report", run, help, "runs/first --output report.html", *files)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="output folder of a training run, or of `apo-trl score`")
    parser.add_argument("--output", default="report.html", metavar="FILE", help="HTML file (default: %(default)s)")


def run(**options: Any) -> None:
    from apo_trl.evaluation.report import report

    print(f"Written: {report(**options)}.")
