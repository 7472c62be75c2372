"""`apo-trl rounds`: stages, markers, resuming, changed settings, the page, disk use, and the server of the policy.

The fast tests put a script in the place of the commands; the slow one runs the real ones on a tiny model.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from test_cli import write

from apo_trl.errors import InputError
from apo_trl.io.resources import find_recipe
from apo_trl.rounds import processes, run
from apo_trl.rounds.processes import Server
from apo_trl.rounds.run import run_rounds
from apo_trl.rounds.settings import Settings, keep_settings, parse

STUB = """\
import json, os, pathlib, sys, time, yaml

def put(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))

command, *words = sys.argv[1:]
root = pathlib.Path(os.environ["STUB"])
with (root / "calls").open("a") as calls:
    print(command, *words, file=calls)

def refused(name):
    return {"policy_error": 2} if (root / f"refused-{name}").exists() else {}

fails = root / f"fail-{command}"
if fails.exists():
    fails.unlink()
    print("the disk is on fire", flush=True)
    sys.exit(3)
if (root / f"sleep-{command}").exists():
    (root / "pid").write_text(str(os.getpid()))
    time.sleep(60)
if command == "train" and (root / "edits").exists():
    pathlib.Path((root / "edits").read_text()).write_text("")
if command == "pairs":
    keys = yaml.safe_load(open(words[1]))
    none = (root / f"none-{pathlib.Path(keys['output_dir']).parent.name}").exists()
    put(pathlib.Path(keys["output_dir"], "report.json"),
        {"kept": 0 if none else 7, "dropped": {"no_revision": 5} | refused("pairs"),
         "complete": not (root / "incomplete").exists(),
         "stopped": "max_cost is reached." if (root / "stopped").exists() else ""})
    sys.exit(none)
elif command == "train":
    keys = yaml.safe_load(open(words[0]))
    out = pathlib.Path(keys["output_dir"])
    log = [{"step": step, "apo/displaced": share} for step, share in enumerate((1.0, 1.0, 0.5, 0.125, 0.125))]
    put(out / "trainer_state.json", {"log_history": [*log, {"step": 5}]})
    put(out / "adapter_model.safetensors", keys["model_name_or_path"])
    put(out / "checkpoint-2" / "optimizer.pt", "large")
elif command == "merge":
    put(pathlib.Path(words[2], "model.safetensors"), words[0])
elif command == "score":
    keys = dict(zip(words[::2], words[1::2]))
    number = int(pathlib.Path(keys["--output_dir"]).parent.name.split("-")[1])
    share = [0.2 * number, 0.1 * number, 0.3 * number]
    kinds = {"<b>": {"prompts": 5, "followed": share}}
    put(pathlib.Path(keys["--output_dir"], "score.json"),
        {"followed": share, "by_kind": kinds, "broken": 0.1, "words": 12.5, "problems": refused("score")})
"""
SERVER = """\
import http.server, os, pathlib, subprocess, sys
child = subprocess.Popen(["sleep", "100"])
pathlib.Path(sys.argv[3]).open("a").write(f"{sys.argv[1]} {os.getpid()} {child.pid}\\n")

class Handler(http.server.BaseHTTPRequestHandler):
    loads = 3 if "loads" in sys.argv else 0

    def do_GET(self):  # llama.cpp lists its model while it loads it
        print(self.path, flush=True)
        Handler.loads -= self.path == "/health"
        self.send_response(200 if self.path == "/v1/models" else 503 if Handler.loads > 0 else 404)
        self.end_headers()

    def log_message(self, *_):
        pass

http.server.HTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """The folder of the stub of the commands, and its list of calls in `calls`."""
    script = tmp_path / "stub.py"
    script.write_text(STUB)
    monkeypatch.setenv("STUB", str(tmp_path))
    monkeypatch.setattr(processes, "COMMAND", (sys.executable, str(script)))
    monkeypatch.setattr(run, "check", lambda settings: None)  # it takes a second, and has its own test
    monkeypatch.setattr("apo_trl.rounds.settings.source_of", str)  # as does this
    return tmp_path


