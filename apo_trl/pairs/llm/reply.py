"""Read a response body, from a server, a batch file, the cache or this process, into an answer without its thoughts.

Nothing else looks into a body. Any JSON can be read: a reply that is no complete answer has a `fault`.
"""

import math
import re
from typing import Any, NamedTuple

from apo_trl.io.messages import content_text, replace_surrogates

__all__ = ["MARKS", "Reply", "choices_of", "open_thoughts", "read_reply", "usage_of"]

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
_ENDS = {  # but not in quotes, as in thoughts and answers about these marks: `</think>`, "</think>", '</think>\n'
    begin: re.compile(r"(?<![`'\"]){0}|{0}(?![`'\"\\])".format(re.escape(end))) for begin, end in _THOUGHTS.items()
}
_GRANITE = re.compile(r"\s*Here(?:'s| is) my thought process:(.*?)\bHere(?:'s| is) my response:", re.S)  # Granite 3.2
_TURN = r"(?:<\|start\|>)?(?:assistant)?<\|channel\|>"  # gpt-oss; the next line also without its special tokens
_HARMONY = re.compile(rf"\s*(?:{_TURN}|analysis.*?assistantfinal)", re.S)
_FINAL = re.compile(rf"{_TURN}final(?:(?!<\|channel\|>).)*?<\|message\|>|assistantfinal", re.S)
_BORDERS = re.compile(r"\A(?:\s*<\|START_RESPONSE\|>)?(?:\s*\n| (?! ))?|\s*<\|(?:END_RESPONSE|end|return)\|>\s*\Z")
_FINISH = {
    **dict.fromkeys(("stop", "eos", "eos_token", "end_turn", "stop_sequence", "complete", "completed"), "stop"),
    **dict.fromkeys(("length", "max_tokens", "max_output_tokens", "model_length"), "length"),
    **dict.fromkeys(("content_filter", "content_filtered", "safety", "refusal", "sensitive"), "content_filter"),
}


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


def choices_of(body: Any) -> list[dict[str, Any]]:
    """Return the choices of a chat completion; none if the body is something else."""
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list):
        return []
    valid = all(isinstance(each, dict) and isinstance(each.get("message") or {}, dict) for each in choices)
    return choices if valid else []


def read_reply(body: Any, max_tokens: float | None = None) -> Reply:
    """Read the first choice. One without a finish reason is complete if it is shorter than `max_tokens`."""
    choice, *_ = [*choices_of(body), {}]
    message, reason = choice.get("message") or {}, choice.get("finish_reason")
    content = message.get("content") or ""
    thoughts = [str(message[name]) for name in ("reasoning_content", "reasoning") if message.get(name)]
    if isinstance(content, list):
        kinds = [part.get("type") if isinstance(part, dict) else None for part in content]
        thoughts += [kind for kind in kinds if kind in ("thinking", "reasoning")]  # as Mistral sends them
        content = [part for part, kind in zip(content, kinds, strict=True) if kind not in ("thinking", "reasoning")]
    text = content_text(content)
    finish = _FINISH.get(reason.lower(), replace_surrogates(reason)[:60]) if isinstance(reason, str) else "unknown"
    if text is None:
        text, finish = "", "content that is not text"
    elif reason in (None, ""):
        tokens = usage_of(body)[1] or len(text.encode()) + sum(map(len, thoughts))
        finish = "stop" if tokens < (max_tokens or math.inf) else "missing"
    inner, text = _split(text, separated=bool(thoughts))
    refused = bool(message.get("refusal")) or reason == "refusal"
    return Reply(text, finish, refused, replace_surrogates("\n".join([*thoughts, inner])).strip())


def _split(text: str, separated: bool) -> tuple[str, str]:
    """Split the thoughts at the start of a text from the rest; without an end, all of it are thoughts.

    An end without a beginning counts too, unless the server has `separated` the thoughts already.
    """
    thoughts, rest = "", text
    if _HARMONY.match(text):
        thoughts, *finals = _FINAL.split(text)
        rest = finals[-1] if finals else ""
    elif match := _GRANITE.match(text):
        thoughts, rest = match[1], text[match.end() :]
    while True:
        for begin, ends in _ENDS.items():
            begins = rest.lstrip().startswith(begin)
            end = ends.search(rest) if _THOUGHTS[begin] in rest else None  # a regular expression is slow
            if begins or (end and not separated and begin not in rest[: end.start()]):
                thoughts += (rest[: end.start()] if end else rest).replace(begin, "", begins)
                rest = rest[end.end() :] if end else ""
                break
        else:
            return thoughts, _BORDERS.sub("", rest) if len(rest) < len(text) else text


def open_thoughts(prompt: str) -> str:
    """Return the mark with which a prompt begins the thoughts of the reply, if it does."""
    return next((begin for begin in _THOUGHTS if prompt.rstrip().endswith(begin)), "")


def usage_of(body: Any) -> tuple[int, int]:
    """Return the tokens of prompt and completion that a response reports, 0 if it reports none or nonsense."""
    usage = body.get("usage") if isinstance(body, dict) else None
    counts = [usage.get(f"{part}_tokens") if isinstance(usage, dict) else 0 for part in ("prompt", "completion")]
    prompt, completion = (int(count) if isinstance(count, (int, float)) and 0 < count < 1e8 else 0 for count in counts)
    return prompt, completion
