"""The one reading of a reply: thoughts, finish reasons, and any JSON that a server can send."""

import asyncio
import contextlib
import json
import math
import re
import time
from collections import Counter
from functools import partial

import chat_server
import pytest
from chat_server import ChatServer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pairs_build import numbered, pairs, prompts, run, text  # noqa: F401  (a fixture among them)

from apo_trl.evaluation.anchor import anchor
from apo_trl.evaluation.compare import compare
from apo_trl.pairs.batch import export_batch, import_batch
from apo_trl.pairs.build import build, each_row
from apo_trl.pairs.config.settings import make_settings
from apo_trl.pairs.judging import parse_score, parse_verdict
from apo_trl.pairs.llm.reply import choices_of, open_thoughts, read_reply, usage_of
from apo_trl.pairs.llm.requests import RequestFailed
from apo_trl.pairs.llm.response_cache import ResponseCache
from apo_trl.pairs.llm.servers import Servers
from apo_trl.pairs.prompts import PromptSource
from apo_trl.pairs.text.reasons import REASONS
from apo_trl.pairs.text.revisions import Malformed, parse_revision

THOUGHT = "Thinking of [[B]], [[1]], I'm sorry, but I can't help, <revision>no</revision>."
HARMONY = "<|channel|>analysis<|message|>{0}<|end|><|start|>assistant<|channel|>final<|message|>{1}<|return|>"
CONTENTS = {
    "think": "<think>\n{0}\n</think>\n\n{1}",
    "end only": "{0}\n</think>\n\n{1}",
    "end only, begin and end in its prose": "{0} As in <think>x</think>, or </think>.\n</think>\n{1}",
    "end only, after a fenced one": "```\n</think>\n```\n{0}\n</think>\n{1}",
    "end quoted in the thoughts": '<think>{0} As in `</think>` and "</think>".\n</think>{1}',
    "end before quotes": "<think>Use `x`, {0}</think>{1}",
    "byte order mark": "\ufeff<think>{0}</think>{1}",
    "Hunyuan": "<think>\n{0}\n</think>\n<answer>\n{1}\n</answer>",
    "ERNIE": "\n{0}\n</think>\n\n<response>\n{1}\n</response>\n",
    "twice": "<think>{0}</think>\n<think>{0}</think>\n{1}",
    "end twice": "<think>{0}</think>\n</think>\n{1}",
    "EXAONE": "<thought>\n{0}\n</thought>\n\n{1}",
    "Seed-OSS": "<seed:think>{0}</seed:think>{1}",
    "Magistral": "[THINK]{0}[/THINK]{1}",
    "Kimi": "◁think▷{0}◁/think▷{1}",
    "Command A": "<|START_THINKING|>{0}<|END_THINKING|><|START_RESPONSE|>{1}<|END_RESPONSE|>",
    "Gemma 4": "<|channel>thought\n{0}\n<channel|>{1}",
    "Granite 3.2": "Here is my thought process:\n\n{0}\n\nHere is my response:\n\n{1}",
    "harmony": HARMONY,
    "harmony, two thoughts": HARMONY.format("{0}", "").replace("final", "commentary") + HARMONY,
    "harmony, special tokens hidden": "analysis{0}assistantfinal{1}",
    "harmony, some hidden": "<|channel|>analysis<|message|>{0}assistant<|channel|>final<|message|>{1}",
}
FIELDS = {
    "reasoning_content": lambda answer: {"content": answer, "reasoning_content": THOUGHT},
    "reasoning": lambda answer: {"content": answer, "reasoning": THOUGHT},
    "parts": lambda answer: {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": THOUGHT}]},
                                         {"type": "text", "text": answer[:3]}, {"type": "text", "text": answer[3:]}]},
    "reasoning part": lambda answer: {"content": [{"type": "reasoning", "text": THOUGHT},
                                              {"type": "text", "text": answer}]},
    "other parts": lambda answer: {"content": [{"type": "reasoning_text", "text": THOUGHT},
        {"type": "redacted_thinking", "data": "x"}, {"type": "output_text", "text": answer},
        {"type": "reference", "reference_ids": [1]}]},
    "blank lines": lambda answer: {"content": f"\n \n{answer}", "reasoning": THOUGHT},
}  # fmt: skip
FORMS = {name: partial(lambda form, answer: {"content": form.format(THOUGHT, answer)}, form)
         for name, form in CONTENTS.items()} | FIELDS  # fmt: skip


