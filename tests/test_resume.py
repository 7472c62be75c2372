"""Runs that are cut off: killed, stopped with Ctrl-C, or left with half a checkpoint; and how they go on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import rows
from safetensors.torch import load_file
from test_cli import command, write

from apo_trl import train
from apo_trl.errors import InputError
from apo_trl.training import script as train_script
from apo_trl.training.arguments import parse
from apo_trl.training.checkpoints import last_checkpoint, resume_from

BIN = Path(sys.executable).parent
ZERO2 = Path(__file__).parents[1] / "recipes" / "accelerate" / "zero2.yaml"
COMMON = {
    "logging_steps": 1,
    "save_strategy": "steps",
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
}
TWO = ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
RESUME = ["--resume_from_checkpoint", "true"]

# The training script, with one addition: its process dies between two checkpoints, as if the power went.
KILLED = """\
import os, signal
from apo_trl import train
from apo_trl.training import script
from transformers import TrainerCallback

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

make_trainer = script.make_trainer

def with_kill(run):
    trainer = make_trainer(run)
    trainer.add_callback(Kill())
    return trainer

script.make_trainer = with_kill
train.main()
"""


@pytest.fixture
def arguments(model_dir, tmp_path):
    return command_lines(model_dir, tmp_path)


def command_lines(model_dir, tmp_path):
    """A command line of six steps with a checkpoint at every second one: `arguments(output_dir, *more)`."""
    data = write(tmp_path / "pairs.jsonl", rows(24))

    def build(output_dir, *more, steps=6, every=2):
        given = {"model_name_or_path": model_dir, "dataset_name": data, "output_dir": output_dir}
        given |= {"max_steps": steps, "save_steps": every}
        return [*(str(part) for key, value in (COMMON | given).items() for part in (f"--{key}", value)), *more]

    return build


def losses(checkpoint):
    """The logged losses by step."""
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def weights(folder):
    (path,) = (path for path in folder.glob("*.safetensors"))
    return load_file(path)


def kill(arguments, cut, whole):
    """End a run after step 3."""
    script = cut.with_name("killed.py")
    script.write_text(KILLED)
    assert command(sys.executable, script, *arguments).returncode == -signal.SIGKILL


def keep_the_first_checkpoint(arguments, cut, whole):
    shutil.copytree(whole / "checkpoint-2", cut / "checkpoint-2")


def train_on_two_processes(arguments):
    pytest.importorskip("deepspeed")
    done = command(BIN / "accelerate", "launch", "--config_file", ZERO2, *TWO, "-m", "apo_trl.train", *arguments)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("run", "stop", "more"),
    [
        pytest.param(train.main, kill, [], marks=pytest.mark.slow, id="killed"),
        pytest.param(
            train.main, keep_the_first_checkpoint, ["--use_peft", "--lora_r", "4", "--lora_dropout", "0.1"], id="LoRA"
        ),
        pytest.param(
            train_on_two_processes, keep_the_first_checkpoint, [], marks=pytest.mark.slow, id="ZeRO-2 on two processes"
        ),
    ],
)
def test_a_resumed_run_ends_where_an_unbroken_run_ends(arguments, tmp_path, run, stop, more):
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    run(arguments(whole, *more))
    stop(arguments(cut, *more), cut, whole)
    assert [path.name for path in cut.glob("checkpoint-*")] == ["checkpoint-2"]
    run(arguments(cut, *more, *RESUME))

    expected = losses(whole / "checkpoint-6")
    assert list(expected) == [1, 2, 3, 4, 5, 6]
    assert losses(cut / "checkpoint-6") == expected
    ours, theirs = weights(cut), weights(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    start = weights(cut / "checkpoint-2")
    assert not all(torch.equal(ours[name], start[name]) for name in start)


@pytest.fixture
def output_dir(train, tmp_path):
    """A run that ended, with checkpoints 2 and 4."""
    train(save_strategy="steps", save_steps=2)
    return tmp_path / "out"


def cut(path, keep=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


BROKEN = {
    "has no trainer_state.json, which is written last": lambda folder: (folder / "trainer_state.json").unlink(),
    "holds only a part of trainer_state.json": lambda folder: cut(folder / "trainer_state.json"),
    "holds only a part of model.safetensors": lambda folder: cut(folder / "model.safetensors", 0.99),
    "holds only a part of optimizer.pt": lambda folder: cut(folder / "optimizer.pt", 0.99),
    "holds only a part of rng_state.pth": lambda folder: cut(folder / "rng_state.pth"),
    "holds only a part of scheduler.pt": lambda folder: cut(folder / "scheduler.pt", 0),
    "has no weights": lambda folder: (folder / "model.safetensors").unlink(),
}


class TestLastCheckpoint:
    def test_is_the_newest(self, output_dir):
        assert last_checkpoint(str(output_dir)) == str(output_dir / "checkpoint-4")

    def test_numbers_are_numbers(self, output_dir):
        (output_dir / "checkpoint-4").rename(output_dir / "checkpoint-10")
        assert last_checkpoint(str(output_dir)) == str(output_dir / "checkpoint-10")

    @pytest.mark.parametrize("fault", BROKEN)
    def test_half_a_checkpoint_is_skipped_by_name(self, output_dir, fault):
        BROKEN[fault](output_dir / "checkpoint-4")
        with pytest.warns(UserWarning, match=rf"checkpoint-4: it {fault}\."):
            found = last_checkpoint(str(output_dir))
        assert found == str(output_dir / "checkpoint-2")

    def test_a_shard_that_is_missing(self, output_dir):
        folder = output_dir / "checkpoint-4"
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
        with pytest.warns(UserWarning, match=r"it has no model-00002-of-00002\.safetensors\."):
            assert last_checkpoint(str(output_dir)) == str(output_dir / "checkpoint-2")

    def test_only_the_first_process_warns(self, output_dir, monkeypatch):
        (output_dir / "checkpoint-4" / "trainer_state.json").unlink()
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert last_checkpoint(str(output_dir)) == str(output_dir / "checkpoint-2")

    @pytest.mark.parametrize("name", ["nothing.txt", "checkpoint-best", "checkpoint-"])
    def test_none(self, tmp_path, name):
        assert last_checkpoint(str(tmp_path / "nowhere")) is None
        (tmp_path / "out" / name).mkdir(parents=True)
        assert last_checkpoint(str(tmp_path / "out")) is None


class TestResume:
    def test_past_half_a_checkpoint(self, arguments, tmp_path):
        """What is left of checkpoint-4 is skipped, and written again on the way."""
        out = tmp_path / "out"
        train.main(arguments(out, steps=4))
        before, expected = losses(out / "checkpoint-4"), weights(out)
        cut(out / "checkpoint-4" / "model.safetensors")
        (out / "checkpoint-4" / "trainer_state.json").unlink()
        with pytest.warns(UserWarning, match="Skipping .*checkpoint-4"):
            train.main(arguments(out, *RESUME, steps=4))
        assert losses(out / "checkpoint-4") == before
        again = weights(out)
        assert all(torch.equal(again[name], expected[name]) for name in expected)
        assert last_checkpoint(str(out)) == str(out / "checkpoint-4")

    def test_without_a_checkpoint_from_the_beginning(self, arguments, tmp_path, capsys):
        train.main(arguments(tmp_path / "out", *RESUME, steps=2))
        assert "Training starts from step 0.\n" in capsys.readouterr().out
        assert list(losses(tmp_path / "out" / "checkpoint-2")) == [1, 2]

    def test_a_folder_by_name(self, arguments, tmp_path):
        out = tmp_path / "out"
        train.main(arguments(out, steps=4))
        expected = losses(out / "checkpoint-4")
        train.main(arguments(out, "--resume_from_checkpoint", str(out / "checkpoint-2"), steps=4))
        assert losses(out / "checkpoint-4") == expected

    @pytest.mark.parametrize("name", ["checkpoint-4", "nowhere"])
    def test_a_folder_by_name_that_is_no_checkpoint(self, arguments, output_dir, name):
        (output_dir / "checkpoint-4" / "trainer_state.json").unlink()
        run, _ = parse(arguments(output_dir, "--resume_from_checkpoint", str(output_dir / name)))
        with pytest.raises(InputError, match=f"resume_from_checkpoint: .*{name} has no trainer_state.json"):
            train_script.train(run)

    @pytest.mark.parametrize("asked", [None, "false", "False"])
    def test_not_asked_for(self, output_dir, asked):
        assert resume_from(asked, str(output_dir)) is None

    @pytest.mark.parametrize("asked", ["true", "True"])
    def test_asked_for(self, output_dir, asked):
        assert resume_from(asked, str(output_dir)) == str(output_dir / "checkpoint-4")


def interrupt(command_line, started):
    """Start a command, press Ctrl-C once the file `started` is there, and give exit status and standard error."""
    process = subprocess.Popen(
        [str(part) for part in command_line],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        start_new_session=True,  # a terminal sends Ctrl-C to the whole group
    )
    try:
        deadline = time.monotonic() + 120
        while not started.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT if started.exists() else signal.SIGKILL)
        _, error = process.communicate(timeout=150)  # torch's launcher gives its processes a minute to end
    except (ProcessLookupError, subprocess.TimeoutExpired):
        process.kill()
        _, error = process.communicate()
    assert started.exists(), error[-2000:]
    return process.returncode, error


class TestCtrlC:
    """Exit status 130, no traceback, and one line on how to go on."""

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "launcher",
        [
            [BIN / "apo-trl", "train"],
            [BIN / "apo-trl", "train", "--accelerate_config", ZERO2, *TWO],
        ],
        ids=["apo-trl", "apo-trl on two processes"],
    )
    def test_ends_cleanly(self, arguments, tmp_path, launcher):
        if ZERO2 in launcher:
            pytest.importorskip("deepspeed")
        out = tmp_path / "out"
        endless = arguments(out, steps=100_000, every=50)
        status, error = interrupt([*launcher, *endless], started=out / "checkpoint-50" / "trainer_state.json")
        assert status == 130, error[-2000:]
        assert "Traceback" not in error
        assert error.count("Interrupted.") == 1
        assert "add --resume_from_checkpoint true to the same command." in error

    def test_says_where_to_go_on(self, arguments, tmp_path, monkeypatch, capsys):
        assert self.stop_at(3, arguments(tmp_path / "out"), monkeypatch) == 130
        last = capsys.readouterr().err.strip().splitlines()[-1]
        checkpoint = tmp_path / "out" / "checkpoint-2"
        assert last.startswith(f"Interrupted. To resume from {checkpoint}, add --resume_from_checkpoint true")

    def test_says_that_there_is_nothing_yet(self, arguments, tmp_path, monkeypatch, capsys):
        assert self.stop_at(1, arguments(tmp_path / "out"), monkeypatch) == 130
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("Interrupted. No checkpoint to resume from")

    def test_before_training(self, arguments, tmp_path, monkeypatch, capsys):
        def stopped(run):
            raise KeyboardInterrupt

        monkeypatch.setattr(train_script, "make_trainer", stopped)
        with pytest.raises(SystemExit) as caught:
            train.main(arguments(tmp_path / "out"))
        assert caught.value.code == 130
        assert capsys.readouterr().err.strip() == "Interrupted. Training had not started. Run the same command again."

    def stop_at(self, step, given, monkeypatch):
        """Run the script, interrupted at the end of a step, and give its exit status."""
        from transformers import TrainerCallback

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                if state.global_step == step:
                    raise KeyboardInterrupt

        make_trainer = train_script.make_trainer

        def with_stop(run):
            trainer = make_trainer(run)
            trainer.add_callback(Stop())
            return trainer

        monkeypatch.setattr(train_script, "make_trainer", with_stop)
        before = signal.getsignal(signal.SIGINT)
        try:
            with pytest.raises(SystemExit) as caught:
                train.main(given)
        finally:
            signal.signal(signal.SIGINT, before)
        return caught.value.code
