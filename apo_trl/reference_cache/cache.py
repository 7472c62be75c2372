"""`precompute_ref_log_probs`: the reference's log-probs, computed once per pair and never stale.

A row's key hashes all that its two values depend on: the collated pair, `ld_alpha` and the fingerprint of the
reference. So any order, subset or mixture finds it, under any learning rate, loss or output folder. Rows are written
after every forward. Within a run only the main process reads and writes.
"""

import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object, tqdm
from datasets import Dataset, Features, Value, concatenate_datasets
from torch import Tensor
from torch.utils.data import DataLoader
from trl import DPOConfig

from apo_trl.config import APOConfig
from apo_trl.errors import InputError
from apo_trl.reference_cache.fingerprint import current_fingerprint, update_digest
from apo_trl.reference_cache.store import Logps, ReferenceStore, unusable

__all__ = ["add_reference_logps", "check_cache_dir", "pair_key"]

logger = get_logger(__name__)

_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
_NOT_SCORED = {*_COLUMNS, "chosen_wins", "packed_batch"}


def add_reference_logps(trainer: Any, dataset: Dataset, name: str, batch_size: int) -> Dataset:
    """Add the columns `ref_chosen_logps` and `ref_rejected_logps`, in nats, to a tokenized dataset.

    Only log-probs that no run has computed before are computed, in batches of `batch_size` pairs per process. All
    processes have to call it. Raises InputError if the cache cannot be opened, or processes hold different weights.
    """
    accelerator = trainer.accelerator
    fingerprint = current_fingerprint(trainer)
    dataset = dataset.remove_columns([column for column in _COLUMNS if column in dataset.column_names])
    rows = trainer._remove_unused_columns(dataset, "reference")
    quiet = trainer.args.disable_tqdm or bool(os.environ.get("TQDM_DISABLE"))
    keys = _keys(trainer, rows, fingerprint, quiet)
    store, logps = _open(trainer, fingerprint, keys)
    with nullcontext() if store is None else closing(store):
        counts = Counter(keys)
        missing = {key: row for row, key in enumerate(keys) if key not in logps}
        found = len(keys) - sum(counts[key] for key in missing)
        desc = f"Reference log-probs of the {name} dataset, {found} of {len(keys)} pairs from the cache"
        logger.info(f"{desc}.")  # the bar appears only if it takes seconds
        with tqdm(total=len(keys), initial=found, desc=desc, disable=quiet) as bar:
            for computed in _computed(trainer, rows, missing, batch_size):
                new = {keys[row]: values for row, values in computed.items()}
                bar.update(sum(counts[key] for key in new if key not in logps))
                logps |= new
                if store is not None:
                    store.write(new)
    accelerator.wait_for_everyone()
    columns = {column: [logps[key][side] for key in keys] for side, column in enumerate(_COLUMNS)}
    added = Dataset.from_dict(columns, Features(dict.fromkeys(_COLUMNS, Value("float32"))))
    return concatenate_datasets([dataset, added], axis=1)


