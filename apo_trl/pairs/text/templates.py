"""What the reviser and the judge are told: Jinja files that a recipe can replace, rendered in a sandbox.

A file's text is the user's message; `system` and `repair`, set in it, are the system's and the one that asks for a
badly formed reply again.
"""

import hashlib
import itertools
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import StrictUndefined
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

from apo_trl.errors import InputError, nearest

__all__ = ["Asked", "Template", "load_template", "suffix_for"]

_FOLDER = Path(__file__).parent / "prompt_templates"
_TAGS = ("reasoning", "revision", "task", "answer", "answer_a", "answer_b", "system", "user", "assistant", "tool")
_TAG = re.compile(rf"<\s*(?:/\s*)?(?:{'|'.join(_TAGS)})(-[0-9]+)?(?![\w-])[^<>]*>", re.IGNORECASE)


class Asked(NamedTuple):
    """A rendered request: its messages, and the suffix of the tags that a reply is read by."""

    messages: list[dict[str, Any]]
    suffix: str


class Template:
    """One file, compiled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=False)
        try:
            text = path.read_text(encoding="utf-8-sig")
            self._asks_for = find_undeclared_variables(environment.parse(text))
            self._template = environment.from_string(text)
        except Exception as error:  # no file, no UTF-8, no Jinja, or too deep for its parser
            raise self._unusable(error) from error
        self.digest = hashlib.sha256(text.encode()).hexdigest()

    def ask(self, prompt: Sequence[dict[str, Any]], **answers: str) -> Asked:
        """Render the request about one or two answers to a conversation."""
        texts = [message["content"] for message in prompt] + list(answers.values())
        suffix = suffix_for(*texts)
        module = self._render(prompt, answers, suffix, problem="")
        messages = [{"role": "user", "content": str(module).strip()}]
        if not messages[0]["content"]:
            raise self._unusable("it says nothing outside of `system` and `repair`")
        if system := str(getattr(module, "system", "")).strip():
            messages.insert(0, {"role": "system", "content": system})
        return Asked(messages, suffix)

    def ask_again(
        self, prompt: Sequence[dict[str, Any]], asked: Asked, reply: str, problem: str, **answers: str
    ) -> Asked:
        """Render the request for a badly formed reply again, after what was said."""
        module = self._render(prompt, answers, asked.suffix, problem)
        repair = str(getattr(module, "repair", "")).strip() or f"Your reply cannot be used: {problem} Answer again."
        more = [{"role": "assistant", "content": reply}, {"role": "user", "content": repair}]
        return asked._replace(messages=[*asked.messages, *more])

    def _render(self, prompt: Sequence[dict[str, Any]], answers: dict[str, str], suffix: str, problem: str) -> Any:
        given = {"task": prompt[-1]["content"], "earlier": prompt[:-1], "s": suffix, "problem": problem, **answers}
        if unknown := sorted(self._asks_for - set(given)):  # also in a branch that this row does not take
            raise self._unusable(
                f"there is no variable '{unknown[0]}'.{nearest(unknown[0], given)} It is given {', '.join(given)}"
            )
        try:
            return self._template.make_module(given)
        except Exception as error:  # a template may raise what it likes
            raise self._unusable(error) from error

    def _unusable(self, why: object) -> InputError:
        said = " ".join(str(why).split())[:300].rstrip(".") or type(why).__name__
        return InputError(f"The template {self.path} cannot be used: {said}.")


def suffix_for(*texts: str) -> str:
    """Find what to put behind the names of the tags so that no text holds one of them: nothing, "-2", "-3", ..."""
    found = {match[1] or "" for match in _TAG.finditer("\n".join(texts))}
    return next(
        suffix for suffix in itertools.chain([""], map("-{}".format, itertools.count(2))) if suffix not in found
    )


@lru_cache
def load_template(step: str, path: str | None = None) -> Template:
    """Load the packaged template of a step (revise, compare, score), or the file in its place."""
    return Template(Path(path) if path else _FOLDER / f"{step}.jinja")
