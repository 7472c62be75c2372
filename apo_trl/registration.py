"""`register()` and `unregister()`: the losses, metrics and checks of this package in plain `trl.DPOTrainer`."""

import functools
from typing import Any

from trl import DPOConfig, DPOTrainer

from apo_trl.config import check_config
from apo_trl.trainer import _AnchoredTrainer

__all__ = ["register", "unregister"]


def register() -> None:
    """Give plain `trl.DPOTrainer` and `trl.DPOConfig` the losses, metrics and checks of this package.

    Existing scripts then take our names in `loss_type`, whichever came first, this call or `from trl import
    DPOTrainer`, and subclasses of `DPOTrainer` are served too. Calling it again changes nothing; `unregister()` undoes
    it.
    """
    if _HOST:
        return
    host_init, host_post_init = DPOTrainer.__init__, DPOConfig.__post_init__

    @functools.wraps(host_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(self, _AnchoredTrainer):
            host_init(self, *args, **kwargs)
        else:
            self.__class__ = _anchored(self.__class__)
            _AnchoredTrainer.__init__(self, *args, **kwargs)

    @functools.wraps(host_post_init)
    def post_init(self: Any) -> None:
        check_config(self)
        host_post_init(self)

    _HOST.update(init=host_init, post_init=host_post_init)
    DPOTrainer.__init__, DPOConfig.__post_init__ = init, post_init


def unregister() -> None:
    """Undo `register()`; trainers made in between keep their losses."""
    if _HOST:
        DPOTrainer.__init__, DPOConfig.__post_init__ = _HOST.pop("init"), _HOST.pop("post_init")


_HOST: dict[str, Any] = {}


@functools.cache
def _anchored(cls: type) -> Any:
    """Make the class that `cls` becomes while registered: its own methods first, then ours, then the host's."""
    bases = (_AnchoredTrainer,) if cls is DPOTrainer else (cls, _AnchoredTrainer)
    return type(cls.__name__, bases, {"__module__": cls.__module__, "__doc__": cls.__doc__})
