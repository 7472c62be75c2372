"""How contrastive pairs are: measures by hand-worked values, tokens and truncation by what TRL makes of rows."""

import bz2
import gzip
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TEMPLATE, make_tokenizer, rows
from hypothesis import given
from hypothesis import strategies as st

from apo_trl.errors import InputError
from apo_trl.io.readers import read_pairs, read_rows
from apo_trl.io.tokenization import encode_pair
from apo_trl.models.loading import load_tokenizer
from apo_trl.pairs.statistics.overlap import EvalSets, prompt_text
from apo_trl.pairs.statistics.statistics import Statistics, contrast, words
from apo_trl.pairs.statistics.table import table

DATA = Path(os.environ.get("APO_TRL_DATA", "/nowhere"))
real_data = pytest.mark.skipif(not DATA.is_dir(), reason="APO_TRL_DATA names no folder of real preference pairs")
NUMBERS = ["mean", "median", "p5", "p95", "min", "max"]


def message(role, content):
    return [{"role": role, "content": content}]


def statistics(pairs, **options):
    made = Statistics(**options)
    for pair in pairs:
        made.add(pair)
    return made.summary()


# Measures of one pair.


def test_a_pair_worked_by_hand():
    assert contrast("Say it, now", "a b c", "b c d") == {
        "jaccard": 1 / 2,  # b, c of a, b, c, d
        "levenshtein": 3,  # each letter replaced; to drop "a " and add " d" would be four
        "levenshtein_normalised": 3 / 5,
        "shared_prefix": 0,
        "shared_prefix_share": 0,
        "length_ratio": 1,
        "prompt_tokens": 4,
        "chosen_tokens": 3,
        "rejected_tokens": 3,
        "estimated": False,
    }


@pytest.mark.parametrize(
    ("chosen", "rejected", "distance", "normalised", "estimated"),
    [
        ("a" * 10**6, "b" * 10**6, 10**6, 1.0, True),
        ("ab" * 500_000, "c" * 10**6, 10**6, 1.0, True),
        ("a" * 10**6, "a" * 900_000, 10**5, 0.1, True),
        ("a" * 10**6, "a" * 970_000, 30_000, 0.03, False),
        ("a" * 10**6, "a" * 400_000 + "b" * 200_000 + "a" * 400_000, 200_000, 0.2, True),
        ("a" * 10**6, "a" * 500_000 + "bb" + "a" * 500_000, 2, 2 / 1_000_002, False),  # near, and so compared whole
        ("a" * 10**6, "b" * 2_000, 10**6, 1.0, False),  # one of them is short
        ("a" * 50_000, "b" * 50_000, 50_000, 1.0, False),
        ("\u6f22" * 10**6, "\u5b57" * 10**6, 10**6, 1.0, True),
    ],
    ids=["one_character", "two", "shorter", "cut", "middle", "near", "short", "at_the_limit", "han"],
)
def test_answers_of_a_megabyte_take_less_than_seconds(chosen, rejected, distance, normalised, estimated):
    began = time.process_time()
    found = contrast("", chosen, rejected)
    assert time.process_time() - began < 3  # each took up to a minute
    assert found["levenshtein"] == distance
    assert found["levenshtein_normalised"] == pytest.approx(normalised)
    assert found["estimated"] == estimated
    assert found["chosen_tokens"] == len(words(chosen))  # everything else is that of the whole answers


def test_an_estimate_is_near_the_distance(monkeypatch):
    import random

    chance = random.Random(0)
    texts = [" ".join(chance.choices(["one", "two", "three", "four", "five"], k=8_000)) for _ in range(2)]
    exact = contrast("", *texts)
    monkeypatch.setattr("apo_trl.pairs.statistics.statistics._WHOLE", 2_000)
    estimate = contrast("", *texts)
    assert (exact["estimated"], estimate["estimated"]) == (False, True)
    assert estimate["levenshtein"] == pytest.approx(exact["levenshtein"], rel=0.05)
    assert estimate["levenshtein"] != exact["levenshtein"]


