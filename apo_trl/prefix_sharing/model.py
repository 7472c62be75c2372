"""Let a causal language model with TRL's fused head compute each distinct token of a batch once.

The model's `forward` lays a padded batch out as one packed sequence, computes it, and puts what the head returns where
TRL expects it. Calls without `fused_lm_head`, generation among them, stay as they are.
"""

import functools
import inspect
import logging
import types
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor

from apo_trl.prefix_sharing.attention import gather, install
from apo_trl.prefix_sharing.layout import PackedBatch, pack
from apo_trl.prefix_sharing.support import TESTED, unsupported_reason

__all__ = ["PrefixSharing", "enable_prefix_sharing"]

logger = logging.getLogger(__name__)

_BATCH_KEYS = {"input_ids", "attention_mask", "use_cache"}  # of a batch of text
_UNSEEN = "the model's attention is not called through transformers' AttentionInterface"
_SCORES = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class PrefixSharing:
    """What the models of one training share: the decision to pack, made once and for all of them.

    Attributes:
        reason: Why batches are padded, or an empty string.
        tokens_saved: Padded over computed tokens of the last batch.
        kernel: Which attention kernel computed it, see `attention.KERNELS`.
        all_agree: Combines a decision over processes; the models of several processes must take the same path.
    """

    def __init__(self, reason: str = "", all_agree: Callable[[bool], bool] = bool) -> None:
        self.reason = ""
        self.tokens_saved = 1.0
        self.kernel = ""
        self.all_agree = all_agree
        self._logged = set[str]()
        if reason:
            self.disable(reason)

    def disable(self, reason: str) -> None:
        """Use padded batches from now on, with one warning that says why."""
        if not self.reason:
            self.reason = reason
            logger.warning(f"padding_free has no effect: {reason}. Falling back to TRL's padded batches.")

    def report(self, packed: PackedBatch) -> None:
        """Keep what the last batch saved, and log each attention kernel once."""
        self.tokens_saved = packed.padded_tokens / packed.computed_tokens
        self.kernel = packed.kernel
        if self.kernel not in self._logged:
            self._logged.add(self.kernel)
            logger.info(f"padding_free: attention by {_KERNEL_NAMES[self.kernel]}.")


_KERNEL_NAMES = {
    "flash": "the model's FlashAttention, one variable-length call a layer",
    "varlen": "torch.nn.attention.varlen, one call a layer",
    "sdpa": "scaled_dot_product_attention, one call for each row",
}


def enable_prefix_sharing(*models: Any, sharing: PrefixSharing | None = None) -> PrefixSharing:
    """Let models compute each distinct token of a batch once; all of them or none.

    Call it after `trl.trainer.utils.add_fused_lm_head`. Pass the policy and its reference together: they take the same
    path always. The result says what was decided.
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
    if _keep_questions not in model.base_model._forward_hooks.values():  # a second trainer of the same model
        model.base_model.register_forward_hook(_keep_questions, with_kwargs=True)
    # A class of somebody else may have the name of an architecture, and attention of its own.
    verified = model.config.model_type in TESTED and type(model).__module__.startswith("transformers.models.")

    @functools.wraps(type(model).forward)
    def forward(
        self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, packed_batch: Any = None, **kwargs: Any
    ) -> Any:
        nonlocal verified
        # Of a copy of the model, the copy's own.
        padded_forward = functools.partial(fused.__func__, self) if inspect.ismethod(fused) else fused

        def padded() -> Any:
            given = {} if labels is None else {"labels": labels}
            return padded_forward(*args, fused_lm_head=fused_lm_head, **given, **kwargs)

        if not fused_lm_head or labels is None or sharing.reason:
            return padded()
        # PEFT's models name all that a causal language model can be given, most of it None.
        other = {name for name, value in kwargs.items() if value is not None} - _BATCH_KEYS
        if args or other or kwargs.get("input_ids") is None:
            sharing.disable(f"a batch has {', '.join(sorted(other)) or 'no input_ids'}")
            return padded()
        packed = packed_batch
        if packed is None:
            packed = pack(kwargs["input_ids"], kwargs.get("attention_mask"), labels)
        if not verified:
            verified = True
            if not _verify(sharing, packed, padded_forward, padded, labels, _sliding_window(self.config)):
                return padded()
        if packed is None:
            return padded()  # this batch alone
        packed = packed.to(kwargs["input_ids"].device)
        outputs = _packed_forward(padded_forward, packed)
        if not packed.attention_calls:
            sharing.disable(_UNSEEN)
            return padded()
        sharing.report(packed)
        return _unpack(outputs, packed, labels)

    model.forward = types.MethodType(forward, model)


def _packed_forward(fused: Callable[..., Any], packed: PackedBatch) -> Any:
    packed.attention_calls = 0
    return fused(
        input_ids=packed.input_ids,
        # A mask of four dimensions is passed on as it is, and ours is not looked at: attention knows the layout.
        attention_mask=torch.zeros(1, 1, 1, 1, device=packed.input_ids.device),
        position_ids=packed.position_ids,
        shift_labels=packed.targets,
        packed_batch=packed,
        fused_lm_head=True,
    )


def _keep_questions(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Leave the head only the positions at which something is scored: a forward hook of the backbone."""
    packed = kwargs.get("packed_batch")
    if packed is not None:
        hidden = output.last_hidden_state[0]
        output.last_hidden_state = gather(hidden, packed.question_index.to(hidden.device))[None]
    return output


