"""`register()`: explicit, idempotent, reversible, and the same as `APOTrainer`."""

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers.trainer
from conftest import curve
from test_cli import BIN, command
from trl import DPOConfig, DPOTrainer

import apo_trl
from apo_trl import InputError
from apo_trl.run import main
from apo_trl.training.lock import output_lock


@pytest.fixture(autouse=True)
def _unregister():
    yield
    apo_trl.unregister()


def state():
    return dict(vars(DPOTrainer)), dict(vars(DPOConfig))


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_importing_changes_nothing_and_loads_nothing_heavy():
    code = "import sys, apo_trl; print([name for name in ('torch', 'trl', 'transformers') if name in sys.modules])"
    assert python(code) == "[]"


@pytest.mark.slow
def test_importing_leaves_the_host_alone():
    code = """
import apo_trl, apo_trl.trainer
from trl import DPOTrainer, DPOConfig
before = dict(vars(DPOTrainer)), dict(vars(DPOConfig))
assert all(getattr(f, "__module__", "trl").startswith("trl") for f in before[0].values() if callable(f))
apo_trl.register()
assert dict(vars(DPOTrainer)) != before[0]
DPOConfig(loss_type="apo_zero_norm", bf16=False, use_cpu=True)
apo_trl.unregister()
assert (dict(vars(DPOTrainer)), dict(vars(DPOConfig))) == before
print("done")
"""
    assert python(code).endswith("done")


def test_twice_and_back():
    before = state()
    apo_trl.register()
    once = state()
    assert once != before
    apo_trl.register()
    assert state() == once
    apo_trl.unregister()
    assert state() == before
    apo_trl.unregister()
    assert state() == before


@pytest.mark.parametrize("loss_type", ["apo_zero_norm", "apo_blend", ["apo_zero", "sft"]], ids=str)
def test_the_plain_trainer_gives_the_curve_of_apo_trainer(train, loss_type):
    ours = train(loss_type=loss_type)
    apo_trl.register()
    theirs = train(DPOTrainer, DPOConfig, loss_type=loss_type)
    assert type(theirs).__name__ == "DPOTrainer"
    assert isinstance(theirs, DPOTrainer)
    for key in ("loss", "grad_norm", "apo/chosen_up", "rewards/margins"):
        assert curve(theirs, key) == curve(ours, key)


def test_what_the_class_of_a_trainer_becomes(train, tmp_path):
    """As the docstring of `register()` says: a subclass with TRL's name."""
    apo_trl.register()
    trainer = train(DPOTrainer, DPOConfig, run=False)
    assert isinstance(trainer, DPOTrainer)
    assert type(trainer) is not DPOTrainer
    assert (type(trainer).__name__, type(trainer).__module__) == (DPOTrainer.__name__, DPOTrainer.__module__)
    assert pickle.loads(pickle.dumps(trainer.args)).loss_type == trainer.args.loss_type
    with pytest.raises(pickle.PicklingError, match="DPOTrainer"):  # by its name, which is that of another class
        pickle.dumps(type(trainer))


def test_the_default_loss_stays_trls(train):
    apo_trl.register()
    trainer = train(DPOTrainer, DPOConfig, steps=1)
    assert trainer.args.loss_type == ["sigmoid"]
    assert curve(trainer)[0] == pytest.approx(0.693147, abs=1e-5)
    assert trainer._name == "DPO"


def test_a_wrong_loss_is_refused_when_the_plain_config_is_made():
    apo_trl.register()
    with pytest.raises(InputError, match=r"loss_type: 'apo_zer'.* Did you mean 'apo_zero'\?"):
        DPOConfig(loss_type="apo_zer", use_cpu=True, bf16=False)
    apo_trl.unregister()
    assert DPOConfig(loss_type="apo_zer", use_cpu=True, bf16=False).loss_type == ["apo_zer"]


