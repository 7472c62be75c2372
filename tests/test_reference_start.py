"""The reference of a run without `ref_model` is the policy's own start, or the run stops and says why."""

import logging

import pytest
import torch
from conftest import curve, make_model, make_tokenizer
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)  # fmt: skip
from test_ranks import launch  # noqa: F401
from transformers import AutoModelForCausalLM

from apo_trl.errors import InputError
from apo_trl.models.loading import load_config

pytestmark = pytest.mark.filterwarnings(
    "ignore:`init_lora_weights` is '(eva|corda)'", "ignore:lora with eva initialization used with low_cpu_mem_usage"
)
LOSS = {"loss_type": "apo_zero", "beta": 1.0}


def lora(init=True, **settings):
    return LoraConfig(
        **({"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]} | settings), init_lora_weights=init
    )


def moved(model):
    """Add noise to all weights that train."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def base(model_dir):
    return AutoModelForCausalLM.from_pretrained(model_dir)


@pytest.fixture
def adapter(model_dir, tmp_path):
    moved(get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), lora())).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def start(train):
    """Train one step of a model in memory, and give its loss."""

    def run(**settings):
        return curve(train(processing_class=make_tokenizer(), steps=1, **LOSS | settings))[0]

    return run


class TestTheSame:
    @pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "mica", "eva"])
    def test_initialisations_that_keep_the_base(self, start, init):
        assert start(peft_config=lora(init)) == pytest.approx(1, abs=1e-6)

    @pytest.mark.parametrize(
        "peft_config",
        [
            lora(use_dora=True),
            lora(modules_to_save=["embed_tokens"]),
            IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
            VeraConfig(target_modules=["q_proj"]),
        ],
        ids=["dora", "modules_to_save", "ia3", "vera"],
    )
    def test_adapters_that_begin_without_effect(self, start, peft_config):
        assert start(peft_config=peft_config) == pytest.approx(1, abs=1e-6)

    @pytest.mark.parametrize("precomputed", [True, False], ids=["precomputed", "online"])
    @pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
    def test_an_adapter_trained_further(self, train, model_dir, adapter, packed, precomputed):
        """TRL keeps a copy of it as `ref`, and all ways to compute it agree."""

        def losses(packed, precomputed):
            model = PeftModel.from_pretrained(
                AutoModelForCausalLM.from_pretrained(model_dir), adapter, is_trainable=True
            )
            given = {"padding_free": packed, "precompute_ref_log_probs": precomputed, "learning_rate": 1e-2}
            trainer = train(model=model, processing_class=make_tokenizer(), **LOSS | given)
            assert trainer._packs is packed
            return curve(trainer)

        assert losses(packed, precomputed) == pytest.approx(losses(False, False), abs=1e-4)
        assert losses(packed, precomputed)[0] == pytest.approx(1, abs=1e-5)

    def test_another_batch_in_bfloat16_is_rounding(self, start, adapter, base):
        model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
        settings = {"bf16": True, "precompute_ref_log_probs": True, "precompute_ref_batch_size": 1}
        assert start(model=model, **settings) == pytest.approx(1, abs=0.1)


class TestStopped:
    @pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "PiSSA", "olora", "corda", "lora_ga"])
    def test_initialisations_that_change_the_base(self, train, init):
        """Before the model is loaded."""
        with pytest.raises(InputError, match=rf"^init_lora_weights: .*'{init}' changes the base.* pass ref_model\.$"):
            train(model="nowhere/model", peft_config=lora(init))

    def test_biases_of_the_base(self, train):
        """Without its adapter, the model would keep them, unless the reference was computed before."""
        with pytest.raises(InputError, match=r"^bias: bias='all' changes the base"):
            train(model="nowhere/model", peft_config=lora(bias="all"))
        train(precompute_ref_log_probs=True, peft_config=lora(bias="all"), steps=1)

    def test_a_wrapped_model_whose_base_was_changed(self, start, base):
        """TRL's copy of the adapter would change the base again, under log-ratios of 0."""
        with pytest.raises(InputError, match=r"^init_lora_weights: init_lora_weights='pissa' changes the base"):
            start(model=get_peft_model(base, lora("pissa")))

    def test_an_adapter_that_starts_at_random(self, start):
        with pytest.raises(InputError, match=r"^ref_model: not set, .* nats per token .*Set init_lora_weights=True"):
            start(peft_config=lora(False))

    def test_a_model_changed_in_memory(self, start, base, model_dir):
        """TRL loads the reference from the folder that the model came from."""
        with pytest.raises(
            InputError, match=rf"^ref_model: not set, .*TRL loads it from {model_dir}, .* Pass ref_model"
        ):
            start(model=moved(base))

    @pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
    def test_weights_changed_after_the_reference_was_computed(self, train, peft_config):
        trainer = train(precompute_ref_log_probs=True, peft_config=peft_config, run=False)
        moved(trainer.model)
        with pytest.raises(InputError, match=r"^ref_model: not set, "):
            trainer.train()

    def test_an_adapters_folder(self, train, adapter):
        remedy = r"is an adapter\. Merge it with `apo-trl merge`, or, to train it further, pass PeftModel\."
        with pytest.raises(InputError, match=rf"^model: {adapter} {remedy}"):
            train(model=str(adapter))
        with pytest.raises(InputError, match=rf"^model: {adapter} {remedy}"):
            train(model=str(adapter), peft_config=lora())
        with pytest.raises(InputError, match=rf"^model_name_or_path: {adapter} {remedy}"):
            load_config(str(adapter))

    def test_a_reference_with_an_adapter(self, train, base, adapter):
        for ref_model in (str(adapter), PeftModel.from_pretrained(base, adapter)):
            with pytest.raises(InputError, match=r"^ref_model: must be a loaded model without an adapter"):
                train(ref_model=ref_model)

    def test_an_adapter_that_transformers_loaded(self, start, adapter):
        with pytest.raises(InputError, match=r"^model: .* is an adapter"):
            start(model=AutoModelForCausalLM.from_pretrained(adapter))


class TestGoesOn:
    def log(self, caplog):
        return [record for record in caplog.records if "The policy starts" in record.message]

    @pytest.fixture(autouse=True)
    def capture(self, caplog):
        caplog.set_level(logging.INFO, "apo_trl.reference")

    @pytest.mark.parametrize("settings", [{}, {"peft_config": lora("pissa")}], ids=["full", "pissa"])
    def test_a_reference_of_ones_own(self, start, settings, caplog):
        assert abs(start(ref_model=make_model(seed=1), **settings) - 1) > 1e-3
        (record,) = self.log(caplog)
        assert record.levelname == "INFO"
        assert record.message.endswith("which is the given ref_model.")

    def test_an_equal_reference_of_ones_own(self, start, caplog):
        assert start(ref_model=make_model()) == 1
        assert not self.log(caplog)

    def test_dropout(self, start, model_dir, caplog):
        assert start(peft_config=lora(lora_dropout=0.5), disable_dropout=False) == pytest.approx(1, abs=1e-6)
        model = AutoModelForCausalLM.from_pretrained(model_dir, attention_dropout=0.5)
        assert start(model=model, disable_dropout=False) != 1
        assert all("dropout or noise" in record.message for record in self.log(caplog))

    @pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
    def test_a_prompt_has_no_start_without_effect(self, start, kind, caplog):
        assert start(peft_config=kind(task_type="CAUSAL_LM", num_virtual_tokens=2)) != 1
        (record,) = self.log(caplog)
        assert record.levelname == "WARNING"

    @pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
    def test_later_steps(self, train, peft_config, tmp_path):
        settings = {"peft_config": peft_config, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
        trainer = train(**LOSS | settings)
        whole = curve(trainer)
        resumed = train(run=False, **LOSS | settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
        assert curve(resumed)[2:] == pytest.approx(whole[2:], abs=1e-5)
        assert abs(whole[2] - 1) > 1e-3
        trainer.train()  # from step 0 again, with the weights of step 4


ONE_OF_TWO = """
trainer = APOTrainer(model, args=args, train_dataset=load("good"))
if args.process_index:  # the reference of this process alone is another
    compute = trainer.compute_ref_log_probs
    trainer.compute_ref_log_probs = lambda *given: tuple(logps + 1 for logps in compute(*given))
try:
    trainer.train()
except InputError as error:
    report(stopped=str(error))
"""


@pytest.mark.slow
def test_all_processes_stop(launch):  # noqa: F811
    first, second = launch("ddp", ONE_OF_TWO)
    assert first["stopped"] == second["stopped"]
    assert first["stopped"].startswith("ref_model: not set, so the policy should start")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("kind", ["ia3", "embeddings"])
def test_an_adapter_trained_further_is_held_to_all_of_its_start(kind, precompute, train, model_dir, tmp_path):
    """TRL copies only part of these adapters into `ref`: no parameter whose name ends in that of the adapter."""
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj"], feedforward_modules=[])
    if kind == "embeddings":
        config = LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"])
    first = train(peft_config=config, learning_rate=1e-1, steps=3)
    first.save_model(tmp_path / "first")
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    model = PeftModel.from_pretrained(base, tmp_path / "first", is_trainable=True)
    again = train(model=model, processing_class=first.processing_class, precompute_ref_log_probs=precompute)
    assert curve(again)[0] == pytest.approx(1.0, abs=1e-5)
    parameters = dict(again.model.named_parameters())
    started = dict(first.model.named_parameters())
    for name in filter(lambda name: name.endswith(".default"), started):
        assert torch.equal(parameters[name.removesuffix("default") + "ref"], started[name])


def test_tf32_is_known_through_both_interfaces(train):
    precision = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert curve(train(peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), steps=1))
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision


def test_a_model_without_a_folder_needs_a_reference(train):
    with pytest.raises(InputError, match="ref_model: required"):
        train(model=make_model(), processing_class=make_tokenizer(), run=False)
    assert curve(train(model=make_model(), ref_model=make_model(), processing_class=make_tokenizer(), steps=1)) == [1.0]
