"""Prefix sharing in a causal language model with TRL's fused head: each distinct token of a batch is computed once.

The patched `forward` packs a padded batch, computes it, and returns what the head says in the layout that TRL expects.
Calls without `fused_lm_head`, such as generation, stay as they are.
"""

import functools
import inspect
import logging
import types
from collections.abc import Callable
from typing import Any

from accelerate.utils import is_peft_model

from apo_trl.prefix_sharing.attention import install
from apo_trl.prefix_sharing.forward import NO_INTERFACE, keep_questions, packed_forward, unpack
from apo_trl.prefix_sharing.layout import PackedBatch, pack
from apo_trl.prefix_sharing.support import TESTED, unsupported_reason

__all__ = ["PrefixSharing", "enable_prefix_sharing"]

logger = logging.getLogger(__name__)

_BATCH_KEYS = {"input_ids", "attention_mask", "use_cache"}  # of a batch of text
_KERNEL_NAMES = {
    "flash": "the model's FlashAttention, one variable-length call a layer",
    "varlen": "torch.nn.attention.varlen, one call a layer",
    "sdpa": "scaled_dot_product_attention, one call for each row",
}


class PrefixSharing:
    """The decision to pack batches, shared by all models of a training and, by `all_agree`, by all processes.

    Attributes:
        reason: Why batches are padded, or an empty string.
        tokens_saved: Padded over computed tokens of the last batch.
        kernel: Attention kernel of the last batch: "flash", "varlen" or "sdpa".
    """

    def __init__(self, reason: str = "", all_agree: Callable[[bool], bool] = bool) -> None:
        self.reason, self.kernel, self.tokens_saved = "", "", 1.0
        self.all_agree = all_agree
        self._logged = set[str]()
        if reason:
            self.disable(reason)

    def disable(self, reason: str) -> None:
        """Use padded batches from now on, with one warning."""
        if not self.reason:
            self.reason = reason
            logger.warning(f"padding_free has no effect: {reason}. Falling back to TRL's padded batches.")

    def report(self, packed: PackedBatch) -> None:
        """Record what the last batch saved, and log each attention kernel once."""
        self.tokens_saved, self.kernel = packed.padded_tokens / packed.computed_tokens, packed.kernel
        if self.kernel not in self._logged:
            self._logged.add(self.kernel)
            logger.info(f"padding_free: attention by {_KERNEL_NAMES[self.kernel]}.")


def enable_prefix_sharing(*models: Any, sharing: PrefixSharing | None = None) -> PrefixSharing:
    """Enable prefix sharing in models: in all of them, or in none if one is not supported.

    Call it after `trl.trainer.utils.add_fused_lm_head`, with the policy and its reference together. Returns `sharing`,
    or a new `PrefixSharing`.
    """
    sharing = PrefixSharing() if sharing is None else sharing
    for model in models:
        if reason := unsupported_reason(model):
            sharing.disable(reason)
    if not sharing.reason:
        for model in models:
            _patch(model.get_base_model() if is_peft_model(model) else model, sharing)
    return sharing


def _patch(model: Any, sharing: PrefixSharing) -> None:
    implementation = model.config._attn_implementation
    if (name := install(implementation)) != implementation:
        model.set_attn_implementation(name)
    fused = model.forward
    if keep_questions not in model.base_model._forward_hooks.values():  # a second trainer of the same model
        model.base_model.register_forward_hook(keep_questions, with_kwargs=True)
    # A custom class may use the name of an architecture, with attention of its own.
    verified = model.config.model_type in TESTED and type(model).__module__.startswith("transformers.models.")

    @functools.wraps(type(model).forward)
    def forward(
        self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, packed_batch: Any = None, **kwargs: Any
    ) -> Any:
        nonlocal verified
        # A copy of the model calls its own.
        padded_forward = functools.partial(fused.__func__, self) if inspect.ismethod(fused) else fused

        def padded() -> Any:
            with_labels = {} if labels is None else {"labels": labels}
            return padded_forward(*args, fused_lm_head=fused_lm_head, **with_labels, **kwargs)

        if not fused_lm_head or labels is None or sharing.reason:
            return padded()
        # PEFT passes every argument of a causal language model, most of them None.
        other = {name for name, value in kwargs.items() if value is not None} - _BATCH_KEYS
        if args or other or kwargs.get("input_ids") is None:
            sharing.disable(f"a batch has {', '.join(sorted(other)) or 'no input_ids'}")
            return padded()
        packed = packed_batch
        if packed is None:
            packed = pack(kwargs["input_ids"], kwargs.get("attention_mask"), labels)
        if not verified:
            verified = True
            from apo_trl.prefix_sharing.verification import mismatch_reason

            reason = mismatch_reason(packed, padded_forward, padded, labels, self.config)
            if not sharing.all_agree(not reason):
                sharing.disable(reason or "another process cannot compute a packed batch")
            if sharing.reason:
                return padded()
        if packed is None:
            return padded()  # this batch alone
        packed = packed.to(kwargs["input_ids"].device)
        outputs = packed_forward(padded_forward, packed)
        if not packed.attention_calls:
            sharing.disable(NO_INTERFACE)
            return padded()
        sharing.report(packed)
        return unpack(outputs, packed, labels)

    model.forward = types.MethodType(forward, model)
