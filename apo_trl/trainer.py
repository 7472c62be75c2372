"""APO inside TRL: `APOTrainer`, and `register()` for plain `trl.DPOTrainer`.

This is the one file that overrides the host. TRL has no hook for losses, so `_AnchoredTrainer` stands between
`DPOTrainer._compute_loss` and what it calls: the reference log-probs are asked for first, through the host's own
method, and handed over as if they had been precomputed; the model is handed over as a callable that keeps what the
fused head returned. From the two come the log-ratios, and from these our losses and metrics. Forward, reference,
logging, evaluation and every loss that TRL implements stay TRL's; no host method is copied.

Left out on purpose: a registry. TRL does not want one, and `LOSSES` is a dict.
"""

import contextlib
import functools
import inspect
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import TrainingArguments
from trl import DPOConfig, DPOTrainer

from apo_trl.config import (
    ADDED_LOSSES,
    SMOOTHED_LOSSES,
    APOConfig,
    check_config,
    groups_prompts,
    keeps_degenerate_pairs,
    loss_names,
)
from apo_trl.datasets.balancing import balance_sampler, forward_epochs
from apo_trl.datasets.grouping import PromptGroupedSampler
from apo_trl.datasets.preprocessing import (
    CollatorWithWins,
    StreamFilter,
    check_dataset,
    check_streamed_row,
    filter_degenerate_pairs,
    filter_vision_pairs,
    named_datasets,
)
from apo_trl.errors import InputError
from apo_trl.io.rows import degenerate_reason, split_conversation
from apo_trl.losses import LOSSES
from apo_trl.metrics import Saturation, pair_metrics
from apo_trl.prefix_sharing import PackingCollator, PrefixSharing, dropout_names, enable_prefix_sharing
from apo_trl.reference_cache.cache import add_reference_logps, check_cache_dir

__all__ = ["APOTrainer"]

logger = get_logger(__name__)

_PARALLELISM = {"tp": "tensor", "cp": "context", "sp": "sequence"}
_ANCHORED = {name for name in LOSSES if name.startswith("apo_")}
_PAPER = {
    "title": "Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment",
    "id": "2408.06266",
    "citation": textwrap.dedent("""\
        @article{doosterlinck2025anchored,
            title        = {{Anchored Preference Optimization and Contrastive Revisions:
                             Addressing Underspecification in Alignment}},
            author       = {Karel D'Oosterlinck and Winnie Xu and Chris Develder and Thomas Demeester and
                            Amanpreet Singh and Christopher Potts and Douwe Kiela and Shikib Mehri},
            year         = 2025,
            journal      = {Transactions of the Association for Computational Linguistics},
            volume       = 13,
            pages        = {442--460},
            doi          = {10.1162/tacl_a_00748},
            eprint       = {arXiv:2408.06266},
        }"""),
}


