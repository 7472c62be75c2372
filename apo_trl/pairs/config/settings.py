"""From a recipe's file and the flags over it to Settings that are checked before anything is asked.

Not read by the host's parser: TRL's imports torch, and whoever asks a server needs neither its seconds nor its
memory. The file and the flags look the same.
"""

import argparse
import math
import os
import re
import urllib.parse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from apo_trl.errors import InputError, nearest
from apo_trl.pairs.config.keys import (
    DEFAULTS,
    FIELDS,
    METHODS,
    PROTOCOLS,
    ROLE_FIELDS,
    ROLES,
    USED,
    Role,
    Settings,
    shard_of,
)
from apo_trl.pairs.config.values import read

__all__ = [
    "METHODS",
    "ROLES",
    "Role",
    "Settings",
    "add_arguments",
    "known_keys",
    "make_settings",
    "parse",
    "shard_of",
    "unknown_key",
]

_MANY = {"model", "base_url", "api_key_env"}  # of the policy: one for each of several servers
_LEAST = {  # the smallest value, and what goes beyond the largest
    "concurrency": 1, "max_failures": 1, "max_prompts": 1, "max_requests": 0, "max_length": 1, "num_responses": 1,
    "max_cost": 0, "judge_margin": 0, "max_edit_distance": 0, "max_length_ratio": 1, "temperature": 0, "top_p": 0,
    "max_tokens": 1, "max_retries": 0, "input_price": 0, "output_price": 0, "batch_size": 1,
}  # fmt: skip
_MOST = {"max_edit_distance": 1, "top_p": 1}
_ABOVE_0 = {"timeout", "requests_per_minute", "tokens_per_minute"}


def known_keys() -> dict[str, Any]:
    """Give every key of a recipe with its dataclass field: those of the run, then each role's after its name."""
    keys = dict(FIELDS)
    for role in ROLES:
        keys |= {f"{role}_{name}": field for name, field in ROLE_FIELDS.items()}
    return keys


def add_arguments(parser: argparse.ArgumentParser, keys: Iterable[str] | None = None) -> None:
    """Add every key as a flag, or only some."""
    known = known_keys()
    wanted = set(known if keys is None else keys)
    general = parser.add_argument_group("the run")
    groups = {
        role: parser.add_argument_group(f"{role}: {text}")
        for role, text in ROLES.items()
        if any(key.startswith(f"{role}_") for key in wanted - set(FIELDS))
    }
    for key, entry in known.items():
        if key not in wanted:
            continue
        role = key.split("_")[0] if key not in FIELDS else None
        shown = DEFAULTS[role].get(entry.name, entry.default) if role else entry.default
        default = f" (default: {shown})" if isinstance(shown, (int, float, str)) and shown not in ("", ()) else ""
        (groups[role] if role else general).add_argument(
            f"--{key}",
            nargs="?" if entry.metadata["kind"] == "bool" else "+" if _many(key, entry) else None,
            const="true" if entry.metadata["kind"] == "bool" else None,
            metavar=entry.metadata["kind"].upper(),
            default=argparse.SUPPRESS,
            help=(entry.metadata["help"] + default).strip() or None,
        )


def parse(recipe: str, flags: Mapping[str, Any], *, environment: bool = True) -> Settings:
    """Read a recipe's file and put the flags of the command line over it.

    Without `environment`, variables that hold keys need not be set: a recipe is checked elsewhere than it is run.
    """
    from apo_trl.io.resources import find_recipe, read_yaml

    return make_settings(read_yaml(find_recipe(recipe)) | dict(flags), environment=environment)