def test_the_output_says_how_many_distances_are_estimates():
    far, near = {"chosen": "a" * 60_000, "rejected": "b" * 60_000}, {"chosen": "a" * 60_000, "rejected": "a" * 60_001}
    summary = statistics([{"prompt": "p", **pair} for pair in (far, near, far)])
    assert summary["before"]["estimated"] == 2
    assert "levenshtein of 2 pairs: estimated from the first 50,000 characters that differ." in table(summary)
    for line in table(summary).splitlines():
        assert not re.search(r"\.\d{2,}\.", line), "two numbers touch"
    assert "first 50,000" not in table(statistics([{"prompt": "p", **near}]))


@pytest.mark.parametrize(
    ("chosen", "rejected", "measure", "expected"),
    [
        ("kitten", "sitting", "levenshtein", 3),
        ("kitten", "sitting", "levenshtein_normalised", 3 / 7),
        ("saturday", "sunday", "levenshtein", 3),
        ("the cat sat.", "the cat ran away.", "shared_prefix", 2),
        ("the cat sat.", "the cat ran away.", "shared_prefix_share", 2 / 5),
        ("the cat sat.", "the cat ran away.", "length_ratio", 4 / 5),
        ("a a a a", "a", "jaccard", 1),  # sets
        ("a a a a", "a", "length_ratio", 4),
        ("A", "a", "jaccard", 0),  # an edit of case is an edit
    ],
)
def test_measures(chosen, rejected, measure, expected):
    assert contrast("", chosen, rejected)[measure] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("chosen", "rejected", "jaccard", "normalised", "share", "ratio"),
    [("", "", 1, 0, 1, 1), ("one two", "", 0, 1, 0, 2), ("", "one two", 0, 1, 0, 1 / 2)],
)
def test_empty_sides(chosen, rejected, jaccard, normalised, share, ratio):
    found = contrast("", chosen, rejected)
    assert (found["jaccard"], found["levenshtein_normalised"]) == (jaccard, normalised)
    assert (found["shared_prefix_share"], found["length_ratio"]) == (share, ratio)


answers = st.text(alphabet="ab .é", max_size=12) | st.text(max_size=30)


@given(answers, answers)
def test_exchanging_the_sides(one, other):
    there, back = contrast("", one, other), contrast("", other, one)
    assert there["length_ratio"] * back["length_ratio"] == pytest.approx(1)
    assert there["chosen_tokens"] == back["rejected_tokens"]
    for measure in ("jaccard", "levenshtein", "levenshtein_normalised", "shared_prefix", "shared_prefix_share"):
        assert there[measure] == back[measure]
    for measure in ("jaccard", "shared_prefix_share", "levenshtein_normalised"):
        assert 0 <= there[measure] <= 1
    assert there["levenshtein"] >= abs(len(one) - len(other))
    assert (there["levenshtein"] == 0) == (one == other)


@given(answers)
def test_an_answer_beside_itself(text):
    found = contrast("", text, text)
    assert (found["jaccard"], found["levenshtein"], found["shared_prefix_share"], found["length_ratio"]) == (1, 0, 1, 1)


@given(answers, answers, answers)
def test_levenshtein_is_a_distance(one, two, three):
    def distance(left, right):
        return contrast("", left, right)["levenshtein"]

    assert distance(one, three) <= distance(one, two) + distance(two, three)


@given(st.text())
def test_words_lose_nothing_but_spaces(text):
    assert "".join("".join(words(text)).split()) == "".join(text.split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't stop; x_1=2.", ["Don", "'", "t", "stop", ";", "x_1", "=", "2", "."]),
        ("привет, мир", ["привет", ",", "мир"]),
        ("हिन्दी में", ["हिन्दी", "में"]),  # vowel signs are marks, not letters
        ("猫が好き。", ["猫", "が", "好", "き", "。"]),
        ("GPT猫4", ["GPT", "猫", "4"]),
        ("مرحبا بالعالم", ["مرحبا", "بالعالم"]),
        ("e\u0301te\u0301", ["e\u0301te\u0301"]),
        ("", []),
    ],
)
def test_words_of_many_scripts(text, expected):
    assert words(text) == expected


