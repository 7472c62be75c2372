"""What the README and the docs show is run, with only model, data, steps and hardware exchanged."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import trl
from conftest import rows
from test_cli import BIN, QUICK, write

import apo_trl

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_how_many_blocks_there_are():
    counts = {language: len(blocks(language)) for language in ("python", "sh", "yaml", "json", "bibtex", "text")}
    assert counts == {"python": 2, "sh": 4, "yaml": 1, "json": 1, "bibtex": 1, "text": 3}
    assert len(re.findall(r"^```\w+", README, re.MULTILINE)) == sum(counts.values())


def test_the_python_blocks(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.jsonl", rows())
    script, registering = blocks("python")
    exchanged = {
        '"Qwen/Qwen3-0.6B"': repr(str(model_dir)),
        '"trl-lib/ultrafeedback_binarized"': repr(str(tmp_path)),
        "learning_rate=1e-6": "learning_rate=1e-6, max_steps=2, use_cpu=True, bf16=False, report_to='none'",
    }
    for shown, used in exchanged.items():
        assert shown in script
        script = script.replace(shown, used)
    names = {}
    exec(compile(script, "README.md", "exec"), names)
    assert names["trainer"].state.global_step == 2
    try:
        exec(compile(registering, "README.md", "exec"), {})
        assert trl.DPOConfig(loss_type="apo_zero_norm", use_cpu=True, bf16=False)
    finally:
        apo_trl.unregister()


@pytest.mark.slow
@pytest.mark.parametrize(
    "line", [line for block in blocks("sh") if "pairs" not in block for line in block.splitlines()]
)
def test_the_commands(line, model_dir, tmp_path):
    write(tmp_path / "pairs.jsonl", rows())
    config = blocks("yaml")[0]
    assert "Qwen/Qwen3-0.6B" in config
    (tmp_path / "run.yaml").write_text(config.replace("Qwen/Qwen3-0.6B", str(model_dir)))
    shutil.copy(Path(trl.__file__).parent / "scripts" / "dpo.py", tmp_path / "my_dpo_script.py")
    words = shlex.split(line)
    if "run.yaml" not in words:
        words += [
            "--model_name_or_path",
            str(model_dir),
            "--dataset_name",
            "pairs.jsonl",
            "--output_dir",
            "Qwen3-0.6B-APO",
        ]
    if words[0] == "accelerate":
        words[2:2] = ["--cpu", "--num_processes", "1"]
    env = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*words, *QUICK], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "'loss': '1'" in done.stdout
    assert list((tmp_path / "Qwen3-0.6B-APO").glob("*.safetensors"))


@pytest.mark.slow
def test_building_pairs_and_training_on_them(model_dir, tmp_path):
    """The lines that build pairs and train on them, with tiny models and a scripted reviser."""
    from chat_server import ChatServer
    from test_pairs_build import answer

    building, training = next(block for block in blocks("sh") if "pairs build" in block).splitlines()
    env = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}

    def run(line, *more):
        done = subprocess.run([*shlex.split(line), *more], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    with ChatServer(answer) as server:
        assert "http://127.0.0.1:8000/v1" in building
        line = building.replace("http://127.0.0.1:8000/v1", server.url).replace("MODEL", "m")
        tiny = ["--policy_model", str(model_dir), "--policy_max_tokens", "400", "--policy_temperature", "100"]
        out = run(line, *tiny, "--max_edit_distance", "1")
    assert "Kept" in out
    run(training, "--model_name_or_path", str(model_dir), "--output_dir", "out", *QUICK)
    assert list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.slow
def test_from_a_dataset_to_a_report(model_dir, tmp_path):
    """The four commands, with a tiny model in the place of SmolLM2 and two steps in that of 48."""
    lines = next(block for block in blocks("sh") if "apo-trl anchor" in block).splitlines()
    assert [line.split()[1] for line in lines] == ["anchor", "train", "evaluate", "report"]
    env = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    said = []
    for line in lines:
        words = [str(model_dir) if word == "SmolLM2-135M-Instruct" else word for word in shlex.split(line)]
        words += ["--max_steps", "2", "--eval_strategy", "no"] if "train" in words else []
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        said.append(done.stdout)
    shown, evaluated = (block for block in blocks("text") if "loss_type" in block or "22 pairs" in block)
    # What a judge says does not depend on the model, and likelihoods do.
    for ours, theirs in zip(shown.splitlines(), said[0].splitlines(), strict=True):
        assert ours == theirs or "nats a token" in ours
    names = [line.split()[0] for line in evaluated.splitlines() if line.startswith("  ")]
    assert names[:9] == [line.split()[0] for line in said[2].splitlines() if line.startswith("  ")][:9]
    assert (tmp_path / "runs" / "first" / "evaluation.parquet").is_file()
    assert (tmp_path / "report.html").is_file()


def test_the_row_it_shows_trains(train, tmp_path):
    from datasets import load_dataset

    (tmp_path / "pairs.jsonl").write_text(blocks("json")[0] * 4)
    trainer = train(data=load_dataset("json", data_files=str(tmp_path / "pairs.jsonl"), split="train"), steps=1)
    assert len(trainer.train_dataset) == 4


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert missing == []


def test_the_file_tree_is_whole():
    tree = README.split("## Where things are")[1].split("```")[1]
    named = set(re.findall(r"^  (\w+\.py|\w+/)", tree, re.MULTILINE))
    there = {path.name + ("/" if path.is_dir() else "") for path in (ROOT / "apo_trl").iterdir()}
    assert named == {name for name in there if name.endswith((".py", "/")) and "__" not in name}


def test_the_commands_it_names_exist():
    text = subprocess.run([sys.executable, "-m", "apo_trl.cli.main", "--help"], capture_output=True, text=True).stdout
    for command in set(re.findall(r"apo-trl (\w+)", README)) - {"already"}:
        assert re.search(rf"^    {command} ", text, re.MULTILINE), command
