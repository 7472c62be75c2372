"""Every recipe in the tree: found by name, accepted by the installed classes, and without a key that says nothing."""

import re
import shutil

import pytest
import yaml
from conftest import rows
from huggingface_hub.utils import build_hf_headers
from test_cli import write

from apo_trl.cli import main as cli
from apo_trl.errors import InputError
from apo_trl.io.resources import accelerate_config, find_recipe, hardware, recipe_folder, recipe_names
from apo_trl.recipes.catalog import describe
from apo_trl.recipes.check import check
from apo_trl.training.arguments import parse, trl_script

NAMES = recipe_names()
HARDWARE = sorted((recipe_folder() / "accelerate").glob("*.yaml"))


def test_how_many_there_are():
    assert len(NAMES) == 17
    assert {describe(name)["method"] for name in NAMES} == {"full", "LoRA", "QLoRA"}
    losses = {"apo_zero", "apo_down", "apo_zero_norm", "apo_blend", "apo_zero_unpaired", "reward", "rloo"}
    assert {describe(name)["loss"] for name in NAMES} == losses
    names = "cpu ddp fsdp2 multi_node_zero3 single_gpu zero1 zero2 zero3 zero3_offload"
    assert [path.stem for path in HARDWARE] == names.split()


def settings(*arguments, script=None):
    run, leftover = parse([*arguments, "--use_cpu"], script=script)
    assert leftover == []
    return {key: value for part in run for key, value in vars(part).items()}


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_known_and_changes_something(name):
    path = find_recipe(name)
    keys = yaml.safe_load(path.read_text())
    parsed, defaults = settings("--config", name), settings(script=trl_script(keys))
    # use_cpu is given above for both, since the default needs a GPU.
    same = [key for key in keys if key != "use_cpu" and parsed[key] == defaults[key]]
    # What a source recommends is worth saying even where it is the default.
    assert set(same) <= {"loss_type", "beta", "learning_rate"}


@pytest.mark.parametrize(
    ("keys", "script"),
    [
        ({}, "dpo"),
        ({"loss_type": "kto"}, "kto"),
        ({"loss_type": ["apo_zero_unpaired"]}, "kto"),
        ({"loss_type": ["apo_zero", "kto"]}, "dpo"),  # whose error names the loss
        ({"center_rewards_coefficient": 0.01}, "reward"),
        ({"lora_task_type": "SEQ_CLS"}, "reward"),
        ({"reward_funcs": ["a.b"]}, "rloo"),
        ({"reward_model_name_or_path": "reward"}, "rloo"),
    ],
    ids=str,
)
def test_the_script_of_trl_that_has_the_keys_of_a_run(keys, script):
    assert trl_script(keys) == script
    words = [word for key, value in keys.items() for word in (f"--{key}", *([value] if isinstance(value, str) else []))]
    if len(words) == 2 * len(keys):  # as options, too
        assert parse([*words, "--use_cpu"])[0].trl_script == script


@pytest.mark.parametrize("name", NAMES)
def test_its_head_says_what_a_user_must_know(name):
    head = [line for line in find_recipe(name).read_text().splitlines() if line.startswith("#")]
    demo = name == "smollm2-135m/demo"
    for word in ("Model:", "Data:", "Hardware:", "Numbers:", *(["apo-trl demo"] if demo else [name, "Measured here:"])):
        assert any(word in line for line in head), word


