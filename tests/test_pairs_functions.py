"""Functions in the place of a reviser: what they get, what is cached, and every way in which one goes wrong."""

import asyncio
import contextlib
import json
import os
import time
from datetime import date
from pathlib import Path

import pytest
from chat_server import ChatServer

from apo_trl.cli import main as cli
from apo_trl.errors import InputError
from apo_trl.io.resources import DEMO_PAIRS
from apo_trl.pairs.build import build
from apo_trl.pairs.config.settings import make_settings, parse
from apo_trl.pairs.estimate import estimate
from apo_trl.pairs.functions import process
from apo_trl.pairs.functions.process import FunctionProcess, Outcome, source_of
from apo_trl.pairs.instructions import INSTRUCTIONS, revise, reward
from apo_trl.pairs.llm.batcher import Batcher
from apo_trl.pairs.llm.response_cache import open_read_only
from apo_trl.pairs.prompts import columns_of

FUNCTIONS = """
import ctypes, os, signal, sys, time

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
    if bad(prompts): ctypes.string_at(0)
    return completions

def stubborn(prompts, completions, **columns):
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM): signal.signal(name, signal.SIG_IGN)
    while bad(prompts):
        try: time.sleep(1)
        except BaseException: pass
    return completions

def killed(prompts, completions, **columns):
    if bad(prompts): os.kill(os.getpid(), signal.SIGKILL)
    return completions

def scribbles(prompts, completions, **columns):
    for file in range(3, 20) if bad(prompts) else ():
        try: os.write(file, (4).to_bytes(8) + b"junk")
        except OSError: pass
    return completions

def forks(prompts, completions, **columns):
    if os.fork() == 0:
        os.setsid()  # it outlives the process group
        time.sleep(20)
        os._exit(0)
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
def numbers(prompts): return [1, True, None, float("inf"), "2", 10**400]
async def later(prompts): return [0.5 for _ in prompts]
def scalars(prompts):
    import numpy
    return [numpy.float32(0.5), numpy.bool_(True), None]
"""


@pytest.fixture
def functions(tmp_path) -> str:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    return str(tmp_path / "mine.py")


def call(function: str, rows: list[dict], kind: str = "text", timeout: float = 1.0, columns=()) -> list[Outcome]:
    async def run():
        called = FunctionProcess(function, kind, timeout, columns)
        try:
            return await called.call(rows)
        finally:
            await called.close()

    return asyncio.run(run())


ROWS = [{"prompts": prompt, "completions": f"{prompt} answer"} for prompt in ("one", "bad", "three")]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("loop", "it returned nothing within 1 seconds (function_timeout)"),
        ("stubborn", "it returned nothing within 1 seconds (function_timeout)"),
        ("raises", "KeyError: 'unit' (mine.py, line 11)"),
        ("leaves", "SystemExit: enough (mine.py, line 15)"),
        ("exits", "it ended its process (exit status 7)"),
        ("crashes", "it ended its process (SIGSEGV)"),
        ("killed", "it ended its process"),
        ("scribbles", "it ended its process"),
        ("recurses", "RecursionError: maximum recursion depth exceeded (mine.py, line 73)"),
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
        ("forks", [f"{prompt} answer" for prompt in ("one", "bad", "three")]),
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
    assert call(f"{tmp_path}/given.py:given", [ROWS[1]], columns={"unit"}) == [("None", "")]


def test_a_reward_is_a_finite_number_or_none(functions):
    rows = [{"prompts": str(index)} for index in range(6)]
    problems = [(None, f"it returned {what} and not a finite number or None") for what in ("inf", "str", "int")]
    assert call(f"{functions}:numbers", rows, "number") == [(1.0, ""), (1.0, ""), (None, ""), *problems]


def test_a_reward_may_be_what_trl_takes_too(functions):
    rows = [{"prompts": str(index)} for index in range(3)]
    assert call(f"{functions}:later", rows, "number", 10) == [(0.5, "")] * 3
    assert call(f"{functions}:scalars", rows, "number", 10) == [(0.5, ""), (1.0, ""), (None, "")]


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
    deadline = time.monotonic() + 10  # on a busy machine the killed process may end a little later
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while status.read_text().split()[2] != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.01)


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


