"""Is this revision usable: the rules that a revised answer must keep to become a chosen one.

Pure functions of the texts; the first broken rule names the reason under which a pair is dropped and counted. Every
rule would rather let a bad revision pass than drop a good one: phrases that the task or the original answer explain
are no faults, and a guessed language is none. The phrases of `mentions_revision` and `refused` are English.

Left out on purpose: whether the revision is better. That is a judge's question.
"""

import re
import unicodedata
from collections import Counter
from functools import lru_cache
from typing import Any, NamedTuple

from rapidfuzz.distance import Levenshtein

__all__ = ["REVISION_REASONS", "RevisionLimits", "is_refusal", "revision_reason"]


class RevisionLimits(NamedTuple):
    """How far a revision may be from its original; neither counts where both have fewer characters than `slack`.

    `max_edit_distance` is the Levenshtein distance in characters over the longer length; `max_length_ratio` is the
    longer length over the shorter one, whichever is the revision.
    """

    max_edit_distance: float = 0.85
    max_length_ratio: float = 2.5
    slack: int = 200


REVISION_REASONS = {
    "empty": "The revision has no text.",
    "refused": "The revision is a refusal, and the original answer is not.",
    "unchanged": "The revision differs from the original answer in whitespace at most.",
    "mentions_revision": "The revision speaks of being one, or of a student, and neither task nor original does.",
    "lost_code_fence": "The revision has fewer code fences than the original answer, or leaves a code block open.",
    "changed_language": "The revision is in another language than the original answer, and the task asks for none.",
    "too_far": "The revision shares too little text with the original answer (max_edit_distance).",
    "length_ratio": "The revision is too much longer or shorter than the original answer (max_length_ratio).",
}


def revision_reason(task: str, original: str, revision: str, limits: RevisionLimits) -> str | None:
    """Name the first rule of REVISION_FAULTS that a revision of an answer to the task breaks, or None."""
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
    limited = longer >= limits.slack
    if limited and longer > limits.max_length_ratio * shorter:
        return "length_ratio"
    distance = Levenshtein.normalized_distance(original, revision, score_hint=0.1)  # exact; small edits are faster
    if limited and distance > limits.max_edit_distance:
        # Another language is further than any limit; naming it says more.
        return "changed_language" if _changes_language(task, original, revision) else "too_far"
    if distance > _SURELY_SAME_LANGUAGE and _changes_language(task, original, revision):
        return "changed_language"
    return None


def is_refusal(text: str) -> bool:
    """Whether a text begins as a refusal and goes on as none but one.

    "I can't help with that" is one; an answer that declines a part and then gives the rest is none.
    """
    start = text[:600].replace("’", "'")
    found = _REFUSES.match(start)
    if not found or re.search(r"\benough\b", start[found.end() :].split(".")[0]):
        return False
    if found["flatly"] or found["topic"]:
        return len(text) <= 1500
    return len(text) <= 500 and not _GOES_ON.search(text, found.end())


_REFUSES = re.compile(
    r"[\s*_>#]*"
    r"(?:(?:(?:(?:i'm|i am|we're|we are) )?(?:(?:so|very|really|truly|deeply) )?(?:sorry|afraid)|(?:my )?apologies|"
    r"i apologi[sz]e|unfortunately|regrettably|as an? (?:\w+ ){0,3}(?:ai|model|assistant)\b[^,.\n]{0,60})"
    r"(?: for [^,.\n]{0,60})?[\s,.;:–—-]*(?:(?:but|that|however|and)\b[\s,]*)?){0,4}"
    r"(?:(?P<topic>that's (?:not )?something i(?: can't|'m not able to| can| am able to) (?:help|assist|do)\b)|"
    r"(?:i|we) ?(?:(?:simply|just|really) )?"
    r"(?:(?:can't|cannot|can not|won't|will not)(?: be able to)?|(?:am|'m|are|'re) (?:unable|not able|not going) to|"
    r"(?:must|have to) (?:decline|refuse)(?: to)?|(?:refuse|decline) to|"
    r"(?:don't|do not|'m not|am not) (?:feel )?comfortable) "
    r"(?:(?P<flatly>(?:help|assist)(?:ing)?(?: you)?(?: (?:with|in|on)\b|[.!,;]|$)|"
    r"(?:comply|fulfil|do th(?:is|at))\b|engage in)|"
    r"(?:provid|giv|answer|creat|writ|generat|produc|offer|discuss|shar|respond|continu|participat|support|complet|"
    r"fulfill)(?:e|ing)?\b|(?:this|that|your|the) (?:request|task)))",
    re.I,
)
_GOES_ON = re.compile(
    r"\b(?:but|however|instead|although|though|as of|based on|here (?:is|are)|here's|what i can)\b", re.I
)


