"""What is refused, in one sentence, before any model is loaded; what is warned of; what is left out and counted."""

import logging
import math

import pytest
from conftest import curve, rows
from datasets import Dataset, IterableDataset
from trl import DPOConfig

from apo_trl import APOConfig, APOTrainer, InputError


@pytest.fixture(autouse=True)
def _no_model(request, monkeypatch):
    """Unless a test trains, loading a model is a failure."""
    if "train" not in request.fixturenames:

        def fail(*args, **kwargs):
            raise AssertionError("a model was loaded")

        monkeypatch.setattr("trl.trainer.dpo_trainer.create_model_from_path", fail)


@pytest.fixture
def warned(caplog):
    """The warnings of this package."""
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("apo_trl")]


def config(**settings):
    return APOConfig("out", use_cpu=True, bf16=False, report_to="none", **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss_type": "apo_zeroo"}, r"loss_type: 'apo_zeroo' .* Did you mean 'apo_zero'\? Use one of"),
        ({"loss_type": ["apo_zero", "kto"]}, "loss_type: 'kto'"),
        ({"loss_type": []}, "loss_type: .* empty"),
        ({"loss_type": ["apo_zero", "sft"], "loss_weights": [1.0]}, "loss_weights: .* 2 losses .* got 1"),
        (
            {"loss_type": "apo_blend", "f_divergence_type": "forward_kl"},
            "f_divergence_type: 'forward_kl' .*reverse_kl",
        ),
        ({"loss_type": "apo_zero_norm", "use_weighting": True}, "use_weighting: True .* False"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(InputError, match=words):
        config(**settings)
    # TRL's config lets the first of them through; the trainer does not, and loads nothing before it says so.
    if "loss_weights" not in settings:
        plain = DPOConfig("out", use_cpu=True, bf16=False, **settings)
        with pytest.raises(InputError, match=words):
            APOTrainer(model="nowhere", args=plain, train_dataset=Dataset.from_list(rows()))


def test_settings_changed_after_the_config_was_made():
    changed = config()
    changed.loss_type = ["apo_zeroo"]
    with pytest.raises(InputError, match="apo_zeroo"):
        APOTrainer(model="nowhere", args=changed, train_dataset=Dataset.from_list(rows()))


def with_row(number, **changes):
    data = rows()
    data[number] |= changes
    return data


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([{k: v for k, v in row.items() if k != "chosen_wins"} for row in rows()], "no column 'chosen_wins'"),
        (with_row(3, chosen_wins=None), "Row 3 of the train dataset has no 'chosen_wins'"),
        (with_row(4, chosen_wins=math.nan), "Row 4 of the train dataset has chosen_wins=nan"),
        (with_row(5, chosen_wins=1.5), "Row 5 of the train dataset has chosen_wins=1.5"),
        ([row | {"chosen_wins": str(row["chosen_wins"])} for row in rows()], "Row 0 of the train dataset has '0.0'"),
        ([row | {"chosen_wins": True} for row in rows()], "Row 0 of the train dataset has True"),
        (with_row(2, chosen=None), "Row 2 of the train dataset has no 'chosen'"),
    ],
)
@pytest.mark.parametrize("where", ["train", "eval", "eval 'second'"])
def test_rows_that_cannot_be(data, words, where):
    good, bad = Dataset.from_list(rows()), Dataset.from_list(data)
    datasets = {
        "train": {"train_dataset": bad},
        "eval": {"train_dataset": good, "eval_dataset": bad},
        "eval 'second'": {"train_dataset": good, "eval_dataset": {"first": good, "second": bad}},
    }[where]
    with pytest.raises(InputError) as refusal:
        APOTrainer(model="nowhere", args=config(loss_type="apo_blend"), **datasets)
    assert words.replace("the train dataset", f"the {where} dataset") in str(refusal.value)


def test_a_dataset_given_to_evaluate_is_checked(train):
    trainer = train(run=False)
    with pytest.raises(InputError, match="Row 1 of the eval dataset has no 'rejected'"):
        trainer.evaluate(Dataset.from_list(with_row(1, rejected=None)))


def test_the_first_row_of_a_stream_is_checked_before_the_model():
    stream = IterableDataset.from_generator(lambda: iter(with_row(0, chosen_wins=7.0)))
    with pytest.raises(InputError, match="Row 0 of the train stream has chosen_wins=7"):
        APOTrainer(model="nowhere", args=config(loss_type="apo_blend", max_steps=1), train_dataset=stream)


def test_the_other_rows_of_a_stream_are_checked_as_they_arrive(train):
    stream = Dataset.from_list(with_row(6, chosen_wins=-1.0)).to_iterable_dataset()
    with pytest.raises(InputError, match=r"Row 6 of the train stream has chosen_wins=-1\.0"):
        train(loss_type="apo_blend", data=stream)


def test_label_smoothing_warns_once(train, warned):
    train(loss_type="apo_zero", label_smoothing=0.1, steps=2)
    assert len(warned()) == 1
    assert "label_smoothing=0.1 has no effect on loss_type apo_zero" in warned()[0]


@pytest.mark.parametrize("loss_type", ["robust", ["apo_zero", "robust"]], ids=str)
def test_label_smoothing_does_not_warn_where_it_works(train, warned, loss_type):
    train(loss_type=loss_type, label_smoothing=0.1, steps=1)
    assert warned() == []


