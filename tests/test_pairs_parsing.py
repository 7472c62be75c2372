"""What is read of a model's reply: every slip that a looser parser once turned into a chosen answer."""

import gzip
import json
import os
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from apo_trl.pairs.judging import parse_score, parse_verdict
from apo_trl.pairs.text.revisions import Malformed, Revision, parse_revision
from apo_trl.pairs.text.templates import load_template, suffix_for

DATA = Path(os.environ.get("APO_TRL_DATA", "/nowhere"))
HERE, WHY, WORSE = "{corrected_student_solution}", "{teacher_reasoning}", "{worsened_student_solution}"
TASK = [{"role": "user", "content": "Why?"}]
ASKED = load_template("revise").ask(TASK, answer="4")

ANSWERS = {
    # the authors' headings
    "bold": (f"**{HERE}**: 4", "4"),
    "bold with the colon inside": (f"**{HERE}:** 4", "4"),
    "the answer's own bold stays": (f"{HERE}: **4** it is", "**4** it is"),
    "no colon": (f"{WHY}\nShort.\n\n{HERE}\n\n4", "4"),
    "underlined by hashes": (f"### {HERE}\n4", "4"),
    "escaped": ("{corrected\\_student\\_solution}: 4", "4"),
    "named in the reasoning first": (f"{WHY}: In {HERE} I write 4, as it must be.\n\n{HERE}\n4", "4"),
    "named with a colon in the reasoning": (f"{WHY}: What follows {HERE}: is new.\n\n{HERE}:\n4", "4"),
    "answer holds the marker": (f"{HERE}:\nWrite it under {HERE}: and stop.", f"Write it under {HERE}: and stop."),
    "two headings": (f"{HERE}:\n3\n\nNo, wait.\n\n{HERE}:\n4", "4"),
    "words, bold": ("**Corrected Student Solution:**\n4", "4"),
    "words, heading": ("### Corrected Student Solution:\n4", "4"),
    "words, bare": ("Corrected Student Solution\n4", "4"),
    "worsened before it": (f"{WORSE}: 5\n\n{HERE}: 4", "4"),
    "marker and nothing after": (f"{WHY}: x\n\n{HERE}:", ""),
    "rule and nothing after": (f"{HERE}:\n4\n\n---\n", "4"),
    "rule between sections": (f"{HERE}:\n# One\n\n---\n\n# Two\n\nText.", "# One\n\n---\n\n# Two\n\nText."),
    "rule before a signature": (f"{HERE}:\nDear Ann,\n\n---\nBob", "Dear Ann,\n\n---\nBob"),
    "rule in code": (f"{HERE}:\n```\na\n\n---\nB c.\n```", "```\na\n\n---\nB c.\n```"),
    "underlined heading": (f"{HERE}:\nText.\n\nThe end\n---\nIt is short.", "Text.\n\nThe end\n---\nIt is short."),
    "indentation of the first line": (f"{HERE}:\n\n    x = 1\n    y = 2\n", "    x = 1\n    y = 2"),
    "fence around the whole": (f"```\n{WHY}: x\n{HERE}: 4\n```", "4"),
    # tags
    "tags": ("<reasoning>\nr\n</reasoning>\n<revision>\n4\n</revision>", "4"),
    "tags, remark after": ("<revision>\n4\n</revision>\n\nI hope this helps!", "4"),
    "tags, in a fence": ("```xml\n<revision>\n    x\n</revision>\n```", "    x"),
    "tags, bold": ("**<revision>**\n4\n**</revision>**", "4"),
    "tags, the answer's own bold": ("<revision>**4**</revision>", "**4**"),
    "tags, spaced, upper case, attribute": ('< REVISION lang="en">4</ Revision >', "4"),
    "tags, named before": ("I will use <revision> tags.\n<revision>4</revision>", "4"),
    "tags, named before on the line": ("In <revision> tags: <revision>4</revision>", "4"),
    "tags, named after": ("<revision>\n4\n</revision>\nIt is between <revision> and </revision>.", "4"),
    "tags, quoted within": ("<revision>\nPut <revision>x</revision>.\n</revision>", "Put <revision>x</revision>."),
    "tags, several": ("<revision>3</revision> or rather <revision>4</revision>", "4"),
    "tags beside indented code": ("<revision>    x = 1\n    y = 2</revision>", "    x = 1\n    y = 2"),
    "tags and a heading": (f"{HERE}: 3\n<revision>4</revision>", "4"),
    "tags, nothing in them": ("<revision>\n\n</revision>", ""),
    "tags, named both before": ("I write between <revision> and </revision>.\n<revision>4</revision>", "4"),
    "tags, a conjunction": ("<reasoning>It joins.</reasoning>\n<revision>and</revision>", "and"),
    "tags, a conjunction on its line": ("The word is:\n<revision>\nand\n</revision>\nThat is all.", "and"),
    "tags, named below a heading": (f"{HERE}:\nNot <revision> and </revision>.", "Not <revision> and </revision>."),
    "tags, rule and remark within": ("<revision>\n4\n\n---\nSo be it.\n</revision>", "4\n\n---\nSo be it."),
}  # fmt: skip

