"""The commands as users type them, on the tiny model."""

import argparse
import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import trl
from conftest import rows
from datasets import Dataset

from apo_trl import train, unregister
from apo_trl.cli import main as cli
from apo_trl.training import script as train_script
from apo_trl.training.arguments import parse

BIN = Path(sys.executable).parent
DPO_SCRIPT = Path(trl.__file__).parent / "scripts" / "dpo.py"
QUICK = ["--max_steps", "2", "--logging_steps", "1", "--per_device_train_batch_size", "4", "--learning_rate", "1e-3"]
QUICK += [
    "--use_cpu",
    "--bf16",
    "false",
    "--gradient_checkpointing",
    "false",
    "--report_to",
    "none",
    "--save_strategy",
    "no",
]


def write(path, data):
    lines = "".join(json.dumps(row) + "\n" for row in data)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".parquet":
        Dataset.from_list(data).to_parquet(path)
    else:
        path.write_text(lines, encoding="utf-8")
    return path


@pytest.fixture
def arguments(model_dir, tmp_path):
    """A command line that trains; keyword arguments are added as options."""
    data = write(tmp_path / "pairs.jsonl", rows())

    def build(**options):
        options = {
            "model_name_or_path": model_dir,
            "dataset_name": data,
            "output_dir": tmp_path / "out",
        } | options
        given = [part for key, value in options.items() if value is not None for part in (f"--{key}", str(value))]
        return [*QUICK, *given]

    return build


def losses(folder):
    """The loss curve that a run left behind."""
    return [entry["loss"] for entry in json.loads((folder / "log.json").read_text()) if "loss" in entry]


def command(*arguments, **settings):
    """Run a command, as a user does."""
    settings |= {"capture_output": True, "text": True, "timeout": 300, "env": {**os.environ, "COLUMNS": "200"}}
    words = [str(argument) for argument in arguments]
    if "launch" in words and "--main_process_port" not in words:
        # Tests that run at once must not meet at one port.
        worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
        words[words.index("launch") + 1 : words.index("launch") + 1] = ["--main_process_port", str(29600 + worker)]
    done = subprocess.run(words, **settings)
    if "terminate called without an active exception" in done.stderr:
        # Torch on a busy CPU: a process that has finished may fail to join a thread of its own on the way out.
        done = subprocess.run(words, **settings)  # alone: tests count what one command prints
    return done


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["run", "--help"], ["pairs", "build", "--help"], ["--version"]]
)
def test_help_comes_at_once(arguments):
    def seconds():
        started = sum(os.times()[2:4])  # of the children on a processor: other programs do not count
        done = command(BIN / "apo-trl", *arguments)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
        return sum(os.times()[2:4]) - started

    assert min(seconds() for _ in range(3)) < 0.5


