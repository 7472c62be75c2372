"""Models in this process: a chat model that generates, a reward model that scores. Imports torch and transformers."""

import logging
from collections.abc import Callable, Mapping
from itertools import groupby, takewhile
from typing import Any, ClassVar, NamedTuple

import torch
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from apo_trl.errors import InputError
from apo_trl.models.loading import load_model
from apo_trl.pairs.llm.reply import MARKS, open_thoughts

__all__ = ["Generator", "RewardModel", "sampling_scores"]

logger = logging.getLogger(__name__)

_PAD = 0  # a token of every model: masked in prompts, cut off from completions


class _ChatModel:
    """A model and its tokenizer on one device.

    Args:
        model: Folder or hub name of a model, or of an adapter.
        dtype: Such as "bfloat16". Default: float32 on a CPU, else "auto", that of the checkpoint.
        device: Default: "cuda" if available, else "cpu".
        batch_size: Maximum number of requests that run together.

    Raises:
        InputError: The model cannot be loaded, or its tokenizer has no chat template.
    """

    auto_class: ClassVar[Any]

    def __init__(self, model: str, *, dtype: str | None = None, device: str | None = None, batch_size: int = 8) -> None:
        self.name, self.batch_size = model, batch_size
        loaded, self.tokenizer = load_model(model, "model", auto_class=self.auto_class, device=device, dtype=dtype)
        adapter = getattr(loaded, "active_peft_config", None)  # its layers are in the base model; a prompt's are not
        self.model = loaded if adapter is None or adapter.is_prompt_learning else loaded.get_base_model()
        if not self.tokenizer.chat_template:
            raise InputError(f"model: '{model}' has no chat template. Add a chat_template.jinja to its folder.")
        config = self.model.config.get_text_config()
        self._context: int = getattr(config, "max_position_embeddings", None) or 2**31  # recurrent models have none

    def _tokenize(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> list[int]:
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # code of the template may raise anything
            raise InputError(f"messages: not supported by the chat template of '{self.name}': {error}.") from error
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _pad(self, batch: list[list[int]], pad: int, side: str) -> dict[str, Tensor]:
        rows = [torch.tensor(ids) for ids in batch]
        ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side=side)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
        return {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}

    def _answer_each(
        self,
        bodies: list[dict[str, Any]],
        read: Callable[[dict[str, Any]], Any],
        size: Callable[[Any], Any],
        run: Callable[[list[Any]], list[dict[str, Any]]],
    ) -> list[dict[str, Any]]:
        """Return a response for each body, in order: that of `run`, or the error for one that `read` refuses."""
        responses: dict[int, dict[str, Any]] = {}
        requests: dict[int, Any] = {}
        for index, body in enumerate(bodies):
            try:
                requests[index] = read(body)
            except InputError as error:
                responses[index] = _error(str(error))
        responses |= self._in_batches(requests, size, run)
        return [responses[index] for index in range(len(bodies))]

    def _in_batches(
        self, items: Mapping[int, Any], size: Callable[[Any], Any], run: Callable[[list[Any]], list[dict[str, Any]]]
    ) -> dict[int, dict[str, Any]]:
        """Return the response to each item; `run` responds to a batch, or to its beginning.

        The largest run first: running out of memory shows at once, and neighbours need little padding. Batches are
        halved for good if memory runs out.
        """
        order = sorted(items, key=lambda index: size(items[index]), reverse=True)
        responses: list[dict[str, Any]] = []
        while len(responses) < len(order):
            batch = [items[index] for index in order[len(responses) :][: self.batch_size]]
            try:
                responses += run(batch)
                continue
            except torch.cuda.OutOfMemoryError:
                pass  # and leave the handler: its traceback holds the tensors
            torch.cuda.empty_cache()
            if len(batch) == 1:
                responses.append(_error("messages: do not fit into memory."))
                continue
            self.batch_size = len(batch) // 2
            logger.warning("'%s': out of memory on a batch of %d. Using %d.", self.name, len(batch), self.batch_size)
        return dict(zip(order, responses, strict=True))


class _Request(NamedTuple):
    ids: list[int]
    start: str
    limit: int
    temperature: float
    top_p: float
    seed: int | None


