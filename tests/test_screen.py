"""What a user sees of a training, and how many threads a command computes with."""

import io
import os
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import psutil
import pytest
import transformers.trainer
from conftest import rows

from apo_trl.training import threads
from apo_trl.training.console import quiet_libraries
from apo_trl.training.progress import Progress, show_progress

NUMBERS = r"loss \d\.\d{4}, reward margin [+-]\d\.\d{3}, chosen up \d+%, displaced \d+%"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def shown(monkeypatch):
    for name in ("DEFAULT_PROGRESS_CALLBACK", "PrinterCallback"):
        monkeypatch.setattr(transformers.trainer, name, getattr(transformers.trainer, name))
    show_progress()


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of 200 columns."""
    streams = SimpleNamespace(stderr=Terminal(), stdout=io.StringIO())
    monkeypatch.setattr("apo_trl.training.progress.sys", streams)
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda _: (200, 40))
    return streams.stderr


@pytest.fixture
def every_step(monkeypatch):
    monkeypatch.setattr("apo_trl.training.progress._EVERY", 0)


def states(terminal):
    """The states of the bar, one after the other."""
    return [state.strip() for state in re.split(r"[\r\n]", terminal.getvalue()) if state.strip()]


@pytest.mark.usefixtures("shown")
class TestTraining:
    def test_a_bar_with_time_left_and_figures(self, train, terminal, capsys, dataset):
        data = {"eval_dataset": dataset, "eval_strategy": "steps", "eval_steps": 2}
        trainer = train(disable_tqdm=False, padding_free=True, **data)
        assert any(
            re.fullmatch(rf"Step 2 of 4 \|.+\| \d\d:\d\d left, {NUMBERS}, tokens saved \d\.\d\dx", state)
            for state in states(terminal)
        )
        lines = capsys.readouterr().out.splitlines()
        assert re.fullmatch(rf"Step 2, held out: {NUMBERS}, tokens saved .*x", lines[0])
        assert lines[1].startswith("Step 4, held out: ")
        assert re.fullmatch(rf"Trained to step 4 in 00:\d\d: {NUMBERS}.*", lines[2])
        assert len(lines) == 3
        assert len(trainer.state.log_history[0]) > 20  # what is not on the screen

    def test_the_figures_are_those_that_are_logged(self, train, capsys):
        trainer = train(disable_tqdm=False)
        last = trainer.state.log_history[-2]
        line = f"loss {last['loss']:.4f}, reward margin {last['rewards/margins']:+.3f}, chosen up "
        line += f"{last['apo/chosen_up']:.0%}, displaced {last['apo/displaced']:.0%}"
        assert capsys.readouterr().out.rstrip().endswith(line)

    @pytest.mark.usefixtures("every_step")
    def test_lines_in_a_log_file(self, train, capsys, dataset):
        evaluation = {"eval_strategy": "steps", "eval_steps": 4, "per_device_eval_batch_size": 2}
        train(disable_tqdm=False, eval_dataset={"a": dataset, "b": dataset}, **evaluation)
        out, err = capsys.readouterr()
        lines = out.splitlines()
        assert re.fullmatch(r"Step 1 of 4, \d\d:\d\d left", lines[0])
        assert re.fullmatch(rf"Step 3 of 4, \d\d:\d\d left, {NUMBERS}", lines[2])
        held_out = [line for line in lines if "held out" in line]
        assert [re.fullmatch(rf"Step 4, held out \((.)\): {NUMBERS}", line)[1] for line in held_out] == ["a", "b"]
        assert any(re.fullmatch(r"Held out: batch 4 of 4, 00:\d\d left", line) for line in lines)
        assert not re.search(r"[\r{}\x1b]", out)
        assert "Step" not in err

    def test_few_lines_by_default(self, train, capsys):
        train(disable_tqdm=False, steps=8)
        assert len(capsys.readouterr().out.splitlines()) == 1

    @pytest.mark.usefixtures("every_step")
    def test_no_bar_if_it_is_disabled(self, train, terminal, capsys):
        train(disable_tqdm=True)
        assert states(terminal) == []
        assert capsys.readouterr().out.startswith("Step 1 of 4, ")

    def test_several_losses_show_their_sum(self, train, capsys):
        trainer = train(loss_type=["apo_zero", "sft"], steps=1)
        assert f"loss {trainer.state.log_history[0]['loss']:.4f}, reward" in capsys.readouterr().out

    def test_a_narrow_terminal_cuts_the_last_figures(self, train, terminal, monkeypatch):
        monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda _: (50, 40))
        train(disable_tqdm=False)
        assert max(map(len, states(terminal))) <= 50
        assert any("left, loss" in state for state in states(terminal))

    @pytest.mark.usefixtures("every_step")
    def test_time_left_of_a_resumed_run(self, train, capsys, tmp_path, monkeypatch):
        train(steps=4, save_strategy="steps", save_steps=2)
        trainer = train(steps=4, run=False)
        capsys.readouterr()
        clock = iter(range(0, 1000, 10))
        monkeypatch.setattr("tqdm.std.time", lambda: next(clock))  # each look at the clock is ten seconds later
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
        first = capsys.readouterr().out.splitlines()[0]
        # One step of the two that are left took ten seconds or few times that; three steps in that time are too fast.
        assert re.match(r"Step 3 of 4, 00:[1-4]0 left", first)

    def test_answers_with_thumbs(self, model_dir, tmp_path, capsys):
        from datasets import Dataset
        from trl import KTOConfig
        from trl.trainer.kto_trainer import KTOTrainer

        answers = [{"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0} for i, row in
                   enumerate(rows())]  # fmt: skip
        options = {"max_steps": 2, "use_cpu": True, "bf16": False, "report_to": "none", "logging_steps": 1}
        config = KTOConfig(str(tmp_path), gradient_checkpointing=False, save_strategy="no", **options)
        KTOTrainer(str(model_dir), args=config, train_dataset=Dataset.from_list(answers)).train()
        assert re.match(r"Trained to step 2 in 00:\d\d: loss 0\.\d{4}, reward margin [+-]\d", capsys.readouterr().out)

    def test_only_the_first_process_prints(self, capsys):
        state = SimpleNamespace(is_world_process_zero=False, max_steps=2, global_step=0)
        progress, arguments = Progress(), SimpleNamespace(disable_tqdm=False)
        for event, options in (
            ("train_begin", {}),
            ("prediction_step", {"eval_dataloader": [1]}),
            ("log", {"logs": {"loss": 1.0}}),
            ("log", {"logs": {"eval_runtime": 1.0, "eval_loss": 1.0}}),
            ("train_end", {}),
        ):
            getattr(progress, f"on_{event}")(arguments, state, None, **options)
        assert capsys.readouterr() == ("", "")


class TestLibraries:
    @pytest.mark.slow
    def test_all_that_a_training_shows(self, model_dir, tmp_path, capfd):
        """Of the launcher, of its process, and of all libraries."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP", "TQDM"))}
        command = [sys.executable, "-m", "apo_trl.cli.main", "train", "smollm2-135m/apo_zero_lora", "--output_dir"]
        command += [str(tmp_path), "--model_name_or_path", str(model_dir), "--max_steps", "2"]
        assert subprocess.run(command, env=environment).returncode == 0
        out, err = capfd.readouterr()
        assert err.splitlines() == ["padding_free: attention by scaled_dot_product_attention, one call for each row."]
        assert re.search(rf"^Trained to step 2 in 00:\d\d: {NUMBERS}, tokens saved \d\.\d\dx$", out, re.MULTILINE)
        assert "{" not in out

    def test_a_deprecation_of_the_user_is_shown(self):
        with warnings.catch_warnings(record=True) as shown:
            warnings.resetwarnings()
            quiet_libraries()
            for option in ("gradient_checkpointing", "tokenizer"):
                warnings.warn(f"`{option}` is deprecated and will be removed", FutureWarning, stacklevel=1)
        assert [str(warning.message).split()[0] for warning in shown] == ["`tokenizer`"]

    def test_defaults_of_accelerate_are_not_listed(self, caplog):
        from accelerate.commands.launch import _validate_launch_command, launch_command_parser, logger

        def launch():
            caplog.clear()
            _validate_launch_command(launch_command_parser().parse_args(["x.py"]))
            return caplog.messages

        filters, logger.filters = logger.filters, []
        try:
            assert "`--num_machines` was set" in launch()[0]
            quiet_libraries()
            assert launch() == []
            logger.warning("NCCL_P2P_DISABLE")
            assert caplog.messages == ["NCCL_P2P_DISABLE"]
        finally:
            logger.filters = filters

    @pytest.mark.parametrize(("stream", "every"), [(Terminal(), None), (io.StringIO(), "30")])
    def test_bars_of_libraries_appear_late(self, monkeypatch, stream, every):
        monkeypatch.setattr(os, "environ", {"TQDM_DELAY": "5"})
        monkeypatch.setattr(sys, "stderr", stream)
        quiet_libraries()
        assert os.environ["TQDM_DELAY"] == "5"  # the user's
        assert os.environ.get("TQDM_MININTERVAL") == every


