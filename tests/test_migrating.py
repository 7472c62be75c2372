"""Every key and example of `docs/migrating.md`, against the installed TRL and this package's parser."""

import dataclasses
from contextlib import nullcontext

import pytest
import trl
import yaml
from conftest import rows
from datasets import load_dataset
from test_cli import write
from test_docs import DOCS, MARKDOWN, fences, read
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments
from trl.scripts.dpo import make_parser
from trl.scripts.utils import DatasetConfig

from apo_trl import APOConfig, InputError
from apo_trl.datasets.preprocessing import normalise_datasets
from apo_trl.training.arguments import _launcher_options, parse
from apo_trl.training.script import load_run_dataset

PAGE = DOCS / "migrating.md"
TRAINING = (ScriptArguments, APOConfig, ModelConfig, DatasetMixtureConfig)
KEYS = {field.name for each in TRAINING for field in dataclasses.fields(each)}
ENTRY = {field.name for field in dataclasses.fields(DatasetConfig)}


def tables():
    """The rows of each table of the page; a cell is its list of inline code."""
    found, cells = [], None
    for token in MARKDOWN.parse(read(PAGE)):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            cells = []
            found[-1].append(cells)
        elif token.type == "inline" and cells is not None:
            cells.append([child.content for child in token.children if child.type == "code_inline"])
    return [rows[1:] for rows in found]


DEFAULTS, REFUSED, ACCEPTED, AXOLOTL, TYPES, HANDBOOK = tables()
EXAMPLES = [yaml.safe_load(block) for block in fences(PAGE, "yaml")]  # before and after, three times


def key_of(code):
    return code.split(":")[0]


def settings(tmp_path, text):
    (tmp_path / "file.yaml").write_text(text)
    return parse(["--config", str(tmp_path / "file.yaml"), "--use_cpu"])


def test_the_table_of_defaults_is_complete():
    ours, theirs = (
        {field.name: field.default_factory() if callable(field.default_factory) else field.default for field in fields}
        for fields in (dataclasses.fields(APOConfig), dataclasses.fields(trl.DPOConfig))
    )
    assert {row[0][0] for row in DEFAULTS} == {name for name, value in theirs.items() if ours[name] != value}


@pytest.mark.parametrize("code", [code for row in REFUSED for code in row[0]])
def test_an_old_key_is_refused(code, tmp_path):
    key, line = key_of(code), code if ":" in code else f"{code}: 1"
    with pytest.raises(InputError, match=key if key != "loss_type" else "kto_pair"):
        settings(tmp_path, line)
    if key != "loss_type":  # TRL's script ignores it, and `trl dpo` passes it to accelerate, which has no such option
        (tmp_path / "file.yaml").write_text(f"{line}\nuse_cpu: true\nbf16: false\n")
        given = ["--config", str(tmp_path / "file.yaml")]
        assert make_parser().parse_args_and_config(given, fail_with_unknown_args=False)
        assert f"--{key}" not in _launcher_options()


@pytest.mark.parametrize("code", [row[0][0] for row in ACCEPTED])
def test_an_accepted_key_is_accepted(code, tmp_path):
    values = {"truncation_mode: keep_end": "", "pad_token": ": x", "label_smoothing": ": 0.1", "report_to": ": none"}
    deprecated = code.startswith(("truncation_mode", "pad_token"))
    with pytest.warns(FutureWarning, match="deprecated") if deprecated else nullcontext():
        assert settings(tmp_path, code + values.get(code, ": true"))[1] == []


@pytest.mark.parametrize("row", [*REFUSED, *AXOLOTL, *HANDBOOK], ids=lambda row: ",".join(row[0]))
def test_a_new_key_exists(row, tmp_path):
    entry = key_of(row[0][0]) in ("id", "config", "weight") and len(row[0]) == 1
    options = [code for code in row[1] if code.startswith("--")]
    new = [code for code in row[1] if code not in options]
    assert {key_of(code) for code in new} <= (ENTRY if entry else KEYS)
    lines = [code for code in new if ":" in code]
    if lines and not entry:
        assert settings(tmp_path, "\n".join(lines))[1] == []
    for option, hardware in map(str.split, options):
        assert option in _launcher_options()
        assert (DOCS.parent / "recipes" / "accelerate" / f"{hardware}.yaml").exists()


