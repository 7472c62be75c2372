"""The site builds with every warning an error, its links lead somewhere, and what its pages tell a user to type exists.

A command is whatever a page shows in a fenced `sh` block, in an indented block or as inline code that begins with a
program's name. Each is taken by the parser that would take it, up to where it would load, ask or launch something.
"""

import argparse
import dataclasses
import html
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import rows
from markdown_it import MarkdownIt
from test_cli import BIN, QUICK, write

import apo_trl
from apo_trl.cli import main as cli

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
READ = [ROOT / "README.md", *PAGES]
MARKDOWN = MarkdownIt("commonmark").enable("table")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

PROGRAM = re.compile(r"(apo-trl|accelerate launch|make|python|pip install|trl|torchrun|vllm) ")
FOREIGN = {"vllm run-batch": "needs a GPU, and is another project's"}
PLACEHOLDERS = {"URL": "http://127.0.0.1:8000/v1", "N": "2"}  # others are names as good as any


def read(page):
    return page.read_text(encoding="utf-8")


def fences(page, language):
    return [token.content for token in MARKDOWN.parse(read(page)) if (token.type, token.info) == ("fence", language)]


# The site.


def build(docs, out):
    """Build as `make docs` does."""
    line = next(line for line in read(ROOT / "Makefile").splitlines() if "/sphinx-build " in line)
    words = shlex.split(line)
    assert words[-2:] == ["docs", "docs/_build/html"]
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run([BIN / "sphinx-build", *words[1:-2], docs, out], capture_output=True, text=True, env=env)


def plain(markup):
    return html.unescape(re.sub("<[^>]+>", "", markup)).replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")