def _loses_fence(original: str, revision: str) -> bool:
    before, after = (
        len(_FENCE.findall(text)) if "```" in text or "~~~" in text else 0 for text in (original, revision)
    )
    if before % 2:  # a block left open may be closed, or its stray fence go
        return after < before - 1
    return after < before or after % 2 == 1


_FENCE = re.compile(r"^[ \t>]*(?:```[^`\n]*$|~~~)", re.M)

_REVISED = r"(?:revised|corrected|improved|enhanced|refined|edited|rewritten|reworked|polished)"
_ANSWER = r"(?:answer|response|solution|explanation|reply)"
_MENTIONS = re.compile(
    rf"\b(?:(?:this|the|my|a|an) {_REVISED} (?:student )?(?:{_ANSWER}|approach)\b"
    rf"|this {_REVISED} (?:version|code|text|essay|draft|sentence|paragraph|program|function|script)\b"
    rf"|here(?:'s| is| are) (?:the|an?|my|your) (?:\w+ )?{_REVISED}\b"
    rf"|i(?:'ve| have)? {_REVISED} (?:the|your|this|that|my) (?:\w+ )?(?:{_ANSWER}|text|sentence|code|wording)\b"
    rf"|i(?:'ve| have) (?:revised|corrected|rewritten) (?:it|this)\b"
    rf"|(?:the|my) (?:original|initial) (?:answer|response)\b"
    rf"|{_REVISED} (?:student )?(?:{_ANSWER}|version)\W{{0,3}}[:\n]"
    r"|(?:corrected_student|teacher_reason|student_solution)\w*)"
)
_STEMS = ("revised", "corrected", "improved", "enhanced", "refined", "edited", "rewritten", "reworked", "polished",
    "original", "initial", "student_s", "teacher_r")  # fmt: skip
_SCHOOL = re.compile(
    r"\b(?:student|teach|school|class|learn|pupil|universit|colleg|exam|homework|professor|lesson|course|educat|tutor|essay|"
    r"campus|kindergarten|academ|degree|study|studi|grade)",
    re.I,
)
_EDITING = re.compile(
    r"\b(?:revis|correct(?:ed|ing|ions?|s)\b|correct (?:the|this|these|those|my|any|all|each|it|following|errors?|"
    r"mistakes?|grammar|spelling)\b|edit(?!ion)|proofread|re-?writ|re-?phras|paraphras|improv|enhanc|refin|polish|rework|"
    r"fix|debug|bugs?\b|refactor|optimi[sz]|errors?\b|mistakes?\b|grammar|typos?\b|feedback|review|critique|better\b|"
    r"updat|modif|wrong|make (?:it|this|the|my)\b)",
    re.I,
)


def _mentions_revision(task: str, original: str, revision: str) -> bool:
    low = revision.lower().replace("’", "'")
    known = original.lower().replace("’", "'")
    # Counting words first is many times cheaper than the expression, and mostly there is none more than before.
    worth_reading = any(stem in low and low.count(stem) > known.count(stem) for stem in _STEMS)
    if worth_reading and any(found[0] not in known for found in _MENTIONS.finditer(low)) and not _EDITING.search(task):
        return True
    told = re.search(r"\bthe (?:student|teacher)\b", low) if "the student" in low or "the teacher" in low else None
    return bool(told) and not _SCHOOL.search(task) and not _SCHOOL.search(original)


