"""Read a response body, from a server, a batch file, the cache or this process, into an answer without its thoughts.

Nothing else looks into a body. Any JSON can be read: a reply that is no complete answer has a `fault`.
"""

import math
import re
from collections import Counter, defaultdict
from typing import Any, NamedTuple

from apo_trl.io.error_text import one_line
from apo_trl.io.messages import replace_surrogates

__all__ = ["MARKS", "Reply", "choices_of", "failure_of", "open_thoughts", "read_reply", "usage_of"]

_THOUGHTS = {  # ends by beginnings; a chat template may write the beginning, so that a reply has the end only
    "<think>": "</think>",  # DeepSeek-R1, Qwen3, GLM, SmolLM3, Granite 3.3 and most others
    "<thought>": "</thought>",  # EXAONE Deep
    "<seed:think>": "</seed:think>",  # Seed-OSS
    "[THINK]": "[/THINK]",  # Magistral
    "◁think▷": "◁/think▷",  # Kimi-VL
    "<|START_THINKING|>": "<|END_THINKING|>",  # Command A Reasoning
    "<|channel>thought": "<channel|>",  # Gemma 4
}
MARKS = frozenset({*_THOUGHTS, *_THOUGHTS.values(), "<|channel>", "<|channel|>", "<|message|>"})  # maybe special tokens
_BEGIN, _END = ("|".join(map(re.escape, marks)) for marks in (_THOUGHTS, _THOUGHTS.values()))
_MARK = re.compile(rf"[\s\ufeff]*(?:({_BEGIN})|{_END})")
_LINE = re.compile(rf"^```.*?(?:^```|\Z)|^({_END})[ \t\r]*$", re.M | re.S)  # fenced code, or an end alone
_BORDER = r"(?m)^{0}|{0}(?=[ \t\r]*$)"  # an end at the beginning or at the end of a line
_BORDERED = {begin: re.compile(_BORDER.format(re.escape(end))) for begin, end in _THOUGHTS.items()}
_GRANITE = re.compile(r"\s*Here(?:'s| is) my thought process:(.*?)\bHere(?:'s| is) my response:", re.S)  # Granite 3.2
_TURN = r"(?:<\|start\|>)?(?:assistant)?<\|channel\|>"  # gpt-oss; the next line also without its special tokens
_HARMONY = re.compile(
    rf"\s*(?:{_TURN}(?:analysis|commentary|final)\b[^\n]*?<\|message\|>|analysis(?=[^\W\d_a-z]).*?assistantfinal)", re.S
)
_FINAL = re.compile(rf"{_TURN}final(?:(?!<\|channel\|>).)*?<\|message\|>|assistantfinal", re.S)
_BLANK_LINES, _BLANK = re.compile(r"\A(?:\s*\n)?"), re.compile(r"\A(?:\s*\n| (?! ))?")
_WRAPPED = re.compile(  # Hunyuan, ERNIE, Command A Reasoning
    r"\s*(?:<(answer|response)>|<\|START_RESPONSE\|>)((?:(?!</?\1>).)*)(?:</\1>|<\|END_RESPONSE\|>)\s*\Z", re.S
)
_PARTS = {"refusal": "refusal"} | {  # kinds of content parts; others are no answer
    **dict.fromkeys(("text", "output_text"), "text"),
    **dict.fromkeys(("thinking", "reasoning", "reasoning_text"), "thoughts"),
    **dict.fromkeys(("redacted_thinking", "reference"), "ignored"),
}
_FINISHES = {
    "stop": "stop eos eos_token end_turn stop_sequence complete completed done finished",
    "length": "length max_tokens max_output_tokens model_length",
    "content_filter": "content_filter content_filtered safety refusal sensitive recitation prohibited_content spii "
    "blocklist",
}
_FINISH = {word: finish for finish, words in _FINISHES.items() for word in words.split()}


class Reply(NamedTuple):
    """A completion; `finish` is "stop", "length", "content_filter" or another word of the server."""

    text: str
    finish: str
    refused: bool
    thoughts: str

    @property
    def fault(self) -> str:
        """Why the answer cannot be used: "truncated", "filtered", "unfinished" or "empty"; else an empty string."""
        if self.finish != "stop":
            return {"length": "truncated", "content_filter": "filtered"}.get(self.finish, "unfinished")
        return "" if self.text.strip() else "empty"


def failure_of(body: Any) -> str:
    """Return why a body is no chat completion, if possible in the provider's words; an empty string if it is one."""
    choices = body.get("choices") if isinstance(body, dict) else None
    choices = choices if isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices) else []
    for part in [body, *choices] if isinstance(body, dict) else []:
        if error := part.get("error"):
            return one_line(error.get("message") or error if isinstance(error, dict) else error)
        if (reason := _finish_word(part.get("finish_reason"))) in ("error", "abort"):
            return f"finish_reason {reason}"
    valid = choices and all(isinstance(choice.get("message"), dict) for choice in choices)
    return "" if valid else "the response is not a chat completion"


def choices_of(body: Any) -> list[dict[str, Any]]:
    """Return the choices of a chat completion; none if the body is something else."""
    return [] if failure_of(body) else list(body["choices"])


