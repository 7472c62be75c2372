"""Checks of answers: what each takes for right, what for wrong, and what it says about real answers."""

import gzip
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from apo_trl import checks
from apo_trl.checks import CHECKS, broken, by_kind
from apo_trl.errors import InputError
from apo_trl.pairs.instructions import revise, reward

DATA = Path(os.environ.get("APO_TRL_DATA", "/nowhere"))
real_data = pytest.mark.skipif(not DATA.is_dir(), reason="APO_TRL_DATA names no folder of real preference pairs")


def real_answers(name: str, column: str = "chosen") -> list[str]:
    with gzip.open(DATA / f"{name}.jsonl.gz", "rt") as file:
        return [json.loads(line)[column][-1]["content"] for line in file]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "empty"),
        (" \n\t", "empty"),
        ("4", None),
        ("Yes.", None),
        ("ha ha ha", None),
        ("No, no, no, no!", None),
        ("Rain is water. " * 2, None),
        ("Rain is water. " * 3, "repetition"),
        ("Rain is water. Rain is water. Rain is water", "repetition"),
        ("Rain falls from clouds.\n" * 3, "repetition"),
        ("Rain is water and it is very very very very very very very good", "repetition"),
        ("Clouds hold a lot of water. In the end, it falls, and falls, and falls", None),
        ("In the end, it falls, and falls, and falls, and falls, and falls, and", "repetition"),
        ("It is so " + "and it falls " * 5, "repetition"),
        ("Good text that goes well. " + "a" * 40, "repetition"),
        ("hah" + "ahah" * 30, "repetition"),
        ("!" * 60, "repetition"),
        ("10 / 3 = 3." + "3" * 60, "repetition"),
        ("-" * 60, None),
        ("| a | b |\n|---|---|\n" + "| 1 | 2 |\n" * 9, None),
        ("1 - 1 - 1 - 1 - 1 - 1 - 1 - 1 = -6", None),
        ("- Rain is water.\n- Snow is ice.\n- Hail is ice too.\n- Fog is water in the air.", None),
        ("We skate on ice. We skate on snow. We skate on grass. We skate on roads.", None),
        ("雨は水です。" * 4, "repetition"),
        ("雨は水です。雪も水です。", None),
        ("The sky is blue because air scatters the short waves of light. " * 2, "repetition"),
    ],
)
def test_an_answer_is_broken_if_it_is_empty_or_repeats_itself(text, expected):
    assert broken(text) == expected


@real_data
@pytest.mark.parametrize(
    ("name", "rows", "most"),
    [
        ("clair_gpt4_revisions", 20, 0),
        ("truthfulqa_best_vs_incorrect", 3298, 0),
        ("gsm8k_model_solutions", 1894, 0),
        ("quixbugs_python", 40, 0),
        ("humanevalfix_6lang", 984, 5),  # tests that repeat one line
    ],
)
def test_real_answers_are_not_broken(name, rows, most):
    answers = real_answers(name)
    assert len(answers) == rows
    assert sum(bool(broken(answer)) for answer in answers) <= most


@pytest.mark.parametrize(
    ("kind", "argument", "only", "answer"),
    [
        ("ends_with", "DONE", "DONE", "Rain is water. DONE"),
        ("ends_with", "DONE", "Sure thing DONE.", "Sure, one thing. DONE."),
        ("max_sentences", "1", "Rain falls.", "Rain falls from clouds."),
        ("lowercase", None, "so it", "so it is"),
        ("max_words", "20", "Rain!", "It is rain."),
        ("max_words", "20", "Rain is water. " * 3, "Rain is water. Snow is water too."),
    ],
)
def test_an_instruction_is_followed_only_by_an_answer(kind, argument, only, answer):
    columns = {"kind": [kind] * 2, "argument": [argument] * 2}
    assert reward(completions=[only, answer], **columns) == [0.0, 1.0]
    assert revise(completions=[only, answer], **columns) == [None, None]