def says(text):
    return [{"role": "assistant", "content": text}]


USELESS = [
    {"prompt": rows()[0]["prompt"], "chosen": says("Same."), "rejected": says("Same.")},
    {"prompt": rows()[0]["prompt"], "chosen": says("Good."), "rejected": says("")},
    {"prompt": rows()[0]["prompt"], "chosen": says("x" * 40 + "a"), "rejected": says("x" * 40 + "b")},
    {"prompt": [{"role": "user", "content": "long " * 20}], "chosen": says("a"), "rejected": says("b")},
]


def test_pairs_that_teach_nothing_are_left_out_and_counted_once(train, warned):
    plain = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows(4)]
    trainer = train(data=Dataset.from_list(plain[:2] + USELESS + plain[2:]), max_length=40, steps=1)
    assert [row["prompt"] for row in trainer.train_dataset] == [row["prompt"] for row in plain]
    (warning,) = warned()
    assert "4 of 8 pairs of the train dataset" in warning
    for reason in ("the prompt alone fills max_length=40", "chosen equals rejected", "a completion is empty",
                   "chosen equals rejected after truncation to max_length=40"):  # fmt: skip
        assert f"1 because {reason}" in warning
    assert "keep_degenerate_pairs=True" in warning


def test_they_can_be_kept(train, warned):
    trainer = train(
        data=Dataset.from_list(rows(1)[:0] + USELESS[:3]), keep_degenerate_pairs=True, steps=2, max_length=40
    )
    assert len(trainer.train_dataset) == 3
    assert all(math.isfinite(loss) for loss in curve(trainer))
    assert warned() == []


def test_texts_without_messages_are_screened_too(train, warned):
    texts = [{"prompt": "Q:", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(4)]
    trainer = train(data=Dataset.from_list([*texts, {"prompt": "Q:", "chosen": "", "rejected": " no"}]), steps=1)
    assert len(trainer.train_dataset) == 4
    assert "1 because a completion is empty" in warned()[0]


def test_pairs_whose_prompt_is_implicit(train):
    data = [{"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in rows()]
    assert curve(train(data=Dataset.from_list(data))) == curve(train(data=Dataset.from_list(rows())))


@pytest.mark.parametrize("whole", [False, True], ids=["answers", "conversations"])
@pytest.mark.parametrize("stream", [False, True], ids=["rows", "stream"])
def test_a_text_prompt_beside_lists_of_messages(train, whole, stream):
    """As UltraFeedback and the paper's own pairs are stored; TRL fails on it, by the luck of a hash."""
    data = [
        row
        | {"prompt": row["prompt"][0]["content"]}
        | {side: row["prompt"] * whole + row[side] for side in ("chosen", "rejected")}
        for row in rows()
    ]
    data = Dataset.from_list(data)
    settings = {"per_device_train_batch_size": len(data), "steps": 2, "loss_type": "apo_blend"}
    expected = curve(train(data=Dataset.from_list(rows()), **settings))
    losses = curve(train(data=data.to_iterable_dataset() if stream else data, **settings))
    assert losses == pytest.approx(expected, rel=1e-5)


def test_nothing_left_is_an_error(train):
    with pytest.raises(InputError, match="train dataset are degenerate: 1 because chosen equals"):
        train(data=Dataset.from_list(USELESS[:2]))
    with pytest.raises(InputError, match=r"1 because the prompt alone fills max_length=40\. .* raise max_length"):
        train(data=Dataset.from_list(USELESS[3:]), max_length=40)


def test_a_stream_leaves_them_out_as_they_arrive(train, warned):
    data = Dataset.from_list([{k: v for k, v in row.items() if k != "chosen_wins"} for row in rows()] + USELESS[:2])
    trainer = train(data=data.to_iterable_dataset(), steps=4)
    assert sum("degenerate" in warning for warning in warned()) == 1
    assert len(list(trainer.train_dataset)) == 8


class TestModelCard:
    def text(self, trainer):
        trainer.create_model_card(model_name="tiny")
        with open(f"{trainer.args.output_dir}/README.md", encoding="utf-8") as card:
            return card.read()

    def test_names_apo_and_cites_its_paper(self, train, tmp_path):
        card = self.text(train(loss_type="apo_zero_norm", steps=1))
        assert "trained with APO" in card
        assert "2408.06266" in card
        assert "doosterlinck2025anchored" in card
        assert "rafailov2023direct" not in card
        assert "- apo" in card.split("---")[1]

    def test_stays_trls_for_its_other_losses(self, train):
        card = self.text(train(loss_type="sigmoid", steps=1))
        assert "trained with DPO" in card
        assert "2408.06266" not in card


def test_without_a_config_it_trains_with_apo_zero(model_dir, dataset, monkeypatch, tmp_path, train):
    # TRL's default, bfloat16, needs a GPU; nothing else is changed.
    class OnCPU(APOConfig):
        def __init__(self, output_dir):
            super().__init__(output_dir, use_cpu=True, bf16=False)

    monkeypatch.setattr("apo_trl.trainer.APOConfig", OnCPU)
    monkeypatch.chdir(tmp_path)
    trainer = APOTrainer(model=str(model_dir), train_dataset=dataset)
    assert trainer.args.loss_type == ["apo_zero"]
    assert trainer.args.output_dir == f"{model_dir.name}-APO"
