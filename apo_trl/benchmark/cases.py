"""What `apo-trl bench` measures: models with random weights, and batches of random pairs or of the pairs of a file."""

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head

from apo_trl.io.readers import read_pairs
from apo_trl.io.tokenization import encode_pair
from apo_trl.models.loading import load_tokenizer
from apo_trl.models.packaged import smollm2

__all__ = ["CASES", "LARGE", "NETWORKS", "WIDE", "Case", "build_model", "file_batches", "load_shape", "random_batches"]


class Case(NamedTuple):
    """Random pairs: each two of the answers to a prompt are one."""

    prompt: int  # mean tokens
    completion: int
    shared: float = 0.0  # share of a completion that all completions of a prompt begin with
    answers: int = 2
    prompts: int | None = None  # in a batch; by default `--batch_size`
    batches: int = 3
    network: str = ""  # in `NETWORKS`, if not `--model`


CASES = {
    "100 / 150 / 150": Case(100, 150),
    "170 / 250 / 250": Case(170, 250),
    "500 / 120 / 120": Case(500, 120),
    "170 / 250 / 250, 30 % shared": Case(170, 250, 0.3),
    "3 pairs of 3 ranked answers, 170 / 150": Case(170, 150, answers=3, prompts=1),
}
# A row for CPUs: wide layers, as models for GPUs have them.
WIDE = {"one layer of 1.7B, bf16, 8 pairs, 170 / 250 / 250": Case(170, 250, prompts=8, batches=1, network="one layer")}
# Rows for GPUs; `--checkpointing` for those of 8B.
LARGE = {
    "1.7B, 16 pairs, 170 / 250 / 250": Case(170, 250, prompts=16, batches=2, network="1.7B"),
    "8B, 8 pairs, 1000 / 500 / 500": Case(1000, 500, prompts=8, batches=1, network="8B"),
    "8B, 4 ranked answers to 4 prompts, 2000 / 500": Case(2000, 500, answers=4, prompts=4, batches=1, network="8B"),
}

# Public shapes of models; the rest are the defaults of transformers.
_HEADS = {"num_attention_heads": 16, "num_key_value_heads": 8}
_QWEN3 = {"model_type": "qwen3", "hidden_size": 2048, "intermediate_size": 6144, "tie_word_embeddings": True} | _HEADS
NETWORKS: dict[str, dict[str, Any]] = {
    "1.7B": _QWEN3 | {"num_hidden_layers": 28},
    "one layer": _QWEN3 | {"num_hidden_layers": 1, "vocab_size": 1000},  # a large vocabulary would hide the layer
    "8B": {"model_type": "llama", "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256},
}


def load_shape(model: str | None = None, network: str = "") -> tuple[Any, Any]:
    """Return configuration and tokenizer of a model, by default SmolLM2-135M, or the configuration of a network."""
    if network:
        return AutoConfig.for_model(**NETWORKS[network]), None
    tokenizer = load_tokenizer(path := model or str(smollm2()))
    return AutoConfig.from_pretrained(path), tokenizer


def build_model(
    config: Any, layers: int | None, dtype: str, device: str, checkpointing: bool = False, attention: str = "sdpa"
) -> Any:
    """Build a model with random weights and TRL's fused head, of all layers or of the first `layers`."""
    config.num_hidden_layers = layers or config.num_hidden_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    torch.manual_seed(0)
    with torch.device(device):
        network = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation=attention)
    network.train()
    if checkpointing:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    add_fused_lm_head(network)
    return network


def random_batches(case: Case, vocabulary: int, batch_size: int = 2) -> list[dict[str, Tensor]]:
    """Draw the batches of a case; every call draws the same."""
    generator = torch.Generator().manual_seed(0)

    def tokens(mean: float) -> list[int]:
        low, high = round(0.7 * round(mean)), round(1.3 * round(mean)) + 1
        length = int(torch.randint(low, high, (), generator=generator))
        return list(torch.randint(0, vocabulary, (length,), generator=generator).tolist())

    batches = []
    for _ in range(case.batches):
        pairs = []
        for _ in range(case.prompts or batch_size):
            prompt, start = tokens(case.prompt), tokens(case.completion * case.shared)
            answers = [start + tokens(case.completion * (1 - case.shared)) for _ in range(case.answers)]
            pairs += [(prompt, *pair) for pair in itertools.combinations(answers, 2)]
        batches.append(_collate(pairs))
    return batches


def file_batches(file: str, tokenizer: Any, batch_size: int) -> list[dict[str, Tensor]]:
    """Read the first six batches of the pairs of a file."""
    pairs = (encode_pair(tokenizer, row) for row in read_pairs(file))
    return [_collate(batch) for _ in range(6) if (batch := list(itertools.islice(pairs, batch_size)))]


def _collate(pairs: Iterable[tuple[list[int], ...]]) -> dict[str, Tensor]:
    columns, collate = ("prompt_ids", "chosen_ids", "rejected_ids"), DataCollatorForPreference(pad_token_id=0)
    batch: dict[str, Tensor] = collate([dict(zip(columns, pair, strict=True)) for pair in pairs])
    return batch | {"labels": batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)}
