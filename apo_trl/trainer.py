"""APO inside TRL: `APOTrainer`, and the class that `register()` puts under plain `trl.DPOTrainer`.

The one file that overrides TRL. TRL has no hook for losses, so `_AnchoredTrainer` computes the reference's log-probs
first, through TRL's own method, and passes TRL a model that records the log-probs of the fused head. Our losses and
metrics follow from the two. Forward, reference, logging and TRL's losses stay TRL's; no TRL method is copied.
"""

import inspect
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import AutoProcessor, TrainingArguments
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import get_config_model_id

from apo_trl.config import ADDED_LOSSES, SMOOTHED_LOSSES, APOConfig, check_config, has_option, loss_names
from apo_trl.datasets.preprocessing import filter_degenerate_pairs, normalise_datasets
from apo_trl.datasets.rendering import render_first_rows
from apo_trl.errors import InputError
from apo_trl.io.run_record import write_run
from apo_trl.losses import LOSSES, apply_loss, pair_columns
from apo_trl.metrics import pair_metrics
from apo_trl.saturation import Saturation

__all__ = ["APOTrainer"]

logger = get_logger(__name__)

_PAPER = {
    "title": "Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment",
    "id": "2408.06266",
    "citation": Path(__file__).with_name("citation.bib").read_text(encoding="utf-8").strip(),
}


