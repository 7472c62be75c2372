"""The commands in blocks of README and docs run, in the order of each page, and have their result.

Replaced are models, data, steps, hardware and the addresses of servers. A line is skipped only if its comment says that
it needs a GPU.
"""

import re
import shlex
import shutil
import sys
from pathlib import Path

import datasets
import pytest
import transformers.trainer
import trl
from chat_server import ChatServer
from conftest import make_model, make_tokenizer, rows
from test_cli import BIN, QUICK, command, write
from test_demo import NEEDS_MODEL
from test_docs import DOCS, READ, ROOT, commands, fences
from test_pairs_batch import answered
from test_pairs_build import answer

from apo_trl import train
from apo_trl.cli import main as cli

INSTALLED = Path("installed/apo_trl/_recipes/smollm2-135m/demo.yaml")
ADAPTER = Path("SmolLM2-135M-APO-zero-lora/adapter_model.safetensors")
# What each line prints or, with a path, writes; None for what needs a GPU.
RESULTS = {
    "README.md": [
        "apo-trl demo", "pytest",
        Path("runs/pairs/clair_local/pairs.jsonl"), "kept", Path("runs/anchor/PAIRS/anchor.json"), ADAPTER,
        Path("RUN/evaluation.parquet"), INSTALLED,
    ],
    "CONTRIBUTING.md": ["make", "expand"],
    "index.md": ["apo-trl demo"],
    "start.md": [
        INSTALLED, "apo-trl demo", "held-out pairs",
        "run.yaml", Path("Qwen3-0.6B-APO/adapter_model.safetensors"), Path("Qwen3-0.6B-APO/evaluation.parquet"),
        Path("report.html"), Path("merged/config.json"),
    ],
    "recipes.md": [
        "llama-3-8b/apo_zero_lora", "loss_type: apo_zero", Path("mine.yaml"), "mine.yaml", "of 80", None, None,
        Path("merged/config.json"), ADAPTER,
    ],
    "data.md": ["rejected"],
    "pairs.md": [
        Path("runs/pairs/clair_local/pairs.jsonl"), ADAPTER, Path("installed/apo_trl/_recipes/pairs/clair.yaml"),
        "kept", "policy_truncated", "policy-", None, "imported", "reviser-", "Kept 9 of 9",
    ],
    "anchor.md": [
        "loss_type: apo_zero", Path("runs/first/adapter_model.safetensors"), Path("runs/first/evaluation.parquet"),
        Path("report.html"),
        "loss_type: apo_zero", Path("RUN/evaluation.parquet"), "48 evaluated pairs", Path("report.html"),
        Path("report.html"), Path("runs/compare/compare.json"),
    ],
    "score.md": [Path("scores/before/score.json"), Path("scores/after/answers.parquet"), Path("report.html")],
    "evidence.md": ["docs/evidence.py"],
    "answers.md": ["docs/answers.py"],
    "performance.md": [None, None, None, None, Path("gpu.json")],
    "memory.md": ["of 24"],
    "migrating.md": ["'rl_beta'", *[Path("out/model.safetensors")] * 4],
}  # fmt: skip
FAILS = {"apo-trl recipes check old.yaml": 1}  # as the page says
NEEDS_GPU = re.compile(r"# needs .*\bGPUs?\b")


ELSEWHERE = re.compile("--fresh|docs/answers.py|apo-trl rounds")  # they have their own tests


def shown(page):
    """The commands in the blocks of a page that are run here."""
    return [line.text for line in commands(page) if not line.inline and not ELSEWHERE.search(line.text)]


def test_every_command_has_a_result():
    lines = {page.name: shown(page) for page in READ if shown(page)}
    assert {page: len(found) for page, found in lines.items()} == {page: len(found) for page, found in RESULTS.items()}
    skipped = [line for found in lines.values() for line in found if NEEDS_GPU.search(line)]
    assert len(skipped) == sum(results.count(None) for results in RESULTS.values())


def reply(body):
    """Prefer the answers of `rows` when judging, otherwise answer as in the tests of building pairs."""
    answers = dict(re.findall(r"<answer_([ab])>\n(.*?)\n</answer_", body["messages"][-1]["content"], re.DOTALL))
    if not answers:
        return answer(body)
    good = [side for side, text in answers.items() if text.startswith("It is")]
    return f"Read. [[{good[0].upper() if len(good) == 1 else 'C'}]]"


@pytest.fixture(scope="module")
def trained(model_dir, tmp_path_factory):
    """An adapter's folder, as training leaves it."""
    folder = tmp_path_factory.mktemp("trained")
    write(folder / "pairs.jsonl", rows())
    train.main([
        "--model_name_or_path", str(model_dir), "--dataset_name", str(folder / "pairs.jsonl"), *QUICK,
        "--use_peft", "--output_dir", str(folder / "run"),
    ])  # fmt: skip
    return folder / "run"


