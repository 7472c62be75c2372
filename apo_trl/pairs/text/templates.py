"""The prompts of the reviser and the judge: Jinja files that a recipe can replace, rendered in a sandbox.

A file is the user message; its variables `system` and `repair` are the system message and the request after a
malformed reply.
"""

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import StrictUndefined
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

from apo_trl.errors import InputError, nearest
from apo_trl.io.error_text import one_line

__all__ = ["Asked", "Template", "load_template", "suffix_for"]

_TAGS = ("reasoning", "revision", "task", "answer", "answer_a", "answer_b", "system", "user", "assistant", "tool")
_TAG = re.compile(rf"<\s*(?:/\s*)?(?:{'|'.join(_TAGS)})(-[0-9]+)?(?![\w-])[^<>]*>", re.IGNORECASE)
Message = dict[str, Any]


class Asked(NamedTuple):
    """A rendered request: its messages, and the suffix of the tags in its reply."""

    messages: list[Message]
    suffix: str


class Template:
    """A compiled file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
        try:
            text = path.read_text(encoding="utf-8-sig")
            self._needs = find_undeclared_variables(environment.parse(text))
            self._template = environment.from_string(text)
        except Exception as error:  # no file, no UTF-8, no Jinja, or too deep for its parser
            raise self._unusable(error) from error
        self.digest = hashlib.sha256(text.encode()).hexdigest()

    def ask(self, prompt: Sequence[Message], **answers: str) -> Asked:
        """Render the request about one or two answers to a conversation."""
        suffix = suffix_for(*(message["content"] for message in prompt), *answers.values())
        module = self._render(prompt, answers, suffix, problem="")
        content, system = str(module).strip(), str(getattr(module, "system", "")).strip()
        if not content:
            raise self._unusable("it has no text outside of `system` and `repair`")
        messages = [{"role": "system", "content": system}] if system else []
        return Asked([*messages, {"role": "user", "content": content}], suffix)

    def ask_again(self, prompt: Sequence[Message], asked: Asked, reply: str, problem: str, **answers: str) -> Asked:
        """Render the request to repair a malformed reply, after the messages so far."""
        module = self._render(prompt, answers, asked.suffix, problem)
        repair = str(getattr(module, "repair", "")).strip() or f"Your reply cannot be used: {problem} Answer again."
        messages = [*asked.messages, {"role": "assistant", "content": reply}, {"role": "user", "content": repair}]
        return asked._replace(messages=messages)

    def _render(self, prompt: Sequence[Message], answers: dict[str, str], suffix: str, problem: str) -> Any:
        values = {"task": prompt[-1]["content"], "earlier": prompt[:-1], "s": suffix, "problem": problem, **answers}
        if name := min(self._needs - set(values), default=""):  # also in a branch that this row does not take
            raise self._unusable(f"unknown variable '{name}'.{nearest(name, values)} Use {', '.join(values)}")
        try:
            return self._template.make_module(values)
        except Exception as error:  # a template may raise anything
            raise self._unusable(error) from error

    def _unusable(self, reason: object) -> InputError:
        return InputError(f"The template {self.path} cannot be used: {one_line(reason)}.")


def suffix_for(*texts: str) -> str:
    """Return the first of "", "-2", "-3", ... that behind the names of the tags makes tags that no text contains."""
    used = {match[1] or "" for match in _TAG.finditer("\n".join(texts))}
    return next(suffix for suffix in ["", *(f"-{number}" for number in range(2, len(used) + 3))] if suffix not in used)


@lru_cache
def load_template(step: str, path: str | None = None) -> Template:
    """Load the packaged template of a step (revise, compare, score), or the file in its place."""
    return Template(Path(path) if path else Path(__file__).parent / f"prompt_templates/{step}.jinja")
