"""What a pairs recipe can say: its flat keys as two dataclasses, one for the run and one for each model."""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apo_trl.errors import InputError
from apo_trl.pairs.config.values import key

__all__ = ["DEFAULTS", "FIELDS", "METHODS", "PROTOCOLS", "ROLES", "ROLE_FIELDS", "USED", "Role", "Settings", "shard_of"]

METHODS = {
    "clair": "the policy's answer is rejected, its minimal revision chosen",
    "on_policy_judge": "answers of the policy, ranked by a judge",
    "off_policy_judge": "answers of other models, ranked by a judge",
    "stronger_preferred": "the stronger model's own answer over the policy's",
    "judge_then_clair": "a judge picks best and worst, the best is then revised",
}
ROLES = {
    "policy": "the model that will be trained (for off_policy_judge: the other models)",
    "reviser": "the model that revises an answer minimally",
    "judge": "the model that compares or scores answers",
    "stronger": "the model whose own answer is preferred",
}
USED = {
    "clair": {"policy", "reviser"},
    "on_policy_judge": {"policy", "judge"},
    "off_policy_judge": {"policy", "judge"},
    "stronger_preferred": {"policy", "stronger"},
    "judge_then_clair": {"policy", "judge", "reviser"},
}
PROTOCOLS = ("pairwise", "pointwise", "reward_model")


@dataclass(frozen=True, eq=False)  # hashed by identity: one object is one model
class Role:
    """How one model is asked. Every field is a key after the name of its role, as in `policy_temperature`."""

    name: str
    model: str | None = key(None, "its name at the server, or a folder or hub name to be run in this process")
    base_url: str | None = key(None, "OpenAI-compatible API, as http://127.0.0.1:8000/v1; without it: in this process")
    api_key_env: str | None = key(None, "the environment variable that holds the key")
    temperature: float | None = key(None, "null leaves it out", "float")
    top_p: float | None = key(None, "", "float")
    max_tokens: int | None = key(None, "of one answer; null leaves it out", "int")
    extra_body: Mapping[str, Any] = key(None, "more of the request's body, as {min_p: 0.05}", "map")
    system_prompt: str | None = key(None, "for conversations that have none (policy and stronger)")
    template: str | None = key(None, "a Jinja file instead of the packaged one (reviser and judge)")
    timeout: float = key(600.0, "seconds for one try", "float")
    max_retries: int = key(5, "tries after the first, at 408, 409, 429, 5xx and broken connections", "int")
    requests_per_minute: float | None = key(None, "", "float")
    tokens_per_minute: float | None = key(None, "of prompt and answer together", "float")
    input_price: float = key(0.0, "for a million prompt tokens", "float")
    output_price: float = key(0.0, "for a million answer tokens", "float")
    batch_size: int = key(8, "in this process: answers made together", "int")
    dtype: str | None = key(None, "in this process: float32, bfloat16, float16", "str")
    device: str | None = key(None, "in this process: cpu, cuda, ...")

    @property
    def api_key(self) -> str:
        """The key, or a word that servers without keys ignore."""
        return os.environ[self.api_key_env].strip() if self.api_key_env else "none"

    @property
    def public_model(self) -> str:
        """The model's name as others may read it: of a folder on this machine, its last part."""
        name = self.model or ""
        if re.match(r"[/~.\\]|[A-Za-z]:\\", name) or (not self.base_url and Path(name).is_dir()):
            return re.split(r"[/\\]", name.rstrip("/\\"))[-1]
        return name

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        """Money for so many tokens."""
        return (prompt_tokens * self.input_price + completion_tokens * self.output_price) / 1e6


# The paper's reviser was asked at 0.7 with 4,096 tokens (arXiv 2408.06266, the authors' notebook).
DEFAULTS: dict[str, dict[str, Any]] = {
    "policy": {"temperature": 1.0, "max_tokens": 1024},
    "reviser": {"temperature": 0.7, "max_tokens": 4096},
    "judge": {"temperature": 0.0, "max_tokens": 1024},
    "stronger": {"temperature": 0.7, "max_tokens": 1024},
}


