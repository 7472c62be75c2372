"""The training script: `accelerate launch [...] -m apo_trl.train --config FILE.yaml [--key value ...]`.

Accepts everything that `trl dpo` accepts: the dataclasses and the parser are TRL's, with `APOConfig` in place of
`DPOConfig`. `dataset_name` may also be a local `.jsonl`, `.json` or `.parquet` file, compressed or not.
"""

import sys
from collections.abc import Sequence

from apo_trl.training.arguments import parse
from apo_trl.training.screen import enable_info_log, exit_on_error, quiet_libraries
from apo_trl.training.script import train

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the script."""
    quiet_libraries()
    enable_info_log()
    with exit_on_error():
        run, _ = parse(sys.argv[1:] if arguments is None else arguments)
        train(run)


if __name__ == "__main__":
    main()
