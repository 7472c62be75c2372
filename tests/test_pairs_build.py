"""Whole runs of `apo-trl pairs build` against a scripted server: every method, every fault, interruption, money."""

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from chat_server import ChatServer

from apo_trl.errors import InputError
from apo_trl.pairs.build import build
from apo_trl.pairs.config.settings import make_settings

KEY = "sk-test-0123456789abcdef"


def answer(body: dict) -> str:
    """A model for all roles: it samples, revises, compares and scores by what it is asked."""
    texts = [message["content"] for message in body["messages"]]
    last = texts[-1]
    if "<revision>" in last:
        original = last.split("<answer>\n")[1].split("\n</answer>")[0]
        return f"<reasoning>\nclearer\n</reasoning>\n<revision>\n{original} It is also clearer.\n</revision>"
    if "[[A]]" in last:
        first, second = (last.split(f"<answer_{side}>\n")[1].split(f"\n</answer_{side}>")[0] for side in "ab")
        return f"The longer is better. [[{'A' if len(first) > len(second) else 'B'}]]"
    if "[[7]]" in last:
        return f"It has its points. [[{min(10, len(last.split('<answer>')[1]) % 10 + 1)}]]"
    # As many answers as samples: the seed is not honoured by the server, so they are told apart by their number.
    answer.samples[last] += 1
    return f"An answer to '{last}'" + " indeed" * (answer.samples[last] - 1) + "."


answer.samples = Counter()


@pytest.fixture(autouse=True)
def _fresh():
    answer.samples.clear()


@pytest.fixture
def prompts(tmp_path):
    def write(rows: list, name: str = "prompts.jsonl") -> str:
        path = tmp_path / name
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    return write


def numbered(count: int) -> list[dict]:
    return [{"id": f"row{i}", "prompt": f"What is {i} + {i}?"} for i in range(count)]


def recipe(server, source: str, folder: Path, **more) -> dict:
    """A recipe in which one server plays all the roles that the method needs."""
    method = more.get("method", "clair")
    roles = {
        "clair": ["policy", "reviser"],
        "on_policy_judge": ["policy", "judge"],
        "off_policy_judge": ["policy", "judge"],
        "stronger_preferred": ["policy", "stronger"],
        "judge_then_clair": ["policy", "judge", "reviser"],
    }[method]
    keys = {"method": method, "prompts": source, "output_dir": str(folder), "concurrency": 16}
    for role in roles:
        keys |= {f"{role}_base_url": server.url, f"{role}_model": f"{role}-model", f"{role}_max_retries": 2}
    return keys | more


def run(server, source, folder, **more):
    return build(make_settings(recipe(server, source, folder, **more)))


def pairs(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]


def text(side: list[dict]) -> str:
    (message,) = side
    assert message["role"] == "assistant"
    return message["content"]


def test_clair_pairs_are_the_policys_answer_and_its_revision(prompts, tmp_path):
    with ChatServer(answer) as server:
        report = run(server, prompts(numbered(20)), tmp_path / "out").report
    rows = pairs(tmp_path / "out")
    assert (report["asked"], report["kept"], report["dropped"], report["complete"]) == (20, 20, {}, True)
    assert [row["id"] for row in rows] == [f"row{i}" for i in range(20)]
    for i, row in enumerate(rows):
        assert row["prompt"] == [{"role": "user", "content": f"What is {i} + {i}?"}]
        assert text(row["rejected"]) == f"An answer to 'What is {i} + {i}?'."
        assert text(row["chosen"]) == text(row["rejected"]) + " It is also clearer."
        assert row["rationale"] == "clearer"
        assert (row["chosen_model"], row["rejected_model"]) == ("reviser-model", "policy-model")
    # 20 rows, each asked of both, and a probe of two requests for each of the two models.
    assert server.count == 44
    assert {role: used["requests"] for role, used in report["roles"].items()} == {"policy": 22, "reviser": 22}


