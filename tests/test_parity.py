"""Through the real trainer: where TRL has an answer, ours equals it; where it has none, a worked one."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import curve, make_model, rows
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from trl import DPOConfig, DPOTrainer

from apo_trl import APOTrainer
from apo_trl.config import ADDED_LOSSES, SMOOTHED_LOSSES, TRL_LOSSES
from apo_trl.losses import LOSSES, PER_TOKEN_LOSSES
from apo_trl.saturation import PAIR_LOSSES, largest_slope, slope

LORA = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=True)
# transformers 4 rounds what it logs to four digits.
CLOSE = 1e-6 if Version(transformers.__version__) >= Version("5") else 1e-4
NEEDS = {"exo_pair": {"label_smoothing": 0.05}}


def same(ours, theirs, tolerance=0.0):
    assert len(ours) == len(theirs) > 0
    assert ours == pytest.approx(theirs, rel=max(tolerance, CLOSE), abs=max(tolerance, CLOSE))


@pytest.mark.parametrize("name", TRL_LOSSES)
def test_every_loss_of_the_host_trains_as_before(train, name):
    settings = {"loss_type": name, **NEEDS.get(name, {})}
    theirs, ours = train(DPOTrainer, DPOConfig, **settings), train(**settings)
    for key in ("loss", "grad_norm", "rewards/chosen", "rewards/margins", "logps/rejected", "entropy", "num_tokens"):
        same(curve(ours, key), curve(theirs, key))


@pytest.mark.parametrize("name", ["apo_zero", "apo_down"])
@pytest.mark.parametrize("case", ["full", "lora", "ld_alpha", "accumulation", "checkpointing", "keep_end"])
def test_our_functions_equal_trls_losses(train, monkeypatch, name, case):
    """`LOSSES[name]`, trained under another name through our own path, against TRL's code."""
    monkeypatch.setitem(ADDED_LOSSES, f"our_{name}", LOSSES[name])
    settings = {
        "full": {},
        "lora": {"peft_config": LORA},
        "ld_alpha": {"ld_alpha": 0.25},
        "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        "checkpointing": {"gradient_checkpointing": True},
        "keep_end": {"truncation_mode": "keep_end", "max_length": 12},
    }[case]
    theirs = train(DPOTrainer, DPOConfig, loss_type=name, **settings)
    ours = train(loss_type=f"our_{name}", **settings)
    for key in ("loss", "grad_norm", "rewards/chosen", "rewards/rejected"):
        same(curve(ours, key), curve(theirs, key))


def test_bfloat16_autocast(train):
    settings = {"loss_type": "apo_zero", "bf16": True}
    same(curve(train(**settings)), curve(train(DPOTrainer, DPOConfig, **settings)))


@pytest.mark.parametrize("name", ["apo_zero", "apo_down", "apo_zero_norm", "apo_down_norm", "apo_blend"])
@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_training_starts_at_one(train, name, peft_config):
    assert curve(train(loss_type=name, peft_config=peft_config, steps=1)) == [1.0]


def test_an_explicit_reference(train, model_dir):
    """A reference that is not the policy: step 0 is not 1, and equals TRL's."""
    settings = {"loss_type": "apo_zero"}
    theirs = train(DPOTrainer, DPOConfig, ref_model=make_model(seed=1), **settings)
    ours = train(ref_model=make_model(seed=1), **settings)
    assert abs(curve(ours)[0] - 1) > 1e-3
    same(curve(ours), curve(theirs))


