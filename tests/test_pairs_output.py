"""What a run leaves behind, read as users read it: by `datasets`, by the trainer, as JSON and as a card."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from apo_trl.errors import InputError
from apo_trl.io.readers import read_rows
from apo_trl.pairs.config.settings import make_settings
from apo_trl.pairs.llm.response_cache import ResponseCache
from apo_trl.pairs.output import parquet
from apo_trl.pairs.output import writer as output
from apo_trl.pairs.output.card import card
from apo_trl.pairs.output.writer import write
from apo_trl.pairs.text.filters import REVISION_REASONS
from apo_trl.pairs.text.reasons import REASONS

URL = "http://secret-host.example.org:8123/v1"
ODD = [
    "plain",
    "emoji \U0001f600 and \u200d joined",
    "line\u2028and\u2029paragraph\x85next",
    "nul \x00 in it",
    "quotes \" and ' and \\",
    "```python\nprint('fence')\n```",
    "``````\nsix\n``````",
    "\r\nreturns\r",
    "\ttab",
    "---\nyaml: front\n---",
    "{braces} {0} %s",
    "| a | table |",
    "long " * 50_000,
    "\ufeffmark",
    "\U0010ffff",
]


def said(role: str, text: str, **more) -> dict:
    return {"role": role, "content": text, **more}


def pair(name, prompt="Why?", chosen="Yes.", rejected="No.", **more) -> dict:
    row = {"id": name, "prompt": prompt if isinstance(prompt, list) else [said("user", prompt)]}
    row |= {"chosen": [said("assistant", chosen)], "rejected": [said("assistant", rejected)], "rationale": ""}
    row |= {"method": "clair", "chosen_model": "r", "rejected_model": "p", "judge_model": None, "margin": None}
    return row | more


@pytest.fixture
def finish(tmp_path):
    """Write the output of rows that ended: dicts are pairs, the others (reason, detail), each maybe with notes."""

    def run(rows, *, stopped="", notes=None, servers=(), folder="out", **keys):
        basis = {"method": "clair", "prompts": str(tmp_path / "prompts.jsonl"), "output_dir": str(tmp_path / folder)}
        for role in ("policy", "reviser", "judge"):
            basis |= {f"{role}_base_url": URL, f"{role}_model": f"{role}-model"}
        settings = make_settings(basis | keys)
        with ResponseCache(settings.folder) as store:
            store.begin()
            for at, row in enumerate(rows):
                reason, detail = ("", "") if isinstance(row, dict) else row
                store.end_row(
                    at, row["id"] if isinstance(row, dict) else f"row{at}", reason=reason, detail=detail,
                    pair=json.dumps(row) if isinstance(row, dict) else "", notes=json.dumps((notes or {}).get(at, {})),
                )  # fmt: skip
            return write(settings, store, stopped=stopped, servers=servers)

    return run


def lines(folder: Path) -> list[dict]:
    with (folder / "pairs.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def bare(value):
    """Leave out what Parquet fills with None."""
    if isinstance(value, dict):
        return {key: bare(part) for key, part in value.items() if part is not None}
    return [bare(part) for part in value] if isinstance(value, list) else value


def loaded(tmp_path, *args, **more) -> list[dict]:
    from datasets import load_dataset

    return load_dataset(*args, split="train", cache_dir=str(tmp_path / "cache"), **more).to_list()


def front_matter(folder: Path) -> dict:
    start, matter, _ = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert start == ""
    return yaml.safe_load(matter)


# ----- the pairs, as datasets


def test_both_formats_hold_the_same_odd_texts_once(finish, tmp_path):
    rows = [pair(f"row {at} {text[:40]}", text, text + "!", text + "?", rationale=text) for at, text in enumerate(ODD)]
    rows[1] |= {"margin": 2.5, "judge_model": "j"}
    result = finish(rows)
    assert lines(result.folder) == rows
    assert [bare(row) for row in loaded(tmp_path, str(result.folder))] == [bare(row) for row in rows]
    files = str(result.folder / "pairs.jsonl")
    assert [bare(row) for row in loaded(tmp_path, "json", data_files=files)] == [bare(row) for row in rows]
    assert front_matter(result.folder)["configs"] == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "pairs.parquet"}]}
    ]
    result = finish([rows[12]], folder="long")
    assert len((result.folder / "README.md").read_text()) < 20_000 < len(ODD[12])


def calls(arguments) -> list[dict]:
    return [{"type": "function", "function": {"name": "f", "arguments": arguments}}]


def test_messages_may_hold_more_in_some_rows_only_and_late(finish, tmp_path):
    rows = [pair(str(at)) for at in range(2500)]
    rows[1200] = pair("1200", [said("system", "s"), said("user", "u", name="Ann")])
    rows[1700] = pair("1700", [said("user", "u"), said("assistant", "", tool_calls=calls({"x": 1})), said("tool", "1")])
    rows[2300] = pair("2300", [said("user", "u"), said("assistant", "", tool_calls=calls({"x": 2.5, "y": ["z"]}))])
    rows[2400] = pair("2400", [said("user", "u", tool_calls=[])])
    result = finish(rows)
    assert lines(result.folder) == rows
    found = [bare(row) for row in loaded(tmp_path, str(result.folder))]
    assert found == [bare(row) for row in rows]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([{}], ["{}"]),
        ([{"a": {}}, {"a": {"b": 1}}], [{"a": {"b": None}}, {"a": {"b": 1}}]),
        ([1, "one"], ["1", "one"]),
        ([{"a": 1}, {"a": "one"}], ['{"a": 1}', '{"a": "one"}']),
        ([[1], {"a": 1}], ["[1]", '{"a": 1}']),
        ([[], []], [[], []]),
        ([2**70, 1], ["1180591620717411303424", "1"]),
        ([True, 1], ["true", "1"]),
        ([None, None], [None, None]),
        (["a", None], ["a", None]),
    ],
)
@pytest.mark.parametrize("chunk", [1, 1000])
def test_what_no_column_holds_is_json_text(finish, tmp_path, monkeypatch, values, expected, chunk):
    import pyarrow.parquet as pq

    monkeypatch.setattr(parquet, "_CHUNK", chunk)
    rows = [pair(str(at), [said("user", "u", more=value)]) for at, value in enumerate(values)]
    result = finish(rows)
    assert lines(result.folder) == rows
    found = pq.read_table(result.folder / "pairs.parquet").to_pylist()
    assert [row["prompt"][0]["more"] for row in found] == expected
    assert len(loaded(tmp_path, str(result.folder))) == len(values)


def test_half_of_a_surrogate_pair_stops_nothing(finish, tmp_path):
    result = finish([pair("a\ud83d".encode("utf-8", "replace").decode(), [said("user", "u", name="\ud83d")])])
    assert lines(result.folder)[0]["prompt"][0]["name"] == "?"
    assert loaded(tmp_path, str(result.folder))[0]["prompt"][0]["name"] == "?"


def test_no_pairs_are_files_too(finish, tmp_path):
    import pyarrow.parquet as pq

    result = finish([("refused", "")])
    assert (result.folder / "pairs.jsonl").read_bytes() == b""
    assert pq.read_table(result.folder / "pairs.parquet").num_rows == 0
    assert list(read_rows(str(result.folder / "pairs.jsonl"))) == []
    assert list(read_rows(str(result.folder))) == []  # `datasets`, streaming; else it says that there is no data
    text = (result.folder / "README.md").read_text()
    assert "No pairs." in text
    assert "## An example" not in text
    assert finish([], folder="none").report["asked"] == 0


# ----- writing that fails


@pytest.mark.parametrize("broken", ["pairs.jsonl", "pairs.parquet", "report.json", "README.md"])
def test_a_disk_that_fails_leaves_the_old_files_and_no_halves(finish, tmp_path, monkeypatch, broken):
    folder = finish([pair("old")]).folder
    before = {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith("store")}
    assert set(before) == {"pairs.jsonl", "pairs.parquet", "report.json", "README.md"}
    full = OSError(28, "No space left on device")

    class Full:
        def __init__(self, file):
            self.file, self.left = file, 100

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, text):
            self.left -= len(text)
            if self.left < 0:
                raise full
            return self.file.write(text)

    real, real_parquet = output._text_file, output.to_parquet

    def cut(source, target):
        real_parquet(source, target)
        os.truncate(target, 50)
        raise full

    if broken.endswith("parquet"):
        monkeypatch.setattr(output, "to_parquet", cut)
    else:
        monkeypatch.setattr(output, "_text_file", lambda path: Full(real(path)) if broken in path.name else real(path))
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
        finish([pair("new"), pair("new 2")])
    after = {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith("store")}
    assert after == before
    monkeypatch.undo()
    assert finish([pair("new"), pair("new 2")]).report["kept"] == 2
    assert len(lines(folder)) == 2


# ----- the card and the report


def reasons_of_the_source() -> set[str]:
    """Find every reason that the code gives: `Dropped(...)`, faults of records and of the output."""
    found, calls = set(), 0
    for path in sorted(Path("apo_trl/pairs").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            name = getattr(node.func, "id", getattr(node.func, "attr", "")) if isinstance(node, ast.Call) else ""
            if name in ("Dropped", "ended") and len(node.args) > 2 * (name == "ended"):
                calls += 1
                found |= strings(node.args[2 * (name == "ended")])
            if isinstance(node, ast.keyword) and node.arg == "reason" and isinstance(node.value, ast.Constant):
                found.add(node.value.value)
    assert calls == 20, "a place that drops rows was added or removed: check that REASONS has its reason"
    return found - {""}


def strings(node) -> set[str]:
    if isinstance(node, ast.JoinedStr):
        return {"".join(part.value if isinstance(part, ast.Constant) else "*" for part in node.values)}
    if isinstance(node, ast.IfExp):
        return strings(node.body) | strings(node.orelse)
    return {node.value} if isinstance(node, ast.Constant) else {f"<{ast.unparse(node)}>"}


def test_every_reason_has_an_explanation():
    found = reasons_of_the_source()
    computed = {name for name in found if "<" in name or "*" in name}
    assert computed == {
        "*_*", "*_error", "*_failed",  # of the roles
        "<reason>",  # REVISION_REASONS
        "<record.reason>", "<max(NO_WIN, key=outcomes.count)>",
    }  # fmt: skip
    for role in ("policy", "reviser", "stronger", "judge"):
        found |= {f"{role}_{end}" for end in ("truncated", "filtered", "unfinished", "empty", "error")}
    found |= {*REVISION_REASONS, "reviser_failed", "judge_failed"}
    found |= {"bad_row", "duplicate_prompt", "duplicate_id", "not_asked"}
    found |= {"tie", "disagreement", "judge_invalid"}
    found |= {"prompt_fills_max_length", "identical_after_truncation", "template_fails"}
    assert found - computed == set(REASONS)
    assert len(REASONS) == 46


def test_the_card_explains_every_reason_and_the_numbers_add_up(finish):
    rows = [(reason, f"{reason} {at}") for reason in REASONS for at in range(5)] + [pair("kept")]
    result = finish(rows)
    report = json.loads((result.folder / "report.json").read_text(encoding="utf-8"))
    assert report == result.report
    assert report["asked"] == len(rows) == report["kept"] + sum(report["dropped"].values())
    assert report["dropped"] == dict.fromkeys(REASONS, 5)
    assert {name: len(found) for name, found in report["examples"].items()} == dict.fromkeys(REASONS, 3)
    table = [line for line in (result.folder / "README.md").read_text().splitlines() if line.startswith("| ")]
    for reason, (why, _) in REASONS.items():
        (line,) = [line for line in table if line.startswith(f"| {reason} |")]
        assert line.count("|") == 5
        assert [cell.strip() for cell in line.split("|")[2:4]] == ["5", why]


def test_ids_and_settings_cannot_break_the_card(finish):
    odd = ["a|b", "a`b", "new\nline", "---", "<script>", "  ", "\u2028", "[x](y)"]
    rows = [pair(name, method="x") for name in odd]
    prompts = [(reason, "") for reason in ("bad_row",)]
    result = finish(
        rows + prompts, policy_system_prompt="---\nconfigs: []\n---\n# Title `x`", policy_extra_body={"a": "```\n#"}
    )
    text = (result.folder / "README.md").read_text(encoding="utf-8")
    assert set(front_matter(result.folder)) == {"configs", "dataset_info", "tags"}
    (split,) = front_matter(result.folder)["dataset_info"][0]["splits"]
    assert split["num_examples"] == len(odd)
    assert split["num_bytes"] == (result.folder / "pairs.parquet").stat().st_size
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert len(headings) == 5, headings
    examples = {"refused": [{"id": name, "detail": ""} for name in odd]}
    report = result.report | {"dropped": {"refused": 8}, "examples": examples}
    (line,) = [line for line in card(report, None, 0).split("\n") if line.startswith("| refused")]
    assert line.replace("\\|", "").count("|") == 5
    assert line.replace("\\|", "").count("`") == 2 * len(odd)


@pytest.mark.parametrize(
    ("reasons", "stopped", "complete"),
    [([], "", True), (["refused", "tie"], "", True), (["policy_error"], "", False), (["judge_error"], "", False),
     (["not_answered"], "", False), ([], "max_cost 1 would be passed", False)],
)  # fmt: skip
def test_complete_is_what_a_further_run_could_not_add_to(finish, reasons, stopped, complete):
    result = finish([pair("1"), *((reason, "") for reason in reasons)], stopped=stopped)
    assert result.report["complete"] is complete
    assert ("**Not complete:**" in (result.folder / "README.md").read_text()) is not complete


def test_neither_report_nor_card_says_where_servers_files_or_keys_are(finish, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SECRET_VARIABLE", "sk-test-0123456789")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.jsonl").write_text('{"prompt": "Why is the sky blue?"}\n')
    (tmp_path / "other.jsonl").write_text('{"prompt": "Why?"}\n')
    message = f"policy at {URL}: status 500: Cannot connect to host secret-host.example.org:8123 ssl:default"
    result = finish(
        [pair("kept"), ("policy_error", message), ("not_asked", f"policy_base_url {URL} cannot be used")],
        stopped=f"20 requests in a row failed, the last with: {message}",
        policy_api_key_env="MY_SECRET_VARIABLE",
        eval_sets=[str(tmp_path / name) for name in ("a/test.jsonl", "b/test.jsonl", "other.jsonl")],
        servers={"policy policy-model": "honours n"},
    )
    assert URL in result.stopped, "the terminal may know"
    for name in ("report.json", "README.md"):
        text = (result.folder / name).read_text(encoding="utf-8")
        for secret in ("secret-host", "8123", "sk-test", "MY_SECRET", str(tmp_path), "http://"):
            assert secret not in text, (name, secret)
    assert list(result.report["overlap"]) == ["a/test.jsonl", "b/test.jsonl", "other.jsonl"]
    assert "500" in result.report["examples"]["policy_error"][0]["detail"]


def test_overlap_with_evaluation_sets_is_told(finish, tmp_path):
    (tmp_path / "eval.jsonl").write_text('{"prompt": "why, though"}\n{"question": "Something else?"}\n')
    result = finish([pair("x|y", "Why, though?"), pair("z", "Not that.")], eval_sets=[str(tmp_path / "eval.jsonl")])
    assert result.report["overlap"] == {"eval.jsonl": {"prompts": 2, "matches": 1, "ids": ["x|y"]}}
    assert (
        "- eval.jsonl: 1 of its 2 prompts' texts are among ours (`x\\|y`)" in (result.folder / "README.md").read_text()
    )


def test_what_the_judge_did(finish):
    comparisons = {
        0: [["A", "B"], ["B", "A"], ["A", "A"]],  # agree, agree, the first shown wins twice
        1: [["B", "B"], ["TIE", "TIE"]],
        2: [["TIE", "A"], ["A", "INVALID"], ["INVALID", "INVALID"]],
    }
    rows = [pair("0"), ("disagreement", ""), ("tie", "")]
    judged = {"method": "on_policy_judge"}
    result = finish(rows, notes={at: {"comparisons": found} for at, found in comparisons.items()}, **judged)
    # Six comparisons have two verdicts: three agree, one of them on a tie. Nine verdicts are no tie, five of them A.
    assert result.report["judge"] == {
        "comparisons": 8, "invalid": 2, "orders_agree": 3 / 6, "first_position_rate": 5 / 9, "ties": 1 / 6
    }  # fmt: skip
    assert "answer shown first (0.5: no bias): 0.556" in (result.folder / "README.md").read_text()
    result = finish(rows, notes={0: {"comparisons": [["INVALID", "A"]] * 3}}, **judged)
    assert result.report["judge"] == {
        "comparisons": 3, "invalid": 3, "orders_agree": None, "first_position_rate": None, "ties": None
    }  # fmt: skip
    assert "both orders agree: none" in (result.folder / "README.md").read_text()
    result = finish(rows, notes={0: {"comparisons": [["TIE", "TIE"]]}}, **judged)
    assert result.report["judge"]["first_position_rate"] is None
    result = finish(rows, notes={0: {"scores": [7.5, None, 0]}, 1: {"scores": [None]}}, **judged)
    assert result.report["judge"] == {"scores": 2, "invalid": 2}
    assert "judge" not in finish(rows, notes={}).report


# ----- with the training's tokenizer


def test_what_is_kept_is_what_the_trainer_keeps(finish, model_dir, train, tmp_path):
    from datasets import load_dataset

    long = "x" * 60
    rows = [
        pair("kept"),
        pair("cut apart", "Why?", "a" + long, "b" + long),
        pair("cut alike", "Why?", long + "a", long + "b"),
        pair("prefix", "Why?", long, long + "b"),
        pair("fills", "y" * 100, "a", "b"),
        pair("just fills", "y" * 61, "a", "b"),
        pair("fits by one", "y" * 60, "a", "b"),
        pair("emoji", "Why?", "\U0001f600", "\U0001f601"),
        pair("far", "y" * 40, "z" * 22 + "a", "z" * 22 + "b"),
        pair("near", "y" * 40, "z" * 20 + "a", "z" * 20 + "b"),
    ]
    # A message costs its role's token and its end's: "y" * 61 with both and the answer's role are 64.
    result = finish(rows, tokenizer=str(model_dir), max_length=64, folder="cut")
    kept = [row["id"] for row in lines(result.folder)]
    assert kept == ["kept", "cut apart", "fits by one", "emoji", "near"]
    assert result.report["dropped"] == {"identical_after_truncation": 3, "prompt_fills_max_length": 2}
    assert finish(rows, folder="whole").report["kept"] == len(rows)
    for folder in ("cut", "whole"):
        data = load_dataset(str(tmp_path / folder), split="train", cache_dir=str(tmp_path / "cache"))
        trainer = train(data=data, max_length=64, run=False)
        assert sorted(trainer.train_dataset["id"]) == sorted(kept)


@pytest.mark.parametrize("max_length", [None, 64])
def test_a_conversation_that_the_template_refuses_harms_no_other(finish, tmp_path, max_length):
    from conftest import make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role.') }}{% endif %}"
        + tokenizer.chat_template
    )
    tokenizer.save_pretrained(tmp_path / "strict")
    rows = [pair("a"), pair("b", [said("system", "s"), said("user", "u")]), pair("c")]
    result = finish(rows, tokenizer=str(tmp_path / "strict"), max_length=max_length)
    assert [row["id"] for row in lines(result.folder)] == ["a", "c"]
    assert result.report["dropped"] == {"template_fails": 1}
    assert "No system role." in result.report["examples"]["template_fails"][0]["detail"]


# ----- size

MEMORY = """
import json, sys
from pathlib import Path
from apo_trl.pairs.output.writer import write
from apo_trl.io.readers import read_rows
from apo_trl.pairs.config.settings import make_settings
from apo_trl.pairs.llm.response_cache import ResponseCache
import pyarrow.parquet

