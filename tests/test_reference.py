"""The cache of reference log-probs: what is served from it, what never is, and what TRL's own does instead.

What is counted are the rows that go through the backbone, whoever asks for them; what is compared are the log-probs
that end up in the dataset, and the losses of training without any cache.
"""

import contextlib
import hashlib
import logging
import sqlite3
import threading

import pytest
import torch
from conftest import curve, make_model, make_tokenizer, rows
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from test_cli import BIN, QUICK, command, write
from test_parity import LORA, same
from transformers import LlamaModel
from trl import DPOConfig, DPOTrainer

from apo_trl import APOConfig, APOTrainer, InputError, register, unregister
from apo_trl.io import resources as recipes
from apo_trl.reference_cache import fingerprint
from apo_trl.reference_cache.cache import pair_key
from apo_trl.reference_cache.fingerprint import reference_fingerprint
from apo_trl.reference_cache.store import ReferenceStore

COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


@pytest.fixture
def scored(monkeypatch):
    """The rows of every forward through the backbone, two for each pair."""
    batches = []
    forward = LlamaModel.forward

    def counted(self, *args, **kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        batches.append(ids.shape[0])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", counted)
    return batches


@pytest.fixture
def stored(train, tmp_path, scored):
    """Make a trainer that precomputes, and give it with the number of pairs that it had to forward."""

    def run(*classes, run=False, **settings):
        given = {"precompute_ref_log_probs": True, "run": run}
        if not classes:
            given["ref_cache_dir"] = str(tmp_path / "cache")
        before = len(scored)
        trainer = train(*classes, **(given | settings))
        return trainer, sum(scored[before:]) // 2

    return run


@pytest.fixture
def on_disk(tmp_path):
    """Rows loaded as users load them, so that TRL finds its own cache files again."""

    def load(number=8):
        path = write(tmp_path / f"pairs{number}.jsonl", rows(number))
        return load_dataset("json", data_files=str(path), cache_dir=str(tmp_path / "datasets"), split="train")

    return load


def values(trainer, dataset=None):
    dataset = trainer.train_dataset if dataset is None else dataset
    return torch.tensor([dataset[column] for column in COLUMNS])


def files(tmp_path, pattern="*"):
    return sorted((tmp_path / "cache").glob(pattern))


def truth(train, **settings):
    """The log-probs of the train dataset from TRL's own method, with no cache, on the trainer's own batches."""
    trainer = train(DPOTrainer, DPOConfig, run=False, **settings)
    reference = trainer.model if trainer.ref_model is None else trainer.ref_model
    sides = [trainer.compute_ref_log_probs(reference, trainer.data_collator([row])) for row in trainer.train_dataset]
    return torch.tensor([[chosen.item() for chosen, _ in sides], [rejected.item() for _, rejected in sides]])


def close(ours, theirs):
    assert ours.shape == theirs.shape
    assert ours.shape[1] > 0
    assert torch.allclose(ours, theirs, atol=1e-4, rtol=0)


class TestDefectsOfTheHost:
    """On plain TRL the defect is there; with us it is not. The day the first half fails, TRL has mended it."""

    def test_an_unrelated_setting_computes_everything_again(self, stored, on_disk, tmp_path):
        for changed in ({"learning_rate": 1e-4}, {"output_dir": str(tmp_path / "elsewhere")}):
            data = on_disk()
            pairs = [stored(*HOST, data=data, **more)[1] for more in ({}, {}, changed)]
            assert pairs[1:] == [0, 8], "of TRL"  # twice the same is found, anything else is not
        assert [stored(data=on_disk(), **more)[1] for more in ({}, {}, changed)] == [8, 0, 0]

    def test_ld_alpha_serves_the_sums_without_it(self, train, stored, on_disk):
        settings = {"data": on_disk(), "max_length": None}
        right = truth(train, **settings, ld_alpha=0.0)
        plain, changed = stored(*HOST, **settings)[0], stored(*HOST, **settings, ld_alpha=0.0)[0]
        assert torch.equal(values(changed), values(plain)), "TRL is stale"
        assert (values(changed) - right).abs().max() > 1

        assert stored(**settings)[1] == 8
        changed, pairs = stored(**settings, ld_alpha=0.0)
        assert pairs == 8
        close(values(changed), right)
        assert [stored(**settings, ld_alpha=alpha)[1] for alpha in (None, 0.0, 0.5)] == [0, 0, 8]

    def test_keep_end_serves_the_log_probs_of_whole_texts(self, train, stored, on_disk):
        settings = {"data": on_disk(), "truncation_mode": "keep_end"}
        right = truth(train, **settings, max_length=4)
        whole, cut = stored(*HOST, **settings, max_length=64)[0], stored(*HOST, **settings, max_length=4)[0]
        assert torch.equal(values(cut), values(whole)), "TRL is stale"
        assert (values(cut) - right).abs().max() > 1

        assert stored(**settings, max_length=64, keep_degenerate_pairs=True)[1] == 8
        cut, pairs = stored(**settings, max_length=4, keep_degenerate_pairs=True)
        assert pairs > 0
        close(values(cut), right)


HOST = (DPOTrainer, DPOConfig)


def test_a_second_run_forwards_the_policy_only(stored, scored):
    first, pairs = stored(run=True)
    assert pairs == 8 + 4 * 4  # the reference, then four steps of four pairs
    del scored[:]
    second, _ = stored(run=True, learning_rate=1e-4)
    assert scored == [8, 8, 8, 8]
    assert curve(second)[0] == curve(first)[0]
    assert curve(second)[1:] != curve(first)[1:]


def adapted(seed=3, **settings):
    shape = dict(r=4, target_modules="all-linear", init_lora_weights=False)
    model = make_model()
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(**(shape | settings)))


