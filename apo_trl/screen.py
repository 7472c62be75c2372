"""Keep the screen for what a command has to say."""

import logging
import os
import warnings

__all__ = ["quiet_host"]


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
