"""One reading of a row: odd rows of public datasets give the right tokens, the same everywhere, or one sentence."""

import json

import pytest
from conftest import curve, make_tokenizer, rows
from datasets import Dataset, IterableDataset, load_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apo_trl import APOConfig, APOTrainer, InputError
from apo_trl.datasets.preprocessing import normalise_datasets
from apo_trl.errors import InvalidRow
from apo_trl.evaluation.evaluate import read_split
from apo_trl.evaluation.scoring import tokenize_pairs
from apo_trl.io import readers
from apo_trl.io.readers import load_dataset_splits, read_pairs, read_rows
from apo_trl.io.rows import normalise_row
from apo_trl.io.tokenization import encode_pair

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if quiet %}quiet {% endif %}"
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['content'] is defined %}{{ message['content'] + '' }}{% endif %}"
    "{% for call in message['tool_calls'] or [] %}{{ call | tojson }}{% endfor %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"city": {"type": "string"}}}}}


def user(text):
    return {"role": "user", "content": text}


def says(text, **more):
    return {"role": "assistant", "content": text, **more}


def calls(**arguments):
    return says(None, tool_calls=[{"type": "function", "function": {"name": "f", "arguments": arguments}}])


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


@pytest.fixture
def tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def text(tokenizer, row):
    """The row as the model reads it: prompt, chosen, rejected."""
    return [tokenizer.decode(ids) for ids in encode_pair(tokenizer, row)]


CONVERSATION = [user("Hi"), says("Yes?"), user("2 + 2?")]