def test_a_judge_ranks_the_policys_own_answers_in_both_orders(prompts, tmp_path):
    with ChatServer(answer) as server:
        report = run(server, prompts(numbered(6)), tmp_path / "out", method="on_policy_judge", num_responses=3).report
        requests = Counter(body["model"] for body in server.bodies)
    assert (report["kept"], report["dropped"]) == (6, {})
    for row in pairs(tmp_path / "out"):
        # The longest of three answers is the best, the shortest the worst.
        assert text(row["chosen"]).count("indeed") == 2
        assert text(row["rejected"]).count("indeed") == 0
        assert (row["judge_model"], row["margin"]) == ("judge-model", 4.0)
    assert report["judge"] == {
        "comparisons": 18, "invalid": 0, "orders_agree": 1.0, "first_position_rate": 0.5, "ties": 0.0
    }  # fmt: skip
    assert requests == {"policy-model": 2 + 6 * 3, "judge-model": 2 + 6 * 3 * 2}


@pytest.mark.parametrize(
    ("forward", "backward", "reason"),
    [("A", "A", "disagreement"), ("B", "B", "disagreement"), ("C", "C", "tie"), ("C", "A", "disagreement"),
     ("none", "A", "judge_invalid"), ("A", "none", "judge_invalid"), ("A", "B", None), ("B", "A", None)],
)  # fmt: skip
def test_a_win_counts_only_if_both_orders_agree(prompts, tmp_path, forward, backward, reason):
    def judge(body):
        last = body["messages"][1]["content"] if len(body["messages"]) > 1 else ""
        if "<answer_a>" not in last:
            return "..."
        verdict = forward if "<answer_a>\nfirst" in last else backward
        return f"Because. [[{verdict}]]"

    row = {"id": "x", "prompt": "Which?", "responses": ["first", "second"]}
    with ChatServer(judge) as server:
        report = run(server, prompts([row]), tmp_path / "out", method="on_policy_judge").report
    assert report["dropped"] == ({reason: 1} if reason else {})
    if not reason:
        (pair,) = pairs(tmp_path / "out")
        assert (text(pair["chosen"]), text(pair["rejected"])) == (
            ("first", "second") if (forward, backward) == ("A", "B") else ("second", "first")
        )


def test_scores_need_a_margin(prompts, tmp_path):
    scores = {"good": "8", "fair": "7.5", "bad": "2", "odd": "eleven"}

    def judge(body):
        last = body["messages"][1]["content"] if len(body["messages"]) > 1 else ""
        return (
            f"So so. [[{next((score for name, score in scores.items() if f'<answer>{chr(10)}{name}' in last), '1')}]]"
        )

    rows = [
        {"id": "clear", "prompt": "1?", "responses": ["good", "bad", "fair"]},
        {"id": "close", "prompt": "2?", "responses": ["fair", "good"]},
        {"id": "odd", "prompt": "3?", "responses": ["good", "odd"]},
    ]
    with ChatServer(judge) as server:
        report = run(
            server, prompts(rows), tmp_path / "out", method="on_policy_judge", judge_protocol="pointwise"
        ).report
    (pair,) = pairs(tmp_path / "out")
    assert (pair["id"], text(pair["chosen"]), text(pair["rejected"]), pair["margin"]) == ("clear", "good", "bad", 6.0)
    assert report["dropped"] == {"tie": 1, "judge_invalid": 1}
    assert report["judge"] == {"scores": 6, "invalid": 1}


def test_other_models_answer_in_turn(prompts, tmp_path):
    with ChatServer(lambda body: f"I am {body['model']}") as one, ChatServer(answer) as other:
        more = {"policy_base_url": [one.url, one.url], "policy_model": ["a", "bb"], "judge_base_url": other.url}
        report = run(one, prompts(numbered(3)), tmp_path / "out", method="off_policy_judge", **more).report
    assert report["kept"] == 3
    for row in pairs(tmp_path / "out"):
        assert (row["chosen_model"], row["rejected_model"]) == ("bb", "a")
        assert (text(row["chosen"]), text(row["rejected"])) == ("I am bb", "I am a")


def test_the_stronger_models_answer_is_preferred(prompts, tmp_path):
    with ChatServer(lambda body: f"{body['model']} says so") as server:
        report = run(server, prompts(numbered(3)), tmp_path / "out", method="stronger_preferred").report
    assert report["kept"] == 3
    assert {(text(row["chosen"]), text(row["rejected"])) for row in pairs(tmp_path / "out")} == {
        ("stronger-model says so", "policy-model says so")
    }


