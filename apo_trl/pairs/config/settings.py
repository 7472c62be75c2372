"""Read and check a pairs recipe and the command line, without TRL's parser, which imports torch."""

import argparse
import os
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from apo_trl.errors import InputError, nearest
from apo_trl.io.resources import find_recipe, read_yaml
from apo_trl.pairs.config.keys import DEFAULTS, METHODS, ROLES, USED, Role, Settings, kind_of, shard_of

__all__ = ["METHODS", "Role", "Settings", "add_arguments", "known_keys", "make_settings", "parse", "unknown_key"]

_MANY = ("model", "base_url", "api_key_env")  # of the policy: one for each of several models
_NO_KEY = re.compile(".*_name|(policy|stronger)_(template|function)|(reviser|judge)_system_prompt")
_EITHER = {"model": "function", "base_url": "function", "function": "(model|base_url|template)"}
_RESERVED = ("model", "temperature", "top_p", "max_tokens", "n", "seed", "messages", "stream")  # written by the run
_SECRET = re.compile(r"api.?key|secret|password|authorization", re.IGNORECASE)
_URL = re.compile(r"https?://(\[[0-9A-Fa-f:.]+\]|[^\s/?#@:\[\]]+)(:[0-9]{1,5})?(/[^\s?#]*)?")
_USE_VARIABLE = "Put it into an environment variable, and set ROLE_api_key_env (as policy_api_key_env) to its name."
_GROUPS = {  # of the help; other keys of the run are under "prompts and sampling"
    "judge": ("judge_protocol", "judge_margin"),
    "reviser": ("max_edit_distance", "max_length_ratio"),
    "limits": ("concurrency", "max_requests", "max_cost", "max_failures", "function_timeout"),
    "output": ("output_dir", "tokenizer", "max_length", "eval_sets", "cache_by_url", "shard", "dry_run"),
}
_URL_EXAMPLE = "http://127.0.0.1:8000/v1"
_EXAMPLES = {"INT": 8, "FLOAT": 1.0, "BOOL": "true", "STR": "'text'", "LIST": "[one, two]", "MAP": "{min_p: 0.05}"}


def known_keys() -> dict[str, FieldInfo]:
    """Return every key of a recipe with its pydantic field: those of the run, then each role's after its name."""
    keys = {name: field for name, field in Settings.model_fields.items() if name not in ROLES}
    of_roles = {f"{role}_{name}": field for role in ROLES for name, field in Role.model_fields.items()}
    return keys | {key: field for key, field in of_roles.items() if not _NO_KEY.fullmatch(key)}


def add_arguments(parser: argparse.ArgumentParser, keys: Container[str] | None = None) -> None:
    """Add every key as a flag, or only `keys`. The help shows what several roles have once, as `--ROLE_model`."""
    fields = {key: field for key, field in known_keys().items() if keys is None or key in keys}
    groups = {title: parser.add_argument_group(title) for title in ("prompts and sampling", "models", *_GROUPS)}
    roles = [role for role in ROLES if f"{role}_max_tokens" in fields]
    lines = "\n".join(f"  {role:<8}  {ROLES[role]}" for role in roles)
    groups["models"].description = f"ROLE is one of\n{lines}" if len(roles) > 1 else None
    for key in (key for key in Settings.model_fields if key in fields):
        title = next((title for title, part in _GROUPS.items() if key in part), "prompts and sampling")
        _add_argument(groups[title], key, fields[key], _help(fields[key]))
    for name, field in Role.model_fields.items():
        same = [role for role in roles if f"{role}_{name}" in fields]
        for role in ["ROLE", *same] if len(same) > 1 else same:
            help = argparse.SUPPRESS if role != "ROLE" and len(same) > 1 else _help(field, name, same)
            _add_argument(groups["models"], f"{role}_{name}", field, help, many=role == "policy" and name in _MANY)


def _add_argument(group: Any, key: str, field: FieldInfo, help: str, many: bool = False) -> None:
    kind = kind_of(field)
    values = {"nargs": "?", "const": "true"} if kind == "BOOL" else {"nargs": "+"} if many or kind == "LIST" else {}
    group.add_argument(f"--{key}", metavar=kind, default=argparse.SUPPRESS, help=help, **values)


