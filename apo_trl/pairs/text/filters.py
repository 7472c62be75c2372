"""The rules that a revision must keep. In doubt they let a bad revision pass; their phrases are English."""

import re
from functools import lru_cache
from typing import Any, NamedTuple

from rapidfuzz.distance import Levenshtein

__all__ = ["REVISION_REASONS", "RevisionLimits", "is_refusal", "revision_reason"]


class RevisionLimits(NamedTuple):
    """The limits of a revision's distance from its original, and the characters that may exceed them.

    The defaults of the slacks keep all pairs of answers below 200 characters in five real datasets (docs/pairs.md).
    """

    max_edit_distance: float = 0.85  # Levenshtein distance over the longer length
    max_length_ratio: float = 2.5  # the longer length over the shorter one
    length_slack: int = 90
    distance_slack: int = 12
    shortened_slack: int = 4  # the distance's, if the revision is shorter: "Euros" may become a sentence, and not back


REVISION_REASONS = {
    "empty": "The revision has no text.",
    "refused": "The reply is a refusal, or the revision is one and the original answer is not.",
    "unchanged": "The revision differs from the original answer in whitespace at most.",
    "mentions_revision": "The revision mentions that it is one, or a student, and neither task nor original does.",
    "lost_code_fence": "The revision has fewer code fences than the original answer, or leaves a code block open.",
    "changed_language": "The revision is in another language than the original answer, and the task asks for none.",
    "too_far": "The revision shares too little text with the original answer (max_edit_distance).",
    "length_ratio": "The revision is too much longer or shorter than the original answer (max_length_ratio).",
}


def revision_reason(task: str, original: str, revision: str, limits: RevisionLimits) -> str | None:
    """Return the first of REVISION_REASONS that applies to a revised answer to the task, or None."""
    if not revision.strip():
        return "empty"
    if original.split() == revision.split():
        return "unchanged"
    if is_refusal(revision) and not is_refusal(original):
        return "refused"
    if _loses_fence(original, revision):
        return "lost_code_fence"
    if _mentions_revision(task, original, revision):
        return "mentions_revision"
    shorter, longer = sorted((len(original), len(revision)))
    if longer > limits.max_length_ratio * shorter + limits.length_slack:
        return "length_ratio"
    distance = Levenshtein.normalized_distance(original, revision, score_hint=0.1)  # exact; small edits are faster
    # Texts that share most of their characters share the language; identifying it costs more than all other rules.
    if distance > 0.3 and _changes_language(task, original, revision):
        return "changed_language"
    slack = limits.shortened_slack if len(revision) < len(original) else limits.distance_slack
    return "too_far" if distance * longer > limits.max_edit_distance * longer + slack else None


_REFUSES = re.compile(
    r"[\s*_>#]*(?:(?:(?:(?:i'm|i am|we're|we are) )?(?:\w+ )?(?:sorry|afraid)|(?:my )?apologies|i apologi[sz]e|"
    r"unfortunately|regrettably|as an? (?:\w+ ){0,3}(?:ai|model|assistant))\b(?: for [^,.\n]{0,60})?\W+"
    r"(?:(?:but|that|however|and)\W+)?){0,3}(?:that's (?:not something i can|something i can't)|"
    r"(?:i|we)(?: \w+ly| just)?(?: ?(?:am|are|'m|'re) (?:unable|not able|not going) to|"
    r" (?:can't|cannot|can not|won't|will not)(?: be able to)?| (?:(?:must|have to) )?(?:decline|refuse)(?: to)?|"
    r" ?(?:am not|'m not|do not feel|don't feel) comfortable)) "
    r"(?:(?P<flatly>(?:help|assist)(?:ing)?(?: you)?(?: (?:with|in|on)\b|[.!,;]|$)|comply|fulfil|engage|do th(at|is))|"
    r"(?:provid|giv|answer|respond|creat|writ|generat|produc|offer|discuss|shar|continu|participat|support|complet)\w*\b"
    r"(?! enough)|(?:this|that|your|the) (?:request|task))",
    re.I,
)
_GOES_ON = re.compile(
    r"\b(?:but|however|instead|(?:al)?though|as of|based on|here (?:is|are)|here's|what i can)\b", re.I
)


def is_refusal(text: str) -> bool:
    """Return whether a text is short, begins as an English refusal ("I can't ..."), and does not go on to answer."""
    start = _REFUSES.match(text[:600].replace("’", "'"))
    if not start:
        return False
    return len(text) <= 1500 if start["flatly"] else len(text) <= 500 and not _GOES_ON.search(text, start.end())


