"""`padding_free`: compute each distinct token of a batch of pairs once, without padding. Exact."""

from apo_trl.prefix_sharing.layout import PackedBatch, PackingCollator, pack
from apo_trl.prefix_sharing.model import PrefixSharing, enable_prefix_sharing
from apo_trl.prefix_sharing.support import TESTED, dropout_names, padded_reason, unsupported_reason

__all__ = [
    "TESTED", "PackedBatch", "PackingCollator", "PrefixSharing", "dropout_names", "enable_prefix_sharing", "pack",
    "padded_reason", "unsupported_reason",
]  # fmt: skip
