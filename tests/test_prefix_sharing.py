"""Each distinct token once: log-probs and gradients are those of the host's padded batch, whatever model and rows."""

import copy

import pytest
import torch
import transformers
from conftest import curve, make_model
from trl.trainer.utils import add_fused_lm_head

from apo_trl.prefix_sharing import TESTED, enable_prefix_sharing, pack

SHAPE = dict(
    vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
NO_GQA = {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"}
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, head_dim=8),
    "mistral": lambda: transformers.MistralConfig(**SHAPE, sliding_window=None),
    "mistral, sliding": lambda: transformers.MistralConfig(**SHAPE, sliding_window=7),
    "smollm3": lambda: transformers.SmolLM3Config(**SHAPE),
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
}  # fmt: skip
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
    """A batch of (prompt, completion) rows as TRL's collator makes it."""
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
    """Outputs and gradients by the host's path, then with each distinct token once."""
    found = []
    sharing = None
    for planted in (False, True):
        if planted:
            sharing = enable_prefix_sharing(model)
        model.zero_grad()
        outputs = model(**inputs, fused_lm_head=True, use_cache=False)
        weights = torch.randn_like(outputs.log_probs) if weights is None else weights
        (outputs.log_probs * weights).sum().backward()
        grads = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        found.append((outputs, grads))
    return *found, sharing


def furthest(one, other) -> tuple[float, float]:
    """The largest difference of log-probs, and of a parameter's gradient, relative."""
    (outputs, grads), (again, regrads) = one, other
    assert set(grads) == set(regrads)
    logps = (outputs.log_probs - again.log_probs).abs().max().item()
    return logps, max(((grads[name] - regrads[name]).norm() / grads[name].norm()).item() for name in grads)


@pytest.mark.parametrize("name", MODELS)
def test_log_probs_and_gradients_are_the_hosts(name):
    model = make(MODELS[name]())
    assert model.config.model_type in TESTED
    host, ours, sharing = both(model, batch(shared()))
    assert sharing.reason == ""
    # By hand: 12 of prompt, 5 + 6 + 3 of two answers with one start, 9, and 4 + 4 + 7; padded, 6 rows of 23.
    assert sharing.tokens_saved == pytest.approx(6 * 23 / (12 + 5 + 6 + 3 + 9 + 4 + 4 + 7))
    logps, grads = furthest(host, ours)
    assert logps < 1e-5
    assert grads < 1e-5
    for field in OUTPUTS[1:]:
        assert torch.allclose(getattr(host[0], field).float(), getattr(ours[0], field).float(), atol=1e-4), field
    assert torch.equal(host[0].label_mask, ours[0].label_mask)


def test_a_wrong_boundary_is_noticed(monkeypatch):
    """The negative control: one token too many counted as shared."""
    monkeypatch.setattr(
        "apo_trl.prefix_tree.shared_start", lambda one, other: min(len(one), len(other), 13) if other else 0
    )
    with pytest.raises((AssertionError, IndexError)):
        test_log_probs_and_gradients_are_the_hosts("llama")


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
    host, ours, sharing = both(make(MODELS["llama"]()), batch(ODD[name](tokens(6, 5, 4)), left))
    logps, grads = furthest(host, ours)
    assert max(logps, grads) < 1e-5
    assert sharing.tokens_saved >= 1


def test_a_batch_without_answers_is_a_differentiable_zero():
    host, ours, _ = both(make(MODELS["llama"]()), batch([(prompt, []) for prompt in tokens(4, 6)]))
    assert host[0].log_probs.abs().sum() == ours[0].log_probs.abs().sum() == 0


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_each_implementation_of_attention(implementation):
    config = MODELS["llama"]()
    config._attn_implementation = implementation
    model = make(config)
    host, ours, sharing = both(model, batch(shared()))
    assert sharing.reason == ""
    assert max(furthest(host, ours)) < 1e-5