@pytest.mark.parametrize(
    ("row", "right"),
    [
        # The prompt is repeated in answers that are whole conversations.
        ({"prompt": [user("Hi")], "chosen": [user("Hi"), says("A")], "rejected": [user("Hi"), says("B")]},
         ("<|user|>Hi<|end|><|assistant|>", "A<|end|>", "B<|end|>")),
        ({"prompt": [user("Hi")], "chosen": [user("Hi"), says("A")], "rejected": [says("B")]},
         ("<|user|>Hi<|end|><|assistant|>", "A<|end|>", "B<|end|>")),
        ({"prompt": CONVERSATION[-1:], "chosen": [*CONVERSATION, says("4")], "rejected": [*CONVERSATION, says("5")]},
         ("<|user|>Hi<|end|><|assistant|>Yes?<|end|><|user|>2 + 2?<|end|><|assistant|>", "4<|end|>", "5<|end|>")),
        ({"prompt": CONVERSATION[:1], "chosen": [*CONVERSATION, says("4")], "rejected": [*CONVERSATION, says("5")]},
         ("<|user|>Hi<|end|><|assistant|>Yes?<|end|><|user|>2 + 2?<|end|><|assistant|>", "4<|end|>", "5<|end|>")),
        ({"prompt": [{"role": "system", "content": "Be kind."}],
          "chosen": [user("Hi"), says("A")], "rejected": [user("Hi"), says("B")]},
         ("<|system|>Be kind.<|end|><|user|>Hi<|end|><|assistant|>", "A<|end|>", "B<|end|>")),
        # A text beside answers of several turns that begin alike.
        ({"prompt": "Hi", "chosen": [says("A"), user("?"), says("B")], "rejected": [says("A"), user("?"), says("C")]},
         ("<|user|>Hi<|end|><|assistant|>", "A<|end|><|user|>?<|end|><|assistant|>B<|end|>",
          "A<|end|><|user|>?<|end|><|assistant|>C<|end|>")),
        # Parts of text.
        ({"prompt": [user(parts("Hi", "!"))], "chosen": [says(parts("A"))], "rejected": [says(parts("B", "C"))]},
         ("<|user|>Hi!<|end|><|assistant|>", "A<|end|>", "BC<|end|>")),
        # Messages as JSON.
        ({"chosen": json.dumps([user("Hi"), says("A")]), "rejected": json.dumps([user("Hi"), says("B")])},
         ("<|user|>Hi<|end|><|assistant|>", "A<|end|>", "B<|end|>")),
        ({"prompt": "Hi", "chosen": json.dumps([says("A")]), "rejected": json.dumps([says("B")])},
         ("<|user|>Hi<|end|><|assistant|>", "A<|end|>", "B<|end|>")),
        # Settings of the template, and tools.
        ({"prompt": [user("Hi")], "chosen": [says("A")], "rejected": [says("B")],
          "chat_template_kwargs": {"quiet": True}, "tools": "[]"},
         ("quiet <|user|>Hi<|end|><|assistant|>", "A<|end|>", "B<|end|>")),
        ({"prompt": [user("Hi")], "chosen": [says("A")], "rejected": [says("B")],
          "chat_template_kwargs": None, "tools": None},
         ("<|user|>Hi<|end|><|assistant|>", "A<|end|>", "B<|end|>")),
        # Nulls that Parquet adds.
        ({"prompt": [user("Hi") | {"name": None}], "chosen": [calls(city="Rome", n=None)], "rejected": [says("B")]},
         ("<|user|>Hi<|end|><|assistant|>", '{"type": "function", "function": {"name": "f", "arguments": '
          '{"city": "Rome"}}}<|end|>', "B<|end|>")),
        # Messages that differ in an id, and a prompt with a system message that the answers do not repeat.
        ({"prompt": "Hi", "chosen": [user("Hi") | {"n": 1}, says("A")], "rejected": [user("Hi") | {"n": 2}, says("B")]},
         ("<|user|>Hi<|end|><|assistant|>", "A<|end|>", "B<|end|>")),
        ({"prompt": [{"role": "system", "content": "S"}, user("Hi")],
          "chosen": [user("Hi"), says("A")], "rejected": [user("Hi"), says("B")]},
         ("<|system|>S<|end|><|user|>Hi<|end|><|assistant|>", "A<|end|>", "B<|end|>")),
        # A null is no prompt; tuples are lists; nothing is an empty answer.
        ({"prompt": None, "chosen": (user("Hi"), says("A")), "rejected": (user("Hi"), says("B"))},
         ("<|user|>Hi<|end|><|assistant|>", "A<|end|>", "B<|end|>")),
        ({"prompt": [user("Hi")], "chosen": [], "rejected": [says("B")], "tools": "", "chat_template_kwargs": ""},
         ("<|user|>Hi<|end|><|assistant|>", "<|end|>", "B<|end|>")),
        # Texts.
        ({"prompt": "JSON:", "chosen": '[{"role": "admin"}]', "rejected": "no"},
         ("JSON:", '[{"role": "admin"}]<|end|>', "no<|end|>")),
        ({"chosen": "It is blue", "rejected": "It is green"}, ("It is", " blue<|end|>", " green<|end|>")),
        ({"prompt": "", "chosen": "a", "rejected": "b", "question": "?"}, ("", "a<|end|>", "b<|end|>")),
    ],
)  # fmt: skip
def test_the_right_tokens(tokenizer, row, right):
    assert text(tokenizer, row) == list(right)
    normal = normalise_row(row)
    assert normalise_row(normal) == normal


