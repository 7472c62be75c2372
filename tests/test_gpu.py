"""On a CUDA device: which kernel computes a packed batch, how close it is to the truth, what it waits for and holds."""

import warnings

import pytest
import torch
from conftest import curve
from test_prefix_sharing import MODELS, batch, both, furthest, make, shared

from apo_trl.prefix_sharing import enable_prefix_sharing, pack

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def on_gpu(inputs):
    return {key: value.cuda() for key, value in inputs.items()}


@pytest.mark.parametrize("name", MODELS)
def test_in_float32_by_sdpa(name):
    padded, packed, sharing = both(make(MODELS[name]()).cuda(), on_gpu(batch(shared())))
    assert (sharing.reason, sharing.kernel) == ("", "sdpa")
    assert max(furthest(padded, packed)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_in_low_precision_by_one_call_a_layer(name, dtype):
    inputs = on_gpu(batch(shared()))
    model = make(MODELS[name]()).cuda()
    truth, _, _ = both(model, inputs)
    weights = torch.ones_like(truth[0].log_probs)
    padded, packed, sharing = both(make(MODELS[name]()).cuda().to(dtype), inputs, weights)
    assert sharing.reason == ""
    one_size = getattr(model.config, "v_head_dim", None) is None
    assert sharing.kernel == ("varlen" if one_size else "sdpa")
    errors = [(found[0].log_probs.float() - truth[0].log_probs).norm().item() for found in (padded, packed)]
    assert errors[1] <= 1.25 * errors[0] + 1e-3, errors
    for parameter, grad in padded[1].items():
        assert (packed[1][parameter] - grad).norm() <= 0.1 * grad.norm() + 1e-4, parameter


def test_autocast_of_float32_weights_attends_in_bfloat16():
    model, inputs = make(MODELS["llama"]()).cuda(), on_gpu(batch(shared()))
    with torch.autocast("cuda", torch.bfloat16):
        padded, packed, sharing = both(model, inputs)
    assert sharing.kernel == "varlen"
    assert furthest(padded, packed)[0] < 0.05


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    model = make(MODELS["qwen3"]()).cuda().bfloat16().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    padded, packed, sharing = both(model, on_gpu(batch(shared())))
    assert sharing.reason == ""
    assert furthest(padded, packed)[0] < 0.05


def test_a_step_waits_for_the_device_no_more_often_than_trls():
    """With the layout made by the collator, as in training."""
    model = make(MODELS["llama"]()).cuda().bfloat16()
    inputs = batch(shared())
    layout = pack(**inputs)
    inputs = on_gpu(inputs)

    def waits(**more):
        for _ in range(2):  # the second time, nothing is set up any more
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                model(**inputs, **more, fused_lm_head=True, use_cache=False).log_probs.sum().backward()
                torch.cuda.set_sync_debug_mode("default")
        return [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]

    padded = waits()
    enable_prefix_sharing(model)
    packed = waits(packed_batch=layout.to("cuda"))
    assert len(packed) <= len(padded), (padded, packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_grows_with_the_length_and_not_with_its_square(dtype):
    generator = torch.Generator().manual_seed(0)
    peaks = []
    for length in (2_000, 4_000, 8_000, 16_000):
        config = MODELS["llama"]()
        config.max_position_embeddings = 40_000
        model = make(config).cuda().to(dtype)
        enable_prefix_sharing(model)
        prompt, *answers = (torch.randint(4, 260, (length // 2,), generator=generator).tolist() for _ in range(3))
        inputs = on_gpu(batch([(prompt, answer) for answer in answers]))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(**inputs, fused_lm_head=True, use_cache=False).log_probs.sum().backward()
        peaks.append((torch.cuda.max_memory_allocated() - before) >> 20)
    assert peaks[-1] < 2.5 * peaks[-2], peaks


@pytest.mark.parametrize(
    "settings", [{"bf16": True}, {"fp16": True}, {"bf16": True, "gradient_checkpointing": True}], ids=str
)
def test_training(train, settings):
    on, off = (train(padding_free=free, use_cpu=False, steps=4, **settings) for free in (True, False))
    assert curve(on) == pytest.approx(curve(off), rel=2e-2, abs=2e-3)
    assert min(curve(on, "apo/tokens_saved")) > 1.2
    assert on._sharing.kernel == "varlen"


@pytest.mark.filterwarnings("ignore")  # of torch's compiler, and of TRL's deprecation of Liger's option
@pytest.mark.parametrize("option", ["torch_compile", "activation_offloading", "use_liger_kernel"])
def test_options_of_training(train, option):
    if option == "use_liger_kernel":
        pytest.importorskip("liger_kernel")
    on, off = (train(padding_free=free, use_cpu=False, bf16=True, steps=3, **{option: True}) for free in (True, False))
    assert curve(on) == pytest.approx(curve(off), rel=2e-2, abs=2e-3)
    assert on._sharing.reason or min(curve(on, "apo/tokens_saved")) > 1.2


def test_an_unknown_architecture_is_not_refused_in_bfloat16(monkeypatch):
    monkeypatch.setattr("apo_trl.prefix_sharing.model.TESTED", set())
    for name in MODELS:
        model = make(MODELS[name]()).cuda().bfloat16()
        sharing = enable_prefix_sharing(model)
        model(**on_gpu(batch(shared())), fused_lm_head=True, use_cache=False)
        assert sharing.reason == "", name