BOXED = r"So $\boxed{\frac{3}{4}}$ of it, not 2."
SCHEMA = {"type": "object", "required": ["age"], "properties": {"age": {"type": "integer"}}}
CASES = {
    "exact": [
        ("Paris", "Paris", 1),
        ("  paris.\n", "Paris", 1),
        ("**Paris**", "PARIS", 1),
        ("The capital? The answer is: **Paris**. It is old.", "Paris", 1),
        ("Answer:\nParis", "paris", 1),
        ("The answer is Rome. No, the answer to the question is Paris.", "Paris", 1),
        ("The answer is Paris. No, the answer is Rome.", "Paris", 0),
        (r"I think of Rome. \boxed{Paris}", "Paris", 1),
        ("Paris or Rome", "Paris", 0),
        ("Not Paris", "Paris", 0),
        ("(B)", "b", 1),
        ("-3", "3", 0),
        ("C++", "C", 0),
        ("?", "!", 0),
        ("NY", ["New York", "NY"], 1),
        ("NY", '["New York", "NY"]', 1),
        ("answering is Paris", "Paris", 0),
        ("**Answer:**\nParis", "Paris", 1),
        ("The answer is:\n\\[\n72\n\\]", "72", 1),
        ("The answer is Paris.\n\nI hope this answer is helpful!", "Paris", 1),
        ("The answer is St. Petersburg.", "St. Petersburg", 1),
        ("#### Final Answer\nParis", "Paris", 1),
        ("It is old. #### Paris", "Paris", 1),
        (r"\boxed{\text{Paris}}", "Paris", 1),
        (r"\boxed{\textbf{(B)}}", "B", 1),
        ("The answer is {1, 2}.", "{1, 2}", 1),
    ],
    "number": [
        ("18", 18, 1),
        ("It makes 9 * 2 = $18.", "18", 1),
        ("It makes 9 * 2 = $18. That is 3 more.", "18", 0),
        ("The answer is 18. That is 3 more.", "18", 1),
        ("9 * 2 = 18\n#### 18", "It is so. #### 18", 1),
        ("3 of them\n#### 1,018 ", "1018", 1),
        (r"\boxed{18} of 20", 18.0, 1),
        (BOXED, "0.75", 1),
        (BOXED, "3/4", 1),
        ("1 1/2 cups", 1.5, 1),
        (r"1\frac{1}{2}", "3/2", 1),
        ("1,234,567.50", 1234567.5, 1),
        ("12,34", 1234, 0),
        ("-5", 5, 0),
        ("-$5.00", -5, 1),
        ("It is −5", "-5", 1),
        ("16-3", 3, 1),
        ("16 - 3 is 13", -13, 0),
        ("50%", 50, 1),
        ("50 %", 0.5, 1),
        ("0.5", "50%", 1),
        ("5%", 50, 0),
        ("1e3", 1000, 1),
        ("1/3", 0.333333333, 1),
        ("0.33", "1/3", 0),
        ("10 / 0", 10, 0),
        ("9" * 5000, 9, 0),
        ("no number", 0, 0),
        ("H2O", 2, 0),
        ("eighteen", 18, 0),
        ("18.", 18, 1),
        ("**The answer is:**\n\n18", 18, 1),
        ("The answer is:\n\n$$\n18\n$$", 18, 1),
        ("### Answer\n18\n\nI read it 3 times.", 18, 1),
        ("Find the answer\nof 3 and 15.\nIt is 18", 18, 1),
        ("The answer is .5", 0.5, 1),
        ("The answer is 18. Let me know if my answer is unclear.", 18, 1),
        ("It is 18 or more. The answer is unknown.", 18, 0),
        ("#### Step 2: add 9\n9 + 9 = 18", 18, 1),
        ("#### 1. Add\n9 + 9 = 18", 18, 1),
        ("#### 18\n\nShe has 18 of 20.", 18, 1),
        (r"18 of 20, \boxed{\text{none}}", 20, 0),
        (r"\boxed{18 \text{ cm}^2}", 18, 1),
        ("18 cm^2", 18, 1),
        (r"\boxed{10,\!080}", 10080, 1),
        (r"\boxed{12\,000}", 12000, 1),
        (r"\boxed{\frac{-3}{4}}", -0.75, 1),
        (r"\boxed{-1\frac{3}{4}}", -1.75, 1),
        (r"\boxed{\sqrt{2}}", 2, 0),
    ],
    "contains": [
        ("Rain is wet.", "rain", 1),
        ("Raining is wet.", "rain", 0),
        ("Rain  is\nwet.", "is wet", 1),
        ("Don’t go.", "don't", 1),
        ("C++ is fast.", "c++", 1),
        ("Rain is wet.", ["rain", "wet"], 1),
        ("Rain is wet.", '["rain", "dry"]', 0),
        ("雨は水です", "水", 1),
        ("[rain]", "[rain", 1),
    ],
    "avoids": [
        ("Rain is wet.", "rain", 0),
        ("Raining is wet.", "rain", 1),
        ("It is wet.", ["rain", "wet"], 0),
        ("It is so.", ["rain", "wet"], 1),
    ],
    "min_words": [("It's well-known, 3.5.", 3, 1), ("It's well-known, 3.5.", 4, 0), ("— * — -", 1, 0)],
    "max_words": [
        ("It's well-known, 3.5.", "3", 1),
        ("and/or", 1, 0),
        ("water—the wet thing", 3, 0),
        ("- one\n- two", 2, 1),
        ("雨は水です", 5, 1),
        ("雨は水です", 4, 0),
    ],
    "min_sentences": [("Yes. No.", 2, 1), ("Yes, no.", 2, 0)],
    "max_sentences": [
        ("It is 3.5 m long.", 1, 1),
        ("Dr. Smith met J. R. Jones at 5 p.m. in the U.S. today.", 1, 1),
        ("rain is water. it falls.", 1, 0),
        ("Martin Luther King Jr. was born near Mt. Airy.", 1, 1),
        ("Apples, pears, etc. are sold by Fruit Inc. in tins.", 1, 1),
        ("He sells apples, pears, etc. They are good.", 1, 0),
        ("So do I. So do you.", 1, 0),
        ('"Really?" he said "No!" Then he left.', 2, 0),
        ("A title\n\nIt is so.", 1, 0),
        ("1. First.", 1, 1),
        ("Wait... what?!", 2, 1),
        ("雨です。雪です。", 1, 0),
        ("雨です。", 1, 1),
    ],
    "lowercase": [("it is 5 o'clock.", None, 1), ("it is I.", None, 0)],
    "uppercase": [("IT IS 5.", None, 1), ("IT Is.", None, 0)],
    "starts_with": [
        ("In short: rain.", "In short:", 1),
        (" In short: rain.", "In short:", 1),
        ("In short:", "In short:", 0),
        ("in short: rain", "In short:", 0),
        ("Yesterday it was.", "Yes", 0),
        ("Yes, it was.", "Yes", 1),
    ],
    "ends_with": [
        ("Rain. DONE", "DONE", 1),
        ("Rain. DONE.\n", "DONE", 1),
        ("DONE", "DONE", 0),
        ("DONE.", "DONE", 0),
        ("It is UNDONE", "DONE", 0),
        ("It is done", "DONE", 0),
        ("Is it so?", "so?", 1),
        ("It is the end.", "the end.", 1),
    ],
    "list_items": [
        ("1. a\n2. b\n3. c", 3, 1),
        ("1) a\n2) b", 3, 0),
        ("Here:\n- a\n- b\n\n- c\nThat is all.", "3", 1),
        ("  - a\n  - b", 2, 1),
        ("1. a\n   - x\n   - y\n2. b", 2, 1),
        ("1. a\n- x\n- y\n2. b", 2, 1),
        ("**1. a**\n**2. b**", 2, 1),
        ("* * *\n- \n- a", 1, 1),
        ("**a** is bold\n-5 is a number", 0, 1),
        ("no list", 1, 0),
    ],
    "json_schema": [
        ('{"age": 3}', SCHEMA, 1),
        ('{"age": 3}', json.dumps(SCHEMA), 1),
        ('{"age": "3"}', SCHEMA, 0),
        ('Sure:\n```json\n{"age": 3}\n```\nDone.', SCHEMA, 1),
        ('Sure: {"age": 3}', SCHEMA, 0),
        ("[1, 2]", {}, 1),
        ('{"age": NaN}', {}, 0),
        ("{'age': 3}", {}, 0),
        ("[" * 100_000, {}, 0),
        ('{"age": 3}', {"$ref": "#/$defs/x", "$defs": {"x": SCHEMA}}, 1),
    ],
    "compiles": [
        ("Sure:\n```python\ndef f(x):\n    return x\n```\nDone.", None, 1),
        ("```\nx = (\n```\nbetter:\n```py\nx = 1\n```", None, 1),
        ("```\nx = 1\n```\nbetter:\n```py\nx = (\n```", None, 0),
        ("def f(x):\n    return x", None, 1),
        ("    def f(x):\n        return x", None, 1),
        ("Rain", None, 0),
        ("It is rain.", None, 0),
        ("```\n# only a comment\n```", None, 0),
        ("return 5", None, 0),
        ("x = '\\d'", None, 1),
        ("raise SystemExit", None, 1),
        ("x = " + "(" * 5000, None, 0),
        ("x = 1\0", None, 0),
    ],
}