def test_a_loaded_adapter_becomes_its_own_reference(train):
    def policy():
        torch.manual_seed(3)
        model = get_peft_model(make_model(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        assert isinstance(model, PeftModel)
        return model

    settings = {"loss_type": ["apo_zero_norm", "apo_zero"], "beta": 1.0}
    trainer = train(model=policy(), processing_class=tokenizer(), **settings)
    assert "ref" in trainer.model.peft_config
    assert curve(trainer)[0] == 2.0
    theirs = train(DPOTrainer, DPOConfig, model=policy(), processing_class=tokenizer(), loss_type="apo_zero", beta=1.0)
    same(curve(train(model=policy(), processing_class=tokenizer(), loss_type="apo_zero", beta=1.0)), curve(theirs))


def tokenizer():
    from conftest import make_tokenizer

    return make_tokenizer()


def test_precomputed_reference(train):
    for name in ("apo_zero", "apo_zero_norm", "apo_blend"):
        online, stored = train(loss_type=name), train(loss_type=name, precompute_ref_log_probs=True)
        assert stored.ref_model is None
        same(curve(stored), curve(online))


def test_evaluation_equals_trls(train, dataset):
    def evaluated(*classes, **settings):
        return train(*classes, eval_dataset=dataset, eval_strategy="steps", eval_steps=2, **settings)

    theirs, ours = evaluated(DPOTrainer, DPOConfig, loss_type="apo_zero"), evaluated(loss_type="apo_zero")
    same(curve(ours, "eval_loss"), curve(theirs, "eval_loss"))
    same(curve(ours, "eval_rewards/margins"), curve(theirs, "eval_rewards/margins"))
    assert "eval_apo/chosen_up" in ours.state.log_history[-2]


def test_evaluation_of_a_dataset_given_later_and_of_several(train, dataset):
    trainer = train(loss_type="apo_blend", eval_dataset={"a": dataset, "b": dataset.select(range(4))})
    both = trainer.evaluate()
    assert trainer.evaluate(dataset)["eval_loss"] == pytest.approx(both["eval_a_loss"])
    for prefix in ("eval_a_", "eval_b_", "eval_"):
        logged = [entry for entry in trainer.state.log_history if f"{prefix}rewards/margins" in entry]
        assert len(logged) == 1
        assert f"{prefix}apo/displaced" in logged[0]


def test_compute_metrics_still_gets_logits(train, dataset):
    """Deprecated in TRL, and served: evaluation asks for outputs besides the loss."""
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction.predictions.shape)
        return {"mine": 1.0}

    trainer = train(loss_type="apo_blend", run=False, compute_metrics=compute_metrics)
    with pytest.warns(FutureWarning, match="return_outputs"):
        metrics = trainer.evaluate(dataset)
    assert metrics["eval_mine"] == 1.0
    assert metrics["eval_loss"] == pytest.approx(1.0, abs=1e-4)
    assert seen[0][-1] == 260  # the vocabulary


def test_a_stream_trains_as_the_same_rows_on_disk(train, dataset):
    for name in ("apo_zero_norm", "apo_blend"):
        # All rows in one batch, since rows on disk are shuffled and a stream is not.
        settings = {"loss_type": name, "steps": 3, "per_device_train_batch_size": len(dataset)}
        stream = train(data=dataset.to_iterable_dataset(), **settings)
        same(curve(stream), curve(train(**settings)), 1e-5)


def test_blend_is_zero_and_down_at_its_ends(train):
    for wins, name in ((1.0, "apo_zero"), (0.0, "apo_down")):
        data = Dataset.from_list([row | {"chosen_wins": wins} for row in rows()])
        same(curve(train(loss_type="apo_blend", data=data)), curve(train(loss_type=name)))


def test_blend_reads_the_probability_of_its_own_row(train):
    """The loss of a batch is that of its rows: averaged over one-row batches it is the same."""
    trainer = train(loss_type="apo_blend", beta=1.0, ref_model=make_model(seed=1), run=False)
    trainer.args.per_device_eval_batch_size = 8
    together = trainer.evaluate(Dataset.from_list(rows()))["eval_loss"]
    alone = [trainer.evaluate(Dataset.from_list([row]))["eval_loss"] for row in rows()]
    assert together == pytest.approx(sum(alone) / len(alone), rel=1e-5)
    assert max(alone) - min(alone) > 0.05


class TestMixtures:
    def test_is_the_weighted_sum_of_its_terms(self, train):
        names, weights = ["apo_zero_norm", "sigmoid", "apo_down", "sft"], [2.0, 0.5, 1.0, 0.1]
        trainer = train(loss_type=names, loss_weights=weights, ref_model=make_model(seed=1))
        terms = [curve(trainer, f"loss/{name}") for name in names]
        total = [sum(w * value for w, value in zip(weights, step, strict=True)) for step in zip(*terms, strict=True)]
        same(curve(trainer), total, 1e-5)

    def test_host_terms_alone_train_as_on_the_host(self, train):
        settings = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
        ours = train(**settings)
        same(curve(ours), curve(train(DPOTrainer, DPOConfig, **settings)))
        assert curve(ours, "loss/sigmoid")[0] == pytest.approx(0.693147, abs=1e-5)

    def test_a_term_is_what_it_is_alone(self, train):
        names = ["apo_zero_norm", "apo_zero", "sigmoid", "ipo", "aot", "sft", "apo_blend"]
        settings = {"ref_model": make_model(seed=1), "steps": 1}
        mixed = train(loss_type=names, loss_weights=[0.5, 1, 2, 3, 0.1, 1, 1], **settings)
        for name in names:
            alone = train(loss_type=name, **settings)
            assert curve(mixed, f"loss/{name}")[0] == pytest.approx(curve(alone)[0], rel=CLOSE), name

    def test_a_single_loss_is_not_logged_twice(self, train):
        assert curve(train(loss_type="apo_zero_norm", steps=1), "loss/apo_zero_norm") == []

    def test_a_mixture_of_experts_adds_its_auxiliary_loss_once(self, train):
        from transformers import MixtralConfig, MixtralForCausalLM

        def policy():
            torch.manual_seed(0)
            shape = make_model().config.to_dict()
            keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
            config = MixtralConfig(
                **{key: shape[key] for key in keys},
                num_key_value_heads=2,
                num_local_experts=4,
                router_aux_loss_coef=0.5,
            )
            return MixtralForCausalLM(config)

        def run(*classes, **settings):
            model = policy()
            return train(
                *classes, model=model, ref_model=copy.deepcopy(model), processing_class=tokenizer(), **settings
            )

        theirs, ours = run(DPOTrainer, DPOConfig, loss_type="apo_zero"), run(loss_type="apo_zero")
        assert curve(ours, "aux_loss")[0] > 0
        same(curve(ours), curve(theirs), 1e-5)
        alone = run(loss_type="apo_zero_norm", steps=1)
        assert curve(alone)[0] == pytest.approx(1 + 0.5 * curve(alone, "aux_loss")[0], rel=max(CLOSE, 1e-5))


class TestLengths:
    """The `_norm` losses divide by the tokens that were scored, exactly, also after truncation."""

    @pytest.mark.parametrize(
        "settings", [{}, {"max_length": 22}, {"truncation_mode": "keep_end", "max_length": 9}], ids=str
    )
    def test_against_log_probs_from_raw_logits(self, train, settings):
        trainer = train(
            loss_type="apo_zero_norm",
            beta=5.0,
            ref_model=make_model(seed=1),
            per_device_eval_batch_size=8,
            run=False,
            **settings,
        )
        data = Dataset.from_list(rows())
        loss = trainer.evaluate(data)["eval_loss"]
        expected = []
        for row in trainer._prepare_dataset(data, trainer.processing_class, trainer.args, "raw"):
            means = []
            for side in ("chosen_ids", "rejected_ids"):
                ids = row["prompt_ids"] + row[side]
                completion = [0] * len(row["prompt_ids"]) + [1] * len(row[side])
                if length := settings.get("max_length"):
                    cut = slice(-length, None) if "truncation_mode" in settings else slice(length)
                    ids, completion = ids[cut], completion[cut]
                with torch.no_grad():
                    ratios = raw_logps(trainer.model, ids) - raw_logps(trainer.ref_model, ids)
                scored = torch.tensor(completion[1:]).bool()
                means.append(ratios[scored].mean())
            expected.append(torch.sigmoid(-5 * means[0]) + torch.sigmoid(5 * means[1]))
        assert loss == pytest.approx(torch.stack(expected).mean().item(), abs=max(CLOSE, 1e-5))

    def test_the_host_counts_one_token_too_many_there(self, train):
        """Why ours do not share TRL's lengths: sigmoid_norm's own loss against its formula, after keep_end."""
        settings = {"truncation_mode": "keep_end", "max_length": 9}
        trainer = train(loss_type=["sigmoid_norm"], ref_model=make_model(seed=1), run=False, **settings)
        batch = next(iter(trainer.get_train_dataloader()))
        assert (batch["completion_mask"].sum(1) == batch["completion_mask"][:, 1:].sum(1) + 1).any()


def raw_logps(model, ids):
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    return torch.log_softmax(logits.float(), -1).gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)


