"""What a model that answers and one that scores share: loading, the chat template, batches that fit into memory."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor

from apo_trl.errors import InputError

__all__ = ["Chat"]

logger = logging.getLogger(__name__)


class Chat:
    """A model and its tokenizer on one device, and what asking in batches takes."""

    def __init__(self, kind: Any, noun: str, name: str, dtype: str | None, device: str | None, batch_size: int) -> None:
        if dtype not in (None, "auto") and not isinstance(getattr(torch, str(dtype), None), torch.dtype):
            raise InputError(f"The dtype '{dtype}' is not known; give 'auto', 'float32', 'bfloat16' or 'float16'.")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or ("float32" if device == "cpu" else "auto")
        try:
            loaded = kind.from_pretrained(name, dtype=dtype, device_map={"": device}, output_loading_info=True)
            self.model, loading = loaded
            self.tokenizer = _load_tokenizer(name, base=self.model.config.name_or_path)
        except Exception as error:  # OSError, ValueError, SafetensorError, ...: whatever a damaged one raises
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".;:")
            raise InputError(f"The {noun} '{name}' cannot be loaded: {reason}; give its folder or hub name.") from error
        if lacking := sorted(loading["missing_keys"]):  # the host fills them with random numbers
            raise InputError(f"'{name}' has no weights for {lacking[0]}, so it is no {noun}; give one that is whole.")
        if not self.tokenizer.chat_template:
            raise InputError(
                f"The tokenizer of the {noun} '{name}' has no chat template; put a chat_template.jinja into its folder,"
                " or give a model that was trained on conversations."
            )
        self.name, self.batch_size, self._told = name, max(1, batch_size), False
        config = self.model.config.get_text_config()
        self._context: int = getattr(config, "max_position_embeddings", None) or 2**31  # None: recurrent, say

    def _ids(self, messages: Any, *, ask: bool) -> list[int]:
        """Render messages by the chat template; `ask` ends them where the assistant begins to speak."""
        whole = isinstance(messages, list) and all(
            isinstance(each, Mapping) and {"role", "content"} <= each.keys() for each in messages
        )
        if not messages or not whole:  # templates pass over what is missing
            raise InputError("'messages' must be a list of at least one message with 'role' and 'content'.")
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
        except Exception as error:  # a template raises what it likes
            raise InputError(f"The chat template of '{self.name}' refuses these messages: {error}.") from error
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise InputError(f"The chat template of '{self.name}' makes no tokens of these messages.")
        return ids

    def _inputs(self, batch: list[list[int]], pad: int, *, left: bool) -> dict[str, Tensor]:
        ids = torch.full((len(batch), max(map(len, batch))), pad)
        mask = torch.zeros_like(ids)
        for row, each in enumerate(batch):
            place = slice(ids.shape[1] - len(each), None) if left else slice(len(each))
            ids[row, place], mask[row, place] = torch.tensor(each), 1
        return {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}

    def _in_batches(self, asked: list[Any], ask: Callable[[list[Any]], list[Any]]) -> list[Any]:
        """Ask in batches, halved for good where memory runs out; None is what does not even fit alone.

        `ask` gives results for a batch, or for its beginning.
        """
        results: list[Any] = []
        while len(results) < len(asked):
            batch = asked[len(results) : len(results) + self.batch_size]
            try:
                results += ask(batch)
                continue
            except torch.cuda.OutOfMemoryError:
                pass  # and leave the handler: its traceback holds the tensors
            torch.cuda.empty_cache()
            if not self._told:
                logger.warning("'%s' runs out of memory on a batch of %d; smaller ones follow.", self.name, len(batch))
                self._told = True
            if len(batch) == 1:
                results.append(None)
            self.batch_size = max(1, len(batch) // 2)
        return results


def _load_tokenizer(name: str, *, base: str) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        if base == name:
            raise
        return transformers.AutoTokenizer.from_pretrained(base)  # an adapter that was saved without one
