"""What FlashAttention is given for a packed batch, by a stand-in on a CPU: packages, hub kernels, and neither."""

import copy
import logging

import fake_flash
import pytest
import torch
import transformers
from conftest import curve
from test_prefix_sharing import MODELS, OUTPUTS, SHAPE, batch, both, furthest, make, shared
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl.trainer.utils import add_fused_lm_head

from apo_trl.prefix_sharing import enable_prefix_sharing, pack

NAMES = [*fake_flash.PACKAGES, *fake_flash.KERNELS]


@pytest.fixture
def flash():
    with fake_flash.installed():
        yield fake_flash.CALLS


def with_attention(config, name):
    config._attn_implementation = name
    return make(config)


def causal_lm(config):
    return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


WITH_FLASH = [name for name in MODELS if causal_lm(MODELS[name]())._supports_flash_attn]


def test_the_stand_in_is_lower_right_causal_attention():
    q, k, v = torch.randn(3, 4, 8), torch.randn(7, 2, 8), torch.randn(7, 2, 8)
    heads_first = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    expected = scaled_dot_product_attention(*heads_first, attn_mask=causal_lower_right(3, 7), enable_gqa=True)
    torch.testing.assert_close(fake_flash.attend(q, k, v, None, True, (-1, -1)), expected[0].transpose(0, 1))
    # A window of (2, 2) is a query's own token and the two before it: (_, 4), (_, 5), (_, 6) see 2-4, 3-5 and 4-6.
    weights = fake_flash.attend(q[:, :1], k[:, :1], torch.eye(7)[:, None], None, True, (2, 2))[:, 0]
    assert [line.nonzero().flatten().tolist() for line in weights] == [[2, 3, 4], [3, 4, 5], [4, 5, 6]]


def test_the_stand_in_leaves_nothing_behind():
    from transformers import modeling_flash_attention_utils as utils

    before = dict(AttentionInterface._global_mapping), utils._loaded_implementation, utils._flash_varlen_fn
    with fake_flash.installed():
        with_attention(MODELS["llama"](), fake_flash.KERNELS[0])
        assert utils._loaded_implementation == fake_flash.KERNELS[0]
    assert (dict(AttentionInterface._global_mapping), utils._loaded_implementation, utils._flash_varlen_fn) == before
    with pytest.raises(ImportError, match="FlashAttention2"):
        with_attention(MODELS["llama"](), "flash_attention_2")


def test_flash_runs_all_but_the_models_that_lack_it():
    assert len(WITH_FLASH) == len(MODELS)


@pytest.mark.parametrize("name", WITH_FLASH)
def test_packed_flash_attention_is_padded_sdpa(name, flash, monkeypatch):
    if (
        name == "gpt2"
    ):  # whose layers are no torch.nn.Linear, of which transformers asks the precision of float32 queries
        monkeypatch.setattr("transformers.integrations.flash_attention.get_target_dtype", lambda query, module: None)
    padded, _, _ = both(make(MODELS[name]()), batch(shared()), weights := torch.randn(6, 22))
    model = with_attention(MODELS[name](), "flash_attention_2")
    assert model.config._attn_implementation == "flash_attention_2"
    sharing = enable_prefix_sharing(model)
    outputs = model(**batch(shared()), fused_lm_head=True, use_cache=False)
    (outputs.log_probs * weights).sum().backward()
    grads = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert (sharing.reason, sharing.kernel) == ("", "flash")
    logps, difference = furthest(padded, (outputs, grads))
    assert logps < 1e-5
    assert difference < 1e-5
    # One call a layer, of the packed sequence and the offsets of its rows.
    ids, mask, labels = batch(shared()).values()
    packed = pack(ids, mask, labels)
    assert len(flash) == model.config.num_hidden_layers
    for call in flash:
        assert call["tokens"] == packed.computed_tokens
        assert (call["offsets_q"], call["offsets_k"]) == (packed.cu_seq_lens_q.tolist(), packed.cu_seq_lens_k.tolist())
        assert call["causal"]
    windows = [call["window"] for call in flash]
    kinds = getattr(model.config, "layer_types", None) or [
        "sliding_attention" if getattr(model.config, "sliding_window", None) else "full_attention"
    ] * len(windows)
    assert windows == [(6, 6) if kind == "sliding_attention" else (-1, -1) for kind in kinds]