@pytest.mark.parametrize(
    "given",
    ["evaluate --model m --dataset d --limit 0", "evaluate --model m --dataset d --batch_size 0",
     "evaluate --model m --dataset d --max_length -1", "anchor --dataset d --policy p --limit -3",
     "bench --repeats 0", "bench --layers 1.5", "demo --max_steps x", "pairs stats d --max_length 0",
     "recipes plan r --gpu_memory 1 --gpus 0"],
)  # fmt: skip
def test_an_invalid_number(given, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(given.split())
    assert stop.value.code == 2
    option, value = given.split()[-2:]
    assert f"{option}: must be an integer >= 1, got '{value}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("evaluate --model m --dataset d --batchsize 2",
         "--batchsize: unknown option. Did you mean '--batch_size'? See `apo-trl evaluate --help`."),
        ("report run --outptu=secret", "--outptu: unknown option. Did you mean '--output'?"),
        ("recipes show x --frm secret", "See `apo-trl recipes show --help`."),
        ("compare --a a --b b --prompts p --judge j --judge_api_key secret", "environment variable"),
        ("pairs stats d --tokeniser secret", "Did you mean '--tokenizer'?"),
        ("merge a --output_dir m secret", "one argument too many. See"),
        ("--verbose", "--verbose: unknown option. Did you mean '--version'?"),
        ("anchor --policy p", "required: --dataset. See"),
        ("trian", "(choose from 'train'"),
    ],
)  # fmt: skip
def test_an_unknown_argument_is_not_repeated(given, words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(given.split())
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert words in message
    assert "secret" not in message
    assert message.count("\n") == 1


def parsers(parser):
    """A parser and those of all its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from parsers(child)


PARSERS = {parser.prog: parser for parser in parsers(cli.build_parser())}


def test_how_many_commands_there_are():
    assert len(PARSERS) == 1 + 13 + 5 + 5  # with those of `recipes` and of `pairs`


@pytest.mark.parametrize("name", PARSERS)
def test_every_help_ends_in_an_example_that_parses(name):
    _, _, ending = PARSERS[name].format_help().partition("\nexample:\n")
    (example,) = re.findall(r"^ *(apo-trl\b.*)", ending.replace("\\\n", ""), re.MULTILINE)
    assert example.startswith(name)
    options = cli.build_parser().parse_args(shlex.split(example)[1:])
    assert callable(options.run)
    if getattr(options, "rest", None) and name != "apo-trl rounds":  # whose keys are not TRL's
        parse([getattr(options, "name", "smollm2-135m/apo_zero_lora"), "--use_cpu", *options.rest[1:]])


def test_options_are_spelt_with_underscores():
    options = {option for parser in PARSERS.values() for option in parser._option_string_actions}
    assert len(options) > 100
    assert not {option for option in options if "-" in option.lstrip("-")}


@pytest.mark.parametrize("name", PARSERS)
def test_every_help_says_what_is_read_and_written_and_fits_a_terminal(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = PARSERS[name].format_help()
    assert max(map(len, text.splitlines())) <= 80
    if name not in ("apo-trl", "apo-trl pairs"):  # they only have commands
        assert re.search(r"\nreads:  .+\nwrites: .+\n", text)


def test_keys_of_the_recipe_may_follow_a_plan():
    options = cli.build_parser().parse_args(["recipes", "plan", "r", "--gpu_memory", "80", "--beta", "1"])
    assert (options.gpu_memory, options.rest) == (80, ["--beta", "1"])


@pytest.mark.parametrize("line", ["--traceback recipes show none", "recipes show none --traceback"])
def test_a_traceback_on_request(line, monkeypatch, capsys):
    def show(line):
        with pytest.raises(SystemExit) as stop:
            cli.main(line.split())
        return stop.value.code, capsys.readouterr().err

    monkeypatch.setenv("APO_TRL_TRACEBACK", "")
    status, message = show("recipes show none")
    assert "Traceback" not in message
    with_traceback = show(line)
    assert with_traceback[0] == status == 2
    assert "in find_recipe" in with_traceback[1]
    assert with_traceback[1].endswith(message)


def test_a_process_that_is_started_prints_its_traceback_too(monkeypatch, capsys):
    monkeypatch.setenv("APO_TRL_TRACEBACK", "1")
    with pytest.raises(SystemExit):
        train.main(["--config", "none.yaml"])
    assert "in find_recipe" in capsys.readouterr().err


class TestTrain:
    @pytest.mark.parametrize("name", ["pairs.jsonl.gz", "pairs.json", "pairs.parquet", "folder/train.jsonl"])
    def test_local_data(self, arguments, tmp_path, name):
        (tmp_path / "folder").mkdir()
        path = write(tmp_path / name, rows())
        train.main(arguments(dataset_name=path.parent if "folder" in name else path, loss_type="apo_zero_norm"))
        assert (tmp_path / "out" / "model.safetensors").is_file()

    def test_a_yaml_file_and_the_command_line_over_it(self, arguments, model_dir, tmp_path):
        config = tmp_path / "run.yaml"
        config.write_text(
            "loss_type: [apo_zero_norm, sft]\nloss_weights: [1.0, 0.1]\nbeta: 5\nlearning_rate: 1e-3\nuse_peft: true\n"
        )
        run, leftover = parse([*arguments(), f"--config={config}", "--beta", "2.5"])
        assert leftover == []
        assert run.training.loss_type == ["apo_zero_norm", "sft"]
        assert run.training.beta == 2.5
        train_script.train(run)
        assert (tmp_path / "out" / "adapter_model.safetensors").is_file()

    def test_a_recipe_by_name_or_file_comes_first(self, arguments, tmp_path):
        by_name = parse(["llama-3-8b/apo_zero_lora", *arguments()])[0]
        assert by_name.training.gradient_accumulation_steps == 16
        (tmp_path / "run.yaml").write_text("beta: 0.7\n")
        assert parse([str(tmp_path / "run.yaml"), *arguments()])[0].training.beta == 0.7

    def test_the_help_shows_one_spelling_and_both_work(self, arguments, capsys):
        with pytest.raises(SystemExit):
            parse(["--help"])
        assert "--learning_rate LEARNING_RATE\n" in (text := capsys.readouterr().out)
        assert "--learning-rate" not in text
        assert parse([*arguments(), "--weight-decay", "0.5"])[0].training.weight_decay == 0.5

    def test_the_default_loss_is_apo_zero(self, arguments):
        assert parse(arguments())[0].training.loss_type == ["apo_zero"]

    def test_a_mixture_of_datasets(self, arguments, tmp_path):
        config = tmp_path / "run.yaml"
        config.write_text(
            f"datasets:\n  - path: json\n    data_files: {tmp_path / 'pairs.jsonl'}\ntest_split_size: 0.25\n"
        )
        train.main(arguments(config=config, dataset_name=None, eval_strategy="steps", eval_steps=1))
        assert (tmp_path / "out" / "model.safetensors").is_file()

    def test_arguments_of_the_launcher_are_left_over(self, arguments, tmp_path):
        config = tmp_path / "run.yaml"
        config.write_text("num_processes: 1\n")
        _, leftover = parse([*arguments(config=config), "--accelerate_config", "zero2"])
        assert leftover == ["--num_processes", "1", "--accelerate_config", "zero2"]


BAD_DATA = {
    "a row without chosen": (
        [*rows(3), {"prompt": rows()[0]["prompt"], "rejected": rows()[0]["rejected"]}],
        "Row 3 of",
    ),
    "a column of the wrong type": ([row | {"rejected": 3} for row in rows()], "Row 0 of the train dataset has int as"),
    "a missing column": ([{"text": "a"}], "no column 'chosen'"),
    "no rows": ([], "no rows"),
}


class TestBadInput:
    """One message, exit status 2, nothing written."""

    def refused(self, arguments, capsys, tmp_path):
        with pytest.raises(SystemExit) as stop:
            train.main(arguments)
        assert stop.value.code == 2
        assert not (tmp_path / "out").exists()
        messages = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(messages) == 1
        return messages[0]

    @pytest.mark.parametrize("case", BAD_DATA)
    def test_bad_data(self, arguments, capsys, tmp_path, case):
        data, words = BAD_DATA[case]
        path = write(tmp_path / "bad.jsonl", data)
        assert words in self.refused(arguments(dataset_name=path), capsys, tmp_path)

    def test_a_missing_file(self, arguments, capsys, tmp_path):
        missing = tmp_path / "none.jsonl"
        message = self.refused(arguments(dataset_name=missing), capsys, tmp_path)
        assert re.search(f"dataset_name: .*{missing}", message)

    def test_a_broken_line(self, arguments, capsys, tmp_path):
        path = write(tmp_path / "bad.jsonl", rows(2))
        path.write_text(path.read_text() + '{"chosen": \n')
        assert "line 3 is not JSON" in self.refused(arguments(dataset_name=path), capsys, tmp_path)

    def test_a_file_cut_short(self, arguments, capsys, tmp_path):
        path = write(tmp_path / "bad.jsonl.gz", rows(50))
        path.write_bytes(path.read_bytes()[:-40])
        assert "breaks off or is damaged" in self.refused(arguments(dataset_name=path), capsys, tmp_path)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"dataset_name": "no/such-dataset"}, "'no/such-dataset': cannot be loaded"),
            ({"dataset_name": None}, "dataset_name: required"),
            ({"model_name_or_path": None}, "model_name_or_path: required"),
            ({"model_name_or_path": "no/such-model"}, "model_name_or_path: 'no/such-model' cannot be loaded"),
            (
                {"eval_strategy": "steps"},
                "dataset_test_split: the dataset has no split 'test'. Set one of ['train'], or eval_strategy",
            ),
            ({"dataset_train_split": "trian"}, "Did you mean 'train'?"),
            ({"loss_type": "apo_zer"}, "Did you mean 'apo_zero'?"),
            ({"lerning_rate": 1}, "--lerning_rate: unknown option. Did you mean '--learning_rate'?"),
            ({"beta": "high"}, "--beta: invalid float value: 'high'"),
            ({"truncation_mode": "middle"}, "--truncation_mode"),
        ],
        ids=str,
    )
    def test_bad_options(self, arguments, capsys, tmp_path, options, words):
        assert words in self.refused(arguments(**options), capsys, tmp_path)

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("betta: 0.1", "unknown key: 'betta'. Did you mean 'beta'?"),
            ("beta: [", "invalid YAML"),
            ("- beta", "must have `key: value` lines"),
            ("beta: high", "invalid float value: 'high'"),
            ("loss_type: apo_zeroo", "Did you mean 'apo_zero'?"),
        ],
    )
    def test_bad_yaml(self, arguments, capsys, tmp_path, text, words):
        config = tmp_path / "run.yaml"
        config.write_text(text + "\n")
        assert words in self.refused(arguments(config=config), capsys, tmp_path)

    def test_a_missing_yaml(self, arguments, capsys, tmp_path):
        assert "recipe: " in self.refused(arguments(config=tmp_path / "none.yaml"), capsys, tmp_path)

    def test_a_yaml_file_without_its_option(self, arguments, capsys, tmp_path):
        (tmp_path / "run.yaml").write_text("beta: 0.1\n")
        words = "belongs to no option. Put a recipe or YAML file first, or after --config"
        assert words in self.refused([*arguments(), str(tmp_path / "run.yaml")], capsys, tmp_path)

    def test_config_without_a_file(self, arguments, capsys, tmp_path):
        assert "--config: required value missing" in self.refused([*arguments(), "--config"], capsys, tmp_path)


@pytest.mark.slow
class TestProcesses:
    """The same through real processes: what a user sees on the screen."""

    def test_apo_trl_train_with_a_bad_row(self, arguments, tmp_path):
        data = write(tmp_path / "bad.jsonl", BAD_DATA["a row without chosen"][0])
        done = command(BIN / "apo-trl", "train", *arguments(dataset_name=data))
        assert done.returncode != 0
        assert "Traceback" not in done.stderr
        assert done.stderr.count("error: Row 3 of the train dataset has no 'chosen'") == 1

    def test_apo_trl_train_with_a_bad_launcher_config(self, arguments):
        done = command(BIN / "apo-trl", "train", *arguments(), "--accelerate_config", "zero99")
        assert done.returncode == 2
        assert "zero99" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.fixture(autouse=True)
def _unregister():
    yield
    unregister()
