"""The plugin is small and loads no tool: what `register()` and a training run import, in a fresh interpreter."""

import subprocess
import sys
from pathlib import Path

import apo_trl

PACKAGE = Path(apo_trl.__file__).parent
PLUGIN = {
    "",
    "config",
    "datasets",
    "datasets.preprocessing",
    "datasets.rendering",
    "errors",
    "io",
    "io.messages",
    "io.rows",
    "io.run_record",
    "losses",
    "metrics",
    "registration",
    "saturation",
    "trainer",
}
PREFIX_SHARING = {
    f"prefix_sharing{module}" for module in ("", ".attention", ".forward", ".layout", ".model", ".sdpa", ".support")
}
MODULES = """
import sys
import apo_trl
apo_trl.register()
{run}
print(*(name.removeprefix("apo_trl").lstrip(".") or "." for name in sys.modules if name.split(".")[0] == "apo_trl"))
"""
RUN = """
sys.path.insert(0, {tests!r})
from conftest import rows
from datasets import Dataset
trainer = apo_trl.APOTrainer(
    {model!r},
    args=apo_trl.APOConfig(
        {folder!r}, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no", max_steps=1
    ),
    train_dataset=Dataset.from_list(rows()),
)
trainer.train()
assert not trainer._sharing.reason
"""


def loaded(run: str = "") -> set[str]:
    code = MODULES.format(run=run)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return {name.strip(".") for name in done.stdout.splitlines()[-1].split()}


def lines(modules: set[str]) -> int:
    count = 0
    for module in modules:
        path = PACKAGE.joinpath(*module.split(".")) if module else PACKAGE
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        count += len(path.read_text(encoding="utf-8").splitlines())
    return count


def test_registering_loads_no_tool():
    assert loaded() == PLUGIN


def test_a_training_run_with_the_defaults_loads_the_plugin_and_no_tool(model_dir, tmp_path):
    modules = loaded(RUN.format(tests=str(Path(__file__).parent), model=str(model_dir), folder=str(tmp_path)))
    assert modules == PLUGIN | PREFIX_SHARING
    assert 1000 < lines(modules) <= 2000


def test_the_top_of_the_package_shows_its_layers():
    files = [path.name for path in PACKAGE.glob("*.py")]
    assert 8 <= len(files) <= 12, files