class _AnchoredTrainer(DPOTrainer):
    """`DPOTrainer` with our losses, metrics and checks: `APOTrainer`, and what `register()` makes of the host."""

    # Attributes of the host that are set here.
    data_collator: Any
    loss_types: list[str]
    loss_weights: list[Any]
    precompute_ref_logps: bool

    _reference_fingerprint: tuple[int, str | None] | None = None  # at which step, by `reference.py`

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(DPOTrainer.__init__).bind(self, *args, **kwargs)
        config = given.arguments.get("args")
        names = [] if config is None else loss_names(config)
        if config is not None:
            check_config(config)
            check_cache_dir(config)
            if _ANCHORED.intersection(names):
                self._name, self._paper, self._tag_names = "APO", _PAPER, [*DPOTrainer._tag_names, "apo"]
            if config.label_smoothing and not SMOOTHED_LOSSES.intersection(names):
                logger.warning(
                    f"label_smoothing={config.label_smoothing} has no effect on loss_type {', '.join(names)}: only "
                    f"{', '.join(sorted(SMOOTHED_LOSSES))} read it. Remove it."
                )
        if groups_prompts(config) and isinstance(given.arguments.get("train_dataset"), IterableDataset):
            raise InputError(
                "group_by_prompt=True cannot order a stream; set it to False, or load the dataset without streaming."
            )
        needs_wins = "apo_blend" in names
        for key in ("train_dataset", "eval_dataset"):
            for name, dataset in named_datasets(given.arguments.get(key), key.removesuffix("_dataset")):
                check_dataset(dataset, name, needs_wins, config)
            if key in given.arguments and not keeps_degenerate_pairs(config):
                given.arguments[key] = filter_vision_pairs(given.arguments[key], key.removesuffix("_dataset"), config)

        with _without_padding_free(config):
            super().__init__(*given.args[1:], **given.kwargs)
        self._sharing = None
        if self.args.padding_free:
            self._sharing = PrefixSharing(self._padded_reason(), all_agree=self._all_agree)
            models = [self.model] if self.ref_model is None else [self.model, self.ref_model]
            unwrapped = (self.accelerator.unwrap_model(model, keep_torch_compile=False) for model in models)
            enable_prefix_sharing(*unwrapped, sharing=self._sharing)
            # A dispatching loader joins the batches of all processes, tensor by tensor.
            if not self._sharing.reason and not self.args.accelerator_config.dispatch_batches:
                self.data_collator = PackingCollator(self.data_collator)

        self.loss_terms: list[tuple[str, float]] = list(zip(self.loss_types, self.loss_weights, strict=True))
        theirs = [(name, weight) for name, weight in self.loss_terms if name not in ADDED_LOSSES]
        self.loss_types = [name for name, _ in theirs]
        self.loss_weights = [weight for _, weight in theirs]
        if len(self.loss_terms) > 1:
            self.loss_weights = [_RecordingWeight(weight) for weight in self.loss_weights]
        self._saturation = Saturation.of([name for name, _ in self.loss_terms], self.args)
        if needs_wins:
            self.data_collator = CollatorWithWins(self.data_collator)

    def _padded_reason(self) -> str:
        """Return which setting of the run needs padded batches, or an empty string."""
        if self.aux_loss_enabled:
            return "the router's auxiliary loss needs the padded batch"
        if self.args.neftune_noise_alpha:
            return "neftune_noise_alpha scales its noise by the padded length"
        if names := dropout_names(self.model):
            remedy = "Set disable_dropout=True, and attention_dropout=0 in the model's configuration"
            return f"dropout is on ({', '.join(names)}) and its noise depends on the layout. {remedy}"
        parallelism = self.accelerator.parallelism_config
        for kind in ("tp", "cp", "sp"):
            if getattr(parallelism, f"{kind}_size", 1) > 1:
                return f"{_PARALLELISM[kind]} parallelism splits the padded batch"
        return ""

    def _all_agree(self, agreed: bool) -> bool:
        return bool(self.accelerator.gather(torch.tensor([agreed], device=self.accelerator.device)).all())

    # Data: rows are checked as they arrive, pairs that teach nothing are left out, `chosen_wins` reaches the batch.

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: DPOConfig, dataset_name: str) -> Any:
        if isinstance(dataset, IterableDataset):
            check = functools.partial(check_streamed_row, name=dataset_name, needs_wins="apo_blend" in loss_names(args))
            dataset = dataset.map(check, with_indices=True)
        first = next(iter(dataset))
        if isinstance(first.get("prompt"), str) and not isinstance(first["chosen"], str):
            with args.main_process_first(desc="splitting conversations"):
                dataset = dataset.map(split_conversation)
        before = len(dataset) if isinstance(dataset, Dataset) else 0
        dataset = super()._prepare_dataset(dataset, processing_class, _dpo_settings(args), dataset_name)
        if keeps_degenerate_pairs(args):
            return dataset
        reason = functools.partial(
            degenerate_reason,
            max_length=args.max_length,
            keep_end=args.truncation_mode == "keep_end",
            eos_token=self._tokenizer.eos_token or "",
        )
        if isinstance(dataset, IterableDataset):
            return dataset.filter(StreamFilter(reason, dataset_name))
        too_long = f"the prompt alone fills max_length={args.max_length}"
        return filter_degenerate_pairs(dataset, reason, dataset_name, Counter({too_long: before - len(dataset)}), args)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if isinstance(dataset, IterableDataset):
            return super()._precompute_ref_logps(dataset, name, batch_size)  # which says that a stream cannot be
        return add_reference_logps(self, dataset, name, batch_size)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "apo_blend" in loss_names(self.args) and "chosen_wins" not in self._signature_columns:
            self._signature_columns.append("chosen_wins")

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if groups_prompts(self.args):
            # Of images, TRL keeps the texts.
            column = "prompt_ids" if "prompt_ids" in dataset.column_names else "prompt"
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            sampler = PromptGroupedSampler(map(repr, dataset[column]), self._train_batch_size, seed)
        else:
            sampler = super()._get_train_sampler(dataset)
        packs = self._sharing is not None and not self._sharing.reason
        return balance_sampler(sampler, dataset, self.args, self._train_batch_size) if packs else sampler

    def get_train_dataloader(self) -> Any:
        """Build the loader so that the epoch reaches our samplers also when several processes resume in one."""
        return forward_epochs(super().get_train_dataloader())

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as the host does, after checking the rows of a dataset that is given only now."""
        needs_wins = "apo_blend" in loss_names(self.args)
        for name, dataset in named_datasets(eval_dataset, "eval"):
            check_dataset(dataset, name, needs_wins, self.args)
        metrics: dict[str, float] = super().evaluate(eval_dataset, *args, **kwargs)
        return metrics

    # Loss: the host's terms by the host, ours from the log-ratios of the same forward.

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> tuple[Tensor, Tensor]:
        """Compute the reference's summed log-probs of a batch, leaving out the column that is not the model's."""
        inputs = {key: value for key, value in inputs.items() if key != "chosen_wins"}
        logps: tuple[Tensor, Tensor] = super().compute_ref_log_probs(model, inputs)
        return logps

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        inputs = dict(inputs)
        wins = inputs.pop("chosen_wins", None)
        if not self.precompute_ref_logps:
            reference = self.model if self.ref_model is None else self.ref_model
            inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = self.compute_ref_log_probs(reference, inputs)
        policy = _Recorder(model)
        precomputed, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            result = super()._compute_loss(policy, inputs, return_outputs)
        finally:
            self.precompute_ref_logps = precomputed
        loss, outputs = result if return_outputs else (result, None)

        pairs = self._pairs(policy.outputs, inputs, wins)
        terms = {}
        for name, weight in self.loss_terms:
            if name in ADDED_LOSSES:
                terms[name] = self._our_loss(name, pairs).mean()
                loss = loss + weight * terms[name]
        if len(self.loss_terms) > 1:
            terms |= {name: weight.term for name, weight in zip(self.loss_types, self.loss_weights, strict=True)}
        self._log_pairs({name: value.detach() for name, value in pairs.items()}, terms)
        return (loss, outputs) if return_outputs else loss

    def _pairs(self, outputs: Any, inputs: dict[str, Any], wins: Tensor | None) -> dict[str, Tensor]:
        """Give what losses and metrics look at, each of shape (pairs,): log-ratios, lengths and `chosen_wins`."""
        scored = inputs["completion_mask"][:, 1:]
        # Prompt-learning PEFT prepends virtual tokens to the outputs; the real ones are the last.
        logps = outputs.log_probs[:, -scored.size(1) :]
        chosen_lengths, rejected_lengths = scored.sum(dim=1).chunk(2)
        if self.ld_alpha is not None:
            shorter = torch.minimum(chosen_lengths, rejected_lengths).repeat(2).unsqueeze(1)
            logps = logps * torch.where(scored.cumsum(dim=1) > shorter, self.ld_alpha, 1.0)
        chosen_logps, rejected_logps = logps.sum(dim=1).chunk(2)
        pairs = {
            "chosen_logratios": chosen_logps - inputs["ref_chosen_logps"],
            "rejected_logratios": rejected_logps - inputs["ref_rejected_logps"],
            "chosen_lengths": chosen_lengths,
            "rejected_lengths": rejected_lengths,
        }
        return pairs if wins is None else {**pairs, "chosen_wins": wins}

    def _our_loss(self, name: str, pairs: dict[str, Tensor]) -> Tensor:
        wanted = inspect.signature(ADDED_LOSSES[name]).parameters
        return ADDED_LOSSES[name](**{key: value for key, value in pairs.items() if key in wanted}, beta=self.beta)

    # Metrics: gathered over processes as TRL gathers its own, and read from the device all at once.

    def _log_pairs(self, pairs: dict[str, Tensor], terms: dict[str, Tensor]) -> None:
        ratios = pairs["chosen_logratios"]
        metrics = pair_metrics(**{key: value for key, value in pairs.items() if key != "chosen_wins"})
        if self._saturation is not None:
            metrics["saturated"] = self._saturation(pairs)
        if self._sharing is not None and not self._sharing.reason:
            metrics["tokens_saved"] = torch.full_like(ratios, self._sharing.tokens_saved)
        values = {f"apo/{name}": value for name, value in metrics.items()}
        if len(terms) > 1:
            values |= {f"loss/{name}": term.detach().expand_as(ratios) for name, term in terms.items()}
        rows = torch.stack([value.float() for value in values.values()], dim=1)
        mode = "train" if self.model.training else "eval"
        for name, mean in zip(values, self.accelerator.gather(rows).mean(dim=0).tolist(), strict=True):
            self._metrics[mode][name].append(mean)


class APOTrainer(_AnchoredTrainer):
    """`trl.DPOTrainer` for Anchored Preference Optimization.

    Takes what `DPOTrainer` takes, and the same datasets: rows with `chosen` and `rejected`, mostly with `prompt`, and
    with `chosen_wins` for the loss `apo_blend`. Without `args` it trains with the defaults of `APOConfig`. On top of
    the host's metrics it logs those of `apo_trl.metrics`. Bad settings and bad rows raise `InputError` before the model
    is loaded.

    Example::

        trainer = APOTrainer("Qwen/Qwen3-0.6B", args=APOConfig("out"), train_dataset=pairs)
        trainer.train()
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(DPOTrainer.__init__).bind(self, *args, **kwargs).arguments
        if given.get("args") is None:
            model = given["model"]
            path = model if isinstance(model, str) else model.config._name_or_path
            given["args"] = APOConfig(f"{path.rstrip('/').split('/')[-1]}-APO")
        given.pop("self")
        super().__init__(**given)