NO_ANSWERS = {
    "nothing": ("", "no revised answer"),
    "json": ('{"revision": "4"}', "no revised answer"),
    "refusal": ("I'm sorry, but I can't assist with that.", "no revised answer"),
    "worsened": (f"{WORSE}: 5", "no revised answer"),
    "worsened after it": (f"{HERE}: 4\n\n{WORSE}: 5", "goes on"),
    "reasoning after it": (f"{HERE}: 4\n\n{WHY}: because", "goes on"),
    "in the reasoning only, heading": (f"<reasoning>\n{HERE}: 5\n</reasoning>\n4", "goes on"),
    "empty tag": ("<revision />4", "no revised answer"),
    "bold around heading and answer": (f"**{HERE}: 4**", "no revised answer"),
    "inside a line": (f"It is simple, so {HERE}: 4", "no revised answer"),
    "two inside lines": (f"So {HERE}: 3, or {HERE}: 4", "no revised answer"),
    "named only": (f"I would leave {HERE} as it is.", "no revised answer"),
    "named only, in quotes": (f"What comes as `{HERE}:` is good.", "no revised answer"),
    "remark after a rule": (f"{HERE}: 4\n\n---\n\nI hope this helps you.", "remark"),
    "remark on the correction": (f"{HERE}:\n4\n\nThis corrected solution adds the sum.", "remark"),
    "cut-off tags": ("<revision>\nThe answer is", "does not close"),
    "cut off after a whole one": ("<revision>3</revision>\n<revision>4", "does not close"),
    "cut off, quoting": ("<revision>\nPut <revision>x</revision>.\n", "does not close"),
    "opened twice": ("<revision>\na\n<revision>\nb\n</revision>", "does not close"),
    "closed twice": ("<revision>\na </revision> b\n</revision>", "more often"),
    "other tag": ("<revision-2>4</revision-2>", "no revised answer"),
    "in the reasoning only": ("<reasoning>Not <revision>5</revision>.</reasoning>\n4", "inside its reasoning"),
    "named only, both": ("I put it between <revision> and </revision>: Paris.", "no revised answer"),
    "named only, other tags": ("No <revision> or </revision>:\n<answer>\nParis.\n</answer>", "no revised answer"),
    "named only, at the start of a line": ("`<revision>`/`</revision>` it is: Paris.", "no revised answer"),
    "echo of the request": ("\n".join(part["content"] for part in ASKED.messages), "repeats the instructions"),
    "echo of the repair request": (
        load_template("revise").ask_again(TASK, ASKED, "x", "it is odd.", answer="4").messages[-1]["content"],
        "no revised answer",
    ),
    "in the thoughts only": ("<think>Not <revision>5</revision>.</think>\n4", "no revised answer"),
}  # fmt: skip


def _tag(*texts: str) -> str:
    return f"revision{suffix_for(*texts)}"


@pytest.mark.parametrize(("reply", "text"), ANSWERS.values(), ids=ANSWERS)
def test_reads(reply, text):
    assert parse_revision(reply).text == text


@pytest.mark.parametrize(("reply", "why"), NO_ANSWERS.values(), ids=NO_ANSWERS)
def test_refuses(reply, why):
    with pytest.raises(Malformed, match=why) as caught:
        parse_revision(reply)
    message = str(caught.value)
    assert message.startswith("it ")  # follows "Your reply cannot be used:"
    assert message.endswith(".")


@pytest.mark.parametrize(
    ("reply", "rationale"),
    [
        (f"{WHY}:\nToo short.\n\n{HERE}:\n4", "Too short."),
        (f"Sure!\n**{WHY}**: Too short.\n\n**{HERE}**: 4", "Too short."),
        ("Sure!\n<reasoning>\nToo short.\n</reasoning>\nHere:\n**<revision>**4</revision>", "Too short."),
        ("<reasoning>Too short.\n```\n<revision>4</revision>\n```", "Too short."),
        ("<revision>4</revision> after", ""),
    ],
)
def test_rationale_is_what_came_before(reply, rationale):
    assert parse_revision(reply) == Revision(rationale, "4") or parse_revision(reply).rationale == rationale


def test_tag_is_in_no_text():
    assert _tag("a", "<revised> and revision") == "revision"
    assert _tag("a <Revision> b") == "revision-2"
    assert _tag("a", "</ revision >", '<revision-2 id="1">') == "revision-3"
    assert _tag("<revision-2>") == "revision"