def test_a_kernel_that_aligns_at_the_upper_left_is_noticed(flash, monkeypatch):
    """The negative control."""
    attend = fake_flash.attend

    def upper_left(q, k, v, scale, causal, window):
        return attend(q, k[: q.size(0)], v[: q.size(0)], scale, causal, window)

    monkeypatch.setattr(fake_flash, "attend", upper_left)
    padded, ours, _ = both(with_attention(MODELS["llama"](), "flash_attention_2"), batch(shared()))
    assert min(furthest(padded, ours)) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_every_implementation_of_flash_attention(name, flash, tmp_path, caplog):
    padded, _, _ = both(make(MODELS["llama"]()), batch(shared()), weights := torch.randn(6, 22))
    model = with_attention(MODELS["llama"](), name)
    sharing = enable_prefix_sharing(model)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name).eval()
    add_fused_lm_head(again, outputs=OUTPUTS)
    models = {"itself": (model, sharing), "loaded": (again, enable_prefix_sharing(again))}
    models["copy"] = (copy.deepcopy(model), sharing)
    for kind, (one, decided) in models.items():
        flash.clear()
        ours = _outputs(one, weights)
        assert (decided.reason, decided.kernel) == ("", "flash"), kind
        assert {call["function"] for call in flash} == {name}
        assert one.config._attn_implementation == name
        assert max(furthest(padded, ours)) < 1e-5, kind
    assert "padding_free has no effect" not in caplog.text
    config = (tmp_path / "config.json").read_text()
    assert "prefix_sharing" not in config
    assert "flash" not in config


def _outputs(model, weights):
    model.zero_grad()
    outputs = model(**batch(shared()), fused_lm_head=True, use_cache=False)
    (outputs.log_probs * weights).sum().backward()
    return outputs, {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_training(name, flash, train, model_dir, caplog):
    def load(implementation):
        return transformers.AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation=implementation)

    on = train(model=load(name), ref_model=load(name), padding_free=True, steps=2)
    assert {call["function"] for call in flash} == {name}
    off = train(model=load("sdpa"), ref_model=load("sdpa"), padding_free=False, steps=2)
    for key in ("loss", "grad_norm", "rewards/margins"):
        assert curve(on, key) == pytest.approx(curve(off, key), rel=1e-5, abs=1e-5), key
    assert on._sharing.kernel == "flash"
    assert min(curve(on, "apo/tokens_saved")) > 1.2
    assert "padding_free has no effect" not in caplog.text


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "activation checkpointing"])
@pytest.mark.parametrize("names", [fake_flash.KERNELS[:2], fake_flash.KERNELS[1:], ("flash_attention_2", NAMES[3])])
def test_policy_and_reference_with_different_kernels(names, checkpointing, flash, train, model_dir):
    """Whenever transformers changes the kernel it registers it anew, also in the middle of a forward."""

    def load(implementation):
        return transformers.AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation=implementation)

    settings = {"steps": 2, "gradient_checkpointing": checkpointing}
    on = train(model=load(names[0]), ref_model=load(names[1]), padding_free=True, **settings)
    assert {call["function"] for call in flash} == set(names)
    off = train(model=load("sdpa"), ref_model=load("sdpa"), padding_free=False, **settings)
    for key in ("loss", "grad_norm"):
        assert curve(on, key) == pytest.approx(curve(off, key), rel=1e-5, abs=1e-5), key
    assert on._sharing.reason == ""


@pytest.mark.parametrize("between", [fake_flash.KERNELS[0], fake_flash.KERNELS[1], "flash_attention_2", "sdpa"])
def test_loading_another_model_afterwards(between, flash):
    padded, _, _ = both(make(MODELS["llama"]()), batch(shared()), weights := torch.randn(6, 22))
    model = with_attention(MODELS["llama"](), fake_flash.KERNELS[0])
    sharing = enable_prefix_sharing(model)
    for _ in range(2):
        other = with_attention(MODELS["qwen2"](), between)
        with torch.no_grad():
            other(**batch(shared()), fused_lm_head=True, use_cache=False)
        flash.clear()
        assert max(furthest(padded, _outputs(model, weights))) < 1e-5
        assert [call["tokens"] for call in flash] == [50, 50]
    assert (sharing.reason, sharing.kernel) == ("", "flash")