def _dpo_settings(args: DPOConfig) -> Any:
    """Return the settings that DPO adds to training. TRL's filter of rows is cached by the arguments that it is given.

    With all of them its result, and what is made of it, would be another for each process and each output folder.
    """
    added = [field for field in fields(DPOConfig) if field.name not in TrainingArguments.__dataclass_fields__]
    return SimpleNamespace(**{field.name: getattr(args, field.name) for field in added})


@contextlib.contextmanager
def _without_padding_free(config: Any) -> Iterator[None]:
    """Hide `padding_free` from the host, which would warn that it cannot."""
    wanted = config is not None and config.padding_free
    if wanted:
        config.padding_free = False
    try:
        yield
    finally:
        if wanted:
            config.padding_free = True


class _Recorder:
    """The model, keeping what its fused head last returned."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, **kwargs: Any) -> Any:
        outputs = self.model(**kwargs)
        if kwargs.get("fused_lm_head"):
            self.outputs = outputs
        return outputs


class _RecordingWeight:
    """A weight of one of TRL's losses that keeps what it multiplies, since TRL sums its terms and logs none of them."""

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.term: Any = None

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Multiply a term, whichever side it is on."""
        weight = next(value for value in args if isinstance(value, cls))
        weight.term = next(value for value in args if isinstance(value, Tensor)).detach()
        return function(*(value.weight if isinstance(value, cls) else value for value in args), **(kwargs or {}))