def _unpack(outputs: Any, packed: PackedBatch, labels: Tensor) -> Any:
    """Put what the head said of each question where TRL looks for it, shapes (rows, T - 1)."""
    rows, width = packed.shape
    for name in _SCORES:
        values = getattr(outputs, name)
        if values is not None:
            empty = values.new_zeros(rows * (width - 1))
            answers = values[0].index_select(0, packed.answer_index.to(values.device))
            scattered = empty.index_copy(0, packed.label_index.to(values.device), answers)
            setattr(outputs, name, scattered.view(rows, width - 1))
    outputs.label_mask = labels[:, 1:] != -100
    outputs.loss = -outputs.log_probs.sum() / outputs.label_mask.sum().clamp(min=1)
    return outputs


# An architecture that the tests do not know is compared with its padded batch once.


def _verify(
    sharing: PrefixSharing,
    packed: PackedBatch | None,
    fused: Callable[..., Any],
    padded: Callable[[], Any],
    labels: Tensor,
    sliding_window: int | None,
) -> bool:
    """Compare log-probs of both paths: two forwards in every process, whatever its batch holds, and one decision."""
    reason = ""
    with torch.no_grad():
        if packed is None:  # nothing to compare in this batch
            ids = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 6]], device=labels.device)
            labels = ids
            packed = pack(ids, None, ids)
            assert packed is not None
            expected = fused(input_ids=ids, labels=ids, use_cache=False, fused_lm_head=True).log_probs
        else:
            expected = padded().log_probs
        packed = packed.to(labels.device)
        try:
            got = _unpack(_packed_forward(fused, packed), packed, labels).log_probs
        except (TypeError, ValueError, RuntimeError) as error:
            reason = f"the model cannot take a packed batch ({str(error).splitlines()[0][:200]})"
        else:
            difference = (got - expected).abs()
            furthest, mean = difference.max().item(), difference.sum().item() / len(packed.label_index)
            largest, usual = _TOLERANCES[packed.dtype]
            if not packed.attention_calls:
                reason = _UNSEEN
            elif not (furthest <= largest and mean <= usual):
                reason = f"log-probs of the first batch differ from the padded batch's by up to {furthest:.1e}"
            elif sliding_window != packed.sliding_window:  # a batch of short rows does not show it
                reason = "its sliding window is known to its mask alone"
    if not sharing.all_agree(not reason):
        sharing.disable(reason or "another process cannot compute a packed batch")
    return not sharing.reason


def _sliding_window(config: Any) -> int | None:
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    return getattr(config, "sliding_window", None) if "sliding_attention" in kinds else None


# Nats: the largest and the mean difference of log-probs, in the precision in which attention was computed.
_TOLERANCES = {
    torch.float64: (1e-4, 1e-5),
    torch.float32: (1e-4, 1e-5),
    torch.float16: (0.1, 0.01),
    torch.bfloat16: (0.5, 0.05),
}