def test_tokens_of_a_tokenizer():
    assert contrast("", "ab", "ac", tokenize=list)["jaccard"] == 1 / 3  # a of a, b, c


# Statistics of many pairs.


def test_figures_of_known_columns():
    # Chosen has 1 to 101 words beside one: the ratio runs from 1 to 101, its quantiles are its own numbers.
    pairs = [{"prompt": "p", "chosen": "a " * (number + 1), "rejected": "a"} for number in range(101)]
    part = statistics(pairs)["before"]
    assert [part["chosen_tokens"][number] for number in NUMBERS] == pytest.approx([51, 51, 6, 96, 1, 101])
    assert part["pairs"] == 101
    assert part["chosen_longer"] == pytest.approx(100 / 101)
    assert part["rejected_longer"] == 0
    assert part["jaccard"]["mean"] == 1
    histogram = part["chosen_tokens"]["histogram"]
    counted = dict(zip(histogram["edges"], histogram["counts"], strict=False))
    held = {edge: count for edge, count in counted.items() if count}
    assert held == {1: 1, 2: 3, 5: 5, 10: 10, 20: 30, 50: 50, 100: 2}
    ratios = part["length_ratio"]["histogram"]
    assert ratios["counts"][-1] == 98  # 4 to 8, and all above: 4 to 101


def test_every_histogram_holds_every_pair():
    part = statistics(rows(20))["before"]
    histograms = {name: value["histogram"] for name, value in part.items() if isinstance(value, dict)}
    assert len(histograms) == 9
    for name, histogram in histograms.items():
        assert sum(histogram["counts"]) == 20, name
        assert len(histogram["edges"]) == len(histogram["counts"]) + 1
        assert histogram["edges"] == sorted(histogram["edges"])
        assert 10 <= len(histogram["counts"]) <= 20


def test_identical_pairs_are_counted():
    pairs = [{"prompt": "p", "chosen": "same", "rejected": side} for side in ("same", "other", "same", "another")]
    assert statistics(pairs)["before"]["identical"] == 1 / 2


def test_a_tokenizer_is_named_without_its_folder(model_dir):
    summary = statistics(rows(), tokenizer=load_tokenizer(str(model_dir)))
    assert summary["tokens"] == model_dir.name  # a dataset card should not tell where its maker keeps files


def test_summary_is_json():
    summary = statistics(rows(), tokenizer=make_tokenizer(), max_length=40)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


# Tokens and truncation, by what TRL does.


