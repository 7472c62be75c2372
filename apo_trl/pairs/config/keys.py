"""The keys of a pairs recipe as two pydantic models: `Settings` for the run and `Role` for each model."""

import json
import os
import re
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import from_json

from apo_trl.errors import InputError

__all__ = ["DEFAULTS", "METHODS", "ROLES", "USED", "Role", "Settings", "kind_of", "shard_of"]

METHODS = {
    "clair": "the policy's answer is rejected, its minimal revision chosen",
    "on_policy_judge": "answers of the policy, ranked by a judge",
    "off_policy_judge": "answers of other models, ranked by a judge",
    "stronger_preferred": "the stronger model's own answer over the policy's",
    "judge_then_clair": "a judge picks best and worst, the best is then revised",
}
ROLES = {
    "policy": "the model that answers, usually the one to be trained",
    "reviser": "the model that revises an answer minimally",
    "judge": "the model that compares or scores answers",
    "stronger": "the model whose own answer is preferred",
}
_PART_OF_METHODS = {"policy": "", "reviser": "clair", "judge": "judge", "stronger": "stronger"}  # that use the role
USED = {method: {role for role, part in _PART_OF_METHODS.items() if part in method} for method in METHODS}
# Other defaults than a role's: the paper's reviser had 4,096 tokens (arXiv 2408.06266, the authors' notebook).
DEFAULTS: dict[str, Any] = {"policy": {"temperature": 1}, "reviser": {"max_tokens": 4096}, "judge": {"temperature": 0}}
_Protocol = Literal["pairwise", "pointwise", "reward_model", "function"]
_KINDS = {int: "INT", float: "FLOAT", bool: "BOOL", list[str]: "LIST", dict[str, Any]: "MAP"}
_DESCRIBED = {"num_responses", "seed", "judge_protocol", "judge_margin", "max_edit_distance", "max_length_ratio"}
_DESCRIBED_OF_ROLE = {"temperature", "top_p", "max_tokens", "extra_body", "system_prompt"}


def kind_of(field: FieldInfo) -> str:
    """Return the type of a key's value: STR, INT, FLOAT, BOOL, MAP or LIST (of strings)."""
    types: tuple[Any, ...] = (field.annotation, *get_args(field.annotation))
    return next((_KINDS[part] for part in types if part in _KINDS), "STR")


def _key(default: Any, description: str, **bounds: Any) -> Any:
    return Field(default, description=description, **bounds)


class _Keys(BaseModel):
    """Values of YAML and strings of the command line, read alike. No message may repeat a string: it may be a key."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _read(cls, value: Any, info: ValidationInfo) -> Any:
        kind = kind_of(cls.model_fields[str(info.field_name)])
        if value is None or (isinstance(value, str) and value.strip().lower() in ("null", "none")):
            return {} if kind == "MAP" else None
        if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
            raise ValueError("must be UTF-8")
        if kind == "MAP":
            try:  # through JSON: YAML has dates and more, which no request can send
                return from_json(value if isinstance(value, str) else json.dumps(value), allow_inf_nan=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise ValueError("must be a map of JSON values") from error
        if kind in ("INT", "FLOAT") and isinstance(value, bool):
            raise ValueError("must be a number, got a boolean")
        return value


class Role(_Keys):
    """One model and how to send requests to it. Each field is a key after its role's name, as `policy_temperature`."""

    __eq__, __hash__ = object.__eq__, object.__hash__  # one object is one model, also as a key of a dict

    name: str
    model: str | None = _key(None, "name at the server, or a folder or hub name")
    function: str | None = _key(None, "module:function or file.py:function, instead of a model (reviser, judge)")
    base_url: str | None = _key(None, "OpenAI-compatible API; without it: in this process")
    api_key_env: str | None = _key(None, "environment variable that holds the key")
    temperature: float | None = _key(0.7, "of sampling; null leaves it out", ge=0)
    top_p: float | None = _key(None, "nucleus sampling; null leaves it out", ge=0, le=1)
    max_tokens: int | None = _key(1024, "of one answer; null leaves it out", ge=1)
    extra_body: dict[str, Any] = _key({}, "more fields of a request, as {min_p: 0.05}")
    system_prompt: str | None = _key(None, "for conversations without one (policy, stronger)")
    template: str | None = _key(None, "Jinja file of the prompt (reviser, judge)")
    timeout: float = _key(600.0, "seconds without a byte that end a try", gt=0)
    max_retries: int = _key(5, "tries after the first (408, 409, 429, 5xx, connection)", ge=0)
    requests_per_minute: float | None = _key(None, "rate limit", gt=0)
    tokens_per_minute: float | None = _key(None, "rate limit, prompts and answers together", gt=0)
    input_price: float = _key(0.0, "per million prompt tokens", ge=0)
    output_price: float = _key(0.0, "per million answer tokens", ge=0)
    batch_size: int = _key(8, "in this process: answers sampled together", ge=1)
    dtype: str | None = _key(None, "in this process: float32, bfloat16, float16")
    device: str | None = _key(None, "in this process: cpu, cuda, ...")

    @property
    def api_key(self) -> str:
        """The key, or a word that servers without keys ignore."""
        return os.environ[self.api_key_env].strip() if self.api_key_env else "none"

    @property
    def limit(self) -> float | None:
        """The maximum tokens of an answer, if they are a positive number."""
        limit = self.max_tokens or self.extra_body.get("max_completion_tokens")
        return limit if isinstance(limit, (int, float)) and limit > 0 else None

    @property
    def public_model(self) -> str:
        """The name of the model, or of the function, as others may read it: the last part of a local path."""
        if self.function:
            return re.split(r"[/\\]", self.function)[-1]
        name = self.model or ""
        is_path = re.match(r"[/~.\\]|[A-Za-z]:\\", name) or (not self.base_url and Path(name).is_dir())
        return re.split(r"[/\\]", name.rstrip("/\\"))[-1] if is_path else name

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        """Compute the price of these tokens."""
        return (prompt_tokens * self.input_price + completion_tokens * self.output_price) / 1e6


