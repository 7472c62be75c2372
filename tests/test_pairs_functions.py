"""Functions in the place of a reviser: what they get, what is cached, and every way in which one goes wrong."""

import asyncio
import json
import os
from datetime import date
from pathlib import Path

import pytest
from chat_server import ChatServer

from apo_trl.errors import InputError
from apo_trl.io.resources import DEMO_PAIRS
from apo_trl.pairs.build import build
from apo_trl.pairs.config.settings import make_settings, parse
from apo_trl.pairs.estimate import estimate
from apo_trl.pairs.functions.process import FunctionProcess, Outcome, source_of
from apo_trl.pairs.instructions import INSTRUCTIONS, revise, reward
from apo_trl.pairs.llm.batcher import Batcher
from apo_trl.pairs.llm.response_cache import open_read_only

FUNCTIONS = """
import os, signal, sys, time

def bad(prompts): return [index for index, prompt in enumerate(prompts) if prompt == "bad"]

def loop(prompts, completions, **columns):
    while bad(prompts): pass
    return completions

def raises(prompts, completions, **columns):
    if bad(prompts): raise KeyError("unit")
    return completions

def leaves(prompts, completions, **columns):
    if bad(prompts): sys.exit("enough")
    return completions

def exits(prompts, completions, **columns):
    if bad(prompts): os._exit(7)
    return completions

def crashes(prompts, completions, **columns):
    if bad(prompts): os.kill(os.getpid(), signal.SIGSEGV)
    return completions

def recurses(prompts, completions, **columns):
    return deeper() if bad(prompts) else completions

def short(prompts, completions, **columns):
    return completions[1:] if bad(prompts) else completions

def string(prompts, completions, **columns):
    return "x" * len(prompts) if bad(prompts) else completions

def nothing(prompts, completions, **columns):
    return None if bad(prompts) else completions

def nan(prompts, completions, **columns):
    return [float("nan") if prompt == "bad" else answer for prompt, answer in zip(prompts, completions)]

def nested(prompts, completions, **columns):
    return [[answer] if prompt == "bad" else answer for prompt, answer in zip(prompts, completions)]

def prints(prompts, completions, **columns):
    for _ in range(200): print("{" * 10_000); print("x" * 10_000, file=sys.stderr); os.write(1, b"0" * 10_000)
    assert sys.stdin.read() == ""
    return completions

def deeper(): return deeper()
def halves(prompts, completions): return ["\\ud800" for _ in prompts]
def cannot(prompts): return [None for _ in prompts]
def needs(prompts, missing): return prompts
def numbers(prompts): return [1, True, None, float("inf"), "2"]
"""


@pytest.fixture
def functions(tmp_path) -> str:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    return str(tmp_path / "mine.py")


def call(function: str, rows: list[dict], kind: str = "text", timeout: float = 1.0) -> list[Outcome]:
    async def run():
        process = FunctionProcess(function, kind, timeout)
        try:
            return await process.call(rows)
        finally:
            await process.close()

    return asyncio.run(run())


ROWS = [{"prompts": prompt, "completions": f"{prompt} answer"} for prompt in ("one", "bad", "three")]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("loop", "it returned nothing within 1 seconds (function_timeout)"),
        ("raises", "KeyError: 'unit' (mine.py, line 11)"),
        ("leaves", "SystemExit: enough (mine.py, line 15)"),
        ("exits", "it ended its process (exit status 7)"),
        ("crashes", "it ended its process (SIGSEGV)"),
        ("recurses", "RecursionError: maximum recursion depth exceeded (mine.py, line 49)"),
        ("short", "it returned 0 results for 1 rows"),
        ("string", "it returned str and not a list"),
        ("nothing", "it returned NoneType and not a list"),
        ("nan", "it returned nan and not a string or None"),
        ("nested", "it returned list and not a string or None"),
    ],
)
def test_a_row_on_which_a_function_fails_is_found_and_the_others_have_results(name, problem, functions):
    assert call(f"{functions}:{name}", ROWS) == [("one answer", ""), (None, problem), ("three answer", "")]