def test_a_module_that_loads_for_too_long_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "_LOADING", 1.0)
    (tmp_path / "slow.py").write_text("import time; time.sleep(30)\ndef judge(prompts): return prompts\n")
    with pytest.raises(InputError, match=r"^function: .* its module takes more than 1 seconds.* Set module:function"):
        source_of(f"{tmp_path}/slow.py:judge")


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


@pytest.mark.parametrize("name", ["judging", "other-name"])
def test_the_version_of_an_installed_function_is_part_of_its_source(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where modules and distributions are found, as in site-packages
    for path in (Path("judging"), info := Path(f"{name.replace('-', '_')}-1.0.dist-info")):
        path.mkdir()
    Path("judging/__init__.py").write_text("from judging.rewards import judge\n")
    Path("judging/rewards.py").write_text("def judge(prompts): return [1.0 for _ in prompts]\n")
    if name != "judging":  # of an editable install only the name is known
        (info / "top_level.txt").write_text("judging\n")
    sources = []
    for version in ("1.0", "1.0", "1.1"):
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        process.load_function.cache_clear()
        sources.append(source_of("judging:judge"))
    assert sources[0] == sources[1] != sources[2]


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
    own = {"id": "own", "prompt": "Own?", "responses": ["Mine."], "unit": "m"}
    rows = [own, {"id": "asked", "prompt": "Asked?"}]
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
        ("max_sentences", "1", "Rain is only water. It falls.", "Rain is only water."),
        ("max_sentences", "2", "Rain is water. It falls! Often.", "Rain is water. It falls!"),
        ("max_sentences", "1", "Dr. Ito says that rain is water. It falls.", None),  # the first stop ends no sentence
        ("max_sentences", "1", "Rain is only water.", None),
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


# ----- judges


JUDGE = """
import ctypes, os, signal
def judge(prompts, completions, points, **columns):
    with open({calls!r}, "a") as file: file.write("".join(f"{{row}}\\n" for row in columns["id"]))
    assert all(prompt[-1]["role"] == "user" for prompt in prompts) and "responses" not in columns
    texts = [row[0]["content"] for row in completions]
    return [done(text) if point is None else point.get(text) for text, point in zip(texts, points)]
def done(text):
    if text == "raise": raise KeyError("unit")
    if text == "exit": os._exit(7)
    if text == "kill": os.kill(os.getpid(), signal.SIGKILL)
    if text == "crash": ctypes.string_at(0)
    while text == "loop": pass
    return {{"nan": float("nan"), "type": "5"}}.get(text, 1.0)
{more}
"""


def row(name, *scores, **more):
    """A row whose answers "0", "1", ... have these scores."""
    points = {str(index): score for index, score in enumerate(scores)}
    return {"id": name, "prompt": f"What is {name}?", "responses": list(points), "points": points} | more


def wrong(name):
    return row(name) | {"responses": ["fine", name], "points": None}


@pytest.fixture
def judge(tmp_path):
    """Return a function that writes prompts and a judge, and returns their settings; `called()` as in `recipe`."""
    calls = tmp_path / "calls"

    def write(rows, code: str = JUDGE, more: str = "", **keys):
        (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (tmp_path / "mine.py").write_text(code.format(calls=str(calls), more=more))
        values = {"method": "on_policy_judge", "prompts": str(tmp_path / "prompts.jsonl")}
        values |= {"output_dir": str(tmp_path / "out"), "function_timeout": 1}
        return make_settings(values | {"judge_function": f"{tmp_path}/mine.py:judge"} | keys)

    def called() -> list[str]:
        names = calls.read_text().split() if calls.exists() else []
        calls.unlink(missing_ok=True)
        return sorted(names)

    write.called = called
    return write


SCORED = [
    row("best", 1, 3, 2),
    row("equal", 1, 1),
    row("none", None, 1),
    row("some", 0.5, None, 0.75),
    row("below", -1, 0),
]


@pytest.mark.parametrize("method", ["on_policy_judge", "off_policy_judge"])
def test_a_function_judges_and_is_called_again_only_when_its_file_has_changed(judge, method):
    names = [
        name
        for name, count in (("best", 3), ("equal", 2), ("none", 2), ("some", 3), ("below", 2))
        for _ in range(count)
    ]
    for more, expected in (("", names), ("", []), ("# changed", names)):
        result = build(judge(SCORED, more=more, method=method))
        assert judge.called() == sorted(expected)
        pairs = list(map(json.loads, (result.folder / "pairs.jsonl").read_text().splitlines()))
        found = [
            (pair["id"], pair["chosen"][0]["content"], pair["rejected"][0]["content"], pair["margin"]) for pair in pairs
        ]
        assert found == [("best", "1", "0", 2), ("some", "2", "0", 0.25), ("below", "1", "0", 1)]
    assert pairs[0]["judge_model"] == "mine.py:judge"
    assert result.report["dropped"] == {"tie": 1, "judge_invalid": 1}
    assert result.report["judge"] == {"scores": 10, "invalid": 2}
    assert (result.report["functions"]["judge"]["results"], result.report["roles"]) == (24, {})
    assert build(judge(SCORED, method=method, judge_margin=1)).report["dropped"] == {"tie": 2, "judge_invalid": 1}


def test_the_best_answer_by_a_function_is_revised_by_another(judge, tmp_path):
    (tmp_path / "reviser.py").write_text(
        "def revise(completions, points): return [row[0]['content'] + ' and more' for row in completions]\n"
    )
    settings = judge(SCORED[:1], method="judge_then_clair", reviser_function=f"{tmp_path}/reviser.py:revise")
    result = build(settings)
    assert chosen(result.folder) == {"best": "1 and more"}
    assert list(result.report["functions"]) == ["judge", "reviser"]


BAD = {
    "raise": "KeyError: 'unit'", "exit": "exit status 7", "kill": "it ended its process", "crash": "SIGSEGV",
    "loop": "within 1 seconds", "nan": "it returned nan", "type": "it returned str",
}  # fmt: skip


def test_whatever_a_judge_does_no_row_is_lost(judge, capsys):
    rows = [each for name in BAD for each in (row(f"good-{name}", 0, 1), wrong(name))]
    for called in (28, 14):  # results are cached, failures are not
        result = build(judge(rows))
        report, names = result.report, judge.called()
        assert set(names) == {each["id"] for each in rows if called == 28 or each["id"] in BAD}
        assert (report["asked"], report["kept"], report["dropped"]) == (14, 7, {"judge_failed": 7})
        assert list(chosen(result.folder)) == [f"good-{name}" for name in BAD]
    cli.main(["pairs", "show", str(result.folder), "--reason", "judge_failed", "--limit", "9"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "judge_failed" in line]
    assert len(lines) == 7
    for line, (name, words) in zip(lines, BAD.items(), strict=True):
        assert line.startswith(f"{name}: judge_failed: ")
        assert words in line
    assert "| judge_failed | 7 |" in (result.folder / "README.md").read_text()


def test_a_judge_that_always_fails_stops_the_run(judge):
    failing = wrong("raise") | {"responses": ["raise", "type"]}
    rows = [failing | {"id": f"r{i}", "prompt": f"What is {i}?"} for i in range(40)]
    result = build(judge(rows, max_failures=8))
    assert result.stopped.startswith("judge_function: the replies to the first 8 rows were all dropped as judge_failed")
    assert "KeyError: 'unit'" in result.stopped
    assert "Correct judge_function (now mine.py:judge)" in result.stopped
    assert result.report["dropped"].keys() <= {"judge_failed", "not_asked"}
    assert sum(result.report["dropped"].values()) == result.report["asked"] == 40


def test_a_column_that_no_prompt_has_is_named_before_any_request(judge, tmp_path):
    rows = [{"id": f"row{i}", "prompt": f"What is {i}?", "unit": "m"} for i in range(3)]
    with ChatServer(lambda body: "It is so.") as server:
        settings = judge(rows, policy_model="p", policy_base_url=server.url)
        with pytest.raises(
            InputError, match=r"^judge_function: mine.py:judge needs the column 'points', .*got id, unit"
        ):
            build(settings)
        with open_read_only(settings.folder) as store, pytest.raises(InputError, match="needs the column 'points'"):
            estimate(settings, store)
        with pytest.raises(InputError, match=r"^judge_function: .* cannot be loaded: AttributeError"):
            build(judge(rows, judge_function=f"{tmp_path}/mine.py:nowhere"))
        assert server.count == 0


def test_columns_with_the_names_of_trls_arguments_are_left_out():
    names = ("prompt", "prompts", "completion", "completions", "completion_ids", "trainer_state", "log_metric")
    assert columns_of(dict.fromkeys(names, 1) | {"id": "a", "kind": None}) == {"id": "a", "kind": None}


def test_a_dry_run_calls_no_judge_and_counts_what_follows_it(judge):
    server = {"reviser_model": "r", "reviser_base_url": "http://127.0.0.1:9/v1"}
    settings = judge(SCORED, method="judge_then_clair", **server)
    with open_read_only(settings.folder) as store:
        assert {role: use["requests"] for role, use in estimate(settings, store).items()} == {"reviser": 5}
    assert judge.called() == []


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"judge_model": "m"}, "judge_function: conflict with judge_model"),
        ({"judge_base_url": "http://127.0.0.1:9/v1"}, "judge_function: conflict with judge_base_url"),
        ({"judge_protocol": "pairwise"}, "judge_function: requires judge_protocol function, got pairwise"),
        ({"judge_function": None, "judge_protocol": "function", "judge_model": "m"}, "judge_function: requires"),
        ({"judge_function": None}, "judge_model: required by on_policy_judge.* or set judge_function"),
    ],
)
def test_contradictions_of_a_judge_name_both_fields(keys, words, judge):
    with pytest.raises(InputError, match=f"^{words}"):
        judge(SCORED, **keys)


