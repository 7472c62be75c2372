"""Batch files out and answers back in, as OpenAI's Batch and `vllm run-batch` write them, and as they go wrong."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from chat_server import ChatServer

from apo_trl.errors import InputError
from apo_trl.pairs import batch
from apo_trl.pairs.batch import export_batch, import_batch
from apo_trl.pairs.build import build
from apo_trl.pairs.config.settings import make_settings
from apo_trl.pairs.llm.response_cache import ResponseCache

ROLES = {
    "clair": ["policy", "reviser"],
    "on_policy_judge": ["policy", "judge"],
    "off_policy_judge": ["policy", "judge"],
    "judge_then_clair": ["policy", "judge", "reviser"],
}
NOWHERE = "http://127.0.0.1:9/v1"


def reply(body: dict) -> str:
    """Answer by what is asked alone, and samples of the same differently each time."""
    last = body["messages"][-1]["content"]
    if "<revision>" in last:
        original = last.split("<answer>\n")[1].split("\n</answer>")[0]
        return f"<reasoning>\nclearer\n</reasoning>\n<revision>\n{original} It is also clearer.\n</revision>"
    if "[[A]]" in last:
        first, second = (last.split(f"<answer_{side}>\n")[1].split(f"\n</answer_{side}>")[0] for side in "ab")
        return f"The longer. [[{'A' if len(first) > len(second) else 'B'}]]"
    reply.samples[body["model"], last] += 1
    return f"{body['model']} on '{last}'" + " indeed" * (reply.samples[body["model"], last] - 1) + "."


reply.samples = Counter()


@pytest.fixture(autouse=True)
def _fresh():
    reply.samples.clear()


@pytest.fixture
def recipe(tmp_path):
    """Give the settings of a recipe over rows that were written for it."""
    path = tmp_path / "prompts.jsonl"

    def make(folder="out", count=10, method="clair", url=NOWHERE, **more):
        path.write_text("".join(json.dumps({"id": f"row{i}", "prompt": f"{i} + {i}?"}) + "\n" for i in range(count)))
        keys = {"method": method, "prompts": str(path), "output_dir": str(tmp_path / folder), "concurrency": 4}
        for role in ROLES[method]:
            keys |= {f"{role}_base_url": url, f"{role}_model": f"{role}-model", f"{role}_max_retries": 0}
        return make_settings(keys | more)

    return make


def export(settings) -> dict[Path, int]:
    with ResponseCache(settings.folder) as store:
        return export_batch(settings, store)


def take(settings, *files) -> Counter:
    with ResponseCache(settings.folder) as store:
        return import_batch(settings, store, [str(file) for file in files])


def requests(files) -> list[dict]:
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def openai_line(request: dict, text: str) -> dict:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop", "logprobs": None}
    usage = {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30}
    body = {"id": "chatcmpl-1", "object": "chat.completion", "choices": [choice], "usage": usage}
    response = {"status_code": 200, "request_id": "req_1", "body": body}
    return {"id": "batch_req_1", "custom_id": request["custom_id"], "response": response, "error": None}


def answered(files, path: Path, leave_out=()) -> Path:
    """Write the answers to request files, shuffled."""
    lines = [json.dumps(openai_line(request, reply(request["body"]))) for request in requests(files)]
    lines = [line for at, line in enumerate(lines) if at not in leave_out]
    random.Random(0).shuffle(lines)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def rounds(settings, tmp_path) -> list[dict[str, int]]:
    """Export and import until nothing is due; give the requests of each round by role."""
    found = []
    while files := export(settings):
        found.append({path.name.split("-")[0]: count for path, count in files.items()})
        counts = take(settings, answered(files, tmp_path / f"answers-{len(found)}.jsonl"))
        assert counts == {"imported": sum(files.values())}
    return found


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("method", "more", "expected"),
    [
        ("clair", {}, [{"policy": 10}, {"reviser": 10}]),
        ("on_policy_judge", {"num_responses": 3}, [{"policy": 30}, {"judge": 60}]),
        ("judge_then_clair", {}, [{"policy": 20}, {"judge": 20}, {"reviser": 10}]),
    ],
)
def test_batches_make_the_pairs_of_a_live_run_and_send_nothing(recipe, tmp_path, method, more, expected):
    with ChatServer(reply) as server:
        settings = recipe("batch", method=method, url=server.url, **more)
        assert rounds(settings, tmp_path) == expected
        assert build(settings).report["kept"] == 10
        assert server.count == 0
        reply.samples.clear()
        # One row at a time, so that the samples come in the order of the file.
        live = recipe("live", method=method, url=server.url, **more)
        assert build(live).report["dropped"] == {}
        assert server.count == sum(sum(part.values()) for part in expected) + 2 * len(ROLES[method])
    assert rows(tmp_path / "batch") == rows(tmp_path / "live")


def test_no_server_is_needed_once_every_answer_is_there(recipe, tmp_path):
    settings = recipe(url=NOWHERE)
    rounds(settings, tmp_path)
    result = build(settings)
    assert (result.report["kept"], result.report["complete"], result.stopped) == (10, True, "")


def test_samples_are_lines_of_their_own_with_the_same_body(recipe):
    files = export(recipe(method="on_policy_judge", num_responses=3, count=2))
    lines = requests(files)
    assert len({line["custom_id"] for line in lines}) == len(lines) == 6
    assert Counter(json.dumps(line["body"]) for line in lines).most_common() == [
        (json.dumps(lines[0]["body"]), 3), (json.dumps(lines[3]["body"]), 3)
    ]  # fmt: skip
    for line in lines:
        assert set(line) == {"custom_id", "method", "url", "body"}
        assert (line["method"], line["url"], line["body"]["model"]) == ("POST", "/v1/chat/completions", "policy-model")
        assert len(line["custom_id"]) <= 64


def test_what_is_missing_or_wrong_is_a_hole_and_shifts_nothing(recipe, tmp_path):
    settings = recipe(count=12)
    ((asked, count),) = export(settings).items()
    lines = requests([asked])
    good = [openai_line(line, f"Answer to {line['body']['messages'][0]['content']}") for line in lines]
    failed = lambda line, status, body, error=None: {  # noqa: E731
        "id": "x", "custom_id": line["custom_id"], "response": {"status_code": status, "request_id": "r", "body": body},
        "error": error,
    }  # fmt: skip
    message = {"error": {"message": "no", "type": "invalid_request_error"}}
    written = [
        failed(lines[1], 400, message), failed(lines[2], 500, message),
        {"id": "x", "custom_id": lines[3]["custom_id"], "response": None, "error": {"code": "batch_expired"}},
        failed(lines[4], 400, None, {"object": "error", "message": "too long", "code": 400}),  # as vllm run-batch
        failed(lines[5], 200, {"choices": []}), failed(lines[6], 200, {"choices": [7]}), failed(lines[7], 200, "text"),
        failed(lines[8], 200, {"choices": [{"message": "text"}]}),
        failed(lines[8], 500, good[8]["response"]["body"]), good[8] | {"error": {"code": "server_error"}},
        {"custom_id": lines[9]["custom_id"], "response": "text", "error": None},
        good[10] | {"custom_id": "0" * 64}, good[10] | {"custom_id": 7}, good[10] | {"custom_id": None},
        good[10] | {"custom_id": ["a"]}, good[11], good[0],
    ]  # fmt: skip
    strange = ["{", '"text"', "[]", "null", "7", "{}", "", "   ", json.dumps(good[10])[:-40], json.dumps(lines[10])]
    output = tmp_path / "answers.jsonl"
    output.write_bytes(b"\xef\xbb\xbf" + "\n".join([*map(json.dumps, written), *strange]).encode())
    counts = take(settings, output)
    assert counts == {"failed": 11, "unknown custom_id": 4, "imported": 2, "unreadable": 8}
    assert take(settings, output) == {"failed": 11, "unknown custom_id": 4, "imported before": 2, "unreadable": 8}
    again = requests(path for path in export(settings) if path.name.startswith("policy-"))
    assert {line["custom_id"] for line in again} == {line["custom_id"] for line in lines[1:11]}
    for files in iter(lambda: export(settings), {}):
        take(settings, answered(files, tmp_path / "rest.jsonl"))
    for row in (built := {row["id"]: row for row in rows_of(settings)}).values():
        assert row["prompt"][0]["content"] in row["rejected"][0]["content"]
    assert len(built) == count == 12
    assert built["row0"]["rejected"][0]["content"] == "Answer to 0 + 0?"
    assert built["row1"]["rejected"][0]["content"] == "policy-model on '1 + 1?'."


def rows_of(settings) -> list[dict]:
    assert build(settings).report["dropped"] == {}
    return rows(settings.folder)


def test_a_count_of_tokens_that_is_none_does_not_cost_the_answer(recipe, tmp_path):
    settings = recipe(count=5)
    lines = [openai_line(request, reply(request["body"])) for request in requests(export(settings))]
    for line, usage in zip(lines, ["x", {"prompt_tokens": "many"}, {"prompt_tokens": 1e999}, None, [1]], strict=True):
        line["response"]["body"]["usage"] = usage
    (tmp_path / "answers").write_text("\n".join(map(json.dumps, lines)))
    assert take(settings, tmp_path / "answers") == {"imported": 5}


def test_a_reply_that_was_cut_off_is_dropped_as_in_a_live_run(recipe, tmp_path):
    settings = recipe(count=1)
    (line,) = (openai_line(request, "half an") for request in requests(export(settings)))
    line["response"]["body"]["choices"][0]["finish_reason"] = "length"
    (tmp_path / "answers").write_text(json.dumps(line))
    take(settings, tmp_path / "answers")
    assert export(settings) == {}
    assert build(settings).report["dropped"] == {"policy_truncated": 1}


def test_files_are_split_at_both_limits(recipe, monkeypatch):
    monkeypatch.setattr(batch, "_LINES", 4)
    files = export(recipe("a"))
    assert [path.name for path in files] == [f"policy-policy-model-00{i}.jsonl" for i in (1, 2, 3)]
    assert list(files.values()) == [4, 4, 2]
    assert [len(requests([path])) for path in files] == [4, 4, 2]
    assert len({line["custom_id"] for line in requests(files)}) == 10
    monkeypatch.setattr(batch, "_LINES", 1000)
    size = next(iter(files)).stat().st_size // 4
    monkeypatch.setattr(batch, "_BYTES", 3 * size)
    files = export(recipe("b"))
    assert list(files.values()) == [3, 3, 3, 1]
    assert all(path.stat().st_size <= 3 * size for path in files)


@pytest.mark.parametrize(
    "models", [["a", "b"], ["org/m", "org-m"], ["模型", "モデル"], ["x" * 400, "y" + "x" * 399], ["../../up", "..\\up"]]
)
def test_every_model_has_files_of_its_own_whatever_its_name(recipe, tmp_path, models, monkeypatch):
    monkeypatch.setattr(batch, "_LINES", 7)
    settings = recipe(method="off_policy_judge", policy_model=models)
    files = export(settings)
    assert [len({line["body"]["model"] for line in requests([path])}) for path in files] == [1] * 4
    assert Counter(line["body"]["model"] for line in requests(files)) == dict.fromkeys(models, 10)
    assert {path.parent for path in files} == {settings.folder / "batch"}
    assert all(path.name.isascii() and len(path.name) < 150 for path in files)
    take(settings, answered(files, tmp_path / "answers.jsonl"))
    assert {path.name[:6] for path in export(settings)} == {"judge-"}


def test_keys_are_in_no_file(recipe, monkeypatch):
    monkeypatch.setenv("A_KEY", "sk-test-0123456789")
    settings = recipe(policy_api_key_env="A_KEY", reviser_api_key_env="A_KEY")
    files = [path for path in (export(settings) and settings.folder).rglob("*") if path.is_file()]
    assert len(files) >= 2
    assert not any(b"sk-test-0123456789" in path.read_bytes() or b"A_KEY" in path.read_bytes() for path in files)


def test_a_new_export_replaces_requests_and_touches_nothing_else(recipe):
    settings = recipe(count=3)
    (asked,) = export(settings)
    folder = asked.parent
    mine = {
        "policy-answers.jsonl": "\n".join(json.dumps(openai_line(line, "x")) for line in requests([asked])),
        "policy-policy-model-002.jsonl": '{"custom_id": "a", "response": null}',
        "policy-empty.jsonl": "",
        "policy-notes.txt": "mine",
        "policy-binary.jsonl": "\udcff",
    }
    for name, text in mine.items():
        (folder / name).write_text(text, encoding="utf-8", errors="surrogateescape")
    take(settings, folder / "policy-answers.jsonl")
    (asked,) = export(settings)
    assert asked.name == "reviser-reviser-model-001.jsonl"
    assert {path.name for path in folder.iterdir()} == {asked.name, *mine}
    # Answers that were written over the requests are no requests.
    asked.write_text(text := json.dumps(openai_line(requests([asked])[0], "x")))
    (again,) = export(settings)
    assert (again.name, asked.read_text()) == ("reviser-reviser-model-002.jsonl", text)
    for name, text in mine.items():
        assert (folder / name).read_text(encoding="utf-8", errors="surrogateescape") == text


def test_a_late_answer_to_an_earlier_export_is_still_imported(recipe, tmp_path):
    settings = recipe(count=4)
    late = answered(export(settings), tmp_path / "late.jsonl")
    export(settings)
    assert take(settings, late) == {"imported": 4}


def test_the_same_request_of_two_rows_is_one_line(recipe, tmp_path):
    settings = recipe()
    lines = [{"prompt": "Why?", "responses": ["So."]}, {"prompt": "Why?", "responses": ["So.", "Because."]}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert list(export(settings).values()) == [1]


def test_what_shards_were_answered_is_not_exported(recipe):
    with ChatServer(reply) as server:
        build(recipe(url=server.url, shard="0/2"))
        mine = len(rows(recipe(shard="0/2").folder))
        assert 0 < mine < 10
        assert list(export(recipe(url=server.url)).values()) == [10 - mine]


def test_a_reward_models_part_is_left_to_build(recipe, tmp_path):
    more = {"judge_protocol": "reward_model", "judge_base_url": None}
    settings = recipe(method="on_policy_judge", **more)
    assert rounds(settings, tmp_path) == [{"policy": 20}]


def test_files_that_are_not_there_are_named(recipe, tmp_path):
    settings = recipe()
    export(settings)
    with pytest.raises(InputError, match=r".*answers\.jsonl: file not found"):
        take(settings, tmp_path / "answers.jsonl")


def test_a_build_after_the_last_import_can_ask_nobody(recipe):
    with ChatServer(reply) as server:
        report = build(recipe(url=server.url, max_requests=0)).report
        assert server.count == 0
    assert report["dropped"] == {"not_answered": 10}
    assert not report["complete"]