_FENCE = re.compile(r"^[ \t>]*(?:```[^`\n]*$|~~~)", re.M)


def _loses_fence(original: str, revision: str) -> bool:
    """Passes: a lost fence if the original itself leaves a block open, and code that moved out of a block."""
    before, after = len(_FENCE.findall(original)), len(_FENCE.findall(revision))
    return after < before - 1 if before % 2 else after < before or after % 2 == 1


_REVISED = r"(?:revised|corrected|improved|enhanced|refined|edited|rewritten|polished)"
_ANSWER = r"(?:(?:student )?(?:answer|response|solution|explanation|approach)|version|code|text|sentence)"
_MENTIONS = re.compile(
    rf"\b(?:(?:this|the|my|an?) {_REVISED} {_ANSWER}\b(?! of)|here(?:'s| is| are) (?:the|an?|my|your) {_REVISED}\b"
    rf"|i(?:'ve| have) {_REVISED} (?:it|(?:the|your|this|my) {_ANSWER})\b|{_REVISED} {_ANSWER}\W{{0,3}}[:\n]"
    r"|(?:the|my) (?:(?:original|initial) answer|original response)\b"
    r"|(?:corrected_student|teacher_reason|student_solution)\w*)"
)
_EDITING = re.compile(
    r"\b(?:revis|correct(?:ed|ing|ions?|s| the| this| my| any)\b|edit(?!ion)|re-?writ|\w*phras|improv|enhanc|refin|fix|"
    r"polish|debug|bugs?\b|refactor|optimi[sz]|errors?\b|mistake|grammar|typo|proofread|feedback|review|better\b|modif|wrong)",
    re.I,
)
_SCHOOL = re.compile("student|teach|school|class|learn|universit|colleg|exam|homework|lesson|course|educat|essay", re.I)


def _mentions_revision(task: str, original: str, revision: str) -> bool:
    """Passes: any mention in a task about editing, what the original says too, students in a task about school."""
    original, revision = (text.lower().replace("’", "'") for text in (original, revision))
    if any(match[0] not in original for match in _MENTIONS.finditer(revision)) and not _EDITING.search(task):
        return True
    people = re.search(r"\bthe (?:student|teacher)\b", revision)
    return bool(people) and not _SCHOOL.search(task) and not _SCHOOL.search(original)


_TRANSLATING = re.compile(
    r"translat|übersetz|tradu[cizç]|vertaal|перев[ео]|翻[译譯訳]|번역|ترجم|अनुवाद|\blanguages?\b|deutsch|español|français|"
    r"\b(?:arabic|bengali|chinese|mandarin|czech|danish|dutch|english|farsi|persian|finnish|french|german|greek|hebrew|"
    r"hindi|hungarian|indonesian|italian|japanese|korean|latin|malay|norwegian|polish|portuguese|romanian|russian|serbian|"
    r"spanish|swahili|swedish|tamil|telugu|thai|turkish|ukrainian|urdu|vietnamese)\b",
    re.I,
)
_RELATED = 5  # of 142 languages, related ones are the next candidates


def _changes_language(task: str, original: str, revision: str) -> bool:
    """Passes: short texts, related languages, the task's own language, tasks that name a language."""
    before, after = _languages(original), _languages(revision)
    if not before or not after or before[0] in after or after[0] in before or _TRANSLATING.search(task):
        return False
    expected = [language for language, _ in _identifier().rank(_prose(task))[:_RELATED]]
    return before[0] in expected and after[0] not in expected


def _languages(text: str) -> list[str]:
    """Return the most probable language and its relatives, none if the text has few letters or no clear language."""
    text = _prose(text)
    (language, probability), *others = _identifier().rank(text)[:_RELATED]
    unclear = sum(map(str.isalpha, text)) < 60 or probability < 0.5 or language == "zxx"  # no language
    return [] if unclear else [language, *(other for other, _ in others)]


def _prose(text: str) -> str:
    text = re.sub(r"^[ \t>]*(```|~~~).*?(?:^[ \t>]*\1[^\n]*$|\Z)", " ", text, flags=re.M | re.S)
    return re.sub(r"`[^`\n]+`|https?://\S+", " ", text)


@lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # type: ignore[import-untyped]

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