@pytest.mark.parametrize("refusal", [{"content": "", "refusal": "No."}, {"content": "I can't help with that."}])
def test_a_refusal_is_no_stronger_answer(prompts, tmp_path, refusal):
    with ChatServer(lambda body: refusal if body["model"] == "stronger-model" else "Fine.") as server:
        report = run(server, prompts(numbered(2)), tmp_path / "out", method="stronger_preferred").report
    assert report["dropped"] == {"stronger_refused": 2}


def test_the_best_is_revised_and_the_worst_rejected(prompts, tmp_path):
    with ChatServer(answer) as server:
        report = run(server, prompts(numbered(3)), tmp_path / "out", method="judge_then_clair", num_responses=3).report
    assert report["kept"] == 3
    for row in pairs(tmp_path / "out"):
        assert text(row["chosen"]).endswith("indeed indeed. It is also clearer.")
        assert text(row["rejected"]).count("indeed") == 0


def test_given_answers_and_whole_conversations_are_not_sampled_again(prompts, tmp_path):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "How are you?"},
    ]
    rows = [
        {"id": 1, "prompt": turns, "response": "Fine."},
        {"id": 2, "messages": [*turns, {"role": "assistant", "content": "Well."}]},
    ]
    with ChatServer(answer) as server:
        report = run(server, prompts(rows), tmp_path / "out").report
        asked = [body["messages"] for body in server.bodies[2:]]
    assert report["kept"] == 2
    assert {body["model"] for body in server.bodies} == {"reviser-model"}
    assert all("Be brief." in messages[1]["content"] and "Hi!" in messages[1]["content"] for messages in asked)
    assert [row["prompt"] for row in pairs(tmp_path / "out")] == [turns, turns]
    assert [text(row["rejected"]) for row in pairs(tmp_path / "out")] == ["Fine.", "Well."]


FAULTS = [
    "429",
    "429_retry_after",
    "500",
    "503",
    "drop",
    "cut",
    "bad_json",
    "not_chat",
    "pending",
    "empty_choices",
    "html",
]
FAULTS += ["401"]


@pytest.mark.slow
def test_with_a_fifth_of_all_requests_failing_no_row_is_lost_shifted_or_counted_twice(prompts, tmp_path):
    rows = numbered(1000)
    random.Random(0).shuffle(rows)
    latency = lambda body: 0.02 * (hash(str(body["messages"])) % 5)  # noqa: E731  (replies out of order)
    with ChatServer(answer, faults=FAULTS, fault_share=0.2, seed=1, latency=latency) as server:
        source, folder = prompts(rows), tmp_path / "out"
        report = run(server, source, folder, concurrency=64, policy_max_retries=5, reviser_max_retries=5).report
        assert set(server.faulted) == set(FAULTS)
        check(rows, folder, report)
        # A 401 is not tried again: about 0.2 / 11 of the requests fail for good, and only those are repeated.
        failed = report["asked"] - report["kept"]
        assert 10 < failed < 80
        assert set(report["dropped"]) == {"policy_error", "reviser_error"}
        before = server.count
        for _ in range(5):
            report = run(server, source, folder, concurrency=64).report
            check(rows, folder, report)
        assert report["kept"] == 1000
        assert server.count - before < 4 * failed
        before = server.count
        run(server, source, folder)
        assert server.count == before, "a finished recipe asked again"


def check(rows, folder, report):
    """Every row is kept or dropped, once, in the order of the prompts, with its own answers."""
    assert report["asked"] == len(rows) == report["kept"] + sum(report["dropped"].values())
    found = pairs(folder)
    assert len(found) == report["kept"]
    places = {row["id"]: at for at, row in enumerate(rows)}
    order = [places[row["id"]] for row in found]
    assert order == sorted(set(order))
    for row in found:
        asked = rows[places[row["id"]]]["prompt"]
        assert row["prompt"][0]["content"] == asked
        assert asked in text(row["rejected"])
        assert text(row["chosen"]) == text(row["rejected"]) + " It is also clearer."