def _keys(trainer: Any, rows: Dataset, fingerprint: str | None, quiet: bool) -> list[bytes]:
    """Compute the key of every row; each process computes those of its share."""
    process, processes = trainer.accelerator.process_index, trainer.accelerator.num_processes
    first, last = (len(rows) * index // processes for index in (process, process + 1))
    share = tqdm(rows.select(range(first, last)), desc="Looking up reference log-probs", disable=quiet)
    keys: list[bytes] = gather_object(
        [pair_key(fingerprint, trainer.data_collator([row]), trainer.ld_alpha) for row in share]
    )
    return keys


def pair_key(fingerprint: str | None, batch: Mapping[str, Any], ld_alpha: float | None) -> bytes:
    """Hash all that determines the reference's log-probs of the one pair in a collated batch, except padding.

    Both completions share a key: with `ld_alpha`, the sum over one depends on the length of the other.
    """
    mask = batch.get("attention_mask")
    digest = hashlib.sha256(f"{fingerprint} {ld_alpha}".encode())
    for name in sorted(set(batch) - _NOT_SCORED):
        value = batch[name]
        parts = [value]
        if isinstance(value, Tensor) and mask is not None and value.shape[:2] == mask.shape:
            parts = [row[kept] for row, kept in zip(value, mask.bool(), strict=True)]
        digest.update(name.encode())
        for part in parts:
            update_digest(digest, part)
    return digest.digest()


def _computed(trainer: Any, rows: Dataset, missing: Mapping[bytes, int], batch_size: int) -> Iterator[dict[int, Logps]]:
    """Compute the log-probs of the missing rows, longest first, and yield them for each batch of all processes.

    Every process runs the same number of forwards, with at least one row each, since sharded weights are gathered.
    """
    if not missing:
        return
    accelerator = trainer.accelerator

    def length(row: int) -> int:
        return sum(len(value) for value in rows[row].values() if isinstance(value, list))

    order = sorted(missing.values(), key=length, reverse=True)
    whole = batch_size * accelerator.num_processes
    forwards = -(-len(order) // whole)
    if trainer.is_deepspeed_enabled:  # after a single forward of ZeRO-3's engine, that of training fails
        forwards = max(2, forwards)
    if accelerator.num_processes > 1 or trainer.is_deepspeed_enabled:
        order += [order[index % len(order)] for index in range(whole * forwards - len(order))]

    def collate(chosen: Sequence[int]) -> dict[str, Any]:
        return {**trainer.data_collator([rows[row] for row in chosen]), "row": torch.tensor(chosen)}

    loader: DataLoader[Any] = DataLoader(order, batch_size, collate_fn=collate)  # type: ignore[arg-type] # a list will do
    model = _reference(trainer)
    training = model.training
    model.eval()  # no dropout in cached values
    try:
        for batch in accelerator.prepare(loader):
            numbers = batch.pop("row")
            sides = trainer.compute_ref_log_probs(model, batch)
            gathered = accelerator.gather((numbers, *(side.float() for side in sides)))
            results = zip(*(part.tolist() for part in gathered), strict=True)
            yield {row: (chosen, rejected) for row, chosen, rejected in results}
    finally:
        model.train(training)


def _reference(trainer: Any) -> Any:
    """Return the model to forward through, as TRL does: with DeepSpeed, the policy needs an engine before training."""
    if trainer.ref_model is not None:
        return trainer.ref_model
    if trainer.is_deepspeed_enabled:
        if trainer._precompute_engine is None:
            from trl.models import prepare_deepspeed

            trainer._precompute_engine = prepare_deepspeed(trainer.model, trainer.accelerator)
        return trainer._precompute_engine
    return trainer.model


def _open(
    trainer: Any, fingerprint: str | None, keys: Sequence[bytes]
) -> tuple[ReferenceStore | None, dict[bytes, Logps]]:
    """Open the store in the main process, and send all processes its values of the keys, or its error."""
    store, message = None, list[Any]([None])
    if trainer.accelerator.is_main_process and fingerprint is not None:
        try:
            store = ReferenceStore(_cache_dir(trainer.args) / f"reference-{fingerprint[:32]}.sqlite")
            message = [store.read(keys)]
        except InputError as error:
            message = [error]
    broadcast_object_list(message)
    if isinstance(message[0], InputError):
        raise message[0]
    return store, message[0] or {}


def check_cache_dir(config: DPOConfig) -> None:
    """Raise InputError if the folder of the cache cannot be written; warn if it has no effect."""
    if not config.precompute_ref_log_probs:
        logger.warning("ref_cache_dir has no effect without precompute_ref_log_probs=True.")
        return
    folder = _cache_dir(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise unusable(folder, error) from None


def _cache_dir(config: DPOConfig) -> Path:
    configured = config.ref_cache_dir if isinstance(config, APOConfig) else None
    return Path(configured or Path(datasets.config.HF_DATASETS_CACHE) / "apo-trl").expanduser()