def _help(field: FieldInfo, name: str = "", roles: Sequence[str] = ("",)) -> str:
    """Return a key's description with its default, and with those of roles that have another."""
    own = [f"{role} {DEFAULTS[role][name]}" for role in roles if name in DEFAULTS.get(role, {})]
    if len(own) < len(roles) and isinstance(field.default, (int, float, str)) and field.default is not False:
        own.insert(0, str(field.default).removesuffix(".0"))
    return f"{field.description} (default: {', '.join(own)})" if own else str(field.description)


def parse(recipe: str, flags: Mapping[str, Any], *, environment: bool = True) -> Settings:
    """Read and check a recipe, a file or a packaged name, with `flags` in place of its values.

    A reviser or judge among the flags replaces the recipe's, also a function a model, or a model a function.
    """
    values = read_yaml(find_recipe(recipe))
    given = [(role, name) for role in ("reviser", "judge") for name in _EITHER if f"{role}_{name}" in flags]
    others = "|".join(f"{role}_{_EITHER[name]}" for role, name in given) or "-"
    replaced = {key for key in values if re.fullmatch(others, str(key))}
    if "judge_function" in replaced | flags.keys():
        replaced.add("judge_protocol")
    kept = {key: value for key, value in values.items() if key not in replaced}
    return make_settings(kept | dict(flags), environment=environment)


