"""Run a TRL script as it is, with the losses registered: `accelerate launch -m apo_trl.run SCRIPT [args]`."""

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the script in the first argument; its `datasets.load_dataset` also takes a local file, as `apo_trl.train`."""
    script, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if not Path(script).is_file():
        sys.exit(f"error: script: file not found, got '{script}'. Set the path of a Python file.")

    import datasets

    from apo_trl.io.readers import load_dataset
    from apo_trl.registration import register
    from apo_trl.training.console import exit_on_error

    register()
    datasets.load_dataset = load_dataset
    sys.argv = [script, *rest]
    sys.path.insert(0, str(Path(script).resolve().parent))
    with exit_on_error():
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
