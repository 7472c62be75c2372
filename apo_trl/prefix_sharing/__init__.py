"""`padding_free`: each distinct token of a batch of pairs is computed once, without padding, exactly."""

from .layout import PackedBatch, PackingCollator, pack
from .model import PrefixSharing, enable_prefix_sharing
from .support import TESTED, dropout_names, unsupported_reason

__all__ = [
    "TESTED",
    "PackedBatch",
    "PackingCollator",
    "PrefixSharing",
    "dropout_names",
    "enable_prefix_sharing",
    "pack",
    "unsupported_reason",
]