def body(message=None, finish="stop", **more):
    return {"choices": [{"message": message, "finish_reason": finish}]} | more


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("answer", ["Four.", "    x = 4\n    y = 5", "Not <think> but </think>, or [THINK]."])
def test_thoughts_are_taken_off(form, answer):
    reply = read_reply(body(form(answer)))
    assert (reply.text, reply.finish, reply.fault) == (answer, "stop", "")
    assert THOUGHT in reply.thoughts


@pytest.mark.parametrize(
    "content",
    [
        "Models write <think> first, then </think>.", "Put `</think>` at the end.", "x.split('</think>')[-1]",
        "'</think>\\n'", "Open [THINK] and close [/THINK].", "Here is my thought process: first, second.",
        "analysis of a poem", "  indented\n", "<thinking>Hm.</thinking>", "<reasoning>a</reasoning>b",
        "Use <|channel|>.",
        "`<think>` begins it.", "", "<think> is a tag that models emit.", "[THINK]Hm",
        "The block ends with </think> and then", "re.sub(r'(?s).*</think>\\s*', '', text)\nDone.",
        "s = f'{think}</think>{answer}'\nDone.", "<a>\n  </think>\n</a>", "```\n</think>\n```\nis it",
        "Hm.</think>Four.", "Use </think>.\nThen:\n", "</think> ends it.", "<response>a</response>", "a<|end|>",
        "analysis of data\n\nassistantfinal", "analysisResult = 1", "<|channel|>final is a name.",
    ],
)  # fmt: skip
def test_an_answer_about_thoughts_stays_whole(content):
    assert read_reply(body({"content": content}))[::3] == (content, "")


@pytest.mark.parametrize(
    "content", ["<think>\nHm, [[A]]", "<think>", "<|channel|>analysis<|message|>Hm", "  <think>\n", "Hm.\n</think>\n"]
)
def test_thoughts_without_an_answer_are_empty(content):
    reply = read_reply(body({"content": content}))
    assert (reply.text.strip(), reply.fault) == ("", "empty")


def test_a_reply_that_was_cut_in_its_thoughts():
    assert read_reply(body({"content": "<think>Hm, [[A]]"}, "length"))[::3] == ("", "Hm, [[A]]")


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ("<think>a</think>It is </think>.", "It is </think>."), ("<think>a</think>\n<think> opens.", "<think> opens."),
        ("<think>the 'x'</think>'x' is it", "'x' is it"), ("<think>a</think>\\[x\\]", "\\[x\\]"),
        (HARMONY.format("a", "Use <|channel|>final<|message|>."), "Use <|channel|>final<|message|>."),
        ("<think>a</think>A turn ends with <|end|>", "A turn ends with <|end|>"),
        ("<think>a</think><answer>b</answer> or <answer>c</answer>", "<answer>b</answer> or <answer>c</answer>"),
    ],
)  # fmt: skip
def test_an_answer_after_thoughts_keeps_its_marks(content, answer):
    assert read_reply(body({"content": content})).text == answer


@pytest.mark.parametrize(
    "content", ["<think>a</think>x{0}y", "<think>a</think>x{1}y", "{0}x", "{2}x", "{3}x", "{4}", "<think>{5}", "{6}"]
)
def test_a_long_reply_is_read_at_once(content):
    n = 60_000
    pieces = ("\n" * n, " " * n, "<think></think>" * n, "</think>" * n, "analysis" * n, "\n</think>" * n,
              "```\n" + "</think>\n" * n)  # fmt: skip
    start = time.perf_counter()
    read_reply(body({"content": content.format(*pieces)}))
    assert time.perf_counter() - start < 0.5


def test_what_a_server_has_separated_keeps_its_text():
    message = {"content": "Close it by </think> in the text.", "reasoning_content": "Hm."}
    assert read_reply(body(message)).text == message["content"]
    message["content"] = "<think>Hm.</think> is XML.\n</think>\n"
    assert read_reply(body(message)).text == message["content"]