def cli(keys: dict, *more: str) -> list[str]:
    path = Path(keys["output_dir"]).with_suffix(".yaml")
    path.write_text(json.dumps(keys), encoding="utf-8")  # JSON is YAML
    return [sys.executable, "-m", "apo_trl.cli.main", "pairs", "build", str(path), *more]


@pytest.mark.slow
def test_killed_five_times_it_ends_as_an_unbroken_run_and_pays_once(prompts, tmp_path):
    source = prompts(numbered(800))
    with ChatServer(answer, latency=0.02) as server:
        run(server, source, tmp_path / "whole")
        unbroken = server.count
    # The text of a sample must not depend on how often it was asked for.
    answer.samples.clear()

    def steady(body):
        answer.samples.clear()
        return answer(body)

    with ChatServer(steady, latency=0.02) as server:
        command = cli(recipe(server, source, tmp_path / "killed"))
        chance = random.Random(7)
        kills = 0
        while True:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            if kills < 5:
                aim = server.count + chance.randint(1, unbroken // 12)
                while process.poll() is None and server.count < aim:
                    time.sleep(0.002)
                process.send_signal(signal.SIGKILL)
                process.communicate()
                kills += process.returncode == -signal.SIGKILL
                assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
            else:
                _, errors = process.communicate(timeout=300)
                assert process.returncode == 0, errors
                break
        extra = server.count - unbroken
    assert (tmp_path / "killed/pairs.jsonl").read_bytes() == (tmp_path / "whole/pairs.jsonl").read_bytes()
    # 2 % more at most, and what was in flight at each of five kills: 16 at once.
    assert extra <= 0.02 * unbroken + 5 * 16, extra


@pytest.mark.slow
def test_64_at_once_come_near_the_ideal_rate_in_little_memory():
    sys.path.insert(0, "docs")
    from measure_pairs import measure

    measured = measure(rows=2000, concurrency=64, latency=0.05)
    # 0.85 on a machine with nothing else to do; here two tests run at once.
    assert measured["asking"] > 0.3 * measured["ideal"]  # with another worker on the second core
    assert measured["megabytes"] < 400


def test_a_changed_template_parameter_or_row_asks_only_for_what_it_changed(prompts, tmp_path):
    folder, template = tmp_path / "out", tmp_path / "mine.jinja"
    rows = numbered(10)
    with ChatServer(answer) as server:

        def sent(**more) -> Counter:
            before = server.count
            report = run(server, prompts(rows), folder, **more).report
            assert report["kept"] == len(rows)
            return Counter(body["model"] for body in server.bodies[before:] if "random number" not in str(body))

        assert sent() == {"policy-model": 10, "reviser-model": 10}
        assert sent() == {}
        assert sent(max_edit_distance=0.9) == {}
        packaged = Path("apo_trl/pairs/text/prompt_templates/revise.jinja").read_text(encoding="utf-8")
        template.write_text(packaged.replace("as few changes", "very few changes"), encoding="utf-8")
        assert sent(reviser_template=str(template)) == {"reviser-model": 10}
        assert sent(reviser_temperature=0.1) == {"reviser-model": 10}
        assert sent(policy_top_p=0.9)["policy-model"] == 10
        rows.insert(3, {"id": "new", "prompt": "What is new?"})
        assert sent() == {"policy-model": 1, "reviser-model": 1}
        rows[5] = rows[5] | {"prompt": "What else?"}
        assert sent() == {"policy-model": 1, "reviser-model": 1}
        assert sent(method="stronger_preferred") == {"stronger-model": 11}  # the policy's answers stay
        assert sent(seed=1, method="clair") == {"policy-model": 11, "reviser-model": 11}


def test_a_prompt_that_stands_twice_is_asked_once(prompts, tmp_path):
    rows = [{"prompt": "Why?"}, {"prompt": "How?"}, {"prompt": "Why?"}]
    with ChatServer(answer) as server:
        report = run(server, prompts(rows), tmp_path / "out").report
        assert server.count == 4 + 4
    assert (report["kept"], report["dropped"]) == (2, {"duplicate_prompt": 1})


def test_a_bad_row_harms_no_other(prompts, tmp_path, capfd):
    rows = [*numbered(2), '{"prompt": "cut', {"text": "no prompt"}, {"prompt": ""}, {"prompt": [{"content": "x"}]}, 7,
            {"id": "row0", "prompt": "another"}, {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
            {"id": "last", "prompt": "Last?"}]  # fmt: skip
    with ChatServer(answer) as server:
        report = run(server, prompts(rows), tmp_path / "out").report
    assert report["asked"] == 10
    assert [row["id"] for row in pairs(tmp_path / "out")] == ["row0", "row1", "last"]
    assert report["dropped"] == {"bad_row": 6, "duplicate_id": 1}
    assert report["examples"]["bad_row"][0]["detail"].startswith("Row 3 is not JSON")
    assert "6 of 10 rows cannot be used: Row 3 is not JSON" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ({"content": "<revision>\nhalf an", "finish_reason": "length"}, "reviser_truncated"),
        ({"content": "x", "finish_reason": "content_filter"}, "reviser_filtered"),
        ({"content": ""}, "reviser_empty"),
        ({"content": None}, "reviser_empty"),
        ({"content": "<revision>\n\n</revision>"}, "empty"),
        ({"content": "", "refusal": "I will not."}, "refused"),
        ({"content": "I'm sorry, but I can't assist with that."}, "refused"),
        ({"content": "<revision>\nGiven answer.\n</revision>"}, "unchanged"),
        ({"content": "<revision>\nGiven answer, as a revised answer.\n</revision>"}, "mentions_revision"),
        ({"content": "no tags"}, "malformed"),
        ({"content": "{worsened_student_solution}: 5"}, "malformed"),
        ({"content": "<revision>\nGiven answer with no end"}, "malformed"),
    ],
)
def test_a_reply_that_is_no_revision_is_dropped_under_its_name(prompts, tmp_path, reply, reason):
    row = {"prompt": "What?", "response": "Given answer."}
    with ChatServer(lambda body: reply) as server:
        report = run(server, prompts([row, row | {"prompt": "And?"}]), tmp_path / "out").report
        repairs = server.count - 2 - 2
    assert report["dropped"] == {reason: 2}
    assert repairs == (2 if reason == "malformed" else 0)
    assert (tmp_path / "out" / "pairs.jsonl").read_text() == ""