@pytest.fixture
def make(tmp_path, model_dir):
    """Settings of two rounds: `make(reference="first_model", train={...})`; sections are updated."""

    def build(**changes):
        values = {
            "model_name_or_path": str(model_dir),
            "output_dir": str(tmp_path / "out"),
            "rounds": 2,
            "pairs": {
                "method": "clair",
                "prompts": write(tmp_path / "prompts.jsonl", [{"id": str(i), "prompt": f"Q {i}"} for i in range(5)]),
                "reviser_function": "apo_trl.pairs.instructions:revise",
            },
            "train": {"use_peft": True, "max_steps": 2},
            "score": {
                "prompts": write(tmp_path / "held_out.jsonl", [{"prompt": "Q"}]),
                "judge_function": "apo_trl.checks:number",
            },
        }
        for key, value in changes.items():
            values[key] = values[key] | value if isinstance(value, dict) else value
        path = tmp_path / "rounds.yaml"
        path.write_text(yaml.safe_dump(json.loads(json.dumps(values, default=str))))
        return parse(str(path))

    return build


def calls(folder):
    return [line.split()[0] for line in (folder / "calls").read_text().splitlines()]


def of(folder, number, name):
    return yaml.safe_load((folder / f"out/round-{number}/{name}.yaml").read_text())


def is_running(pid):
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


ROUND = ["pairs", "train", "score"]


class TestStages:
    def test_each_round_answers_with_the_result_of_the_last(self, stub, make):
        settings = make()
        page = run_rounds(settings)
        assert calls(stub) == ["score", *ROUND, *ROUND]
        first, policy = settings.model_name_or_path, str(stub / "out/round-1/policy")
        assert [of(stub, number, "pairs")["policy_model"] for number in (1, 2)] == [first, policy]
        assert [of(stub, number, "train")["model_name_or_path"] for number in (1, 2)] == [first, policy]
        assert [of(stub, number, "pairs")["seed"] for number in (1, 2)] == [1, 2]
        assert not [number for number in (1, 2) if "ref_model_name_or_path" in of(stub, number, "train")]
        summary = json.loads((stub / "out/summary.json").read_text())
        assert [row["followed"][0] for row in summary["rounds"]] == [0.0, 0.2, 0.4]
        assert [row.get("pairs") for row in summary["rounds"]] == [None, 7, 7]
        assert summary["rounds"][2]["displaced"] == 0.25  # the mean of the last three
        html = page.read_text()
        assert "40%" in html
        assert "&lt;b&gt;" in html
        assert "<b>" not in html

    def test_the_reference_is_the_first_model(self, stub, make):
        settings = make(reference="first_model")
        run_rounds(settings)
        assert "ref_model_name_or_path" not in of(stub, 1, "train")  # its start is the first model
        assert of(stub, 2, "train")["ref_model_name_or_path"] == settings.model_name_or_path

    def test_merged(self, stub, make):
        run_rounds(make(adapter="merge"))
        assert calls(stub) == ["score", *["pairs", "train", "merge", "score"] * 2]
        assert of(stub, 2, "train")["model_name_or_path"] == str(stub / "out/round-1/merged")
        assert json.loads((stub / "out/round-2/merged/model.safetensors").read_text()).endswith("round-2/policy")

    def test_full_fine_tuning_has_nothing_to_merge(self, stub, make):
        run_rounds(make(adapter="merge", train={"use_peft": False}))
        assert "merge" not in calls(stub)

    def test_a_later_round_without_pairs_ends_the_run(self, stub, make, capsys):
        (stub / "none-round-2").touch()
        for _ in range(2):  # and again when it is resumed
            assert "after\n1 round." in run_rounds(make(rounds=3)).read_text()
            assert "(5 no_revision): nothing to train on. The run ends with round 1." in capsys.readouterr().out
            assert len(json.loads((stub / "out/summary.json").read_text())["rounds"]) == 2
        assert (stub / "out/round-1/policy/adapter_model.safetensors").exists()
        assert calls(stub) == ["score", *ROUND, "pairs", "pairs"]

    def test_a_first_round_without_pairs_is_an_error(self, stub, make):
        (stub / "none-round-1").touch()
        with pytest.raises(InputError, match=r"round 1, pairs: ended with status 1"):
            run_rounds(make())

    def test_a_round_whose_requests_failed_is_an_error(self, stub, make):
        (stub / "none-round-2").touch()
        run_rounds(make(rounds=1))
        (stub / "incomplete").touch()
        with pytest.raises(InputError, match=r"round 2, pairs: ended with status 1"):
            run_rounds(make())

    def test_prompts_of_each_round(self, stub, make):
        run_rounds(make(prompts_per_round=2, rounds=3))
        seen = []
        for number in (1, 2, 3):
            path = Path(of(stub, number, "pairs")["prompts"])
            seen += [json.loads(line)["id"] for line in path.read_text().splitlines()]
        assert len(seen) == 6
        assert sorted(seen[:5]) == list("01234")
        assert seen[5] == seen[0]


