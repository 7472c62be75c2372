"""What the pages show in blocks is run, line after line in the order of each page, and has to show that it worked.

Exchanged are models, data, steps, hardware and the addresses of servers, and nothing else. A line is left out only
where its comment says that it needs a GPU.
"""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import trl
from chat_server import ChatServer
from conftest import make_model, make_tokenizer, rows
from test_cli import BIN, QUICK, command, write
from test_demo import NEEDS_MODEL
from test_docs import DOCS, READ, ROOT, commands, fences
from test_pairs_batch import answered

from apo_trl import train
from apo_trl.cli import main as cli


def shown(page):
    """The commands in the blocks of a page, but for what has tests of its own.

    Those are the `sh` blocks of the README and of the first steps, and the runs of the evidence.
    """
    fenced = [line for block in fences(page, "sh") for line in block.splitlines()]
    own = fenced if page.name in ("README.md", "start.md") else []
    lines = [found.text for found in commands(page) if not found.inline]
    return [line for line in lines if line not in own and "--fresh" not in line]


SHOWN = {page.name: shown(page) for page in READ}
NEEDS_GPU = re.compile(r"#.*\bGPUs?\b")

# What each line has to print or, with a path, to make. In the order of the page; None for what needs a GPU.
SIGNS = {
    "README.md": ["apo-trl demo", "pytest", Path("installed/apo_trl/_recipes/smollm2-135m/demo.yaml")],
    "start.md": [Path("installed/apo_trl/_recipes/smollm2-135m/demo.yaml"), "apo-trl demo", "held-out pairs"],
    "anchor.md": [
        "loss_type: apo_zero",
        Path("RUN/evaluation.parquet"),
        "48 pairs",
        Path("report.html"),
        Path("report.html"),
        "A's win rate",
    ],
    "pairs.md": [
        Path("installed/apo_trl/_recipes/pairs/clair.yaml"),
        "policy-",
        None,
        "taken",
        "reviser-",
        "Kept 9 of 9",
    ],
    "recipes.md": [
        "llama-3-8b/apo_zero_lora",
        "loss_type: apo_zero",
        Path("mine.yaml"),
        "mine.yaml",
        "of 80",
        None,
        None,
        Path("merged/config.json"),
        Path("SmolLM2-135M-APO-zero-lora/adapter_model.safetensors"),
    ],
    "performance.md": [None, None, None, Path("gpu.json")],
    "evidence.md": ["docs/evidence.py"],
    "migrating.md": ["'rl_beta'", Path("out/model.safetensors")],
}

FAILS = {"apo-trl recipes check old.yaml": 1}  # as the page says


def test_every_block_has_its_signs():
    assert {page: len(lines) for page, lines in SHOWN.items() if lines} == {page: len(s) for page, s in SIGNS.items()}
    left_out = [line for lines in SHOWN.values() for line in lines if NEEDS_GPU.search(line)]
    assert len(left_out) == sum(sign is None for signs in SIGNS.values() for sign in signs) == 6


def judge(body):
    """Find the better answer where one is of `rows`, and none between two others."""
    last = body["messages"][-1]["content"]
    answers = dict(re.findall(r"<answer_([ab])>\n(.*?)\n</answer_", last, re.DOTALL))
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
    """A folder with everything that the pages talk of, under the names that they use."""
    monkeypatch.chdir(tmp_path)
    for name in ("RUN", "RUN_A", "RUN_B", "RUN_C", "Llama-3-8B-APO-zero-LoRA"):
        shutil.copytree(trained, name)
    Path("WHAT_IT_STARTED_FROM").symlink_to(model_dir)
    make_model(seed=1).save_pretrained("MODEL")
    make_tokenizer().save_pretrained("MODEL")
    Path("DEMO_PAIRS").mkdir()
    for name in ("DEMO_PAIRS/train.jsonl", "mine.jsonl"):
        write(Path(name), rows(48))
    write(Path("prompts.jsonl"), [{"id": f"p{at}", "prompt": f"Add {at}."} for at in range(9)])
    Path("recipes").symlink_to(ROOT / "recipes")
    Path("old.yaml").write_text(fences(DOCS / "migrating.md", "yaml")[2])
    shutil.copy(Path(trl.__file__).parent / "scripts" / "dpo.py", "my_dpo_script.py")
    Path("RECIPE").write_text(
        "method: clair\nprompts: prompts.jsonl\noutput_dir: pairs\npolicy_model: p\nreviser_model: r\n"
        "policy_base_url: http://127.0.0.1:9/v1\nreviser_base_url: http://127.0.0.1:9/v1\n"
    )
    return tmp_path