CASES = {
    "full": dict,
    "lora": lambda: {"peft_config": LORA},
    "lora of the embeddings": lambda: {
        "peft_config": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    },
    "a trained adapter": lambda: {"model": adapted(), "processing_class": make_tokenizer()},
    "explicit": lambda: {"ref_model": make_model(seed=1)},
    "ld_alpha": lambda: {"ld_alpha": 0.25, "ref_model": make_model(seed=1)},
    "keep_end": lambda: {"truncation_mode": "keep_end", "max_length": 12, "ref_model": make_model(seed=1)},
    "multiples": lambda: {"pad_to_multiple_of": 8},
    "bfloat16": lambda: {"bf16": True},
    "blend": lambda: {"loss_type": "apo_blend"},
    "mixture": lambda: {"loss_type": ["apo_zero_norm", "sigmoid"], "loss_weights": [1.0, 0.5]},
}


@pytest.mark.parametrize("case", CASES)
def test_losses_equal_those_of_computing_online(train, stored, case):
    settings = {"loss_type": "apo_zero", "beta": 1.0}
    online = train(**settings | CASES[case]())
    for expected in (8, 0):
        cached, pairs = stored(run=True, **settings | CASES[case]())
        assert pairs == expected + 16
        # In bfloat16 another padding is another rounding, and one of a sum of 20 log-probs is 1e-2.
        same(curve(cached), curve(online), 2e-2 if case == "bfloat16" else 1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "apo_down"},
        {"loss_type": "apo_blend"},
        {"beta": 3.0},
        {"max_length": 500},
        {"max_length": None},
        {"per_device_train_batch_size": 1},
        {"precompute_ref_batch_size": 3},
        {"pad_to_multiple_of": 8},
        {"num_train_epochs": 7},
        {"seed": 5},
        {"truncation_mode": "keep_end"},
        {"peft_config": LORA},  # its reference is the base
    ],
    ids=lambda settings: "-".join(settings),
)
def test_what_does_not_enter_the_values_is_found(stored, settings):
    first, _ = stored()
    second, pairs = stored(**settings)
    assert pairs == 0
    assert torch.equal(values(first), values(second))


@pytest.mark.parametrize(
    ("settings", "pairs"),
    [
        (lambda: {"model": other_model(), "processing_class": make_tokenizer()}, 8),
        (lambda: {"ref_model": make_model(seed=1)}, 8),
        (lambda: {"ref_model": make_model(rms_norm_eps=1e-3)}, 8),
        (lambda: {"ref_model": make_model().bfloat16()}, 8),
        (lambda: {"model": adapted(), "processing_class": make_tokenizer()}, 8),
        (lambda: {"bf16": True}, 8),
        (lambda: {"max_length": 25}, 7),  # both sides of one pair are no longer than that
        (lambda: {"ld_alpha": 0.5}, 8),
        (lambda: {"model_init_kwargs": {"attn_implementation": "eager"}}, 8),
    ],
    ids=["weight", "reference", "epsilon", "dtype", "adapter", "autocast", "truncation", "ld_alpha", "attention"],
)
def test_what_enters_the_values_is_computed(stored, settings, pairs):
    stored()
    assert stored(**settings())[1] == pairs
    assert stored(**settings())[1] == 0


