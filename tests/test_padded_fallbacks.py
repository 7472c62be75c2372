"""Settings and models around `padding_free`: each works, with the same losses, or falls back with one warning."""

import copy
import importlib.machinery
import sys
import types

import pytest
import torch
import transformers
from conftest import curve, make_model, make_tokenizer
from peft import LoraConfig
from test_prefix_sharing import MODELS, OUTPUTS, SHAPE, SLIDING, batch, both, furthest, make, shared
from torch import nn
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import add_fused_lm_head

from apo_trl.prefix_sharing import TESTED, padded_reason

WARNING = "padding_free has no effect: "


def reasons(caplog):
    return [record.message.removeprefix(WARNING) for record in caplog.records if WARNING in record.message]


def same(ours, theirs, tolerance=1e-5):
    for key in ("loss", "grad_norm", "rewards/margins"):
        assert len(curve(ours, key)) == len(curve(theirs, key)) > 0
        assert curve(ours, key) == pytest.approx(curve(theirs, key), rel=tolerance, abs=tolerance), key


def falls_back(train, caplog, reason, **settings):
    """Train with and without `padding_free`: the same to the last bit, and one warning that says why."""
    on = train(padding_free=True, steps=2, **settings)
    (message,) = reasons(caplog)
    assert message == f"{reason}. Falling back to TRL's padded batches."
    off = train(padding_free=False, steps=2, **settings)
    same(on, off, 0)
    assert curve(on, "apo/tokens_saved") == []
    assert len(reasons(caplog)) == 1
    return on


# What works.


# Of torch to itself, when it compiles TRL's fused head:
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.slow
def test_torch_compile(train, caplog):
    """With every row in one batch and one layer, since each new shape and each layer is compiled again."""
    caplog.set_level("WARNING")

    def run(*classes, **settings):
        model, reference = make_model(num_hidden_layers=1), make_model(num_hidden_layers=1)
        return train(
            *classes, model=model, ref_model=reference, processing_class=make_tokenizer(), loss_type="sigmoid",
            steps=2, per_device_train_batch_size=8, **settings,
        )  # fmt: skip

    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    plain, stock, ours = run(), run(DPOTrainer, DPOConfig, **compiled), run(padding_free=True, **compiled)
    same(stock, plain)
    same(ours, plain)
    assert isinstance(ours.model_wrapped, torch._dynamo.OptimizedModule)
    assert reasons(caplog) == []
    assert min(curve(ours, "apo/tokens_saved")) > 1.2


def test_activations_that_leave_the_device():
    """As `activation_offloading` does it, which TRL allows with an accelerator alone: by hooks on saved tensors."""
    plain, _, _ = both(make(MODELS["llama"]()), batch(shared()), weights := torch.randn(6, 22))
    moved = []

    def away(tensor):
        moved.append(tensor.numel())
        return tensor.clone()

    for hooks in (
        lambda: torch.autograd.graph.save_on_cpu(pin_memory=False),
        lambda: torch.autograd.graph.saved_tensors_hooks(away, lambda tensor: tensor),
    ):
        model = make(MODELS["llama"]())
        with hooks():
            _, ours, sharing = both(model, batch(shared()), weights)
        assert sharing.reason == ""
        assert max(furthest(plain, ours)) < 1e-5
    assert len(moved) > 20


@pytest.fixture
def liger(monkeypatch):
    """A stand-in for liger-kernel: it puts a norm of its own into each module, as the real one does."""
    seen = []

    def norm(self, hidden):
        seen.append(hidden.shape[-2])
        wide = hidden.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    def apply(model, fused_linear_cross_entropy=True, **_):
        assert not fused_linear_cross_entropy
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = types.MethodType(norm, module)

    package, module = types.ModuleType("liger_kernel"), types.ModuleType("liger_kernel.transformers")
    module._apply_liger_kernel_to_instance = apply
    package.transformers = module
    for each in (package, module):
        each.__spec__ = importlib.machinery.ModuleSpec(each.__name__, None)
        monkeypatch.setitem(sys.modules, each.__name__, each)
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: True)
    return seen


@pytest.mark.filterwarnings("ignore:`use_liger_kernel=True` is deprecated:FutureWarning")  # still served by TRL
def test_liger_kernels(train, liger, caplog):
    ours = train(padding_free=True, use_liger_kernel=True, steps=3)
    lengths = set(liger)
    same(ours, train(padding_free=False, steps=3))
    assert reasons(caplog) == []
    assert min(curve(ours, "apo/tokens_saved")) > 1.2
    # The norms of liger saw the packed sequences: all tokens of a batch in one row.
    liger.clear()
    train(padding_free=False, use_liger_kernel=True, steps=3)
    assert min(lengths) > 2 * max(liger)