@pytest.mark.parametrize("name", NAMES)
def test_the_check_finds_no_error(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    errors = [finding.text for finding in check(name) if finding.level == "error"]
    # Two recipes name a file of the user's, which is not here.
    assert all("pairs.jsonl" in error for error in errors)
    assert bool(errors) == (name in ("qwen3-0.6b/apo_blend_lora", "qwen3-1.7b/apo_zero_lora"))


@pytest.mark.parametrize("name", NAMES)
def test_a_broken_key_in_any_of_them_is_found(name, tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text(find_recipe(name).read_text() + "\nlerning_rate: 1\n")
    (error,) = [finding for finding in check(str(broken)) if finding.level == "error"]
    assert "unknown key: 'lerning_rate'" in error.text
    assert "Did you mean 'learning_rate'?" in error.text


@pytest.mark.parametrize("path", HARDWARE, ids=lambda path: path.stem)
def test_hardware_is_accepted_by_accelerate(path):
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(path)).num_machines == 1
    assert accelerate_config(path.stem) == str(path)
    assert accelerate_config("somewhere.yaml") == "somewhere.yaml"


BAD = {
    "a loss that does not exist": ("loss_type: apo_zeroo", "Did you mean 'apo_zero'?"),
    "a value of the wrong type": ("beta: high", "invalid float value"),
    "quantised full fine-tuning": ("load_in_4bit: true", "load_in_4bit: requires use_peft"),
    "an adapter on lm_head": ("use_peft: true\nlora_target_modules: [q_proj, lm_head]", "lora_target_modules: lm_head"),
    "a column that the loss needs": ("loss_type: apo_blend\ndataset_name: plain.jsonl", "has no column 'chosen_wins'"),
    "a truncation that does not exist": ("truncation_mode: keep-end", "Did you mean 'keep_end'?"),
    "prompts longer than max_length": ("dataset_name: pairs.jsonl\nmax_length: 8", "in 8 of 8 rows"),
    "an adapter without a score": (
        "center_rewards_coefficient: 0.01\nuse_peft: true",
        "lora_task_type: must be SEQ_CLS",
    ),
    "a reward that is no function": ("reward_funcs: [apo_trl.checks.nothing]", "reward_funcs: function not found"),
    "part of a group": ("reward_funcs: [accuracy_reward]\nnum_generations: 3", "divisible by num_generations"),
    "a file that is not there": ("dataset_name: none.jsonl", "none.jsonl"),
}
NOTES = {
    "label smoothing": ("label_smoothing: 0.1", "label_smoothing: no effect on apo_zero"),
    "a beta for sums": ("loss_type: apo_zero_norm", "beta: 0.1 is small for apo_zero_norm"),
    "the batch": ("per_device_train_batch_size: 2\ngradient_accumulation_steps: 8", "batch: 16 pairs"),
}


class TestCheck:
    @pytest.fixture
    def file(self, tmp_path, model_dir, monkeypatch):
        monkeypatch.chdir(tmp_path)
        write(tmp_path / "pairs.jsonl", rows())
        write(tmp_path / "plain.jsonl", [{k: v for k, v in row.items() if k != "chosen_wins"} for row in rows()])

        def build(text):
            path = tmp_path / "run.yaml"
            path.write_text(f"model_name_or_path: {model_dir}\n{text}\n")
            return str(path)

        return build

    @pytest.mark.parametrize("case", BAD)
    def test_errors(self, file, case, capsys):
        text, words = BAD[case]
        path = file(text)
        assert any(words in finding.text for finding in check(path) if finding.level == "error")
        with pytest.raises(SystemExit) as stop:
            cli.main(["recipes", "check", path])
        assert stop.value.code == 1
        assert words in capsys.readouterr().out

    @pytest.mark.parametrize("case", NOTES)
    def test_notes(self, file, case, capsys):
        text, words = NOTES[case]
        with pytest.raises(SystemExit) as stop:
            cli.main(["recipes", "check", file(text)])
        assert stop.value.code == 0
        assert words in capsys.readouterr().out

    def test_a_prompt_may_fill_max_length_if_the_end_is_kept(self, file):
        text, _ = BAD["prompts longer than max_length"]
        assert [found.level for found in check(file(f"{text}\ntruncation_mode: keep_end"))] == ["note"]

    def test_a_model_on_the_hub_is_not_asked_for(self, tmp_path, monkeypatch):
        """Nor is a split that the data lacks overlooked."""
        asked = []
        build_hf_headers()  # once in a process this asks which program runs it, unless offline
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("socket.getaddrinfo", lambda host, *rest, **more: asked.append(host) or [])
        data = write(tmp_path / "pairs.jsonl", rows(4))
        given = {"model_name_or_path": "no/such-model", "dataset_name": str(data), "output_dir": str(tmp_path / "out")}
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(given))
        assert ["no tokenizer of no/such-model is here" in found.text for found in check(str(path))] == [False, True]
        path.write_text(yaml.safe_dump(given | {"dataset_train_split": "trian"}))
        assert any("Did you mean 'train'?" in found.text for found in check(str(path)))
        assert asked == []

    def test_four_bits_without_the_extra(self, file, monkeypatch):
        monkeypatch.setattr("apo_trl.recipes.check.find_spec", lambda name: None)
        findings = check(file("load_in_4bit: true\nuse_peft: true"))
        assert any("pip install 'apo-trl[qlora]'" in finding.text for finding in findings)

    def test_rounds(self, tmp_path):
        path, values = tmp_path / "mine.yaml", yaml.safe_load(find_recipe("rounds/instructions").read_text())
        values["output_dir"] = str(tmp_path / "out")
        path.write_text(yaml.safe_dump(values))
        assert check(str(path)) == []
        assert not (tmp_path / "out").exists()
        for section, key in (("pairs", "polici_model"), ("train", "betta"), ("scor", "prompts")):
            path.write_text(yaml.safe_dump(values | {section: values.get(section, {}) | {key: "x"}}))
            (finding,) = check(str(path))
            assert finding.level == "error"
            assert re.search(f"{key if section != 'scor' else section}.*Did you mean", finding.text)


