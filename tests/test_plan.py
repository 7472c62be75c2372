import itertools
import json
import subprocess
import sys
import weakref

import pytest
import torch
from conftest import make_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from apo_trl.errors import InputError
from apo_trl.recipes.memory import footprint
from apo_trl.recipes.memory import plan as planning
from apo_trl.recipes.memory.plan import Plan, from_recipe, plan, table, verdict

SHAPE = dict(
    vocab_size=512, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=8
)  # and 2 heads of keys and values, as make_model says
DEFAULTS = dict(method="full", stage=0, gpus=1, pairs=1, tokens=64)
LORA = dict(r=8, target_modules="all-linear", task_type="CAUSAL_LM")


def planned(config, *, lora_rank=16, lora_targets="all-linear", **settings):
    from peft import LoraConfig

    adapters = LoraConfig(r=lora_rank, target_modules=lora_targets, task_type="CAUSAL_LM")
    return plan(config, **(DEFAULTS | {"peft_config": adapters} | settings))


def llama_3_8b():
    """The published shape of Llama-3-8B, whose 8,030,261,248 parameters its model card gives as 8.03B."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )


def adapted(model, **settings):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(**(LORA | settings)))


def numel(parameters):
    return sum(parameter.numel() for parameter in parameters)


def nbytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_importing_it_imports_no_torch():
    code = (
        "import sys, apo_trl.recipes.memory.plan; sys.exit(bool({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_the_real_model(tied):
    model = make_model(tie_word_embeddings=tied)
    counted = planned(model.config)
    assert counted.total_parameters == counted.trainable_parameters == numel(model.parameters())


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], None])
@pytest.mark.parametrize("rank", [4, 16])
def test_adapter_parameters_are_those_of_peft(targets, rank):
    model = make_model()
    counted = planned(model.config, method="lora", lora_rank=rank, lora_targets=targets)
    trainable, everything = adapted(model, r=rank, target_modules=targets).get_nb_trainable_parameters()
    assert (counted.trainable_parameters, counted.total_parameters) == (trainable, everything)


def test_a_published_model_has_its_published_number_of_parameters():
    assert planned(llama_3_8b()).total_parameters == 8_030_261_248


def test_full_fine_tuning_worked_by_hand():
    # The tiny Llama: embedding and output layer 2 * 260 * 32 = 16,640. A layer: queries and output 2 * 32 * 32, keys
    # and values 2 * 32 * 16, MLP 3 * 32 * 64, two norms 2 * 32, together 9,280. Two of them and the last norm of 32:
    # 16,640 + 18,560 + 32 = 35,232 = P.
    config, count = make_model().config, 35_232
    one = planned(config, dtype="bfloat16")
    assert one.total_parameters == count
    # One GPU, bfloat16 throughout: 2 weights + 2 gradients + 2 * 2 moments in the weights' dtype + 2 reference.
    assert (one.weights, one.gradients, one.optimizer, one.reference) == (70_464, 70_464, 140_928, 70_464)
    # The same in float32: everything doubles.
    wide = planned(config, dtype="float32")
    assert (wide.weights, wide.gradients, wide.optimizer, wide.reference) == (140_928, 140_928, 281_856, 140_928)
    assert planned(config, precomputed_reference=True).reference == 0
    assert one.buffers == 0
    assert planned(config, dtype="bfloat16", gpus=2).buffers == 70_464  # DDP's buckets are as large as the gradients
    # ZeRO: 2 + 2 + 12 (two moments and a copy of the weights, float32), whatever the dtype on disk, over 4 GPUs.
    for dtype in ("bfloat16", "float32"):
        shares = {stage: planned(config, stage=stage, gpus=4, dtype=dtype) for stage in (1, 2, 3)}
        assert [shares[stage].optimizer for stage in (1, 2, 3)] == [105_696] * 3  # 12 P / 4
        assert [shares[stage].gradients for stage in (1, 2, 3)] == [70_464, 17_616, 17_616]
        assert [shares[stage].weights for stage in (1, 2, 3)] == [70_464, 70_464, 17_616]
        assert [shares[stage].reference for stage in (1, 2, 3)] == [70_464, 70_464, 17_616]
    # FSDP2 trains in float32 and keeps the moments so: 4 + 4 + 8, over 4 GPUs; the reference stays bfloat16.
    fsdp = planned(config, stage=3, gpus=4, dtype="bfloat16", fsdp=True)
    assert (fsdp.weights, fsdp.gradients, fsdp.optimizer, fsdp.reference) == (35_232, 35_232, 70_464, 17_616)


def test_qlora_worked_by_hand():
    # Linear layers below the output layer: 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64) = 18,432 weights, 288 blocks.
    # 16,800 weights stay: embedding, output layer, norms, in bfloat16 33,600 bytes.
    config = make_model().config
    single = planned(config, method="qlora", dtype="bfloat16", lora_rank=4)
    assert single.weights - single.adapters == 18_432 // 2 + 288 * 4 + 33_600
    double = planned(config, method="qlora", dtype="bfloat16", lora_rank=4, bits=4.127)
    assert double.weights - double.adapters == pytest.approx(18_432 // 2 + 288 + 2 * 4 + 33_600, abs=8)
    eight = planned(config, method="qlora", dtype="bfloat16", lora_rank=4, bits=8)
    assert eight.weights - eight.adapters == 18_432 + 33_600
    # Rank 4 over inputs plus outputs: 2 * 4 * (64 + 48 + 48 + 64 + 96 + 96 + 96) = 4,096, in bfloat16.
    assert (single.trainable_parameters, single.adapters, single.gradients) == (4_096, 8_192, 8_192)
    assert single.optimizer == 16_384
    assert single.reference == 0


@pytest.mark.parametrize("double", [False, True])
def test_four_bit_weights_cost_what_bitsandbytes_packs(double):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(704, 256)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
    scales = [state.absmax, *([state.state2.absmax] if double else [])]
    assert weight.numel() * (4.127 if double else 4.5) / 8 == pytest.approx(nbytes([packed, *scales]), rel=1e-4)


@pytest.mark.parametrize("gpus", [1, 8])
def test_zero_agrees_with_deepspeeds_own_estimators(gpus):
    # DeepSpeed counts 2 + 18 / gpus bytes a parameter at stage 2 and 18 / gpus at stage 3. Its 18 hold 12 for the
    # optimizer, as ours do; at stage 2 gradients twice, 2 and 4; at stage 3, after 2 for the weights, gradients of 4.
    # Its engine accumulates gradients in the model's dtype unless told otherwise, so ours are 2: less by 4 / gpus and
    # by 2 / gpus. Its stage 3 adds 4 bytes for each parameter of the largest layer, gathered; so do we, in `buffers`.
    # It leaves out the bucket, and for the memory of the machine it has a factor of 1.5, which `host` has not.
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as estimate_3
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as estimate_2

    config = llama_3_8b()
    count, largest = 8_030_261_248, 128256 * 4096
    settings = dict(gpus=gpus, dtype="bfloat16", precomputed_reference=True)

    def states(stage, **more):
        found = planned(config, stage=stage, **settings, **more)
        return found.weights + found.gradients + found.optimizer + found.buffers - planning.BUCKET * 2

    _, theirs = estimate_2(count, num_gpus_per_node=gpus, cpu_offload=False)
    assert states(2) == pytest.approx(theirs - 4 * count // gpus, abs=8)
    _, theirs, _ = estimate_3(count, largest, num_gpus_per_node=gpus, cpu_offload=False)
    assert states(3) == pytest.approx(theirs - 2 * count // gpus, abs=8)
    # Offloaded: 2 bytes a weight on each GPU at stage 2, the gathered layer alone at stage 3.
    _, theirs = estimate_2(count, num_gpus_per_node=gpus, cpu_offload=True)
    assert states(2, offload=True) == theirs
    _, theirs, _ = estimate_3(count, largest, num_gpus_per_node=gpus, cpu_offload=True, cpu_offload_params=True)
    assert states(3, offload=True) == theirs


def test_one_gpu_agrees_with_accelerates_estimator():
    # `accelerate estimate-memory` for float32: the model, as much again for gradients, twice as much for AdamW.
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes

    model = make_model()
    size, _ = calculate_maximum_sizes(model)
    # Its size counts buffers too: the rotary frequencies, in two copies.
    size -= nbytes(model.buffers())
    theirs = estimate_training_usage(size, "float32")
    ours = planned(model.config, precomputed_reference=True)
    assert (ours.weights, ours.gradients, ours.optimizer) == (theirs["model"], theirs["gradients"], theirs["optimizer"])


@pytest.mark.parametrize(
    ("method", "dtype"), [("full", "float32"), ("full", "bfloat16"), ("lora", "float32"), ("lora", "bfloat16")]
)
def test_weights_gradients_and_optimizer_are_those_of_a_real_step(train, model_dir, method, dtype):
    from transformers import TrainerCallback

    sizes = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            sizes["gradients"] = nbytes(p.grad for p in model.parameters() if p.grad is not None)

    settings = dict(model_init_kwargs={"dtype": dtype})
    if method == "lora":
        from peft import LoraConfig

        settings["peft_config"] = LoraConfig(**LORA)
    trainer = train(steps=1, callbacks=[Look()], **settings)
    optimizer = trainer.optimizer.optimizer
    # Not its step counters, one number for each tensor.
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert len(moments) == 2 * sum(parameter.requires_grad for parameter in trainer.model.parameters())
    ours = planned(make_model().config, method=method, dtype=dtype, lora_rank=8, mixed_precision=False)
    assert ours.weights == nbytes(trainer.model.parameters())
    assert ours.adapters == (
        nbytes(p for p in trainer.model.parameters() if p.requires_grad) if method == "lora" else 0
    )
    assert ours.gradients == sizes["gradients"]
    assert ours.optimizer == nbytes(moments)
    reference = trainer.ref_model.parameters() if trainer.ref_model is not None else []
    assert ours.reference == nbytes(reference)


def loaded_model(method, dtype, checkpointing):
    from trl.trainer.utils import add_fused_lm_head

    model = make_model(**SHAPE).to(getattr(torch, dtype)).train()
    base = model
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if method == "lora":
        model = adapted(model)
        if checkpointing:
            model.enable_input_require_grads()
    add_fused_lm_head(base)
    return model


def forward(model, *, pairs, tokens, autocast, shared=0):
    ids = torch.randint(1, 512, (2 * pairs, tokens))
    ids[pairs:, :shared] = ids[:pairs, :shared]
    attention_mask = torch.ones_like(ids)
    if not shared:
        attention_mask[:, -5:] = 0  # as in a batch with padding, which the attention kernels cannot ignore
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(input_ids=ids, attention_mask=attention_mask, labels=ids, fused_lm_head=True, use_cache=False)
    return out.loss


def saved_by(model, run):
    """Bytes saved at the end of a forward pass, without the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(size for size, _ in saved.values())