@dataclass(frozen=True)
class Settings:
    """A whole recipe. The roles' keys are in `policy`, `reviser`, `judge` and `stronger`."""

    method: str = key("", "one of " + ", ".join(METHODS))
    prompts: str = key("", "a .jsonl, .json or .parquet file with `prompt` or `messages`, or a dataset of the hub")
    output_dir: str = key("", "where the pairs and the store go; the same folder again goes on")
    prompts_split: str = key("train", "the split of a hub dataset")
    max_prompts: int | None = key(None, "only the first so many", "int")
    num_responses: int | None = key(None, "answers sampled for each prompt (2; clair and stronger_preferred: 1)", "int")
    seed: int = key(0, "of sampling", "int")
    concurrency: int = key(32, "requests in flight at each server", "int")
    max_requests: int | None = key(
        None, "stop before more, counted over all runs into output_dir; 0: ask nobody", "int"
    )
    max_cost: float | None = key(None, "stop before more money, counted over all runs into output_dir", "float")
    max_failures: int = key(20, "stop after so many failed requests in a row: the server is down", "int")
    judge_protocol: str = key("pairwise", "pairwise (both orders), pointwise (scores), reward_model (a classifier)")
    judge_margin: float = key(1.0, "smallest difference of scores that is a win (pointwise, reward_model)", "float")
    max_edit_distance: float = key(0.85, "of a revision: normalised Levenshtein distance, 0 to 1", "float")
    max_length_ratio: float = key(2.5, "of a revision: characters of the longer over the shorter", "float")
    tokenizer: str | None = key(None, "the training model's, to measure pairs in tokens and after truncation")
    max_length: int | None = key(None, "of training: pairs made identical by it are dropped (needs tokenizer)", "int")
    eval_sets: Sequence[str] = key((), "files of evaluation prompts to look for among the prompts", "list")
    shard: str | None = key(None, "i/n: only this share of the prompts, for array jobs")
    dry_run: bool = key(False, "say how many requests and tokens it would take, and send none", "bool")
    policy: Sequence[Role] = ()
    reviser: Role = Role("reviser")
    judge: Role = Role("judge")
    stronger: Role = Role("stronger")

    @property
    def roles(self) -> list[Role]:
        """The roles that the method uses and that the recipe fills."""
        used = USED[self.method]
        single = [role for role in (self.reviser, self.judge, self.stronger) if role.name in used]
        return [role for role in (*self.policy, *single) if role.model]

    @property
    def responses(self) -> int:
        """How many answers a prompt needs."""
        if self.method in ("clair", "stronger_preferred"):
            return 1
        return self.num_responses or max(2, len(self.policy) if self.method == "off_policy_judge" else 2)

    def scores(self, role: Role) -> bool:
        """Say whether a role is a reward model."""
        return role.name == "judge" and self.judge_protocol == "reward_model"

    def described(self) -> dict[str, Any]:
        """Give what determines the pairs, for the report: no place of a server, no name of a variable, no path."""
        shown = {key: getattr(self, key) for key in _SHOWN if getattr(self, key) != FIELDS[key].default}
        for role in self.roles:
            named = {name: getattr(role, name) for name in _SHOWN_OF_ROLE} | {"model": role.public_model}
            if role.template:
                named["template"] = Path(role.template).name
            shown |= {f"{role.name}_{name}": value for name, value in named.items() if value not in (None, {}, "")}
        if len(self.policy) > 1:
            shown["policy_model"] = [role.public_model for role in self.policy]
        return shown

    @property
    def folder(self) -> Path:
        """Where this run writes: `output_dir`, or its part for a shard."""
        if not self.shard:
            return Path(self.output_dir)
        index, count = shard_of(self.shard)
        return Path(self.output_dir) / "shards" / f"{index}-of-{count}"


def shard_of(text: str) -> tuple[int, int]:
    """Read "i/n". Array jobs count from 0 or from 1: n/n is the same share as 0/n."""
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text.strip())
    if not match or not int(match[2]) or int(match[1]) > int(match[2]):
        raise InputError(f"shard: '{text[:40]}' is no share; write i/n with i from 0 to n, as in 1/8.")
    return int(match[1]) % int(match[2]), int(match[2])


ROLE_FIELDS = {field.name: field for field in dataclasses.fields(Role) if field.metadata}
FIELDS = {field.name: field for field in dataclasses.fields(Settings) if field.metadata}
_SHOWN = ("method", "num_responses", "seed", "judge_protocol", "judge_margin", "max_edit_distance", "max_length_ratio")
_SHOWN_OF_ROLE = ("model", "temperature", "top_p", "max_tokens", "extra_body", "system_prompt")
