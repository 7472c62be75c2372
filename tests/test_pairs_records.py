"""Prompts as files really come: broken, mixed, packed, nested. A row's fault is counted and never raised."""

import gzip
import json

import pytest
from hypothesis import given, settings, strategies

from apo_trl.errors import InputError
from apo_trl.io.completion import completion_text
from apo_trl.pairs.config.settings import make_settings
from apo_trl.pairs.prompts import Answer, PromptSource, read_records
from apo_trl.pairs.text.templates import Template, load_template, suffix_for

KEYS = {"method": "clair", "output_dir": "out", "policy_model": "p", "reviser_model": "r"}


def source(path, **more) -> PromptSource:
    return PromptSource(make_settings(KEYS | {"prompts": str(path)} | more))


def read(rows: list, **more) -> list:
    return list(read_records(enumerate(rows, 1), make_settings(KEYS | {"prompts": "p"} | more)))


def one(row, **more):
    """Read one row among another that is good."""
    record, good = read([row, {"id": "good", "prompt": "A good prompt that nothing else is?"}], **more)
    assert good.reason == ""
    return record


def bad(row, words: str, **more) -> None:
    record = one(row, **more)
    assert record.reason == "bad_row"
    assert record.fault.startswith("Row 1 ")
    assert words in record.fault
    assert record.fault.endswith(".")
    assert "\n" not in record.fault
    record.fault.encode()
    record.id.encode()


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def test_a_jsonl_file_may_have_a_bom_crlf_blank_lines_and_no_last_newline(tmp_path):
    data = b'\xef\xbb\xbf{"prompt": "one"}\r\n\r\n   \n{"prompt": "two\xe2\x80\xa8half"}\r\n\n{"prompt": "three"}'
    for name, content in (("p.jsonl", data), ("p.jsonl.gz", gzip.compress(data))):
        (tmp_path / name).write_bytes(content)
        prompts = source(tmp_path / name)
        for _ in range(2):  # read more than once
            records = list(prompts)
            assert [record.prompt for record in records] == [[user("one")], [user("two\u2028half")], [user("three")]]
            assert [record.position for record in records] == [0, 1, 2]


def test_lines_that_are_no_json_or_no_utf8_are_bad_rows_with_their_number(tmp_path):
    lines = [
        b'{"prompt": "good"}',
        b'{"prompt": "caf\xe9"}',
        b'{"prompt": "cut',
        b"[" * 100_000,
        b'{"prompt": ' + b"9" * 5000 + b"}",
        b"null",
        b'"text"',
        b'\xff\xfe{"prompt": "x"}',
        b'{"prompt": "NaN", "id": NaN}',
        b'{"prompt": "' + b"x" * 3_000_000 + b'"}',
        b'{"prompt": "nul \\u0000 in it"}',
        b'{"prompt": "half \\ud800 pair"}',
        b'{"prompt": "raw \x00"}',
    ]
    (tmp_path / "p.jsonl").write_bytes(b"\n".join(lines))
    records = list(source(tmp_path / "p.jsonl"))
    assert len(records) == len(lines)
    faults = {record.position + 1: record.fault for record in records if record.reason}
    assert {number: fault.split(":")[0] for number, fault in faults.items()} == {
        **{number: f"Row {number} is not JSON in UTF-8" for number in (2, 3, 4, 5, 8, 13)},
        **{number: f"Row {number} is not a JSON object." for number in (6, 7)},
    }
    assert len(records[8].id) == 16
    assert {record.reason for record in records} == {"", "bad_row"}
    assert len(records[9].prompt[0]["content"]) == 3_000_000
    assert records[10].prompt == [user("nul \x00 in it")]
    assert records[11].prompt == [user("half \ufffd pair")]
    # Faults belong to lines: blank ones are counted.
    (tmp_path / "p.jsonl").write_bytes(b'\n\n{"prompt": "good"}\n\nbroken\n')
    assert [record.fault[:6] for record in source(tmp_path / "p.jsonl")] == ["", "Row 5 "]


def test_arrays_parquet_and_folders_hold_the_same_rows(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"id": "a", "prompt": [{"role": "user", "content": "one"}], "responses": ["x"]},
        {"id": "b", "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "two", "name": "ann"}]},
    ]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    assert pq.read_table(tmp_path / "p.parquet").to_pylist()[0]["prompt"][0]["name"] is None  # filled in
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = [list(source(tmp_path / name)) for name in ("p.json", "lines.jsonl", "p.parquet", "folder")]
    assert found[0][1].prompt[1] == {"role": "user", "content": "two", "name": "ann"}
    assert found[0][0].answers == (Answer("x", "given"),)
    assert found[0] == found[1] == found[2] == found[3]
    assert "name" not in found[2][0].prompt[0]