def test_policy_and_reference_agree_to_the_last_bit_before_the_first_step(train, caplog):
    def mixture():
        torch.manual_seed(0)
        return transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.0)
        )

    policy = mixture()
    settings = {"steps": 2, "processing_class": make_tokenizer(), "router_aux_loss_coef": 0.0}
    on = train(model=policy, ref_model=copy.deepcopy(policy), padding_free=True, **settings)
    assert reasons(caplog) == []
    assert min(curve(on, "apo/tokens_saved")) > 1.2
    for key in ("rewards/chosen", "rewards/rejected", "apo/chosen_up"):
        assert curve(on, key)[0] == 0
    policy = mixture()
    same(on, train(model=policy, ref_model=copy.deepcopy(policy), padding_free=False, **settings))


# What falls back.


def test_a_mixture_of_experts_with_its_auxiliary_loss(train, caplog):
    def mixture():
        torch.manual_seed(0)
        return transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.5)
        )

    runs = []
    for free in (True, False):
        policy = mixture()
        runs.append(
            train(
                model=policy, ref_model=copy.deepcopy(policy), padding_free=free, steps=2,
                processing_class=make_tokenizer(),
            )
        )  # fmt: skip
    on, off = runs
    same(on, off, 0)
    assert curve(on, "aux_loss") == curve(off, "aux_loss") != []
    # Policy and reference take the same path, so they agree to the last bit where they are the same model.
    for key in ("rewards/chosen", "rewards/rejected", "apo/chosen_up"):
        assert curve(on, key)[0] == 0
    (message,) = reasons(caplog)
    assert message.startswith("the router's auxiliary loss needs the padded batch.")


def test_neftune(train, caplog):
    falls_back(train, caplog, "neftune_noise_alpha scales its noise by the padded length", neftune_noise_alpha=5.0)


def gpt2():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=260, n_embd=32, n_layer=2, n_head=4, n_positions=512, resid_pdrop=0.1, embd_pdrop=0,
            attn_pdrop=0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


DROPOUT = {
    "attention_dropout": lambda: {"model": make_model(attention_dropout=0.1)},
    "lora_dropout": lambda: {
        "model": make_model(),
        "peft_config": LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1),
    },
    "dropout, resid_dropout": lambda: {"model": gpt2()},
}


@pytest.mark.parametrize("names", DROPOUT)
def test_dropout(train, caplog, names):
    def settings():
        made = DROPOUT[names]()
        if "peft_config" not in made:
            made["ref_model"] = copy.deepcopy(made["model"])
        return {**made, "disable_dropout": False, "processing_class": make_tokenizer(), "steps": 2}

    on = train(padding_free=True, **settings())
    (message,) = reasons(caplog)
    assert message.startswith(f"dropout is on ({names}) and its noise depends on the layout. Set")
    same(on, train(padding_free=False, **settings()), 0)
    assert curve(on, "apo/tokens_saved") == []


@pytest.mark.parametrize("names", DROPOUT)
def test_dropout_that_is_disabled_as_it_is_by_default(train, caplog, names):
    made = DROPOUT[names]()
    if "peft_config" not in made:
        made["ref_model"] = copy.deepcopy(made["model"])
    on = train(padding_free=True, processing_class=make_tokenizer(), steps=1, **made)
    # TRL disables modules; the probability that an attention layer keeps stays, and so does the fallback.
    stays = names == "attention_dropout"
    assert len(reasons(caplog)) == stays
    assert (curve(on, "apo/tokens_saved") == []) == stays


@pytest.mark.parametrize(
    ("size", "kind"), [("tp_size", "tensor"), ("cp_size", "context"), ("sp_size", "sequence")], ids=str
)
def test_parallelism_within_a_row(train, monkeypatch, size, kind):
    from accelerate import Accelerator, ParallelismConfig

    trainer = train(padding_free=True, run=False)
    assert padded_reason(trainer) == ""
    config = ParallelismConfig()
    assert getattr(config, size) == 1
    monkeypatch.setattr(Accelerator, "parallelism_config", config)
    assert padded_reason(trainer) == ""
    monkeypatch.setattr(config, size, 2)
    assert padded_reason(trainer) == f"{kind} parallelism splits the padded batch"


# Models whose attention is another one than the layout tells it.


class OddConfig(transformers.LlamaConfig):
    model_type = "odd"