def test_a_badly_formed_reply_is_asked_for_once_more(prompts, tmp_path):
    def reviser(body):
        if "cannot be used" in body["messages"][-1]["content"]:
            return "<revision>\nGiven answer, better.\n</revision>"
        return "Given answer, better."

    with ChatServer(reviser) as server:
        report = run(server, prompts([{"prompt": "What?", "response": "Given answer."}]), tmp_path / "out").report
        assert [message["role"] for message in server.bodies[-1]["messages"]] == ["system", "user", "assistant", "user"]
    assert report["kept"] == 1
    assert text(pairs(tmp_path / "out")[0]["chosen"]) == "Given answer, better."


def test_a_slow_reply_is_asked_for_again_and_a_judge_that_is_down_is_no_tie(prompts, tmp_path):
    slow = lambda number, body: "slow" if number in (4, 9) else None  # noqa: E731
    with ChatServer(answer, faults=slow, slow_seconds=2.0) as server:
        report = run(server, prompts(numbered(4)), tmp_path / "a", policy_timeout=0.5, reviser_timeout=0.5).report
        assert report["kept"] == 4
        assert server.count == 4 + 8 + 2
    down = lambda number, body: "503" if number > 2 and body["model"] == "judge-model" else None  # noqa: E731
    with ChatServer(answer, faults=down) as server:
        report = run(
            server, prompts(numbered(4)), tmp_path / "b", method="on_policy_judge", judge_max_retries=0
        ).report  # fmt: skip
        assert set(report["dropped"]) <= {"judge_error", "not_asked"}
        assert report["kept"] == 0
    with ChatServer(answer) as server:
        again = run(server, prompts(numbered(4)), tmp_path / "b", method="on_policy_judge").report
    assert again["kept"] == 4


@pytest.mark.parametrize(("reply", "reason"), [("", "policy_empty"), (" \n", "policy_empty"), (None, "policy_empty")])
def test_an_empty_answer_is_no_rejected_one(prompts, tmp_path, reply, reason):
    with ChatServer(lambda body: {"content": reply}) as server:
        report = run(server, prompts(numbered(2)), tmp_path / "out").report
    assert report["dropped"] == {reason: 2}