def test_the_site_builds_and_has_every_page_with_its_headings(tmp_path):
    done = build(DOCS, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(PAGES) >= 13
    found = 0
    for page in PAGES:
        built = (tmp_path / f"{page.stem}.html").read_text(encoding="utf-8")
        shown = [plain(heading) for heading in re.findall(r"<h[1-6]>(.*?)<a class=\"headerlink\"", built)]
        tokens = MARKDOWN.parse(read(page))
        headings = [tokens[at + 1] for at, token in enumerate(tokens) if token.type == "heading_open"]
        wanted = ["".join(child.content for child in heading.children) for heading in headings]
        assert wanted, page.name
        assert shown == wanted
        found += len(wanted)
    assert found > 80
    reference = (tmp_path / "api.html").read_text(encoding="utf-8")
    for name in ("apo_trl.APOConfig", "apo_trl.APOTrainer", "apo_trl.apo_blend", "apo_trl.pairs.build.build"):
        assert f'id="{name}"' in reference
    assert "gradient_accumulation_steps" not in reference  # the host's hundreds of settings are the host's
    assert re.search(r'href="_downloads/\w+/revise.jinja"', (tmp_path / "pairs.html").read_text(encoding="utf-8"))


def test_what_is_broken_makes_the_build_fail(tmp_path):
    """All at once: each has its message."""
    docs = tmp_path / "docs"
    shutil.copytree(DOCS, docs, ignore=shutil.ignore_patterns("_build", "__pycache__"))
    for name in ("apo_trl", "recipes", "constraints.txt", "README.md", "CHANGELOG.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    with (docs / "start.md").open("a", encoding="utf-8") as page:
        page.write(
            "\n[one](nowhere.md) [two](losses.md#no-heading) [three](#no-section) [four](../apo_trl/nowhere.txt)\n"
        )
        page.write("\n![five](nowhere.png)\n")
    with (docs / "api.md").open("a", encoding="utf-8") as page:
        page.write("\n```{eval-rst}\n.. autofunction:: apo_trl.nothing\n\n:py:func:`apo_trl.nowhere`\n```\n")
    (docs / "orphan.md").write_text("# Orphan\n")
    done = build(docs, tmp_path / "out")
    assert done.returncode != 0
    for words in (
        "target not found: 'nowhere.md'",
        "no-heading",
        "no-section",
        "apo_trl/nowhere.txt",
        "nowhere.png",
        "'nothing'",
        "target not found: apo_trl.nowhere",
        "orphan.md: WARNING: document isn't included in any toctree",
    ):
        assert words in done.stderr, words


def test_no_page_waits_for_a_figure():
    assert {page.name: found for page in READ if (found := re.findall(r"@[A-Z]+@", read(page)))} == {}


# The commands.


class Command(NamedTuple):
    page: str
    inline: bool
    text: str


def commands(page):
    found = []
    for token in MARKDOWN.parse(read(page)):
        if token.type == "inline":
            codes = [child.content for child in token.children if child.type == "code_inline"]
            found += [Command(page.name, True, code) for code in codes if PROGRAM.match(code)]
        elif token.type == "code_block" or (token.type == "fence" and token.info == "sh"):
            lines = [line for line in token.content.replace("\\\n", " ").splitlines() if line.strip()]
            if token.type == "fence" or any(PROGRAM.match(line) for line in lines):
                found += [Command(page.name, False, line) for line in lines]
    return found


COMMANDS = [command for page in READ for command in commands(page)]


def test_how_many_commands_there_are():
    counts = Counter(PROGRAM.match(command.text)[1] for command in COMMANDS)  # and every line has a known program
    least = {"apo-trl": 80, "accelerate launch": 4, "make": 6, "python": 5, "pip install": 5, "trl": 3, "torchrun": 1}
    assert {program: counts[program] for program, number in least.items() if counts[program] < number} == {}
    assert {command.page for command in COMMANDS} >= {"README.md", "start.md", "pairs.md", "recipes.md", "anchor.md"}


@pytest.mark.parametrize("page", READ, ids=lambda page: page.name)
def test_none_is_overlooked(page):
    """Counted without a Markdown parser: at the start of a line, or after a backtick."""
    fence = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    text = fence.sub(lambda found: found[2] if found[1] == "sh" else "", read(page))
    seen = len(re.findall(r"(?:^ *|`)(?:apo-trl\s|accelerate launch\s|python docs/)", text, re.MULTILINE))
    ours = [c for c in commands(page) if re.match(r"apo-trl |accelerate launch |python docs/", c.text)]
    assert len(ours) == seen


@pytest.fixture(scope="module")
def parser():
    """The parser of `apo-trl`, which is built where it is used."""

    class Caught(Exception):
        pass

    def catch(self, *args):
        raise Caught(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", catch)
        with pytest.raises(Caught) as caught:
            cli.main([])
    return caught.value.args[0]


def children(parser):
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return {name: child for action in actions for name, child in action.choices.items()}


def all_options(parser):
    own = {option for action in parser._actions for option in action.option_strings}
    return own.union(*(all_options(child) for child in children(parser).values()))


@pytest.fixture
def account(monkeypatch, tmp_path, parser):
    """Give the function that accounts for a command: it says how, and raises where the command cannot be."""
    from accelerate.commands import launch
    from trl.scripts.dpo import make_parser

    from apo_trl import demo, run
    from apo_trl.cli import judged as judged_cli
    from apo_trl.cli import pairs as pairs_cli
    from apo_trl.evaluation import compare, report
    from apo_trl.io.resources import find_recipe, hardware
    from apo_trl.models import merge
    from apo_trl.training.arguments import parse

    # What would load, ask or launch something; everything before it is real.
    did = []
    monkeypatch.setattr(launch, "launch_command", lambda launched: did.append(launched.training_script))
    for module, name, result in (
        (demo, "run_demo", None), (merge, "merge", "merged"), (report, "report", "page"), (cli, "_evaluate", None),
        (cli, "_bench", None), (compare, "compare", {"stopped": ""}), (compare, "table", ""),
        *((pairs_cli, name, None) for name in ("_build", "_dry_run", "_export", "_import", "_stats")),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, lambda *args, name=name, result=result, **more: did.append(name) or result)

    def recipes(options, rest):
        did.append("recipes")
        if hasattr(options, "name"):
            find_recipe(options.name)
        if options.action == "plan":
            parse([options.name, "--use_cpu", *rest])
            hardware(options.accelerate_config)

    def anchor(options):
        did.append("anchor")
        judged_cli._anchor_settings(options, tmp_path)

    def script(arguments):
        did.append("run")
        make_parser().parse_args_and_config([*arguments[1:], "--use_cpu"])

    monkeypatch.setattr(cli, "_recipes", recipes)
    monkeypatch.setattr(judged_cli, "run_anchor", anchor)
    monkeypatch.setattr(run, "main", script)

    # The files that the pages talk of.
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for name in ("run.yaml", "mine.yaml", "dpo.yaml", "FILE", "FILE.yaml", "RECIPE"):
        shutil.copy(ROOT / "recipes" / "llama-3-8b" / "apo_zero_lora.yaml", tmp_path / name)
    (tmp_path / "pairs").mkdir()
    shutil.copy(ROOT / "recipes" / "pairs" / "clair_local.yaml", tmp_path / "pairs" / "RECIPE")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "none")

    def apo(words, inline):
        if inline and all(re.fullmatch("[a-z][a-z-]*", word) for word in words):
            at = parser
            for word in words:
                at = children(at)[word]
            return "named"
        if words[0] == "pairs":
            monkeypatch.chdir(tmp_path / "pairs")
        if "--help" in words:
            with pytest.raises(SystemExit) as stop:
                cli.main(words)
            assert stop.value.code == 0
            return "helped"
        cli.main([*words, "--use_cpu"] if words[0] == "train" else words)
        assert did, words
        return did[-1]

    def accelerate(words):
        launched = launch.launch_command_parser().parse_args(words)
        assert launched.module
        {"apo_trl.train": lambda given: parse([*given, "--use_cpu"]), "apo_trl.run": script}[launched.training_script](
            launched.training_script_args
        )
        return launched.training_script

    def python(words):
        if words[0] == "-m" and words[1] == "pytest":
            assert words[2] == "-m"
            assert words[3] in [line.split(":")[0] for line in PROJECT["tool"]["pytest"]["ini_options"]["markers"]]
        elif words[0] == "-m":
            assert words[1] == "apo_trl.train"
            parse([*words[2:], "--use_cpu"])
        elif words[0].startswith("docs/"):
            source = (ROOT / words[0]).read_text(encoding="utf-8")
            for option in words[1:]:
                assert not option.startswith("--") or f'"{option}"' in source, option
        else:
            assert words[0] == "dpo.py"
            make_parser().parse_args_and_config([*words[1:], "--use_cpu"])
        return "python"

    def other(words):
        if words[0] == "make":
            (target,) = words[1:]
            assert re.search(rf"^{re.escape(target)}:", read(ROOT / "Makefile"), re.MULTILINE), target
        elif words[0] == "pip":
            extras = {extra for part in re.findall(r"\[(.*?)\]", " ".join(words)) for extra in part.split(",")}
            assert extras <= set(PROJECT["project"]["optional-dependencies"])
        elif words[0] == "trl":
            from trl.cli.commands import get_commands

            assert words[1] in [command.name for command in get_commands()]
        elif words[0] == "torchrun":
            from torch.distributed.run import get_args_parser

            get_args_parser().parse_args(words[1:])
        else:
            assert " ".join(words[:2]) in FOREIGN
        return words[0]

    def accounted(text, inline=False):
        words = [PLACEHOLDERS.get(word, word) for word in shlex.split(text, comments=True)]
        if words[0] == "apo-trl":
            return apo(words[1:], inline)
        if words[0] == "accelerate":
            return accelerate(words[2:])
        return python(words[1:]) if words[0] == "python" else other(words)

    return accounted


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.page}: {command.text}")
def test_it_can_be_typed(account, command):
    assert account(command.text, command.inline)


SLIPS = {
    "apo-trl train --config run.yaml --beta 5": "--beta --betta",
    "apo-trl train mine.yaml --accelerate_config single_gpu": "single_gpu single_gpus",
    "apo-trl train llama-3-8b/apo_zero_full --num_processes 8": "--num_processes --num_proceses",
    "apo-trl train smollm2-135m/demo --loss_type apo_zero": "apo_zero apo_zeroo",
    "apo-trl train smollm2-135m/apo_zero_lora": "smollm2-135m smollm2",
    "accelerate launch --num_processes 2 -m apo_trl.train --config run.yaml": "--num_processes --processes",
    "accelerate launch -m apo_trl.train --config run.yaml --max_steps 2": "--max_steps --max_step_s",
    "apo-trl run my_dpo_script.py --loss_type apo_zero_norm": "--loss_type --loss",
    "apo-trl recipes plan mine.yaml --gpus 1 --gpu-memory 80": "--gpu-memory --gpu_memory",
    "apo-trl recipes plan llama-3-8b/apo_zero_lora --gpu-memory 80 --max_length 9": "--max_length --maxlength",
    "apo-trl recipes show llama-3-8b/apo_zero_lora": "apo_zero_lora apo_zero_loar",
    "apo-trl pairs build pairs/clair_local --num_responses 2": "--num_responses --responses",
    "apo-trl pairs build pairs/clair_local --max_cost 3 --reviser_input_price 1": "3 much",
    "apo-trl pairs stats pairs.jsonl --tokenizer m": "--tokenizer --tokeniser",
    "apo-trl anchor --dataset d --policy m --judge j --judge_margin 1": "--judge_margin --margin",
    "apo-trl evaluate --model m --dataset d": "--dataset --data_set",
    "apo-trl compare --a m --b m --prompts p --judge j": "--prompts --prompt_file",
    "apo-trl report run --output page.html": "--output --to",
    "apo-trl bench --repeats 2": "--repeats --repetitions",
    "apo-trl merge adapter --output_dir merged": "--output_dir --out_dir",
    "apo-trl demo --max_steps 2": "--max_steps --steps",
    "make demo": "demo demonstration",
    "python docs/evidence.py --draw": "--draw --drawn",
    "python docs/draw_losses.py": "draw_losses paint_losses",
    "pip install '.[pairs]'": "pairs pear",
    "python -m pytest -m gpu": "gpu tpu",
    "trl dpo": "dpo apo",
}


@pytest.mark.parametrize("right", SLIPS)
def test_a_slip_is_noticed(account, right, capsys):
    """One word apart: the first can be typed, the second cannot."""
    assert account(right)
    word, slip = SLIPS[right].split()
    assert right.count(word) == 1
    with pytest.raises((SystemExit, AssertionError, ValueError, OSError)) as refusal:
        account(right.replace(word, slip))
    if refusal.type is SystemExit:
        assert refusal.value.code == 2
        assert "error" in capsys.readouterr().err


def test_a_command_that_is_only_named_must_exist(account):
    assert account("apo-trl recipes plan", inline=True) == "named"
    with pytest.raises(KeyError):
        account("apo-trl recipes plans", inline=True)


def test_options_in_prose_exist(parser):
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

    from apo_trl.config import APOConfig
    from apo_trl.training.arguments import _launcher_options

    training = (ScriptArguments, APOConfig, ModelConfig, DatasetMixtureConfig)
    known = all_options(parser) | _launcher_options() | {"--config"}
    known |= {f"--{field.name}" for each in training for field in dataclasses.fields(each)}
    assert "--policy_temperature" in known
    named = {}
    for page in READ:
        for token in MARKDOWN.parse(read(page)):
            for child in token.children or ():
                if child.type == "code_inline" and child.content.startswith("--"):
                    named |= dict.fromkeys(re.findall(r"(?<!\S)--[\w-]+", child.content), page.name)
    assert len(named) >= 30
    assert {option: page for option, page in named.items() if option not in known} == {}


# What is shown as Python, and the first steps, in order.


def exchanged(source, model_dir, folder):
    """Put the tiny model and a short run in the place of what a page names."""
    for shown, used in {
        '"Qwen/Qwen3-0.6B"': repr(str(model_dir)),
        '"Qwen3-0.6B-APO",': f"{str(folder / 'out')!r}, max_steps=2, use_cpu=True, bf16=False, report_to='none',",
        '"pairs.jsonl"': repr(str(folder / "pairs.jsonl")),
    }.items():
        assert shown in source
        source = source.replace(shown, used)
    return source


def test_the_python_of_the_first_page(model_dir, tmp_path):
    import trl

    write(tmp_path / "pairs.jsonl", rows())
    training, registering = fences(DOCS / "start.md", "python")
    names = {}
    exec(compile(exchanged(training, model_dir, tmp_path), "start.md", "exec"), names)
    assert names["trainer"].state.global_step == 2
    assert (tmp_path / "out" / "adapter_config.json").exists()
    try:
        exec(compile(registering, "start.md", "exec"), {})
        assert trl.DPOConfig(loss_type="apo_zero_norm", use_cpu=True, bf16=False)
        with pytest.raises(apo_trl.InputError):
            trl.DPOConfig(loss_type="apo_zero_nrom", use_cpu=True, bf16=False)
    finally:
        apo_trl.unregister()


def test_the_python_of_the_other_pages():
    pages = {page: fences(page, "python") for page in PAGES if page.name != "start.md"}
    assert sum(map(len, pages.values())) >= 3
    for page, blocks in pages.items():
        for block in blocks:
            exec(compile(block, page.name, "exec"), {})


@pytest.mark.slow
def test_the_first_steps_in_order(model_dir, tmp_path):
    (config,) = fences(DOCS / "start.md", "yaml")
    for name in ("pairs.jsonl", "held_out.jsonl"):
        write(tmp_path / name, rows())
    (tmp_path / "run.yaml").write_text(config.replace("Qwen/Qwen3-0.6B", str(model_dir)))
    env = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "ACCELERATE_USE_CPU": "true"}
    lines = [line for block in fences(DOCS / "start.md", "sh") for line in block.splitlines()]
    assert [line.split()[1] for line in lines] == ["recipes", "train", "evaluate", "report", "merge"]
    for line in lines:
        words = shlex.split(line, comments=True)
        done = subprocess.run(
            [*words, *(QUICK if words[1] == "train" else [])], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, (line, done.stderr[-2000:])
    for made in ("Qwen3-0.6B-APO/evaluation.parquet", "report.html", "merged/config.json"):
        assert (tmp_path / made).exists(), made
