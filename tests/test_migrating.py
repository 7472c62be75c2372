"""Every key and example of `docs/migrating.md`, against the installed TRL and this package's parser."""

import dataclasses
import re
from contextlib import nullcontext

import pytest
import trl
import yaml
from conftest import rows
from datasets import load_dataset
from markdown_it import MarkdownIt
from test_cli import write
from test_docs import DOCS, fences
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments
from trl.scripts.dpo import make_parser
from trl.scripts.utils import DatasetConfig

from apo_trl import APOConfig, InputError
from apo_trl.datasets.preprocessing import check_dataset
from apo_trl.training.arguments import _launcher_options, parse
from apo_trl.training.script import load_run_dataset

PAGE = DOCS / "migrating.md"
TRAINING = (ScriptArguments, APOConfig, ModelConfig, DatasetMixtureConfig)
KEYS = {field.name for each in TRAINING for field in dataclasses.fields(each)}
ENTRY = {field.name for field in dataclasses.fields(DatasetConfig)}


def tables():
    """The tables of the page: for each, its head and its rows of cells, as the Markdown between the bars."""
    found, cells = [], None
    for token in MarkdownIt("commonmark").enable("table").parse(PAGE.read_text(encoding="utf-8")):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            cells = []
            found[-1].append(cells)
        elif token.type == "inline" and cells is not None:
            cells.append([child.content for child in token.children if child.type == "code_inline"] or token.content)
    return found


DEFAULTS, REFUSED, TAKEN, AXOLOTL, TYPES, HANDBOOK = tables()
EXAMPLES = [yaml.safe_load(block) for block in fences(PAGE, "yaml")]
HEADS = [block.splitlines()[0] for block in fences(PAGE, "yaml")]


def codes(cell):
    return cell if isinstance(cell, list) else []


def key_of(code):
    return code.split(":")[0]


def settings(tmp_path, text):
    (tmp_path / "file.yaml").write_text(text)
    return parse(["--config", str(tmp_path / "file.yaml"), "--use_cpu"])


def test_how_much_there_is():
    sizes = [len(table) - 1 for table in (DEFAULTS, REFUSED, TAKEN, AXOLOTL, TYPES, HANDBOOK)]
    assert all(size >= least for size, least in zip(sizes, (2, 12, 6, 40, 5, 15), strict=True)), sizes
    assert [re.match("# (before|after): ", head)[1] for head in HEADS] == ["before", "after"] * 3


def test_the_defaults_that_differ():
    told = {codes(row[0])[0] for row in DEFAULTS[1:]}
    # `learning_rate` and the like are TRL's; what only APOConfig has cannot differ.
    ours, theirs = (
        {field.name: field.default_factory() if callable(field.default_factory) else field.default for field in fields}
        for fields in (dataclasses.fields(APOConfig), dataclasses.fields(trl.DPOConfig))
    )
    assert told == {name for name, value in theirs.items() if ours[name] != value}


OLD = [code for row in REFUSED[1:] for code in codes(row[0])]


@pytest.mark.parametrize("code", OLD)
def test_an_old_key_is_refused_by_both_and_passed_over_by_the_script(code, tmp_path):
    line = code if ":" in code else f"{code}: 1"
    key = key_of(code)
    if key == "loss_type":
        with pytest.raises(InputError, match="does not exist"):
            settings(tmp_path, line)
        return
    with pytest.raises(InputError, match=f"The key '{key}' in .* does not exist"):
        settings(tmp_path, line)
    (tmp_path / "file.yaml").write_text(f"{line}\nuse_cpu: true\nbf16: false\n")
    given = ["--config", str(tmp_path / "file.yaml")]
    *_, leftover, _ = make_parser().parse_args_and_config(
        given, return_remaining_strings=True, separate_remaining_strings=True
    )
    assert leftover[0] == f"--{key}"  # which `trl dpo` hands to accelerate,
    assert f"--{key}" not in _launcher_options()  # which stops at it
    assert make_parser().parse_args_and_config(given, fail_with_unknown_args=False)  # as TRL's script asks


def test_a_lost_dtype_is_float32(tmp_path):
    (tmp_path / "file.yaml").write_text("torch_dtype: bfloat16\nuse_cpu: true\nbf16: false\n")
    given = ["--config", str(tmp_path / "file.yaml")]
    _, _, model, _ = make_parser().parse_args_and_config(given, fail_with_unknown_args=False)
    assert model.dtype == "float32"


ROWS = [row for table in (REFUSED, AXOLOTL, HANDBOOK) for row in table[1:]]


def test_what_is_told_to_be_written_exists(tmp_path):
    checked = 0
    for row in ROWS:
        entry = isinstance(row[0], list) and key_of(row[0][0]) in ("id", "config", "weight")
        new = [code for code in codes(row[1]) if not code.startswith("--")]
        known = ENTRY if entry else KEYS
        assert {key_of(code) for code in new} <= known, row
        lines = [code for code in new if ":" in code]
        if lines and not entry:
            assert settings(tmp_path, "\n".join(lines))[1] == []
        for code in codes(row[1]):
            if code.startswith("--"):
                assert settings(tmp_path, "bf16: false")[0]
                option, hardware = code.split()
                assert option in _launcher_options()
                assert (DOCS.parent / "recipes" / "accelerate" / f"{hardware}.yaml").exists()
        checked += len(codes(row[1]))
    assert checked > 60