FIXED = SimpleNamespace(beta=0.1, label_smoothing=0.05, discopop_tau=0.05)
SATURATING = {name for name in PAIR_LOSSES if not math.isnan(largest_slope(name, FIXED))}
LENGTHS = torch.tensor([[1, 3], [4, 2], [2, 2], [1, 1], [3, 1], [2, 4], [4, 4], [3, 2]])  # chosen, rejected


def graded(trainer, ratios, wins):
    """Each pair's gradient with respect to its two log-ratios, of the trainer's own loss for a batch of them."""
    number = len(ratios)
    lengths = LENGTHS.T.flatten()
    scored = torch.arange(LENGTHS.max())[None] < lengths[:, None]
    log_probs = (ratios.T.flatten() / lengths)[:, None] * scored
    log_probs = log_probs.requires_grad_()
    outputs = SimpleNamespace(
        log_probs=log_probs, entropy=scored * 1.0, mean_logits=scored * 1.0, is_top1=scored,
        log_sum_sq_probs=scored * 0.0,
    )  # fmt: skip
    mask = torch.cat([torch.zeros(2 * number, 1), scored], dim=1).long()
    inputs = {
        "input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask,
        "ref_chosen_logps": torch.zeros(number), "ref_rejected_logps": torch.zeros(number), "chosen_wins": wins,
    }  # fmt: skip
    trainer.precompute_ref_logps = True
    loss = trainer._compute_loss(lambda **_: outputs, inputs, return_outputs=False)
    # Each scored token has the gradient of its sum; the loss is a mean over pairs.
    gradient = torch.autograd.grad(loss, log_probs)[0][:, 0] * number
    return gradient.view(2, number).T


