"""Which revisions are dropped, and above all which are not: every rule has the good revision that it must let pass."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apo_trl.pairs.text.filters import REVISION_REASONS, RevisionLimits, is_refusal, revision_reason

DATA = Path(os.environ.get("APO_TRL_DATA", "/nowhere"))
PAIRS = {
    "clair_gpt4_revisions": 20,
    "gsm8k_model_solutions": 1894,
    "humanevalfix_6lang": 984,
    "quixbugs_python": 40,
    "truthfulqa_best_vs_incorrect": 3298,
}
LIMITED = {"gsm8k_model_solutions": 31}  # solutions by two models of one problem, all of 200 characters or more


def read(name: str) -> list[dict]:
    with gzip.open(DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


TASK = "What makes the sky blue?"
ENGLISH = (
    "The sky is blue because air scatters short waves of light far more than long ones, in every direction at once."
)
GERMAN_TASK = "Warum ist der Himmel eigentlich blau und nicht grün oder rot?"
GERMAN = (
    "Der Himmel ist blau, weil die Luft kurze Wellen des Lichts viel stärker streut als lange, und zwar überallhin."
)
SPANISH = (
    "El cielo es azul porque el aire dispersa mucho más las ondas cortas de la luz que las largas, y en todas partes."
)
PORTUGUESE = (
    "O céu é azul porque o ar dispersa muito mais as ondas curtas da luz do que as longas, em todas as direções."
)
RUSSIAN = "Небо голубое из-за воздуха."
CHINESE = (
    "天空之所以是蓝色的,是因为空气对短波光的散射远远强于对长波光的散射,而且这种散射同时发生在所有方向上,"
    "所以我们无论朝哪个方向看,都能看到被散射开来的蓝色的光。"
)
JAPANESE = (
    "空が青いのは、空気が波長の短い光を波長の長い光よりもずっと強く、あらゆる方向に同時に散乱させるからです。"
    "そのため、どの方向を見ても、散らばった青い光が目に入ってきます。"
)
SWEDISH = (
    "Himlen är blå eftersom luften sprider ljusets korta vågor mycket mer än de långa, och det åt alla håll samtidigt."
)
NAMES = "Anna Schmidt, Pedro Lopez, Marie Dupont, Giulia Rossi, Jan Novak, Olga Ivanova, Ken Sato"
CODE = "```python\nprint(1)\n```"


def fault(original, revision, task=TASK, **limits):
    return revision_reason(task, original, revision, RevisionLimits(**limits))


CASES = {
    "a small edit": (ENGLISH, ENGLISH.replace("far more", "much more"), TASK, None),
    "nothing": (ENGLISH, " \n", TASK, "empty"),
    "the same": (ENGLISH, ENGLISH, TASK, "unchanged"),
    "other spaces": (ENGLISH, "\n" + ENGLISH.replace(" ", "  ") + "\n", TASK, "unchanged"),
    # refusals
    "a refusal": (ENGLISH, "I’m sorry, but I can’t help with that.", TASK, "refused"),
    "a better refusal": ("I can't help with that.", "I'm sorry, but I can't help with that.", TASK, None),
    # talk of the revision
    "as a revised answer": (ENGLISH, "As a revised answer: " + ENGLISH, TASK, "mentions_revision"),
    "the corrected solution": (ENGLISH, ENGLISH + " So says the corrected solution.", TASK, "mentions_revision"),
    "here is": (ENGLISH, "Here is the improved version:\n\n" + ENGLISH, TASK, "mentions_revision"),
    "here's, curly": (ENGLISH, "Here’s a clear, improved version. " + ENGLISH, TASK, None),  # two words off
    "I have": (ENGLISH, "I have revised your answer. " + ENGLISH, TASK, "mentions_revision"),
    "this enhanced code": (CODE, CODE + "\nThis enhanced code prints.", "Print one.", "mentions_revision"),
    "heading": (ENGLISH, "**Revised answer:**\n" + ENGLISH, TASK, "mentions_revision"),
    "marker": (ENGLISH, "{teacher_reasoning} " + ENGLISH, TASK, "mentions_revision"),
    "the student": (ENGLISH, ENGLISH + " The student was right.", TASK, "mentions_revision"),
    "students in the task": (ENGLISH, ENGLISH + " The student was right.", "Tell a story of a school.", None),
    "students in the original": ("Students: " + ENGLISH, "The student asks. " + ENGLISH, TASK, None),
    "task about correcting": ("He go.", "Here is the corrected sentence: He goes.", "Correct the grammar here", None),
    "task about improving": ("Old.", "Here is an improved text: New.", "Can you make this text better?", None),
    "a correct answer is no editing": ("4", "The corrected answer is 5.", "What is the answer?", "mentions_revision"),
    "I've, curly": (ENGLISH, "I’ve corrected your answer. " + ENGLISH, TASK, "mentions_revision"),
    "said before": ("The revised answer is 4.", "The revised answer is 5, revised twice.", TASK, None),
    "improved things": (ENGLISH, ENGLISH + " It is an improved version of the old theory.", TASK, None),
    "revised things": (ENGLISH, ENGLISH + " I have revised the contract.", TASK, None),
    # code fences
    "fence lost": (CODE, "print(2)", "Print.", "lost_code_fence"),
    "fence left open": (CODE, "```python\nprint(2)", "Print.", "lost_code_fence"),
    "fence opened only": ("print(1)", "```\nprint(2)", "Print.", "lost_code_fence"),
    "fence won": ("print(1)", CODE, "Print.", None),
    "fence of tildes": (CODE, CODE.replace("```", "~~~"), "Print.", None),
    "fence closed": ("```\nprint(1)", "```\nprint(1)\n```", "Print.", None),
    "stray fence gone": (CODE + "\n```", CODE, "Print.", None),
    "three ticks in a line": ("print(1)", "```print(2)``` does it", "Print.", None),
    # languages
    "German": (ENGLISH, GERMAN, TASK, "changed_language"),
    "back to English": (GERMAN, ENGLISH, GERMAN_TASK, "changed_language"),
    "the task's language": (ENGLISH, GERMAN, GERMAN_TASK, None),
    "the task's language, short": (ENGLISH, GERMAN, "Warum ist der Himmel blau?", None),
    "translation": (ENGLISH, GERMAN, "Translate: why is the sky blue?", None),
    "in German": (ENGLISH, GERMAN, "Why is the sky blue? Say it in German.", None),
    "close languages": (SPANISH, PORTUGUESE, TASK, None),
    "a third language": (ENGLISH, GERMAN, SPANISH, None),
    "short text": ("The sky is blue because of the air.", "Die Luft streut das Licht, und zwar das blaue.", TASK, None),
    "names": (ENGLISH, NAMES, TASK, None),
    "no language": (ENGLISH, "a1b2c3d4e5f6 9f8e7d6c5b4a " * 7, TASK, None),
    "far away too": (ENGLISH * 3, RUSSIAN * 10, TASK, "changed_language"),
    "Cyrillic, short": ("The sky is blue because of air.", RUSSIAN, TASK, None),
    "Han": (ENGLISH, CHINESE, TASK, "changed_language"),
    "Han asked for": (ENGLISH, CHINESE, "天空为什么是蓝色的?", None),
    "Han in Chinese": (ENGLISH, CHINESE, "Say that in Chinese.", None),
    "Han and kana": (CHINESE, JAPANESE, TASK, None),
    "Germanic": (GERMAN, SWEDISH, GERMAN_TASK, "changed_language"),
    "one letter": ("pi", "π", "Which letter?", None),
    "code": ("`" + "print(x) " * 9 + "` " + ENGLISH, ENGLISH + "\n```\n" + GERMAN * 2 + "\n```", TASK, None),
}  # fmt: skip


@pytest.mark.parametrize(("original", "revision", "task", "name"), CASES.values(), ids=CASES)
def test_names_the_rule(original, revision, task, name):
    assert fault(original, revision, task, max_edit_distance=1) == name


def test_every_rule_is_explained_and_tried():
    tried = {name for *_, name in CASES.values() if name} | {"too_far", "length_ratio"}
    assert tried == set(REVISION_REASONS)
    assert all(text.endswith(".") for text in REVISION_REASONS.values())


@pytest.mark.parametrize(
    ("original", "revision", "limits", "name"),
    [
        ("a" * 100, "a" * 340, {}, None),  # 2.5 times as long and 90 characters more
        ("a" * 100, "a" * 341, {}, "length_ratio"),
        ("a" * 341, "a" * 100, {}, "length_ratio"),
        ("a" * 341, "a" * 100, {"max_length_ratio": 3}, None),
        ("a" * 100, "a" * 251, {"length_slack": 0}, "length_ratio"),
        ("", "a" * 300, {}, "length_ratio"),
        ("a" * 10, "b" * 11, {}, None),
        ("a" * 10, "b" * 11, {"distance_slack": 0}, "too_far"),
        ("a" * 200, "b" * 182 + "a" * 18, {}, None),  # 0.85 of 200, and 12 characters more
        ("a" * 200, "b" * 183 + "a" * 17, {}, "too_far"),
        ("a" * 200, "b" * 183 + "a" * 17, {"max_edit_distance": 1}, None),
        ("a" * 200, "b" * 173 + "a" * 26, {}, None),  # shorter: 4 characters more
        ("a" * 200, "b" * 174 + "a" * 25, {}, "too_far"),
        ("The capital is Paris.", "Paris.", {}, None),
        ("Paris.", "The capital is Paris.", {}, None),
        (
            "Euros",
            "In Norway one pays in crowns, and in Germany, as in most of its neighbours, one pays in Euros",
            {},
            None,
        ),
        ("The capital of France is Paris, a city of two million people.", "and", {}, "too_far"),
        ("The capital of France is Paris. " * 6, "and", {}, "length_ratio"),
    ],
)
def test_limits(original, revision, limits, name):
    assert fault(original, revision, **limits) == name


REFUSALS = [
    "I'm sorry, but I can't assist with that.",
    "I’m sorry, but I can’t help with that request.",
    "I cannot help with creating malware.",
    "I can't help you with this. It would be harmful.",
    "As an AI language model, I can't provide that.",
    "As a large language model, I am not able to generate such content.",
    "Sorry, I can't do that.",
    "**I'm unable to assist with this.**",
    "I must decline this request.",
    "Unfortunately, I cannot fulfill your request.",
    "I apologize, but as an AI assistant, I won't be able to write that.",
    "I'm sorry, but that's not something I can help with.",
    "I'm not comfortable providing that.",
    "I won't write that story.",
    "**Sorry** - I can't respond to that.",
]
NO_REFUSALS = [
    "",
    "I can't recommend this enough!",
    "I can't give enough thanks to the crew.",
    "I'm sorry to hear that you lost your job. Here is what helps: rest, friends, and a plan.",
    "I cannot help but wonder why.",
    "That's something I can do for you!",
    "I'm afraid of heights, so I can't help with ladders.",
    "I can't help it.",
    "I can't provide exact numbers, but about two million people live in Paris.",
    "As an AI language model, I have no feelings. Joy is a state of mind.",
    "Sorry, the answer is 4.",
    "Unfortunately, the law does not help you here.",
    '"I can\'t help you with that," said the dragon.',
    "Say: I can't help with that.",
    "I can't answer every part of it. " + "What is known is this: the sky is blue. " * 20,
    "I can't help with the last part of it. " + "What is known is this: the sky is blue. " * 40,
]


@pytest.mark.parametrize("text", REFUSALS)
def test_refusal(text):
    assert is_refusal(text)


@pytest.mark.parametrize("text", NO_REFUSALS)
def test_no_refusal(text):
    assert not is_refusal(text)


@settings(deadline=None)
@given(st.text(), st.text(), st.text())
def test_any_text_has_a_known_fault_or_none(task, original, revision):
    assert fault(original, revision, task) in {None, *REVISION_REASONS}
    assert fault(original, original, task) in ("empty", "unchanged")
    assert is_refusal(original) in (True, False)


def test_languages_are_loaded_only_for_a_question():
    code = (
        "import sys; from apo_trl.pairs.text.filters import RevisionLimits, revision_reason\n"
        "original, revision = 'It is air, and light. ' * 9, 'It is air and light. ' * 9\n"
        "assert revision_reason('Why?', original, revision, RevisionLimits()) is None\n"
        "assert not {'py3langid', 'torch', 'trl', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.skipif(not DATA.is_dir(), reason="APO_TRL_DATA names no folder of real preference pairs")
@pytest.mark.parametrize("name", PAIRS)
def test_real_pairs_raise_no_false_alarm(name):
    """All these are English, none refuses or loses code; what the limits drop is theirs to drop."""
    rows = read(name)
    assert len(rows) == PAIRS[name]
    found = [
        revision_reason(*(row[side][-1]["content"] for side in ("prompt", "rejected", "chosen")), RevisionLimits())
        for row in rows
    ]
    # They do: "this enhanced code", "in this corrected solution", "with the corrected approach".
    assert found.count("mentions_revision") == (3 if name == "clair_gpt4_revisions" else 0)
    assert set(found) <= {None, "mentions_revision", "too_far", "length_ratio"}
    assert found.count("length_ratio") + found.count("too_far") == LIMITED.get(name, 0)


@pytest.mark.skipif(not DATA.is_dir(), reason="APO_TRL_DATA names no folder of real preference pairs")
def test_an_answer_of_one_word_is_a_revision_of_few_real_answers():
    answers = [row["rejected"][-1]["content"] for name in PAIRS for row in read(name)]
    answers = [text for text in answers if len(text) >= 100]
    assert len(answers) > 2000
    assert {fault(text, word) for text in answers for word in ("and", "The answer.")} <= set(REVISION_REASONS)