WEIGHTS = {
    ("continue", "last"): {"round-2/policy/adapter_model"},
    ("continue", "all"): {"round-1/policy/adapter_model", "round-2/policy/adapter_model"},
    ("merge", "last"): {"round-2/merged/model"},
    ("merge", "all"): {f"round-{n}/{f}" for n in (1, 2) for f in ("policy/adapter_model", "merged/model")},
}


@pytest.mark.parametrize(("adapter", "keep"), WEIGHTS)
def test_what_stays_on_the_disk(stub, make, adapter, keep):
    run_rounds(make(adapter=adapter, keep=keep))
    out = stub / "out"
    left = {str(path.relative_to(out).with_suffix("")) for path in out.rglob("*.safetensors")}
    assert left == WEIGHTS[adapter, keep]
    assert not list(out.rglob("checkpoint-*"))
    assert len(list(out.rglob("trainer_state.json"))) == 2


class TestResume:
    @pytest.mark.parametrize("name", ROUND)
    def test_after_a_stage_that_failed(self, stub, make, name):
        (stub / f"fail-{name}").touch()
        number = 0 if name == "score" else 1
        with pytest.raises(
            InputError, match=rf"^round {number}, {name}: .*status 3; 'the disk is on fire'\. See .*\.log"
        ):
            run_rounds(make())
        before = len(calls(stub))
        run_rounds(make())
        expected = ["score", *ROUND, *ROUND]
        assert calls(stub)[before:] == expected[before - 1 :]

    def test_nothing_runs_twice(self, stub, make):
        run_rounds(make())
        before = calls(stub)
        run_rounds(make())
        assert calls(stub) == before
        run_rounds(make(rounds=3))
        assert calls(stub) == [*before, *ROUND]

    @pytest.mark.parametrize("name", ["pairs", "score"])
    def test_what_failed_is_requested_once_more_and_then_left_out(self, stub, make, capsys, name):
        (stub / f"refused-{name}").touch()
        page = run_rounds(make(rounds=1)).read_text()
        again = ["score"] * (1 + (name == "score")), ["pairs"] * (1 + (name == "pairs"))
        assert calls(stub) == [*again[0], *again[1], "train", *again[0]]
        assert "2 rows are left out: their requests failed twice" in capsys.readouterr().out
        assert "Round 1: 2 rows are left out" in page
        rounds = json.loads((stub / "out/summary.json").read_text())["rounds"]
        assert [row["failed_requests"] for row in rounds] == [2 * (name == "score"), 2]

    def test_pairs_of_a_run_that_stopped_early_are_not_trained_on(self, stub, make):
        (stub / "stopped").touch()
        with pytest.raises(InputError, match=r"round 1, pairs: max_cost is reached"):
            run_rounds(make())
        assert "train" not in calls(stub)
        (stub / "stopped").unlink()
        run_rounds(make())
        assert calls(stub) == ["score", "pairs", *ROUND, *ROUND]

    CHANGES = (
        {"reference": "first_model"}, {"adapter": "merge"}, {"train": {"max_steps": 3}}, {"seed": 1},
        {"pairs": {"policy_temperature": 0.5}}, {"score": {"max_prompts": 3}, "prompts_per_round": 2},
    )  # fmt: skip

    @pytest.mark.parametrize("changes", CHANGES, ids=str)
    def test_changed_settings_are_refused_by_name(self, stub, make, changes):
        run_rounds(make())
        names = [f"{key}.{next(iter(value))}" if isinstance(value, dict) else key for key, value in changes.items()]
        with pytest.raises(InputError, match=rf"^{', '.join(sorted(names))}: changed since"):
            run_rounds(make(**changes))

    CONTENTS = (
        "pairs.prompts", "pairs.reviser_template", "pairs.reviser_function", "score.prompts", "score.judge_function",
    )  # fmt: skip

    @pytest.mark.parametrize("name", CONTENTS)
    def test_a_changed_file_is_refused(self, make, tmp_path, monkeypatch, name):
        section, _, key = name.partition(".")
        path = tmp_path / "file.py"
        path.write_text("def f(prompts): return prompts\n")
        settings = make(**{section: {key: f"{path}:f" if key.endswith("_function") else str(path)}})
        if not key.endswith("_function"):
            monkeypatch.setattr("apo_trl.rounds.settings.source_of", str)
        keep_settings(settings, tmp_path)
        keep_settings(settings, tmp_path)
        path.write_text("def f(completions): return completions\n")
        with pytest.raises(InputError, match=rf"^{re.escape(name)} \(content\): changed"):
            keep_settings(settings, tmp_path)

    def test_a_file_that_changes_during_a_run_is_refused(self, stub, make):
        settings = make()
        (stub / "edits").write_text(settings.pairs["prompts"])
        with pytest.raises(InputError, match=r"^pairs\.prompts \(content\): changed"):
            run_rounds(settings)
        assert calls(stub) == ["score", "pairs", "train"]

    def test_a_function_that_cannot_be_loaded_is_named(self, make, tmp_path):
        with pytest.raises(InputError, match=r"^score\.judge_function: 'checks\.py:judge' cannot be loaded.* Set"):
            keep_settings(make(score={"judge_function": "checks.py:judge"}), tmp_path)


