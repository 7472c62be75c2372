"""What README and docs show can be typed: commands parse, Python runs, links resolve, names exist, the site builds.

A command is a line of a fenced `sh` block or an indented block, or inline code that begins with a program's name.
`test_docs_run.py` runs those in blocks.
"""

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from conftest import rows
from markdown_it import MarkdownIt
from test_cli import BIN, write

import apo_trl
from apo_trl.cli.main import build_parser
from apo_trl.io.rows import normalise_row
from apo_trl.rounds.settings import parse as parse_rounds

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
READ = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
MARKDOWN = MarkdownIt("commonmark").enable("table")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROGRAM = re.compile(r"(apo-trl|accelerate launch|make|python|pip install|trl|torchrun|vllm run-batch)( |$)")
by_page = pytest.mark.parametrize("page", READ, ids=lambda page: page.name)


def read(page):
    return page.read_text(encoding="utf-8")


def fences(page, language):
    return [token.content for token in MARKDOWN.parse(read(page)) if (token.type, token.info) == ("fence", language)]


class Command(NamedTuple):
    page: str
    inline: bool
    text: str


def commands(page):
    found = []
    for token in MARKDOWN.parse(read(page)):
        if token.type == "inline":
            codes = [" ".join(child.content.split()) for child in token.children if child.type == "code_inline"]
            found += [
                Command(page.name, True, code) for code in codes if PROGRAM.match(code) and not PROGRAM.fullmatch(code)
            ]
        elif token.type == "code_block" or (token.type == "fence" and token.info == "sh"):
            lines = [line for line in token.content.replace("\\\n", " ").splitlines() if line.strip()]
            if token.type == "fence" or any(PROGRAM.match(line) for line in lines):
                found += [Command(page.name, False, line) for line in lines]
    return found


COMMANDS = [command for page in READ for command in commands(page)]
PLACEHOLDERS = {"N": "2", "URL": "http://127.0.0.1:8000/v1"}  # any other name is as good as another


@pytest.fixture
def parse_command(monkeypatch, tmp_path):
    """Return a function that parses a command up to where it would load, send or launch something."""
    from accelerate.commands.launch import launch_command_parser
    from trl.scripts.dpo import make_parser

    from apo_trl.io.resources import find_recipe, hardware
    from apo_trl.pairs.config.settings import known_keys
    from apo_trl.pairs.config.settings import parse as parse_pairs
    from apo_trl.training.arguments import parse, with_recipe

    recipe = ROOT / "recipes" / "llama-3-8b" / "apo_zero_lora.yaml"
    for name in ("run.yaml", "mine.yaml", "dpo.yaml", "old.yaml", "FILE", "FILE.yaml", "RECIPE", "RECIPE_OF_PAIRS"):
        shutil.copy(recipe, tmp_path / name)
    shutil.copy(ROOT / "recipes" / "pairs" / "clair_local.yaml", tmp_path / "RECIPE_OF_PAIRS")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "none")

    def train(words):
        _, launcher = parse([*with_recipe(words), "--use_cpu"])
        if "--accelerate_config" in launcher:
            hardware(launcher[launcher.index("--accelerate_config") + 1])

    def apo(words, inline):
        if words[:2] == ["pairs", "build"] or (words[1:2] and words[1].endswith("-batch")):
            words = ["RECIPE_OF_PAIRS" if word == "RECIPE" else word for word in words]
        bare = inline and not any(word.startswith("-") for word in words)
        if "--help" in words or bare:
            with pytest.raises(SystemExit) as stop:
                build_parser().parse_args([*(word for word in words if re.fullmatch("[a-z-]+", word)), "--help"])
            assert stop.value.code == 0
            return
        options = build_parser().parse_args(words)
        if words[0] == "train":
            train(options.rest)
        elif words[:2] == ["recipes", "plan"]:
            train([options.name, *options.rest])
        elif words[0] == "recipes" and hasattr(options, "name"):
            find_recipe(options.name)
        elif words[0] == "run":
            make_parser().parse_args_and_config([*options.arguments, "--use_cpu"])
        elif words[0] == "rounds":
            parse_rounds("rounds/instructions", options.rest)
        elif hasattr(options, "recipe"):
            parse_pairs(options.recipe, {key: value for key, value in vars(options).items() if key in known_keys()})

    def python(words):
        if words[:2] == ["-m", "pytest"]:
            marks = [line.split(":")[0] for line in PROJECT["tool"]["pytest"]["ini_options"]["markers"]]
            assert words[2] != "-m" or words[3] in marks
        elif words[:2] == ["-m", "apo_trl.train"]:
            train(words[2:])
        elif words[0].startswith("docs/"):
            assert set(words[1:]) <= {word for word in words if f'"{word}"' in read(ROOT / words[0])}
        else:
            assert words[0] == "dpo.py"
            make_parser().parse_args_and_config([*words[1:], "--use_cpu"])

    def parse_it(text, inline=False):
        program = PROGRAM.match(text)[1]
        words = [PLACEHOLDERS.get(word, word) for word in shlex.split(text, comments=True)[len(program.split()) :]]
        if program == "apo-trl":
            apo(words, inline)
        elif program == "accelerate launch":
            launched = launch_command_parser().parse_args(words)
            arguments = launched.training_script_args
            script = launched.training_script == "apo_trl.run"
            assert script or launched.training_script == "apo_trl.train"
            make_parser().parse_args_and_config([*arguments[1:], "--use_cpu"]) if script else train(arguments)
        elif program == "make":
            for target in words:
                assert re.search(rf"^{re.escape(target)}:", read(ROOT / "Makefile"), re.MULTILINE), target
        elif program == "python":
            python(words)
        elif program == "pip install":
            extras = {extra for part in re.findall(r"\[(.*?)\]", " ".join(words)) for extra in part.split(",")}
            assert extras <= set(PROJECT["project"]["optional-dependencies"])
        elif program == "trl":
            from trl.cli.commands import get_commands

            assert words[0] in [command.name for command in get_commands()]
        elif program == "torchrun":
            from torch.distributed.run import get_args_parser

            get_args_parser().parse_args(words)

    return parse_it


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS), ids=lambda command: f"{command.page}: {command.text}")
def test_a_command_parses(parse_command, command):
    if not command.inline:
        assert PROGRAM.match(command.text), "a program that this test does not know"
    parse_command(command.text, command.inline)