CONVERSATIONS = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows()]
TEXTS = [{key: row[key][0]["content"] for key in row} for row in CONVERSATIONS]
FORMS = {
    "conversations": CONVERSATIONS,
    "texts": TEXTS,
    "texts with an end": [row | {"chosen": row["chosen"] + "<|end|>"} for row in TEXTS],
    "implicit conversations": [
        {side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in CONVERSATIONS
    ],
    "implicit texts": [{side: f"{row['prompt']} {row[side]}" for side in ("chosen", "rejected")} for row in TEXTS],
    "one text begins the other": [{"chosen": row["chosen"], "rejected": row["chosen"] + " and more"} for row in TEXTS],
    "text beside lists": [row | {"prompt": text["prompt"]} for row, text in zip(CONVERSATIONS, TEXTS, strict=True)],
}


@pytest.mark.parametrize("form", FORMS)
def test_tokens_are_those_of_training(form, train, model_dir):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from apo_trl import APOConfig, APOTrainer

    # TRL itself stops at a text beside lists; ours reads it.
    classes = (APOTrainer, APOConfig) if form == "text beside lists" else (DPOTrainer, DPOConfig)
    trainer = train(*classes, data=Dataset.from_list(FORMS[form]), run=False, max_length=None)
    tokenizer = load_tokenizer(str(model_dir))
    assert len(trainer.train_dataset) == len(FORMS[form]) == 8
    for row, theirs in zip(FORMS[form], trainer.train_dataset, strict=True):
        ours = encode_pair(tokenizer, row)
        assert ours == (theirs["prompt_ids"], theirs["chosen_ids"], theirs["rejected_ids"])
        assert all(ours)


def test_tokens_of_a_template_that_asks_otherwise_than_it_answers(train):
    # Asked, it begins the answer with "It"; only chosen answers go on so. Both sides then start before it, as in TRL.
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("<|assistant|>{%", "<|assistant|>It{%") + "{% if loud %}!{% endif %}"
    data = [row | {"chat_template_kwargs": {"loud": at > 3}} for at, row in enumerate(CONVERSATIONS)]
    trainer = train(DPOTrainer, DPOConfig, data=Dataset.from_list(data), run=False, processing_class=tokenizer)
    encoded = [encode_pair(tokenizer, row) for row in data]
    theirs = [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in trainer.train_dataset]
    assert encoded == theirs
    answers = [tokenizer.decode(encoded[at][1]) for at in (0, 4)]
    assert answers == ["It is 1<|end|>", "It is 9<|end|>!"]


GROWING = [
    {
        "prompt": message("user", "p" * 6 * at),
        "chosen": message("assistant", "alike at first, a" + "!" * at),
        "rejected": message("assistant", "alike at first, other" + "!" * (at % 2)),
    }
    for at in range(8)
]  # prompts of 3, 9, ... 45 tokens; the answers differ at the 17th token, and in all but odd ones at the last


@pytest.mark.parametrize(("max_length", "kept", "alike"), [(5, 1, 1), (20, 3, 2), (22, 4, 3), (40, 7, 3), (200, 8, 0)])
def test_what_is_left_is_what_training_is_fed(max_length, kept, alike, train, model_dir):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    data = Dataset.from_list(GROWING)
    trainer = train(DPOTrainer, DPOConfig, data=data, run=False, max_length=max_length)
    batch = trainer.data_collator(list(trainer.train_dataset))
    lengths, ids = batch["completion_mask"].sum(-1).tolist(), batch["input_ids"].tolist()
    same = [one == other for one, other in zip(ids[:kept], ids[kept:], strict=True)]
    assert (len(same), sum(same)) == (kept, alike)

    tokenizer = load_tokenizer(str(model_dir))
    summary = statistics(GROWING, tokenizer=tokenizer, max_length=max_length)
    after = summary["after"]
    assert (summary["before"]["pairs"], summary["prompt_fills_max_length"]) == (8, 8 - kept)
    assert (after["pairs"], summary["identical_after_truncation"]) == (kept, alike)
    assert after["identical"] == pytest.approx(alike / kept)
    assert after["chosen_tokens"]["mean"] == pytest.approx(sum(lengths[:kept]) / kept)
    assert after["rejected_tokens"]["mean"] == pytest.approx(sum(lengths[kept:]) / kept)
    # What is no answer is prompt; beside the shorter answer there is more room for it.
    whole = batch["attention_mask"].sum(-1).tolist()
    prompts = [max(whole[at + side] - lengths[at + side] for side in (0, kept)) for at in range(kept)]
    assert after["prompt_tokens"]["mean"] == pytest.approx(sum(prompts) / kept)


def test_nothing_is_left():
    summary = statistics(GROWING, tokenizer=make_tokenizer(), max_length=3)
    assert (summary["prompt_fills_max_length"], summary["after"]) == (8, {"pairs": 0})
    assert "Nothing is left after truncation to max_length=3" in table(summary)


def test_counts_are_those_that_training_warns_of(train, model_dir, caplog):
    from datasets import Dataset

    def pair(prompt, chosen, rejected):
        return {"prompt": message("user", prompt), "chosen": message("assistant", chosen)} | {
            "rejected": message("assistant", rejected)
        }

    pairs = [
        pair("x" * 40, "yes", "no"),  # the prompt alone fills it
        pair("hi", "a" * 60 + "b", "a" * 60 + "c"),  # differs only behind the cut
        pair("hi", "a" * 60 + "b", "a" * 60 + "d"),
        pair("hi", "same", "same"),
        pair("hi", "a", "b"),
    ]
    train(data=Dataset.from_list(pairs), run=False, max_length=30)
    summary = statistics(pairs, tokenizer=load_tokenizer(str(model_dir)), max_length=30)
    assert (summary["prompt_fills_max_length"], summary["identical_after_truncation"]) == (1, 2)
    assert re.search(r"\b1 \w+ the prompt alone fills max_length=30", caplog.text)
    assert re.search(r"\b2 \w+ chosen equals rejected after truncation to max_length=30", caplog.text)
    before, after = summary["before"], summary["after"]
    assert (before["pairs"], after["pairs"]) == (5, 4)
    assert (before["identical"], after["identical"]) == (1 / 5, 3 / 4)
    assert after["levenshtein"]["max"] == 1  # a, b: the cut texts are equal
    assert after["jaccard"]["min"] == pytest.approx(1 / 3)  # a, b and the end
    assert before["chosen_tokens"]["max"] == 62
    assert after["chosen_tokens"]["max"] == 30 - len("<hi><")  # a token each: role, h, i, end, role


def test_what_is_not_cut_is_measured_alike():
    summary = statistics(rows(), tokenizer=make_tokenizer(), max_length=1000)
    assert summary["before"] == summary["after"]
    assert summary["truncation_mode"] == "keep_start"


def test_max_length_needs_a_tokenizer():
    with pytest.raises(InputError, match="max_length: needs a tokenizer"):
        Statistics(max_length=10)


def test_a_template_that_fails_names_the_row():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no assistant here') if messages[-1].role == 'assistant' }}"
    made = Statistics(tokenizer)
    with pytest.raises(InputError, match=r"Row 1 \(counted from 1\).*no assistant here"):
        made.add(rows(1)[0])


def test_a_tokenizer_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=f"tokenizer: .*{tmp_path} cannot be loaded"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(InputError, match=r"tokenizer: .*no/such cannot be loaded"):
        load_tokenizer("no/such")


# Files.


def write(path: Path, data, form):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in data)
    if form == "parquet":
        from datasets import Dataset

        Dataset.from_list(data).to_parquet(path)
    elif form == "parquet.gz":
        write(path.with_suffix(""), data, "parquet")
        path.write_bytes(gzip.compress(path.with_suffix("").read_bytes()))
    elif form == "folder":
        path.mkdir()
        (path / "train.jsonl").write_text(lines, encoding="utf-8")
    elif form == "indented.json":
        path.write_text("\ufeff" + json.dumps(data, indent=2), encoding="utf-8")
    elif form == "json":
        path.write_text(json.dumps(data), encoding="utf-8")
    elif form == "jsonl.bz2":
        path.write_bytes(bz2.compress(lines.encode()))
    elif form.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text("\n" + lines, encoding="utf-8")


