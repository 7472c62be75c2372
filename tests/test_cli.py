"""The commands as users type them, on the tiny model."""

import gzip
import json
import os
import subprocess
import sys
import time
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
    """Run a command of ours, as a user does."""
    settings |= {"capture_output": True, "text": True, "timeout": 300, "env": {**os.environ, "COLUMNS": "200"}}
    words = [str(argument) for argument in arguments]
    if "launch" in words and "--main_process_port" not in words:
        # Tests that run at once must not meet at one port.
        worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
        words[words.index("launch") + 1 : words.index("launch") + 1] = ["--main_process_port", str(29600 + worker)]
    done = subprocess.run(words, **settings)
    if "terminate called without an active exception" in done.stderr:
        # Torch on a busy CPU: a process that has finished may fail to join a thread of its own on the way out.
        first, done = done, subprocess.run(words, **settings)
        done.stderr = first.stderr + done.stderr
    return done


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["run", "--help"], ["demo", "--help"], ["--version"]]
)
def test_help_comes_at_once(arguments):
    def seconds():
        started = time.monotonic()
        done = command(BIN / "apo-trl", *arguments)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
        return time.monotonic() - started

    assert min(seconds() for _ in range(3)) < 1


@pytest.mark.parametrize(
    "given",
    ["evaluate --model m --dataset d --limit 0", "evaluate --model m --dataset d --batch_size 0",
     "evaluate --model m --dataset d --max_length -1", "anchor --dataset d --policy p --limit -3",
     "bench --repeats 0", "bench --layers 1.5", "demo --max_steps x", "pairs stats d --max_length 0",
     "recipes plan r --gpu-memory 1 --gpus 0"],
)  # fmt: skip
def test_a_number_that_cannot_be(given, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(given.split())
    assert stop.value.code == 2
    assert f"'{given.split()[-1]}' is not a whole number of 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("evaluate --model m --dataset d --batchsize 2", "`apo-trl evaluate` does not take --batchsize. Did you mean "
         "'--batch_size'? See `apo-trl evaluate --help`."),
        ("report run --outptu=x", "`apo-trl report` does not take --outptu. Did you mean '--output'?"),
        ("merge a --output_dir m secret", "`apo-trl merge` does not take one argument more. See"),
    ],
)  # fmt: skip
def test_what_a_command_does_not_take(given, words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(given.split())
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


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
        assert f"there is no file {missing}" in self.refused(arguments(dataset_name=missing), capsys, tmp_path)

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
            ({"dataset_name": "no/such-dataset"}, "'no/such-dataset' cannot be loaded"),
            ({"dataset_name": None}, "dataset_name is missing"),
            ({"model_name_or_path": None}, "model_name_or_path is missing"),
            ({"model_name_or_path": "no/such-model"}, "model_name_or_path 'no/such-model' cannot be loaded"),
            (
                {"eval_strategy": "steps"},
                "no split 'test'. Set dataset_test_split to one of ['train'], or eval_strategy",
            ),
            ({"dataset_train_split": "trian"}, "Did you mean 'train'?"),
            ({"loss_type": "apo_zer"}, "Did you mean 'apo_zero'?"),
            ({"lerning_rate": 1}, "The option --lerning_rate does not exist. Did you mean '--learning_rate'?"),
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
            ("betta: 0.1", "The key 'betta' in"),
            ("betta: 0.1", "Did you mean 'beta'?"),
            ("beta: [", "is not YAML"),
            ("- beta", "must hold `key: value` lines"),
            ("beta: high", "invalid float value: 'high'"),
            ("loss_type: apo_zeroo", "Did you mean 'apo_zero'?"),
        ],
    )
    def test_bad_yaml(self, arguments, capsys, tmp_path, text, words):
        config = tmp_path / "run.yaml"
        config.write_text(text + "\n")
        assert words in self.refused(arguments(config=config), capsys, tmp_path)

    def test_a_missing_yaml(self, arguments, capsys, tmp_path):
        assert "There is no file and no recipe" in self.refused(
            arguments(config=tmp_path / "none.yaml"), capsys, tmp_path
        )

    def test_a_yaml_file_without_its_option(self, arguments, capsys, tmp_path):
        (tmp_path / "run.yaml").write_text("beta: 0.1\n")
        words = "belongs to no option. A recipe or YAML file comes first, or after --config"
        assert words in self.refused([*arguments(), str(tmp_path / "run.yaml")], capsys, tmp_path)

    def test_config_without_a_file(self, arguments, capsys, tmp_path):
        assert "--config needs the path" in self.refused([*arguments(), "--config"], capsys, tmp_path)