def start(stub, *options):
    code = f"""
from apo_trl.rounds import processes
processes.COMMAND = {processes.COMMAND!r}
from apo_trl.cli.main import main
main({["rounds", str(stub / "rounds.yaml"), *options]!r})
"""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_signal_leaves_no_process(stub, make, number, status):
    make()
    (stub / "sleep-train").touch()
    process = start(stub)
    wait_for(lambda: (stub / "pid").exists())
    busy = start(stub)
    assert "another run is writing to" in busy.communicate(timeout=60)[0]
    assert busy.returncode == 2
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == status
    if number != signal.SIGKILL:
        assert "Interrupted. Run the same command again to resume." in output
    wait_for(lambda: not is_running(int((stub / "pid").read_text())))
    (stub / "sleep-train").unlink()
    again = start(stub)
    assert "rounds.html" in again.communicate(timeout=60)[0]
    assert calls(stub) == ["score", "pairs", "train", *ROUND[1:], *ROUND]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


class TestServer:
    @pytest.fixture
    def command(self, tmp_path):
        (tmp_path / "server.py").write_text(SERVER)
        return f"{sys.executable} {tmp_path / 'server.py'} {{model}} {{port}} {tmp_path / 'served'}"

    def test_each_model_is_served_and_ended(self, stub, make, command):
        run_rounds(make(policy_serve=command))
        served = [line.split() for line in (stub / "served").read_text().splitlines()]
        merged = [str(stub / f"out/round-{number}/merged") for number in (1, 2)]
        assert [model for model, *_ in served] == [make().model_name_or_path, *merged]
        wait_for(lambda: not [pid for _, *pids in served for pid in pids if is_running(int(pid))], 10)
        assert of(stub, 2, "train")["model_name_or_path"] == str(stub / "out/round-1/policy")
        assert of(stub, 2, "pairs")["policy_base_url"].startswith("http://127.0.0.1:")
        assert "--policy_base_url http://127.0.0.1:" in (stub / "calls").read_text()
        assert [path.parent.name for path in (stub / "out").rglob("model.safetensors")] == ["merged"]

    def test_the_packaged_model_is_a_folder_to_a_server(self, stub, make, command, monkeypatch):
        from apo_trl.models.packaged import MODEL_NAME

        monkeypatch.setenv("APO_TRL_CACHE", str(stub))
        (stub / MODEL_NAME).mkdir()
        run_rounds(make(policy_serve=command, model_name_or_path=MODEL_NAME, rounds=1))
        assert (stub / "served").read_text().split()[0] == str(stub / MODEL_NAME)
        assert of(stub, 1, "pairs")["policy_model"] == str(stub / MODEL_NAME)
        assert f"--model {stub / MODEL_NAME}\n" in (stub / "calls").read_text()

    def test_a_server_that_loads_is_not_ready(self, tmp_path, command):
        server = Server(f"{command} loads", 30, tmp_path / "log")
        try:
            server.url("model")
        finally:
            server.stop()
        assert (tmp_path / "log").read_text().split() == [*["/health"] * 3, "/v1/models"]

    def test_ended_when_a_stage_fails(self, stub, make, command):
        (stub / "fail-pairs").touch()
        with pytest.raises(InputError, match="round 1, pairs"):
            run_rounds(make(policy_serve=command))
        (line,) = (stub / "served").read_text().splitlines()
        wait_for(lambda: not [pid for pid in line.split()[1:] if is_running(int(pid))], 10)

    @pytest.mark.parametrize(
        ("words", "field"),
        [
            ("-c 'print(\"no memory\"); raise SystemExit(4)'", r"policy_serve: ended with status 4 .*no memory"),
            ("-c 'import time; time.sleep(60)'", r"policy_serve_timeout: must be ready within 0\.5 s"),
        ],
    )
    def test_not_ready(self, tmp_path, words, field):
        server = Server(f"{sys.executable} {words}", 0.5 if "timeout" in field else 30, tmp_path / "log")
        with pytest.raises(InputError, match=rf"^{field}.*log"):
            server.url("model")
        server.stop()

    def test_no_such_command(self, tmp_path):
        with pytest.raises(InputError, match=r"^policy_serve: 'vlm-serve' cannot be started"):
            Server("vlm-serve {model} {port}", 1, tmp_path / "log").url("model")