def test_samples_that_come_out_alike_are_asked_for_once_more_and_then_dropped(prompts, tmp_path):
    with ChatServer(lambda body: "Always this.") as server:
        report = run(server, prompts(numbered(1)), tmp_path / "out", method="on_policy_judge").report
        assert server.count == 2 + 2 + 1
    assert report["dropped"] == {"identical_answers": 1}


def test_n_is_used_where_a_server_honours_it_and_counted_where_it_gives_fewer(prompts, tmp_path):
    def policy(body):
        return f"Answer number {body['_index']} to {body['messages'][-1]['content']}"

    judge = ChatServer(answer)
    with ChatServer(policy, honours={"n", "seed"}) as server, judge:
        report = run(
            server, prompts(numbered(2)), tmp_path / "out", method="on_policy_judge", num_responses=3,
            judge_base_url=judge.url,
        ).report  # fmt: skip
        assert [body.get("n") for body in server.bodies[2:]] == [3, 3]
    assert report["servers"]["policy policy-model"] == "honours n, seed"
    assert report["servers"]["judge judge-model"] == "ignores n, seed"
    assert report["kept"] + report["dropped"].get("disagreement", 0) == 2


def test_a_refused_parameter_is_left_out_or_named(prompts, tmp_path, capfd):
    with ChatServer(answer, refuses={"seed"}) as server:
        report = run(server, prompts(numbered(2)), tmp_path / "a").report
        assert report["kept"] == 2
        assert "refuses seed" in report["servers"]["policy policy-model"]
        assert not any("seed" in body for body in server.bodies[-2:])
    with ChatServer(answer, refuses={"temperature"}) as server:
        result = run(server, prompts(numbered(2)), tmp_path / "b")
        assert result.broken
        assert "temperature" in result.stopped
        assert "null" in result.stopped
        assert server.count < 10
        report = run(
            server, prompts(numbered(2)), tmp_path / "b", policy_temperature=None, reviser_temperature=None
        ).report
        assert report["kept"] == 2


def test_a_wrong_key_stops_the_run_early_and_is_written_nowhere(prompts, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("RIGHT", KEY)
    monkeypatch.setenv("WRONG", KEY + "-wrong")
    names = {"policy_api_key_env": "RIGHT", "reviser_api_key_env": "RIGHT"}
    with ChatServer(answer, key=KEY) as server:
        result = run(server, prompts(numbered(500)), tmp_path / "out", **dict.fromkeys(names, "WRONG"))
        assert result.broken
        assert "401" in result.stopped
        assert server.count < 30
        assert result.report["dropped"] == {"not_asked": 500}
        assert result.report["asked"] == 500
        result = run(server, prompts(numbered(5)), tmp_path / "out", **names)
        assert result.report["kept"] == 5
        # A server that sends back what it was sent, in answers too.
        server_echo = ChatServer(lambda body: f"The key is {KEY}. " + answer(body), key=KEY)
        with server_echo:
            run(server_echo, prompts(numbered(5)), tmp_path / "out", **names)
    captured = capfd.readouterr()
    assert KEY not in captured.out + captured.err
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) >= 5
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path


def test_a_server_that_goes_down_stops_the_run_and_keeps_what_there_is(prompts, tmp_path):
    source, folder = prompts(numbered(300)), tmp_path / "out"
    up = ChatServer(answer, faults=lambda number, body: "drop" if number > 200 else None)
    with up as server:
        result = run(server, source, folder, max_failures=5, policy_max_retries=0, reviser_max_retries=0)
        assert result.broken
        assert "5 requests in a row failed" in result.stopped
        assert server.count < 200 + 5 + 16 + 1
    assert 0 < result.report["kept"] < 150
    assert result.report["kept"] + sum(result.report["dropped"].values()) == 300
    with ChatServer(answer, port=up.port) as server:
        report = run(server, source, folder).report
        assert report["kept"] == 300
        assert server.count < 2 * 300 - 190 + 5