def test_parquet_may_hold_what_json_cannot(tmp_path):
    import datetime

    import pyarrow as pa
    import pyarrow.parquet as pq

    message = {"role": "user", "content": "one", "at": datetime.datetime(2024, 1, 1)}
    pq.write_table(
        pa.Table.from_pylist([{"prompt": [message]}, {"prompt": [message | {"at": None}]}]), tmp_path / "p.parquet"
    )
    first, second = source(tmp_path / "p.parquet")
    assert first.prompt == [user("one") | {"at": "2024-01-01 00:00:00"}]
    assert second.prompt == [user("one")]


def test_ids_are_kept_as_text_and_made_of_the_content_where_there_is_none():
    rows = [
        {"id": 7, "prompt": "a"},
        {"id": "x", "prompt": "b"},
        {"prompt_id": "y", "prompt": "c"},
        {"id": 0, "prompt": "d"},
        {"id": "", "custom_id": "z", "prompt": "e"},
        {"id": None, "prompt": "f"},
        {"id": "\ud800", "prompt": "g"},
        {"id": 1.5, "prompt": "h"},
    ]
    records = read(rows)
    assert [record.id for record in records if record.prompt != [user("f")]] == [
        "7",
        "x",
        "y",
        "0",
        "z",
        "\ufffd",
        "1.5",
    ]
    made = next(record.id for record in records if record.prompt == [user("f")])
    assert len(made) == 16
    moved = read([{"prompt": "new"}, *reversed(rows)])
    assert {record.id for record in records} < {record.id for record in moved}
    assert next(record.id for record in moved if record.prompt == [user("f")]) == made
    assert {record.reason for record in moved} == {""}
    # The prompt as a text and as a message is the same question.
    assert read([{"prompt": [user("f")]}])[0].id == made


def test_duplicates_name_the_earlier_row():
    records = read(
        [
            {"prompt": "a"},
            {"prompt": "a"},
            {"id": "x", "prompt": "b"},
            {"id": "x", "prompt": "c"},
            {"id": "x", "prompt": "b"},
            {"id": "y", "prompt": "b"},
            {"prompt": "a", "response": "r"},
        ]
    )
    assert [(record.reason, record.fault) for record in records] == [
        ("", ""),
        ("duplicate_prompt", "Row 2 has the same prompt and answers as row 1."),
        ("", ""),
        ("duplicate_id", "Row 4 has the id 'x' of an earlier row; ids must be unique."),
        ("duplicate_prompt", "Row 5 has the same prompt and answers as row 3."),
        ("duplicate_prompt", "Row 6 has the same prompt and answers as row 3."),
        ("", ""),  # its answer makes it another row
    ]


CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]}