# Where most of the text is shared, its language is too; asking costs more than all other rules together.
_SURELY_SAME_LANGUAGE = 0.3
_CONFIDENT = 0.95
_FEWEST_LETTERS = 60
# A change of script shows in shorter texts: in four Chinese characters, or twelve letters.
_FEWEST_OF_SCRIPT, _LETTERS_PER_IDEOGRAPH = 12, 3
_DOMINANT = 0.8
_IDEOGRAPHS = {"CJK", "HIRAGANA", "KATAKANA", "HANGUL"}
# Each is mistaken for another of its group, or is a written form of the same language.
_CLOSE = [set(group.split()) for group in (
    "no nn da sv", "hr sr bs sl mk bg", "es gl pt ca ext an oc", "id ms jv", "zh wuu yue", "cs sk", "de lb", "nl af fy",
    "en pcm", "ru uk be bg mk", "hi mr ne", "it vec lij", "fr wa oc gcf gcr", "tr az crh", "fa ps", "ar arz ary",
)]  # fmt: skip
_NO_LANGUAGE = "zxx"
_TRANSLATING = re.compile(
    r"translat|übersetz|traduc|tradui|tradu[zç]|vertaal|перевод|перевед|перевест|翻译|翻譯|翻訳|번역|ترجم|अनुवाद|\blanguages?\b|"
    r"\b(?:arabic|bengali|bulgarian|catalan|chinese|mandarin|cantonese|croatian|czech|danish|dutch|english|estonian|farsi|"
    r"persian|finnish|french|german|greek|hebrew|hindi|hungarian|indonesian|italian|japanese|korean|latin|latvian|"
    r"lithuanian|malay|norwegian|polish|portuguese|punjabi|romanian|russian|serbian|slovak|slovenian|spanish|swahili|"
    r"swedish|tamil|telugu|thai|turkish|ukrainian|urdu|vietnamese|welsh|irish|deutsch|español|français|italiano|português)\b",
    re.I,
)


def _changes_language(task: str, original: str, revision: str) -> bool:
    before, after = _prose(original), _prose(revision)
    scripts = _script(before), _script(after)
    if all(scripts) and scripts[0] != scripts[1]:
        return not _TRANSLATING.search(task) and _script(_prose(task)) != scripts[1]
    if min(_letters(before), _letters(after)) < _FEWEST_LETTERS:
        return False
    (one, sure), (other, sure_too) = _language(before), _language(after)
    if one == other or min(sure, sure_too) < _CONFIDENT or _NO_LANGUAGE in (one, other):
        return False
    if any({one, other} <= close for close in _CLOSE):
        return False
    asked, sure_of_task = _language(_prose(task))
    # A short task's language is a guess; that it is the revision's is enough to let the revision pass.
    return asked != other and (asked == one or sure_of_task < _CONFIDENT) and not _TRANSLATING.search(task)


def _prose(text: str) -> str:
    text = re.sub(r"^[ \t>]*(```|~~~).*?(?:^[ \t>]*\1[^\n]*$|\Z)", " ", text, flags=re.M | re.S)
    return re.sub(r"`[^`\n]+`|https?://\S+", " ", text)


def _letters(text: str) -> int:
    return sum(map(str.isalpha, text))


def _script(text: str) -> str | None:
    """Name the script that most letters are of, None where there is none or too few letters; "CJK" for East Asia's."""
    counts: Counter[str] = Counter()
    for letter, number in Counter(text).items():
        if letter.isalpha():
            script = unicodedata.name(letter, "UNKNOWN").split()[0]
            counts["CJK" if script in _IDEOGRAPHS else script] += number * (
                _LETTERS_PER_IDEOGRAPH if script in _IDEOGRAPHS else 1
            )
    if not counts or counts.total() < _FEWEST_OF_SCRIPT:
        return None
    script, number = counts.most_common(1)[0]
    return script if number >= _DOMINANT * counts.total() else None


def _language(text: str) -> tuple[str, float]:
    language, sure = _identifier().classify(text)
    return str(language), float(sure)


@lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # type: ignore[import-untyped]

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