def test_a_subclass_keeps_its_own_methods_in_front_of_ours(train):
    class Doubled(DPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.ready = True

        def _compute_loss(self, model, inputs, return_outputs):
            return 2 * super()._compute_loss(model, inputs, return_outputs)

    apo_trl.register()
    trainer = train(Doubled, DPOConfig, loss_type="apo_zero_norm", steps=1)
    assert trainer.ready
    assert isinstance(trainer, Doubled)
    assert curve(trainer)[0] == 2.0


def test_trainers_made_while_registered_keep_their_losses(train):
    apo_trl.register()
    trainer = train(DPOTrainer, DPOConfig, loss_type="apo_zero_norm", run=False)
    apo_trl.unregister()
    trainer.train()
    assert curve(trainer)[0] == 1.0


def test_apo_trainer_does_not_mind(train):
    expected = curve(train(loss_type="apo_zero_norm"))
    apo_trl.register()
    assert curve(train(loss_type="apo_zero_norm")) == expected


BODY = """
import json, sys
sys.path.insert(0, {tests!r})
from conftest import rows
from datasets import Dataset
from trl import DPOConfig, DPOTrainer
QUICK = dict(
    output_dir={folder!r}, max_steps=1, logging_steps=1, report_to="none", save_strategy="no", use_cpu=True, bf16=False,
    disable_tqdm=True, gradient_checkpointing=False,
)
MODEL = {model!r}
def fit(config):
    trainer = DPOTrainer(MODEL, args=config, train_dataset=Dataset.from_list(rows(4)))
    trainer.train()
    loss = round(trainer.state.log_history[0]["loss"], 3)
    print("RESULT", json.dumps([loss, config.loss_type, config.beta]))
"""
PLAIN = "fit(DPOConfig(loss_type='sigmoid', **QUICK))"
SIGMOID, ZERO = [0.693, ["sigmoid"], 0.1], [1.0, ["apo_zero_norm"], 5.0]
OPTIONS = ["--loss_type", "apo_zero_norm", "--beta", "5"]
TRL = """
from trl import TrlParser
quick = [part for key, value in QUICK.items() if key != "report_to" for part in (f"--{key}", str(value))]
(config,) = TrlParser(DPOConfig).parse_args_and_config([*quick, *sys.argv[1:]])
config.report_to = []
"""
SFT = """
from trl import SFTConfig, SFTTrainer
data = Dataset.from_list([{"text": "Two and two."}] * 4)
SFTTrainer(MODEL, args=SFTConfig(**QUICK), train_dataset=data).train()
"""
ARGPARSE = "import argparse\nparser = argparse.ArgumentParser()\n"


@pytest.fixture
def run(model_dir, tmp_path, capsys, monkeypatch):
    """Run a script in this process and return its results, and what else a user reads."""

    def run(source, *arguments, settings=(), status=0):
        monkeypatch.setattr(sys, "argv", list(sys.argv))
        monkeypatch.setattr(sys, "path", list(sys.path))
        for name in ("DEFAULT_PROGRESS_CALLBACK", "PrinterCallback"):
            monkeypatch.setattr(transformers.trainer, name, getattr(transformers.trainer, name))
        body = BODY.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "out"), model=str(model_dir))
        (tmp_path / "my.py").write_text(body + source)
        given = ["--set", *settings] if settings else []
        try:
            main([*given, str(tmp_path / "my.py"), *arguments])
            ended = 0
        except SystemExit as stop:
            ended = stop.code or 0
        printed = capsys.readouterr()
        assert ended == status, printed.err
        lines = printed.out.splitlines()
        return [json.loads(line.removeprefix("RESULT ")) for line in lines if line.startswith("RESULT ")], printed.err

    return run