@pytest.mark.parametrize(
    ("row", "prompt", "answers"),
    [
        ({"prompt": [user("a")]}, [user("a")], ()),
        (
            {
                "prompt": [
                    {"role": "system", "content": "s"},
                    user("a"),
                    CALL,
                    {"role": "tool", "content": "5", "tool_call_id": "1"},
                ]
            },
            [
                {"role": "system", "content": "s"},
                user("a"),
                CALL | {"content": ""},
                {"role": "tool", "content": "5", "tool_call_id": "1"},
            ],
            (),
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
            [user("ab")],
            (),
        ),
        ({"prompt": [user("a") | {"name": "half \ud800", "weight": None}]}, [user("a") | {"name": "half \ufffd"}], ()),
        ({"prompt": [user("a") | {"\ud800\n": 1, "weight": float("nan")}]}, [user("a") | {"\ufffd\n": 1}], ()),
        ({"messages": [user("a"), {"role": "assistant", "content": "b"}]}, [user("a")], ("b",)),
        ({"messages": [user("a"), {"role": "assistant", "content": " "}]}, [user("a")], ()),
        ({"messages": [user("a")]}, [user("a")], ()),
        ({"prompt": "a", "messages": [user("a"), {"role": "assistant", "content": "b"}]}, [user("a")], ()),
        ({"prompt": "a", "responses": "b"}, [user("a")], ("b",)),
        ({"prompt": "a", "responses": ["b", "c"]}, [user("a")], ("b", "c")),
        ({"prompt": "a", "response": {"content": "b"}}, [user("a")], ("b",)),
        ({"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}, [user("a")], ("b",)),
        ({"prompt": "a", "completions": [[user("x"), {"role": "assistant", "content": "b"}]]}, [user("a")], ("b",)),
        ({"prompt": "a", "responses": [{"content": [{"type": "text", "text": "b"}]}]}, [user("a")], ("b",)),
        ({"prompt": "a", "responses": []}, [user("a")], ()),
        ({"prompt": "a", "responses": None, "response": "b"}, [user("a")], ("b",)),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, [user("a")], ()),
        (
            {"prompt": "a", "chosen": [user("a"), {"role": "assistant", "content": "b"}], "rejected": []},
            [user("a")],
            (),
        ),
        ({"prompt": "{{ 7*7 }} {% if %} %s {0}"}, [user("{{ 7*7 }} {% if %} %s {0}")], ()),
    ],
)
def test_conversations_and_answers_are_read_in_every_shape(row, prompt, answers):
    record = one(row)
    assert (record.fault, record.reason) == ("", "")
    assert record.prompt == prompt
    assert tuple(answer.text for answer in record.answers) == answers
    assert all(answer.model == "given" for answer in record.answers)


def test_an_answer_may_name_its_model():
    row = {"prompt": "a", "responses": [{"text": "b", "model": "m"}, {"response": "c", "model": 4}, {"text": "d"}]}
    assert one(row).answers == (Answer("b", "m"), Answer("c", "4"), Answer("d", "given"))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (7, "is not a JSON object"),
        ({}, "as 'prompt'"),
        ({"text": "a", "n": 1}, "as 'prompt'"),
        ({"prompt": float("nan")}, "as 'prompt'"),
        ({"prompt": " \n"}, "ends with text"),
        ({"prompt": 5}, "as 'prompt'"),
        ({"prompt": []}, "as 'prompt'"),
        ({"prompt": {"role": "user"}}, "as 'prompt'"),
        ({"prompt": ["a"]}, "as 'prompt'"),
        ({"prompt": [{"content": "a"}]}, "'role'"),
        ({"prompt": [{"role": 5, "content": "a"}]}, "'role'"),
        ({"prompt": [{"role": "task>\nIgnore", "content": "a"}]}, "'role'"),
        ({"prompt": [{"role": "user", "content": 5}]}, "'content'"),
        ({"prompt": [{"role": "user"}]}, "'content'"),
        ({"prompt": [{"role": "user", "content": [{"type": "text"}]}]}, "'content'"),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": None}]}]}, "'content'"),
        ({"prompt": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'content'"),
        ({"prompt": [{"role": "user", "content": []}]}, "ends with text"),
        ({"prompt": [{"role": "user", "content": ""}]}, "ends with text"),
        (
            {"prompt": [user("a"), {"role": "assistant", "content": "b"}]},
            "which is in 'responses'",
        ),
        ({"prompt": [user("a"), CALL]}, "which is in 'responses'"),
        ({"messages": "a"}, "as 'messages'"),
        (
            {"messages": [{"role": "assistant", "content": "b"}]},
            "needs a 'messages' that ends with text",
        ),
        ({"prompt": "a", "responses": 5}, "not an assistant's text"),
        ({"prompt": "a", "responses": True}, "not an assistant's text"),
        ({"prompt": "a", "responses": [None]}, "not an assistant's text"),
        ({"prompt": "a", "responses": ["b", " "]}, "not an assistant's text"),
        ({"prompt": "a", "responses": [["b", "c"]]}, "not an assistant's text"),
        ({"prompt": "a", "responses": [[]]}, "not an assistant's text"),
        ({"prompt": "a", "responses": [{"content": None}]}, "not an assistant's text"),
        ({"prompt": "a", "completion": [user("b")]}, "not an assistant's text"),
    ],
)
def test_an_unusable_row_has_a_fault(row, words):
    bad(row, words)


def test_a_row_needs_an_answer_without_a_policy():
    with pytest.raises(
        InputError, match=r"p has no usable row\. Row 1 has no 'responses', and policy_model is not set"
    ):
        read([{"prompt": "a"}], policy_model=None)
    (record,) = read([{"prompt": "a", "response": "b"}], policy_model=None)
    assert record.answers == (Answer("b", "given"),)


def test_nothing_to_read_is_an_input_error(tmp_path):
    empty = tmp_path / "empty.jsonl"
    for content in (b"", b"\n \n", b"\xef\xbb\xbf"):
        empty.write_bytes(content)
        with pytest.raises(InputError, match=r"prompts: .*empty\.jsonl has no usable row\. It is empty\.$"):
            list(source(empty))
    empty.write_bytes(b"broken\n{}\n")
    with pytest.raises(InputError, match=r"has no usable row\. Row 1 is not JSON in UTF-8: Expecting value.*\.$"):
        list(source(empty))
    for name in ("none.jsonl", "none.json", "none.parquet", "none.jsonl.gz"):
        with pytest.raises(InputError, match=f"prompts: no .*file: .*{name}. Check the path"):
            source(tmp_path / name)
    whole = gzip.compress(b'{"prompt": "a"}\n' * 5000)
    for content in (b"no gzip", whole[:40], whole[:20] + b"\x00" * 30 + whole[50:]):
        (tmp_path / "p.jsonl.gz").write_bytes(content)
        with pytest.raises(InputError, match=r"prompts: .*p\.jsonl\.gz cannot be read: "):
            list(source(tmp_path / "p.jsonl.gz"))
    (tmp_path / "p.parquet").write_bytes(b"no parquet")
    with pytest.raises(InputError, match=r"p\.parquet: cannot be read"):
        list(source(tmp_path / "p.parquet"))


def test_max_prompts_takes_the_first_rows_bad_ones_too():
    rows = [{"prompt": "a"}, 5, {"prompt": "b"}, {"prompt": "c"}]
    assert [record.position for record in read(rows, max_prompts=3)] == [0, 1, 2]
    assert len(read(rows, max_prompts=10)) == 4


TEXT = strategies.text(strategies.characters(), max_size=8)  # surrogates too
JSON = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats() | TEXT,
    lambda inner: strategies.lists(inner, max_size=3) | strategies.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
MESSAGE = strategies.fixed_dictionaries(
    {},
    optional={
        "role": strategies.sampled_from(["user", "assistant", "system", "tool", ""]) | JSON,
        "content": JSON
        | strategies.lists(strategies.fixed_dictionaries({"type": strategies.just("text")}, optional={"text": JSON})),
        "tool_calls": JSON,
    },
)
MESSAGES = strategies.lists(MESSAGE | JSON, max_size=3)
ROW = JSON | strategies.fixed_dictionaries(
    {},
    optional={
        "id": JSON,
        "prompt": JSON | MESSAGES,
        "messages": JSON | MESSAGES,
        "responses": JSON | MESSAGES | strategies.lists(MESSAGES),
        "completion": JSON | MESSAGES,
    },
)


@settings(max_examples=400, deadline=None)
@given(strategies.lists(ROW, max_size=5))
def test_whatever_the_rows_are_they_end_as_records_that_can_be_sent_and_stored(rows):
    try:
        records = read(rows)
    except InputError:
        rows = [*rows, {"prompt": "a good one, which there was none of"}]
        records = read(rows)
        assert all(record.reason == "bad_row" for record in records[:-1])
    assert [record.position for record in records] == list(range(len(rows)))
    for record in records:
        assert record.reason in ("", "bad_row", "duplicate_prompt", "duplicate_id")
        assert bool(record.reason) == bool(record.fault)
        assert record.id
        json.dumps(record, allow_nan=False, ensure_ascii=False).encode()
        if not record.reason:
            assert record.prompt[-1]["content"].strip()
            assert all(isinstance(message["content"], str) and message["role"] for message in record.prompt)
    assert read(rows) == records
    names = [record.id for record in records if not record.reason]
    assert len(names) == len(set(names))


@settings(max_examples=100, deadline=None)
@given(strategies.lists(TEXT.filter(str.strip), unique=True, min_size=1, max_size=30), strategies.integers(1, 9))
def test_shards_are_disjoint_and_complete(texts, count):
    rows = [{"prompt": text} for text in texts]
    whole = read(rows)
    parts = [read(rows, shard=f"{index}/{count}") for index in range(count)]
    assert sorted(record for part in parts for record in part) == sorted(whole)
    assert read(rows, shard=f"{count}/{count}") == parts[0]


PROMPT = [
    user("earlier {{ 7*7 }} {% raw %} %s {0}"),
    {"role": "assistant", "content": "{# no #}"},
    user("{{ 7*7 }} {{ s }}"),
]
GIVEN = {
    "revise": {"answer": "{{ 1/0 }} 100%"},
    "compare": {"answer_a": "{% x %}", "answer_b": "b"},
    "score": {"answer": "a"},
}


@pytest.mark.parametrize("step", GIVEN)
def test_what_users_and_models_wrote_is_never_evaluated(step):
    template = load_template(step)
    asked = template.ask(PROMPT, **GIVEN[step])
    assert [message["role"] for message in asked.messages] == ["system", "user"]
    text = asked.messages[1]["content"]
    for part in [message["content"] for message in PROMPT] + list(GIVEN[step].values()):
        assert part in text
    assert "49" not in text
    again = template.ask_again(PROMPT, asked, "reply {{ 7*7 }}", "It has {{ no }} end.", **GIVEN[step])
    assert again.messages[:2] == asked.messages
    assert again.messages[2] == {"role": "assistant", "content": "reply {{ 7*7 }}"}
    assert "It has {{ no }} end." in again.messages[3]["content"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{{ anwser }}", "unknown variable 'anwser'. Did you mean 'answer'? Use task, earlier, s, problem, answer."),
        ("{% if earlier %}{{ history }}{% endif %}{{ task }}", "unknown variable 'history'."),
        ("{{ task", "unexpected end of template"),
        ("{% for x in range(999999999) %}{% endfor %}", "Range too big"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ task + 1 }}", "can only concatenate str"),
        ("{% include 'other' %}", "no loader"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "recursion"),
        ("{{ earlier.append(1) }}", "unsafe"),
        ("{{ earlier[3].content }}", "has no element 3"),
        ("{% set system %}only this{% endset %}", "no text outside of `system` and `repair`"),
        (b"\xff\xfe", "can't decode"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_error_with_its_file(tmp_path, text, words):
    path = tmp_path / "mine.jinja"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as error:
        Template(path).ask([user("a")], answer="b")
    message = str(error.value)
    assert message.startswith(f"The template {path} cannot be used: ")
    assert words in message
    assert "\n" not in message


def test_a_users_template_may_have_neither_system_nor_repair(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(
        "\ufeff{% for m in earlier %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{{ task }}|{{ answer }}|{{ s }}|{{ problem }}"
    )
    template = Template(path)
    asked = template.ask([user("<task>"), {"role": "assistant", "content": "b"}, user("c")], answer="d")
    assert asked == ([user("user: <task>\nassistant: b\nc|d|-2|")], "-2")
    again = template.ask_again([user("c")], asked, "reply", "It is bad.", answer="d")
    assert again.messages[1:] == [
        {"role": "assistant", "content": "reply"},
        user("Your reply cannot be used: It is bad. Answer again."),
    ]
    assert len(template.digest) == 64
    path.write_text("{{ task }}{{ answer }}")
    assert Template(path).digest != template.digest


TAGS = strategies.sampled_from(
    ["<task>", "</TASK >", "< answer_a-2 x=1>", "<revision-3>", "<-2>", "<task-x>", "<taskx>", "<"]
)


@settings(max_examples=300, deadline=None)
@given(strategies.lists(strategies.lists(TAGS | strategies.text(max_size=5)).map("".join), max_size=3))
def test_no_text_holds_a_tag_with_the_suffix(texts):
    suffix = suffix_for(*texts)
    whole = "\n".join(texts).lower()
    for tag in ("task", "answer", "answer_a", "revision"):
        assert f"<{tag}{suffix}>" not in whole
        assert f"</{tag}{suffix} >" not in whole
    assert suffix_for(*texts, f"<task{suffix}>") != suffix
    smaller = ["", *(f"-{number}" for number in range(2, 9))]
    assert suffix in smaller
    for other in smaller[: smaller.index(suffix)]:  # it is the first that is free
        assert any(mark in whole for mark in (f"{name}{other}" for name in ("task", "answer_a", "revision")))


def test_hostile_texts_cost_no_time():
    import time

    began = time.monotonic()
    assert suffix_for("<" + " " * 20_000) == ""
    assert suffix_for("<task " * 100_000) == ""
    assert suffix_for("".join(f"<task-{number}>" for number in range(2, 50_000)) + "<task>") == "-50000"
    assert time.monotonic() - began < 2


def test_what_a_side_says():
    call = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    parts = [{"type": "text", "text": "two "}, {"type": "image"}, {"type": "text", "text": "parts"}]
    assert completion_text("as it is") == "as it is"
    assert completion_text([user("alone")]) == "alone"
    assert completion_text([{"role": "assistant", "content": parts}]) == "two parts"
    assert completion_text([{"role": "assistant", "content": None, "tool_calls": call}]) == json.dumps(call)
    several = [user("2 + 2?"), {"role": "assistant", "content": "I add.", "tool_calls": call}]
    assert completion_text(several) == f"user: 2 + 2?\n\nassistant: I add.\n{json.dumps(call)}"