@pytest.mark.parametrize(
    "content", ["<think>\n\n</think>\n\nFour.", HARMONY.format("", "Four.").partition("assistant")[2]]
)
def test_an_empty_thought_is_none(content):
    assert read_reply(body({"content": content}))[::3] == ("Four.", "")


@pytest.mark.parametrize(
    ("reason", "fault"),
    [
        (word, "")
        for word in (
            "stop",
            "eos",
            "EOS_TOKEN",
            "end_turn",
            "stop_sequence",
            "STOP ",
            "COMPLETE",
            "done",
            "finished",
            "FINISH_REASON_STOP",
        )
    ]
    + [(word, "truncated") for word in ("length", "max_tokens", "MAX_TOKENS", "model_length")]
    + [
        (word, "filtered")
        for word in ("content_filter", "SAFETY", "REFUSAL", "recitation", "PROHIBITED_CONTENT", "blocklist", "spii")
    ]
    + [(word, "unfinished") for word in ("tool_calls", "pause", ["stop"], {"type": "stop"}, 7, True, "\ud800")],
)
def test_finish_reasons(reason, fault):
    reply = read_reply(body({"content": "x"}, reason))
    assert (reply.fault, reply.refused) == (fault, reason == "REFUSAL")
    assert reply.finish.encode()