@pytest.mark.parametrize("name", sorted(PAIR_LOSSES))
def test_slopes_are_those_of_the_real_loss(train, name):
    settings = {"beta": 0.3, "discopop_tau": 0.7, **({"label_smoothing": 0.2} if name in SMOOTHED_LOSSES else {})}
    trainer = train(loss_type=[name], run=False, **settings)
    generator = torch.Generator().manual_seed(0)
    for spread in (0.1, 5, 30):
        ratios = spread * torch.randn(len(LENGTHS), 2, generator=generator, dtype=torch.float64)
        wins = torch.rand(len(LENGTHS), generator=generator, dtype=torch.float64)
        gradients = graded(trainer, ratios, wins)
        per_token = LENGTHS if name in PER_TOKEN_LOSSES else torch.ones_like(LENGTHS)
        expected = torch.linalg.vector_norm(gradients * per_token, dim=1)
        rewards = 0.3 * ratios / per_token
        got = 0.3 * slope(name, *rewards.unbind(1), trainer.args, wins)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-9, check_dtype=False)


@pytest.mark.parametrize("name", [*TRL_LOSSES, *ADDED_LOSSES])
def test_saturation_of_every_loss_at_both_ends(train, name):
    """Near the anchor no pair is saturated; far from it, those of a loss whose slope fades are."""
    trainer = train(loss_type=name, run=False, **NEEDS.get(name, {}))
    assert bool(trainer._saturation.losses) == (name in PAIR_LOSSES)
    if name not in PAIR_LOSSES:
        return
    ones = torch.ones(3)
    # `nca_pair` pulls a chosen answer back that is far above the reference.
    for at, expected in ((0.1, 0.0), (200.0, float(name in SATURATING - {"nca_pair"}))):
        ratios = torch.full((3,), at)
        pairs = {"chosen_logratios": ratios, "rejected_logratios": -ratios, "chosen_wins": ones}
        pairs |= {"chosen_lengths": ones, "rejected_lengths": ones}
        assert trainer._saturation(pairs).tolist() == [expected] * 3, at


def test_saturation_threshold(train):
    """sigmoid(-margin) falls to 1 % of its largest value, 1, at a margin of ln 99."""
    trainer = train(loss_type="sigmoid", beta=0.1, run=False)
    margins = torch.tensor([4.55, 4.64]) / 0.1  # ln 99 = 4.595
    ones = torch.ones(2)
    pairs = {"chosen_logratios": margins / 2, "rejected_logratios": -margins / 2}
    assert trainer._saturation(pairs | {"chosen_lengths": ones, "rejected_lengths": ones}).tolist() == [0, 1]


def test_a_loss_of_unknown_slope_trains_without_the_metric(train, monkeypatch):
    monkeypatch.setitem(ADDED_LOSSES, "a_loss_of_next_year", LOSSES["apo_zero"])
    known, unknown = train(loss_type="apo_zero", steps=2), train(loss_type="a_loss_of_next_year", steps=2)
    assert len(curve(known, "apo/saturated")) == 2
    assert curve(unknown, "apo/saturated") == []
    same(curve(unknown), curve(known))


def test_recording_terms_leaves_no_trace(train):
    """TRL multiplies its terms by weights that record them: nothing that it logs may notice."""
    settings = {"loss_type": ["sigmoid", "apo_zero"], "loss_weights": [0.3, 0.7]}
    ours, theirs = train(APOTrainer, **settings), train(DPOTrainer, DPOConfig, **settings)
    for key in curve_keys(theirs):
        same(curve(ours, key), curve(theirs, key))


def curve_keys(trainer):
    keys = [key for key in trainer.state.log_history[0] if key not in ("epoch", "step")]
    assert len(keys) > 12
    return keys
