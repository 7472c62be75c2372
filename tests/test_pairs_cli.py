"""`apo-trl pairs` as a process: its help, its errors, Ctrl-C, what a terminal shows, and how it ends."""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
from chat_server import ChatServer

import apo_trl.pairs
from apo_trl.pairs.config.keys import ROLES
from apo_trl.pairs.config.settings import known_keys

KEY = "sk-test-0123456789abcdef"
COMMAND = [sys.executable, "-m", "apo_trl.cli.main", "pairs"]
HEAVY = ("torch", "trl", "transformers", "datasets", "accelerate")


def reply(body: dict) -> str:
    """A policy and a reviser in one; every tenth answer is revised to itself."""
    last = body["messages"][-1]["content"]
    if "<revision>" not in last:
        return f"SECRETREPLY to {last}"
    answer = last.split("<answer>\n")[1].split("\n</answer>")[0]
    return f"<revision>\n{answer}{'' if answer.endswith('0?') else ' Clearer.'}\n</revision>"


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe and its prompts: `recipe(server, 20, key=value)`."""

    def write(url: str, count: int = 20, **more) -> str:
        rows = [{"id": f"row{i}", "prompt": f"What is SECRETPROMPT {i}?"} for i in range(count)]
        (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
        keys = {"method": "clair", "prompts": str(tmp_path / "prompts.jsonl"), "output_dir": str(tmp_path / "out")}
        for role in ("policy", "reviser"):
            keys |= {f"{role}_base_url": url, f"{role}_model": f"{role}-model", f"{role}_max_retries": 0}
        (tmp_path / "mine.yaml").write_text(json.dumps(keys | {"concurrency": 4} | more))
        return str(tmp_path / "mine.yaml")

    return write


def call(*arguments: str, **more) -> subprocess.CompletedProcess:
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120, **more)
    for text in (done.stdout, done.stderr):
        assert "Traceback" not in text
        assert "SECRET" not in text
        assert KEY not in text
    return done


def fails(*arguments: str, status: int = 2, **more) -> str:
    done = call(*arguments, **more)
    assert (done.returncode, done.stdout) == (status, "")
    assert re.fullmatch(r"error: [^\n]*[.?]\n", done.stderr), done.stderr
    return done.stderr.removeprefix("error: ").strip()


def fresh(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout


def test_the_help_comes_at_once_and_imports_nothing_heavy():
    code = f"""
import contextlib, sys, time
began = time.monotonic()
from apo_trl.cli.main import main
with contextlib.suppress(SystemExit):
    main(["pairs", "build", "--help"])
print([name for name in {HEAVY} if name in sys.modules], time.monotonic() - began < 1)
"""
    text = fresh(code)
    assert text.splitlines()[-1] == "[] True"
    assert "--judge_then_clair" not in text
    shown = re.findall(r"^  --(\w+) ", text, re.MULTILINE)
    assert len(shown) == len(set(shown)) < 50  # what all roles have is shown once
    names = {re.sub("^ROLE_", f"{role}_", name) for name in shown for role in ROLES}
    assert {*known_keys(), "traceback"} <= names
    assert len([line for line in text.splitlines() if line]) < 90


def test_importing_every_module_of_the_package_leaves_torch_out():
    folder = Path(apo_trl.pairs.__file__).parent
    paths = [path.relative_to(folder).with_suffix("") for path in folder.rglob("*.py") if path.stem != "__init__"]
    # What runs models in this process is imported only then.
    names = sorted(".".join(path.parts) for path in paths if "in_process" not in path.parts)
    assert {"build", "config.settings", "llm.requests", "output.writer", "text.filters"} < set(names)
    assert len(names) >= 20
    code = f"""
import importlib, sys
for name in {names}:
    importlib.import_module(f"apo_trl.pairs.{{name}}")
    for heavy in set({HEAVY}) & set(sys.modules):
        sys.exit(f"{{name}} imports {{heavy}}")