def test_what_is_taken_is_taken(tmp_path):
    values = {"truncation_mode: keep_end": "", "pad_token": ": x", "label_smoothing": ": 0.1", "report_to": ": none"}
    named = [codes(row[0])[0] for row in TAKEN[1:]]
    assert len(named) == 6
    for code in named:
        going = code.startswith(("truncation_mode", "pad_token"))  # Liger's kernels say so when they are loaded
        with pytest.warns(FutureWarning, match="deprecated") if going else nullcontext():
            assert settings(tmp_path, code + values.get(code, ": true"))[1] == []
    assert APOConfig("out", use_cpu=True, bf16=False).report_to == []


# The examples.


def test_the_file_of_trl_is_read_alike(tmp_path):
    before, after = EXAMPLES[:2]
    ours, leftover = settings(tmp_path, yaml.safe_dump(before))
    theirs = make_parser().parse_args_and_config(["--config", str(tmp_path / "file.yaml"), "--use_cpu"])
    assert leftover == []
    told = {codes(row[0])[0] for row in DEFAULTS[1:]}
    for our, their in zip(ours, theirs, strict=True):
        fields = {field.name for field in dataclasses.fields(their)} - {"accelerator_config"}
        different = {name for name in fields if getattr(our, name) != getattr(their, name)}
        assert different <= told
    assert {key: value for key, value in after.items() if before.get(key) != value}.keys() == {
        "loss_type",
        "output_dir",
    }
    assert settings(tmp_path, yaml.safe_dump(after))[0].training.loss_type == ["apo_zero"]


@pytest.mark.parametrize(("at", "table"), [(2, AXOLOTL), (4, HANDBOOK)], ids=["axolotl", "alignment-handbook"])
def test_the_example_says_the_same_in_new_keys(at, table, tmp_path):
    before, after = EXAMPLES[at : at + 2]
    with pytest.raises(InputError, match=r"\d+ keys in .* do not exist: '\w+'\."):
        settings(tmp_path, yaml.safe_dump(before))
    run, leftover = settings(tmp_path, yaml.safe_dump(after))
    assert leftover == []
    assert run.training.loss_type == ["apo_zero"]
    renamed = {}
    for row in [*REFUSED[1:], *table[1:]]:  # the second says more of such a file
        old, new = codes(row[0]), codes(row[1])
        for number, code in enumerate(old):
            renamed[key_of(code)] = new if len(old) != len(new) else [new[number]]
    carried = 0
    for key, value in before.items():
        if key in ("datasets", "dataset_mixture", "loss_type", "output_dir"):
            continue
        news = renamed.get(key, [key])
        assert key in renamed or key in KEYS, key
        for new in news:
            if ":" in new:
                assert new.split(":")[0] in after or new.startswith("bf16"), (key, new)
            elif new:
                assert after[new] == value, key
                carried += 1
    assert carried >= 11


def test_the_axolotl_example_evaluates_as_often():
    before, after = EXAMPLES[2:4]
    assert after["eval_steps"] == 1 / (before["evals_per_epoch"] * before["num_epochs"])


def test_a_slice_is_a_share_of_the_rows_and_the_split_a_number(tmp_path):
    """As the handbook's `weight` and `test_split_size`, on a file of ten rows."""
    write(tmp_path / "pairs.jsonl", rows(10))
    after = EXAMPLES[5] | {"datasets": [dict(EXAMPLES[5]["datasets"][0])], "test_split_size": 2}
    after["datasets"][0] |= {"path": "json", "data_files": str(tmp_path / "pairs.jsonl"), "name": None}
    after["datasets"][0]["split"] = after["datasets"][0]["split"].replace("train_prefs", "train")
    splits = load_run_dataset(settings(tmp_path, yaml.safe_dump(after))[0])
    assert {name: len(split) for name, split in splits.items()} == {"train": 3, "test": 2}
    assert splits["train"].column_names == ["chosen", "rejected"]


def test_the_rows_of_axolotl(tmp_path):
    (source,) = (block for block in fences(PAGE, "python") if "def " in block)
    names = {}
    exec(compile(source, PAGE.name, "exec"), names)
    user, one, other = (
        {"role": role, "content": text} for role, text in (("user", "?"), ("assistant", "a"), ("assistant", "b"))
    )
    kinds = {
        "chat_template.argilla_chat": {"chosen": [user, one], "rejected": [user, other]},
        "chatml.ultra": {"prompt": "?", "chosen": [user, one], "rejected": [user, other]},
        "chat_template.default": {"messages": [user], "chosen": one, "rejected": other},
        "chatml.intel": {"system": "Be brief.", "question": "?", "chosen": "a", "rejected": "b"},
        "chatml.icr": {"system": "", "input": "?", "chosen": "a", "rejected": "b"},
        "chatml.argilla": {"system": None, "instruction": "?", "chosen_response": "a", "rejected_response": "b"},
    }
    more = {
        "chatml.icr": {"prompt": "input"},
        "chatml.argilla": {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"},
    }
    assert {kind for row in TYPES[1:] for kind in codes(row[0])} >= kinds.keys()
    for kind, row in kinds.items():
        write(tmp_path / "file.jsonl", [row])
        data = load_dataset("json", data_files=str(tmp_path / "file.jsonl"), split="train")
        if kind == "chat_template.default":
            with pytest.raises(InputError, match="has dict as 'chosen'"):
                check_dataset(data, "train", False)
            data = data.map(names["from_messages"])
        elif kind not in ("chat_template.argilla_chat", "chatml.ultra"):
            data = data.map(names["from_texts"], fn_kwargs=more.get(kind))
        if kind != "chat_template.argilla_chat":
            data = data.select_columns(["prompt", "chosen", "rejected"])
        check_dataset(data, "train", False)
