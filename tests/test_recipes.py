"""Every recipe in the tree: found by name, accepted by the installed classes, and without a key that says nothing."""

import pytest
import yaml

from apo_trl.inputs import InputError
from apo_trl.recipes import find_recipe, recipe_folder
from apo_trl.train import parse

NAMES = sorted(path.relative_to(recipe_folder()).with_suffix("").as_posix() for path in recipe_folder().rglob("*.yaml"))


def test_how_many_there_are():
    assert NAMES == ["smollm2-135m/demo"]


def settings(*arguments):
    run, leftover = parse(["--use_cpu", "--bf16", "false", *arguments])
    assert leftover == []
    return {key: value for part in run for key, value in vars(part).items()}


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_known_and_changes_something(name):
    path = find_recipe(name)
    keys = yaml.safe_load(path.read_text())
    parsed, defaults = settings("--config", str(path)), settings()
    hardware = {"use_cpu", "bf16"}  # given above for both, since the default needs a GPU
    same = [key for key in keys if key not in hardware and parsed[key] == defaults[key]]
    # What the paper recommends is worth saying even where it is the default.
    assert set(same) <= {"loss_type", "beta"}


@pytest.mark.parametrize("name", NAMES)
def test_its_head_says_what_a_user_must_know(name):
    head = [line for line in find_recipe(name).read_text().splitlines() if line.startswith("#")]
    for word in ("Model:", "Data:", "Hardware:", "Numbers:", "apo-trl"):
        assert any(word in line for line in head), word


def test_a_wrong_name():
    with pytest.raises(InputError, match=r"no recipe 'smollm2-135m/dem'. Did you mean 'smollm2-135m/demo'\?"):
        find_recipe("smollm2-135m/dem")