def expected(text):
    """Without the blank lines before it and all whitespace after it; the lines between as they are."""
    lines = text.split("\n")
    while lines and not lines[0].strip():
        lines.pop(0)
    return "\n".join(lines).rstrip()


PIECES = ["<revision>", "</revision>", "<REVISION x>", "<revision-2>", "</revision-2", "<", "</", ">", "<reasoning>",
          "</reasoning>", "<think>", "</think>", HERE, HERE + ":", f"**{HERE}**", WHY, WORSE, "```", "```json\n", "~~~",
          '{"revision": "x"}', "---", "**", "\n", "\n\n", "  ", "\r\n", "    x = 1", "[[A]]", "[[", "]]", "7", "/",
          ">>", "This corrected solution ends.", "reasoning>", "revision"]  # fmt: skip
anything = st.one_of(
    st.text(), st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=12).map("".join)
)


@settings(deadline=None)
@given(anything, anything)
@example("<reasoning>", "</reasoning>")
@example("", "**")
@example("</revision>", "  \n\t\n    x\n\n  ")
def test_what_was_built_is_read_back(rationale, text):
    tag = _tag(rationale, text)
    reasoning = "reasoning" + tag.removeprefix("revision")
    reply = f"<{reasoning}>\n{rationale}\n</{reasoning}>\n<{tag}>\n{text}\n</{tag}>"
    found = parse_revision(reply, tag)
    assert found == Revision(rationale.strip(), expected(text))


@settings(deadline=None)
@given(anything, anything)
def test_noise_around_an_answer_stays_out(before, after):
    tag = _tag(before, after)
    try:
        text = parse_revision(f"{before}\n<{tag}>\nthe answer\n</{tag}>\n{after}", tag).text
    except Malformed:  # the answer may stand in thoughts that begin before or end after it
        assume(False)
    assert text == "the answer"


@settings(deadline=None)
@given(anything)
def test_whatever_is_said_is_read_or_malformed(reply):
    try:
        found = parse_revision(reply)
    except Malformed:
        return
    assert found.text == expected(found.text)
    assert found.rationale == found.rationale.strip()


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("B is longer, but A is right. [[A]]", "A"),
        ("[[a]]", "A"),
        ("[[ B ]]", "B"),
        ("[[C]]", "TIE"),
        ("[[Tie]]", "TIE"),
        ("[[A>>B]]", "A"),
        ("[[A > B]]", "A"),
        ("[[A=B]]", "TIE"),
        ("[[B>A]]", "B"),
        ("[[b >> a]]", "B"),
        ("At first [[A]], but no: [[B]]", "B"),
        ("[[B]]\n\nThat is my verdict, see [1] and [[2]].", "B"),
        ("", None),
        ("A is better. Verdict: A", None),
        ("[A]", None),
        ("[[D]] [[AB]] [[A<B]] [[A>A]] [[]]", None),
    ],
)
def test_verdict(reply, verdict):
    assert parse_verdict(reply) == verdict


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Good. [[7]]", 7.0),
        ("[[7.5]]", 7.5),
        ("[[ 7/10 ]]", 7.0),
        ("[[3]], or rather [[8]]", 8.0),
        ("[[1]]", 1.0),
        ("[[10]]", 10.0),
        ("[[0]]", None),
        ("[[10.5]]", None),
        ("[[-7]]", None),
        ("[[4/5]]", None),  # another scale
        ("[[3]], or rather [[8 or 9]]", None),  # never the one that was taken back
        ("Rating: high", None),
        ("Rating: [[high]]", None),
        ("7", None),
        ("[[" + "9" * 5000 + "]]", None),
        ("", None),
    ],
)
def test_score(reply, score):
    assert parse_score(reply) == score


@settings(deadline=None)
@given(anything)
def test_the_last_brackets_decide_after_any_noise(noise):
    assert parse_verdict(noise + "[[B]]") == "B"
    assert parse_score(noise + "[[7]]") == 7.0
    assert parse_verdict(noise) in (None, "A", "B", "TIE")
    assert parse_score(noise) is None or 1 <= parse_score(noise) <= 10


@pytest.mark.skipif(not DATA.is_dir(), reason="APO_TRL_DATA names no folder of real preference pairs")
def test_replies_of_the_authors_reviser():
    def rows(name):
        with gzip.open(DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            return {row["id"]: row for row in map(json.loads, file)}

    raw, pairs = rows("clair_gpt4_raw"), rows("clair_gpt4_revisions")
    assert len(raw) == 20
    for name, row in raw.items():
        found = parse_revision(row["raw_reply"])
        assert found.text == pairs[name]["chosen"][-1]["content"].strip()
        assert found.rationale == row["rationale"].strip()