def test_generation_and_plain_calls_stay_as_they_are():
    model = make(MODELS["llama"]())
    ids = torch.tensor(tokens(8))
    before = model.generate(ids, max_new_tokens=8, do_sample=False), model(ids).logits
    enable_prefix_sharing(model)
    after = model.generate(ids, max_new_tokens=8, do_sample=False), model(ids).logits
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


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
    first = train(model=model, padding_free=True, steps=2)
    again = train(model=model, padding_free=True, steps=2)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    expected = [train(model=model, padding_free=False, steps=2) for _ in range(2)]
    for ours, theirs in zip((first, again), expected, strict=True):
        assert curve(ours) == pytest.approx(curve(theirs), rel=1e-5)


def test_what_is_saved_knows_nothing_of_it(tmp_path):
    model = make(MODELS["llama"]())
    enable_prefix_sharing(model)
    model.save_pretrained(tmp_path)
    assert "prefix_sharing" not in (tmp_path / "config.json").read_text()
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_in_bfloat16_it_is_no_further_from_the_truth_than_the_host():
    model = make(MODELS["llama"]())
    inputs = batch(shared())
    truth = model(**inputs, fused_lm_head=True, use_cache=False).log_probs
    fresh = make(MODELS["llama"]()).bfloat16()
    host, ours, _ = both(fresh, inputs)
    errors = [(outputs.log_probs.float() - truth).norm().item() for outputs, _ in (host, ours)]
    assert errors[1] <= 1.1 * errors[0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    config = MODELS["llama"]()
    host, _, _ = both(make(config), batch(shared()))
    model = make(config).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    torch.manual_seed(1)
    weights = torch.randn_like(host[0].log_probs)
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
def test_a_model_that_cannot_is_left_to_the_host_with_one_warning(reason, caplog):
    model = make(REFUSED[reason]())
    before = model(**batch(shared()), fused_lm_head=True, use_cache=False).log_probs
    sharing = enable_prefix_sharing(model)
    assert sharing.reason == reason
    (record,) = [record for record in caplog.records if "padding_free" in record.message]
    assert reason in record.message
    assert torch.equal(before, model(**batch(shared()), fused_lm_head=True, use_cache=False).log_probs)


def test_an_unknown_architecture_is_compared_on_its_first_batch(monkeypatch, caplog):
    model = make(transformers.MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2))
    host, ours, sharing = both(model, batch(shared()))
    assert (sharing.checked, sharing.reason) == (True, "")
    assert max(furthest(host, ours)) < 1e-5
    # The same with an attention that sees too much: noticed, told once, and the host's results given.
    model = make(transformers.MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2))
    monkeypatch.setattr(Tree, "_mask", lambda self, number, piece, window: torch.ones(1, 1, 1, 1, dtype=torch.bool))
    host, ours, sharing = both(model, batch(shared()))
    assert "differ from the host's" in sharing.reason
    assert furthest(host, ours) == (0, 0)
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

    def test_prompt_learning_is_left_to_the_host(self, train, caplog):
        from peft import PromptTuningConfig

        peft = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        trainer = train(padding_free=True, peft_config=peft, steps=1)
        assert curve(trainer, "apo/tokens_saved") == []
        assert "prompt learning puts tokens before each row" in caplog.text

    def test_the_hosts_own_trainer_gains_it(self, train, recwarn):
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", MODELS)
def test_on_a_gpu(name):
    model = make(MODELS[name]()).cuda()
    inputs = {key: value.cuda() for key, value in batch(shared()).items()}
    host, ours, sharing = both(model, inputs)
    assert sharing.reason == ""
    assert max(furthest(host, ours)) < 1e-4


def test_every_row_is_found_again_by_its_path():
    """The layout alone."""
    inputs = batch(shared())
    tree = Tree(**inputs)
    packed = tree.input_ids[0].tolist()
    paths = []
    for piece in tree.pieces:
        spans = [*piece.before, (piece.start, piece.end)]
        path = [packed[at] for start, end in spans for at in range(start, end)]
        assert tree.position_ids[0, piece.start : piece.end].tolist() == list(range(piece.depth, len(path)))
        paths.append(path)
    wanted = {tuple(prompt + completion) for prompt, completion in shared()}
    assert {tuple(path) for path in paths} == wanted
    assert len(packed) == tree.computed == sum(piece.end - piece.start for piece in tree.pieces)
