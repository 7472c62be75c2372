"""Each distinct token once: log-probs and gradients are those of TRL's padded batch, for every model and batch."""

import copy

import pytest
import torch
import transformers
from conftest import curve, make_model
from trl.trainer.utils import add_fused_lm_head

import apo_trl.prefix_sharing.layout as prefix_sharing_layout
import apo_trl.prefix_sharing.verification as verification
from apo_trl.prefix_sharing import TESTED, enable_prefix_sharing
from apo_trl.prefix_sharing.sdpa import Plan

SHAPE = dict(
    vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
NO_GQA = {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"}
SLIDING = dict(sliding_window=7, layer_types=["sliding_attention", "full_attention"])
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, head_dim=8),
    "mistral": lambda: transformers.MistralConfig(**SHAPE, sliding_window=None),
    "mistral, sliding": lambda: transformers.MistralConfig(**SHAPE, sliding_window=7),
    "smollm3": lambda: transformers.SmolLM3Config(**SHAPE, no_rope_layers=[1, 0]),
    "olmo2": lambda: transformers.Olmo2Config(**SHAPE),
    "phi3": lambda: transformers.Phi3Config(**SHAPE),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SHAPE, head_dim=8, sliding_window=7, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**NO_GQA),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=260, n_embd=32, n_layer=2, n_head=4, n_positions=512, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=0, eos_token_id=0,
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SHAPE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "cohere": lambda: transformers.CohereConfig(**SHAPE, use_qk_norm=True),
    # Full attention has no position embedding in Cohere2 and in Exaone 4.
    "cohere2": lambda: transformers.Cohere2Config(**SHAPE, **SLIDING),
    "olmo3": lambda: transformers.Olmo3Config(**SHAPE, **SLIDING),
    "gemma": lambda: transformers.GemmaConfig(**SHAPE, head_dim=8),
    "granite": lambda: transformers.GraniteConfig(
        **SHAPE, embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.5, attention_multiplier=0.2
    ),
    "ernie4_5": lambda: transformers.Ernie4_5Config(**SHAPE, head_dim=8),
    "exaone4": lambda: transformers.Exaone4Config(**SHAPE, **SLIDING),
    "glm4_moe": lambda: transformers.Glm4MoeConfig(
        **SHAPE, head_dim=8, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, use_qk_norm=True
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **(SHAPE | {"num_key_value_heads": 4}), n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        n_group=1, topk_group=1, first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=16, v_head_dim=12,  # queries and keys of 24, values of 12
    ),
}  # fmt: skip
NEWEST = ["cohere", "cohere2", "olmo3", "gemma", "granite", "ernie4_5", "exaone4", "glm4_moe", "deepseek_v3"]
OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")


def make(config) -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    add_fused_lm_head(model, outputs=OUTPUTS)
    return model


def tokens(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 260, (length,), generator=generator).tolist() for length in lengths]


