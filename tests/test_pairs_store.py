"""The store on bad days: killed, shared, broken, full; and the keys by which replies are found."""

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
from chat_server import ChatServer

from apo_trl.errors import InputError
from apo_trl.pairs.build import build
from apo_trl.pairs.config.settings import make_settings
from apo_trl.pairs.llm.requests import Requester
from apo_trl.pairs.llm.response_cache import ResponseCache, open_read_only, reply_key

ENTRY = {"role": "policy", "step": "sample", "row": "1", "sample": 0, "model": "m", "usage": (3, 5), "cost": 0.5}

WRITER = """
import sys
from pathlib import Path
from apo_trl.pairs.llm.response_cache import ResponseCache
store = ResponseCache(Path(sys.argv[1]))
for number in range(10**9):
    store.add(f"{sys.argv[2]}-{number}", '"' + "x" * 3000 + '"', role="policy", step="sample", row="r", sample=0,
              model="m", usage=(1, 1), cost=0.0)
    print(number, flush=True)
    if number % 100 == 99:
        store.commit()
"""


def test_what_add_returned_for_survives_sigkill(tmp_path):
    told = {}
    for name in "abc":
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), name], stdout=subprocess.PIPE, text=True
        )
        lines = [process.stdout.readline() for _ in range(250)]
        process.send_signal(signal.SIGKILL)
        lines += process.communicate()[0].splitlines(keepends=True)
        assert process.returncode == -signal.SIGKILL
        told[name] = max(int(line) for line in lines if line.endswith("\n"))
    with ResponseCache(tmp_path) as store:
        for name, last in told.items():
            assert last >= 249
            for number in range(last + 1):
                assert store.reply(f"{name}-{number}") == "x" * 3000
        assert store._base.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_cache_is_read_while_its_process_writes_and_after_it_was_killed(tmp_path):
    """As by the recipe without `shard`, which may run before the jobs of the shards have ended."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "shard"), "a"], stdout=subprocess.PIPE, text=True
    )
    file, added, taken = tmp_path / "shard" / "store.sqlite", -1, 0
    with ResponseCache(tmp_path / "whole") as whole:
        for _ in range(5):
            for _ in range(150):
                added = int(process.stdout.readline())
            taken += whole.take_over(file)
            assert taken > added
            whole.add(f"own-{taken}", "1", **ENTRY)
        process.send_signal(signal.SIGKILL)
        lines = process.communicate()[0].split()
        taken += whole.take_over(file)
        assert taken > int([added, *lines][-1])
    with ResponseCache(tmp_path / "shard") as shard:  # the lock of the killed process is free
        shard.add("b", "1", **ENTRY)
        assert shard._base.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert shard._base.execute("SELECT count(*) FROM replies").fetchone() == (taken + 1,)


@pytest.mark.parametrize("ended", ["closed", "killed"])
def test_a_write_ahead_log_of_an_earlier_version_is_converted(ended, tmp_path):
    with ResponseCache(tmp_path) as store:
        store.add("a", "1", **ENTRY)
    copied = tmp_path / "copy"
    with contextlib.closing(sqlite3.connect(tmp_path / "store.sqlite")) as old:
        assert old.execute("PRAGMA journal_mode=WAL").fetchone() == ("wal",)
        with old:
            old.execute("UPDATE replies SET body = '2'")
        copied.mkdir()
        for name in ("store.sqlite", "store.sqlite-wal"):
            shutil.copy(tmp_path / name, copied / name)
    assert (copied / "store.sqlite-wal").stat().st_size > 0
    folder = copied if ended == "killed" else tmp_path
    with ResponseCache(folder) as store:
        assert store.reply("a") == 2
        assert store._base.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        store.add("b", "3", **ENTRY)
        assert not [*folder.glob("*-wal"), *folder.glob("*-shm")]
    assert {path.name for path in folder.glob("store*")} == {"store.sqlite", "store.lock"}


def test_a_second_writer_is_told_and_the_first_goes_on(tmp_path):
    with ResponseCache(tmp_path) as first:
        other = subprocess.run([sys.executable, "-c", WRITER, str(tmp_path), "b"], capture_output=True, text=True)
        assert "InputError: output_dir: another run is writing to" in other.stderr
        with pytest.raises(InputError, match="another run"):
            ResponseCache(tmp_path)
        first.add("a", "1", **ENTRY)
    with ResponseCache(tmp_path) as later:
        assert later.reply("a") == 1


@pytest.mark.parametrize(
    "content", [b"no database at all, but long enough to be read as a header" * 100, b"SQLite format 3\0x"]
)
def test_a_file_that_is_no_database_is_named_and_stays(tmp_path, content):
    (tmp_path / "store.sqlite").write_bytes(content)
    for _ in range(2):  # the lock is free again
        with pytest.raises(InputError, match=r"output_dir: .*store\.sqlite is not a response cache .*Move it"):
            ResponseCache(tmp_path)
    assert (tmp_path / "store.sqlite").read_bytes() == content


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"output_dir: .*file.* Set a writable folder"):
        ResponseCache(tmp_path / "file")
    (tmp_path / "a" / "store.sqlite").mkdir(parents=True)
    for _ in range(2):
        with pytest.raises(InputError, match=r"output_dir: .*store\.sqlite is not a response cache"):
            ResponseCache(tmp_path / "a")
    (tmp_path / "b" / "store.lock").mkdir(parents=True)
    with pytest.raises(InputError, match=r"output_dir: .*b: .*Set a writable folder"):
        ResponseCache(tmp_path / "b")


@pytest.mark.parametrize(
    "damage",
    [
        '["half', "null", "[1, 2]", '"abc"', '{"a": 1}', "\0\udcff", "[" * 10**5, "[" + "[]," * 11 + "[]]",
        '["k", "policy", "sample", "r", 0, "m", "no JSON", 1, 0, 0, 0.0, 0.0]',
        '["k", "policy", "sample", "r", 0, "m", null, 1, 0, 0, 0.0, 0.0]',
        f'["k", "policy", "sample", "r", {10**30}, "m", "1", 1, 0, 0, 0.0, 0.0]',
        '["\\ud800", "policy", "sample", "r", 0, "m", "1", 1, 0, 0, 0.0, 0.0]',
    ],
)  # fmt: skip
def test_a_damaged_line_of_pending_responses_loses_only_itself(tmp_path, damage):
    lines = [f'["{key}", "policy", "sample", "r", 0, "m", "1", 1, 0, 0, 0.0, 0.0]' for key in "ab"]
    text = "\n".join([lines[0], damage, lines[1]])
    (tmp_path / "store.pending").write_bytes(text.encode("utf-8", "surrogateescape"))
    with ResponseCache(tmp_path) as store:
        assert [store.reply(key) for key in ("a", "b", "k")] == [1, 1, None]


def test_a_full_disk_is_told_and_takes_nothing_with_it(tmp_path):
    with ResponseCache(tmp_path) as store:
        store.add("a", "1", **ENTRY)
        pages = store._base.execute("PRAGMA page_count").fetchone()[0]
        store._base.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(InputError, match=r"output_dir: .*\(database or disk is full\)\. Free space"):
            store.add("b", json.dumps("x" * 100_000), **ENTRY)
        assert store.reply("b") is None
    with ResponseCache(tmp_path) as store:
        assert (store.reply("a"), store.reply("b")) == (1, "x" * 100_000)  # out of store.pending
        store.add("c", "2", **ENTRY)
    with ResponseCache(tmp_path) as store:
        assert store.reply("c") == 2
    assert not (tmp_path / "store.pending").exists()


def test_replies_of_shards_are_taken_over_once_and_the_own_stay(tmp_path):
    for name, keys in {"one": "ab", "two": "bc"}.items():
        with ResponseCache(tmp_path / name) as shard:
            for key in keys:
                shard.add(key, json.dumps(name), **ENTRY)
    with ResponseCache(tmp_path / "whole") as whole:
        whole.add("a", '"whole"', **ENTRY)
        paths = [tmp_path / name / "store.sqlite" for name in ("one", "two")]
        assert [whole.take_over(path) for path in paths] == [1, 1]
        assert [whole.take_over(path) for path in paths] == [0, 0]
        assert [whole.reply(key) for key in "abc"] == ["whole", "one", "two"]
        (tmp_path / "bad").write_bytes(b"no database, whatever its name says" * 100)
        with pytest.raises(InputError, match=r"output_dir: .*bad is not a response cache .*Move it"):
            whole.take_over(tmp_path / "bad")
        with sqlite3.connect(tmp_path / "other") as other:
            other.execute("CREATE TABLE replies (key TEXT)")
        other.close()
        with pytest.raises(InputError, match="other is not a response cache"):
            whole.take_over(tmp_path / "other")
        assert whole.take_over(paths[0]) == 0, "a failure left something attached"


def test_usage_and_mean_are_sums_and_means_of_what_was_answered(tmp_path):
    with ResponseCache(tmp_path) as store:
        assert store.usage() == store.mean_tokens() == {}
        store.add("1", "1", **ENTRY)
        store.add("1", "2", **ENTRY | {"usage": (9, 9)})  # there already: it has been used
        assert store.reply("1") == 1
        store.add("2", "1", **ENTRY | {"sample": 1}, requests=0)
        store.add("3", "1", **ENTRY | {"usage": (7, 11), "cost": 0.25})
        store.add("4", "1", **ENTRY | {"role": "judge", "usage": (1, 0)})
        store.add("5", "1", **ENTRY | {"step": "probe", "usage": (1000, 1000)})
        assert store.usage() == {
            "judge": {"requests": 1, "prompt_tokens": 1, "completion_tokens": 0, "cost": 0.5},
            "policy": {"requests": 3, "prompt_tokens": 1013, "completion_tokens": 1021, "cost": 1.75},
        }
        assert store.mean_tokens() == {"judge": 0.0, "policy": 7.0}


def test_an_empty_store_leaves_nothing_behind(tmp_path):
    with open_read_only(tmp_path / "none") as store:
        store.add("1", "1", **ENTRY)
    assert not (tmp_path / "none").exists()
    with ResponseCache(tmp_path / "whole" / "shards" / "0-of-2") as shard:
        shard.add("1", "1", **ENTRY)
    with open_read_only(tmp_path / "whole") as store:
        assert store.reply("1") == 1
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == ["shards"]


PARTS = {
    "step": "sample", "template": "", "messages": "[]", "model": "m", "base_url": "http://a/v1",
    "parameters": {"temperature": 1.0, "top_p": 0.5, "min_p": [1, {"a": 1, "b": 2}]},
}  # fmt: skip


def test_each_part_of_a_key_changes_it_and_the_order_does_not():
    whole = reply_key(**PARTS)
    assert len(whole) == 64
    changed = {whole} | {reply_key(**PARTS | {name: "other"}) for name in PARTS}
    changed |= {reply_key(**PARTS | {"parameters": PARTS["parameters"] | {name: 2}}) for name in PARTS["parameters"]}
    changed.add(reply_key(**PARTS | {"base_url": None}))
    assert len(changed) == 1 + len(PARTS) + 3 + 1
    turned = dict(reversed(PARTS.items()))
    turned["parameters"] = {"min_p": [1, {"b": 2, "a": 1}], "top_p": 0.5, "temperature": 1.0}
    assert reply_key(**turned) == whole
    assert reply_key(**PARTS | {"messages": "\ud800"}) != whole


REQUEST = {
    "policy_model": "m", "policy_base_url": "http://a/v1", "policy_temperature": 1.0, "policy_top_p": 0.9,
    "policy_max_tokens": 10, "policy_extra_body": {"min_p": 0.1, "top_k": 5}, "seed": 0,
}  # fmt: skip
CHANGES = {
    "policy_model": "n", "policy_temperature": 0.5, "policy_top_p": None,
    "policy_max_tokens": 11, "policy_extra_body": {"min_p": 0.2, "top_k": 5}, "seed": 1,
}  # fmt: skip


def key_of(step="sample", messages=(("user", "Hi"),), sample=0, template="", row="1", **keys):
    basis = {"method": "clair", "prompts": "p.jsonl", "output_dir": "out", "reviser_model": "r"}
    settings = make_settings(basis | REQUEST | keys)
    said = [{"role": role, "content": content} for role, content in messages]
    asker = Requester(settings, None, None)
    return asker._request(settings.policy[0], step, said, row, sample, template)


def test_everything_that_determines_a_reply_is_in_its_key_and_nothing_else():
    first = key_of().key
    keys = {key_of(**{name: value}).key for name, value in CHANGES.items()}
    keys |= {key_of(step="revise").key, key_of(sample=1).key, key_of(template="f00").key}
    keys |= {key_of(messages=[("user", "Hi!")]).key, key_of(messages=[("system", "Hi")]).key}
    keys.add(key_of(messages=[("user", "Hi"), ("user", "Hi")]).key)
    assert len(keys | {first}) == len(CHANGES) + 6 + 1
    same = [
        key_of(policy_base_url="http://b/v1"), key_of(policy_base_url=None),
        key_of(row="2"), key_of(method="stronger_preferred", stronger_model="s"), key_of(policy_input_price=3),
        key_of(policy_extra_body={"top_k": 5, "min_p": 0.1}), key_of(concurrency=5), key_of(policy_max_retries=0),
        key_of(max_edit_distance=0.1), key_of(policy_timeout=5), key_of(policy_requests_per_minute=7),
    ]  # fmt: skip
    assert {request.key for request in same} == {first}


def test_the_probe_of_an_earlier_run_is_used(tmp_path):
    from apo_trl.pairs.llm.servers import Servers, _probe_request

    settings = make_settings({"method": "clair", "prompts": "p", "output_dir": "o", "reviser_model": "r"} | REQUEST)
    probe = _probe_request(settings.policy[0])
    assert probe.body["max_tokens"] == 32
    with ResponseCache(tmp_path) as store:
        store.add(probe.key, json.dumps({"n": True, "seed": None}), **ENTRY)
        assert Servers(settings, store, print).notes == {"policy m": "honours n; refuses seed"}


def test_a_model_that_was_trained_again_answers_anew(tmp_path):
    folder = {"policy_model": str(tmp_path), "policy_base_url": None}
    (tmp_path / "model.safetensors").write_text("first")
    first = key_of(**folder).key
    (tmp_path / "summary.json").write_text("not weights")
    assert key_of(**folder).key == first
    (tmp_path / "model.safetensors").write_text("other")
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    assert key_of(**folder).key != first


def test_a_key_has_the_url_if_wished():
    one, two = (key_of(policy_base_url=f"http://{host}/v1", cache_by_url=True).key for host in "ab")
    assert len({one, two, key_of().key}) == 3


@pytest.fixture
def build_at(tmp_path):
    """Build pairs with a server at a new port; return the number of requests and the pairs."""
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"id": "{n}", "prompt": "What is {n}?"}}\n' for n in range(6)))
    recipe = {"method": "clair", "prompts": str(tmp_path / "prompts.jsonl"), "output_dir": str(tmp_path / "out")}
    recipe |= {"policy_model": "a", "reviser_model": "b"}

    def build_at(**keys):
        with ChatServer() as server:
            urls = {f"{role}_base_url": server.url for role in ("policy", "reviser")}
            build(make_settings(recipe | urls | keys))
            return server.count, (tmp_path / "out" / "pairs.jsonl").read_bytes()

    return build_at


def test_a_server_at_another_port_is_the_same_model(build_at):
    requests, pairs = build_at()
    assert requests == 6 * 2 + 4
    assert build_at() == (0, pairs)
    assert build_at(cache_by_url=True)[0] == requests


def test_models_of_the_same_name_need_an_option():
    recipe = {"method": "off_policy_judge", "prompts": "p", "output_dir": "o", "judge_model": "j"}
    recipe |= {"policy_model": ["m", "m"], "policy_base_url": ["http://a/v1", "http://b/v1"]}
    with pytest.raises(InputError, match=r"policy_model: duplicate name.*cache_by_url: true"):
        make_settings(recipe)
    assert len(make_settings(recipe | {"cache_by_url": True}).policy) == 2
    with pytest.raises(InputError, match="policy_model: duplicate name"):
        make_settings(recipe | {"cache_by_url": True, "policy_base_url": "http://a/v1"})


def test_array_jobs_in_one_folder(tmp_path):
    """Two processes write, one is killed; the other one ends, and the killed one resumes."""
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"id": "{n}", "prompt": "What is {n}?"}}\n' for n in range(80)))
    keys = {"method": "clair", "prompts": tmp_path / "prompts.jsonl", "output_dir": tmp_path / "out"}
    keys |= {"policy_model": "a", "reviser_model": "b", "concurrency": 2}
    with ChatServer(latency=0.1) as server:
        keys |= {"policy_base_url": server.url, "reviser_base_url": server.url}
        (tmp_path / "recipe.yaml").write_text(json.dumps({key: str(value) for key, value in keys.items()}))
        command = [sys.executable, "-m", "apo_trl.cli.main", "pairs", "build", str(tmp_path / "recipe.yaml")]
        jobs = [subprocess.Popen([*command, "--shard", f"{number}/2"], stderr=subprocess.PIPE) for number in (0, 1)]
        file = tmp_path / "out" / "shards" / "0-of-2" / "store.sqlite"

        def stored():
            if not file.exists():
                return 0
            with contextlib.closing(sqlite3.connect(file, 60)) as base, contextlib.suppress(sqlite3.OperationalError):
                return base.execute("SELECT count(*) FROM replies").fetchone()[0]  # of no table yet
            return 0

        while jobs[0].poll() is None and stored() < 20:
            time.sleep(0.05)
        jobs[0].send_signal(signal.SIGKILL)
        errors = [job.communicate()[1].decode() for job in jobs]
        assert [job.returncode for job in jobs] == [-signal.SIGKILL, 0], errors
        with ResponseCache(file.parent) as cache:  # with what it had not committed
            kept, before = cache._base.execute("SELECT count(*) FROM replies").fetchone()[0], server.count
        assert kept >= 20
        make = {key: str(value) for key, value in keys.items()}
        resumed = build(make_settings(make | {"shard": "0/2", "concurrency": 16}))
        assert resumed.report["complete"]
        needed = 2 * resumed.report["asked"] + 4 + 2  # with two probes of two requests, and what they found out
        assert server.count - before == needed - kept
        before = server.count
        whole = build(make_settings(make))
        assert (whole.report["kept"], server.count) == (80, before)
    for path in (tmp_path / "out").rglob("store.sqlite"):
        with contextlib.closing(sqlite3.connect(path)) as base:
            assert base.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert base.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    assert not [*(tmp_path / "out").rglob("store.sqlite-*")]
