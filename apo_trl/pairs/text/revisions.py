"""What a reviser's reply says: its reasoning and the whole revised answer.

Pure functions of the text, and strict: whatever could be half an answer, or an answer with a remark behind it, is
Malformed, because a repair request costs a little and a wrong answer is trained on. That a reply was cut off by its
token limit is not always to be seen in the text; ask the server's finish reason for that.

Left out on purpose: guessing. An answer without a mark is none.
"""

import json
import re
from typing import NamedTuple

__all__ = ["Malformed", "Revision", "build_reply", "parse_revision"]


class Malformed(ValueError):
    """The reply cannot be used; the message is a sentence about the reply ("it ...") for a repair request."""


class Revision(NamedTuple):
    """What a reviser wrote: why, and the whole revised answer."""

    rationale: str
    text: str


def build_reply(rationale: str, text: str, tag: str) -> str:
    """Write the reply that is asked for; `tag` should be one that neither text holds."""
    reasoning = "reasoning" + tag.removeprefix("revision")
    return f"<{reasoning}>\n{rationale}\n</{reasoning}>\n<{tag}>\n{text}\n</{tag}>"


def parse_revision(reply: str, tag: str = "revision") -> Revision:
    """Read the revised answer and the reasoning before it.

    Known are the tags, a JSON object with the key `revision`, and the headings `{teacher_reasoning}` and
    `{corrected_student_solution}` of the authors of arXiv 2408.06266. Of several answers the last one counts. The text
    keeps everything but blank lines at its ends and whitespace at its end; it may be empty.

    Raises Malformed for all else.
    """
    reply = _without_thoughts(reply)
    if fields := _json_object(reply):
        return _from_json(fields, tag)
    if any(not found["end"] for found in _tags(tag).finditer(reply)):
        return _from_tags(reply, tag)
    return _from_headings(reply, tag)


_MARK = r"[*_`]{1,3}"
_LINE_START = re.compile(r"(?:^|\n|</[^<>\n]*>)[ \t*_#>]*\Z")
_MENTION = re.compile(r"[\W_]*(?:and|or|to)?[\W_]*", re.I)  # "between <revision> and </revision>", of a closing remark
_REASONING = r"(?:reasoning(?:-\d+)?|think(?:ing)?)>"


def _tags(tag: str) -> re.Pattern[str]:
    return re.compile(rf"<\s*(?P<end>/\s*)?{re.escape(tag)}(?:\s[^<>]*)?(?<!/)>", re.I)


def _from_tags(reply: str, tag: str) -> Revision:
    found = list(_tags(tag).finditer(reply))
    # What comes before the first tag at the start of a line may mention the tag; where there is none, the last counts.
    opened = [at for at, one in enumerate(found) if not one["end"]]
    leading = [at for at in opened if _LINE_START.search(reply, max(0, found[at].start() - 99), found[at].start())]
    at, answer = leading[0] if leading else opened[-1], None
    while at < len(found):
        last = _closing(found, at, tag)
        if answer is None or not _MENTION.fullmatch(reply, found[at].end(), found[last].start()):
            answer = found[at], found[last]
        at = last + 1
    assert answer
    (start, inner), (end, after) = (_with_marks(reply, one) for one in answer)
    if _in_reasoning(reply[after:]):
        raise Malformed(f"it has <{tag}> inside its reasoning only, and no revised answer after it.")
    return Revision(_rationale(reply[:start]), _body(reply[inner:end]))


def _closing(found: list[re.Match[str]], first: int, tag: str) -> int:
    """Find the tag that closes this one; what the answer quotes between them is balanced, or nothing can be told."""
    if found[first]["end"]:
        raise Malformed(f"it has </{tag}> more often than <{tag}>, so where the answer ends cannot be told.")
    depth = 0
    for at in range(first, len(found)):
        depth += -1 if found[at]["end"] else 1
        if depth == 0:
            return at
    raise Malformed(f"it opens <{tag}> and does not close it with </{tag}>, so its end seems to be missing.")


def _with_marks(reply: str, tag: re.Match[str]) -> tuple[int, int]:
    """Give the span of a tag with the marks around it, as in "**<revision>**"."""
    start, end = tag.span()
    mark = re.compile(_MARK + r"\Z").search(reply, max(0, start - 3), start)
    width = len(mark[0]) if mark and reply.startswith(mark[0], end) else 0
    return start - width, end + width


def _from_json(fields: dict[str, object], tag: str) -> Revision:
    text = next(fields[key] for key in _ANSWERS if key in fields)
    rationale = next((fields[key] for key in ("reasoning", "rationale", "teacher_reasoning") if key in fields), "")
    if not isinstance(text, str):
        raise Malformed("it has something else than a text as the revised answer in its JSON object.")
    if re.search("[\ud800-\udfff]", text):
        raise Malformed("it has half a character in the revised answer of its JSON object.")
    if _tags(tag).match(text.strip()):  # both forms at once
        text = _from_tags(text, tag).text
    return Revision(rationale.strip() if isinstance(rationale, str) else json.dumps(rationale), _body(text))


_ANSWERS = ("revision", "corrected_student_solution")


def _json_object(reply: str) -> dict[str, object] | None:
    text = _unfenced(reply)
    if not text.startswith("{"):
        return None
    try:
        fields = json.loads(text, strict=False)  # models write line breaks into strings
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) and any(key in fields for key in _ANSWERS) else None


def _slot(words: str) -> str:
    return r"\{{0,2}" + words.replace(" ", r"(?:\\?_|[ ])") + r"\}{0,2}"