@pytest.mark.parametrize(
    ("content", "usage", "limit", "fault"),
    [
        ("four", {"completion_tokens": 3}, 10, ""), ("four", {"completion_tokens": 10}, 10, "unfinished"),
        ("four", {}, 10, ""), ("x" * 10, None, 10, "unfinished"), ("x" * 999, None, None, ""), ("", {}, 10, "empty"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("reason", [None, ""])
def test_a_server_without_finish_reasons(content, usage, limit, fault, reason):
    assert read_reply(body({"content": content}, reason, usage=usage), limit).fault == fault


@pytest.mark.parametrize("inner", ["y " * 900, [{"type": "text", "text": "y " * 900}]])
def test_thoughts_in_parts_count_without_a_finish_reason(inner):
    message = {"content": [{"type": "thinking", "thinking": inner}, {"type": "text", "text": "It is"}]}
    assert read_reply(body(message, None), 1000).fault == "unfinished"


def test_parts_without_a_type():
    assert read_reply(body({"content": ["It is ", None, {"type": "text", "text": "four."}]})).text == "It is four."


def test_a_refusal_part_is_a_refusal():
    assert read_reply(body({"content": [{"type": "refusal", "refusal": "No."}]})).refused


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 3, "completion_tokens": 5}, (3, 5)), ({"prompt_tokens": 3.0}, (3, 0)), ([], (0, 0)),
        ({"prompt_tokens": 10**400, "completion_tokens": math.inf}, (0, 0)), ({"prompt_tokens": -1}, (0, 0)),
        ({"input_tokens": 3, "output_tokens": 5}, (3, 5)),
        ({"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 108}, (3, 105)),
        ({"completion_tokens": 5, "completion_tokens_details": {"reasoning_tokens": 100}}, (0, 105)),
        ({"completion_tokens": 5, "completion_tokens_details": {"reasoning_tokens": 4}}, (0, 5)),
        ({"completion_tokens": 5, "total_tokens": 8, "completion_tokens_details": []}, (0, 5)),
        ({"prompt_tokens": "3", "completion_tokens": math.nan}, (0, 0)), (None, (0, 0)),
    ],
)  # fmt: skip
def test_usage(usage, expected):
    assert usage_of({"usage": usage}) == expected


def test_the_thoughts_that_a_chat_template_begins():
    assert open_thoughts("<|im_start|>assistant\n<think>\n") == "<think>\n"
    assert open_thoughts("<think>\n\n</think>\n\n") == ""


# Any JSON.


@pytest.mark.parametrize(
    "content", [5, True, {"text": "x"}, [5], [{"text": "x"}], [["x"]], [{"type": "text", "text": 5}],
                [{"type": ["text"]}], [{"type": "text", "text": "See:"}, {"type": "image_url", "image_url": "x"}]],
)  # fmt: skip
def test_content_that_is_not_text_is_no_answer(content):
    assert read_reply(body({"content": content})).fault == "unfinished"


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
    | st.sampled_from([10**400, "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5,
)  # fmt: skip
PIECES = ["<think>", "</think>", "[/THINK]", "<|channel|>", "final<|message|>", "[[A]]", "[[B]]", "[[7]]", "[[", "four",
          "<revision>", "</revision>", "\n", "I can't help with that.", "\ud800",
          "Here is my thought process:"]  # fmt: skip
said = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)


def near(**fields):
    """Objects with these fields, of which each may be missing or junk."""
    return st.fixed_dictionaries({}, optional={name: field | junk for name, field in fields.items()})


parts = near(type=st.sampled_from(["text", "thinking", "refusal", "image_url"]), text=said, thinking=said)
messages = near(content=said | st.lists(parts | said, max_size=3), reasoning_content=said, refusal=said | st.none())
words = st.sampled_from(["stop", "STOP", "length", "content_filter", "tool_calls", None])
choices = near(message=messages, finish_reason=words, logprobs=junk, index=st.just(0))
counts = near(prompt_tokens=st.integers(), completion_tokens=st.integers())
whole = st.sampled_from(
    ["It is four.", "four", "So: [[A]]", "So: [[B]]", "[[2]]", "[[9]]", "<revision>\n4.\n</revision>"]
)
good = whole.map(lambda text: body({"content": text}))
bodies = st.one_of(
    said.map(lambda text: body({"content": text})),
    st.lists(choices, min_size=1, max_size=2).map(lambda given: {"choices": given}),
    near(choices=st.lists(choices | junk, max_size=2), usage=counts),
    junk,
)


@pytest.fixture(scope="module")
def methods(tmp_path_factory):
    """Recipes of four methods, and a cache."""
    folder = tmp_path_factory.mktemp("any")
    (folder / "rows.jsonl").write_text('{"prompt": "2 + 2?"}\n')
    keys = {"base_url": "http://127.0.0.1:9/v1", "model": "m", "output_price": 3.0}
    roles = {f"{role}_{key}": keys[key] for role in ("policy", "reviser", "judge", "stronger") for key in keys}
    keys = roles | {"prompts": str(folder / "rows.jsonl"), "output_dir": str(folder / "out"), "concurrency": 2}
    four = ({"method": "clair"}, {"method": "stronger_preferred"}, {"method": "judge_then_clair"},
               {"method": "on_policy_judge", "judge_protocol": "pointwise"})  # fmt: skip
    with ResponseCache(folder / "out") as store:
        yield [make_settings(keys | method) for method in four], store


@settings(max_examples=500, deadline=None, derandomize=True)
@given(sent=st.lists(good | bodies, min_size=1, max_size=6), kind=st.integers(0, 3), probe=good | bodies)
def test_any_json_is_an_answer_or_a_named_drop(methods, sent, kind, probe):
    for sent_body in sent:
        reply = read_reply(sent_body)
        assert reply.text.encode() or not reply.text
        assert (reply.fault == "") == (reply.finish == "stop" and bool(reply.text.strip()))
        assert parse_verdict(reply.text) in (None, "A", "B", "TIE")
        assert parse_score(reply.text) is None or 1 <= parse_score(reply.text) <= 10
        assert all(0 <= count < 1e8 for count in usage_of(sent_body))
        with contextlib.suppress(Malformed):
            parse_revision(reply.text)
    recipe, store, turn = methods[0][kind], methods[1], iter(range(10**6))

    class Backend:
        async def complete(self, role, request):
            is_probe = "random number" in request["messages"][0]["content"]
            answer = json.loads(json.dumps(probe if is_probe else sent[next(turn) % len(sent)]))
            if not choices_of(answer):  # as `_require_completion`
                raise RequestFailed("the response is not a chat completion")
            return answer

    async def one_row():
        servers, ends = Servers(recipe, store, lambda line: None), []
        servers._backend = lambda role: Backend()
        await each_row(recipe, iter(PromptSource(recipe)), servers.requester, ends.append)
        return ends

    store._base.execute("DELETE FROM replies")
    (end,) = asyncio.run(one_row())
    assert end.reason in {"", *REASONS}
    store.end_row(0, "1", reason=end.reason, detail=end.detail, pair="", notes=json.dumps(end.notes))
    if end.result:
        assert end.result.chosen.text.strip()
        assert end.result.chosen.text != end.result.rejected.text


# Whole runs.


def thinker(form, says=None):
    """A server on which every reply has thoughts, in one form; `says` answers what is sampled."""

    def reply(body):
        last = body["messages"][-1]["content"]
        if "<revision>" in last:
            return form("<reasoning>\nclearer\n</reasoning>\n<revision>\nIt is four, clearly.\n</revision>")
        if "[[A]]" in last:
            return form(f"So. [[{'A' if '<answer_a>' in last and 'five' in last.split('</answer_a>')[0] else 'B'}]]")
        if "[[7]]" in last:
            return form(f"So. [[{9 if 'five' in last else 2}]]")
        reply.samples[body["model"], last] += 1
        return form((says or "It is {}.").format("four" if reply.samples[body["model"], last] % 2 else "five"))

    reply.samples = Counter()
    return reply


METHODS = {
    "clair": ({"policy": 3, "reviser": 3}, ("It is four, clearly.", "It is four.")),
    "stronger_preferred": ({"policy": 3, "stronger": 3}, ("It is four!", "It is four.")),
    "on_policy_judge": ({"policy": 6, "judge": 6}, ("It is five.", "It is four.")),
    "pointwise": ({"policy": 6, "judge": 6}, ("It is five.", "It is four.")),
}


@pytest.mark.parametrize(("method", "form"), [("clair", form) for form in FORMS] + [
    (method, form) for method in METHODS for form in ("think", "parts") if method != "clair"
])  # fmt: skip
def test_no_thoughts_are_written_and_all_are_counted(prompts, tmp_path, method, form):  # noqa: F811
    thoughts, expected = METHODS[method]
    answer = thinker(FORMS[form])
    replies = lambda body: (  # noqa: E731
        FORMS[form]("It is four!") if body["model"] == "stronger-model" else answer(body)
    )
    keys = {"method": method}
    if method == "pointwise":
        keys = {"method": "on_policy_judge", "judge_protocol": "pointwise"}
    with ChatServer(replies) as server:
        report = run(server, prompts(numbered(3)), tmp_path / "out", **keys).report
        assert report["kept"] == 3, report["dropped"]
        assert {(text(row["chosen"]), text(row["rejected"])) for row in pairs(tmp_path / "out")} == {expected}
        assert report["thoughts"] == thoughts
        sent = server.count
        assert not any("Thinking of" in json.dumps(body) for body in server.bodies)
        again = run(server, prompts(numbered(3)), tmp_path / "out", **keys).report
        assert (again, server.count) == (report, sent)
    for name in ("pairs.jsonl", "README.md", "report.json"):
        assert "Thinking of" not in (tmp_path / "out" / name).read_text(encoding="utf-8")
    with ResponseCache(tmp_path / "out") as store:  # the bodies stay as they came
        kept = store._base.execute("SELECT count(*) FROM replies WHERE body LIKE '%Thinking of%'").fetchone()
    assert kept[0] >= sum(thoughts.values())


@pytest.mark.parametrize("form", ["think", "end only", "harmony", "reasoning_content", "parts"])
def test_a_refusal_after_thoughts_is_a_refusal(prompts, tmp_path, form):  # noqa: F811
    refuse = lambda body: (  # noqa: E731
        FORMS[form]("I'm sorry, but I can't help with that.") if body["model"] != "policy-model" else "Fine."
    )
    for method, reason in (("stronger_preferred", "stronger_refused"), ("clair", "refused")):
        with ChatServer(refuse) as server:
            report = run(server, prompts(numbered(2)), tmp_path / method, method=method).report
        assert report["dropped"] == {reason: 2}


@pytest.mark.parametrize(("protocol", "verdict"), [("pairwise", "[[A]]"), ("pointwise", "[[7]]")])
def test_a_verdict_in_the_thoughts_is_none(prompts, tmp_path, protocol, verdict):  # noqa: F811
    row = {"prompt": "Which?", "responses": ["first", "second"]}
    with ChatServer(lambda body: f"<think>{verdict}</think>I cannot decide.") as server:
        keys = {"method": "on_policy_judge", "judge_protocol": protocol}
        report = run(server, prompts([row]), tmp_path / "out", **keys).report
        assert server.count == 2 + 2 * 2  # each with a repair request
        assert server.bodies[-1]["messages"][-2]["content"] == "I cannot decide."
    assert report["dropped"] == {"judge_invalid": 1}


def test_compare_and_anchor_read_replies_alike(prompts, tmp_path):  # noqa: F811
    with ChatServer(thinker(FORMS["think"])) as server:
        keys = {f"{role}_base_url": server.url for role in ("policy", "judge")} | {"judge_model": "judge"}
        keys |= {"prompts": prompts(numbered(2))}
        both = {"method": "off_policy_judge", "policy_model": ["a", "b"], "output_dir": str(tmp_path / "compare")}
        report = compare(make_settings(keys | both))
        assert report["thoughts"] == {"policy": 4}  # the answers are the same: a tie without a judge
        assert (report["ties"], report["rows"][0]["a_length"]) == (2, len("It is four."))
        one = {"method": "on_policy_judge", "policy_model": "a", "output_dir": str(tmp_path / "anchor")}
        row = {"prompt": "Which?", "chosen": "It is five.", "rejected": "It is six."}
        report = anchor([row], [0], make_settings(keys | one))
    assert (report["answers"], report["outcomes"]) == ({0: "It is four."}, {0: "first"})
    assert report["thoughts"] == {"policy": 1, "judge": 4}


def test_batch_files_are_read_alike(prompts, tmp_path):  # noqa: F811
    keys = {"method": "clair", "prompts": prompts(numbered(1)), "output_dir": str(tmp_path / "out")}
    keys |= {
        f"{role}_{key}": "http://127.0.0.1:9/v1" for role in ("policy", "reviser") for key in ("model", "base_url")
    }
    settings, answer = make_settings(keys), thinker(FORMS["think"])
    for _ in range(2):
        with ResponseCache(settings.folder) as store:
            (path,) = export_batch(settings, store)
            request = json.loads(path.read_text())
            choice = {"message": answer(request["body"]), "finish_reason": "eos_token"}
            lines = [{"custom_id": request["custom_id"], "response": {"body": {"choices": [choice]}}}]
            failed = lines[0] | {"response": {"body": {"choices": [choice | {"finish_reason": "error"}]}}}
            lines = [failed, *lines, {"custom_id": "\ud800", "response": []}]
            lines += [lines[0] | {"response": {"body": {"choices": {}}}}]
            (tmp_path / "done").write_text("\n".join([*map(json.dumps, lines), "[" * 10**5]))
            counts = import_batch(settings, store, [str(tmp_path / "done")])
            assert counts == {"failed": 1, "imported": 1, "unknown custom_id": 1, "imported before": 1, "unreadable": 1}
    report = build(settings).report
    assert (report["kept"], report["thoughts"]) == (1, {"policy": 1, "reviser": 1})


def test_a_server_without_finish_reasons_is_used(prompts, tmp_path):  # noqa: F811
    answer = thinker(FORMS["think"])
    with ChatServer(lambda body: answer(body) | {"finish_reason": None}, honours={"n"}) as server:
        report = run(server, prompts(numbered(2)), tmp_path / "out", method="on_policy_judge").report
        sent = [body for body in server.bodies if "random number" not in str(body)]
        assert not any("n" in body for body in sent), "the usage of two samples is one sum"
        assert report["kept"] == 2
        report = run(server, prompts(numbered(2)), tmp_path / "cut", policy_max_tokens=9).report  # their length is 13
    assert report["dropped"] == {"policy_unfinished": 2}


FAILED = {
    "[" * 10**5: "not a chat completion",
    '{"choices": {"0": {}}}': "",
    '{"choices": [[]]}': "",
    "9" * 5000: "",
    '"\\ud800"': "",
    '{"error": {"message": "No credits", "code": 402}}': "No credits",
    '{"choices": [{"message": {"content": ""}, "finish_reason": "stop", "error": "Overloaded"}]}': "Overloaded",
    '{"choices": [{"message": {"content": "x"}, "finish_reason": "error"}]}': "finish_reason error",
    '{"choices": [{"message": {"content": "x"}, "finish_reason": "ABORT"}]}': "finish_reason abort",
    '{"choices": [{"delta": {"content": "x"}, "finish_reason": "stop"}]}': "not a chat completion",
    '{"choices": [{"text": "x", "finish_reason": "stop"}]}': "not a chat completion",
}


@pytest.mark.parametrize(("body", "message"), FAILED.items())
def test_a_response_of_another_shape_is_a_failed_request(prompts, tmp_path, monkeypatch, body, message):  # noqa: F811
    with ChatServer(lambda request: "x") as server:
        run(server, prompts(numbered(1)), tmp_path / "out")  # with the probes
        monkeypatch.setitem(chat_server.REPLIES, "html", (200, body.encode()))
        server.faults = lambda number, request: "html"
        report = run(server, prompts([{"prompt": "New?"}]), tmp_path / "out", policy_max_retries=0).report
        assert report["dropped"] == {"policy_error": 1}
        assert message in report["examples"]["policy_error"][0]["detail"]
        server.faults = lambda number, request: None
        report = run(server, prompts([{"prompt": "New?"}]), tmp_path / "out").report
    assert report["dropped"] == {"malformed": 1}, "the failure was cached"


# Replies that are all dropped.

CUT = {"content": "half", "finish_reason": "length"}
ALL_DROPPED = {
    "policy": ("clair", "policy-model", CUT, "policy_truncated .*Raise policy_max_tokens"),
    "reviser": (
        "clair",
        "reviser-model",
        {"content": "no tags"},
        "reviser_model: the replies to the first 20 rows were all dropped as malformed",
    ),
    "stronger": ("stronger_preferred", "stronger-model", {"content": None}, "stronger_model: .*stronger_empty"),
    "judge": ("on_policy_judge", "judge-model", CUT, "judge_truncated .*Raise judge_max_tokens"),
    "unknown": ("clair", "policy-model", {"content": "x", "finish_reason": "pause"}, "finish_reason pause"),
}


@pytest.mark.parametrize(("method", "model", "reply", "message"), ALL_DROPPED.values(), ids=ALL_DROPPED)
def test_replies_that_are_all_dropped_stop_the_run(prompts, tmp_path, method, model, reply, message):  # noqa: F811
    answer = thinker(lambda text: {"content": text})
    source, keys = prompts(numbered(120)), {"method": method, "concurrency": 4}
    with ChatServer(lambda body: reply if body["model"] == model else answer(body), latency=0.001) as server:
        result = run(server, source, tmp_path / "out", **keys)
        assert result.broken
        assert re.search(message, result.stopped)
        assert server.count < 120
        assert result.report["asked"] == 120
        sent = server.count
        again = run(server, source, tmp_path / "out", **keys)
        assert (again.stopped, server.count) == (result.stopped, sent), "the cached replies stop the run again"
        more = {"max_failures": 1000}
        assert not run(server, source, tmp_path / "out", **keys | more).stopped
        assert server.count > 120


def test_a_changed_setting_goes_on_after_replies_that_were_all_dropped(prompts, tmp_path):  # noqa: F811
    answer = thinker(lambda text: {"content": text})
    cut = lambda body: CUT if body["max_tokens"] < 100 else answer(body)  # noqa: E731
    with ChatServer(cut) as server:
        source, short = prompts(numbered(60)), {"policy_max_tokens": 50, "concurrency": 4}
        assert "policy_truncated" in run(server, source, tmp_path / "out", **short).stopped
        result = run(server, source, tmp_path / "out", **short | {"policy_max_tokens": 200})
    assert (result.stopped, result.report["kept"]) == ("", 60)


def test_samples_that_are_cut_in_their_thoughts_are_not_sampled_again(prompts, tmp_path):  # noqa: F811
    numbers = iter(range(9))
    cut = lambda body: {"content": f"<think>Hm, {next(numbers)}", "finish_reason": "length"}  # noqa: E731
    with ChatServer(cut) as server:
        report = run(server, prompts(numbered(1)), tmp_path / "out", method="on_policy_judge").report
        assert (report["dropped"], server.count) == ({"policy_truncated": 1}, 2 + 2)


def test_some_good_replies_among_many_dropped_ones_stop_nothing(prompts, tmp_path):  # noqa: F811
    answer = thinker(lambda text: {"content": text})
    cut = lambda body: answer(body) if "What is 3 " in str(body) or "random" in str(body) else CUT  # noqa: E731
    with ChatServer(cut) as server:
        result = run(server, prompts(numbered(60)), tmp_path / "out", concurrency=4)
    assert (result.stopped, result.report["dropped"]) == ("", {"policy_truncated": 59})


def test_a_row_counts_once_and_rows_without_a_role_never(prompts, tmp_path):  # noqa: F811
    answer = thinker(lambda text: {"content": text})
    numbers = iter(range(10**6))
    cut = lambda body: CUT | {"content": f"{next(numbers)}"} if "Hard" in str(body) else answer(body)  # noqa: E731
    easy = [{"prompt": f"What is {number} + 1?"} for number in range(9)]
    with ChatServer(cut) as server:
        keys = {"method": "on_policy_judge", "judge_protocol": "pointwise", "concurrency": 1, "num_responses": 20}
        result = run(server, prompts([{"prompt": "Hard"}, *easy]), tmp_path / "samples", **keys)
        assert (result.stopped, result.report["dropped"]) == ("", {"policy_truncated": 1})
        same = [{"prompt": f"{number}?", "responses": ["a", "a"]} for number in range(25)]
        result = run(server, prompts([*same, *easy]), tmp_path / "own", method="on_policy_judge", concurrency=1)
    assert (result.stopped, result.report["dropped"]) == ("", {"identical_answers": 25})


def test_a_finished_run_of_dropped_replies_is_complete(prompts, tmp_path):  # noqa: F811
    with ChatServer(lambda body: CUT) as server:
        for _ in range(2):
            result = run(server, prompts(numbered(20)), tmp_path / "out", concurrency=1)
            assert (result.stopped, result.broken, result.report["complete"]) == ("", False, True)
        more = {"max_requests": 0, "concurrency": 1}
        result = run(server, prompts(numbered(21)), tmp_path / "out", **more)
        assert (result.stopped, result.report["dropped"]) == ("", {"policy_truncated": 20, "not_answered": 1})


def test_only_usable_samples_that_repeat_are_sampled_again(prompts, tmp_path):  # noqa: F811
    with ChatServer(lambda body: {"content": "", "finish_reason": "length"}) as server:
        keys = {"method": "on_policy_judge", "num_responses": 4}
        run(server, prompts(numbered(1)), tmp_path / "out", **keys)
        assert server.count == 2 + 4


def test_a_judge_that_says_nothing_is_not_requested_again(prompts, tmp_path):  # noqa: F811
    with ChatServer(lambda body: "<think>\n[[A]]") as server:
        row = {"prompt": "Which?", "responses": ["first", "second"]}
        run(server, prompts([row]), tmp_path / "out", method="on_policy_judge")
        assert server.count == 2 + 2


def test_a_probe_without_text_shows_no_seed(prompts, tmp_path):  # noqa: F811
    with ChatServer(lambda body: {"content": "", "finish_reason": "length"}) as server:
        report = run(server, prompts(numbered(1)), tmp_path / "out").report
    assert report["servers"] == {"policy policy-model": "ignores n, seed"}


@pytest.mark.parametrize("limit", [None, "100", -1, 50])
def test_an_odd_completion_limit(prompts, tmp_path, limit):  # noqa: F811
    answer = thinker(lambda text: {"content": text})
    keys = {
        "policy_max_tokens": None,
        "policy_extra_body": {"max_completion_tokens": limit},
        "policy_output_price": 1.0,
    }
    with ChatServer(lambda body: answer(body) | {"finish_reason": None}) as server:
        assert run(server, prompts(numbered(1)), tmp_path / "out", max_cost=9.0, **keys).report["kept"] == 1