class TestThreads:
    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch, tmp_path):
        """A machine of four cores, with those in `affinity` for this process."""
        monkeypatch.setattr(os, "environ", {})
        monkeypatch.setattr(threads, "_QUOTA", tmp_path / "cpu.max")

        def fake(*busy, affinity=(0, 1, 2, 3), physical=4, quota="max 100000"):
            monkeypatch.setattr(psutil, "cpu_percent", lambda **_: [float(percent) for percent in busy])
            monkeypatch.setattr(psutil, "cpu_count", lambda **_: physical)
            monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(affinity))
            (tmp_path / "cpu.max").write_text(quota + "\n")

        return fake

    @pytest.mark.parametrize(
        ("busy", "options", "expected"),
        [
            ([0, 0, 0, 0], {}, "4"),
            ([8, 3, 0, 12], {}, "4"),
            ([100, 0, 0, 0], {}, "3"),
            ([100, 100, 97, 100], {}, "1"),
            ([100, 100, 100, 100], {}, "1"),
            ([50, 50, 50, 50], {}, "2"),
            ([100, 0, 0, 0], {"affinity": (0, 1)}, "1"),
            ([100, 100, 0, 0], {"affinity": (2, 3)}, "2"),
            ([0, 0, 0, 0], {"physical": 2}, "2"),
            ([0, 0, 0, 0], {"physical": None}, "4"),
            ([0, 0, 0, 0], {"quota": "150000 100000"}, "1"),
            ([0, 0, 0, 0], {"quota": "50000 100000"}, "1"),
        ],
    )
    def test_as_many_as_there_are_free_cores(self, machine, busy, options, expected):
        machine(*busy, **options)
        threads.choose_threads()
        assert os.environ["OMP_NUM_THREADS"] == expected
        assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"

    def test_the_choice_of_the_user_stays(self, machine):
        machine(100, 100, 100, 100)
        os.environ.update(OMP_NUM_THREADS="3", OMP_WAIT_POLICY="ACTIVE", LOCAL_WORLD_SIZE="2")
        threads.choose_threads()
        chosen = os.environ["OMP_NUM_THREADS"], os.environ["OMP_WAIT_POLICY"]
        assert chosen == ("3", "ACTIVE")

    @pytest.mark.parametrize(("processes", "expected"), [("1", "3"), ("2", "1"), ("8", "1")])
    def test_processes_share_those_of_their_launcher(self, machine, processes, expected):
        machine(100, 0, 0, 0)
        threads.choose_threads()
        machine(100, 100, 100, 100)  # the other processes start
        os.environ["LOCAL_WORLD_SIZE"] = processes
        threads.choose_threads()
        assert os.environ["OMP_NUM_THREADS"] == expected