FILE_FORMS = [
    "jsonl",
    "lines.json",
    "json",
    "indented.json",
    "jsonl.gz",
    "jsonl.bz2",
    "json.gz",
    "parquet",
    "parquet.gz",
]


@pytest.mark.parametrize("form", [*FILE_FORMS, "folder"])
def test_reads(form, tmp_path):
    data = [
        {key: row[key] for key in ("prompt", "chosen", "rejected")} | {"id": f"é{at}"} for at, row in enumerate(rows())
    ]
    path = tmp_path / f"pairs.v1.{form}"
    write(path, data, form)
    assert list(read_pairs(str(path))) == data


@pytest.mark.parametrize("size", [10, 70_000, 200_000])  # less than one reading, and much more
def test_reads_long_elements_of_an_array(size, tmp_path):
    data = [{"prompt": "p", "chosen": "[" + "a" * size, "rejected": f"b\n{at}, ]"} for at in range(5)]
    (tmp_path / "pairs.json").write_text(json.dumps(data))
    assert list(read_pairs(str(tmp_path / "pairs.json"))) == data


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gets_a_prompt(form, tmp_path):
    write(tmp_path / "pairs.jsonl", FORMS[form], "jsonl")
    pairs = list(read_pairs(str(tmp_path / "pairs.jsonl")))
    assert len(pairs) == 8
    for pair, row in zip(pairs, FORMS[form], strict=True):
        assert type(pair["prompt"]) is type(pair["chosen"]) is type(pair["rejected"])
        if "prompt" not in row:  # nothing is lost, and nothing is there twice
            assert pair["prompt"] + pair["chosen"] == row["chosen"]
            assert pair["prompt"] + pair["rejected"] == row["rejected"]
            assert all(pair.values())


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (
            '{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": "p", "chosen": "a"}',
            "Row 2 .* has no column 'rejected'",
        ),
        ('{"chosen": ["a"], "rejected": "b"}', "Row 1 .* has a list of str as 'chosen'"),
        ('{"prompt": "p", "chosen": "a", "rejected": "b"}\n\n{"prompt":', "Line 3 of .* is not JSON"),
        ('"text"', "Row 1 .* is not a JSON object"),
        ('[{"prompt": "p", "chosen": "a", "rejected": "b"}, 3]', "Row 2 .* is not a JSON object"),
        ('[{"prompt": "p", "chosen": "a", "rejected": "b"}, {"pro', "cannot be read"),
        ("", "no rows"),
        ("[]", "no rows"),
    ],
)
def test_a_bad_row_is_named(content, complaint, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=complaint) as error:
        list(read_pairs(str(path)))
    assert str(path) in str(error.value)