class TestSettings:
    def test_options_replace_keys(self):
        options = ["--rounds", "1", "--train.max_steps=3", "--pairs.policy_max_tokens", "8", "--keep", "all"]
        settings = parse("rounds/instructions", options)
        found = settings.rounds, settings.train["max_steps"], settings.pairs["policy_max_tokens"], settings.keep
        assert found == (1, 3, 8, "all")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--runds", "3"], r"^runds: unknown key\. Did you mean 'rounds'\?"),
            (["--rounds", "0"], r"^rounds: input should be greater"),
            (["--reference", "start"], r"^reference: input should be 'round_start' or 'first_model'"),
            (["--train.output_dir", "x"], r"^train\.output_dir: set by the run\. Remove it"),
            (["--policy_serve", "vllm serve {model}"], r"^policy_serve: \{port\} is missing"),
            (["--rounds"], r"^options: must be"),
        ],
    )
    def test_errors_name_the_key(self, options, message):
        with pytest.raises(InputError, match=message):
            parse("rounds/instructions", options)

    @pytest.mark.parametrize("section", ["pairs", "train", "score"])
    def test_a_key_of_a_section_is_checked_before_anything_runs(self, tmp_path, make, section):
        with pytest.raises(InputError, match="polici"):
            run.check(make(**{section: {"polici": 1}}))

    def test_the_recipe_is_accepted(self, tmp_path):
        assert find_recipe("rounds/instructions").is_file()
        settings = parse("rounds/instructions", ["--output_dir", str(tmp_path)])
        assert isinstance(settings, Settings)
        run.check(settings)


