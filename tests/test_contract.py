"""Every name of TRL that we lean on, with the signature we expect: a TRL that moves one fails here, by name."""

import importlib.util
import inspect
import math
import re
import sys

import pytest
import torch
from transformers import TrainingArguments
from trl import DPOConfig, DPOTrainer
from trl.data_utils import _tokenize
from trl.trainer.utils import FusedCausalLMOutput, get_config_model_id

from apo_trl import config
from apo_trl.config import ADDED_LOSSES, SMOOTHED_LOSSES, TRL_LOSSES
from apo_trl.losses import LOSSES, PER_TOKEN_LOSSES

METHODS = {
    "_compute_loss": ["self", "model", "inputs", "return_outputs"],
    "compute_ref_log_probs": ["self", "model", "inputs"],
    "_prepare_dataset": ["self", "dataset", "processing_class", "args", "dataset_name"],
    "_set_signature_columns_if_needed": ["self"],
    "_precompute_ref_logps": ["self", "dataset", "name", "batch_size"],
    "_get_train_sampler": ["self", "train_dataset"],
    "get_train_dataloader": ["self"],
    "evaluate": ["self", "eval_dataset", "ignore_keys", "metric_key_prefix"],
    "evaluation_loop": [
        "self",
        "dataloader",
        "description",
        "prediction_loss_only",
        "ignore_keys",
        "metric_key_prefix",
    ],
    "create_model_card": ["self", "model_name", "dataset_name", "tags"],
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_that_are_overridden_or_called(name):
    assert list(inspect.signature(getattr(DPOTrainer, name)).parameters) == METHODS[name]


def test_functions_that_are_called():
    assert list(inspect.signature(_tokenize).parameters) == ["processing_class", "input", "apply_chat_template_kwargs"]
    assert list(inspect.signature(get_config_model_id).parameters) == ["config"]


def test_constructor_arguments_that_are_read():
    parameters = list(inspect.signature(DPOTrainer.__init__).parameters)
    assert parameters[:4] == ["self", "model", "ref_model", "args"]
    assert {"train_dataset", "eval_dataset"} <= set(parameters)


@pytest.mark.parametrize("name", ["_name", "_paper", "_tag_names"])
def test_class_attributes_that_the_model_card_is_made_from(name):
    assert name in vars(DPOTrainer)
    assert name in inspect.getsource(DPOTrainer.create_model_card)


def test_config_fields_that_are_read():
    names = {"loss_type", "loss_weights", "f_divergence_type", "use_weighting", "label_smoothing", "max_length"}
    names |= {"truncation_mode", "precompute_ref_log_probs", "ld_alpha", "beta"}
    assert names <= set(DPOConfig.__dataclass_fields__)


def test_attributes_of_a_trainer(train):
    trainer = train(DPOTrainer, DPOConfig, run=False)
    expected = {
        "loss_types": list,
        "loss_weights": list,
        "beta": float,
        "ld_alpha": type(None),
        "use_weighting": bool,
        "precompute_ref_logps": bool,
        "aux_loss_enabled": bool,
        "_metrics": dict,
        "data_collator": object,
        "ref_model": object,
        "_tokenizer": object,
    }
    for name, kind in expected.items():
        assert isinstance(getattr(trainer, name), kind), name
    assert set(trainer._metrics) == {"train", "eval"}


def test_the_layout_of_a_batch(train):
    trainer = train(DPOTrainer, DPOConfig, run=False)
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "completion_mask"}
    assert batch["input_ids"].shape[0] == 8  # four chosen, then four rejected
    with torch.no_grad():
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        output = trainer.model(**batch | {"labels": labels, "completion_mask": None}, fused_lm_head=True)
    assert isinstance(output, FusedCausalLMOutput)
    assert output.log_probs.shape == (8, batch["input_ids"].shape[1] - 1)
    assert (output.log_probs[batch["completion_mask"][:, 1:] == 0] == 0).all()


def test_the_losses_that_the_host_documents_are_those_that_it_computes(train):
    trainer = train(DPOTrainer, DPOConfig, run=False)
    trainer.loss_types = ["no such loss"]
    with pytest.raises(ValueError, match="Unknown loss type") as refusal:
        trainer.train()
    assert set(re.findall(r"'(\w+)'", str(refusal.value))) == set(TRL_LOSSES)
    assert len(TRL_LOSSES) >= 15
    assert {"apo_zero", "apo_down"} <= set(TRL_LOSSES)
    assert set(ADDED_LOSSES) == LOSSES.keys() - set(TRL_LOSSES) >= {"apo_zero_norm", "apo_down_norm", "apo_blend"}


@pytest.mark.parametrize("help_text", ["Which loss.", "One of 'sigmoid' and 'a_loss_of_next_year'."])
def test_a_reworded_help_text_refuses_no_loss(help_text, monkeypatch):
    """And a loss that only a newer TRL lists is accepted."""
    monkeypatch.setattr(DPOConfig.__dataclass_fields__["loss_type"], "metadata", {"help": help_text})
    specification = importlib.util.spec_from_file_location("config_anew", config.__file__)
    anew = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "config_anew", anew)
    specification.loader.exec_module(anew)
    names = [*anew.TRL_LOSSES, *anew.ADDED_LOSSES]
    assert names == list(dict.fromkeys([*TRL_LOSSES, *re.findall(r"'(\w+)'", help_text), *ADDED_LOSSES]))


def test_what_is_said_of_trls_losses():
    source = inspect.getsource(DPOTrainer._compute_loss)
    bodies = dict(
        re.findall(r'loss_type == "(\w+)":\n(.*?)(?=\n            elif|\n            else)', source, re.DOTALL)
    )
    assert set(bodies) == set(TRL_LOSSES)
    assert {name for name, body in bodies.items() if "self.label_smoothing" in body} == SMOOTHED_LOSSES
    assert {name for name, body in bodies.items() if "_mask.sum(dim=1)" in body} == PER_TOKEN_LOSSES & set(TRL_LOSSES)


def test_a_term_of_a_mixture_is_multiplied_by_its_weight(train):
    """By which it is read without computing it again."""
    trainer = train(loss_type=["apo_zero", "sigmoid"], loss_weights=[0.25, 0.5], steps=1)
    assert [weight.weight for weight in trainer.loss_weights] == [0.25, 0.5]
    assert [weight.term.item() for weight in trainer.loss_weights] == pytest.approx([1.0, math.log(2)])


def test_preparing_a_dataset_reads_settings_of_dpo_alone():
    """TRL caches what it makes of a dataset by all the settings that it is handed: ours hands over those of DPO."""
    read = set(re.findall(r"\bargs\.(\w+)", inspect.getsource(DPOTrainer._prepare_dataset)))
    assert read
    assert read <= set(DPOConfig.__dataclass_fields__) - set(TrainingArguments.__dataclass_fields__)


def test_what_the_flash_function_of_transformers_takes():
    from transformers import modeling_flash_attention_utils as utils
    from transformers.integrations.flash_attention import flash_attention_forward

    assert list(inspect.signature(flash_attention_forward).parameters)[:5] == [
        "module", "query", "key", "value", "attention_mask",
    ]  # fmt: skip
    offsets = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
    assert offsets <= set(inspect.signature(utils._flash_attention_forward).parameters)
