"""`register()` and `unregister()`: the losses, metrics and checks of this package in plain `trl.DPOTrainer`."""

import functools
from typing import Any

from trl import DPOConfig, DPOTrainer

from apo_trl.config import check_config
from apo_trl.trainer import _AnchoredTrainer

__all__ = ["register", "unregister"]

_ORIGINALS: dict[str, Any] = {}


def register() -> None:
    """Add the losses, metrics and checks of this package to plain `trl.DPOTrainer` and `trl.DPOConfig`.

    Works whichever came first, this call or `from trl import DPOTrainer`, and for subclasses of `DPOTrainer`. A second
    call changes nothing; `unregister()` restores TRL. The class of a trainer made in between is a subclass of
    `DPOTrainer` with its name, so `isinstance` holds and `type(trainer) is DPOTrainer` does not.
    """
    if _ORIGINALS:
        return
    trl_init, trl_post_init = DPOTrainer.__init__, DPOConfig.__post_init__

    @functools.wraps(trl_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(self, _AnchoredTrainer):
            trl_init(self, *args, **kwargs)
        else:
            self.__class__ = _anchored(self.__class__)
            _AnchoredTrainer.__init__(self, *args, **kwargs)

    @functools.wraps(trl_post_init)
    def post_init(self: Any) -> None:
        check_config(self)
        trl_post_init(self)

    _ORIGINALS.update(init=trl_init, post_init=trl_post_init)
    DPOTrainer.__init__, DPOConfig.__post_init__ = init, post_init


def unregister() -> None:
    """Undo `register()`; trainers made in between keep their losses."""
    if _ORIGINALS:
        DPOTrainer.__init__, DPOConfig.__post_init__ = _ORIGINALS.pop("init"), _ORIGINALS.pop("post_init")


@functools.cache
def _anchored(cls: type) -> Any:
    """Build the class of a trainer of `cls`: its own methods first, then ours, then TRL's."""
    bases = (_AnchoredTrainer,) if cls is DPOTrainer else (cls, _AnchoredTrainer)
    return type(cls.__name__, bases, {"__module__": cls.__module__, "__doc__": cls.__doc__})