@pytest.mark.parametrize(
    "wrong",
    [
        "apo-trl train llama-3-8b/apo_zero_full --num_proceses 8",
        "apo-trl train mine.yaml --accelerate_config single_gpus",
        "apo-trl recipes show llama-3-8b/apo_zero_loar",
        "apo-trl pairs build RECIPE --responses 2",
        "apo-trl anchor --dataset d --policy m --judge j --margin 1",
        "apo-trl recipes plans",
        "accelerate launch -m apo_trl.train --config run.yaml --max_step_s 2",
        "make demonstration",
        "python docs/evidence.py --drawn",
        "pip install '.[pear]'",
        "trl apo",
    ],
)
def test_a_wrong_command_is_noticed(parse_command, wrong):
    with pytest.raises((SystemExit, AssertionError, ValueError, OSError)) as refusal:
        parse_command(wrong, inline="plans" in wrong)
    assert refusal.type is not SystemExit or refusal.value.code == 2


def test_options_in_prose_exist():
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

    from apo_trl.training.arguments import _launcher_options

    def options(parser):
        own = {option for action in parser._actions for option in action.option_strings}
        children = [
            child for action in parser._actions if hasattr(action, "add_parser") for child in action.choices.values()
        ]
        return own.union(*map(options, children))

    training = (ScriptArguments, apo_trl.APOConfig, ModelConfig, DatasetMixtureConfig)
    known = options(build_parser()) | _launcher_options() | {"--config", "--fresh"}
    known |= {f"--{field.name}" for each in training for field in dataclasses.fields(each)}
    inline = [child for page in READ for token in MARKDOWN.parse(read(page)) for child in token.children or ()]
    codes = [child.content for child in inline if child.type == "code_inline" and child.content.startswith("--")]
    named = {option for code in codes for option in re.findall(r"(?<!\S)--[\w-]+", code)}
    assert "--limit" in named
    assert named <= known, named - known


# Blocks of Python, JSON and YAML.


def exchanged(source, model_dir, folder):
    """Put the tiny model and a short run in the place of what a page names."""
    short = "max_steps=2, use_cpu=True, bf16=False, report_to='none'"
    for shown, used in {
        '"Qwen/Qwen3-0.6B"': repr(str(model_dir)),
        '"Qwen3-0.6B-APO",': f"{str(folder / 'out')!r}, {short},",
        '"pairs.jsonl"': repr(str(folder / "train.jsonl")),
        '"trl-lib/ultrafeedback_binarized"': repr(str(folder)),
    }.items():
        source = source.replace(shown, used)
    assert short in source
    return source


@pytest.mark.parametrize("page", ["README.md", "docs/start.md"])
def test_the_training_script_runs(page, model_dir, tmp_path):
    write(tmp_path / "train.jsonl", rows())
    script = next(block for block in fences(ROOT / page, "python") if "trainer.train()" in block)
    names = {}
    exec(compile(exchanged(script, model_dir, tmp_path), page, "exec"), names)
    assert names["trainer"].state.global_step == 2


@by_page
def test_other_python_runs(page):
    try:
        for block in fences(page, "python"):
            if "trainer.train()" not in block:
                exec(compile(block, page.name, "exec"), {})
    finally:
        apo_trl.unregister()


@by_page
def test_rows_are_valid_and_yaml_parses(page):
    for block in fences(page, "json"):
        for line in block.splitlines():
            assert normalise_row(json.loads(line))
    for block in fences(page, "yaml"):
        assert isinstance(yaml.safe_load(block), dict)


@by_page
def test_no_line_of_code_is_cut_off(page):
    """The site shows 92 characters of a line; tables and citations may be wider."""
    blocks = [token for token in MARKDOWN.parse(read(page)) if token.type in ("fence", "code_block")]
    shown = [block.content for block in blocks if block.info not in ("text", "bibtex", "{eval-rst}")]
    assert max([len(line) for content in shown for line in content.splitlines()], default=0) <= 90


# Links, names, the site.


def slug(heading):
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@by_page
def test_links_resolve(page):
    for link in re.findall(r"\]\((?!http)([^)]+)\)", read(page)):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in {slug(line) for line in re.findall(r"(?m)^#+ (.+)$", read(target))}, link


def test_api_names_exist():
    names = re.findall(r"^\.\. auto\w+:: ([\w.]+)", read(DOCS / "api.md"), re.MULTILINE)
    assert len(names) > 15
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(import_module(module), attribute), name


def test_the_readme_is_short():
    assert len(read(ROOT / "README.md").splitlines()) <= 150


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    """As `make docs` builds it: every warning is an error, that of a broken link too."""
    line = next(line for line in read(ROOT / "Makefile").splitlines() if "/sphinx-build " in line)
    words = shlex.split(line)
    assert "--fail-on-warning" in words
    done = subprocess.run([BIN / "sphinx-build", *words[1:-1], tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {page.stem for page in DOCS.glob("*.md")} <= {page.stem for page in tmp_path.glob("*.html")}
    assert 'id="apo_trl.APOConfig"' in read(tmp_path / "api.html")
