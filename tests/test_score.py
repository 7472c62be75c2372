"""`apo-trl score`: answers of a server and of a model in this process, scored by functions that may fail."""

import json
import os
import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_server import ChatServer

from apo_trl.cli import main as cli
from apo_trl.errors import InputError
from apo_trl.evaluation.report import report as write_report
from apo_trl.evaluation.report.scores import comparison, read_scores, scores_page
from apo_trl.evaluation.score import summarise, table
from apo_trl.pairs.llm.response_cache import open_read_only

INSTRUCTIONS = "apo_trl.pairs.instructions:reward"
ANSWERS = {
    "a": "rain is water.", "b": "Rain is water.", "c": "In short: rain is water.", "d": "DONE", "e": "",
    "f": "it is water. it is water. it is water. it is water.",
}  # fmt: skip
KINDS = {"a": "lowercase", "b": "lowercase", "c": "starts_with", "d": "ends_with", "e": "lowercase", "f": "lowercase"}
ARGUMENTS = {"c": "In short:", "d": "DONE"}


@pytest.fixture
def prompts(tmp_path):
    rows = [{"id": name, "prompt": f"Ask {name}?", "kind": KINDS[name]} for name in ANSWERS]
    rows = [row | ({"argument": ARGUMENTS[row["id"]]} if row["id"] in ARGUMENTS else {}) for row in rows]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, [*rows, {"id": "g", "prompt": None}])))
    return path


def reply(body):
    (name,) = {word[0] for word in body["messages"][-1]["content"].split() if word.endswith("?")} or {"a"}
    return ANSWERS.get(name, "8")


def scored(folder, prompts, *more, function=INSTRUCTIONS):
    cli.main(["score", "--prompts", str(prompts), "--judge_function", function, "--output_dir", str(folder), *more])
    rows = pq.read_table(folder / "answers.parquet").to_pylist()
    return json.loads((folder / "score.json").read_text()), {row["id"]: row for row in rows}


def test_answers_of_a_server_are_scored_by_kind_and_broken_ones_are_counted(prompts, tmp_path, capsys):
    with ChatServer(reply) as server:
        more = ["--model", "m", "--policy_base_url", server.url]
        report, rows = scored(tmp_path / "out", prompts, *more)
    again, _ = scored(tmp_path / "out", prompts, *more, "--max_requests", "0")
    assert {name: row["score"] for name, row in rows.items()} == {**dict(a=1, b=0, c=1, d=0, e=0, f=0), "row-7": None}
    assert {name: row["broken"] for name, row in rows.items() if row["broken"]} == dict(e="empty", f="repetition")
    assert {name: row["words"] for name, row in rows.items()} == {**dict(a=3, b=3, c=5, d=1, e=0, f=12), "row-7": None}
    assert rows["a"]["kind"] == "lowercase"
    assert rows["c"]["argument"] == "In short:"
    assert "bad_row" in rows["row-7"]["problem"]
    assert (report["prompts"], report["scored"], report["mean"]) == (7, 6, pytest.approx(1 / 3))
    assert report["followed"] == pytest.approx([1 / 3, 0.0968, 0.7000], abs=1e-4)  # Wilson's, 2 of 6
    assert report["by_kind"]["lowercase"]["followed"][0] == 0.25
    assert (report["broken"], report["empty"], report["repetition"]) == (pytest.approx(1 / 3), 1, 1)
    assert (report["words"], report["worst"], report["problems"]) == (4.0, ["b", "d", "e", "f"], {"bad_row": 1})
    assert {**report, "date": ""} == {**again, "date": ""}
    shown = capsys.readouterr().out
    assert re.search(r"followed +33%   10% to 70%", shown)
    assert "Lowest scores: b, d, e, f" in shown


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("if 'b' in id: raise ValueError('no')\n    return [1.0] * len(id)", "judge_failed: ValueError: no"),
        ("return [float('nan') if one == 'b' else 1.0 for one in id]", "judge_failed: .*nan"),
        ("if 'b' in id: import os; os._exit(3)\n    return [1] * len(id)", "judge_failed: .*ended its process"),
        ("while 'b' in id: pass\n    return [1] * len(id)", "judge_failed: .*within 1 seconds"),
        ("return [None if one == 'b' else 0.75 for one in id]", None),
    ],
)
def test_a_function_that_fails_on_a_row_loses_no_row(body, problem, prompts, tmp_path):
    (tmp_path / "mine.py").write_text(f"def judge(completions, id, **columns):\n    {body}\n")
    with ChatServer(reply) as server:
        more = ["--model", "m", "--policy_base_url", server.url, "--function_timeout", "1"]
        report, rows = scored(tmp_path / "out", prompts, *more, function=f"{tmp_path}/mine.py:judge")
    assert list(rows) == [*ANSWERS, "row-7"]
    assert rows["b"]["score"] is None
    assert rows["b"]["answer"] == ANSWERS["b"]
    assert re.match(problem or "None$", str(rows["b"]["problem"]))
    assert (report["scored"], report["followed"][0]) == (5, 1.0)
    assert report["problems"] == {"bad_row": 1} | ({"judge_failed": 1} if problem else {})