class Generator(_ChatModel):
    """A causal language model that answers requests in the format of OpenAI's chat completions.

    Of the model's generation config only the end tokens are used, and the tokenizer's end token. A request with a seed,
    or with temperature 0, gets the same response in every run on the same device: in float32 whatever shares its batch;
    in lower precision rounding depends on the shape of the batch.
    """

    auto_class = transformers.AutoModelForCausalLM

    def __init__(self, model: str, **options: Any) -> None:
        super().__init__(model, **options)
        own = self.model.generation_config.eos_token_id
        ends = {*(own if isinstance(own, list) else [own]), self.tokenizer.eos_token_id} - {None}
        self._ends: list[int] = sorted(ends)
        self._marks = {token: mark for mark, token in self.tokenizer.get_vocab().items() if mark in MARKS}
        # Replaced, since `generate` takes what a request's config does not set, such as penalties, from the model's.
        self.model.generation_config = transformers.GenerationConfig()

    def answer(self, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return a response body for each request body, in order.

        A request has `messages` and optionally `temperature` (1; 0 is greedy), `top_p` (1), `max_tokens` (1024, or what
        the context leaves) and `seed` (default: torch's global generator). A request that fails affects no other one;
        its response is `{"error": {"message": ...}}`.
        """
        return self._answer_each(bodies, self._request, lambda each: (each.limit, len(each.ids)), self._generate)

    def _request(self, body: dict[str, Any]) -> _Request:
        if unknown := body.keys() - {"messages", "model", "temperature", "top_p", "max_tokens", "seed"}:
            raise InputError(f"{min(unknown)}: not supported without a server. Unset it.")
        ids = self._tokenize(body["messages"], add_generation_prompt=True)
        left = self._context - len(ids)
        if left < 1:
            raise InputError(f"messages: {len(ids)} tokens fill the context of {self._context}. Shorten them.")
        limit = min(body.get("max_tokens", 1024), left)
        start = open_thoughts(self.tokenizer.decode(ids[-8:]))  # of the reply, which the chat template has begun
        return _Request(ids, start, limit, body.get("temperature", 1.0), body.get("top_p", 1.0), body.get("seed"))

    @torch.inference_mode()
    def _generate(self, batch: list[_Request]) -> list[dict[str, Any]]:
        # A finished row continues as padding and must not leave the context while others continue, up to the limit of
        # the first one, the highest. What does not fit is left for the next batch.
        batch = list(takewhile(lambda request: len(request.ids) + batch[0].limit <= self._context, batch))
        inputs = self._pad([request.ids for request in batch], _PAD, "left")
        config = transformers.GenerationConfig(
            do_sample=False,  # sampled by the noise
            max_new_tokens=batch[0].limit,
            eos_token_id=self._ends or None,
            pad_token_id=_PAD,
        )
        noise = transformers.LogitsProcessorList([_Noise(batch, self.model.device)])
        output = self.model.generate(**inputs, generation_config=config, logits_processor=noise)
        responses = []
        for request, row in zip(batch, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            tokens = row[: request.limit]
            end = next((index for index, token in enumerate(tokens) if token in self._ends), len(tokens))
            text = request.start + self._decode(tokens[:end])
            usage = {"prompt_tokens": len(request.ids), "completion_tokens": len(tokens[: end + 1])}
            responses.append(_completion(text, "stop" if end < len(tokens) else "length") | {"usage": usage})
        return responses

    def _decode(self, tokens: list[int]) -> str:
        """Return the text of tokens without special ones, except those that mark thoughts."""
        options: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        parts = groupby(tokens, self._marks.get)
        return "".join(mark or self.tokenizer.decode(list(part), **options) for mark, part in parts)


class _Noise(transformers.LogitsProcessor):
    """Makes the greedy choice a sample of each row; rows of temperature 0 stay greedy."""

    def __init__(self, batch: list[_Request], device: torch.device) -> None:
        self.batch, seeds = batch, [request.seed for request in batch]
        self.noises = [None if seed is None else torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for row, (request, noise) in enumerate(zip(self.batch, self.noises, strict=True)):
            if request.temperature > 0:
                scores[row] = sampling_scores(scores[row], request.temperature, request.top_p, noise)
        return scores


def sampling_scores(
    logits: Tensor, temperature: float, top_p: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Add noise to the logits of the next token, of shape (vocabulary,), such that their argmax is a sample.

    With independent standard Gumbel noise g, argmax(logits / temperature + g) is distributed as softmax(logits /
    temperature). Tokens outside the nucleus, the fewest likeliest whose probabilities sum to `top_p`, get -inf first.
    """
    scores = (logits - logits.max()) / temperature  # at most 0: a small temperature does not overflow
    if top_p < 1:
        order = scores.argsort(descending=True)
        likelier = scores[order].softmax(-1).cumsum(-1)[:-1]  # for each token but the first, which always stays
        scores[order[1:][likelier >= top_p]] = -torch.inf
    exponential = torch.empty_like(scores).exponential_(generator=generator)  # its -log is Gumbel noise
    return scores - exponential.clamp_min(torch.finfo(scores.dtype).tiny).log()  # argmax would choose NaN, -inf + inf


class RewardModel(_ChatModel):
    """A sequence classifier with one label, whose logit is the reward of a conversation."""

    auto_class = transformers.AutoModelForSequenceClassification

    def __init__(self, model: str, **options: Any) -> None:
        super().__init__(model, **options)
        if (labels := self.model.config.num_labels) != 1:
            raise InputError(f"model: reward model '{model}' has {labels} labels. Set one with num_labels=1.")
        self._longest = min(self.tokenizer.model_max_length, self._context)
        self._pad_token: int | None = self.model.config.get_text_config().pad_token_id

    def answer(self, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Score the messages of request bodies; each response is a score in brackets, as a judge writes it.

        A request that fails affects no other one; its response is `{"error": {"message": ...}}`.
        """
        return self._answer_each(bodies, self._ids, len, self._score)

    def _ids(self, body: dict[str, Any]) -> list[int]:
        ids = self._tokenize(body["messages"], add_generation_prompt=False)
        if len(ids) > self._longest:  # nothing is truncated
            raise InputError(f"messages: longer than the model's {self._longest} tokens.")
        return ids

    @torch.inference_mode()
    def _score(self, batch: list[list[int]]) -> list[dict[str, Any]]:
        pad = self._pad_token
        if pad is None or pad < 0:
            # The model scores the last token that is not `pad_token_id`. Without one it was made for single
            # conversations, whose last token counts; so pad with a token that ends none of these.
            pad = min(set(range(len(batch) + 1)) - {ids[-1] for ids in batch})
            self.model.config.pad_token_id = self.model.config.get_text_config().pad_token_id = pad
        logits: Tensor = self.model(**self._pad(batch, pad, "right")).logits
        return [_completion(f"[[{reward}]]", "stop") for reward in logits[:, 0].tolist()]


def _completion(text: str, finish: str) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]}


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message}}