class _AnchoredTrainer(DPOTrainer):
    """`DPOTrainer` with our losses, metrics and checks."""

    # Attributes of TRL that are set here.
    data_collator: Any
    loss_types: list[str]
    loss_weights: list[Any]
    precompute_ref_logps: bool
    _reference_fingerprint: tuple[str | None] | None = None  # ours: None if it is to be computed

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(DPOTrainer.__init__).bind(self, *args, **kwargs)
        model, config = bound.arguments["model"], bound.arguments.get("args")
        if isinstance(model, str) and not Path(model).exists():
            from apo_trl.models.packaged import resolve_model

            model = bound.arguments["model"] = resolve_model(model, "model")
        peft_config, ref_model = bound.arguments.get("peft_config"), bound.arguments.get("ref_model")
        path = model if isinstance(model, str) else get_config_model_id(model.config)
        if config is None:  # as TRL
            kind, suffix = (APOConfig, "APO") if isinstance(self, APOTrainer) else (DPOConfig, "DPO")
            config = bound.arguments["args"] = kind(f"{path.rstrip('/').split('/')[-1]}-{suffix}")
        self._check(config, bound.arguments.get("train_dataset"))
        if peft_config or ref_model or not isinstance(model, str) or Path(model, "adapter_config.json").is_file():
            from apo_trl.reference import check_models

            check_models(model, peft_config, ref_model, config.precompute_ref_log_probs)
        self._own_start: bool | None = ref_model is None  # is the reference the policy's; None after the first batch
        needs_wins = "apo_blend" in loss_names(config)
        datasets = {name: bound.arguments.get(f"{name}_dataset") for name in ("train", "eval")}
        self.run_record: dict[str, Any] = {}  # more for `run.json`
        datasets = {name: normalise_datasets(each, name, needs_wins, config) for name, each in datasets.items()}
        processor = bound.arguments.get("processing_class")
        if processor is None:  # as TRL, which loads the model first
            revision = (config.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None
            options = {"revision": revision, "trust_remote_code": config.trust_remote_code}
            processor = AutoProcessor.from_pretrained(path, **options)
        for name, each in datasets.items():
            bound.arguments[f"{name}_dataset"] = render_first_rows(each, name, needs_wins, processor)
        bound.arguments["processing_class"] = processor

        if config.accelerator_config.dispatch_batches is None:  # TRL turns it off only for streams to train on
            config.accelerator_config.dispatch_batches = False
        padding_free, config.padding_free = config.padding_free, False  # TRL would warn that it does not support it
        try:
            super().__init__(*bound.args[1:], **bound.kwargs)
        finally:
            config.padding_free = padding_free
        self._complete_reference()
        self._sharing: Any = None
        if self.args.padding_free:
            self._share_prefixes()
        self.loss_terms: list[tuple[str, float]] = list(zip(self.loss_types, self.loss_weights, strict=True))
        terms_of_trl = [(name, weight) for name, weight in self.loss_terms if name not in ADDED_LOSSES]
        self.loss_types = [name for name, _ in terms_of_trl]
        self.loss_weights = [weight for _, weight in terms_of_trl]
        if len(self.loss_terms) > 1:
            from apo_trl.trl_losses import RecordingWeight

            self.loss_weights = [RecordingWeight(weight) for weight in self.loss_weights]
        self._saturation = Saturation([name for name, _ in self.loss_terms], self.args)
        if needs_wins or self._is_vision_dataset:
            from apo_trl.datasets.collators import RowCollator

            self.data_collator = RowCollator(self.data_collator, self._is_vision_dataset, needs_wins)

    def _check(self, config: DPOConfig, train_dataset: Any) -> None:
        """Check the settings before a model is loaded, and set what the model card cites."""
        check_config(config)
        if config.should_save:
            existing = next(path for path in Path(config.output_dir, "x").absolute().parents if path.exists())
            if not existing.is_dir() or not os.access(existing, os.W_OK):
                from apo_trl.config.conflicts import output_dir_error

                raise output_dir_error(config.output_dir, existing)
        names = loss_names(config)
        if config.precompute_ref_log_probs or getattr(config, "ref_cache_dir", None):
            from apo_trl.reference_cache.cache import check_cache_dir

            check_cache_dir(config)
        if any(name.startswith("apo_") for name in LOSSES.keys() & names):
            self._name, self._paper, self._tag_names = "APO", _PAPER, [*DPOTrainer._tag_names, "apo"]
        if config.label_smoothing:
            from apo_trl.config.conflicts import warn_of_smoothing

            warn_of_smoothing(config, names, SMOOTHED_LOSSES)
        if isinstance(train_dataset, IterableDataset):
            from apo_trl.datasets.streams import check_settings

            check_settings(config)

    def _complete_reference(self) -> None:
        if "ref" in getattr(self.model, "peft_config", {}):
            from apo_trl.reference import complete_reference

            complete_reference(self.model)

    def _share_prefixes(self) -> None:
        from apo_trl.prefix_sharing import PackingCollator, PrefixSharing, enable_prefix_sharing, padded_reason

        self._sharing = PrefixSharing(padded_reason(self), all_agree=self._all_agree)
        models = [self.model] if self.ref_model is None else [self.model, self.ref_model]
        unwrapped = (self.accelerator.unwrap_model(model, keep_torch_compile=False) for model in models)
        enable_prefix_sharing(*unwrapped, sharing=self._sharing)
        # A dispatching loader concatenates the batches of all processes, tensor by tensor.
        if not self._sharing.reason and not self.args.accelerator_config.dispatch_batches:
            self.data_collator = PackingCollator(self.data_collator)

    def _all_agree(self, agrees: bool) -> bool:
        return bool(self.accelerator.gather(torch.tensor([agrees], device=self.accelerator.device)).all())

    @property
    def _packs(self) -> bool:
        return self._sharing is not None and not self._sharing.reason

    # Data: rows are checked, degenerate pairs are dropped, `chosen_wins` reaches the batch.

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: DPOConfig, dataset_name: str) -> Any:
        before = len(dataset) if isinstance(dataset, Dataset) else 0
        try:
            tokenized = super()._prepare_dataset(dataset, processing_class, _dpo_settings(args), dataset_name)
        except Exception as error:  # a chat template may raise what it likes
            from apo_trl.io.tokenization import first_failure

            if failure := first_failure(dataset, dataset_name, processing_class):
                raise InputError(failure) from error
            raise
        eos_token = self._tokenizer.eos_token or ""
        return filter_degenerate_pairs(tokenized, dataset_name, args, before=before, eos_token=eos_token)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if isinstance(dataset, IterableDataset):
            return super()._precompute_ref_logps(dataset, name, batch_size)  # raises TRL's error
        from apo_trl.reference_cache.cache import add_reference_logps

        self._complete_reference()
        return add_reference_logps(self, dataset, name, batch_size)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "apo_blend" in loss_names(self.args) and "chosen_wins" not in self._signature_columns:
            self._signature_columns.append("chosen_wins")

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if has_option(self.args, "group_by_prompt"):
            from apo_trl.datasets.grouping import group_sampler

            sampler = group_sampler(dataset, self.args, self._train_batch_size)
        else:
            sampler = super()._get_train_sampler(dataset)
        if not self._packs or self.args.world_size * self.args.gradient_accumulation_steps == 1:
            return sampler
        from apo_trl.datasets.balancing import balance_sampler

        return balance_sampler(sampler, dataset, self.args, self._train_batch_size)

    def get_train_dataloader(self) -> Any:
        """Build TRL's data loader, with its epoch forwarded to our samplers if several processes resume in one."""
        loader = super().get_train_dataloader()
        if self.args.world_size == 1:
            return loader
        from apo_trl.datasets.balancing import forward_epochs

        return forward_epochs(loader)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Write `run.json` into the output folder, and train as TRL does."""
        if self.is_world_process_zero():
            write_run(self)
        return super().train(*args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Check the rows of a dataset that is passed only here, and evaluate as TRL does."""
        self._reference_fingerprint = None  # weights may have changed
        needs_wins = "apo_blend" in loss_names(self.args)
        eval_dataset = normalise_datasets(eval_dataset, "eval", needs_wins, self.args)
        eval_dataset = render_first_rows(eval_dataset, "eval", needs_wins, self.processing_class)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate as TRL does, with every metric under the prefix of its dataset; TRL logs most as `eval_`."""
        self._metrics["eval"].clear()  # of an evaluation that failed
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        for name, values in self._metrics["eval"].items():
            output.metrics[f"{metric_key_prefix}_{name}"] = sum(values) / len(values)
        self._metrics["eval"].clear()
        return output

    # Loss: TRL computes its terms, and ours follow from the log-ratios of the same forward.

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        """Compute the reference's summed log-probs of a batch, without the column that no model takes."""
        inputs = {key: value for key, value in inputs.items() if key != "chosen_wins"}
        return super().compute_ref_log_probs(model, inputs)

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        inputs = dict(inputs)
        wins = inputs.pop("chosen_wins", None)
        if not self.precompute_ref_logps:
            reference = self.model if self.ref_model is None else self.ref_model
            inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = self.compute_ref_log_probs(reference, inputs)
        recorded: Any = None

        def policy(**kwargs: Any) -> Any:
            nonlocal recorded
            outputs = model(**kwargs)
            recorded = outputs if kwargs.get("fused_lm_head") else recorded
            return outputs

        precomputed, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            result = super()._compute_loss(policy, inputs, return_outputs)
        finally:
            self.precompute_ref_logps = precomputed
        loss, outputs = result if return_outputs else (result, None)

        pairs = pair_columns(recorded.log_probs, inputs, self.ld_alpha)
        if wins is not None:
            pairs["chosen_wins"] = wins
        terms = {}
        for name, weight in self.loss_terms:
            if name in ADDED_LOSSES:
                terms[name] = apply_loss(ADDED_LOSSES[name], pairs, beta=self.beta).mean()
                loss = loss + weight * terms[name]
        if len(self.loss_terms) > 1:
            terms |= {name: weight.term for name, weight in zip(self.loss_types, self.loss_weights, strict=True)}
        self._log_pairs({name: value.detach() for name, value in pairs.items()}, terms)
        return (loss, outputs) if return_outputs else loss

    def _log_pairs(self, pairs: dict[str, Tensor], terms: dict[str, Tensor]) -> None:
        """Log the means over the pairs of all processes, read from the device at once."""
        logratios = pairs["chosen_logratios"]
        metrics = pair_metrics(**{key: value for key, value in pairs.items() if key != "chosen_wins"})
        if self._saturation.losses:
            metrics["saturated"] = self._saturation(pairs)
        if self._packs:
            metrics["tokens_saved"] = torch.full_like(logratios, self._sharing.tokens_saved)
        values = {f"apo/{name}": value for name, value in metrics.items()}
        if len(terms) > 1:
            values |= {f"loss/{name}": term.detach().expand_as(logratios) for name, term in terms.items()}
        chosen, rejected = (self.beta * pairs[f"{side}_logratios"] for side in ("chosen", "rejected"))
        values |= {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected}
        values["rewards/accuracies"] = chosen > rejected
        per_token = [metrics[f"{side}_logratio_per_token"] for side in ("chosen", "rejected")]
        values["distance"] = torch.stack(per_token).abs().mean(dim=0)
        rows = torch.stack([value.float() for value in values.values()], dim=1)
        mode = "train" if self.model.training else "eval"
        # In evaluation without the rows that accelerate repeats to fill the last batch.
        gather = self.accelerator.gather if mode == "train" else self.accelerator.gather_for_metrics
        rows, logged = gather(rows), self._metrics[mode]
        # TRL logs the mean of a list. With a value for each pair instead of each batch, a short batch weighs less.
        before = len(logged["apo/chosen_up"])
        means = {name: each[-1] for name, each in logged.items() if len(each) == before + 1}
        means |= zip(values, rows.mean(dim=0).tolist(), strict=True)
        distance = means.pop("distance")
        for name, mean in means.items():
            logged[name][before:] = [mean] * len(rows)
        if mode == "train" and self._own_start is not None:
            if distance > 1e-3 and not self.state.global_step:
                from apo_trl.reference import check_start

                check_start(self, distance, self._own_start)
            self._own_start = None


class APOTrainer(_AnchoredTrainer):
    """`trl.DPOTrainer` for Anchored Preference Optimization.

    Takes the arguments and datasets of `DPOTrainer`: rows with `chosen`, `rejected` and mostly `prompt`, and with
    `chosen_wins` for the loss `apo_blend`. Without `args` it uses the defaults of `APOConfig`. Logs the metrics of
    `apo_trl.metrics` beside TRL's. Invalid settings and rows raise `InputError` before the model is loaded.

    Example::

        trainer = APOTrainer("Qwen/Qwen3-0.6B", args=APOConfig("out"), train_dataset=pairs)
        trainer.train()
    """


def _dpo_settings(args: DPOConfig) -> Any:
    """Return the settings that `DPOConfig` adds: TRL caches its filter of rows by all the settings it receives.

    With every setting, its result would differ for each process and each output folder.
    """
    names = DPOConfig.__dataclass_fields__.keys() - TrainingArguments.__dataclass_fields__
    return SimpleNamespace(**{name: getattr(args, name) for name in sorted(names)})
