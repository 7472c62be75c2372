"""Rules for rows: what is refused, and what is left out."""

import math

import pytest
from datasets import Dataset

from apo_trl.datasets.preprocessing import normalise_datasets
from apo_trl.errors import InputError, InvalidRow, nearest
from apo_trl.io.rows import degenerate_reason, normalise_row


def says(text):
    return [{"role": "assistant", "content": text}]


GOOD = {"prompt": [{"role": "user", "content": "Hi"}], "chosen": says("Hello."), "rejected": says("No.")}


@pytest.mark.parametrize(
    "row",
    [
        GOOD,
        {"prompt": "Hi", "chosen": " Hello.", "rejected": " No."},
        {"chosen": GOOD["prompt"] + says("Hello."), "rejected": GOOD["prompt"] + says("No.")},
        {**GOOD, "chosen": [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]},
        {"prompt": "", "chosen": "a", "rejected": "b"},
        GOOD | {"prompt": "Hi"},
    ],
)
def test_good_rows(row):
    normal = normalise_row(row)
    assert normalise_row(normal) == normal


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chosen": None}, "no 'chosen'"),
        ({"rejected": None}, "no 'rejected'"),
        ({"prompt": None}, "no 'prompt'"),
        ({"chosen": 3}, "int as 'chosen'"),
        ({"chosen": ["a"]}, "list of str as 'chosen'"),
        ({"chosen": [{"content": "a"}]}, "without 'role' in 'chosen'"),
        ({"prompt": []}, "empty list as 'prompt'"),
        ({"chosen": "text"}, "string as 'chosen' beside a list of messages"),
        ({"prompt": "text", "chosen": "text"}, "string as 'chosen' and 'prompt' beside a list of messages"),
    ],
)
def test_bad_rows_are_named(change, words):
    with pytest.raises(InvalidRow, match=words):
        normalise_row(GOOD | change)


@pytest.mark.parametrize("wins", [0, 1, 0.5, 1.0])
def test_good_chosen_wins(wins):
    assert normalise_row({**GOOD, "chosen_wins": wins}, needs_wins=True)["chosen_wins"] == wins


@pytest.mark.parametrize("wins", [None, True, "0.5", math.nan, -0.01, 1.01, math.inf])
def test_bad_chosen_wins(wins):
    with pytest.raises(InvalidRow, match="chosen_wins"):
        normalise_row({**GOOD, "chosen_wins": wins}, needs_wins=True)
    assert normalise_row({**GOOD, "chosen_wins": wins})  # no loss reads it


def test_the_first_bad_row_is_numbered():
    rows = [GOOD, GOOD, GOOD | {"rejected": None}, GOOD | {"rejected": None}]
    with pytest.raises(InputError, match=r"^Row 2 of the train dataset has no 'rejected'"):
        normalise_datasets(Dataset.from_list(rows), "train")


def test_a_missing_column_is_named_with_the_nearest():
    data = Dataset.from_list([GOOD]).rename_column("chosen", "choosen")
    with pytest.raises(InputError, match=r"no column 'chosen'.*Did you mean 'choosen'\?"):
        normalise_datasets(data, "train")


def test_no_rows():
    with pytest.raises(InputError, match="has no rows"):
        normalise_datasets(Dataset.from_list([GOOD]).select([]), "eval")


def test_nearest():
    assert nearest("apo_zro", ["apo_zero", "sigmoid"]) == " Did you mean 'apo_zero'?"
    assert nearest("qqqq", ["apo_zero", "sigmoid"]) == ""


USER, OTHER = {"role": "user", "content": "Hi"}, {"role": "user", "content": "And now?"}


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        (says("Yes."), says("No."), [USER]),  # answers alone: the text is the user's message
        ([USER, *says("Yes.")], [USER, *says("No.")], [USER]),  # whole conversations
        ([USER, *says("Well."), OTHER, *says("Yes.")], [USER, *says("Well."), OTHER, *says("No.")],
         [USER, *says("Well."), OTHER]),
        (says("Same."), says("Same."), [USER]),
        ([USER, *says("Same.")], [USER, *says("Same.")], [USER]),
        ([], says("No."), [USER]),
    ],
)  # fmt: skip
def test_a_text_beside_two_conversations(chosen, rejected, prompt):
    got = normalise_row({"prompt": "Hi", "chosen": chosen, "rejected": rejected})
    assert got == {"prompt": prompt, "chosen": chosen[-1:] or says(""), "rejected": rejected[-1:]}


def tokens(prompt, chosen, rejected):
    return {**GOOD, "prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}


@pytest.mark.parametrize(
    ("row", "settings", "reason"),
    [
        (GOOD, {}, None),
        (GOOD | {"chosen": GOOD["rejected"]}, {}, "chosen equals rejected"),
        (GOOD | {"chosen": says(" \n")}, {}, "a completion is empty"),
        (GOOD | {"rejected": []}, {}, "a completion is empty"),
        (GOOD | {"chosen": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]}, {}, None),
        ({"prompt": "a", "chosen": "</s>", "rejected": "b</s>"}, {"eos_token": "</s>"}, "a completion is empty"),
        (tokens([1, 2], [3, 4], [3, 5]), {}, None),
        (tokens([1, 2], [3, 4], [3, 4]), {}, "chosen equals rejected as tokens"),
        (tokens([1, 2], [], [3]), {}, "a completion is empty"),
        (tokens([1, 2], [3, 4], [3, 5]), {"max_length": 4}, None),
        (tokens([1, 2], [3, 4], [3, 5]), {"max_length": 3}, "chosen equals rejected after truncation to max_length=3"),
        (tokens([1, 2], [3, 9], [5, 9]), {"max_length": 2, "keep_end": True}, None),
        (
            tokens([1, 2], [3, 9], [5, 9]),
            {"max_length": 1, "keep_end": True},
            "chosen equals rejected after truncation to max_length=1",
        ),
    ],
)
def test_useless_pairs_have_a_reason(row, settings, reason):
    assert degenerate_reason(row, **settings) == reason
