"""What a newcomer reads after a build that went wrong: why, what to change, and the replies themselves."""

import contextlib
import json
import re
import socket
import threading
from types import SimpleNamespace

import pytest
from chat_server import ChatServer
from test_pairs_build import numbered, prompts, recipe  # noqa: F401  (a fixture among them)

from apo_trl.cli.main import main
from apo_trl.pairs.config.settings import make_settings
from apo_trl.pairs.llm.response_cache import open_read_only
from apo_trl.pairs.output.advice import commonest
from apo_trl.pairs.progress import Progress
from apo_trl.pairs.text.reasons import REASONS, WAITING, remedy

DRAFT = "The sky is blue because air scatters short waves of light more than long ones. "


def revising(reply):
    """A policy that drafts, and a reviser that replies with `reply(all that the user has said)`."""

    def answer(body):
        asked = "\n".join(message["content"] for message in body["messages"] if message["role"] == "user")
        return reply(asked) if body["model"] == "reviser-model" else DRAFT * 2

    return answer


def ends(capfd, *arguments: str, status: int = 0) -> SimpleNamespace:
    """Run `apo-trl pairs ...` in this process, and return what it printed."""
    capfd.readouterr()
    code = 0
    try:
        main(["pairs", *arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capfd.readouterr()
    assert code == status, captured
    return SimpleNamespace(out=captured.out, lines=captured.out.splitlines(), err=captured.err)


@pytest.fixture
def build(prompts, tmp_path, capfd):  # noqa: F811
    """Build ten rows with `apo-trl pairs build` and return what it printed: `build(answer, status=1, key=value)`."""

    def call(answer, *more: str, status: int = 0, rows=None, **keys):
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(ChatServer(answer)) if callable(answer) else SimpleNamespace(url=answer)
            made = recipe(server, prompts(rows or numbered(10)), tmp_path / "out", **{"reviser_max_retries": 0} | keys)
            (tmp_path / "mine.yaml").write_text(json.dumps(made))
            return ends(capfd, "build", str(tmp_path / "mine.yaml"), *more, status=status)

    return call


def report(tmp_path) -> dict:
    return json.loads((tmp_path / "out/report.json").read_text())


def test_a_server_with_other_tags_that_quotes_the_repair_request_makes_no_pairs(build, tmp_path):
    """Once all ten became "and", the word between the two tags that the request names."""
    shown = build(revising(lambda asked: asked if "cannot be used" in asked else "<answer>Blue.</answer>"), status=1)
    assert "Kept 0 of 10" in shown.out
    assert report(tmp_path)["dropped"] == {"malformed": 10}
    assert report(tmp_path)["repairs"] == {"reviser": 10}
    assert "22 requests in all runs (10 to repair a malformed reply)" in shown.out
    assert "10 replies of the reviser were malformed" in (tmp_path / "out/README.md").read_text()
    assert not any("apo-trl train" in line for line in shown.lines)
    assert shown.lines[-1].endswith(f"apo-trl pairs show {tmp_path / 'out'} --reason malformed")


def test_one_word_is_no_revision_of_a_paragraph(build, tmp_path):
    build(revising(lambda asked: "<revision>\nand\n</revision>"), status=1)
    assert report(tmp_path)["dropped"] == {"length_ratio": 10}


@pytest.mark.parametrize(
    ("reply", "keys", "words"),
    [
        (lambda asked: "no tags", {}, r"10 of 10 .* malformed: .*reviser_model \(now reviser-model\)"),
        (
            lambda asked: {"content": "<revision>x", "finish_reason": "length"},
            {"reviser_max_tokens": 77},
            r"10 of 10 .* reviser_truncated: .*Raise reviser_max_tokens \(now 77\)",
        ),
        (
            lambda asked: f"<revision>\n{DRAFT * 9}\n</revision>",
            {"max_length_ratio": 3},
            r"10 of 10 .* length_ratio: .*Raise max_length_ratio \(now 3.0\)",
        ),
        (lambda asked: f"<revision>\n{DRAFT * 2}\n</revision>", {}, r"unchanged: .*reviser_temperature \(now 0.7\)"),
    ],
)
def test_an_empty_build_says_why_and_what_to_change(build, tmp_path, reply, keys, words):
    shown = build(revising(reply), status=1, **keys)
    assert any(re.search(words, line) for line in shown.lines), shown.out
    assert ".." not in shown.out
    assert re.search(words, (tmp_path / "out/README.md").read_text())
    assert "**Empty:**" in (tmp_path / "out/README.md").read_text()
    assert [line for line in shown.lines if "apo-trl " in line] == shown.lines[-1:]  # one next command


def test_a_build_that_keeps_few_says_the_commonest_reason_and_one_that_keeps_most_does_not(build, tmp_path):
    good = f"<revision>\n{DRAFT * 2}It is blue at noon.\n</revision>"
    few = revising(lambda asked: good if re.search("What is [012] ", asked) else "no tags")
    shown = build(few)
    assert "Kept 3 of 10" in shown.out
    assert "7 of 10 rows were dropped as malformed" in shown.out
    assert "apo-trl pairs show" in shown.lines[-1]
    assert "**Empty:**" not in (tmp_path / "out/README.md").read_text()
    shown = build(revising(lambda asked: good if "What is 9 " not in asked else "no tags"), reviser_temperature=0.5)
    assert "Kept 9 of 10" in shown.out
    assert "rows were dropped as" not in shown.out
    assert shown.lines[-1] == f"Train on them: apo-trl train RECIPE --dataset_name {tmp_path / 'out'}"


def test_a_build_of_other_answers_says_so(build, tmp_path):
    rows = [row | {"response": "A river."} for row in numbered(10)]
    shown = build(revising(lambda asked: "<revision>\nNo, two hills!\n</revision>"), rows=rows)
    assert "Kept 10 of 10" in shown.out
    assert "10 of 10 revisions share almost nothing with the answer" in shown.out
    assert shown.lines[-1].endswith("--reason kept")
    assert "share almost nothing" in (tmp_path / "out/README.md").read_text()
    shown = build(revising(lambda asked: "<revision>\nA long river.\n</revision>"), rows=rows, seed=1)
    assert "share almost nothing" not in shown.out


def test_every_reason_has_a_remedy_whose_settings_exist():
    keys = {"method": "clair", "prompts": "p", "output_dir": "o", "reviser_model": "r", "policy_model": "p"}
    settings = make_settings(keys | {"judge_model": "j", "stronger_model": "s"})
    every = [make_settings(keys | {"method": method, "judge_model": "j", "stronger_model": "s"}) for method in (
        "judge_then_clair", "stronger_preferred")]  # fmt: skip
    for reason, (why, what) in REASONS.items():
        assert why, reason
        assert what.endswith("."), reason
        named = re.findall(r"\b[a-z]+_[a-z_]+\b", what)
        shown = " ".join(remedy(reason, settings) for settings in every)
        assert all(f"{name} (now " in shown for name in named), reason
    assert remedy("prompt_fills_max_length", settings) == "Raise max_length (now null), or leave long prompts out."
    assert {"not_asked", "not_answered", "judge_error"} < WAITING < set(REASONS)
    assert commonest({"not_asked": 9, "tie": 2, "refused": 3}) == "refused"
    assert commonest({"policy_error": 9}) == ""


# ----- the replies of rows


def test_replies_of_rows_are_shown_without_a_server(build, tmp_path, capfd):
    folder = tmp_path / "out"
    odd = "\x1b[2Jodd <answer>Blue.</answer>"
    build(revising(lambda asked: odd if "What is 3 " in asked else f"<revision>\n{DRAFT * 2}Yes.\n</revision>"))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for place in (folder, folder / "report.json"):
        shown = ends(capfd, "show", str(place), "--reason", "malformed")
        assert "row3: malformed: it has no revised answer" in shown.lines[0]
        assert shown.lines[1] == "  prompt: What is 3 + 3?"
        assert shown.out.count("  reviser (reviser-model):") == 2  # and its repair
        assert DRAFT in shown.out
        assert "odd <answer>Blue.</answer>" in shown.out
        assert "\x1b" not in shown.out
    assert ends(capfd, "show", str(folder), "--reason", "kept", "--limit", "2").out.count(": kept\n") == 2
    counts = ends(capfd, "show", str(folder)).out
    assert re.search(r"^ +9 kept\n +1 malformed +the reviser's reply", counts)
    unknown = ends(capfd, "show", str(folder), "--reason", "malfromed", status=2)
    assert re.search("--reason: .*Did you mean 'malformed'.*kept, malformed", unknown.err)
    assert ends(capfd, "show", str(tmp_path), status=2).err.startswith(f"error: {tmp_path}: no store.sqlite")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_row_shows_its_own_replies_only_also_if_shared_or_replaced(build, tmp_path, capfd):
    rows = [
        {"id": "a", "prompt": "Why?", "responses": ["one"]},
        {"id": "b", "prompt": "Why?", "responses": ["one", "x"]},
    ]
    build(revising(lambda asked: "first"), status=1, rows=rows)
    build(revising(lambda asked: "second"), status=1, rows=rows, seed=1)
    shown = ends(capfd, "show", str(tmp_path / "out"), "--reason", "malformed").out
    assert shown.count("    | second") == 4  # two rows, each with its repair, by the same two requests
    assert "first" not in shown


def test_pairs_that_training_would_lose_are_shown_too(build, tmp_path, model_dir, capfd):
    more = {"tokenizer": str(model_dir), "max_length": 40}
    build(revising(lambda asked: f"<revision>\n{DRAFT * 2}Yes.\n</revision>"), status=1, **more)
    (reason,) = report(tmp_path)["dropped"]
    assert reason in ("identical_after_truncation", "prompt_fills_max_length")
    assert "row0: " in ends(capfd, "show", str(tmp_path / "out"), "--reason", reason).out


# ----- servers that cannot be reached


@pytest.fixture
def no_tls():
    """A server that answers everything with an error of HTTP without TLS."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(999)
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")

    thread = threading.Thread(target=serve)
    thread.start()
    yield f"https://127.0.0.1:{listener.getsockname()[1]}/v1"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("refused", "connection refused. Start the server, or correct policy_base_url"),
        ("unknown", "unknown host name. Correct policy_base_url"),
        ("tls", "TLS failed. Write http:// in policy_base_url"),
        ("silent", r"no response within 0\.3 s. Raise policy_timeout"),
        ("path", r"status 404: .* End policy_base_url in /v1"),
        ("key", r"status 401: .* Set policy_api_key_env"),
    ],
)
def test_a_server_that_cannot_be_used_is_named_with_the_remedy(build, no_tls, place, words):
    with ChatServer(key="k" if place == "key" else None) as server, socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        urls = {
            "refused": "http://127.0.0.1:9/v1", "unknown": "http://no-such-host.invalid/v1", "tls": no_tls,
            "silent": f"http://127.0.0.1:{port}/v1", "path": server.url.removesuffix("/v1"), "key": server.url,
        }  # fmt: skip
        more = {"policy_max_retries": 0, "policy_timeout": 0.3 if place == "silent" else 30}
        shown = build(urls[place], status=1, **more)
    assert "Kept" not in shown.out
    (line,) = [line for line in shown.err.splitlines() if line.startswith("Stopped early: ")]
    assert line.startswith(f"Stopped early: policy_base_url: {urls[place]} with policy_model ")
    assert re.search(words, line), line


# ----- the estimate and the progress


def test_an_estimate_of_a_folder_that_cannot_be_written(build, tmp_path, capfd, monkeypatch):
    build(revising(lambda asked: f"<revision>\n{DRAFT * 2}Yes.\n</revision>"), rows=numbered(3))
    monkeypatch.setattr("os.access", lambda path, mode: False)  # as for anybody but root
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    shown = build(revising(str), "--dry_run", rows=numbered(5))
    assert re.search(r"^role +requests +repairs ", shown.out)
    assert re.search(r"policy +2 +0 .*\nreviser +2 +2 ", shown.out)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    with open_read_only(tmp_path / "out") as cache:
        assert cache.path.parent != tmp_path / "out"


def test_the_time_left_counts_from_the_first_request_and_no_cached_row(monkeypatch):
    now, limits = [100.0], SimpleNamespace(answered=0, tokens=0, cost=0)
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress = Progress(30)
    progress._limits = limits
    left = lambda: [fact for fact in progress._facts(limits) if fact.startswith("left")]  # noqa: E731
    for _ in range(10):
        progress.ended("")  # out of the cache
    assert left() == []
    now[0], limits.answered = 160.0, 8
    for _ in range(8):  # a batch of a model in this process: all at once, after a minute
        progress.ended("")
    assert left() == ["left 0:01:30"]
    for _ in range(12):
        progress.ended("")
    assert left() == []