class TestCommands:
    def test_list(self, capsys, tmp_path, monkeypatch):
        shutil.copytree(recipe_folder(), tmp_path, dirs_exist_ok=True)
        shutil.copy(tmp_path / "rounds/instructions.yaml", tmp_path / "rounds/more.yaml")
        monkeypatch.setattr("apo_trl.io.resources.recipe_folder", lambda: tmp_path)
        cli.main(["recipes"])
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines[:-3]] == ["name", *NAMES]
        assert lines[-1] == "For `apo-trl rounds`: rounds/instructions, rounds/more"
        assert lines[-2] == f"For `apo-trl pairs build`: {', '.join(recipe_names('pairs'))}"
        assert len(recipe_names("pairs")) == 7

    def test_show_and_copy(self, capsys, tmp_path):
        text = find_recipe("llama-3-8b/apo_zero_full").read_text()
        cli.main(["recipes", "show", "llama-3-8b/apo_zero_full"])
        assert capsys.readouterr().out == text
        copy = tmp_path / "mine.yaml"
        cli.main(["recipes", "copy", "llama-3-8b/apo_zero_full", str(copy)])
        assert copy.read_text() == text
        with pytest.raises(SystemExit) as stop:
            cli.main(["recipes", "copy", "llama-3-8b/apo_zero_full", str(copy)])
        assert stop.value.code == 2
        assert "mine.yaml exists" in capsys.readouterr().err


class TestPlan:
    """The numbers are tested in test_plan.py; here, that the command asks for the right ones."""

    def run(self, capsys, model_dir, *arguments):
        cli.main(["recipes", "plan", *arguments, "--model_name_or_path", str(model_dir)])
        return capsys.readouterr().out

    def test_says_what_fits(self, capsys, model_dir):
        out = self.run(capsys, model_dir, "llama-3-8b/apo_zero_lora", "--gpu_memory", "24")
        assert "adapters" in out
        assert "24" in out.splitlines()[-1]

    def test_more_is_shared_out_under_zero3(self, capsys, model_dir):
        tables = [
            self.run(capsys, model_dir, "llama-3-8b/apo_zero_full", "--gpu_memory", "80", "--gpus", "8", *hardware)
            for hardware in ([], ["--accelerate_config", "zero3"])
        ]
        assert len(set(tables)) == 2

    @pytest.mark.parametrize("name", NAMES)
    def test_every_recipe_can_be_planned(self, capsys, model_dir, name):
        if not name.startswith("rlhf/"):
            assert "total" in self.run(capsys, model_dir, name, "--gpu_memory", "24")
            return
        with pytest.raises(SystemExit):
            self.run(capsys, model_dir, name, "--gpu_memory", "24")
        assert "docs/rlhf.md" in capsys.readouterr().err

    def test_a_key_given_after_it_counts(self, capsys, model_dir):
        few = self.run(capsys, model_dir, "llama-3-8b/apo_zero_full", "--gpu_memory", "80")
        many = self.run(
            capsys, model_dir, "llama-3-8b/apo_zero_full", "--gpu_memory", "80", "--per_device_train_batch_size", "64"
        )
        assert few != many

    def test_hardware(self):
        assert hardware("zero2") == {"stage": 2, "offload": False, "fsdp": False}
        assert hardware("zero3_offload") == {"stage": 3, "offload": True, "fsdp": False}
        assert hardware("fsdp2") == {"stage": 3, "offload": False, "fsdp": True}
        assert hardware("single_gpu")["stage"] == 0
        with pytest.raises(InputError, match=r"'zero33' not found. Did you mean 'zero3'\?"):
            hardware("zero33")


def test_a_wrong_name():
    words = r"'smollm2-135m/dem' not found. Did you mean 'smollm2-135m/demo'\?"
    with pytest.raises(InputError, match=words):
        find_recipe("smollm2-135m/dem")
