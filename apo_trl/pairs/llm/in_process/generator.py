"""A causal language model that answers chat requests, each sample drawn from the seed of its own request."""

import sys
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
import transformers
from torch import Tensor

from apo_trl.errors import InputError, nearest
from apo_trl.pairs.llm.in_process.chat import Chat

__all__ = ["Generator", "sampling_scores"]

_KNOWN = ("messages", "model", "temperature", "top_p", "max_tokens", "seed")


def sampling_scores(
    logits: Tensor, temperature: float, top_p: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Add noise to the logits of one next token, of shape (vocabulary,), such that the greedy choice is a sample.

    With independent standard Gumbel noise g, argmax(logits / temperature + g) is distributed as softmax(logits /
    temperature). Tokens outside the nucleus, the fewest likeliest whose probabilities sum to `top_p`, get -inf first.
    The noise is drawn from `generator`, on the device of the logits, or from torch's global one.
    """
    scores = (logits - logits.max()) / temperature  # at most 0, so that no small temperature overflows
    if top_p < 1:
        order = scores.argsort(descending=True)
        probabilities = scores[order].softmax(-1)
        scores[order[probabilities.cumsum(-1) - probabilities >= top_p]] = -torch.inf
    exponential = torch.empty_like(scores).exponential_(generator=generator)  # whose -log is a Gumbel
    return scores - exponential.clamp_min(torch.finfo(scores.dtype).tiny).log()  # -inf + inf would win as NaN


@dataclass(frozen=True)
class _Request:
    ids: list[int]
    limit: int
    temperature: float
    top_p: float
    seed: int | None


class Generator(Chat):
    """A causal language model that answers OpenAI chat-completions requests.

    Nothing of the model's own generation config is applied but its end tokens; the tokenizer's counts as one, too.
    A request with a seed, or of temperature 0, is answered the same in every run on the same device: in float32
    whatever shares its batch; in less, rounding depends on the shape of the batch, and texts soon part.

    Args:
        model: A folder or hub name; with peft installed, an adapter's too.
        dtype: "bfloat16", say. Default: "auto", the checkpoint's own; float32 on a CPU.
        device: Default: "cuda" where there is one, else "cpu".
        batch_size: How many requests run together at most.

    Raises:
        InputError: The model cannot be loaded, or its tokenizer has no chat template.
    """

    def __init__(self, model: str, *, dtype: str | None = None, device: str | None = None, batch_size: int = 8) -> None:
        super().__init__(transformers.AutoModelForCausalLM, "language model", model, dtype, device, batch_size)
        own = self.model.generation_config.eos_token_id
        ends = {*(own if isinstance(own, list) else [own]), self.tokenizer.eos_token_id} - {None}
        self._ends: list[int] = sorted(ends)
        # Replaced, since `generate` fills what a request's config leaves open from the model's: penalties, say.
        self.model.generation_config = transformers.GenerationConfig()

    def answer(self, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answer each request body with a response body, in order.

        A body has `messages` and may have `temperature` (1; 0 is greedy), `top_p` (1), `max_tokens` (what the context
        leaves, at most 1024 unless given) and `seed` (torch's global generator decides). A body that cannot be answered
        gets `{"error": {"message": ..., "type": "invalid_request"}}`, or "out_of_memory", and harms no other.
        """
        answers: list[dict[str, Any]] = [{}] * len(bodies)
        requests: dict[int, _Request] = {}
        for number, body in enumerate(bodies):
            try:
                requests[number] = self._request(body)
            except InputError as error:
                answers[number] = _error(str(error), "invalid_request")
        # The longest first: what does not fit in memory shows at once, and neighbours need little padding.
        order = sorted(requests, key=lambda number: (-requests[number].limit, -len(requests[number].ids)))
        made = self._in_batches([requests[number] for number in order], self._generate)
        for number, tokens in zip(order, made, strict=True):
            answers[number] = self._response(requests[number], tokens)
        return answers

    def _request(self, body: dict[str, Any]) -> _Request:
        given = {key: value for key, value in body.items() if value is not None}
        if unknown := sorted(given.keys() - set(_KNOWN)):
            hint = nearest(unknown[0], _KNOWN)
            raise InputError(f"'{unknown[0]}' is not supported without a server; leave it out.{hint}")
        ids = self._ids(given.get("messages"), ask=True)
        left = self._context - len(ids)
        if left < 1:
            raise InputError(f"The prompt has {len(ids)} tokens, which leaves no room in a context of {self._context}.")
        temperature, top_p = given.get("temperature", 1.0), given.get("top_p", 1.0)
        limit, seed = given.get("max_tokens", 1024), given.get("seed")
        for key, value, kinds, low, high in (
            ("temperature", temperature, (int, float), 0, sys.float_info.max),
            ("top_p", top_p, (int, float), sys.float_info.min, 1),
            ("max_tokens", limit, int, 1, 2**63),
            ("seed", seed or 0, int, -(2**63), 2**64 - 1),
        ):
            if not (isinstance(value, kinds) and low <= value <= high):
                raise InputError(f"{key} is {value!r}, which cannot be used.")
        if seed is not None:
            seed = seed % 2**64
            seed ^= seed >> 32  # on a CPU, torch looks at the lower 32 bits alone
        return _Request(ids, min(limit, left), temperature, top_p, seed)

    @torch.inference_mode()
    def _generate(self, batch: list[_Request]) -> list[list[int]]:
        # A finished row goes on as padding, and must not run out of the context while the others (whose limits are no
        # longer than the first one's) go on; what does not fit is left for the next batch.
        batch = list(takewhile(lambda each: len(each.ids) + batch[0].limit <= self._context, batch))
        pad = self._ends[0] if self._ends else 0  # masked in prompts, cut off in answers
        inputs = self._inputs([request.ids for request in batch], pad, left=True)
        start = inputs["input_ids"].shape[1]
        output = self.model.generate(
            **inputs,
            generation_config=transformers.GenerationConfig(
                do_sample=False,  # the noise does it
                max_new_tokens=max(request.limit for request in batch),
                eos_token_id=self._ends or None,
                pad_token_id=pad,
            ),
            logits_processor=transformers.LogitsProcessorList([_Noise(batch, self.model.device)]),
            stopping_criteria=transformers.StoppingCriteriaList([_Limits(batch, start, self.model.device)]),
        )
        made = []
        for request, row in zip(batch, output[:, start:].tolist(), strict=True):
            tokens = row[: request.limit]
            end = next((at for at, token in enumerate(tokens) if token in self._ends), len(tokens))
            made.append(tokens[: end + 1])
        return made

    def _response(self, request: _Request, tokens: list[int] | None) -> dict[str, Any]:
        size = len(request.ids)
        if tokens is None:
            return _error(f"The prompt of {size} tokens does not fit in the device's memory.", "out_of_memory")
        stopped = tokens[-1] in self._ends
        kept = tokens[:-1] if stopped else tokens
        text = self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        message, reason = {"role": "assistant", "content": text}, "stop" if stopped else "length"
        usage = {"prompt_tokens": size, "completion_tokens": len(tokens), "total_tokens": size + len(tokens)}
        choices = [{"index": 0, "message": message, "finish_reason": reason}]
        return {"object": "chat.completion", "model": self.name, "choices": choices, "usage": usage}


def _error(message: str, kind: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind}}


class _Noise(transformers.LogitsProcessor):
    """Turn the greedy choice into each row's own sample; rows of temperature 0 stay greedy."""

    def __init__(self, batch: list[_Request], device: torch.device) -> None:
        self.rows = [
            (
                each.temperature,
                each.top_p,
                None if each.seed is None else torch.Generator(device).manual_seed(each.seed),
            )
            for each in batch
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for row, settings in enumerate(self.rows):
            if settings[0] > 0:
                scores[row] = sampling_scores(scores[row], *settings)
        return scores


class _Limits(transformers.StoppingCriteria):
    """End each row at its own `max_tokens`."""

    def __init__(self, batch: list[_Request], start: int, device: torch.device) -> None:
        self.ends = torch.tensor([start + request.limit for request in batch], device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return input_ids.shape[1] >= self.ends