class TestOptionsOfAScript:
    @pytest.mark.parametrize(
        ("source", "arguments", "error"),
        [
            (PLAIN, OPTIONS, "my.py does not read --loss_type --beta: .*loss_type=apo_zero_norm beta=5 [^ ]*my.py"),
            (PLAIN, ["--beta=5"], "--beta: .*--set beta=5 [^ ]*my.py"),
            (PLAIN, ["--loss_type", "sigmoid", "sft"], "--set 'loss_type=.sigmoid,sft.' [^ ]*my.py"),
            (PLAIN, ["--no_remove_unused_columns", "--use-cpu"], "--set remove_unused_columns=false use_cpu=true"),
            (PLAIN, ["--set", "beta=5"], "does not read --set: .*--set beta=5 [^ ]*my.py"),
            (PLAIN, ["--learning_rate", "1.234567e-5"], "learning_rate=1.234567e-05"),
            (PLAIN, ["--hub_token", "hf_secret"], "does not read --hub_token.(?!.*hf_secret)"),
            (PLAIN, ["--model_name_or_path", "m"], "does not read --model_name_or_path"),
            (PLAIN, ["--losstype", "sft"], "--losstype.* Did you mean '--loss_type'"),
            (PLAIN, ["out"], "does not read out"),
            (f"print(sys.argv[1], len(sys.argv))\n{PLAIN}", ["out", "--beta", "5"], "does not read --beta:"),
            (f"{ARGPARSE}parser.add_argument('--lora')\nparser.parse_known_args()\n{PLAIN}", ["--lora=1", "--bet", "5"],
             "does not read --bet.* Did you mean '--beta'"),
            (f"{ARGPARSE}parser.add_argument('--batch')\nparser.parse_known_args()\n{PLAIN}", ["--bach", "5"],
             "Did you mean '--batch'"),
            (SFT, ["--beta", "5"], "does not read --beta. Remove it"),  # `--set` is for DPO
            ("sys.exit(0)", ["--beta", "5"], "does not read --beta"),  # a script without a trainer
        ],
    )  # fmt: skip
    def test_one_that_the_script_does_not_read(self, run, source, arguments, error):
        results, printed = run(source, *arguments, status=2)
        assert results == []
        assert re.search(f"error: .*{error}", printed)

    @pytest.mark.parametrize(
        "source",
        [
            f"{TRL}\nfit(config)",
            f"{ARGPARSE}parser.add_argument('--loss_type')\nparser.add_argument('--beta', type=float)\n"
            "fit(DPOConfig(**vars(parser.parse_args()), **QUICK))",
            f"{ARGPARSE}parser.add_argument('--beta', type=float)\nfirst, rest = parser.parse_known_args()\n"
            "second = argparse.ArgumentParser()\nsecond.add_argument('--loss_type')\n"
            "fit(DPOConfig(beta=first.beta, loss_type=second.parse_args(rest).loss_type, **QUICK))",
            "given = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
            "fit(DPOConfig(loss_type=given['--loss_type'], beta=float(given['--beta']), **QUICK))",
            "assert '--loss_type' in sys.argv and '--beta' in sys.argv\n"
            "fit(DPOConfig(loss_type=sys.argv[2], beta=float(sys.argv[-1]), **QUICK))",
            f"{ARGPARSE}_, rest = parser.parse_known_args()\ngiven = dict(zip(*[iter(rest)] * 2))\n"
            "fit(DPOConfig(loss_type=given['--loss_type'], beta=float(given['--beta']), **QUICK))",
            "after = lambda name: sys.argv[sys.argv.index(name) + 1]\n"
            "fit(DPOConfig(loss_type=after('--loss_type'), beta=float(after('--beta')), **QUICK))",
        ],
        ids=["TrlParser", "argparse", "two parsers", "slices", "by position", "leftovers", "index"],
    )
    def test_options_that_the_script_reads(self, run, source):
        results, printed = run(source, *OPTIONS)
        assert results == [ZERO]
        assert "given" not in printed

    @pytest.mark.parametrize("value", ["true", "false"])
    def test_padding_free_can_be_set(self, run, value):
        """It is hidden from TRL, which would warn, while the trainer is built."""
        results, printed = run(PLAIN, settings=[f"padding_free={value}"])
        assert results == [SIGMOID]
        assert "later" not in printed

    def test_one_that_the_script_changes(self, run):
        """That is the script's wish; one line shows it, and none for `report_to`, which TRL converts."""
        results, printed = run(f"{TRL}\nconfig.beta *= 2\nfit(config)", *OPTIONS, "--report_to", "none")
        assert results == [[1.0, ["apo_zero_norm"], 10.0]]
        assert [line for line in printed.splitlines() if "given" in line] == [
            "beta: 5 was given, the DPOConfig of my.py has 10."
        ]

    def test_an_option_of_the_script_with_the_name_of_a_field(self, run):
        parser = f"{ARGPARSE}parser.add_argument('--beta', choices=['low', 'high'])\n"
        results, printed = run(f"{parser}parser.parse_args()\n{PLAIN}", "--beta", "low")
        assert results == [SIGMOID]
        assert "given" not in printed

    def test_keys_of_a_config_file(self, run, tmp_path):
        (tmp_path / "file.yaml").write_text("loss_type: apo_zero_norm\nbeta: 5.0\n")
        parsed = TRL.replace("_config([", "_config(fail_with_unknown_args=False, args=[") + "\nfit(config)"
        given = ["--config", str(tmp_path / "file.yaml")]
        assert run(parsed, *given)[0] == [ZERO]
        (tmp_path / "file.yaml").write_text("loss_type: apo_zero_norm\ntorch_dtype: bfloat16\n")
        assert re.search("does not read --torch_dtype", run(parsed, *given, status=2)[1])

    @pytest.mark.parametrize(
        "read",
        ["sys.argv[1:]", "list(sys.argv)", "[*sys.argv]", "sys.argv.copy()", "[sys.argv.pop(1), sys.argv.pop()]"],
    )
    def test_ways_of_reading_the_arguments(self, run, read):
        run(f"assert '--lora' in {read}", "--lora", "1")

    def test_started_processes_get_a_plain_list(self, run):
        source = "import pickle\nassert type(pickle.loads(pickle.dumps(sys.argv))) is list"
        assert "does not read --lora" in run(source, "--lora", status=2)[1]

    def test_the_script_is_the_main_module(self, run, tmp_path):
        (tmp_path / "sibling_of_mine.py").write_text("beta = 0.3")
        source = "def main():\n    from sibling_of_mine import beta\n    fit(DPOConfig(beta=beta, **QUICK))\n"
        assert run(f"{source}if __name__ == '__main__':\n    sys.exit(main())")[0] == [[0.693, ["sigmoid"], 0.3]]

    def test_a_folder_to_which_another_run_writes(self, run, tmp_path):
        with output_lock(tmp_path / "out"):
            results, printed = run(PLAIN, status=2)
        assert results == []
        assert re.search("error: output_dir: another run is writing to .*out", printed)
        assert len(run(f"{PLAIN}\n{PLAIN}")[0]) == 2  # a script that trains twice is one run

    @pytest.mark.slow
    def test_two_processes_stop_with_one_sentence(self, run, tmp_path):
        run(PLAIN)  # writes the script
        hardware = ["--num_processes", 2, "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no"]
        launch = [BIN / "accelerate", "launch", *hardware, "--multi_gpu", "-m", "apo_trl.run"]
        done = command(*launch, "--set", "loss_type=apo_zero_norm", tmp_path / "my.py", "--beta", 5)
        assert done.returncode == 1
        assert done.stderr.count("--set: loss_type sigmoid -> apo_zero_norm") == 1
        assert done.stderr.count("my.py does not read --beta") == 1


