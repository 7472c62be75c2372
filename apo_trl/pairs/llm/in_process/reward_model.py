"""A sequence classifier that scores conversations: a judge that needs no order and no parsing."""

import logging
from typing import Any

import torch
import transformers
from torch import Tensor

from apo_trl.errors import InputError
from apo_trl.pairs.llm.in_process.chat import Chat

__all__ = ["RewardModel"]

logger = logging.getLogger(__name__)


class RewardModel(Chat):
    """A sequence classifier with one label, whose logit is the reward of a whole conversation.

    Args:
        model: A folder or hub name.
        dtype: As for `Generator`, as are `device` and `batch_size`.
        max_length: The most tokens a conversation may have. Default: what model and tokenizer are made for.

    Raises:
        InputError: The model cannot be loaded, has not exactly one label, or its tokenizer has no chat template.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
    ) -> None:
        kind = transformers.AutoModelForSequenceClassification
        super().__init__(kind, "reward model", model, dtype, device, batch_size)
        if (labels := self.model.config.num_labels) != 1:
            raise InputError(f"The reward model '{model}' has {labels} labels; give one trained with num_labels=1.")
        self.max_length = min(max_length or self.tokenizer.model_max_length, self._context)
        self._pad: int | None = self.model.config.get_text_config().pad_token_id

    def score(self, conversations: list[list[dict[str, Any]]]) -> list[float | None]:
        """Score conversations, in order; None for one too long, since a truncated one is another conversation.

        Raises:
            InputError: A conversation is no list of messages, or the chat template refuses it.
        """
        rendered = [self._ids(conversation, ask=False) for conversation in conversations]
        fits = [number for number, ids in enumerate(rendered) if len(ids) <= self.max_length]
        fits.sort(key=lambda number: -len(rendered[number]))
        scores: list[float | None] = [None] * len(conversations)
        for number, score in zip(fits, self._in_batches([rendered[each] for each in fits], self._logits), strict=True):
            scores[number] = score
        if lacking := scores.count(None):
            told = "%d of %d conversations have no score: more than %d tokens, or more than the memory holds."
            logger.warning(told, lacking, len(scores), self.max_length)
        return scores

    @torch.inference_mode()
    def _logits(self, batch: list[list[int]]) -> list[float]:
        pad = self._pad
        if pad is None or pad < 0:
            # The model scores the last token that is not `pad_token_id`. One that names none was made for single
            # conversations, of which the very last token counts; so pad with a token that ends none of these.
            pad = min(set(range(len(batch) + 1)) - {ids[-1] for ids in batch})
            self.model.config.pad_token_id = self.model.config.get_text_config().pad_token_id = pad
        logits: Tensor = self.model(**self._inputs(batch, pad, left=False)).logits
        return [float(score) for score in logits[:, 0]]