def make_settings(values: Mapping[str, Any], *, environment: bool = True) -> Settings:
    """Check the keys and values of a recipe, and with `environment` also the variables that hold keys."""
    known = known_keys()
    if unknown := [str(key) for key in values if key not in known]:
        raise InputError(unknown_key(unknown[0], known))
    roles: dict[str, Any] = {}
    for role in ROLES:
        fields = {"name": role, **DEFAULTS.get(role, {})}
        fields |= {name: values[key] for name in Role.model_fields if (key := f"{role}_{name}") in values}
        roles[role] = _policies(fields) if role == "policy" else _validated(Role, fields, f"{role}_")
    of_function = {"judge_protocol": "function", "judge_margin": 0.0} if roles["judge"].function else {}
    settings: Settings = _validated(Settings, of_function | dict(values) | roles)
    _check(settings)
    for model in settings.roles:
        _check_role(model, environment and not settings.dry_run)
    return settings


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Return the message for an unknown key, without its value."""
    if _SECRET.search(key):
        return f"{key}: a key does not belong in a recipe. {_USE_VARIABLE}"
    return f"{key[:60]}: unknown key.{nearest(key, known) or ' `apo-trl pairs build --help` lists all.'}"


def _validated(model: type[BaseModel], values: Mapping[str, Any], prefix: str = "") -> Any:
    try:
        return model.model_validate(values)
    except ValidationError as invalid:
        error: Mapping[str, Any] = invalid.errors(include_url=False)[0]
    name, value = str(error["loc"][0]), error["input"]
    field = model.model_fields[name]
    if field.is_required() or error["type"] == "literal_error":
        problem = f"not set, or invalid. Set it to {field.description}."
    else:
        shown = f", got {str(value)[:20]}" if isinstance(value, (int, float)) else ""
        problem = re.sub("^Input should|^Value error, must", "must", error["msg"])
        problem = f"{problem}{shown}. Set a value such as {_EXAMPLES[kind_of(field)]}."
    raise InputError(f"{prefix}{name}: {problem}")  # not chained: the cause would repeat the value


def _policies(fields: dict[str, Any]) -> tuple[Role, ...]:
    lists = {name: fields[name] for name in _MANY if fields.get(name) and isinstance(fields[name], list)}
    count = len(lists.get("model", "-"))
    for name, values in lists.items():
        if len(values) not in (1, count):
            raise InputError(f"policy_{name}: {len(values)} values for {count} models. Set one, or one for each.")
    each = [{name: (values * count)[index] for name, values in lists.items()} for index in range(count)]
    return tuple(_validated(Role, fields | own, "policy_") for own in each)


def _check(settings: Settings) -> None:
    method, policies = settings.method, settings.policy
    if settings.judge_protocol == "reward_model" and settings.judge.base_url:
        raise InputError("judge_base_url: not supported for a reward_model, which runs in this process. Leave it out.")
    if settings.shard:
        shard_of(settings.shard)
    if settings.max_length is not None and not settings.tokenizer:
        raise InputError("max_length: needs `tokenizer`. Set it to the folder or hub name of the model to be trained.")
    if len(policies) > 1 and not (method == "off_policy_judge" and all(role.model for role in policies)):
        raise InputError("policy_model: must be one name, or, for off_policy_judge only, several. Correct the list.")
    answering = [role for role in settings.roles if role.name in ("policy", "stronger")]  # the same prompts
    places = {(role.model, (role.base_url or "").rstrip("/")) for role in answering}
    shared = not settings.cache_by_url and len({model for model, _ in places}) < len(places)
    if shared or len({(role.model, role.base_url) for role in policies}) < len(policies):
        raise InputError(
            "policy_model: duplicate name. Set each once (num_responses is the number of answers), or, if servers have "
            "different models of one name, cache_by_url: true."
        )
    if "judge" in USED[method] and settings.responses < 2:
        raise InputError(f"num_responses: must be >= 2 for a judge, got {settings.responses}. Set 2 or more.")
    for role in (settings.reviser, settings.judge):
        for other in ("model", "base_url", "template"):
            if role.function and getattr(role, other):
                raise InputError(f"{role.name}_function: conflict with {role.name}_{other}. Unset one of them.")
    if "judge" in USED[method] and bool(settings.judge.function) != (settings.judge_protocol == "function"):
        raise InputError(
            f"judge_function: requires judge_protocol function, got {settings.judge_protocol}, and vice versa. Set "
            "judge_function alone."
        )
    for name in USED[method] - {"policy"}:
        if not (getattr(settings, name).model or getattr(settings, name).function):
            instead = f", or set {name}_function" if name in ("reviser", "judge") else ""
            raise InputError(f"{name}_model: required by {method}, not set. Name {ROLES[name]}{instead}.")
    if settings.max_cost is not None and not any(role.input_price or role.output_price for role in settings.roles):
        raise InputError("max_cost: needs prices. Set input_price and output_price of a role.")


def _check_role(role: Role, environment: bool) -> None:
    for name in role.extra_body:
        if name in _RESERVED:
            raise InputError(f"{role.name}_extra_body: '{name}' is set by the run. Leave it out, or set its own key.")
        if _SECRET.search(name):
            raise InputError(f"{role.name}_extra_body: '{name}' looks like a key. {_USE_VARIABLE}")
    if role.template and not Path(role.template).is_file():
        raise InputError(f"{role.name}_template: file not found. Set the path of a Jinja file.")
    if role.api_key_env is not None:
        key = os.getenv(role.api_key_env, "").strip() if environment else "unknown"
        if not role.api_key_env.isidentifier() or not re.fullmatch("[!-~]+", key):  # not repeated: it may be the key
            raise InputError(f"{role.name}_api_key_env: must name a variable that is set to a key alone. Export it.")
    if role.base_url is not None:
        _check_url(f"{role.name}_base_url", role.base_url)


def _check_url(key: str, url: str) -> None:  # whose value is not repeated: it may hold a key
    if not url.strip():
        raise InputError(f"{key}: empty. Set null to load the model in this process, or a URL as {_URL_EXAMPLE}.")
    if "://" not in url:
        raise InputError(
            f"{key}: must start with http:// or https://. Write it as {_URL_EXAMPLE}; null: in this process."
        )
    if re.search(r"/(?:chat/)?completions/?$", url):
        raise InputError(f"{key}: must end before /chat/completions, which is added. Write it as {_URL_EXAMPLE}.")
    if not _URL.fullmatch(url):
        raise InputError(f"{key}: invalid URL. Write it as {_URL_EXAMPLE}, without a query. For a key: {_USE_VARIABLE}")