def test_a_judge_of_the_command_line_replaces_the_recipes():
    settings = parse("pairs/judge_then_clair", {"judge_function": "a:b"}, environment=False)
    assert (settings.judge_protocol, settings.judge.function, settings.judge.model) == ("function", "a:b", None)
    settings = parse("pairs/on_policy_judge_local", {})
    assert (settings.judge_protocol, settings.judge_margin) == ("function", 0)
    settings = parse("pairs/on_policy_judge_local", {"judge_model": "m"})
    assert (settings.judge_protocol, settings.judge.function, settings.judge_margin) == ("pairwise", None, 1)


def test_anchor_and_compare_take_a_function(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "def judge(prompts, completions, unit):\n"
        "    assert unit[0] == 'm'\n"
        "    return [float(row[0]['content'].split()[-1]) for row in completions]\n"
    )
    judge = ["--judge_function", f"{tmp_path}/mine.py:judge", "--output_dir", str(tmp_path / "out")]
    rows = [
        {"prompt": f"{i}?", "chosen": f"{i} 3", "rejected": f"{i} 1", "own": f"{i} 2", "unit": "m"} for i in range(24)
    ]
    rows[5]["chosen"] = "nothing"
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with ChatServer(lambda body: "quality 1" if body["model"] == "b" else "quality 2") as server:
        policy = ["--policy", "p", "--policy_base_url", server.url, "--policy_response", "own"]
        cli.main(["anchor", "--dataset", str(tmp_path / "data.jsonl"), *policy, *judge])
        assert server.count == 0
        report = json.loads((tmp_path / "out" / "anchor.json").read_text())
        assert (report["chosen"]["wins"], report["rejected"]["losses"], report["dropped"]) == (
            23,
            23,
            {"judge_failed": 1},
        )
        assert report["suggestion"] == "apo_zero"
        assert report["functions"]["judge"]["function"] == "mine.py:judge"
        (tmp_path / "prompts.jsonl").write_text('{"prompt": "One?", "unit": "m"}\n{"prompt": "Two?", "unit": "m"}\n')
        models = [part for name in "ab" for part in (f"--{name}", name, f"--{name}_base_url", server.url)]
        cli.main(["compare", *models, "--prompts", str(tmp_path / "prompts.jsonl"), *judge])
    report = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert (report["asked"], report["a_wins"]) == (2, 2)
    assert "A's win rate      100.0%" in capsys.readouterr().out


def test_trls_rloo_takes_the_same_function(model_dir, tmp_path):
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer

    prompts = [{"prompt": [{"role": "user", "content": "Hi"}], "kind": "lowercase", "argument": None}] * 2
    settings = RLOOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=2, num_generations=2, max_completion_length=4,
        max_steps=1, use_cpu=True, bf16=False, report_to=[], logging_steps=1, save_strategy="no",
    )  # fmt: skip
    trainer = RLOOTrainer(str(model_dir), reward_funcs=reward, args=settings, train_dataset=Dataset.from_list(prompts))
    trainer.train()
    assert any("rewards/reward/mean" in line for line in trainer.state.log_history)