TEXTS = {"chosen": "Canberra.", "rejected": "Sydney."}
ANSWERS = {"chosen": [says("A")], "rejected": [says("B")]}
PAIR = {"prompt": [user("Hi")], **ANSWERS}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        *[(TEXTS | {name: "Capital?"}, f"unknown column '{name}'. Did you mean 'prompt'")
          for name in ("question", "instruction", "input", "query", "context", "promt", "prompts")],
        (TEXTS, "no 'prompt', and without it the answers must share text"),
        (ANSWERS, "no 'prompt', and without it the answers must share at least one message"),
        (ANSWERS | {"question": "?"}, "unknown column 'question'. Did you mean 'prompt'"),
        ({"prompt": [user("Hi")], "chosen": [user("Ho"), says("A")], "rejected": [user("Ho"), says("B")]},
         "role 'user'. Move it to 'prompt'"),
        ({"prompt": "Hi", "chosen": [user("Ho"), says("A")], "rejected": [says("B")]}, "of the role 'user'. Move it"),
        (PAIR | {"prompt": [user([{"type": "image"}, *parts("?")])]}, "part of type 'image' as 'content' in 'prompt'"),
        (PAIR | {"chosen": [says(["a"])]}, "list as 'content' in 'chosen'"),
        (PAIR | {"chosen": [says(3)]}, "int as 'content' in 'chosen'"),
        (PAIR | {"chosen": [{"role": 3, "content": "a"}]}, "without 'role' in 'chosen'"),
        (PAIR | {"chosen": [{"role": "gpt", "content": "a"}]}, "role 'gpt' in 'chosen'. Rename it to 'assistant'"),
        (PAIR | {"prompt": [{"role": "User", "content": "a"}]}, "role 'User' in 'prompt'. Rename it to 'user'"),
        (PAIR | {"tools": "[{"}, "no valid 'tools'"),
        (PAIR | {"tools": "f"}, "no valid 'tools'"),
        (PAIR | {"tools": "{}"}, "no valid 'tools'"),
        (PAIR | {"chat_template_kwargs": "quiet"}, "no valid 'chat_template_kwargs'"),
        (PAIR | {"chat_template_kwargs": [1]}, "no valid 'chat_template_kwargs'"),
        (PAIR | {"chosen": json.dumps([says("A")]), "rejected": "B"}, "string as 'rejected' beside"),
        (ANSWERS | {"images": None}, "no 'prompt', which a row with images needs"),
    ],
)  # fmt: skip
def test_one_sentence(row, words):
    with pytest.raises(InvalidRow) as error:
        normalise_row(row)
    assert words in str(error.value)


def write(path, data):
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    return str(path)


def test_messages_as_json_are_parsed_only_if_all_rows_are(tmp_path):
    as_json = [{"prompt": "Hi", **{side: json.dumps([says(side)]) for side in ("chosen", "rejected")}}] * 2
    data = normalise_datasets(Dataset.from_list(as_json), "train")
    assert data[1] == {"prompt": [user("Hi")], "chosen": [says("chosen")], "rejected": [says("rejected")]}
    mixed = [as_json[0], {"prompt": "Hi", "chosen": "a", "rejected": "b"}]
    for order in (mixed, mixed[::-1]):
        with pytest.raises(InputError, match=r"Row 1 of the train dataset has .* the first row"):
            normalise_datasets(Dataset.from_list(order), "train")
        with pytest.raises(InputError, match=r"Row 2 .* has .* the first row"):
            list(read_pairs(write(tmp_path / "mixed.jsonl", order)))


TOOL_ROWS = [
    {"prompt": [user("Hi")], "chosen": [calls(city="X", on="2024-01-05")], "rejected": [says("No.")], "tools": [TOOL],
     "chat_template_kwargs": {"quiet": True}, "id": "a"},
    {"prompt": [user("Ho")], "chosen": [calls(n=3, deep={"x": [1]})], "rejected": [calls(city="Oslo")],
     "tools": None, "chat_template_kwargs": None, "id": "b"},
    {"prompt": [user("Ho"), {"role": "tool", "content": "7"}], "chosen": [says("7")], "rejected": [says("8")],
     "tools": [TOOL | {"strict": True}], "chat_template_kwargs": {"other": 1}, "id": "c"},
]  # fmt: skip
PART_ROWS = [
    {"chosen": [user(parts("Hi", str(i))), says(parts("A"))], "rejected": [user(parts("Hi", str(i))), says(parts("B"))]}
    for i in range(3)
]


@pytest.mark.parametrize("data", [TOOL_ROWS, PART_ROWS], ids=["tools", "parts"])
def test_every_source_and_every_reader_sees_the_same_tokens(data, tokenizer, train, tmp_path):
    jsonl, parquet = write(tmp_path / "rows.jsonl", data), str(tmp_path / "rows.parquet")
    Dataset.from_list(data).to_parquet(parquet)
    expected = [list(encode_pair(tokenizer, row)) for row in data]
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    for path in (jsonl, parquet):
        assert [list(encode_pair(tokenizer, row)) for row in read_pairs(path)] == expected  # statistics
        scored = tokenize_pairs(read_split(path, None), tokenizer)  # evaluation
        assert [[row[column] for column in columns] for row in scored] == expected
    sources = {
        "JSONL": load_dataset_splits(jsonl)["train"],
        "Parquet": load_dataset_splits(parquet)["train"],
        "memory": Dataset.from_list(data),
        "stream": load_dataset("json", data_files=jsonl, split="train", streaming=True),
    }
    for name, source in sources.items():
        trainer = train(data=source, processing_class=tokenizer, steps=1, run=False, keep_degenerate_pairs=True)
        assert [[row[column] for column in columns] for row in trainer.train_dataset] == expected, name