def by_hand(attention, hidden_states, position_embeddings, attention_mask=None, **kwargs):
    """Causal attention as old models write it: whatever else they are given is swallowed."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    shape = (*hidden_states.shape[:-1], -1, attention.head_dim)
    query, key, value = (
        projection(hidden_states).view(shape).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    output = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return attention.o_proj(output.transpose(1, 2).flatten(2)), None


class OddForCausalLM(transformers.LlamaForCausalLM):
    """Llama of which some layers attend by hand."""

    config_class = OddConfig

    def __init__(self, config):
        super().__init__(config)
        for number in config.odd_layers:
            attention = self.model.layers[number].self_attn
            attention.forward = types.MethodType(by_hand, attention)


def odd(layers, config_class=OddConfig):
    torch.manual_seed(0)
    model = OddForCausalLM(config_class(**SHAPE, odd_layers=layers)).eval()
    add_fused_lm_head(model, outputs=OUTPUTS)
    return model


@pytest.mark.parametrize("config_class", [OddConfig, transformers.LlamaConfig], ids=["own name", "a tested name"])
@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ((0, 1), "the model's attention is not called through transformers' AttentionInterface"),
        ((1,), "log-probs of the first batch differ from the padded batch's by up to"),
    ],
    ids=str,
)
def test_attention_that_never_sees_the_layout(layers, reason, config_class, caplog):
    assert "odd" not in TESTED
    padded, ours, sharing = both(odd(layers, config_class), batch(shared()))
    assert sharing.reason.startswith(reason)
    assert furthest(padded, ours) == (0, 0)
    assert len(reasons(caplog)) == 1


def test_attention_that_is_replaced_in_a_model_of_a_tested_architecture(caplog):
    model = make_model()
    add_fused_lm_head(model, outputs=OUTPUTS)
    for layer in model.model.layers:
        layer.self_attn.forward = types.MethodType(by_hand, layer.self_attn)
    padded, ours, sharing = both(model, batch(shared()))
    assert sharing.reason == "the model's attention is not called through transformers' AttentionInterface"
    assert furthest(padded, ours) == (0, 0)
    assert len(reasons(caplog)) == 1


def test_the_same_class_without_such_layers_is_packed(caplog):
    padded, ours, sharing = both(odd(()), batch(shared()))
    assert sharing.reason == ""
    assert max(furthest(padded, ours)) < 1e-5


UNKNOWN = {
    "bloom": lambda: transformers.BloomConfig(vocab_size=260, hidden_size=32, n_layer=2, n_head=4),
    "falcon": lambda: transformers.FalconConfig(
        vocab_size=260, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    ),
    # Its mask depends on the values, though not before the first step.
    "doge": lambda: transformers.DogeConfig(**SHAPE),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **SHAPE, **SLIDING, head_dim=8, num_local_experts=4, num_experts_per_tok=2
    ),
    # A window wider than the first batch, which the attention functions are not told.
    "phimoe": lambda: transformers.PhimoeConfig(
        **SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=100
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_architectures_that_cannot(name, caplog):
    padded, ours, sharing = both(make(UNKNOWN[name]()), batch(shared()))
    assert name not in TESTED
    assert furthest(padded, ours) == (0, 0)
    assert len(reasons(caplog)) == 1
    assert sharing.reason


def test_a_mask_that_depends_on_values_would_not_show_in_the_first_batch():
    """Of what `doge` alone is an example: a comparison of log-probs can miss what a later step changes."""
    _, _, sharing = both(make(UNKNOWN["doge"]()), batch(shared()))
    assert sharing.reason == "the model cannot take a packed batch (its attention makes a mask of its own)"


def test_a_window_in_the_mask_alone_would_not_show_in_a_short_batch():
    _, _, sharing = both(make(UNKNOWN["phimoe"]()), batch(shared()))
    assert "sliding window" in sharing.reason
    no_window = transformers.PhimoeConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
    wide = transformers.MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=100)
    for config in (no_window, wide):
        padded, ours, sharing = both(make(config), batch(shared()))
        assert sharing.reason == ""
        assert max(furthest(padded, ours)) < 1e-5


@pytest.mark.parametrize(
    "config", [transformers.GemmaConfig, transformers.Gemma3TextConfig], ids=lambda config: config.model_type
)
def test_attention_that_is_not_causal(config, caplog):
    model = make(config(**SHAPE, head_dim=8, use_bidirectional_attention=True))
    assert model.config.model_type in TESTED
    padded, ours, sharing = both(model, batch(shared()))
    assert sharing.reason == "the model's attention is not causal"
    assert furthest(padded, ours) == (0, 0)
    assert len(reasons(caplog)) == 1