def test_what_is_not_there_or_no_such_file(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.jsonl.*not found"):
        list(read_rows("nowhere.jsonl"))
    with pytest.raises(InputError, match="no/such: cannot be read"):
        list(read_rows("no/such"))
    with pytest.raises(InputError, match="cannot be read"):
        list(read_rows(str(tmp_path)))  # an empty folder
    for name in ("no.parquet", "no.jsonl.gz"):
        (tmp_path / name).write_text("no")
        with pytest.raises(InputError, match=f"{name}: cannot be read"):
            list(read_rows(str(tmp_path / name)))


def test_rows_are_read_one_at_a_time(tmp_path):
    # What comes after the rows that were asked for is not even looked at.
    good = json.dumps({"prompt": "p", "chosen": "a", "rejected": "b" * 70_000})
    for name, content in {"a.jsonl": f"{good}\n{good}\nbroken", "a.json": f"[{good},{good}, broken"}.items():
        (tmp_path / name).write_text(content)
        pairs = read_pairs(str(tmp_path / name))
        assert [len(next(pairs)["rejected"]) for _ in range(2)] == [70_000, 70_000]
        with pytest.raises(InputError):
            next(pairs)


def test_tool_calls_and_parts_are_text():
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    pair = {
        "prompt": message("user", "p"),
        "chosen": [{"role": "assistant", "content": parts}],
        "rejected": [{"role": "assistant", "content": None, "tool_calls": [call]}],
    }
    part = statistics([pair])["before"]
    assert part["chosen_tokens"]["mean"] == 2
    assert part["rejected_tokens"]["mean"] == len(words(json.dumps([call])))


# The table.


def test_table_reads_by_itself():
    text = table(statistics(rows(), tokenizer=make_tokenizer(), max_length=44))
    assert max(map(len, text.splitlines())) <= 104
    assert "8 pairs. 0.0% identical" in text
    assert "max_length=44 as in training (keep_start)" in text
    assert text.count("  after ") == 9
    for name in ("jaccard", "levenshtein", "shared_prefix_share", "length_ratio"):
        assert re.search(rf"^{name} +[\d.,]+", text, re.MULTILINE)
    assert text.count("is closer") >= 5


def test_table_shows_where_pairs_lie():
    pairs = [{"prompt": "p", "chosen": "a b c d", "rejected": side} for side in ("a b c d", "a b c d", "x")]
    line = next(line for line in table(statistics(pairs)).splitlines() if line.startswith("jaccard"))
    assert line.endswith("0 ▄        █ 1")
    assert re.findall(r"[\d.]+", line)[:6] == ["0.667", "1.000", "0.100", "1.000", "0.000", "1.000"]


def test_table_of_nothing():
    assert table(Statistics().summary()) == "No pairs."


# Overlap with evaluation sets.

QUESTION = "If Ann has 3 apples and Bob has twice as many, how many apples do they have together?"  # 17 words
NUMBER_WORDS = [f"word{at}" for at in range(40)]


@pytest.fixture
def evals(tmp_path):
    path = tmp_path / "evals.jsonl"
    path.write_text(json.dumps({"question": QUESTION}) + "\n" + json.dumps({"question": "What is 2+2?"}))
    return EvalSets([str(path)])


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        (QUESTION, True),
        (QUESTION.upper().replace(",", " ;\n").replace("?", ""), True),
        (f"Solve this. {QUESTION} Think step by step.", True),
        ("what is 2 + 2", True),
        ("What is 2+2? Tell me.", False),  # shorter than 13 words: only as a whole
        ("How many apples do they have together?", False),
        ("", False),
        ("?!", False),
    ],
)
def test_matches(prompt, found, evals):
    assert bool(evals.add("id", prompt)) is found


