"""Keep the screen for what a command has to say."""

import logging
import os
import warnings

__all__ = ["quiet_host", "show_own_log"]


def quiet_host() -> None:
    """Silence what the host's parts say of themselves where nobody asked; to be called before they are imported.

    DeepSpeed tells that there is no accelerator, bitsandbytes that it has no fast kernels for a CPU, and TRL's own
    defaults are deprecated in transformers.
    """
    import torch

    if not getattr(torch, "accelerator", torch.cuda).is_available():  # older torch has only the latter
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def show_own_log() -> None:
    """Print what this package logs at level INFO, in the first process of each machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        logging.basicConfig(format="%(message)s")
        logging.getLogger("apo_trl").setLevel(logging.INFO)
