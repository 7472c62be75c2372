"""Every reason that drops a row: what happened, and what to change."""

import re
from pathlib import Path

from apo_trl.pairs.config.keys import ROLES, Settings
from apo_trl.pairs.text.filters import REVISION_REASONS

__all__ = ["REASONS", "RETRY", "WAITING", "remedy"]

RETRY = "Some requests failed. Run the same command again to retry only those."
"""What a command prints last if it left requests unanswered."""

_RERUN = "Run the same command again."
_REPLIES = {
    "truncated": ("the answer was cut at max_tokens", "Raise {}_max_tokens, or turn thinking off in {}_extra_body."),
    "filtered": ("the server's content filter cut the answer", "Set another {}_model, or leave such prompts out."),
    "unfinished": ("the server reports that the answer is not complete", "Look at its replies, and at {}_max_tokens."),
    "empty": ("the answer is empty", "Set another {}_model, or raise {}_max_tokens if it thinks first."),
    "error": ("the request failed after all retries; the next run sends it again", _RERUN),
}
_REVISIONS = {
    "empty": "Set another reviser_model or reviser_template.",
    "refused": "Set another reviser_model, or leave such prompts out.",
    "unchanged": "Set a stronger reviser_model, or raise reviser_temperature.",
    "mentions_revision": "Forbid it in your own reviser_template, or set another reviser_model.",
    "lost_code_fence": "Demand whole code blocks in your own reviser_template, or set another reviser_model.",
    "changed_language": "Name the language in your own reviser_template, or set another reviser_model.",
    "too_far": "Raise max_edit_distance, or set a reviser_model that changes less.",
    "length_ratio": "Raise max_length_ratio, or set a reviser_model that changes less.",
}
_WEAK = "Set a stronger judge_model, or raise num_responses."
_LONGER = "Raise max_length, or leave long prompts out."
REASONS = {
    **{
        f"{role}_{end}": (f"{role}: {why}", what.replace("{}", role))
        for role in ROLES
        for end, (why, what) in _REPLIES.items()
    },
    **{name: (why, _REVISIONS[name]) for name, why in REVISION_REASONS.items()},
    "judge_invalid": (
        "the judge gave no readable verdict or score, even after a repair request",
        "Raise judge_max_tokens, or set another judge_model.",
    ),
    "tie": (
        "the judge finds the answers equally good, or their scores too close",
        "Lower judge_margin, or raise num_responses or policy_temperature.",
    ),
    "disagreement": ("the judge's verdict changes with the order in which the answers are shown", _WEAK),
    "malformed": (
        "the reviser's reply has no clear revision, even after a repair request",
        "Set a reviser_model that writes the tags of reviser_template, or raise reviser_max_tokens.",
    ),
    **{
        f"{role}_failed": ("the function failed on the row", f"Correct {role}_function, which gets such rows again.")
        for role in ("reviser", "judge")
    },
    "no_revision": ("the reviser's function returned None: it has nothing to revise, or cannot", "Set more prompts."),
    "stronger_refused": ("the stronger model refuses to answer", "Set another stronger_model."),
    "identical": ("chosen and rejected are the same", "Raise policy_temperature."),
    "identical_answers": ("all answers to be ranked are the same", "Raise policy_temperature or num_responses."),
    "identical_after_truncation": ("chosen and rejected are the same once cut to max_length", _LONGER),
    "prompt_fills_max_length": ("the prompt alone fills max_length", _LONGER),
    "template_fails": ("the tokenizer's chat template cannot render the conversation", "Set another tokenizer."),
    "bad_row": ("the row cannot be used as it is", "Correct the rows of the prompts."),
    "duplicate_prompt": ("an earlier row has the same prompt", "Set more prompts."),
    "duplicate_id": ("another row has the same id", "Make the ids unique."),
    "not_asked": ("the run stopped before this row", _RERUN),
    "not_answered": ("the row waits for the answers of a batch", "Import them, and run the same command again."),
}
"""The meaning of each reason, and its remedy, whose names of settings get their values by `remedy`."""

WAITING = frozenset(name for name in REASONS if name.endswith("_error")) | {"not_asked", "not_answered"}
"""The reasons that a further run may remove as it is."""


def remedy(reason: str, settings: Settings) -> str:
    """Return the remedy of a reason, with the present values of its settings: "Raise max_length (now 512)"."""
    values = settings.model_dump(exclude={"policy", "reviser", "judge", "stronger"})
    text = REASONS[reason][1]
    for role in settings.functions:
        text = text.replace(f"{role.name}_model", f"{role.name}_function")
        if re.search(f"{role.name}_(template|max_tokens|temperature)", text):
            text = f"Correct {role.name}_function."
    for role in reversed([*settings.roles, *settings.functions]):  # of several policies, the first
        own = role.model_dump() | {"template": Path(role.template or "packaged").name}
        own |= dict.fromkeys(("model", "function"), role.public_model)
        values |= {f"{role.name}_{name}": value for name, value in own.items()}
    shown = {name: f"{name} (now {'null' if value is None else value})" for name, value in values.items()}
    return re.sub(r"\b[a-z]+_[a-z_]+\b", lambda match: shown.get(match[0], match[0]), text)
