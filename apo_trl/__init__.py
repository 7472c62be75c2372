"""Anchored Preference Optimization (APO, arXiv:2408.06266) for Hugging Face TRL.

Importing this package changes nothing in TRL and loads nothing heavy; `register()` is explicit.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import APOConfig
    from .inputs import InputError
    from .losses import LOSSES, apo_blend, apo_down, apo_down_norm, apo_zero, apo_zero_norm
    from .trainer import APOTrainer, register, unregister

__all__ = [
    "LOSSES",
    "APOConfig",
    "APOTrainer",
    "InputError",
    "__version__",
    "apo_blend",
    "apo_down",
    "apo_down_norm",
    "apo_zero",
    "apo_zero_norm",
    "register",
    "unregister",
]

__version__ = version("apo-trl")

_HOMES = {
    "config": ("APOConfig",),
    "inputs": ("InputError",),
    "losses": ("LOSSES", "apo_blend", "apo_down", "apo_down_norm", "apo_zero", "apo_zero_norm"),
    "trainer": ("APOTrainer", "register", "unregister"),
}


def __getattr__(name: str) -> Any:
    # Torch and TRL take seconds to import, and `apo-trl --help` must not.
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