def _heading(words: str) -> re.Pattern[str]:
    """Match a heading at the start of a line: with marks or without, with a colon or alone on its line."""
    closed = r"(?P<closed>(?P=mark)[ \t]*[:：]|[ \t]*[:：][ \t]*(?P=mark)|(?P=mark)[ \t\r]*$)"
    return re.compile(
        rf"^[ \t>]*(?:#{{1,6}}[ \t]*)?(?P<mark>{_MARK})?{_slot(words)}(?:{closed}|[ \t]*[:：]|[ \t#\r]*$)", re.I | re.M
    )


_REASONS, _ANSWER, _WORSENED = map(
    _heading, ("teacher reasoning", "corrected student solution", "worsened student solution")
)
_INLINE = re.compile(
    r"(?<![`'\"*])(?P<mark>\*{1,3})?\{corrected\\?_student\\?_solution\}"
    r"(?:(?P<closed>(?P=mark)[ \t]*:|[ \t]*:[ \t]*(?P=mark))|[ \t]*:)",
    re.I,
)
_REFERS_TO_ITSELF = re.compile(
    r"\W*(?:(?:this|the) (?:corrected|revised|improved|enhanced) (?:student )?(?:solution|answer|version|response)\b"
    r"|this revision\b|(?:these|the) (?:changes|corrections|revisions|improvements) (?:make|made|ensure|address)\b"
    r"|i(?:['’]ve| have)? (?:corrected|revised|rewritten|improved) (?:the|your) (?:\w+ )?(?:solution|answer|text)\b)",
    re.I,
)
_RULE = re.compile(r"^[ \t]*([-*_=–—])(?:[ \t]*\1){2,}[ \t\r]*$", re.M)


def _from_headings(reply: str, tag: str) -> Revision:
    inner = _unfenced(reply)
    text = inner if _REASONS.match(inner) or _ANSWER.match(inner) else reply
    found = list(_ANSWER.finditer(text)) or list(_INLINE.finditer(text))
    if not found or (len(found) > 1 and not _ANSWER.search(text)):
        raise Malformed(f"it has no revised answer between <{tag}> and </{tag}>.")
    heading, rest = found[-1], text[found[-1].end() :]
    if _WORSENED.search(rest) or _REASONS.search(rest) or _in_reasoning(rest):
        raise Malformed(f"it goes on with something else after the answer; put the answer in <{tag}> and </{tag}>.")
    if heading["mark"] and not heading["closed"] and rest.count(heading["mark"]) % 2:
        rest = rest.replace(heading["mark"], "", 1)  # "**{corrected_student_solution}: 4**"
    body = _body(re.sub(r"\A[ \t]+(?=\S)", "", rest))
    if (rule := _last_rule(body)) and not body[rule.end() :].strip():
        body = body[: rule.start()].rstrip()
    elif rule and _is_remark(body[rule.end() :].strip()):
        raise Malformed(f"it ends with a remark, or what looks like one; put the answer alone in <{tag}> and </{tag}>.")
    _, *later = re.split(r"\n[^\S\n]*\n", body)
    if later and _REFERS_TO_ITSELF.match(later[-1]):
        raise Malformed(f"it ends with a remark on the correction; put the answer alone in <{tag}> and </{tag}>.")
    return Revision(_rationale(text[: heading.start()]), body)


def _last_rule(body: str) -> re.Match[str] | None:
    """Find the last dashed line that does not underline a heading."""
    for rule in reversed(list(_RULE.finditer(body))):
        above = body[: rule.start()][:-1].rpartition("\n")[2].strip()
        if not above[-1:].isalnum():
            return rule
    return None


def _is_remark(text: str) -> bool:
    """Whether what stands after a rule is one short paragraph of prose; a section or a signature is not."""
    prose = text.strip("*_() ")
    return len(text) <= 400 and not re.search(r"\n[^\S\n]*\n", text) and prose[:1].isalpha() and prose[-1] in ".!?:…"


def _in_reasoning(rest: str) -> bool:
    """Whether reasoning that began before goes on after this."""
    found = re.search(rf"<(/?){_REASONING}", rest, re.I)
    return bool(found and found[1])


def _without_thoughts(reply: str) -> str:
    """Leave out what a reasoning model thought before its reply."""
    if not re.match(r"\s*<think(?:ing)?>", reply, re.I):
        return reply
    end = re.search(r"</think(?:ing)?>", reply, re.I)
    if not end:
        raise Malformed("it stops before its thoughts come to an end.")
    return reply[end.end() :]


def _rationale(before: str) -> str:
    if inner := re.search(rf"<{_REASONING}(.*)</{_REASONING}", before, re.I | re.S):
        return inner[1].strip()
    before = re.sub(rf"</?{_REASONING}", "", before, flags=re.I)
    if heading := _REASONS.search(before):
        before = before[heading.end() :]
    return re.sub(r"(?:^|\n)```\w*\s*\Z", "", before).strip()  # a fence around the tags that follow


def _unfenced(reply: str) -> str:
    """Take off a code fence around a whole reply."""
    inner = re.fullmatch(r"(```|~~~)\w*[ \t]*\n(.*)\n[ \t]*\1", reply.strip(), re.S)
    return (inner[2] if inner else reply).strip()


def _body(text: str) -> str:
    """Strip blank lines at the ends and whitespace at the end, but not the indentation of code."""
    first = text.partition("\n")[0]
    if first.strip():  # it starts beside its tag: one space only sets it off
        return text.rstrip() if first.startswith("  ") else text.rstrip().removeprefix(" ")
    return re.sub(r"\A(?:[^\S\n]*\n)+", "", text).rstrip()