def test_columns_that_json_does_not_have_are_texts(tmp_path):
    (tmp_path / "when.py").write_text("def show(when): return when\n")
    assert call(f"{tmp_path / 'when.py'}:show", [{"prompts": "p", "when": date(2024, 1, 2)}]) == [("2024-01-02", "")]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("prints", [f"{prompt} answer" for prompt in ("one", "bad", "three")]),
        ("halves", ["\ufffd"] * 3),
        ("cannot", [None] * 3),
    ],
)
def test_output_is_discarded_and_only_the_named_columns_are_given(name, expected, functions):
    assert call(f"{functions}:{name}", ROWS, timeout=10) == [(value, "") for value in expected]


def test_a_column_that_no_row_has_is_named_and_one_that_some_lack_is_none(tmp_path, functions):
    missing = "TypeError: needs() missing 1 required positional argument: 'missing'"
    assert call(f"{functions}:needs", ROWS[:1]) == [(None, missing)]
    (tmp_path / "given.py").write_text("def given(prompts, unit): return [str(value) for value in unit]\n")
    assert call(f"{tmp_path}/given.py:given", [{**ROWS[0], "unit": 3}, ROWS[1]]) == [("3", ""), ("None", "")]


def test_a_reward_is_a_finite_number_or_none(functions):
    rows = [{"prompts": str(index)} for index in range(5)]
    problems = [f"it returned {what} and not a finite number or None" for what in ("inf", "str")]
    expected = [(1.0, ""), (1.0, ""), (None, ""), (None, problems[0]), (None, problems[1])]
    assert call(f"{functions}:numbers", rows, "number") == expected


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("mine.py:nowhere", "AttributeError: .*nowhere"),
        ("mine.py:os", "TypeError: os is not a function"),
        ("none.py:revise", "FileNotFoundError"),
        ("no_module_of_anyone:revise", "ModuleNotFoundError: .*no_module_of_anyone"),
        ("mine", "ValueError: Empty module name"),
        ("broken.py:f", r"ZeroDivisionError: division by zero \(broken.py, line 1\)"),
        ("ended.py:f", "its module ends the process"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_one_sentence(name, problem, functions, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("broken.py").write_text("1 / 0\n")
    Path("ended.py").write_text("import os; os._exit(0)\n")
    with pytest.raises(InputError, match=f"^function: '{name}' cannot be loaded.*{problem}.* Set module:function"):
        source_of(name)


def test_a_process_and_its_children_end_with_the_call(tmp_path):
    (tmp_path / "forks.py").write_text(
        "import subprocess, pathlib\n"
        "def forks(prompts):\n"
        "    child = subprocess.Popen(['sleep', '60'])\n"
        f"    pathlib.Path({str(tmp_path / 'pids')!r}).write_text(str(child.pid))\n"
        "    while True: pass\n"
    )
    ((_, problem),) = call(f"{tmp_path}/forks.py:forks", [{"prompts": "any"}])
    assert "within 1 seconds" in problem
    status = Path(f"/proc/{(tmp_path / 'pids').read_text()}/stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"


def test_a_batch_takes_what_waits_and_no_more_than_its_size():
    batches = []

    async def run(items):
        batches.append(list(items))
        return [item * 10 for item in items]

    async def ask():
        batcher = Batcher(run, 3)
        return await asyncio.gather(*map(batcher.result, range(7)))

    assert asyncio.run(ask()) == [0, 10, 20, 30, 40, 50, 60]
    assert batches == [[0, 1, 2], [3, 4, 5], [6]]


REVISER = """
def revise(prompts, completions, unit, **columns):
    with open({calls!r}, "a") as file: file.write("".join(f"{{value}}\\n" for value in unit))
    assert all(prompt[-1]["role"] == "user" for prompt in prompts) and "responses" not in columns
    assert columns["id"] and all(len(row) == 1 for row in completions)
    texts = [row[0]["content"] for row in completions]
    return [None if value == "row2" else f"{{text}} In {{value}}.{more}" for text, value in zip(texts, unit)]
"""


@pytest.fixture
def recipe(tmp_path):
    """Write prompts with answers and a reviser; `called()` returns the units that it was called with since."""
    calls = tmp_path / "calls"
    rows = [
        {"id": f"row{i}", "prompt": f"What is {i}?", "responses": [f"It is {i}."], "unit": f"row{i}"} for i in range(5)
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def write(code: str = REVISER, more: str = "", **keys):
        (tmp_path / "mine.py").write_text(code.format(calls=str(calls), more=more))
        values = {"method": "clair", "prompts": str(tmp_path / "prompts.jsonl"), "output_dir": str(tmp_path / "out")}
        return make_settings(values | {"reviser_function": f"{tmp_path}/mine.py:revise"} | keys)

    def called() -> list[str]:
        units = calls.read_text().split() if calls.exists() else []
        calls.unlink(missing_ok=True)
        return sorted(units)

    write.called = called
    return write


def chosen(folder: Path) -> dict[str, str]:
    rows = map(json.loads, (folder / "pairs.jsonl").read_text().splitlines())
    return {row["id"]: row["chosen"][0]["content"] for row in rows}


def test_a_function_revises_and_is_called_again_only_when_its_file_has_changed(recipe, tmp_path):
    everything = [f"row{i}" for i in range(5)]
    for more, expected in (("", everything), ("", []), (" Yes.", everything), ("", [])):
        result = build(recipe(more=more))
        assert recipe.called() == expected
        assert chosen(result.folder) == {f"row{i}": f"It is {i}. In row{i}.{more}" for i in (0, 1, 3, 4)}
    assert result.report["dropped"] == {"no_revision": 1}
    assert (result.report["complete"], result.report["roles"]) == (True, {})
    source = source_of(f"{tmp_path}/mine.py:revise")
    assert result.report["functions"] == {"reviser": {"function": "mine.py:revise", "source": source, "results": 10}}
    card = (result.folder / "README.md").read_text()
    assert source in card
    assert str(tmp_path) not in card


def test_a_changed_column_is_a_new_call(recipe, tmp_path):
    build(recipe())
    recipe.called()
    path = tmp_path / "prompts.jsonl"
    path.write_text(path.read_text().replace('"unit": "row3"', '"unit": "cm"'))
    assert chosen(build(recipe()).folder)["row3"] == "It is 3. In cm."
    assert recipe.called() == ["cm"]


def test_rows_on_which_it_fails_are_dropped_by_name_and_called_again_once_it_is_corrected(recipe):
    broken = REVISER.replace("    return", "    import os\n    if 'row3' in unit: os._exit(1)\n    return")
    report = build(recipe(broken)).report
    assert report["dropped"] == {"no_revision": 1, "reviser_failed": 1}
    assert report["examples"]["reviser_failed"] == [{"id": "row3", "detail": "it ended its process (exit status 1)"}]
    assert (report["asked"], report["kept"]) == (5, 3)
    recipe.called()
    assert build(recipe(broken)).report["kept"] == 3
    assert recipe.called() == ["row3"]  # results are cached, failures are not
    assert build(recipe()).report["kept"] == 4


def test_a_killed_run_loses_no_result(recipe, tmp_path):
    code = REVISER.replace("    return", "    if 'row4' in unit: raise SystemError('stop')\n    return")
    build(recipe(code, reviser_batch_size=1))
    assert recipe.called() == [f"row{i}" for i in range(5)]
    with open_read_only(tmp_path / "out") as store:
        assert store.results("reviser") == 4
    build(recipe(code, reviser_batch_size=1, max_requests=0))
    assert recipe.called() == ["row4"]


def test_a_dry_run_calls_no_function_and_sends_nothing_for_it(recipe, tmp_path):
    rows = [{"id": "own", "prompt": "Own?", "responses": ["Mine."]}, {"id": "asked", "prompt": "Asked?"}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = recipe(policy_model="p", policy_base_url="http://127.0.0.1:9/v1")
    with open_read_only(settings.folder) as store:
        counts = estimate(settings, store)
    assert {role: use["requests"] for role, use in counts.items()} == {"policy": 1}
    assert recipe.called() == []


def test_the_policys_answers_are_revised_in_the_same_run(recipe, tmp_path):
    rows = [{"id": f"row{i}", "prompt": f"What is {i}?", "unit": f"row{i}"} for i in range(5)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with ChatServer(lambda body: "It is so.") as server:
        result = build(recipe(policy_model="p", policy_base_url=server.url))
    assert set(chosen(result.folder).values()) == {f"It is so. In row{i}." for i in (0, 1, 3, 4)}
    assert list(result.report["roles"]) == ["policy"]


@pytest.mark.parametrize("other", ["reviser_model", "reviser_base_url", "reviser_template"])
def test_a_function_beside_a_model_is_a_conflict(other, recipe):
    with pytest.raises(InputError, match=f"^reviser_function: conflict with {other}.*Unset one"):
        recipe(**{other: "http://127.0.0.1:9/v1"})


def test_a_reviser_of_the_command_line_replaces_the_recipes(tmp_path):
    assert parse("pairs/clair_local", {}).reviser.function == "apo_trl.pairs.instructions:revise"
    server = {"reviser_base_url": "http://127.0.0.1:9/v1", "reviser_model": "m"}
    reviser = parse("pairs/clair_local", server).reviser
    assert (reviser.function, reviser.model, reviser.base_url) == (None, *reversed(server.values()))
    reviser = parse("pairs/clair", {"reviser_function": "a:b"}, environment=False).reviser
    assert (reviser.function, reviser.model, reviser.base_url) == ("a:b", None, None)


@pytest.mark.parametrize(
    ("kind", "argument", "answer", "revision"),
    [
        ("lowercase", None, "Rain is Water.", "rain is water."),
        ("lowercase", None, "rain is water.", None),
        ("max_words", "6", "Rain is only water. It falls down from clouds.", "Rain is only water."),
        ("max_words", "6", "Rain is only water, which falls down from clouds.", "Rain is only water."),
        ("max_words", "6", "Rain is only water.", None),
        ("max_words", "3", "Rain is only water and it falls.", None),  # no short form without rewriting
        ("starts_with", "In short:", "Rain is water.", "In short: Rain is water."),
        ("starts_with", "In short:", "In short, rain is water.", "In short: rain is water."),
        ("starts_with", "In short:", "In short: water.", None),
        ("ends_with", "DONE", "Rain is water.", "Rain is water. DONE"),
        ("ends_with", "DONE", "Rain is water. Done!", "Rain is water. DONE"),
        ("ends_with", "DONE", "Rain is water. DONE.", None),
    ],
)
def test_the_packaged_reviser_changes_as_little_as_the_instruction_needs(kind, argument, answer, revision):
    for completion in (answer, [{"role": "assistant", "content": answer}]):  # TRL's two formats
        assert revise(completions=[completion], kind=[kind], argument=[argument], prompts=["?"]) == [revision]
    if revision:
        assert reward(completions=[answer, revision], kind=[kind] * 2, argument=[argument] * 2) == [0.0, 1.0]


def test_the_packaged_prompts_are_whole_and_no_topic_is_in_both_parts():
    topics = {}
    for name, count in (("train", 480), ("test", 160)):
        lines = (DEMO_PAIRS.parent / "instructions" / f"{name}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert len({row["id"] for row in rows}) == len({row["prompt"] for row in rows}) == count
        assert {row["kind"] for row in rows} == set(INSTRUCTIONS)
        topics[name] = {row["id"].split("-")[0] for row in rows}
    assert not topics["train"] & topics["test"]


def test_an_orphan_ends_by_itself(tmp_path):
    """The system ends a process whose run was killed, at most 10 seconds after the time limit."""
    (tmp_path / "mine.py").write_text(
        "import signal\ndef left(prompts): return [str(signal.alarm(0)) for _ in prompts]\n"
    )
    ((seconds, _),) = call(f"{tmp_path}/mine.py:left", [{"prompts": "any"}], timeout=3)
    assert 10 <= int(seconds) <= 13
    assert os.getpgid(0) != 0