KINDS = [
    (method, checkpointing, dtype, autocast)
    for method, checkpointing, (dtype, autocast) in itertools.product(
        ("full", "lora"),
        (False, True),
        (("float32", False), ("float32", True), ("bfloat16", False), ("bfloat16", True)),
    )
]


class Peak(TorchDispatchMode):
    """The most bytes of storage alive at once, of those made under it."""

    def __init__(self, known):
        super().__init__()
        self.live = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.now = self.top = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.top = max(self.top, self.now)
                weakref.finalize(storage, self.gone, storage._cdata)
        return result

    def gone(self, key):
        self.now -= self.live.pop(key, 0)


@pytest.mark.parametrize(("method", "checkpointing", "dtype", "autocast"), KINDS)
def test_activations_are_within_a_hundredth_of_what_autograd_saves(method, checkpointing, dtype, autocast):
    model = loaded_model(method, dtype, checkpointing)
    measured = saved_by(model, lambda: forward(model, pairs=2, tokens=128, autocast=autocast))
    kept, _ = counted(method, dtype, autocast, checkpointing, pairs=2, tokens=128)
    assert kept == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize(("method", "checkpointing", "dtype", "autocast"), KINDS)
def test_packed_activations_are_close_to_what_autograd_saves(method, checkpointing, dtype, autocast):
    # On a CPU, the outputs of the rows are copied into one tensor; a kernel of a GPU writes one.
    from apo_trl.prefix_sharing import enable_prefix_sharing

    model = loaded_model(method, dtype, checkpointing)
    sharing = enable_prefix_sharing(model.get_base_model() if method == "lora" else model)
    measured = saved_by(model, lambda: forward(model, pairs=2, tokens=128, autocast=autocast, shared=48))
    assert sharing.tokens_saved == pytest.approx(2 * 128 / 208)
    kept, _ = counted(method, dtype, autocast, checkpointing, pairs=2, tokens=128, pair_tokens=208)
    assert kept == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("method", "checkpointing", "dtype", "autocast"), KINDS)