@pytest.mark.parametrize(("key", "kept"), [("sk-abc", False), ("abcd1234", False), ("EMPTY", True), ("ollama", True)])
def test_a_key_is_told_from_a_word(prompts, tmp_path, monkeypatch, key, kept):
    monkeypatch.setenv("KEY", key)
    row = {"prompt": "What?", "response": "Given answer."}
    with ChatServer(lambda body: f"<revision>\nGiven answer, {key}.\n</revision>", key=key) as server:
        run(server, prompts([row]), tmp_path / "out", reviser_api_key_env="KEY")
    (pair,) = pairs(tmp_path / "out")
    assert (key in text(pair["chosen"])) == kept


def test_a_spent_account_stops_the_run_at_once(prompts, tmp_path):
    faults = lambda number, body: "429_quota" if number > 30 else None  # noqa: E731
    with ChatServer(answer, faults=faults) as server:
        result = run(server, prompts(numbered(200)), tmp_path / "out", policy_max_retries=0, reviser_max_retries=0)
        assert result.broken
        assert "quota" in result.stopped
        assert server.count < 30 + 2 * 16


def test_money_and_requests_stop_in_time(prompts, tmp_path):
    source = prompts(numbered(100))
    with ChatServer(answer) as server:
        result = run(server, source, tmp_path / "a", max_requests=50)
        assert (server.count, result.broken) == (50, False)
        assert "max_requests 50" in result.stopped
        assert result.report["kept"] > 0
        assert run(server, source, tmp_path / "a", max_requests=50).report["kept"] >= result.report["kept"]
        assert server.count == 50, "the limit is counted over all runs"
        assert run(server, source, tmp_path / "a").report["kept"] == 100
        prices = {"policy_output_price": 1000.0, "policy_max_tokens": 100, "max_cost": 1.0}
        result = run(server, source, tmp_path / "b", **prices)
        # An answer costs at most 0.1 and in truth much less: never more than 1 in all, and not far less either.
        assert 0.5 < result.report["cost"] <= 1.0
        assert "max_cost 1" in result.stopped


def test_a_minutes_requests_and_tokens_are_kept_to(prompts, tmp_path):
    with ChatServer(answer) as server:
        began = time.monotonic()
        run(server, prompts(numbered(5)), tmp_path / "out", policy_requests_per_minute=600)
        # 7 requests to the policy, one every 0.1 s.
        assert time.monotonic() - began >= 0.6
        began = time.monotonic()
        run(server, prompts(numbered(4)), tmp_path / "other", policy_tokens_per_minute=6000, policy_max_tokens=20)
        assert time.monotonic() - began >= 0.5


def test_shards_are_parts_and_merge_by_id(prompts, tmp_path):
    source, folder = prompts(numbered(40)), tmp_path / "out"
    with ChatServer(answer) as server:
        parts = [run(server, source, folder, shard=f"{i}/3") for i in (1, 2, 3)]
        assert sum(part.report["asked"] for part in parts) == 40
        assert all(5 < part.report["asked"] < 25 for part in parts)
        before = server.count
        report = run(server, source, folder).report
        assert server.count == before
    assert report["kept"] == 40
    assert [row["id"] for row in pairs(folder)] == [f"row{i}" for i in range(40)]
    assert sorted(row["id"] for part in parts for row in pairs(part.folder)) == sorted(f"row{i}" for i in range(40))


def test_two_runs_do_not_write_to_one_folder(prompts, tmp_path):
    from apo_trl.pairs.llm.response_cache import ResponseCache

    with ChatServer(answer) as server, ResponseCache(tmp_path / "out"):
        with pytest.raises(InputError, match="output_dir: another run"):
            run(server, prompts(numbered(2)), tmp_path / "out")


@pytest.mark.slow
def test_no_reply_is_logged_and_progress_is_told(prompts, tmp_path):
    with ChatServer(lambda body: "SECRETREPLY " + answer(body), faults=["500"], fault_share=0.1, latency=0.3) as server:
        keys = recipe(server, prompts(numbered(30)), tmp_path / "out", concurrency=4)
        done = subprocess.run(cli(keys), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "SECRETREPLY" not in done.stdout + done.stderr
    assert "What is" not in done.stdout + done.stderr
    assert "rows 30 of 30" in done.stderr
    assert "Kept 30 of 30" in done.stdout
