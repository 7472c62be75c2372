"""Parse a reviser's reply into its reasoning and the whole revised answer.

A possible half of an answer, or an answer with a remark behind it, is Malformed: a repair request costs little, and a
wrong answer is trained on. A reply that was cut off is recognised by its finish reason, not here.
"""

import re
from typing import NamedTuple

__all__ = ["Malformed", "Revision", "parse_revision"]


class Malformed(ValueError):
    """The message is a sentence about the reply ("it ...") for a repair request."""


class Revision(NamedTuple):
    """A revised answer and its reasons."""

    rationale: str
    text: str


def parse_revision(reply: str, tag: str = "revision") -> Revision:
    """Read the last revised answer, which may be empty, and the reasoning before it.

    They are in tags, or below the headings `{teacher_reasoning}` and `{corrected_student_solution}` of the authors of
    arXiv 2408.06266.

    Raises:
        Malformed: The reply has no answer, or it may be incomplete or have a remark behind it.
    """
    if any(not match["end"] for match in _tags(tag).finditer(reply)):
        return _from_tags(reply, tag)
    return _from_headings(reply, tag)


_MARK = r"(?P<mark>[*_`]{1,3})?"
_LINE_START = re.compile(r"(?:^|\n|</[^<>\n]*>)[ \t*_#>]*\Z")
_LINE_END = re.compile(r"[\s*_`]*(?:\n|\Z)")
_MENTION = re.compile(r"[\W_]*(?:and|or|to)?[\W_]*", re.I)  # "between <revision> and </revision>", in a remark or echo
_PLACEHOLDER = re.compile(r"\W*(?:(?:the|your) )?(?:whole |full )?revised answer\W*", re.I)  # of the instructions
_REASONING = r"(?:reasoning(?:-\d+)?|think(?:ing)?)>"
_REASONING_ENDS = re.compile(rf"(?:(?!<{_REASONING}).)*?</{_REASONING}", re.I | re.S)


def _tags(tag: str) -> re.Pattern[str]:
    return re.compile(rf"{_MARK}<\s*(?P<end>/\s*)?{re.escape(tag)}(?:\s[^<>]*)?(?<!/)>(?(mark)(?P=mark))", re.I)


def _from_tags(reply: str, tag: str) -> Revision:
    tags = list(_tags(tag).finditer(reply))
    # Before the first tag at the start of a line, the tag may be mentioned; without such a tag the last one counts.
    opening = [index for index, match in enumerate(tags) if not match["end"]]
    leading = (at for at in opening if _LINE_START.search(reply, max(0, tags[at].start() - 99), tags[at].start()))
    opened, answers = list[re.Match[str]](), list[tuple[re.Match[str], re.Match[str]]]()
    for match in tags[next(leading, opening[-1]) :]:
        if not match["end"]:
            opened.append(match)
            continue
        if not opened:
            raise Malformed(f"it has </{tag}> more often than <{tag}>, so the end of the answer is not clear.")
        start = opened.pop()  # what an answer quotes is balanced
        if not opened and not (
            _MENTION.fullmatch(reply, start.end(), match.start()) and (answers or _inline(start, match))
        ):
            answers.append((start, match))
    if opened:
        raise Malformed(f"it opens <{tag}> and does not close it with </{tag}>, so its end seems to be missing.")
    if not answers:
        return _from_headings(reply, tag)
    start, end = answers[-1]
    if _REASONING_ENDS.match(reply, end.end()):
        raise Malformed(f"it has <{tag}> inside its reasoning only, and no revised answer after it.")
    body = _body(reply[start.end() : end.start()])
    if _PLACEHOLDER.fullmatch(body):
        raise Malformed(f"it repeats the instructions, and has no revised answer between <{tag}> and </{tag}>.")
    return Revision(_rationale(reply[: start.start()]), body)


def _inline(start: re.Match[str], end: re.Match[str]) -> bool:
    """Return whether a sentence goes on around two tags on one line, whose text is then not an answer."""
    reply = start.string
    alone = _LINE_START.search(reply, max(0, start.start() - 99), start.start()) and _LINE_END.match(reply, end.end())
    return not alone and "\n" not in reply[start.end() : end.start()]


def _heading(words: str) -> re.Pattern[str]:
    """Match a heading at the start of a line, in any marks and braces, with a colon or alone on its line."""
    slot = r"\{{0,2}" + words.replace(" ", r"(?:\\?_|[ ])") + r"\}{0,2}"
    mark = "(?(mark)(?P=mark))"
    colon = rf"[ \t]*(?:[:：][ \t]*{mark}|{mark}[ \t]*[:：])"
    return re.compile(rf"^[ \t>]*(?:#{{1,6}}[ \t]*)?{_MARK}{slot}(?:{colon}|{mark}[ \t#\r]*$)", re.I | re.M)


_REASONS, _ANSWER = _heading("teacher reasoning"), _heading("corrected student solution")
_OTHER = _heading("(?:teacher reasoning|worsened student solution)")
_RULE = r"(?:\A|(?<=[^\w\s])\n|\n[ \t]*\n)[ \t]*([-*_=–—])(?:[ \t]*\1){2,}[ \t\r]*"  # it underlines no heading
_REMARK = re.compile(_RULE + r"\n\s*[*_()]*[^\W\d_](?:(?!\n[^\S\n]*\n).){0,400}[.!?:…][*_()\s]*\Z", re.S)
_ON_ITSELF = re.compile(
    r"\n[^\S\n]*\n[^\w\n]*(?:(?:this|the) (?:corrected|revised|improved|enhanced) (?:student )?"
    r"(?:solution|answer|version)|this revision|(?:these|the) (?:changes|corrections) (?:make|made|ensure))\b"
    r"(?:(?!\n[^\S\n]*\n).)*\Z",
    re.I | re.S,
)


def _from_headings(reply: str, tag: str) -> Revision:
    fenced = re.fullmatch(r"\s*(```|~~~)\w*[ \t]*\n(.*)\n[ \t]*\1\s*", reply, re.S)
    text = fenced[2] if fenced and (_REASONS.match(fenced[2]) or _ANSWER.match(fenced[2])) else reply
    *_, heading = [None, *_ANSWER.finditer(text)]
    if heading is None:
        raise Malformed(f"it has no revised answer between <{tag}> and </{tag}>.")
    rest = text[heading.end() :]
    if _OTHER.search(rest) or _REASONING_ENDS.match(rest):
        raise Malformed(f"it goes on after the answer; put the answer in <{tag}> and </{tag}>.")
    body = re.sub(_RULE + r"\Z", "", _body(re.sub(r"\A[ \t]+(?=\S)", "", rest))).rstrip()
    if _REMARK.search(body) or _ON_ITSELF.search(body):
        raise Malformed(f"it ends with a remark, or what looks like one; put the answer alone in <{tag}> and </{tag}>.")
    return Revision(_rationale(text[: heading.start()]), body)


def _rationale(before: str) -> str:
    if inner := re.search(rf"<{_REASONING}(.*)</{_REASONING}", before, re.I | re.S):
        return inner[1].strip()
    before = _REASONS.split(re.sub(rf"</?{_REASONING}", "", before, flags=re.I), maxsplit=1)[-1]
    return re.sub(r"(?:^|\n)```\w*\s*\Z", "", before).strip()  # a fence around the tags that follow


def _body(text: str) -> str:
    """Strip blank lines or one space at the start, not the indentation of code, and whitespace at the end."""
    return re.sub(r"\A(?:(?:[^\S\n]*\n)+| (?! ))", "", text).rstrip()