class Settings(_Keys):
    """A whole recipe. The keys of the roles are in `policy`, `reviser`, `judge` and `stronger`."""

    method: str = _key(..., f"one of {', '.join(METHODS)}", pattern=f"^({'|'.join(METHODS)})$")
    prompts: str = _key(..., "a .jsonl, .json or .parquet file or a hub dataset, of prompts or messages", min_length=1)
    output_dir: str = _key(..., "the folder of pairs and cache; the same again resumes", min_length=1)
    prompts_split: str = _key("train", "the split of a hub dataset")
    max_prompts: int | None = _key(None, "maximum number of prompts", ge=1)
    num_responses: int | None = _key(None, "answers to each prompt (2; clair, stronger_preferred: 1)", ge=1)
    seed: int = _key(0, "of sampling")
    concurrency: int = _key(32, "requests in flight at each server", ge=1)
    max_requests: int | None = _key(None, "over all runs into output_dir; 0: cached replies only", ge=0)
    max_cost: float | None = _key(None, "over all runs into output_dir, in the unit of the prices", ge=0)
    max_failures: int = _key(20, "stop after as many failures in a row, or first replies dropped alike", ge=1)
    judge_protocol: _Protocol = _key("pairwise", "pairwise (both orders), pointwise (scores), reward_model or function")
    judge_margin: float = _key(1.0, "least difference of scores that wins; of a function, any", ge=0)
    max_edit_distance: float = _key(0.85, "normalised Levenshtein distance, 0 to 1", ge=0, le=1)
    max_length_ratio: float = _key(2.5, "characters of the longer over the shorter", ge=1)
    tokenizer: str | None = _key(None, "the trained model's: measures pairs in tokens")
    max_length: int | None = _key(None, "of training: drops pairs that it makes identical", ge=1)
    eval_sets: list[str] = _key([], "evaluation prompts to look for among the prompts")
    cache_by_url: bool = _key(False, "keep replies of equally named models apart by server")
    shard: str | None = _key(None, "i/n: only this share of the prompts (array jobs)")
    function_timeout: float = _key(10.0, "seconds for one call of a function", gt=0)
    dry_run: bool = _key(False, "estimate requests and tokens, and send nothing")
    policy: tuple[Role, ...] = ()
    reviser: Role = Role(name="reviser")
    judge: Role = Role(name="judge")
    stronger: Role = Role(name="stronger")

    @property
    def roles(self) -> list[Role]:
        """The roles that the method uses and that have a model."""
        roles = (*self.policy, self.reviser, self.judge, self.stronger)
        return [role for role in roles if role.model and role.name in USED[self.method]]

    @property
    def functions(self) -> list[Role]:
        """The roles that the method uses and that have a function in the place of a model, in the order of calls."""
        return [role for role in (self.judge, self.reviser) if role.function and role.name in USED[self.method]]

    @property
    def responses(self) -> int:
        """The number of answers that a prompt needs."""
        return self.num_responses or max(2, len(self.policy)) if "judge" in USED[self.method] else 1

    @property
    def folder(self) -> Path:
        """The folder that this run writes to: `output_dir`, or the part of a shard in it."""
        part = "shards/{}-of-{}".format(*shard_of(self.shard)) if self.shard else ""
        return Path(self.output_dir, part)

    def scores(self, role: Role) -> bool:
        """Return whether a role is a reward model."""
        return role.name == "judge" and self.judge_protocol == "reward_model"

    def described(self) -> dict[str, Any]:
        """Return what determines the pairs, for the report: without URLs, names of variables and paths."""
        described = {"method": self.method} | self.model_dump(include=_DESCRIBED, exclude_defaults=True)
        for role in self.roles:
            values = {"model": role.public_model, "template": Path(role.template or "").name}
            values |= role.model_dump(include=_DESCRIBED_OF_ROLE)
            described |= {f"{role.name}_{name}": value for name, value in values.items() if value not in (None, {}, "")}
        if len(self.policy) > 1:
            described["policy_model"] = [role.public_model for role in self.policy]
        return described


def shard_of(text: str) -> tuple[int, int]:
    """Read "i/n". Array jobs count from 0 or from 1: n/n is the same share as 0/n."""
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text.strip())
    if not match or not int(match[2]) or int(match[1]) > int(match[2]):
        raise InputError("shard: must be i/n with i from 0 to n. Write it as 1/8.")
    return int(match[1]) % int(match[2]), int(match[2])