def test_the_peak_is_within_a_quarter_of_what_was_alive(method, checkpointing, dtype, autocast, packed, monkeypatch):
    # Narrow tiles, because on a CPU TRL folds each in torch, with copies in float32 that a GPU does not make.
    import trl.trainer.utils as host

    from apo_trl.prefix_sharing import enable_prefix_sharing

    monkeypatch.setattr(host, "_CHUNKED_LOGPROB_CHUNK_SIZE", 64)
    monkeypatch.setattr(footprint, "TILE_COLUMNS", 64)
    model = loaded_model(method, dtype, checkpointing)
    if packed:
        enable_prefix_sharing(model.get_base_model() if method == "lora" else model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    known = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    with Peak(known) as peak:
        forward(model, pairs=2, tokens=192, autocast=autocast, shared=48 if packed else 0).backward()
    settings = dict(pairs=2, tokens=192, pair_tokens=2 * 192 - 48 if packed else None)
    kept, passing = counted(method, dtype, autocast, checkpointing, **settings)
    assert kept + passing == pytest.approx(peak.top, rel=0.25)


def counted(method, dtype, autocast, checkpointing, **settings):
    from peft import LoraConfig

    config = make_model(**SHAPE).config
    settings |= dict(dtype=dtype, mixed_precision=autocast, checkpointing=checkpointing, peft_config=LoraConfig(**LORA))
    setup = footprint.Setup(method, 0, 1, **settings)
    linear = footprint.count_parameters(config, setup)[1]
    return footprint.activations(config, linear, setup)


def test_the_tile_of_logits_is_that_of_the_installed_trl():
    from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    assert (footprint.TILE_TOKENS, footprint.TILE_COLUMNS) == (TOKEN_CHUNK_SIZE, _CHUNKED_LOGPROB_CHUNK_SIZE)


def test_the_bucket_is_that_of_the_installed_deepspeed():
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert DeepSpeedZeroConfig.model_fields["reduce_bucket_size"].default == planning.BUCKET


def test_what_each_setting_saves():
    config = llama_3_8b()
    settings = dict(dtype="bfloat16", pairs=2, tokens=1024)
    full, lora, qlora = (planned(config, method=method, **settings) for method in ("full", "lora", "qlora"))
    assert full.total > lora.total > qlora.total
    assert planned(config, checkpointing=False, **settings).activations > 4 * full.activations
    stages = [planned(config, stage=stage, gpus=8, **settings).total for stage in (1, 2, 3)]
    assert stages == sorted(stages, reverse=True)
    off = planned(config, stage=3, gpus=8, offload=True, **settings)
    on = planned(config, stage=3, gpus=8, **settings)
    assert off.total < on.total
    assert off.host == 8 * (on.weights + on.gradients + on.optimizer)
    assert off.total + off.host // 8 == on.total


def sized(total):
    """A plan that needs `total` bytes and has nothing to change."""
    setup = footprint.Setup("qlora", 0, 1, 1, 64, dtype="bfloat16")
    return Plan(total, 0, 0, 0, 0, 0, 0, 0, 1, 1, config=None, setup=setup)


def test_a_tenth_is_kept_in_reserve():
    assert verdict(sized(18 * 10**9), 24) == (
        "Fits: needs 18.0 GB a GPU, which leaves 3.6 GB with 10% of 24 GB kept in reserve."
    )
    assert verdict(sized(216 * 10**8), 24).startswith("Fits")
    assert verdict(sized(217 * 10**8), 24).startswith("Does not fit: needs 21.7 GB a GPU, 0.1 GB too much")


@pytest.mark.parametrize(
    ("settings", "memory", "advice"),
    [
        (dict(method="lora", checkpointing=False, pairs=4, dtype="bfloat16"), 40, "gradient_checkpointing: true"),
        (dict(method="full", stage=3, gpus=8, dtype="bfloat16"), 26, "precompute_ref_log_probs: true"),
        (dict(method="lora", pairs=1, dtype="float32"), 26, "dtype: bfloat16"),
        (dict(method="full", stage=2, gpus=8, dtype="bfloat16", precomputed_reference=True), 32, "ZeRO-3"),
        (dict(method="lora", pairs=1, dtype="bfloat16"), 16, "QLoRA"),
        (dict(method="full", pairs=1, dtype="bfloat16", precomputed_reference=True), 24, "LoRA"),
    ],
)
def test_what_to_change_first_makes_it_fit(settings, memory, advice):
    first = planned(llama_3_8b(), **(dict(tokens=1024) | settings))
    said = verdict(first, memory)
    assert said.startswith("Does not fit")
    assert f"change first: {advice} (needs" in said or f"change first: {advice}, then" in said
    needs = float(said.split("(needs ")[1].split(" GB")[0])
    assert needs <= 0.9 * memory


def test_nothing_makes_it_fit():
    said = verdict(planned(llama_3_8b(), method="qlora", dtype="bfloat16", tokens=1024), 4)
    assert said.endswith("; shorten max_length, or take more or larger GPUs.")
    assert "take more or larger GPUs" in verdict(planned(llama_3_8b(), tokens=1024), 4)


def test_the_table_shows_every_term_in_gb():
    config = llama_3_8b()
    lines = table(planned(config, dtype="bfloat16", precomputed_reference=True)).splitlines()
    assert [line.split()[0] for line in lines[:-2]] == [
        "weights",
        "gradients",
        "optimizer",
        "reference",
        "activations",
        "buffers",
        "total",
    ]
    assert lines[0].split() == ["weights", "16.06", "GB"]
    assert lines[-2] == "8,030,261,248 parameters, 8,030,261,248 of them trained"
    assert lines[-1] == "128 tokens a pair, padded batches"
    assert "of which adapters" in table(planned(config, method="lora"))
    assert "host, all GPUs" in table(planned(config, stage=3, gpus=2, offload=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(gpus=0), "gpus: must be at least 1"),
        (dict(pairs=0), "pairs: must be at least 1"),
        (dict(tokens=0), "tokens: must be at least 1"),
        (dict(method="dora"), "method: unknown value 'dora'.*'full', 'lora', 'qlora'"),
        (dict(stage=4), "stage: unknown value 4"),
        (dict(dtype="int8"), "dtype: unknown value 'int8'"),
        (dict(method="lora", lora_targets=["nowhere"]), "lora_target_modules: not supported"),
    ],
)
def test_what_cannot_be_planned_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        planned(make_model().config, **settings)