@pytest.mark.parametrize(("shared", "found"), [(12, False), (13, True), (14, True)])
@pytest.mark.parametrize("start", [0, 9, 27])  # 27: the last thirteen
def test_thirteen_words_in_a_row(shared, found, start, tmp_path):
    (tmp_path / "evals.jsonl").write_text(json.dumps({"text": " ".join(NUMBER_WORDS)}))
    prompt = ["before", *NUMBER_WORDS[start : start + shared], "after"]
    assert bool(EvalSets([str(tmp_path / "evals.jsonl")]).add("id", " ".join(prompt))) is found


@pytest.mark.parametrize("form", FILE_FORMS)
@pytest.mark.parametrize("field", ["prompt", "question", "instruction", "problem", "text", "messages"])
def test_eval_sets_of_every_form(form, field, tmp_path):
    turns = [{"role": "system", "content": "Be good."}, *message("user", QUESTION), *message("assistant", "9")]
    path = tmp_path / f"evals.{form}"
    write(path, [{field: turns if field == "messages" else QUESTION, "answer": "9"}], form)
    sets = EvalSets([str(path)])
    assert sets.add("id", QUESTION) == [str(path)]
    assert not sets.add("id", "Be good.")


def test_overlap_is_counted(tmp_path):
    for name in ("one", "two", "three"):
        write(tmp_path / f"{name}.jsonl", [{"question": QUESTION}, {"question": f"Also {name}"}], "jsonl")
    write(tmp_path / "three.jsonl", [{"question": "Something else"}], "jsonl")
    paths = [str(tmp_path / f"{name}.jsonl") for name in ("one", "two", "three")]
    sets = EvalSets(paths)
    for at in range(25):
        assert sets.add(f"row-{at}", QUESTION) == paths[:2]
    assert sets.add("last", "also TWO") == [paths[1]]
    first = [f"row-{at}" for at in range(20)]
    assert sets.summary() == {
        paths[0]: {"prompts": 2, "matches": 25, "ids": first},
        paths[1]: {"prompts": 2, "matches": 26, "ids": first},
        paths[2]: {"prompts": 1, "matches": 0, "ids": []},
    }


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", '{"question": "Why?"}\n{"answer": "so", "id": 3}', "row 2 .* has no prompt .* are answer, id"),
        ("a.jsonl", '{"messages": [{"role": "assistant", "content": "Hello"}]}', "row 1 .* has no prompt"),
        ("a.jsonl", "", "holds no words"),
        ("a.jsonl", '{"text": "..."}', "holds no words"),
        ("a.jsonl.gz", "not packed", "cannot be read"),
    ],
)
def test_a_bad_eval_set_is_named(name, content, complaint, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=complaint) as error:
        EvalSets([str(tmp_path / name)])
    assert name in str(error.value)