def columns_of(name: str, value) -> dict:
    parameters = list(inspect.signature(CHECKS[name]).parameters)
    return {parameters[1]: [value]} if len(parameters) == 3 else {}


@pytest.mark.parametrize(("name", "text", "value", "score"), [(name, *case) for name in CASES for case in CASES[name]])
def test_a_check_scores(name, text, value, score):
    for completion in (text, [{"role": "assistant", "content": text}]):
        assert CHECKS[name](prompts=["?"], completions=[completion], **columns_of(name, value)) == [float(score)]
    assert by_kind(completions=[text], kind=[name], argument=[value]) == [float(score)]


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_scores_an_empty_answer_0_and_a_row_without_its_column_none(name):
    assert set(CASES) == set(CHECKS)
    assert getattr(checks, name) is CHECKS[name]  # as TRL's scripts find it
    value = CASES[name][0][1]
    for empty in ("", " \n", [{"role": "assistant", "content": None}], [{"role": "assistant", "content": []}]):
        assert CHECKS[name](completions=[empty], **columns_of(name, value)) == [0.0]
    if column := next(iter(columns_of(name, value)), None):
        assert CHECKS[name](completions=["a"], **{column: [None]}) == [None]
        with pytest.raises(InputError, match=f"^{column}: column required by the check '{name}'"):
            CHECKS[name](completions=["a"])