def parsed(recipe, *arguments):
    from apo_trl.training.arguments import parse

    return parse([recipe, "--use_cpu", *map(str, arguments)])[0]


def terms(plan):
    return {name: value for name, value in vars(plan).items() if isinstance(value, int)}


def test_a_recipe_says_what_to_plan(model_dir):
    config = make_model().config
    shared = dict(tokens=1024, pair_tokens=1792, dtype="bfloat16")  # 2 * 1024 without a quarter of 1024
    lora = from_recipe(parsed("llama-3-8b/apo_zero_lora", "--model_name_or_path", model_dir), gpus=1)
    assert terms(lora) == terms(planned(config, method="lora", pairs=4, lora_rank=16, **shared))
    assert table(lora).splitlines()[-1].startswith("1,792 tokens a pair, packed batches: assuming")
    qlora = from_recipe(parsed("llama-3-8b/apo_zero_qlora", "--model_name_or_path", model_dir), gpus=1)
    assert terms(qlora) == terms(planned(config, method="qlora", pairs=1, bits=4.127, **shared))
    run = parsed("llama-3-8b/apo_zero_full", "--model_name_or_path", model_dir, "--precompute_ref_log_probs", "true")
    full = from_recipe(run, gpus=8, stage=3)
    assert terms(full) == terms(planned(config, pairs=2, stage=3, gpus=8, precomputed_reference=True, **shared))
    narrow = ["--dtype", "float32", "--bf16", "false", "--padding_free", "false"]
    run = parsed("llama-3-8b/apo_zero_full", "--model_name_or_path", model_dir, *narrow)
    padded = from_recipe(run, gpus=1)
    assert terms(padded) == terms(planned(config, pairs=2, tokens=1024, mixed_precision=False))
    assert table(padded).splitlines()[-1] == "2,048 tokens a pair, padded batches"