print("none")
"""
    assert fresh(code) == "none\n"


@pytest.mark.slow
def test_what_is_wrong_on_the_command_line_is_one_line(recipe, tmp_path):
    mine = recipe("http://127.0.0.1:9/v1")
    assert fails("build", "pairs/clare").startswith("recipe: 'pairs/clare' not found. Did you mean")
    for words in (["--polcy_model", "x"], [f"--polcy_model={KEY}"]):
        assert fails("build", mine, *words).startswith("--polcy_model: unknown option. Did you mean '--policy_model'?")
    for words in (["--policy_api_key", KEY], [f"--policy_api_key={KEY}"], ["--policy_api_keys", KEY]):
        assert fails("build", mine, *words).startswith("policy_api_key"), words
        assert re.search("environment variable.*policy_api_key_env", fails("build", mine, *words))
    for name in (KEY, "sk_key_like_a_name"):
        message = fails("build", mine, "--reviser_api_key_env", name)
        assert re.match("reviser_api_key_env: .* variable .* Export", message)
        assert name not in message
    assert "one argument too many" in fails("build", mine, KEY)
    assert fails("build", mine, "--seed").startswith("--seed: expected one argument.")
    assert re.fullmatch("seed: .* integer.* Set .*", fails("build", mine, "--seed", "x"))
    assert fails("build", mine, "--dry_run=maybe").startswith("dry_run: must be a valid boolean")
    assert "RECIPE" in fails("build")
    assert "FILE" in fails("import-batch", mine)
    for name in ("none.jsonl", mine):
        assert re.match(r"prompts: .*\.jsonl, \.json or \.parquet file", fails("build", mine, "--prompts", name))
    (tmp_path / "bad.jinja").write_text("{{ ''.__class__ }}")
    assert "bad.jinja cannot be used" in fails("build", mine, "--reviser_template", str(tmp_path / "bad.jinja"))
    assert fails("build", mine, "--output_dir", mine).startswith("output_dir: ")
    assert "none.jsonl" in fails("stats", "none.jsonl")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_needs_no_key_and_sends_nothing(recipe, tmp_path):
    mine = recipe("http://127.0.0.1:9/v1", reviser_api_key_env="NOT_SET")
    assert fails("build", mine).startswith("reviser_api_key_env: ")
    for flag in (["--dry_run"], ["--dry_run", "true"]):
        done = call("build", mine, *flag)
        assert (done.returncode, done.stderr) == (0, "")
        assert re.search(r"policy +20 .*\nreviser +20 ", done.stdout)
    assert not (tmp_path / "out").exists()
    assert call("export-batch", mine).returncode == 0


@pytest.mark.slow
def test_the_status_says_how_it_ended(recipe, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    with ChatServer(reply, key=KEY) as server:
        keyed = {"policy_api_key_env": "MY_KEY", "reviser_api_key_env": "MY_KEY"}
        done = call("build", recipe(server.url, 20, **keyed))
        assert done.returncode == 0
        assert "Kept 18 of 20: " in done.stdout
        assert "Dropped: 2 unchanged." in done.stdout
        assert "Train on them: " in done.stdout
        assert re.search(
            r"^rows 20 of 20; kept 18; dropped 2 \(2 unchanged\); requests 4\d \([\d.]+/s\); "
            r"tokens [\d,]+(; left 0:00:00)?$",
            done.stderr, re.MULTILINE,
        )  # fmt: skip
        done = call("build", recipe(server.url, 1, **keyed), "--output_dir", "/proc/none/out")
        assert (done.returncode, done.stdout) == (2, "")
        monkeypatch.setenv("MY_KEY", KEY + "x")
        done = call("build", recipe(server.url, 3, output_dir=str(Path(recipe(server.url)).parent / "2"), **keyed))
        assert done.returncode == 1  # refused
        assert "Stopped early: " in done.stderr
        assert "MY_KEY" not in done.stderr
    with ChatServer(lambda body: "Always the same.", key=None) as server:
        done = call("build", recipe(server.url, 3, output_dir=str(Path(recipe(server.url)).parent / "3")))
        assert done.returncode == 1  # nothing kept
        assert "Kept 0 of 3" in done.stdout
    done = call("build", recipe("http://127.0.0.1:9/v1", 3, output_dir=str(Path(recipe(server.url)).parent / "4")))
    assert done.returncode == 1  # nobody there
    assert "Stopped early: " in done.stderr


@pytest.mark.slow
def test_ctrl_c_ends_with_a_word_and_loses_nothing(recipe, tmp_path):
    with ChatServer(reply, latency=0.05) as server:
        mine = recipe(server.url, 100)
        process = subprocess.Popen([*COMMAND, "build", mine], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and server.count < 60:
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=30)
        assert (process.returncode, out) == (130, "")
        lines = [line for line in errors.splitlines() if line]
        assert lines[-1].startswith("Interrupted.")
        assert len(lines) <= 4  # what the two servers honour, how far it got, and that it was interrupted
        assert "Traceback" not in errors
        before = server.count
        done = call("build", mine)
        assert "Kept 90 of 100" in done.stdout
        assert before < 150
        # Two requests for each row and two probes for each model; and again what was in flight: 4 at once.
        assert 204 <= server.count <= 204 + 4


def in_terminal(command: list[str], during=lambda text: None) -> tuple[int, str]:
    """Run a command with a terminal as its standard error, and give its status and all that was written there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, stdin=theirs, env=environment)
    os.close(theirs)
    parts: list[str] = []

    def listen() -> None:
        while True:
            try:
                data = os.read(ours, 65536)
            except OSError:  # the other side is closed
                return
            if not data:
                return
            parts.append(data.decode(errors="replace"))

    listener = threading.Thread(target=listen)
    listener.start()
    while process.poll() is None:
        during(process)
        time.sleep(0.01)
    listener.join(10)
    os.close(ours)
    return process.returncode, "".join(parts)


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@pytest.mark.slow
def test_a_terminal_shows_the_state_as_it_changes_and_one_line_in_the_end(recipe):
    with ChatServer(reply, latency=0.1) as server:
        prices = {"policy_output_price": 100.0}
        status, raw = in_terminal([*COMMAND, "build", recipe(server.url, 60, **prices)])
    assert status == 0
    text = plain(raw)
    assert "SECRET" not in text
    assert len(set(re.findall(r"rows +(\d+) of 60", text))) >= 4
    for words in (r"kept +\d+", r"dropped +\d+ \(\d+ unchanged\)", r"requests +\d+ \(\d+\.\d/s\)", r"tokens +[\d,]{3,}",
                  r"cost +[\d.]+", r"left +\d:\d\d:\d\d"):  # fmt: skip
        assert re.search(words, text), words
    assert raw.count("\x1b[?25l") == raw.count("\x1b[?25h") == 1  # the cursor is hidden and shown again
    last = raw.rstrip().rpartition("\n")[2]
    assert re.search(r"rows 60 of 60; kept 54; dropped 6 \(6 unchanged\); ", last)
    # The table is wiped before the last line, and after it nothing moves the cursor up or wipes anything.
    assert raw[: raw.rindex("rows 60 of 60; ")].rstrip("\r\n").endswith("\x1b[2K")
    assert not re.search(r"\x1b\[(\d*A|2K)", raw[raw.rindex("rows 60 of 60; ") :])


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_gives_it_back_whole(recipe):
    sent = []

    def interrupt(process) -> None:
        if server.count > 20 and not sent:
            sent.append(process.send_signal(signal.SIGINT))

    with ChatServer(reply, latency=0.1) as server:
        status, raw = in_terminal([*COMMAND, "build", recipe(server.url, 60)], interrupt)
    assert status == 130
    assert "Traceback" not in raw
    assert raw.rstrip().endswith("Interrupted.")
    assert raw.count("\x1b[?25l") == raw.count("\x1b[?25h") == 1


@pytest.mark.slow
def test_without_a_terminal_a_line_is_logged_now_and_then(recipe, monkeypatch):
    code = (
        "import apo_trl.pairs.progress as progress, sys; progress._EVERY = 0.3\n"
        "from apo_trl.cli.main import main; main(sys.argv[1:])"
    )
    with ChatServer(reply, latency=0.1) as server:
        mine = recipe(server.url, 30)
        command = [sys.executable, "-c", code, "pairs", "build", mine]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("rows ")]
    assert 3 <= len(lines) <= 8
    assert len(set(lines)) == len(lines)
    assert "\x1b" not in done.stderr
    assert "SECRET" not in done.stdout + done.stderr


def test_what_is_not_installed_is_said_in_one_sentence(monkeypatch, capsys):
    from apo_trl import pairs as data
    from apo_trl.cli import main as cli

    monkeypatch.setattr(data, "find_spec", lambda name: None if name == "rapidfuzz" else object())
    for arguments, status in ((["pairs", "stats", "x.jsonl"], 2), (["recipes", "check", "pairs/clair"], 1)):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == status
        captured = capsys.readouterr()
        assert "Building pairs needs rapidfuzz: run `pip install 'apo-trl[pairs]'`." in captured.out + captured.err