TINY = ["--model_name_or_path", "WHAT_IT_STARTED_FROM", "--dataset_name", "mine.jsonl"]
BABBLE = ["--policy_temperature", "100", "--policy_max_tokens", "400"]  # so that most answers of random weights end
MORE = {
    "recipes plan": ["--model_name_or_path", "MODEL"],
    "anchor": BABBLE,
    "compare": BABBLE,
    "demo": ["--model", "WHAT_IT_STARTED_FROM", "--max_steps", "2"],
    "bench": ["--repeats", "1", "--layers", "1"],
}


def exchanged(line, url):
    for shown, used in {
        "URL": url,
        "--b MODEL": "--b WHAT_IT_STARTED_FROM",
        "FILE": "prompts.jsonl",
        "--model Qwen/Qwen3-0.6B --device cuda --dtype bfloat16": "--model MODEL --device cpu --dtype float32",
    }.items():
        line = line.replace(shown, used)
    return shlex.split(line, comments=True)


def do(words, folder):
    """Run one command and give its status."""
    if words[0] == "apo-trl" and words[1] not in ("train", "run"):
        if words[2:3] == ["import-batch"]:  # the policy's answers
            answered(Path("pairs/batch").glob("policy-*.jsonl"), Path("answers.jsonl"))
        elif words[2:4] == ["build", "RECIPE"]:  # the end: the second round has been imported, too
            revisions = answered(Path("pairs/batch").glob("reviser-*.jsonl"), Path("revisions.jsonl"))
            cli.main(["pairs", "import-batch", "RECIPE", str(revisions)])
        more = MORE.get(words[1], MORE.get(" ".join(words[1:3]), []))
        try:
            cli.main([*words[1:], *more])
        except SystemExit as stop:
            return stop.code or 0
        return 0
    if words[0] == "make":
        words = [*words, "--directory", ROOT, "--dry-run", f"READY={__file__}"]  # what it runs is run elsewhere
    elif words[0] == "pip":
        words = [str(ROOT) + word[1:] if word.startswith(".") else word for word in words]
        words = [sys.executable, "-m", *words, "--no-deps", "--no-build-isolation", "--target", folder / "installed"]
    elif words[0] == "accelerate":
        words = [BIN / words[0], *words[1:], *TINY, *QUICK]
    else:
        words = [BIN / words[0], *words[1:], *TINY, *QUICK, "--output_dir", "out"]
    done = command(*words)
    print(done.stdout, done.stderr)
    return done.returncode


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*None of the inputs have requires_grad.*:UserWarning")
@pytest.mark.parametrize("page", SIGNS)
def test_a_page_can_be_followed(page, workplace, capfd):
    with ChatServer(judge) as server:
        for line, sign in zip(SHOWN[page], SIGNS[page], strict=True):
            if sign is None:
                continue
            if isinstance(sign, Path):
                shutil.rmtree(sign, ignore_errors=True) if sign.is_dir() else sign.unlink(missing_ok=True)
            status = do(exchanged(line, server.url), workplace)
            printed = "".join(capfd.readouterr())
            assert status == FAILS.get(line, 0), (line, printed[-2000:])
            assert sign.exists() if isinstance(sign, Path) else sign in printed, (line, printed[-2000:])


@pytest.mark.slow
@NEEDS_MODEL
@pytest.mark.parametrize(
    ("script", "options", "sign"),
    [
        ("measure_overhead.py", ["--model", "WHAT_IT_STARTED_FROM", "--steps", "1", "--repeats", "1"], "ratio "),
        ("measure_step.py", ["--layers", "1", "--growth_layers", "0"], "| the head | "),
        ("draw_losses.py", [], Path("losses.png")),
    ],
)
def test_a_script_runs(script, options, sign, workplace):
    """Those that pages name for their figures; in a copy, as one writes beside itself."""
    assert any(script in page.read_text(encoding="utf-8") for page in [*READ, ROOT / "Makefile"])
    done = command(sys.executable, shutil.copy(DOCS / script, workplace), *options)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sign.exists() if isinstance(sign, Path) else sign in done.stdout