@pytest.mark.slow
class TestProcesses:
    """The same through real processes: what a user sees on the screen."""

    def test_apo_trl_train(self, arguments, tmp_path):
        done = command(BIN / "apo-trl", "train", *arguments(loss_type="apo_zero_norm"), "--num_processes", "1")
        assert done.returncode == 0, done.stderr[-3000:]
        assert "Saved to" in done.stdout
        assert "'loss': '1'" in done.stdout
        assert (tmp_path / "out" / "model.safetensors").is_file()

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

    def test_the_hosts_own_script_with_our_loss(self, arguments, tmp_path):
        done = command(BIN / "apo-trl", "run", DPO_SCRIPT, *arguments(loss_type="apo_zero_norm"))
        assert done.returncode == 0, done.stderr[-3000:]
        assert "'loss': '1'" in done.stdout
        assert "apo/chosen_up" in done.stdout
        assert (tmp_path / "out" / "model.safetensors").is_file()

    def test_the_hosts_own_script_with_a_wrong_loss(self, arguments, tmp_path):
        done = command(BIN / "apo-trl", "run", DPO_SCRIPT, *arguments(loss_type="apo_zero_nrm"))
        assert done.returncode == 2
        assert "Did you mean 'apo_zero_norm'?" in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "out").exists()

    def test_two_processes_train_as_one(self, arguments, tmp_path):
        """The same global batch over two processes: the same losses, and every metric logged once."""
        script = tmp_path / "script.py"
        script.write_text(
            "import json, sys\n"
            "from apo_trl.training import arguments, script\n"
            "run, _ = arguments.parse(sys.argv[1:])\n"
            "trainer = script.make_trainer(run)\n"
            "trainer.train()\n"
            "if trainer.accelerator.is_main_process:\n"
            "    print('LOG', json.dumps(trainer.state.log_history))\n"
        )
        options = arguments(loss_type="apo_blend", max_steps=3)
        logs = {}
        for processes in (1, 2):
            batch = ["--per_device_train_batch_size", str(4 // processes)]
            launch = [BIN / "accelerate", "launch", "--num_processes", processes, "--num_machines", 1]
            launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
            # What starts several processes is called after GPUs; the script itself stays on the CPU.
            launch += ["--multi_gpu"] if processes > 1 else ["--cpu"]
            done = command(*launch, script, *options, *batch)
            assert done.returncode == 0, done.stderr[-3000:]
            (line,) = [line for line in done.stdout.splitlines() if line.startswith("LOG ")]
            logs[processes] = json.loads(line.removeprefix("LOG "))[:-1]
        assert len(logs[1]) == len(logs[2]) == 3
        for one, two in zip(logs[1], logs[2], strict=True):
            for key in ("loss", "apo/chosen_up", "apo/separated", "apo/chosen_logratio_per_token", "rewards/margins"):
                assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-6), key


def test_a_script_that_is_not_there(capsys):
    from apo_trl import run

    with pytest.raises(SystemExit, match=r"there is no script 'nowhere\.py'"):
        run.main(["nowhere.py"])


@pytest.fixture(autouse=True)
def _unregister():
    yield
    unregister()
