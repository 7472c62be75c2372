"""Signals, a second run in the same folder, a full disk and a closed pipe."""

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

import pytest
from test_resume import BIN, RESUME, TWO, command_lines

from apo_trl import train
from apo_trl.datasets.streams import StreamError
from apo_trl.errors import InputError
from apo_trl.io.disk import full_disk_error
from apo_trl.io.files import write_json
from apo_trl.pairs.llm.response_cache import ResponseCache
from apo_trl.training import console
from apo_trl.training.checkpoints import last_checkpoint, start_line, write_older_checkpoints
from apo_trl.training.console import exit_on_error
from apo_trl.training.lock import hidden_file, output_lock

STOPPED = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.fixture(autouse=True)
def _handlers(monkeypatch):
    # Another test of this worker may have left a process group, after which an interruption ends the process at once.
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    before = {number: signal.getsignal(number) for number in (*STOPPED, signal.SIGCHLD)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a command that has ended in this process resets it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def arguments(model_dir, tmp_path):
    return command_lines(model_dir, tmp_path)


class TestSignals:
    @pytest.mark.parametrize("number", STOPPED)
    def test_the_status_names_the_signal(self, number, capsys):
        with pytest.raises(SystemExit) as caught, exit_on_error():  # noqa: PT012
            os.kill(os.getpid(), number)
            time.sleep(5)
        assert caught.value.code == STOPPED[number]
        assert capsys.readouterr().err.strip() == "Interrupted."

    def test_an_ignored_one_stays_ignored(self):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        with exit_on_error():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN

    def test_a_background_job_whose_ctrl_c_is_ignored(self):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with pytest.raises(SystemExit) as caught, exit_on_error():  # noqa: PT012
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        assert caught.value.code == 143

    def test_a_forked_worker_ends_without_a_word(self, capfd):
        with exit_on_error():
            child = os.fork()
            if not child:
                time.sleep(30)
                os._exit(0)
            time.sleep(0.2)
            os.kill(child, signal.SIGTERM)
            _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 143
        assert capfd.readouterr().err == ""

    def test_asyncio_cleans_up(self):
        import asyncio

        ended = []

        async def work():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                await asyncio.sleep(30)
            finally:
                ended.append("closed")

        with pytest.raises(SystemExit) as caught, exit_on_error():
            asyncio.run(work())
        assert (caught.value.code, ended) == (143, ["closed"])

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("number", "more"),
        [
            (signal.SIGHUP, []),
            (signal.SIGTERM, ["--multi_gpu", *TWO]),
            (signal.SIGINT, ["--multi_gpu", *TWO]),
            (signal.SIGKILL, ["--multi_gpu", *TWO]),
        ],
        ids=str,
    )
    def test_no_process_outlives_the_command(self, arguments, tmp_path, number, more):
        """The signal goes to the command only, as that of `kill` does."""
        out, log = tmp_path / "out", tmp_path / "log"
        command = [BIN / "apo-trl", "train", "--accelerate_config", "cpu", *more]
        with log.open("w") as stderr:
            process = subprocess.Popen(
                [*command, *arguments(out, steps=100_000, every=20)],
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
        try:
            deadline = time.monotonic() + 120
            while not (out / "checkpoint-20" / "trainer_state.json").exists() and time.monotonic() < deadline:
                assert process.poll() is None, log.read_text()[-2000:]
                time.sleep(0.05)
            assert len(running(out)) == (3 if more else 1)
            process.send_signal(number)
            status = process.wait(60)
            time.sleep(0.5)
            assert running(out) == []
        finally:
            for pid in running(out):
                os.kill(pid, signal.SIGKILL)
        text = log.read_text()
        assert status == STOPPED.get(number, -signal.SIGKILL), text[-2000:]
        assert "Traceback" not in text
        assert "death signal" not in text
        assert text.count("Interrupted. To resume from") == (number in STOPPED)


def running(output_dir):
    """The processes that have a folder on their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{output_dir}\0" in (process / "cmdline").read_text():
                found.append(int(process.name))
    return found


class TestLock:
    def test_a_second_run_is_refused_with_the_process_of_the_first(self, tmp_path):
        with output_lock(tmp_path):
            with pytest.raises(InputError, match=rf"output_dir: another run .*process {os.getpid()} .*another folder"):
                with output_lock(tmp_path):
                    pass
        with output_lock(tmp_path):  # free again
            pass

    def test_a_forked_worker_does_not_hold_it(self, tmp_path):
        with output_lock(tmp_path):
            child = os.fork()
            if not child:
                time.sleep(30)
                os._exit(0)
            time.sleep(0.3)  # until it has started
        with output_lock(tmp_path):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)

    def test_a_file_system_without_locks(self, tmp_path, monkeypatch):
        def flock(*_):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr("fcntl.flock", flock)
        with pytest.warns(UserWarning, match="output_dir: .* cannot be locked"), output_lock(tmp_path):
            pass

    def test_an_upload_leaves_it_out(self, tmp_path):
        from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects

        path = str(hidden_file(tmp_path, "x").relative_to(tmp_path))
        assert list(filter_repo_objects([path, "a"], ignore_patterns=DEFAULT_IGNORE_PATTERNS)) == ["a"]

    def test_training_is_refused_before_anything_is_written(self, arguments, tmp_path, capsys):
        with output_lock(tmp_path / "out"), pytest.raises(SystemExit) as caught:
            train.main(arguments(tmp_path / "out"))
        assert caught.value.code == 2
        assert "another run is writing to" in capsys.readouterr().err
        assert not (tmp_path / "out" / "run.json").exists()


class TestEarlierRun:
    def checkpoint(self, folder, step):
        path = folder / f"checkpoint-{step}"
        path.mkdir(parents=True, exist_ok=True)
        for name in ("trainer_state.json", "pytorch_model.bin"):
            (path / name).unlink(missing_ok=True)
        import torch

        torch.save({}, path / "pytorch_model.bin")
        (path / "trainer_state.json").write_text("{}")
        return str(path)

    def test_its_checkpoint_is_neither_offered_nor_resumed(self, tmp_path):
        out = str(tmp_path)
        old = self.checkpoint(tmp_path, 12)
        assert start_line(None, out).endswith(f"--resume_from_checkpoint {old}.")
        write_older_checkpoints(None, out)  # as a fresh run starts
        assert last_checkpoint(out) is None
        new = self.checkpoint(tmp_path, 6)
        assert last_checkpoint(out) == new
        write_older_checkpoints(new, out)  # resumed
        assert last_checkpoint(out) == new
        again = self.checkpoint(tmp_path, 12)  # the new run's
        assert last_checkpoint(out) == again

    def test_one_that_is_named_is_resumed_and_goes_on(self, tmp_path):
        out = str(tmp_path)
        old = self.checkpoint(tmp_path, 12)
        write_older_checkpoints(None, out)
        self.checkpoint(tmp_path, 6)
        write_older_checkpoints(old, out)
        assert last_checkpoint(out) == old

    def test_the_first_line_says_what_happens(self, arguments, tmp_path, capsys):
        out = tmp_path / "out"
        train.main(arguments(out, steps=2))
        assert "Training starts from step 0.\n" in capsys.readouterr().out
        train.main(arguments(out, *RESUME, steps=4))
        assert f"Training resumes from {out / 'checkpoint-2'}." in capsys.readouterr().out
        train.main(arguments(out, steps=2))
        assert f"{out} holds a finished run, which is written over." in capsys.readouterr().out
        assert last_checkpoint(str(out)) == str(out / "checkpoint-2")


class TestFullDisk:
    @pytest.fixture
    def small(self, tmp_path):
        """A disk of its own: `small(size)`."""
        folder = tmp_path / "small"
        folder.mkdir()

        def mount(size):
            done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True)
            if done.returncode:
                pytest.skip("mounting a small disk needs permission")
            return folder

        yield mount
        subprocess.run(["umount", "--lazy", folder], capture_output=True)

    def test_training_names_the_path_and_goes_on(self, arguments, small, tmp_path, capsys):
        """A checkpoint is about 500 kB: the second is cut short, and the same command resumes from the first."""
        out = small("800k") / "out"
        with pytest.raises(SystemExit) as caught:
            train.main(arguments(out, steps=4))
        assert caught.value.code == 2
        error = capsys.readouterr().err
        assert f"error: {out}" in error
        assert "MB free" in error
        assert f"To resume from {out / 'checkpoint-2'}" in error
        assert (out / "checkpoint-4").exists()
        moved = tmp_path / "moved"  # to a disk with space
        shutil.copytree(out, moved)
        with pytest.warns(UserWarning, match="Skipping the checkpoint .*checkpoint-4"):
            train.main(arguments(moved, *RESUME, steps=4))
        assert f"resumes from {moved / 'checkpoint-2'}" in capsys.readouterr().out

    @pytest.mark.parametrize("writer", ["torch", "safetensors", "json"])
    def test_each_library_is_understood(self, small, writer):
        import safetensors.torch
        import torch

        path = small("64k") / "x"
        weights = {"a": torch.zeros(100_000)}
        with pytest.raises(Exception) as caught:  # noqa: PT011  each has a type of its own
            {
                "torch": lambda: torch.save(weights, path),
                "safetensors": lambda: safetensors.torch.save_file(weights, path),
                "json": lambda: path.write_text("x" * 200_000),
            }[writer]()
        assert "No space left on device" in str(full_disk_error(path, caught.value))

    @pytest.mark.parametrize("error", [OSError(errno.EDQUOT, "x"), OSError(errno.EROFS, "x")])
    def test_a_quota_and_a_read_only_disk(self, error, tmp_path):
        assert str(full_disk_error(tmp_path, error)).startswith(f"{tmp_path}: cannot be written")
        assert full_disk_error(tmp_path, ValueError("x")) is None

    def test_a_file_that_may_not_grow(self, tmp_path):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            with pytest.raises(InputError, match=r"x\.json: cannot be written \(File too large\).*MB free"):
                write_json(tmp_path / "x.json", "x" * 5000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def test_the_response_cache_keeps_what_it_has(self, small, tmp_path):
        folder = small("200k")
        entry = dict(role="policy", step="sample", row="r", sample=0, model="m", usage=(1, 1), cost=0.0)
        with (  # noqa: PT012
            pytest.raises(InputError, match=r"store\.sqlite: cannot be written .*MB free"),
            ResponseCache(folder) as store,
        ):
            for number in range(1000):
                store.add(str(number), json.dumps("x" * 1000), **entry)
                kept = number
        with contextlib.suppress(InputError):  # still full: the cache is not called broken
            ResponseCache(folder).close()
        moved = tmp_path / "moved"
        shutil.copytree(folder, moved)
        with ResponseCache(moved) as store:
            assert kept > 10
            assert all(store.reply(str(number)) for number in range(kept))

    @pytest.mark.parametrize("name", ["SQLITE_FULL", "SQLITE_IOERR"])
    def test_opening_the_cache_on_a_full_disk(self, tmp_path, monkeypatch, name):
        def connect(*_, **__):
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = getattr(sqlite3, name)
            raise error

        monkeypatch.setattr(sqlite3, "connect", connect)
        with pytest.raises(InputError, match=r"store\.sqlite: cannot be written .*Free space"):
            ResponseCache(tmp_path)


class TestClosedPipe:
    def test_a_command_whose_reader_has_ended(self):
        stats = f"{BIN / 'apo-trl'} pairs stats apo_trl/demo/pairs --json; echo $? >&2"
        done = subprocess.run(
            ["bash", "-c", f"( {stats} ) | true"], capture_output=True, text=True, cwd=Path(__file__).parents[1]
        )
        assert done.stderr.split() == ["141"]

    def test_another_pipe_is_an_error(self, monkeypatch):
        with pytest.raises(BrokenPipeError), exit_on_error():
            raise BrokenPipeError


def test_messages_come_from_the_first_process_only(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit), exit_on_error():  # noqa: PT012
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # ends at once, even in a collective
        raise InputError("x")
    assert capsys.readouterr().err == ""
    assert not console.is_local_main_process()
    with pytest.raises(SystemExit), exit_on_error():
        raise StreamError("Only this process has read the row.")
    assert "Only this process" in capsys.readouterr().err