@pytest.fixture
def workplace(model_dir, trained, tmp_path, monkeypatch):
    """A folder with everything that the pages name; commands train in this process, which is left as it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "accelerate.commands.launch.launch_command", lambda given: train.main(given.training_script_args)
    )
    for owner, name in ((datasets, "load_dataset"), (sys, "argv"), (sys, "path")):  # `apo-trl run` replaces them
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", [*transformers.trainer.DEFAULT_CALLBACKS])
    for name in ("RUN", "RUN_A", "RUN_B", "RUN_C", "Llama-3-8B-APO-zero-LoRA"):
        shutil.copytree(trained, name)
    Path("WHAT_IT_STARTED_FROM").symlink_to(model_dir)
    make_model(seed=1).save_pretrained("MODEL")
    make_tokenizer().save_pretrained("MODEL")
    Path("PAIRS").mkdir()
    for name in ("PAIRS/train.jsonl", "mine.jsonl", "pairs.jsonl", "held_out.jsonl"):
        write(Path(name), rows(48))
    write(Path("prompts.jsonl"), [{"id": f"p{number}", "prompt": f"Add {number}."} for number in range(9)])
    Path("recipes").symlink_to(ROOT / "recipes")
    Path("old.yaml").write_text(fences(DOCS / "migrating.md", "yaml")[2])
    (config,) = fences(DOCS / "start.md", "yaml")
    Path("run.yaml").write_text(config.replace("Qwen/Qwen3-0.6B", "WHAT_IT_STARTED_FROM", 1))
    shutil.copy(Path(trl.__file__).parent / "scripts" / "dpo.py", "my_dpo_script.py")
    Path("RECIPE").write_text(
        "method: clair\nprompts: prompts.jsonl\noutput_dir: pairs\npolicy_model: p\nreviser_model: r\n"
        "policy_base_url: http://127.0.0.1:9/v1\nreviser_base_url: http://127.0.0.1:9/v1\n"
    )
    return tmp_path


BABBLE = ["--policy_temperature", "100", "--policy_max_tokens", "400"]  # so that most answers of random weights end
MORE = {
    "recipes plan": ["--model_name_or_path", "MODEL"],
    "pairs build pairs/clair_local": ["--policy_model", "MODEL", "--max_edit_distance", "1", *BABBLE],
    "anchor": BABBLE,
    "compare": BABBLE,
    "score": ["--max_prompts", "3", "--policy_max_tokens", "8"],
    "demo": ["--model", "WHAT_IT_STARTED_FROM", "--max_steps", "2"],
    "bench": ["--repeats", "1", "--layers", "1"],
}


def replaced(line, url):
    for name, used in {
        "http://127.0.0.1:8000/v1": url,
        "URL": url,
        "--b MODEL": "--b WHAT_IT_STARTED_FROM",
        "SmolLM2-135M-Instruct": "WHAT_IT_STARTED_FROM",
        "FILE": "prompts.jsonl",
        "--model Qwen/Qwen3-0.6B --device cuda --dtype bfloat16": "--model MODEL --device cpu --dtype float32",
    }.items():
        line = line.replace(name, used)
    return shlex.split(line, comments=True)


def in_process(words):
    if words[:2] == ["pairs", "import-batch"]:  # the policy's answers
        answered(Path("pairs/batch").glob("policy-*.jsonl"), Path("answers.jsonl"))
    elif words[:3] == ["pairs", "build", "RECIPE"]:  # the end: the second round has been imported, too
        revisions = answered(Path("pairs/batch").glob("reviser-*.jsonl"), Path("revisions.jsonl"))
        cli.main(["pairs", "import-batch", "RECIPE", str(revisions)])
    more = (added for start, added in MORE.items() if " ".join(words).startswith(start) and "chosen_score" not in words)
    try:
        cli.main([*words, *next(more, [])])
    except SystemExit as stop:
        return stop.code or 0
    return 0


def run(words, folder):
    """Run one command and return its exit status."""
    if words[0] == "make":
        words = [*words, "--directory", ROOT, "--dry-run", f"READY={__file__}"]  # what it runs is run elsewhere
    elif words[0] == "pip":
        words = [str(ROOT) + word[1:] if word.startswith(".") else word for word in words]
        words = [sys.executable, "-m", *words, "--no-deps", "--no-build-isolation", "--target", folder / "installed"]
    else:
        defaults = {"--model_name_or_path": "WHAT_IT_STARTED_FROM", "--dataset_name": "mine.jsonl"}
        defaults |= {"--output_dir": "out"} if "my_dpo_script.py" in words else {}
        defaults = {} if "run.yaml" in words else defaults
        added = [word for option in defaults.items() if option[0] not in words for word in option]
        if words[0] != "apo-trl":
            words = [BIN / words[0], *words[1:], *added, *QUICK]
        elif words[1] in ("train", "run"):
            return in_process([*words[1:], *added, *QUICK])
        else:
            return in_process(words[1:])
    done = command(*words)
    print(done.stdout, done.stderr)
    return done.returncode


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*None of the inputs have requires_grad.*:UserWarning")
@pytest.mark.parametrize("page", [page for page in READ if page.name in RESULTS], ids=lambda page: page.name)
def test_a_page_can_be_followed(page, workplace, capfd):
    with ChatServer(reply) as server:
        for line, result in zip(shown(page), RESULTS[page.name], strict=True):
            if result is None:
                continue
            if isinstance(result, Path):
                shutil.rmtree(result) if result.is_dir() else result.unlink(missing_ok=True)
            status = run(replaced(line, server.url), workplace)
            printed = "".join(capfd.readouterr())
            assert status == FAILS.get(line, 0), (line, printed[-2000:])
            assert result.exists() if isinstance(result, Path) else result in printed, (line, printed[-2000:])


@pytest.mark.slow
@NEEDS_MODEL
@pytest.mark.parametrize(
    ("script", "options", "result"),
    [
        ("measure_overhead.py", ["--model", "WHAT_IT_STARTED_FROM", "--steps", "1", "--repeats", "1"], "ratio "),
        ("measure_step.py", ["--layers", "1", "--growth_layers", "0"], "| the head | "),
        ("draw_losses.py", [], Path("losses.png")),
    ],
)
def test_a_script_of_the_docs_runs(script, options, result, workplace):
    done = command(sys.executable, shutil.copy(DOCS / script, workplace), *options)
    assert done.returncode == 0, done.stderr[-2000:]
    assert result.exists() if isinstance(result, Path) else result in done.stdout