def test_a_column_that_parquet_cannot_hold_is_text(tmp_path):
    lines = [
        {"prompt": "Ask a?", "kind": "lowercase", "argument": None, "meta": {}, "more": [{"deep": {}}]},
        {"prompt": "b?", "meta": {}},
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with ChatServer(reply) as server:
        _, rows = scored(tmp_path / "out", tmp_path / "prompts.jsonl", "--model", "m", "--policy_base_url", server.url)
    assert [(row["meta"], row["more"]) for row in rows.values()] == [("{}", '[{"deep": {}}]'), ("{}", None)]


def test_kinds_of_any_type_and_requests_that_failed(tmp_path, capsys):
    lines = [{"prompt": f"{name}?", "kind": kind} for name, kind in zip("abc", (0, [], "x"), strict=True)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "mine.py").write_text("def judge(completions):\n    return [1.0] * len(completions)\n")
    with ChatServer(reply) as server:
        more = ["--model", "m", "--policy_base_url", server.url]
        report, _ = scored(tmp_path / "out", tmp_path / "prompts.jsonl", *more, function=f"{tmp_path}/mine.py:judge")
    assert report["by_kind"].keys() == {"0", "x"}
    assert "failed" not in table(report)
    assert "Run the same command again" in table(report | {"problems": {"policy_error": 1}})
    assert "failed" not in table(report | {"problems": {"not_asked": 1}, "stopped": "max_cost is reached."})


def test_a_repeated_prompt_hides_no_score(tmp_path):
    folder = folder_of(tmp_path / "one", [1.0, 0.0])
    rows = pq.read_table(folder / "answers.parquet").to_pylist()
    pq.write_table(pa.Table.from_pylist([*rows, rows[1] | {"score": None}]), folder / "answers.parquet")
    assert [row["score"] for row in read_scores(folder, "one").answers.values()] == [0.0, 1.0]
    assert "score 0" in scores_page([read_scores(folder, "one")])


def test_a_model_in_this_process_answers_greedily_and_a_changed_one_anew(model_dir, prompts, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(model_dir, model)
    more = ["--model", str(model), "--policy_max_tokens", "6"]
    report, first = scored(tmp_path / "out", prompts, *more)
    assert report["settings"]["policy_temperature"] == 0
    _, second = scored(tmp_path / "other", prompts, *more)
    assert {name: row["answer"] for name, row in first.items()} == {name: row["answer"] for name, row in second.items()}
    asked = []
    for _ in range(2):
        with open_read_only(tmp_path / "out") as cache:
            asked.append(cache.usage()["policy"]["requests"])
        os.utime(model / "model.safetensors")
        scored(tmp_path / "out", prompts, *more)
    assert asked[1] == 2 * asked[0]


def test_the_keys_of_the_model_are_those_of_the_policy(capsys):
    given = ["score", "--model", "m", "--prompts", "p.jsonl", "--judge_function", INSTRUCTIONS]
    for option, error in (("--max_tokens", "Did you mean '--policy_max_tokens'"), ("--policy_api_key", "environment")):
        with pytest.raises(SystemExit):
            cli.main([*given, option, "sk-1"])
        printed = capsys.readouterr().err
        assert error in printed
        assert "sk-1" not in printed


def test_nothing_is_scored():
    empty = summarise([{"id": "a", "score": None, "problem": "policy_error: no", "broken": None, "words": None}])
    assert (empty["mean"], empty["followed"], empty["broken"], empty["words"]) == (None,) * 4
    assert empty["problems"] == {"policy_error": 1}


def folder_of(path, scores, function="f"):
    path.mkdir()
    rows = [
        {"id": f"r{index}", "prompt": [{"role": "user", "content": f"<b>{index}</b>?"}], "answer": "It\x07 is.",
         "score": one, "problem": None, "broken": None, "words": 2, "kind": "length"}
        for index, one in enumerate(scores)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), path / "answers.parquet")
    report = {"model": path.name, "function": function, **summarise(rows)}
    (path / "score.json").write_text(json.dumps(report))
    return path


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        # A mean of 8/20, and a standard deviation of 0.681 over the root of 20, by hand.
        ([0.0] * 10 + [1.0] * 10, [1.0] * 18 + [0.0] * 2, r"after follows more .*\+40 .*\(\+10 to \+70\); .* 2 lost"),
        ([1.0] * 20, [0.0] * 15 + [None] + [1.0] * 4, r"after follows less .*-79 points.*; 0 .* 15 lost, of 19"),
        ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0], r"No difference is shown .* \+0 points .*; 1 .* gained and 1 lost, of 3"),
        ([None], [1.0], "No prompt has a score of both"),
        ([1.0], [1.0, 1.0], "different prompts or functions"),
    ],
)  # fmt: skip
def test_scores_of_the_same_prompts_are_compared_in_pairs(before, after, sentence, tmp_path):
    folders = [folder_of(tmp_path / name, scores) for name, scores in (("before", before), ("after", after))]
    assert re.search(sentence, comparison(*(read_scores(folder, folder.name) for folder in folders)))


def test_the_report_shows_scores_side_by_side(tmp_path, capsys):
    folders = [folder_of(tmp_path / "before", [0.0] * 8), folder_of(tmp_path / "after", [1.0] * 7 + [0.25])]
    cli.main(["report", *map(str, folders), "--output", str(tmp_path / "report.html")])
    page = (tmp_path / "report.html").read_text()
    text = " ".join(re.sub("<[^>]+>", " ", page).split())
    assert "before : before followed 0% of 8 scored prompts (0% to 32%); 0% of the answers are broken" in text
    assert "after : after followed 88% of 8 scored prompts (53% to 98%)" in text
    assert "after follows more than before: +88 points" in text
    assert "length 0.0% (0.0% to 32.4%) 87.5% (52.9% to 97.8%)" in text
    assert "<b>7</b>" not in page
    assert "It\ufffd is." in page  # HTML allows no such character
    assert "score 0.25" in text


def test_damaged_scores_are_named(tmp_path):
    folder = folder_of(tmp_path / "one", [1.0])
    (folder / "answers.parquet").write_text("no")
    with pytest.raises(InputError, match=r"one: scores cannot be read .*Run `apo-trl score` again"):
        write_report([str(folder)], str(tmp_path / "report.html"))