def test_a_file_of_trl_has_the_same_settings(tmp_path):
    ours, leftover = settings(tmp_path, yaml.safe_dump(EXAMPLES[0]))
    theirs = make_parser().parse_args_and_config(["--config", str(tmp_path / "file.yaml"), "--use_cpu"])
    assert leftover == []
    for our, their in zip(ours, theirs, strict=True):
        fields = {field.name for field in dataclasses.fields(their)} - {"accelerator_config"}
        assert {name for name in fields if getattr(our, name) != getattr(their, name)} <= {
            row[0][0] for row in DEFAULTS
        }


@pytest.mark.parametrize("number", range(6))
def test_an_example_parses_once_migrated(number, tmp_path):
    with nullcontext() if number in (0, 1, 3, 5) else pytest.raises(InputError, match="keys"):
        assert settings(tmp_path, yaml.safe_dump(EXAMPLES[number]))[1] == []


@pytest.mark.parametrize(("number", "table"), [(2, AXOLOTL), (4, HANDBOOK)], ids=["axolotl", "alignment-handbook"])
def test_an_example_keeps_its_values(number, table):
    before, after = EXAMPLES[number : number + 2]
    renamed = {}
    for old, new, *_ in [*REFUSED, *table]:  # the second has more about such a file
        for index, code in enumerate(old):
            renamed[key_of(code)] = new if len(old) != len(new) else [new[index]]
    carried = 0
    for key in before.keys() - {"datasets", "dataset_mixture", "loss_type", "output_dir"}:
        assert key in renamed or key in KEYS, key
        for new in renamed.get(key, [key]):
            if ":" in new:
                assert key_of(new) in after or key_of(new) == "bf16", (key, new)
            else:
                assert after[new] == before[key], key
                carried += 1
    assert carried >= 11


def test_the_shares_of_the_examples(tmp_path):
    """`evals_per_epoch` of axolotl; the handbook's `weight` and `test_split_size`, on a file of ten rows."""
    assert EXAMPLES[3]["eval_steps"] == 1 / (EXAMPLES[2]["evals_per_epoch"] * EXAMPLES[2]["num_epochs"])
    write(tmp_path / "pairs.jsonl", rows(10))
    entry = dict(EXAMPLES[5]["datasets"][0]) | {"path": "json", "data_files": str(tmp_path / "pairs.jsonl")}
    entry |= {"name": None, "split": entry["split"].replace("train_prefs", "train")}
    after = EXAMPLES[5] | {"datasets": [entry], "test_split_size": 2}
    splits = load_run_dataset(settings(tmp_path, yaml.safe_dump(after))[0])
    assert {name: len(split) for name, split in splits.items()} == {"train": 3, "test": 2}


USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "?"), ("assistant", "a"), ("assistant", "b")))


@pytest.mark.parametrize(
    ("kind", "row", "function", "columns"),
    [
        ("chat_template.argilla_chat", {"chosen": [USER, GOOD], "rejected": [USER, BAD]}, None, {}),
        ("chatml.ultra", {"prompt": "?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, None, {}),
        ("chat_template.default", {"messages": [USER], "chosen": GOOD, "rejected": BAD}, "from_messages", {}),
        ("chatml.intel", {"system": "Be brief.", "question": "?", "chosen": "a", "rejected": "b"}, "from_texts", {}),
        ("chatml.icr", {"system": "", "input": "?", "chosen": "a", "rejected": "b"}, "from_texts", {"prompt": "input"}),
        (
            "chatml.argilla",
            {"system": None, "instruction": "?", "chosen_response": "a", "rejected_response": "b"},
            "from_texts",
            {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"},
        ),
    ],
)
def test_rows_of_axolotl_become_valid(kind, row, function, columns, tmp_path):
    assert kind in [code for types in TYPES for code in types[0]]
    names = {}
    for source in fences(PAGE, "python"):
        exec(compile(source, PAGE.name, "exec"), names)
    write(tmp_path / "file.jsonl", [row])
    data = load_dataset("json", data_files=str(tmp_path / "file.jsonl"), split="train")
    if function:
        data = data.map(names[function], fn_kwargs=columns).select_columns(["prompt", "chosen", "rejected"])
    normalise_datasets(data, "train")