class TestStart:
    """What `ref_model_name_or_path`, and an adapter as the model, do to a training run."""

    @pytest.fixture
    def arguments(self, model_dir, tmp_path, dataset):
        data = write(tmp_path / "pairs.jsonl", list(dataset))

        def build(model, output, *more):
            keys = {"model_name_or_path": model, "dataset_name": data, "output_dir": tmp_path / output, "max_steps": 2}
            keys |= {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no"}
            keys |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
            return [*(str(word) for key, value in keys.items() for word in (f"--{key}", value)), *more]

        return build

    def test_an_adapter_goes_on_from_where_it_is(self, arguments, model_dir, tmp_path):
        from safetensors.torch import load_file

        from apo_trl import train
        from apo_trl.training.arguments import parse as parse_run
        from apo_trl.training.script import make_trainer

        train.main(arguments(model_dir, "first", "--use_peft", "--lora_r", "4", "--beta", "0.1"))
        first = load_file(tmp_path / "first/adapter_model.safetensors")
        again = arguments(tmp_path / "first", "second", "--use_peft")
        train.main(again)
        second = load_file(tmp_path / "second/adapter_model.safetensors")
        assert first.keys() == second.keys()
        assert any((first[name] != second[name]).any() for name in first)
        assert not (tmp_path / "second/ref").exists()

        logged = json.loads((tmp_path / "second/trainer_state.json").read_text())["log_history"]
        assert logged[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)  # the reference is the start
        held = arguments(tmp_path / "first", "third", "--ref_model_name_or_path", str(model_dir))
        trainer = make_trainer(parse_run(held)[0])
        assert set(trainer.model.peft_config) == {"default"}
        trainer.train()
        before = next(entry for entry in trainer.state.log_history if "rewards/margins" in entry)
        assert abs(before["rewards/margins"]) > 1e-4  # the first model is not


REVISER = """
def revise(completions, **columns):
    return [each[-1]["content"] + " DONE" for each in completions]

def judge(completions, **columns):
    return [float("a" in each[-1]["content"]) for each in completions]
"""


@pytest.mark.slow
def test_a_real_server_answers(model_dir, tmp_path, monkeypatch):
    """One round with `transformers serve`: the first model answers, then a merged one. The commands run in process."""
    import pyarrow.parquet as pq

    from apo_trl import train
    from apo_trl.cli.main import main

    def run_command(arguments, log, field):
        if arguments[0] == "train":
            train.main(arguments[1:])  # without its launcher
        else:
            main(arguments)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "run_command", run_command)
    Path("functions.py").write_text(REVISER)
    write(tmp_path / "prompts.jsonl", [{"id": str(i), "prompt": f"Say {i}."} for i in range(6)])
    sampling = {"do_sample": True, "eos_token_id": 0}
    keys = {
        "prompts": "prompts.jsonl", "policy_max_tokens": 64, "max_failures": 1000,
        "policy_extra_body": {"generation_config": json.dumps(sampling), "logit_bias": {"0": 3.0}},
    }  # fmt: skip
    settings = Settings(
        model_name_or_path=str(model_dir), output_dir="out", rounds=1,
        pairs=keys | {"method": "clair", "reviser_function": "functions.py:revise"},
        train={"use_peft": True, "lora_r": 4, "max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True,
               "bf16": False, "gradient_checkpointing": False, "report_to": "none", "logging_steps": 1},
        score=keys | {"judge_function": "functions.py:judge", "policy_temperature": 1.0},
        policy_serve=f"{Path(sys.executable).parent}/transformers serve {{model}} --port {{port}} --device cpu",
    )  # fmt: skip
    run_rounds(settings)
    log = Path("out/serve.log").read_text()
    requests = Counter(re.findall(r"Request received\] Model: (.*)@main", log))
    probes = 2
    assert requests == {str(model_dir): 2 * (6 + probes), "out/round-1/merged": 6 + probes}
    assert log.count('"POST /v1/chat/completions HTTP/1.1" 200') == requests.total()
    for number in (0, 1):
        answers = pq.read_table(f"out/round-{number}/score/answers.parquet").to_pylist()
        assert len({row["answer"] for row in answers if row["score"] is not None}) > 1
    report = json.loads(Path("out/round-1/pairs/report.json").read_text())
    assert report["complete"]
    assert report["kept"] > 1
    servers = [int(pid) for pid in re.findall(r"Started server process \[(\d+)", log)]
    assert len(servers) == 2
    assert not [pid for pid in servers if is_running(pid)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_twice_the_result_is_the_same(model_dir, tmp_path, monkeypatch):
    """Two rounds of the real commands on a tiny model, killed at random moments, and unbroken."""
    monkeypatch.chdir(tmp_path)
    Path("functions.py").write_text(REVISER)
    write(tmp_path / "prompts.jsonl", [{"id": str(i), "prompt": f"Say {i}."} for i in range(16)])
    values = {
        "model_name_or_path": str(model_dir), "output_dir": "out", "rounds": 2,
        "pairs": {"method": "clair", "prompts": "prompts.jsonl", "reviser_function": "functions.py:revise",
                  "policy_max_tokens": 256, "max_failures": 1000},
        "train": {"use_peft": True, "lora_r": 4, "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2,
                  "learning_rate": 1e-2, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
                  "report_to": "none", "logging_steps": 1},
        "score": {"prompts": "prompts.jsonl", "judge_function": "functions.py:judge", "policy_max_tokens": 32},
    }  # fmt: skip
    Path("rounds.yaml").write_text(yaml.safe_dump(values))

    def begin(output):
        command = [sys.executable, "-m", "apo_trl.cli.main", "rounds", "rounds.yaml", "--output_dir", output]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    whole = begin("whole")
    output = whole.communicate(timeout=400)[0]
    assert whole.returncode == 0, output[-2000:]
    chance = random.Random(5)
    for stage in ("round-1/train.log", "round-2/pairs.log"):
        process = begin("cut")
        wait_for(Path("cut", stage).exists, 300)
        time.sleep(chance.uniform(0, 4))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    last = begin("cut")
    output = last.communicate(timeout=400)[0]
    assert last.returncode == 0, output[-2000:]
    for number in (1, 2):
        for name in ("pairs/pairs.jsonl", "policy/adapter_model.safetensors"):
            if (path := Path("whole", f"round-{number}", name)).exists():  # `keep: last`
                assert path.read_bytes() == Path("cut", f"round-{number}", name).read_bytes(), path
    results = [json.loads(Path(folder, "summary.json").read_text())["rounds"] for folder in ("whole", "cut")]
    for row in [*results[0], *results[1]]:
        del row["seconds"]
    assert results[0] == results[1]
    assert results[0][2]["pairs"] > 2
    assert os.path.getsize("whole/round-2/policy/adapter_model.safetensors") > 1000