def peak():  # in MB, of this process alone: that of getrusage begins at its parent's
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) // 1024

settings = make_settings({"method": "clair", "prompts": "p.jsonl", "output_dir": sys.argv[1], "reviser_model": "r"})
said = lambda role, text: [{"role": role, "content": text}]
with ResponseCache(settings.folder) as store:
    store._base.execute("BEGIN")
    for at in range(int(sys.argv[2])):
        row = {"id": str(at), "prompt": said("user", f"{at} why " * 20), "chosen": said("assistant", f"{at} yes " * 50),
               "rejected": said("assistant", f"{at} no " * 50), "rationale": "so", "method": "clair",
               "chosen_model": "r", "rejected_model": "p", "judge_model": None, "margin": None}
        store.end_row(at, str(at), reason="", detail="", pair=json.dumps(row), notes="{}")
    store._base.execute("COMMIT")
    before = peak()
    assert write(settings, store).report["kept"] == int(sys.argv[2])
print(before, peak())
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")
def test_memory_does_not_grow_with_the_pairs(tmp_path):
    peaks = []
    for count in (5_000, 40_000):
        command = [sys.executable, "-c", MEMORY, str(tmp_path / str(count)), str(count)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append([int(part) for part in done.stdout.split()])
    print(peaks)
    # Nine numbers are kept of each pair: 3 MB for 35,000 more, and a copy of them for the quantiles.
    assert peaks[1][1] - peaks[0][1] < 30, peaks


def test_a_folder_that_was_written_anew_is_read_anew(finish, tmp_path, monkeypatch):
    """`datasets` keeps what it made of a folder with a card, and knows nothing of files that have changed since."""
    from apo_trl.io.readers import load_dataset, read_rows

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "folder"
    folder.mkdir()
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: rows.jsonl}\n---\n"
    (folder / "README.md").write_text(card)
    for count in (3, 5):
        (folder / "rows.jsonl").write_text("".join(json.dumps({"a": at}) + "\n" for at in range(count)))
        assert len(load_dataset(str(folder))["train"]) == count
        assert len(load_dataset(str(folder), "default", split="train")) == count
        assert len(list(read_rows(str(folder)))) == count