def test_local_pairs_are_counted(model_dir, tmp_path):
    # One token a byte. Each message has 2 tokens around its bytes, and an answer begins after its token of role.
    shared, chosen, rejected = "a" * 30, "b" * 20, "c" * 50
    rows = [{"prompt": shared, "chosen": chosen, "rejected": rejected}, {"prompt": "a", "chosen": "b", "rejected": "c"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--model_name_or_path", model_dir, "--dataset_name", tmp_path / "pairs.jsonl"]
    plan = from_recipe(parsed("llama-3-8b/apo_zero_lora", *options), gpus=1)
    assert plan.setup.pair_tokens == 30 + 21 + 51  # each answer with its end token
    assert f"packed batches: the largest of the first 2 pairs of {tmp_path}" in table(plan)
    short = from_recipe(parsed("llama-3-8b/apo_zero_lora", *options, "--max_length", "40"), gpus=1)
    assert short.setup.pair_tokens == 30 + 10 + 10
    assert short.activations < plan.activations


def test_an_unsupported_model_is_planned_with_padded_batches():
    from transformers import Gemma2Config

    config = Gemma2Config(**SHAPE, num_key_value_heads=2, head_dim=32)
    packed, padded = planned(config, pair_tokens=100), planned(config)
    assert packed.activations == padded.activations
    assert table(packed).splitlines()[-1] == "128 tokens a pair, padded batches: the model caps attention logits"


def test_every_change_can_be_asked_of_a_recipes_plan(model_dir):
    run = parsed("llama-3-8b/apo_zero_full", "--model_name_or_path", model_dir)
    assert "take more or larger GPUs" in verdict(from_recipe(run, gpus=2), 1e-6)


def test_an_unreachable_configuration_names_the_remedy(model_dir):
    with pytest.raises(InputError, match=r"model_name_or_path.*local folder"):
        from_recipe(parsed("llama-3-8b/apo_zero_full"), gpus=1)
    with pytest.raises(InputError, match=r"model_name_or_path: required, not set.*local folder"):
        from_recipe(parsed("smollm2-135m/demo"), gpus=1)
    run = parsed("llama-3-8b/apo_zero_full", "--model_name_or_path", model_dir)
    run.training.max_length = None
    with pytest.raises(InputError, match="max_length: null"):
        from_recipe(run, gpus=1)


def test_the_worked_example_of_the_docs_is_what_the_code_says():
    from pathlib import Path

    text = (Path(__file__).parent.parent / "docs" / "memory.md").read_text(encoding="utf-8")
    config = llama_3_8b()
    shared = dict(tokens=1024, pair_tokens=1792, dtype="bfloat16")
    cases = [
        planned(config, stage=3, gpus=8, pairs=2, **shared),
        planned(config, method="lora", pairs=4, **shared),
        planned(config, method="qlora", bits=4.127, **shared),
    ]
    for term in ("weights", "gradients", "optimizer", "reference", "activations", "buffers", "total"):
        row = " | ".join([term, *(f"{getattr(case, term) / 1e9:.2f}" for case in cases)])
        assert f"| {row} |" in text
    for case, memory in zip(cases, (80, 80, 24), strict=True):
        assert verdict(case, memory).startswith("Fits")