def read_reply(body: Any, max_tokens: float | None = None) -> Reply:
    """Read the first choice. One without a finish reason is complete if it is shorter than `max_tokens`."""
    choice, *_ = [*choices_of(body), {}]
    message, reason = choice.get("message", {}), choice.get("finish_reason")
    parts = _sort_parts(message.get("content"))
    parts["thoughts"] += [str(message[name]) for name in ("reasoning_content", "reasoning") if message.get(name)]
    text, thoughts, word = "".join(parts["text"]), "\n".join(parts["thoughts"]), _finish_word(reason)
    finish = _FINISH.get(word, replace_surrogates(word)[:60]) or "unknown"
    if "other" in parts:
        text, finish = "", "content that is not text"
    elif reason is None or reason == "":
        tokens = usage_of(body)[1] or len(text.encode("utf-8", "replace")) + len(thoughts)
        finish = "stop" if tokens < (max_tokens or math.inf) else "missing"
    if parts["thoughts"]:  # the server has separated them
        text = _BLANK_LINES.sub("", text, count=1)
    else:
        thoughts, text = _split(text, cut=finish == "length")
    refused = bool(message.get("refusal") or parts["refusal"]) or word == "refusal"
    return Reply(replace_surrogates(text), finish, refused, replace_surrogates(thoughts).strip())


def _finish_word(reason: Any) -> str:
    return reason.strip().lower().removeprefix("finish_reason_") if isinstance(reason, str) else ""


def _sort_parts(content: Any) -> defaultdict[str, list[str]]:
    """Return the texts of content by the kinds of _PARTS, and as "other" what is neither."""
    texts = defaultdict[str, list[str]](list)
    for part in content if isinstance(content, list) else [content]:
        fields = {"type": "text", "text": part} if isinstance(part, str) else part if isinstance(part, dict) else {}
        name = fields.get("type")
        kind = _PARTS.get(name if isinstance(name, str) else "", "ignored" if part is None else "other")
        inner = next((fields[key] for key in ("thinking", "reasoning", "text") if fields.get(key)), "")
        if isinstance(inner, list):  # of text parts, as Mistral sends thoughts
            inner = "".join(str(each.get("text")) for each in inner if isinstance(each, dict))
        texts[kind if isinstance(inner, str) else "other"].append(inner)
    return texts


def _split(text: str, *, cut: bool) -> tuple[str, str]:
    """Split the thoughts at the start of a text, which may be cut in them, from the rest.

    A chat template may have written the beginning of thoughts: their end alone counts if it is a line of its own.
    """
    if match := _GRANITE.match(text):
        return match[1], _answer(text[match.end() :])
    if _HARMONY.match(text):
        thoughts, final, *_ = [*_FINAL.split(text, 1), ""]
        last = next((mark for mark in ("<|return|>", "<|end|>") if final.rstrip().endswith(mark)), "")
        return thoughts, _answer(final.rstrip().removesuffix(last).rstrip() if last else final)
    inner, position, borders = [], 0, True
    line = next((line for line in _LINE.finditer(text) if line[1]), None)
    if line and not ((mark := _MARK.match(text)) and mark[1]):
        inner, position = [text[: line.start()]], line.end()
    while (mark := _MARK.match(text, position)) and (mark[1] or position):
        start = position = mark.end()
        if begin := mark[1]:
            border = _BORDERED[begin].search(text, start) if borders else None
            borders = border is not None  # else a later search would find none either, and take long
            end = border.start() if border else text.find(_THOUGHTS[begin], start)
            if end < 0 and (cut or text[start : start + 1] in ("", "\r", "\n")):
                end = len(text)
            if end < 0:
                position = mark.start()
                break
            inner.append(text[start:end])
            position = end + len(_THOUGHTS[begin])
    return "".join(inner), _answer(text[position:]) if position else text


def _answer(text: str) -> str:
    """Return the text after thoughts without blank lines before it, and without tags around all of it."""
    wrapped = _WRAPPED.match(text)
    return _BLANK.sub("", wrapped[2].rstrip() if wrapped else text, count=1)


def open_thoughts(prompt: str) -> str:
    """Return the beginning of thoughts, as a line, with which a prompt begins the reply, if it does."""
    return next((f"{begin}\n" for begin in _THOUGHTS if prompt.rstrip().endswith(begin)), "")


def usage_of(body: Any) -> tuple[int, int]:
    """Return the tokens of prompt and completion, with its thoughts; 0 if a response reports none or nonsense."""
    usage = body.get("usage") if isinstance(body, dict) else None
    details = usage.get("completion_tokens_details") if isinstance(usage, dict) else None
    given = [
        *(details if isinstance(details, dict) else {}).items(),
        *(usage if isinstance(usage, dict) else {}).items(),
    ]
    counts = Counter({name: int(n) for name, n in given if isinstance(n, (int, float)) and 0 < n < 1e8})
    prompt = counts["prompt_tokens"] or counts["input_tokens"]
    completion = counts["completion_tokens"] or counts["output_tokens"]
    if counts["reasoning_tokens"] > completion:  # some servers count thoughts apart
        completion += counts["reasoning_tokens"]
    return prompt, max(completion, counts["total_tokens"] - prompt if prompt else 0)