@pytest.mark.parametrize("name", ["rows.JSONL", "rows.ndjson"])
def test_other_endings_of_json(name, tmp_path):
    path = write(tmp_path / name, [PAIR] * 2)
    assert [dict(row) for row in load_dataset_splits(path)["train"]] == list(read_pairs(path)) == [PAIR] * 2


def test_jsonl_keeps_the_order_and_the_numbers_of_tool_calls(tokenizer, tmp_path):
    data = [PAIR | {"chosen": [calls(a=1, b=1)]}, PAIR | {"chosen": [calls(b=1.5, a="2024-01-05T10:00:00Z")]}]
    path = write(tmp_path / "rows.jsonl", data)
    expected = [list(encode_pair(tokenizer, row)) for row in data]
    assert [list(encode_pair(tokenizer, row)) for row in load_dataset_splits(path)["train"]] == expected
    assert [list(encode_pair(tokenizer, row)) for row in read_pairs(path)] == expected


@pytest.mark.parametrize("as_folder", [False, True])
def test_what_only_later_rows_of_a_large_file_have(as_folder, tmp_path):
    """`datasets` takes the types of the first 10 MB for all rows."""
    first = PAIR | {"chosen": [says("x" * 5000)], "chosen_wins": 1, "id": "2024-01-01", "score": None}
    last = PAIR | {"chosen": [calls(a=1)], "chosen_wins": 0.5, "id": "b", "score": 1.5, "tools": [TOOL]}
    path = write(tmp_path / "rows.jsonl", [first] * 2200 + [last])
    *_, row = load_dataset_splits(str(tmp_path) if as_folder else path)["train"]
    assert row == last
    assert list(read_pairs(path))[-1]["tools"] == [TOOL]


def test_a_packaged_file_is_read_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "apo_trl/demo/pairs/train.jsonl"
    assert list(read_rows(name)) == [dict(row) for row in load_dataset_splits(name)["train"]]


def test_a_question_beside_an_empty_prompt_is_not_lost():
    """As two datasets that are concatenated have it."""
    answers = {"chosen": "A: a", "rejected": "A: b"}
    data = [{"prompt": "Hi", "question": None} | answers, {"prompt": None, "question": "Ho"} | answers]
    with pytest.raises(InputError, match=r"^Row 1 .* unknown column 'question'"):
        normalise_datasets(Dataset.from_list(data), "train")


def test_tool_calls_as_json():
    as_text = [PAIR["chosen"][0] | {"tool_calls": json.dumps(calls(a=1)["tool_calls"])}]
    assert normalise_row(PAIR | {"chosen": as_text})["chosen"][0]["tool_calls"] == calls(a=1)["tool_calls"]
    with pytest.raises(InvalidRow, match="no valid 'tool_calls'"):
        normalise_row(PAIR | {"chosen": [says("Hi") | {"tool_calls": "call"}]})


def test_no_tools_as_json():
    data = [PAIR | {"tools": json.dumps([TOOL]), "chat_template_kwargs": "{}"}]
    data += [PAIR | {"tools": "null", "chat_template_kwargs": "null"}]
    assert [row["tools"] for row in normalise_datasets(Dataset.from_list(data), "train")] == [[TOOL], None]


