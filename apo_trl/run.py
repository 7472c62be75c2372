"""Run a TRL script as it is, with the losses registered: `accelerate launch -m apo_trl.run SCRIPT [args]`.

The script's `datasets.load_dataset` also takes a local `.jsonl`, `.json` or `.parquet` file, as `apo_trl.train` does.
"""

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the script that the first argument names, as `python SCRIPT [args]` would."""
    script, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if not Path(script).is_file():
        sys.exit(f"error: there is no script '{script}'; give the path of a Python file.")

    import datasets

    from apo_trl.io.readers import load_dataset
    from apo_trl.registration import register
    from apo_trl.training.screen import exit_on_error

    register()
    datasets.load_dataset = load_dataset
    sys.argv = [script, *rest]
    sys.path.insert(0, str(Path(script).resolve().parent))
    with exit_on_error():
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