def test_an_eval_set_that_is_not_there():
    with pytest.raises(InputError, match=r"eval_sets: file nowhere\.jsonl not found"):
        EvalSets(["nowhere.jsonl"])


def test_prompt_text_takes_the_users_turns():
    conversation = [*message("user", "First"), *message("assistant", "Yes"), *message("user", [{"text": "Second"}])]
    assert prompt_text({"messages": conversation}) == "First\nSecond"
    assert prompt_text({"prompt": None, "question": " ", "text": "third"}) == "third"
    assert prompt_text({"prompt": ["turn one", "turn two"]}) == "turn one\nturn two"
    assert prompt_text({"answer": "no"}) is None


# The package.


def test_neither_torch_nor_trl(tmp_path):
    write(tmp_path / "pairs.parquet", CONVERSATIONS, "parquet")
    write(tmp_path / "pairs.jsonl", CONVERSATIONS, "jsonl")
    code = f"""
import sys
from apo_trl.pairs.statistics.overlap import EvalSets
from apo_trl.io.readers import read_pairs
from apo_trl.pairs.statistics.statistics import Statistics
from apo_trl.pairs.statistics.table import table
for name in ("pairs.parquet", "pairs.jsonl"):
    made = Statistics()
    for row in read_pairs({str(tmp_path)!r} + "/" + name):
        made.add(row)
    print(len(table(made.summary())))
EvalSets([{str(tmp_path / "pairs.jsonl")!r}])
sys.exit(str({{"torch", "trl", "transformers", "datasets"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()", done.stderr


# Real pairs.


def whitespace_means(name):
    found = [
        contrast("", row["chosen"][0]["content"], row["rejected"][0]["content"], tokenize=str.split)
        for row in read_pairs(str(DATA / f"{name}.jsonl.gz"))
    ]
    return [math.fsum(one[measure] for one in found) / len(found) for measure in ("jaccard", "shared_prefix_share")]


# By plain sets of words between spaces, computed by other code.
@real_data
@pytest.mark.parametrize(
    ("name", "jaccard", "prefix"),
    [
        ("clair_gpt4_revisions", 0.28, 0.016),
        ("truthfulqa_best_vs_incorrect", 0.26, 0.105),
        ("humanevalfix_6lang", 0.925, 0.662),
        ("quixbugs_python", 0.93, 0.650),
        ("gsm8k_model_solutions", 0.33, 0.030),
    ],
)
def test_figures_of_real_pairs(name, jaccard, prefix):
    found = whitespace_means(name)
    assert found == [pytest.approx(jaccard, abs=0.0051), pytest.approx(prefix, abs=0.00051)]


@real_data
def test_a_bug_and_its_fix_are_closer_than_two_answers():
    fixes, answers = (
        statistics(read_pairs(str(DATA / f"{name}.jsonl.gz")))["before"]
        for name in ("humanevalfix_6lang", "truthfulqa_best_vs_incorrect")
    )
    assert (fixes["pairs"], answers["pairs"]) == (984, 3298)
    for measure in ("jaccard", "shared_prefix", "shared_prefix_share"):
        assert fixes[measure]["mean"] > answers[measure]["mean"], measure
    for measure in ("levenshtein", "levenshtein_normalised"):
        assert fixes[measure]["mean"] < answers[measure]["mean"], measure
    assert abs(math.log(fixes["length_ratio"]["mean"])) < abs(math.log(answers["length_ratio"]["mean"]))
