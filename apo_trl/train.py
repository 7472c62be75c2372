"""The training script: `accelerate launch [...] -m apo_trl.train --config FILE.yaml [--key value ...]`."""

import sys
from collections.abc import Sequence

from apo_trl.training.arguments import parse
from apo_trl.training.console import enable_info_log, exit_on_error, quiet_libraries
from apo_trl.training.launcher import end_with_launcher
from apo_trl.training.script import train
from apo_trl.training.threads import choose_threads

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the training script, with the keys of `trl dpo`, `trl kto`, `trl reward` or `trl rloo`."""
    with exit_on_error():
        end_with_launcher()
        choose_threads()
        quiet_libraries()
        enable_info_log()
        run, _ = parse(sys.argv[1:] if arguments is None else arguments)
        from apo_trl.training.progress import show_progress

        show_progress()
        train(run)


if __name__ == "__main__":
    main()
