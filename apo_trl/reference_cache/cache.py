"""`precompute_ref_log_probs`: the reference's log-probs, computed once for every pair and never served stale.

TRL stores one file per prepared dataset. A file here belongs to one reference, and a row in it to one pair: the row's
key is a hash of all that its two values are computed from, which is what the collator gives for that pair alone (the
tokens left after truncation, and where the completion starts), `ld_alpha`, and the fingerprint of the reference (its
weights, its configuration and the precision of its forward). So a row is found again in any order, subset or mixture
and under any learning rate, loss or output folder, and is not found when something changed that enters it. Rows are
written after every forward, so a killed run goes on where it stopped; a new reference is a new file.

Within a run the main process alone reads and writes, and tells the others, so that all take the same branches and the
folder need not be shared between machines. Between runs SQLite's locks keep writers apart; it uses a rollback journal
and no write-ahead log, because the latter cannot be used on network file systems.

Left out on purpose: values per token. They would serve every `ld_alpha` from one forward, for a thousandfold the space.
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

from apo_trl.errors import InputError
from apo_trl.reference_cache.fingerprint import current_fingerprint, update_digest
from apo_trl.reference_cache.store import Logps, ReferenceStore, unusable

__all__ = ["add_reference_logps", "check_cache_dir", "pair_key"]

logger = get_logger(__name__)

_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
_NOT_SCORED = {*_COLUMNS, "chosen_wins", "packed_batch"}


def add_reference_logps(trainer: Any, dataset: Dataset, name: str, batch_size: int) -> Dataset:
    """Give the dataset with the reference's log-probs of its pairs, computing those that no run has computed before.

    Adds the columns `ref_chosen_logps` and `ref_rejected_logps`, in nats, which the collator of TRL carries into the
    batch. `name` is what the progress bar calls the dataset, `batch_size` the pairs of a forward in one process. All
    processes have to call it. Raises InputError where the cache cannot be opened, or where processes hold different
    weights.
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
        share = f"{found} of {len(keys)} pairs from the cache"
        bar = tqdm(
            total=len(keys),
            initial=found,
            desc=f"Reference log-probs of the {name} dataset, {share}",
            disable=quiet,
        )
        with bar:
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
    """Give the key of every row; each process makes those of its share."""
    process, processes = trainer.accelerator.process_index, trainer.accelerator.num_processes
    first, last = (len(rows) * at // processes for at in (process, process + 1))
    share = tqdm(rows.select(range(first, last)), desc="Looking up reference log-probs", disable=quiet)
    made = [pair_key(fingerprint, trainer.data_collator([row]), trainer.ld_alpha) for row in share]
    keys: list[bytes] = gather_object(made)
    return keys


def pair_key(fingerprint: str | None, batch: Mapping[str, Any], ld_alpha: float | None) -> bytes:
    """Hash all that determines the reference's log-probs of the one pair in a collated batch.

    Padding does not count, so that `pad_to_multiple_of` changes no key. The two completions have one key, as with
    `ld_alpha` the sum over one depends on the length of the other.
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
    """Compute the log-probs of the missing rows, longest first: for every batch of all processes, those of its rows.

    Every process does the same number of forwards, none of them empty, since sharded weights are gathered in each.
    """
    if not missing:
        return
    accelerator = trainer.accelerator
    lengths = {
        row: sum(len(value) for value in rows[row].values() if isinstance(value, list)) for row in missing.values()
    }
    order = sorted(lengths, key=lambda row: -lengths[row])
    whole = batch_size * accelerator.num_processes
    forwards = -(-len(order) // whole)
    if trainer.is_deepspeed_enabled:  # after a single forward of ZeRO-3's engine, that of training fails
        forwards = max(2, forwards)
    if accelerator.num_processes > 1 or trainer.is_deepspeed_enabled:
        order += [order[at % len(order)] for at in range(whole * forwards - len(order))]

    def collate(chosen: Sequence[int]) -> dict[str, Any]:
        return {**trainer.data_collator([rows[row] for row in chosen]), "row": torch.tensor(chosen)}

    loader: DataLoader[Any] = DataLoader(order, batch_size, collate_fn=collate)  # type: ignore[arg-type] # a list will do
    model = _reference(trainer)
    training = model.training
    model.eval()  # what is kept must not have dropout in it
    try:
        for batch in accelerator.prepare(loader):
            numbers = batch.pop("row")
            sides = trainer.compute_ref_log_probs(model, batch)
            gathered = accelerator.gather((numbers, *(side.float() for side in sides)))
            yield {
                row: (first, second) for row, first, second in zip(*(part.tolist() for part in gathered), strict=True)
            }
    finally:
        model.train(training)


def _reference(trainer: Any) -> Any:
    """Give what to forward through, as TRL has it: with DeepSpeed, the policy needs an engine before training."""
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
) -> tuple["ReferenceStore | None", dict[bytes, Logps]]:
    """Open the store in the main process, and give all processes what it has of the keys, or its error."""
    store = None
    told: list[Any] = [None]
    if trainer.accelerator.is_main_process and fingerprint is not None:
        try:
            store = ReferenceStore(_cache_dir(trainer.args) / f"reference-{fingerprint[:32]}.sqlite")
            told = [store.read(keys)]
        except InputError as error:
            told = [error]
    broadcast_object_list(told)
    if isinstance(told[0], InputError):
        raise told[0]
    return store, told[0] or {}


def check_cache_dir(config: DPOConfig) -> None:
    """Raise InputError where reference log-probs are to be stored in a folder that cannot be written."""
    if not config.precompute_ref_log_probs:
        if _asked(config):
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
    return Path(_asked(config) or Path(datasets.config.HF_DATASETS_CACHE) / "apo-trl").expanduser()


def _asked(config: DPOConfig) -> str | None:
    from apo_trl.config import APOConfig

    return config.ref_cache_dir if isinstance(config, APOConfig) else None