@pytest.mark.parametrize(
    ("kind", "argument", "message"),
    [
        ("max_word", "20", "^kind: unknown check 'max_word'. Did you mean 'max_words'"),
        ("max_words", None, "^argument: required by the check 'max_words', not set"),
        ("max_words", "many", "^max_words: cannot check with 'many'.*Correct the row"),
        ("number", "many", "^number: cannot check with 'many'.*no number.*Correct the row"),
        ("contains", "", "^contains: cannot check with ''.*empty.*Correct the row"),
        ("json_schema", {"type": "nothing"}, "^json_schema: cannot check with .*no JSON schema.*Correct the row"),
    ],
)
def test_a_row_that_cannot_be_checked(kind, argument, message):
    with pytest.raises(InputError, match=message):
        by_kind(["text"], [kind], [argument])


def test_kinds_are_mixed_and_combined():
    kinds = ["lowercase", "number", None, ["max_words", "contains"], ["lowercase", "max_words"]]
    arguments = [None, "3", None, [3, "rain"], '[null, "2"]']
    texts = ["a", "3", "any", "It is rain.", "this is long"]
    assert by_kind(texts, kinds, arguments) == [1.0, 1.0, None, 1.0, 0.0]
    assert by_kind(["a", "B"], ["lowercase", "lowercase"]) == [1.0, 0.0]


def test_without_jsonschema_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(InputError, match=r"^jsonschema: required, not installed.*apo-trl\[checks\]"):
        checks.json_schema(["{}"], json_schema=[{}])


def test_checks_load_nothing_heavy():
    code = "import sys, apo_trl.checks; print(*(set(sys.modules) & {'torch', 'numpy', 'pyarrow', 'transformers'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def labelled(text: str) -> str:
    return text.rsplit("A:", 1)[-1].strip().replace(",", "").lstrip("$")


@real_data
def test_numbers_of_real_solutions_agree_with_their_labels():
    chosen = real_answers("gsm8k_model_solutions")
    labels = [labelled(text) for text in chosen]
    assert CHECKS["number"](chosen, answer=labels) == [1.0] * 1894
    rejected = real_answers("gsm8k_model_solutions", "rejected")
    rows = [row for row in zip(rejected, labels, strict=True) if re.fullmatch(r"-?[0-9.]+", labelled(row[0]))]
    right = [float(float(labelled(text)) == float(label)) for text, label in rows]
    texts, labels = zip(*rows, strict=True)
    assert len(rows) == 1886  # others end without a label
    assert CHECKS["number"](texts, answer=labels) == right
    assert CHECKS["exact"]([text.replace("A:", "Answer:") for text in texts], answer=labels) == right


@real_data
@pytest.mark.parametrize(("name", "count"), [("quixbugs_python", 40), ("humanevalfix_6lang", 164)])
def test_real_python_compiles(name, count):
    with gzip.open(DATA / f"{name}.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    rows = [row for row in rows if row.get("language", "python") == "python"]
    codes = [row["chosen"][-1]["content"] for row in rows]
    assert len(codes) == count
    assert checks.compiles(codes) == [1.0] * count
    fenced = [f"Here it is:\n```python\n{code}\n```\nIt is correct." for code in codes]
    assert checks.compiles(fenced) == [1.0] * count
    assert sum(checks.compiles([code.rstrip()[:-1] + "(" for code in codes])) == 0