def make_settings(values: Mapping[str, Any], *, environment: bool = True) -> Settings:
    """Check the keys of a recipe, and give them as Settings. Raises InputError with the key and the remedy."""
    known = known_keys()
    for key in values:
        if key not in known:
            raise InputError(unknown_key(str(key), known))
    given = {key: read(key, known[key], value, many=_many(key, known[key])) for key, value in values.items()}
    roles: dict[str, Any] = {role: Role(role, **_of_role(role, given)) for role in ROLES if role != "policy"}
    roles["policy"] = _policies(_of_role("policy", given))
    made = Settings(**{key: value for key, value in given.items() if key in FIELDS}, **roles)
    _check(made)
    for role in made.roles:
        if environment and not made.dry_run and role.api_key_env is not None:
            _check_key(role, os.environ.get(role.api_key_env, ""))
    return made


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Say what to do about a key that is none of the known ones; its value is not repeated."""
    if re.search(r"api_?key", key, re.IGNORECASE):
        role = next((role for role in ROLES if key.startswith(f"{role}_")), "ROLE")
        return f"{key}: a key does not belong in a recipe; name its environment variable as {role}_api_key_env."
    hint = nearest(key, known) or " `apo-trl pairs build --help` shows them all."
    return f"There is no key '{key[:60]}'.{hint}"


def _many(key: str, entry: Any) -> bool:
    return entry.metadata["kind"] == "list" or (key.startswith("policy_") and entry.name in _MANY)


def _of_role(role: str, given: Mapping[str, Any]) -> dict[str, Any]:
    named = {name: f"{role}_{name}" for name in ROLE_FIELDS}
    return DEFAULTS[role] | {name: given[key] for name, key in named.items() if key in given}


def _policies(given: dict[str, Any]) -> tuple[Role, ...]:
    models = given.get("model") or [None]
    if len(models) > 1 and not all(models):
        raise InputError("policy_model: one of several is empty; name them all.")
    spread = {}
    for name in ("base_url", "api_key_env"):
        values = given.get(name) or [None]
        if len(values) not in (1, len(models)):
            raise InputError(f"policy_{name}: {len(values)} for {len(models)} models; give one, or one for each.")
        spread[name] = values * len(models) if len(values) == 1 else values
    return tuple(
        Role("policy", **given | {"model": model} | {name: values[at] for name, values in spread.items()})
        for at, model in enumerate(models)
    )


def _check(made: Settings) -> None:
    if made.method not in METHODS:
        raise InputError(
            f"method: '{made.method[:60]}' is none.{nearest(made.method, METHODS)} Take one of {', '.join(METHODS)}."
        )
    for key in ("prompts", "output_dir"):
        if not getattr(made, key):
            raise InputError(f"{key} is missing; it says {FIELDS[key].metadata['help']}.")
    if made.judge_protocol not in PROTOCOLS:
        raise InputError(
            f"judge_protocol: '{made.judge_protocol[:60]}' is none.{nearest(made.judge_protocol, PROTOCOLS)} Take one "
            f"of {', '.join(PROTOCOLS)}."
        )
    if made.judge_protocol == "reward_model" and made.judge.base_url:
        raise InputError("judge_base_url: a reward_model is run in this process; leave it out, or judge pointwise.")
    if made.shard:
        shard_of(made.shard)
    if made.max_length is not None and not made.tokenizer:
        raise InputError("max_length needs `tokenizer`, the folder or hub name of the model that will be trained.")
    if len(made.policy) > 1 and made.method != "off_policy_judge":
        raise InputError(f"policy_model: {made.method} has one policy; name one, or take off_policy_judge.")
    _check_bounds(made, "")
    if "judge" in USED[made.method] and made.responses < 2:
        raise InputError(f"num_responses: {made.responses} is too few; a judge needs at least 2 answers.")
    for name in USED[made.method] - {"policy"}:
        if not getattr(made, name).model:
            raise InputError(f"{name}_model is missing; {made.method} needs {ROLES[name]}.")
    for role in made.roles:
        _check_role(role)
    if made.max_cost is not None and not any(role.input_price or role.output_price for role in made.roles):
        raise InputError("max_cost needs prices to count with; give input_price and output_price of a role that costs.")


def _check_bounds(values: Settings | Role, prefix: str) -> None:
    for name in [*_LEAST, *_ABOVE_0]:
        value, least, most = getattr(values, name, None), _LEAST.get(name, 0), _MOST.get(name, math.inf)
        if value is None or (value > least if name in _ABOVE_0 else least <= value <= most):
            continue
        due = f"at least {least}" if most == math.inf else f"from {least} to {most}"
        raise InputError(f"{prefix}{name}: {value:g} cannot be; it must be {'above 0' if name in _ABOVE_0 else due}.")


def _check_role(role: Role) -> None:
    _check_bounds(role, f"{role.name}_")
    if role.template and role.name not in ("reviser", "judge"):
        raise InputError(f"{role.name}_template: only the reviser and the judge have one; leave it out.")
    if role.template and not Path(role.template).is_file():
        raise InputError(f"{role.name}_template: there is no file {role.template}; give the path of a Jinja file.")
    if role.system_prompt and role.name not in ("policy", "stronger"):
        raise InputError(
            f"{role.name}_system_prompt: it stands in the template; change a copy of that and give it as "
            f"{role.name}_template."
        )
    if role.api_key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", role.api_key_env):
        raise InputError(f"{role.name}_api_key_env must be the name of an environment variable, and not a key.")
    if role.base_url is not None:
        _check_url(f"{role.name}_base_url", role)


def _check_url(key: str, role: Role) -> None:
    """Refuse what is no URL, without repeating it: it may hold a secret."""
    try:
        url = urllib.parse.urlsplit(role.base_url or "")
        whole = url.scheme in ("http", "https") and url.hostname and (url.port is None or url.port > 0)
    except ValueError:  # a port that is no number, half an IPv6 address
        whole = False
    if not whole or re.search(r"\s", role.base_url or ""):
        raise InputError(f"{key} is no URL; write it as http://127.0.0.1:8000/v1.")
    if "@" in url.netloc or url.query or url.fragment:
        raise InputError(
            f"{key} holds a secret or a query; put the key into an environment variable and name that in "
            f"{role.name}_api_key_env."
        )


def _check_key(role: Role, key: str) -> None:
    # The name is not repeated: whoever writes the key itself there should not find it in a log.
    if not key.strip():
        raise InputError(f"The environment variable that {role.name}_api_key_env names is not set; export it.")
    if not re.fullmatch(r"[!-~]+", key.strip()):
        raise InputError(
            f"The environment variable that {role.name}_api_key_env names holds what no key can; export the key alone."
        )