def other_model():
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] += 1e-4
    return model


WORD = [{"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8]}]


def test_dropout_does_not_get_into_what_is_kept(stored):
    settings = [{"model": adapted(lora_dropout=rate), "processing_class": make_tokenizer()} for rate in (0.0, 0.5)]
    without, dropped = (stored(disable_dropout=False, **given)[0] for given in settings)
    dropped.model.train()
    dropped._precompute_ref_logps(Dataset.from_list(dropped.train_dataset.to_list() + WORD), "extra", 4)
    assert dropped.model.training, "as it was"
    close(values(dropped), values(without))


class TestRows:
    def test_order_and_subset_do_not_matter_and_only_new_rows_are_computed(self, train, stored):
        data = Dataset.from_list(rows(12))
        assert stored(data=data.select(range(6)))[1] == 6
        assert stored(data=data.select([5, 1, 3]))[1] == 0
        shuffled = data.shuffle(seed=1)
        trainer, pairs = stored(data=shuffled)
        assert pairs == 6
        close(values(trainer), truth(train, data=shuffled))

    def test_a_pair_that_comes_twice_is_computed_once(self, train, stored):
        data = Dataset.from_list([*rows(3), *rows(5)])
        trainer, pairs = stored(data=data)
        assert pairs == 5
        assert torch.equal(values(trainer)[:, :3], values(trainer)[:, 3:6])

    def test_the_others_columns_stay_and_old_values_do_not(self, stored, tmp_path):
        trainer, _ = stored()
        again = trainer._precompute_ref_logps(
            trainer.train_dataset.map(lambda row: {"ref_chosen_logps": 1.0}), "train", 4
        )
        assert again.column_names == trainer.train_dataset.column_names
        assert torch.equal(values(trainer, again), values(trainer))
        assert {"chosen", "prompt_ids", "chosen_wins"} <= set(again.column_names)

    def test_the_boundary_of_prompt_and_completion_counts(self, stored):
        trainer, _ = stored()
        row = {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [9]}
        moved = {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [7, 9]}
        batches = [trainer.data_collator([pair]) for pair in (row, moved)]
        assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
        assert len({pair_key("f", batch, None) for batch in batches}) == 2

    def test_a_key_is_that_of_the_pair(self, stored):
        """Each side, the order of the sides, and the reference's own name; not what a row carries besides."""
        trainer, _ = stored()
        row = {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [9]}
        swapped = {"prompt_ids": [5, 6, 7], "chosen_ids": [9], "rejected_ids": [8, 9]}

        def key(pair, fingerprint="f", alpha=None, **more):
            return pair_key(fingerprint, trainer.data_collator([pair]) | more, alpha)

        same_pair = [key(row), key(row, chosen_wins=torch.ones(1)), key(row | dict.fromkeys(COLUMNS, 1.0))]
        assert len(set(same_pair)) == 1
        others = [key(swapped), key(row, "g"), key(row, alpha=1.0), key(row, pixel_values=torch.ones(2))]
        assert len({*same_pair, *others}) == 5


class TestEvaluation:
    def test_of_several_datasets_that_share_rows_with_training(self, train, stored, dataset):
        sets = {"seen": dataset.select(range(4)), "new": Dataset.from_list(rows(11)).select(range(6, 11))}
        trainer, pairs = stored(eval_dataset=sets, per_device_eval_batch_size=4)
        assert pairs == 8 + 3
        online = train(eval_dataset=sets, run=False, per_device_eval_batch_size=4).evaluate()
        metrics = trainer.evaluate()
        for name in sets:
            assert metrics[f"eval_{name}_loss"] == pytest.approx(online[f"eval_{name}_loss"], abs=1e-5)

    @pytest.mark.parametrize("peft_config", [None, LORA], ids=["explicit", "lora"])
    def test_of_a_dataset_given_after_training(self, stored, scored, dataset, peft_config):
        settings = {"peft_config": peft_config} if peft_config else {"ref_model": make_model(seed=1)}
        trainer, _ = stored(run=True, loss_type="apo_blend", **settings)
        del scored[:]
        trainer.evaluate(dataset)
        assert scored == [16], "of the policy"
        extra = Dataset.from_list(rows(10))
        cached = trainer.evaluate(extra)["eval_loss"]
        assert scored == [16, 4, 16, 4], "two new pairs of the reference, ten of the policy"
        trainer.precompute_ref_logps = False
        assert cached == pytest.approx(trainer.evaluate(extra)["eval_loss"], abs=1e-5)

    def test_of_weights_that_were_changed_by_hand(self, stored):
        """They are a reference of their own, and must not be taken for the model that was loaded."""
        trainer, _ = stored()
        trainer.model.load_state_dict(make_model(seed=1).state_dict())
        trainer.evaluate(Dataset.from_list(rows(12)))
        _, pairs = stored(data=Dataset.from_list(rows(12)))
        assert pairs == 4

    @pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias")  # peft says so too
    def test_after_training_biases_that_belong_to_the_reference_too(self, stored, dataset):
        """bias="all" trains the base: what is computed then must not be taken for the reference of the beginning."""

        def settings():
            peft_config = LoraConfig(r=4, target_modules="all-linear", bias="all")
            return {"model": make_model(attention_bias=True), "peft_config": peft_config, "learning_rate": 0.1}

        trainer, _ = stored(run=True, processing_class=make_tokenizer(), **settings())
        before = values(trainer)
        trainer.evaluate(Dataset.from_list(rows(12)))
        again, pairs = stored(processing_class=make_tokenizer(), data=Dataset.from_list(rows(12)), **settings())
        assert pairs == 4
        assert torch.equal(values(again)[:, :8], before)

    def test_a_stream_is_refused_in_trls_words(self, stored, dataset):
        for classes in ((), HOST):
            with pytest.raises(ValueError, match="not supported with IterableDataset"):
                stored(*classes, data=dataset.to_iterable_dataset())


class TestInterruption:
    def test_a_run_goes_on_where_it_stopped(self, train, stored, monkeypatch):
        compute, calls = DPOTrainer.compute_ref_log_probs, []

        def interrupted(self, model, inputs):
            calls.append(len(inputs["input_ids"]) // 2)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return compute(self, model, inputs)

        with monkeypatch.context() as patch:
            patch.setattr(DPOTrainer, "compute_ref_log_probs", interrupted)
            with pytest.raises(KeyboardInterrupt):
                stored(precompute_ref_batch_size=2)
        assert calls == [2, 2, 2]
        trainer, pairs = stored(precompute_ref_batch_size=2)
        assert pairs == 4
        close(values(trainer), truth(train))

    @pytest.mark.slow
    def test_a_killed_process_leaves_what_it_had(self, stored, model_dir, tmp_path):
        script = tmp_path / "killed.py"
        script.write_text(
            "import os, signal, sys\n"
            "from trl import DPOTrainer\n"
            "from apo_trl import train\n"
            "compute, calls = DPOTrainer.compute_ref_log_probs, []\n"
            "def killed(*args):\n"
            "    calls.append(0)\n"
            "    if len(calls) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
            "    return compute(*args)\n"
            "DPOTrainer.compute_ref_log_probs = killed\n"
            "train.main(sys.argv[1:])\n"
        )
        given = [
            *QUICK,
            "--model_name_or_path",
            model_dir,
            "--output_dir",
            tmp_path / "out",
            "--precompute_ref_log_probs",
        ]
        given += ["--dataset_name", write(tmp_path / "pairs.jsonl", rows()), "--ref_cache_dir", tmp_path / "cache"]
        done = command(BIN / "python", script, *given, "--precompute_ref_batch_size", 2)
        assert done.returncode == -9, done.stderr[-2000:]
        assert stored()[1] == 4


def flip(path):
    """Change one stored number, as a failing disk may; SQLite's own check does not see it."""
    with contextlib.closing(sqlite3.connect(path)) as file, file:
        file.execute("UPDATE pairs SET chosen = chosen + 1e-3 WHERE key = (SELECT min(key) FROM pairs)")


def foreign(path):
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as file, file:
        file.execute("CREATE TABLE pairs (something INTEGER)")


DAMAGE = {
    "garbage": lambda path: path.write_bytes(b"not a database" * 1000),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "zeros": lambda path: path.write_bytes(path.read_bytes()[:4096] + bytes(path.stat().st_size - 4096)),
    "flip": flip,
    "foreign": foreign,
}


class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGE)
    def test_is_reported_set_aside_and_computed_again(self, train, stored, tmp_path, caplog, damage):
        stored()
        (path,) = files(tmp_path)
        DAMAGE[damage](path)
        broken = path.read_bytes()
        with caplog.at_level(logging.WARNING):
            trainer, pairs = stored()
        assert pairs == 8
        close(values(trainer), truth(train))
        aside = path.with_name(f"{path.name}.damaged-1")
        assert files(tmp_path) == [path, aside]
        assert aside.read_bytes() == broken
        (message,) = [r.getMessage() for r in caplog.records if "damaged" in r.getMessage()]
        assert str(path) in message
        assert aside.name in message
        assert stored()[1] == 0

    def test_a_second_time_keeps_the_first(self, stored, tmp_path):
        stored()
        (path,) = files(tmp_path)
        for number in (1, 2):
            path.write_bytes(b"not a database" * 100 * number)
            assert stored()[1] == 8
            assert len(files(tmp_path, "*.damaged-*")) == number

    def test_a_file_under_another_references_name_serves_nothing(self, stored, tmp_path):
        stored()
        (path,) = files(tmp_path)
        assert stored(ref_model=make_model(seed=1))[1] == 8
        (other,) = set(files(tmp_path)) - {path}
        path.replace(other)
        assert stored(ref_model=make_model(seed=1))[1] == 8


KEYS = [hashlib.sha256(str(i).encode()).digest() for i in range(400)]


class TestStore:
    def test_several_write_at_once(self, tmp_path):
        path = tmp_path / "cache" / "x.sqlite"
        faults = []

        def fill(process):
            try:
                store = ReferenceStore(path)
                for at in range(process, len(KEYS), 3):
                    store.write({key: (float(at), -float(at)) for key in KEYS[at : at + 2]})
                assert not store._full
                store.close()
            except BaseException as fault:
                faults.append(fault)

        writers = [threading.Thread(target=fill, args=(process,)) for process in range(4)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert faults == []
        store = ReferenceStore(path)
        assert len(store.read(KEYS)) == len(KEYS)
        store.close()
        assert files(tmp_path) == [path]

    def test_damage_to_what_is_not_asked_for_is_found_at_opening(self, tmp_path):
        path = tmp_path / "cache" / "x.sqlite"
        store = ReferenceStore(path)
        store.write(dict.fromkeys(KEYS, (0.0, 0.0)))
        store.close()
        ReferenceStore(path).close()
        assert files(tmp_path) == [path]
        path.write_bytes(path.read_bytes()[:-4096] + bytes(4096))
        ReferenceStore(path).close()
        assert files(tmp_path) == [path, path.with_name("x.sqlite.damaged-1")]

    def test_gives_back_exactly_what_was_written_and_nothing_else(self, tmp_path):
        store = ReferenceStore(tmp_path / "x.sqlite")
        logps = (-float(torch.tensor(0.1).exp()), -1e-30)
        store.write({KEYS[0]: logps, KEYS[1]: (float("nan"), 0.0), KEYS[2]: (0.0, float("-inf"))})
        assert store.read(KEYS[:4]) == {KEYS[0]: logps}
        store.close()

    def test_a_full_disk_ends_the_writing_and_not_the_run(self, train, stored, tmp_path, caplog, monkeypatch):
        write_rows = ReferenceStore.write

        def on_a_full_disk(self, values):
            self._file.execute("PRAGMA max_page_count=1")
            write_rows(self, {**values, **dict.fromkeys(KEYS, (0.0, 0.0))})

        monkeypatch.setattr(ReferenceStore, "write", on_a_full_disk)
        with caplog.at_level(logging.WARNING):
            trainer, _ = stored(precompute_ref_batch_size=2)
        close(values(trainer), truth(train))
        messages = [r.getMessage() for r in caplog.records if "no longer written" in r.getMessage()]
        assert len(messages) == 1
        assert "full" in messages[0]


class TestSettings:
    def test_a_folder_that_cannot_be_written_is_one_sentence_before_anything_loads(self, tmp_path):
        (tmp_path / "file").write_text("in the way")
        for folder in ("file", "file/below"):
            config = APOConfig(
                str(tmp_path), use_cpu=True, precompute_ref_log_probs=True, ref_cache_dir=str(tmp_path / folder)
            )
            with pytest.raises(
                InputError, match=r"ref_cache_dir: .* Set it to a folder that can be written\.$"
            ) as refusal:
                APOTrainer(model="no/such-model", args=config, train_dataset=Dataset.from_list(rows()))
            assert str(tmp_path / folder) in str(refusal.value)

    def test_a_file_that_cannot_be_opened_is_the_same_sentence(self, stored, tmp_path):
        stored()
        (path,) = files(tmp_path)
        path.unlink()
        path.mkdir()
        with pytest.raises(InputError, match=r"ref_cache_dir: .* Set it to a folder"):
            stored()

    def test_without_precompute_the_folder_does_nothing_and_says_so(self, train, tmp_path, caplog):
        with caplog.at_level(logging.WARNING):
            train(run=False, ref_cache_dir=str(tmp_path / "cache"))
        assert "ref_cache_dir has no effect without precompute_ref_log_probs=True" in caplog.text
        assert not (tmp_path / "cache").exists()

    def test_plain_trl_uses_the_folder_of_datasets_when_registered(self, stored, tmp_path, monkeypatch):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
        register()
        try:
            assert [stored(*HOST, learning_rate=rate)[1] for rate in (1e-3, 1e-4)] == [8, 0]
        finally:
            unregister()
        assert len(list((tmp_path / "apo-trl").glob("reference-*.sqlite"))) == 1

    def test_one_file_for_each_reference(self, stored, tmp_path):
        for settings in ({}, {"beta": 1.0}, {"ld_alpha": 0.5}, {"ref_model": make_model(seed=1)}):
            stored(**settings)
        assert len(files(tmp_path)) == 2

    def test_the_bar_tells_how_much_was_found(self, stored, capfd):
        stored(disable_tqdm=False)
        stored(disable_tqdm=False, data=Dataset.from_list(rows(10)))
        shown = capfd.readouterr().err
        assert "train dataset, 0 of 8 pairs from the cache" in shown
        assert "train dataset, 8 of 10 pairs from the cache" in shown
        assert shown.count("10/10") >= 1


class TestFingerprint:
    @pytest.fixture
    def of(self, train):
        def fingerprint(**settings):
            return reference_fingerprint(train(run=False, precompute_ref_log_probs=False, **settings))

        return fingerprint

    def test_an_adapter_has_its_bases_but_not_its_own_scale(self, of):
        def policy(**settings):
            return {"model": adapted(**settings), "processing_class": make_tokenizer()}

        adapter = of(**policy())
        assert of(**policy()) == adapter
        assert len({adapter, of(**policy(lora_alpha=99)), of(**policy(seed=4)), of(peft_config=LORA)}) == 4

    def test_the_precision_of_the_forward_counts_and_who_casts_where_any_does(self, train, monkeypatch):
        trainer = train(run=False)
        cases = [("no", False), ("no", True), ("bf16", False), ("bf16", True), ("fp16", False)]
        found = []
        for precision, deepspeed in cases:
            patched = property(lambda self, precision=precision: precision)
            monkeypatch.setattr(type(trainer.accelerator), "mixed_precision", patched)
            trainer.is_deepspeed_enabled = deepspeed
            found.append(reference_fingerprint(trainer))
        assert found[0] == found[1]
        assert len(set(found)) == 4

    def test_neither_training_an_adapter_nor_its_start_counts(self, train):
        trainer = train(peft_config=LORA, steps=1)
        other = LoraConfig(r=8, target_modules=["q_proj"], modules_to_save=["lm_head"])
        assert reference_fingerprint(trainer) == reference_fingerprint(train(peft_config=other, run=False))

    def test_the_scales_of_quantised_weights_count(self, of, model_dir):
        """A layer twice as large has the same 4-bit codes."""
        bitsandbytes = pytest.importorskip("bitsandbytes")
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        def quantised(scale):
            model = make_model()
            with torch.no_grad():
                model.model.layers[0].mlp.up_proj.weight.mul_(scale)
            model.save_pretrained(model_dir.parent / f"scaled-{scale}")
            config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
            model = AutoModelForCausalLM.from_pretrained(
                model_dir.parent / f"scaled-{scale}", quantization_config=config
            )
            return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))

        models = [quantised(scale) for scale in (1, 2)]
        weights = [model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight for model in models]
        assert isinstance(weights[0], bitsandbytes.nn.Params4bit)
        assert torch.equal(weights[0].data, weights[1].data)
        first, second = (of(model=model, processing_class=make_tokenizer()) for model in models)
        assert first != second
        assert first == of(model=quantised(1), processing_class=make_tokenizer())

    def test_weights_that_are_not_there_turn_the_cache_off(self, train, stored, tmp_path, monkeypatch, caplog):
        found = fingerprint._all_tensors

        def with_one_away(model):
            yield from found(model)
            yield "away", torch.empty(3, device="meta")

        monkeypatch.setattr(fingerprint, "_all_tensors", with_one_away)
        with caplog.at_level(logging.WARNING):
            runs = [stored() for _ in range(2)]
        assert [pairs for _, pairs in runs] == [8, 8]
        close(values(runs[1][0]), truth(train))
        assert "neither read from the cache nor written to it" in caplog.text
        assert files(tmp_path, "*.sqlite") == []

    def test_processes_with_different_weights_are_refused(self, stored, monkeypatch):
        monkeypatch.setattr(fingerprint, "gather_object", lambda own: [*own, "another"])
        with pytest.raises(
            InputError, match=r"precompute_ref_log_probs: .*different weights.*precompute_ref_log_probs=False"
        ):
            stored()


def test_names_of_the_host_that_are_used():
    """Where TRL moves one of them, this fails by name; the override would else never be called."""
    import inspect

    from transformers import Trainer
    from trl.models import prepare_deepspeed

    assert list(inspect.signature(DPOTrainer._precompute_ref_logps).parameters) == [
        *("self", "dataset", "name", "batch_size")
    ]
    assert list(inspect.signature(prepare_deepspeed).parameters) == ["model", "accelerator"]
    assert list(inspect.signature(Trainer._remove_unused_columns).parameters)[:3] == ["self", "dataset", "description"]
    source = inspect.getsource(DPOTrainer)
    assert source.count("self._precompute_ref_logps(") == 5
    for name in ("self._precompute_engine", "self.is_deepspeed_enabled", "self.is_fsdp_enabled", '"ref"'):
        assert name in source


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hardware", "peft", "known"),
    [("ddp", False, 0), ("zero2", False, 4), ("zero3", False, 4), ("zero3", False, 11), ("zero3", True, 0),
     ("fsdp2", False, 4)],
)  # fmt: skip
def test_two_processes(train, stored, model_dir, tmp_path, hardware, peft, known):
    """They read what one process has stored, also of another learning rate, and add the rest, an odd number."""
    settings = {"peft_config": LORA} if peft else {}
    data = Dataset.from_list(rows(11))
    if known:
        assert stored(data=data.select(range(known)), **settings)[1] == known
    given = [*QUICK, "--precompute_ref_log_probs", "--model_name_or_path", model_dir, "--learning_rate", 1e-4]
    given += ["--ref_cache_dir", tmp_path / "cache", "--dataset_name", write(tmp_path / "pairs.jsonl", rows(11))]
    given += ["--output_dir", tmp_path / "out", "--per_device_train_batch_size", 2]
    given += ["--use_peft", "--lora_target_modules", "all-linear"] if peft else []
    hardware_file = recipes.recipe_folder() / "accelerate" / f"{hardware}.yaml"
    start = [BIN / "accelerate", "launch", "--config_file", hardware_file, "--num_processes", 2]
    start += ["--num_machines", 1, "--mixed_precision", "no", "-m", "apo_trl.train"]
    done = command(*start, *given)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Trained to step 2 ") == 1
    assert f"{known} of 11 pairs from the cache" in done.stderr

    assert len(files(tmp_path)) == 1
    alone, pairs = stored(data=data, **settings)
    assert pairs == 0
    close(values(alone), truth(train, data=data, **settings))