def test_activations_recomputed_after_another_kernel_was_loaded(flash):
    padded, _, _ = both(make(MODELS["llama"]()), batch(shared()), weights := torch.randn(6, 22))
    model = with_attention(MODELS["llama"](), fake_flash.KERNELS[0]).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    enable_prefix_sharing(model)
    outputs = model(**batch(shared()), fused_lm_head=True, use_cache=False)
    other = with_attention(MODELS["qwen2"](), fake_flash.KERNELS[1])
    with torch.no_grad():
        other(**batch(shared()), fused_lm_head=True, use_cache=False)
    (outputs.log_probs * weights).sum().backward()
    grads = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert max(furthest(padded, (outputs, grads))) < 1e-5


def test_without_the_package_a_kernel_takes_its_place():
    with fake_flash.installed(packages=False):
        model = with_attention(MODELS["llama"](), "flash_attention_2")
        assert model.config._attn_implementation == "kernels-community/flash-attn2"
        padded, ours, sharing = both(model, batch(shared()))
        assert (sharing.reason, sharing.kernel) == ("", "flash")
        assert max(furthest(padded, ours)) < 1e-5


@pytest.mark.parametrize("precision", ["weights", "autocast"])
def test_flash_attention_is_given_half_precision(precision, flash):
    model = with_attention(MODELS["qwen3"](), "flash_attention_2")
    truth = make(MODELS["qwen3"]())(**batch(shared()), fused_lm_head=True, use_cache=False).log_probs
    if precision == "weights":
        model = model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        padded, ours, sharing = both(model, batch(shared()))
    assert sharing.kernel == "flash"
    assert {call["dtype"] for call in flash} == {torch.bfloat16}
    errors = [(outputs.log_probs.float() - truth).norm().item() for outputs, _ in (padded, ours)]
    assert errors[1] <= 1.2 * errors[0]


def test_an_unknown_architecture_with_flash_attention(flash, monkeypatch):
    def mixtral():
        config = transformers.MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=5)
        return with_attention(config, "flash_attention_2")

    padded, ours, sharing = both(mixtral(), batch(shared()))
    assert (sharing.reason, sharing.kernel) == ("", "flash")
    assert max(furthest(padded, ours)) < 1e-5
    attend = fake_flash.attend
    monkeypatch.setattr(fake_flash, "attend", lambda q, k, v, *rest: attend(q, k[: q.size(0)], v[: q.size(0)], *rest))
    padded, ours, sharing = both(mixtral(), batch(shared()))
    assert "log-probs of the first batch differ" in sharing.reason
    assert furthest(padded, ours) == (0, 0)


def warnings_of(caplog):
    return [record.message for record in caplog.records if "padding_free has no effect" in record.message]


def test_flex_attention_falls_back(caplog):
    model = with_attention(MODELS["llama"](), "flex_attention")
    sharing = enable_prefix_sharing(model)
    assert sharing.reason == "the attention implementation flex_attention takes no packed batch"
    assert warnings_of(caplog) == [
        f"padding_free has no effect: {sharing.reason}. Falling back to TRL's padded batches."
    ]


def test_an_attention_function_of_ones_own_falls_back(train, model_dir, caplog):
    def mine(module, query, key, value, mask, **kwargs):
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)

    with fake_flash.installed():  # puts back what is registered
        AttentionInterface.register("mine", mine)
        AttentionMaskInterface.register("mine", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="mine")
        on = train(model=model, padding_free=True, steps=2)
        assert ALL_ATTENTION_FUNCTIONS["mine"] is mine
    assert on._sharing.reason == "the attention implementation mine takes no packed batch"
    assert len(warnings_of(caplog)) == 1
    off = train(padding_free=False, steps=2)
    assert curve(on) == curve(off)
    assert curve(on, "apo/tokens_saved") == []


def test_a_kernel_that_is_no_flash_attention_falls_back(caplog, monkeypatch):
    caplog.set_level(logging.WARNING)
    with fake_flash.installed():
        AttentionInterface.register("someone/sparse", lambda *args, **kwargs: None)
        monkeypatch.setattr("transformers.modeling_utils.is_kernel", lambda name: False)
        model = with_attention(MODELS["llama"](), "someone/sparse")
        sharing = enable_prefix_sharing(model)
    assert sharing.reason == "the attention implementation someone/sparse takes no packed batch"
    assert len(warnings_of(caplog)) == 1
