"""Anchored Preference Optimization (APO, arXiv:2408.06266) for Hugging Face TRL.

Importing this package changes nothing in TRL and loads nothing heavy; `register()` is explicit.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apo_trl.config import APOConfig
    from apo_trl.errors import InputError
    from apo_trl.losses import LOSSES, apo_blend, apo_down, apo_down_norm, apo_zero, apo_zero_norm
    from apo_trl.registration import register, unregister
    from apo_trl.trainer import APOTrainer

__all__ = [
    "LOSSES", "APOConfig", "APOTrainer", "InputError", "__version__", "apo_blend", "apo_down", "apo_down_norm",
    "apo_zero", "apo_zero_norm", "register", "unregister",
]  # fmt: skip

__version__ = version("apo-trl")

_MODULES = {"APOConfig": "config", "APOTrainer": "trainer", "InputError": "errors"}
_MODULES |= dict.fromkeys(("register", "unregister"), "registration")


def __getattr__(name: str) -> Any:
    # Torch and TRL take seconds to import, and `apo-trl --help` must not.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'losses')}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