def batch(pairs, left=False) -> dict:
    """Return a batch of (prompt, completion) rows as TRL's collator makes it."""
    longest = max(len(prompt) + len(completion) for prompt, completion in pairs)
    ids = torch.zeros(len(pairs), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (prompt, completion) in enumerate(pairs):
        start = longest - len(prompt) - len(completion) if left else 0
        whole = slice(start, start + len(prompt) + len(completion))
        ids[row, whole] = torch.tensor(prompt + completion)
        mask[row, whole] = 1
        labels[row, start + len(prompt) : whole.stop] = torch.tensor(completion, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def shared():
    """Two pairs of one prompt that share the start of an answer, a whole answer, and a pair that shares nothing."""
    prompt, start, a, b, c, other, x, y = tokens(12, 5, 6, 9, 3, 4, 4, 7)
    chosen = [(prompt, start + a), (prompt, b), (other, x)]
    rejected = [(prompt, start + c), (prompt, start + a), (other, y)]
    return chosen + rejected


def both(model, inputs, weights=None):
    """Outputs and gradients of TRL's padded path, then with each distinct token once."""
    results = []
    sharing = None
    for enabled in (False, True):
        if enabled:
            sharing = enable_prefix_sharing(model)
        model.zero_grad()
        outputs = model(**inputs, fused_lm_head=True, use_cache=False)
        weights = torch.randn_like(outputs.log_probs) if weights is None else weights
        (outputs.log_probs * weights).sum().backward()
        grads = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        results.append((outputs, grads))
    return *results, sharing


def furthest(one, other) -> tuple[float, float]:
    """The largest difference of log-probs, and of a parameter's gradient, relative."""
    (outputs, grads), (again, regrads) = one, other
    assert set(grads) == set(regrads)
    logps = (outputs.log_probs - again.log_probs).abs().max().item()
    return logps, max(((grads[name] - regrads[name]).norm() / grads[name].norm()).item() for name in grads)


@pytest.mark.parametrize("name", MODELS)
def test_log_probs_and_gradients_are_trls(name):
    model = make(MODELS[name]())
    assert model.config.model_type in TESTED
    padded, ours, sharing = both(model, batch(shared()))
    assert sharing.reason == ""
    # By hand: 12 of prompt, 5 + 6 + 3 of two answers with one start, 9, and 4 + 4 + 7; padded, 6 rows of 23.
    assert sharing.tokens_saved == pytest.approx(6 * 23 / (12 + 5 + 6 + 3 + 9 + 4 + 4 + 7))
    logps, grads = furthest(padded, ours)
    assert logps < 1e-5
    assert grads < 1e-5
    for field in OUTPUTS[1:]:
        assert torch.allclose(getattr(padded[0], field).float(), getattr(ours[0], field).float(), atol=1e-4), field
    assert torch.equal(padded[0].label_mask, ours[0].label_mask)


def test_the_nine_newest_architectures_are_all_there():
    assert len(NEWEST) == 9
    assert {MODELS[name]().model_type for name in MODELS} == TESTED


@pytest.mark.parametrize("precision", ["weights", "autocast"])
@pytest.mark.parametrize("name", NEWEST)
def test_bfloat16_is_not_mistaken_for_an_error(name, precision, monkeypatch):
    """An architecture that is compared on its first batch is compared in the precision it trains in."""
    monkeypatch.setattr("apo_trl.prefix_sharing.model.TESTED", frozenset())
    comparisons = []
    monkeypatch.setattr(
        "apo_trl.prefix_sharing.verification.mismatch_reason",
        lambda *args, compare=verification.mismatch_reason: comparisons.append(compare(*args)) or comparisons[-1],
    )
    model = make(MODELS[name]())
    if precision == "weights":
        model = model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        _, _, sharing = both(model, batch(shared()))
    assert sharing.reason == ""
    assert comparisons == [""]


def test_a_wrong_boundary_is_noticed(monkeypatch):
    """The negative control: one token too many counted as shared."""
    pack_exactly = prefix_sharing_layout._pack

    def one_too_many(ids, real, scored):
        ids = ids.copy()
        ids[3, 17] = ids[0, 17]  # of two answers with one start, the first token that differs
        return pack_exactly(ids, real, scored)

    monkeypatch.setattr(prefix_sharing_layout, "_pack", one_too_many)
    padded, ours, sharing = both(make(MODELS["llama"]()), batch(shared()))
    assert sharing.tokens_saved == pytest.approx(6 * 23 / (50 - 1))
    assert min(furthest(padded, ours)) > 1e-3  # which the tests above allow 1e-5


ODD = {
    "nothing shared": lambda t: [([1], t[0]), ([2], t[1])],
    "one completion starts the other": lambda t: [(t[0], t[1]), (t[0], t[1] + t[2])],
    "the same up to the last token": lambda t: [(t[0], [*t[1], 7]), (t[0], [*t[1], 8])],
    "the same pair twice": lambda t: [(t[0], t[1]), (t[0], t[1]), (t[0], t[2]), (t[0], t[2])],
    "chosen equals rejected": lambda t: [(t[0], t[1]), (t[0], t[1])],
    "one token long": lambda t: [(t[0], [5]), (t[0], [6])],
    "a prompt of one token": lambda t: [([9], t[1]), ([9], t[2])],
    "a single row": lambda t: [(t[0], t[1])],
    "one row without an answer": lambda t: [(t[0], t[1]), (t[0], [])],
}


@pytest.mark.parametrize("left", [False, True], ids=["padded right", "padded left"])
@pytest.mark.parametrize("name", ODD)
def test_odd_batches(name, left):
    padded, ours, sharing = both(make(MODELS["llama"]()), batch(ODD[name](tokens(6, 5, 4)), left))
    logps, grads = furthest(padded, ours)
    assert max(logps, grads) < 1e-5
    assert sharing.tokens_saved >= 1


def test_a_batch_without_answers_is_a_differentiable_zero():
    padded, ours, _ = both(make(MODELS["llama"]()), batch([(prompt, []) for prompt in tokens(4, 6)]))
    assert padded[0].log_probs.abs().sum() == ours[0].log_probs.abs().sum() == 0


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_each_implementation_of_attention(implementation):
    config = MODELS["llama"]()
    config._attn_implementation = implementation
    model = make(config)
    padded, ours, sharing = both(model, batch(shared()))
    assert sharing.reason == ""
    assert max(furthest(padded, ours)) < 1e-5


def test_generation_and_plain_calls_stay_as_they_are():
    model = make(MODELS["llama"]())
    ids = torch.tensor(tokens(8))
    before = model.generate(ids, max_new_tokens=8, do_sample=False), model(ids).logits
    enable_prefix_sharing(model)
    after = model.generate(ids, max_new_tokens=8, do_sample=False), model(ids).logits
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


def test_the_attention_in_use_is_logged_once(caplog):
    model = make(MODELS["llama"]())
    sharing = enable_prefix_sharing(model)
    with caplog.at_level("INFO", logger="apo_trl"):
        for _ in range(2):
            model(**batch(shared()), fused_lm_head=True, use_cache=False)
    assert sharing.kernel == "sdpa"
    messages = [record.message for record in caplog.records if "attention by" in record.message]
    assert messages == ["padding_free: attention by scaled_dot_product_attention, one call for each row."]


def test_a_copy_of_the_model_computes_with_its_own_weights():
    model = make(MODELS["llama"]())
    enable_prefix_sharing(model)
    inputs = {**batch(shared()), "fused_lm_head": True, "use_cache": False}
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.mul_(0.5)
    assert not torch.allclose(twin(**inputs).log_probs, model(**inputs).log_probs, atol=1e-3)


def test_a_second_trainer_of_the_same_model(train, model_dir):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    settings = {"steps": 2, "ref_model": transformers.AutoModelForCausalLM.from_pretrained(model_dir)}
    first = train(model=model, padding_free=True, **settings)
    again = train(model=model, padding_free=True, **settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    settings["ref_model"] = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    expected = [train(model=model, padding_free=False, **settings) for _ in range(2)]
    for ours, theirs in zip((first, again), expected, strict=True):
        assert curve(ours) == pytest.approx(curve(theirs), rel=1e-5)


def test_what_is_saved_knows_nothing_of_it(tmp_path):
    model = make(MODELS["llama"]())
    enable_prefix_sharing(model)
    model.save_pretrained(tmp_path)
    assert "prefix_sharing" not in (tmp_path / "config.json").read_text()
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_in_bfloat16_it_is_no_further_from_the_truth_than_padded():
    model = make(MODELS["llama"]())
    inputs = batch(shared())
    truth = model(**inputs, fused_lm_head=True, use_cache=False).log_probs
    fresh = make(MODELS["llama"]()).bfloat16()
    padded, ours, _ = both(fresh, inputs)
    errors = [(outputs.log_probs.float() - truth).norm().item() for outputs, _ in (padded, ours)]
    assert errors[1] <= 1.1 * errors[0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    config = MODELS["llama"]()
    padded, _, _ = both(make(config), batch(shared()))
    model = make(config).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    torch.manual_seed(1)
    weights = torch.randn_like(padded[0].log_probs)
    one, two, sharing = both(model, batch(shared()), weights)
    assert sharing.reason == ""
    assert max(furthest(one, two)) < 1e-5


REFUSED = {
    "the model caps attention logits": lambda: transformers.Gemma2Config(**SHAPE, head_dim=8),
    "the model has layers that are not attention (conv)": lambda: transformers.Lfm2Config(
        **SHAPE, layer_types=["conv", "full_attention"]
    ),
    "the router's auxiliary loss needs the padded batch": lambda: transformers.Qwen3MoeConfig(
        **SHAPE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, output_router_logits=True
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_an_unsupported_model_falls_back_with_one_warning(reason, caplog):
    model = make(REFUSED[reason]())
    before = model(**batch(shared()), fused_lm_head=True, use_cache=False).log_probs
    sharing = enable_prefix_sharing(model)
    assert sharing.reason == reason
    (record,) = [record for record in caplog.records if "padding_free" in record.message]
    assert reason in record.message
    assert torch.equal(before, model(**batch(shared()), fused_lm_head=True, use_cache=False).log_probs)


def mixtral():
    return make(transformers.MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2))


def test_an_unknown_architecture_is_compared_on_its_first_batch(monkeypatch, caplog):
    model = mixtral()
    assert model.config.model_type not in TESTED
    padded, ours, sharing = both(model, batch(shared()))
    assert sharing.reason == ""
    assert max(furthest(padded, ours)) < 1e-5
    # With an attention that sees too much: noticed, one warning, TRL's results from the same batch on.
    model = mixtral()
    monkeypatch.setattr(Plan, "mask", lambda plan, block: torch.zeros(block.stop - block.start, block.last))
    padded, ours, sharing = both(model, batch(shared()))
    assert "log-probs of the first batch differ from the padded batch's" in sharing.reason
    assert furthest(padded, ours) == (0, 0)
    assert len([record for record in caplog.records if "padding_free" in record.message]) == 1


class TestTraining:
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"loss_type": "sigmoid"},
            {"loss_type": ["apo_zero_norm", "sft"], "loss_weights": [1.0, 0.1], "beta": 5.0},
            {"ld_alpha": 0.5},
            {"use_weighting": True, "loss_type": "sigmoid"},
            {"max_length": 40},
            {"max_length": 40, "truncation_mode": "keep_end"},
            {"precompute_ref_log_probs": True},
            {"sync_ref_model": True, "ref_model_sync_steps": 1},
            {"gradient_checkpointing": True},
            {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        ],
        ids=str,
    )
    def test_the_curve_is_the_one_with_padding(self, train, settings):
        on, off = (train(padding_free=free, steps=4, **settings) for free in (True, False))
        for key in ("loss", "grad_norm", "rewards/margins"):
            assert curve(on, key) == pytest.approx(curve(off, key), rel=1e-4, abs=1e-5), key
        assert min(curve(on, "apo/tokens_saved")) > 1.2
        assert curve(off, "apo/tokens_saved") == []

    @pytest.mark.parametrize("bits", [None, 4], ids=["LoRA", "QLoRA"])
    @pytest.mark.parametrize("task", ["CAUSAL_LM", None])
    def test_with_an_adapter(self, train, bits, task):
        """With a task, as TRL's own configuration has it, PEFT's model names every argument, most of them None."""
        from peft import LoraConfig

        settings = {"peft_config": LoraConfig(target_modules="all-linear", task_type=task), "steps": 4}
        if bits:
            pytest.importorskip("bitsandbytes")
            settings["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
            )
            settings["model_init_kwargs"] = {"dtype": "float32"}
        on, off = (train(padding_free=free, **settings) for free in (True, False))
        for key in ("loss", "grad_norm"):
            assert curve(on, key) == pytest.approx(curve(off, key), rel=1e-4), key
        assert min(curve(on, "apo/tokens_saved")) > 1.2

    def test_in_bfloat16_by_autocast(self, train):
        on, off = (train(padding_free=free, bf16=True, steps=3) for free in (True, False))
        truth = train(padding_free=False, steps=3)
        errors = [
            sum(
                abs(one - true)
                for one, true in zip(curve(run, "rewards/margins"), curve(truth, "rewards/margins"), strict=True)
            )
            for run in (on, off)
        ]
        assert curve(on) == pytest.approx(curve(off), rel=1e-2)
        assert errors[0] <= 2 * errors[1] + 1e-3
        assert min(curve(on, "apo/tokens_saved")) > 1.2

    def test_with_a_reference_of_its_own_and_evaluation(self, train, dataset):
        on, off = (
            train(padding_free=free, ref_model=make_model(1), eval_dataset=dataset, eval_strategy="steps", eval_steps=2)
            for free in (True, False)
        )
        assert curve(on, "eval_loss") == pytest.approx(curve(off, "eval_loss"), rel=1e-5)
        assert min(curve(on, "eval_apo/tokens_saved")) > 1.2

    def test_prompt_learning_falls_back(self, train, caplog):
        from peft import PromptTuningConfig

        peft = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        trainer = train(padding_free=True, peft_config=peft, steps=1)
        assert curve(trainer, "apo/tokens_saved") == []
        assert "prompt learning puts tokens before each row" in caplog.text

    def test_plain_dpo_trainer_gains_it_by_register(self, train, recwarn):
        import trl

        import apo_trl

        apo_trl.register()
        try:
            classes = {"trainer_class": trl.DPOTrainer, "config_class": trl.DPOConfig}
            on = train(**classes, padding_free=True, loss_type="sigmoid", steps=2)
            off = train(**classes, loss_type="sigmoid", steps=2)
        finally:
            apo_trl.unregister()
        assert on.args.padding_free
        assert curve(on) == pytest.approx(curve(off), rel=1e-5)
        assert min(curve(on, "apo/tokens_saved")) > 1.2
        assert curve(off, "apo/tokens_saved") == []