def test_a_transform_is_refused():
    """Its columns are in no row that is stored, and it would be left out."""
    data = Dataset.from_list([PAIR] * 2).with_transform(lambda batch: batch | {"images": [[]] * len(batch["prompt"])})
    with pytest.raises(InputError, match=r"^The train dataset has a transform.*dataset\.map"):
        normalise_datasets(data, "train")


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", "arrow"])
@pytest.mark.parametrize(
    "data", [[{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4, [PAIR] * 4], ids=["text", "messages"]
)
def test_a_format_of_the_dataset_changes_nothing(kind, data, train):
    formatted = Dataset.from_list(data).with_format(kind)
    assert curve(train(data=formatted, steps=1)) == curve(train(data=Dataset.from_list(data), steps=1))


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_of_other_kinds_of_data_decide_nothing(streaming, train):
    """TRL takes one of them to tell whether rows are conversations: which one depends on the seed of hashes."""
    for row in ({"prompt": "a", "chosen": "b", "rejected": "c"}, PAIR):
        for other in ([user("Q")], "text", None):
            data = Dataset.from_list([row | {"messages": other, "completion": other}] * 2)
            trainer = train(data=data.to_iterable_dataset() if streaming else data, run=False, steps=1)
            first = next(iter(trainer.train_dataset))
            assert not {"messages", "completion"} & set(first)
            assert first["chosen_ids"][-1] == 0  # the end token


@pytest.mark.parametrize(
    ("row", "change", "words"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"eos_token": None}, "eos_token: required"),
        (PAIR | {"images": None}, {}, "train dataset has images, and the model reads text only"),
    ],
)
def test_a_tokenizer_that_does_not_fit(row, change, words, model_dir, tmp_path, no_model):
    tokenizer = strict(TEMPLATE)
    for name, value in change.items():
        setattr(tokenizer, name, value)
    assert words in refused(model_dir, Dataset.from_list([row] * 2), tmp_path, processing_class=tokenizer)


def test_a_folder_of_save_to_disk_is_read(train, tmp_path):
    Dataset.from_list(rows(4)).save_to_disk(tmp_path / "one")
    (saved,) = load_dataset_splits(str(tmp_path / "one")).values()
    assert len(list(read_pairs(str(tmp_path / "one")))) == len(saved) == 4
    assert len(curve(train(data=saved, steps=1))) == 1
    with pytest.raises(InputError, match=r"no split 'test'\. Use one of train"):
        list(read_pairs(str(tmp_path / "one"), "test"))


def test_a_folder_is_read_as_datasets_reads_it(tmp_path):
    for name, count in (("a", 4), ("b", 3)):
        (tmp_path / name).mkdir()
        Dataset.from_list(rows(count)).to_json(tmp_path / name / "train.jsonl")
    assert len(readers.load_dataset(str(tmp_path), data_dir="a", split="train")) == 4
    two = readers.load_dataset(str(tmp_path / "b"), split=["train", "train[:2]"])
    assert [len(each) for each in two] == [3, 2]


@pytest.fixture
def no_model(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("trl.trainer.dpo_trainer.create_model_from_path", fail)


def refused(model_dir, data, tmp_path, **more):
    config = APOConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none", **more.pop("config", {}))
    with pytest.raises(InputError) as error:
        APOTrainer(str(model_dir), args=config, **({"train_dataset": data} | more))
    return str(error.value)


def strict(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "tokenizer.chat_template"),
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{% for m in messages %}{{ m['content'] + m['name'] }}{% endfor %}", "name"),
    ],
)
@pytest.mark.parametrize("key", ["train_dataset", "eval_dataset"])
def test_the_first_row_is_rendered_before_the_model_loads(template, words, key, model_dir, tmp_path, no_model):
    good = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    data = {"train_dataset": good} | {key: Dataset.from_list([PAIR])}
    message = refused(model_dir, None, tmp_path, processing_class=strict(template), **data)
    assert words in message
    assert f"Row 0 of the {key.removesuffix('_dataset')} dataset" in message


REFUSES = (
    "{% for m in messages %}{{ m['content'] if m['content'] != 'bad' else raise_exception('bad row') }}{% endfor %}"
)


def test_a_later_row_that_cannot_be_rendered_is_named(model_dir, tmp_path, train):
    data = [PAIR, PAIR | {"chosen": [says("good")]}, PAIR | {"chosen": [says("bad")]}]
    message = refused(model_dir, Dataset.from_list(data), tmp_path, processing_class=strict(REFUSES))
    assert "Row 2 of the train dataset" in message
    assert "bad row" in message
    stream = Dataset.from_list(data).to_iterable_dataset()
    with pytest.raises(InputError, match=r"Row 2 of the train stream: .*bad row"):
        train(data=stream, processing_class=strict(REFUSES), steps=1)