class TestSet:
    @pytest.mark.parametrize(
        ("source", "settings", "result", "line"),
        [
            (PLAIN, ["loss_type=apo_zero_norm", "beta=5"], ZERO, "loss_type sigmoid -> apo_zero_norm, beta 0.1 -> 5"),
            (PLAIN, ["beta=5.0", "loss_type=[apo_zero_norm]"], ZERO, "beta 0.1 -> 5, loss_type .* -> apo_zero_norm"),
            ("from apo_trl import APOConfig\nfit(APOConfig(**QUICK))", ["loss_type=apo_zero_norm", "beta=5"], ZERO,
             "loss_type apo_zero -> apo_zero_norm, beta 0.1 -> 5"),
            ("from dataclasses import dataclass\n@dataclass\nclass Mine(DPOConfig):\n    beta: float = 0.2\n"
             "fit(Mine(**QUICK))", ["beta=5", "loss_type=apo_zero_norm"], ZERO,
             "beta 0.2 -> 5, loss_type [^,]* -> apo_zero_norm"),
            ("QUICK |= dict(use_cpu=False, bf16=True)\n" + PLAIN, ["use_cpu=true", "bf16=false"], SIGMOID,
             "use_cpu false -> true, bf16 true -> false"),
        ],
    )  # fmt: skip
    def test_replaces_what_the_script_sets(self, run, source, settings, result, line):
        results, printed = run(source, settings=settings)
        assert results == [result]
        assert len(re.findall(f"^--set: {line}$", printed, re.MULTILINE)) == 1

    def test_is_repeatable_and_holds_for_every_configuration(self, run):
        results, printed = run(f"{PLAIN}\n{PLAIN}", settings=["beta=5", "--set", "loss_type=apo_zero_norm"])
        assert results == [ZERO, ZERO]
        assert printed.count("error") == 0

    def test_wins_over_an_option_of_the_script(self, run):
        results, printed = run(f"{TRL}\nfit(config)", *OPTIONS[:2], "--beta", "7", settings=["beta=5"])
        assert results == [ZERO]
        assert "--set: beta 7 -> 5" in printed

    @pytest.mark.parametrize(
        ("source", "setting", "error"),
        [
            (PLAIN, "loss_typ=sft", "--set: unknown key 'loss_typ'. Did you mean 'loss_type'"),
            (PLAIN, "beta=high", "--set: beta: .*'high'"),
            (PLAIN, "eval_strategy=often", "--set: eval_strategy: .*'often'"),
            (PLAIN, "loss_type=apo_zer", "loss_type: 'apo_zer'.* Did you mean 'apo_zero'"),
            (PLAIN, "loss_type", "--set: must be KEY=VALUE, got 'loss_type'"),
            (PLAIN, "group_by_prompt=true", "--set: group_by_prompt: .*DPOConfig of my.py"),
            ("config = DPOConfig(**QUICK)\nconfig.beta = 0.3\nfit(config)", "beta=5", "--set: beta: .*0.3 later"),
            ("sys.exit()", "beta=5", "--set: my.py has built no DPOConfig"),
        ],
    )
    def test_that_cannot_be_applied(self, run, source, setting, error):
        results, printed = run(source, settings=[setting], status=2)
        assert results == []
        assert re.search(f"error: {error}", printed)

    def test_is_for_dpo_after_sft(self, run):
        results, printed = run(f"{SFT}\n{PLAIN}", settings=["beta=5"])
        assert results == [[0.693, ["sigmoid"], 5.0]]
        assert "--set: not for the SFTConfig of my.py" in printed


@pytest.mark.parametrize(
    ("name", "error"),
    [("nowhere.py", "file not found"), ("my.ipynb", "jupyter nbconvert"), ("recipe.yaml", "apo-trl train")],
)
def test_what_is_no_script(name, error, tmp_path, capsys):
    if name != "nowhere.py":
        (tmp_path / name).touch()
    with pytest.raises(SystemExit):
        main([str(tmp_path / name)])
    assert re.search(rf"error: script: .*'{tmp_path / name}'.*{error}|error: script: {error}", capsys.readouterr().err)