def test_streams_that_are_empty_or_have_no_end(model_dir, tmp_path, no_model):
    empty = IterableDataset.from_generator(lambda: iter(()))
    assert "train stream has no rows" in refused(model_dir, empty, tmp_path, config={"max_steps": 1})
    stream = Dataset.from_list(rows()).to_iterable_dataset()
    assert refused(model_dir, stream, tmp_path).startswith("max_steps: required for a stream")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_prompt_with_the_bos_token_warns_once(streaming, train, caplog):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<|system|>"
    number = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", number)]
    )
    data = [{"prompt": f"{i} is", "chosen": " a", "rejected": " b"} for i in range(4)]
    where = 0 if streaming else 2
    data[where]["prompt"] = "<|system|>" + data[where]["prompt"]
    train(data=Dataset.from_list(data), processing_class=tokenizer, run=False, steps=1)
    (warning,) = [
        record.getMessage()
        for record in caplog.records
        if "BOS" in record.getMessage() or "twice" in record.getMessage()
    ]
    assert f"Row {where} of the train dataset" in warning


# Rows of any shape: right, or one sentence.

words = st.text(max_size=6) | st.sampled_from(["Hi", "[]", '[{"role": "user", "content": "Hi"}]', "\ud83d", " "])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | words
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=6
)
part = st.fixed_dictionaries({"type": st.sampled_from(["text", "image", None])}, optional={"text": words | st.none()})
contents = words | st.none() | st.lists(part, max_size=2) | values
roles = st.sampled_from(["system", "user", "assistant", "tool"])
message = st.fixed_dictionaries(
    {"role": roles | scalars, "content": contents},
    optional={"tool_calls": st.lists(values, max_size=2) | st.none(), "name": values},
)
good = st.fixed_dictionaries(
    {"role": roles, "content": words},
    optional={"tool_calls": st.none() | st.just([{"name": "f", "arguments": {"n": None}}])},
)
conversation = st.lists(good, max_size=3)
side = words | conversation | st.lists(message, max_size=3) | conversation.map(json.dumps) | values


@st.composite
def preference_rows(draw):
    row = draw(
        st.fixed_dictionaries(
            {"chosen": side, "rejected": side},
            optional={
                "prompt": side,
                "question": words,
                "tools": values,
                "chat_template_kwargs": values,
                "images": values,
            },
        )
    )
    start = draw(conversation)
    if draw(st.booleans()):  # whole conversations, with and without the prompt beside them
        row |= {name: start + draw(conversation) for name in ("chosen", "rejected")}
        row |= {"prompt": draw(st.sampled_from([start, start[-1:], "Hi"]))} if draw(st.booleans()) else {}
    return row


def outcome(function, *arguments):
    try:
        return function(*arguments), ""
    except InputError as error:
        return None, str(error)


@settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(preference_rows())
def test_any_row_is_right_or_refused_in_one_sentence(row):
    tokenizer = strict(TEMPLATE)
    normal, refusal = outcome(normalise_row, row)
    if refusal:
        assert "\n" not in refusal
        return
    assert normalise_row(normal) == normal
    sides = [normal[name] for name in ("prompt", "chosen", "rejected")]
    assert len({isinstance(value, str) for value in sides}) == 1
    if "images" in normal:
        assert all(image is not None for image in normal["images"])
        return
    json.dumps(sides, ensure_ascii=False).encode()  # no half of a surrogate pair
    tokens, refusal = outcome(encode_pair, tokenizer, row)
    if refusal:
        assert refusal.startswith("The chat template cannot render this pair")
        return
    assert tokens == encode_pair(tokenizer, normal)
    if not isinstance(sides[0], str):
        options = {"tools": normal.get("tools"), **normal.get("chat_template_kwargs", {})}
        rendered = tokenizer.apply_chat_template(sides[0] + sides[1], **options)
        assert tokens[0] + tokens[1] == list(rendered["input_ids"])
    # What Arrow makes of the row, with the keys of another row as nulls, reads as the row itself.
    wider = json.loads(json.dumps(row), parse_constant=lambda name: None)
    for name in ("prompt", "chosen", "rejected"):
        if isinstance(wider.get(name), list):
            wider[name] = [{**each, "of another row": None} for each in wider[name]]
    assert encode_pair(tokenizer, wider) == tokens
