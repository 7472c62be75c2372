"""The keys of a pairs recipe as a hostile user writes them: every one wrong ends in one sentence that names it."""

import argparse
import json
import math
import re
import traceback

import pytest
import yaml

from apo_trl.errors import InputError
from apo_trl.io.resources import find_recipe, recipe_names
from apo_trl.pairs.config.keys import METHODS, ROLES, Settings, kind_of, shard_of
from apo_trl.pairs.config.settings import add_arguments, known_keys, make_settings, parse
from apo_trl.recipes.check import check

URL = "http://127.0.0.1:9/v1"
BASE = {
    "method": "clair", "prompts": "p.jsonl", "output_dir": "out",
    "policy_model": "p", "policy_base_url": URL, "reviser_model": "r", "reviser_base_url": URL,
}  # fmt: skip
SECRETS = ["sk-proj-0123456789", "sk_looks_like_a_name_0123456789", "hf_ABCDEFGHIJKLMNOP"]


def fault(*changes: dict, **values) -> str:
    with pytest.raises(InputError) as error:
        make_settings(BASE | dict(*changes) | values)
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith((".", "?"))
    return text


def flags(*arguments: str) -> dict:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    return vars(parser.parse_args(arguments))


WRONG = [
    ("max_prompts", True, "number"),
    ("max_prompts", math.nan, "number"),
    ("max_prompts", math.inf, "number"),
    ("max_prompts", 2.5, "must be a valid integer.*such as 8"),
    ("max_prompts", "many", "must be a valid integer.*such as 8"),
    ("max_prompts", [3], "must be a valid integer.*such as 8"),
    ("seed", None, "must be a valid integer"),
    ("seed", "null", "must be a valid integer"),
    ("max_cost", True, "number"),
    ("max_cost", math.nan, "number"),
    ("max_cost", 10**400, "number"),
    ("max_cost", "1e999", "number"),
    ("max_cost", {}, "number"),
    ("dry_run", "perhaps", "must be a valid boolean.*such as true"),
    ("dry_run", [True], "must be a valid boolean.*such as true"),
    ("prompts", ["a", "b"], "Set it to a .jsonl"),
    ("prompts", {"a": "b"}, "Set it to a .jsonl"),
    ("prompts", True, "Set it to a .jsonl"),
    ("policy_model", "\ud800", "UTF-8"),
    ("reviser_model", 4, "must be a valid string, got 4.*such as 'text'"),
    ("reviser_model", 1.1, "must be a valid string"),
    ("reviser_model", ["a"], "must be a valid string"),
    ("eval_sets", [["a"]], "must be a valid string"),
    ("eval_sets", None, "must be a valid list.*such as"),
    ("eval_sets", "one.jsonl", "must be a valid list.*such as"),
    ("policy_extra_body", "min_p", "such as {min_p: 0.05}"),
    ("policy_extra_body", [1], "such as {min_p: 0.05}"),
    ("policy_extra_body", {"a": math.nan}, "such as {min_p: 0.05}"),
    ("policy_extra_body", '{"a": NaN}', "such as {min_p: 0.05}"),
    ("policy_extra_body", yaml.safe_load("a: 2024-01-01"), "such as {min_p: 0.05}"),
    ("policy_extra_body", yaml.safe_load("&a {x: *a}"), "such as {min_p: 0.05}"),
    ("policy_extra_body", "[" * 100_000, "such as {min_p: 0.05}"),
    ("policy_extra_body", {"messages": []}, "'messages'.*Leave it out"),
    ("policy_extra_body", {"stream": True}, "'stream'.*Leave it out"),
    ("policy_extra_body", {"n": 4}, "'n'.*set its own key"),
    ("policy_extra_body", {"max_tokens": "x"}, "'max_tokens'.*set its own key"),
    ("method", "clare", "Set it to one of clair, on_policy_judge"),
    ("judge_protocol", "pairwize", "Set it to pairwise .*pointwise"),
    ("prompts", "", "not set"),
    ("output_dir", "", "not set"),
    ("reviser_model", None, "required by clair"),
    ("shard", "4", "i/n"),
    ("max_length", 10, "tokenizer"),
    ("concurrency", 0, "greater than or equal to 1"),
    ("max_failures", 0, "greater than or equal to 1"),
    ("max_prompts", -1, "greater than"),
    ("max_requests", -1, "greater than"),
    ("num_responses", 0, "greater than"),
    ("max_cost", -1, "greater than or equal to 0"),
    ("max_cost", 5, "Set input_price"),
    ("judge_margin", -1, "greater than or equal to 0"),
    ("max_edit_distance", 1.1, "less than or equal to 1"),
    ("max_length_ratio", 0.5, "greater than or equal to 1"),
    ("policy_temperature", -0.1, "greater than or equal to 0"),
    ("policy_top_p", 1.5, "less than or equal to 1"),
    ("policy_max_tokens", 0, "greater than or equal to 1"),
    ("reviser_max_retries", -1, "greater than"),
    ("reviser_batch_size", 0, "greater than"),
    ("reviser_timeout", 0, "greater than 0, got 0"),
    ("policy_requests_per_minute", 0, "greater than 0, got 0"),
    ("policy_tokens_per_minute", -5, "greater than"),
    ("policy_input_price", -5, "greater than"),
    ("reviser_template", "no/such.jinja", "file not found"),
    ("policy_template", "no/such.jinja", "Did you mean"),
    ("reviser_system_prompt", "Be good.", "unknown key"),
    ("policy_base_url", "", "empty. Set null .*in this process"),
    ("policy_base_url", " ", "empty. Set null"),
    ("reviser_base_url", "127.0.0.1:8000/v1", "must start with http://.*null"),
    ("reviser_base_url", "localhost", "must start with http://"),
    ("reviser_base_url", "http://127.0.0.1:8000/v1/chat/completions", "must end before /chat/completions"),
    ("reviser_base_url", "http://127.0.0.1:8000/v1/completions/", "must end before /chat/completions"),
    ("reviser_base_url", "http://host/v1?a=b", "invalid URL.*without a query"),
    ("policy_model", ["a", "b"], "off_policy_judge"),
    ("policy_base_url", [URL, URL], "2 values for 1 models"),
    ("polcy_model", "x", "Did you mean 'policy_model'"),
    ("zzz", "x", "unknown key"),
    (3, "x", "unknown key"),
    ("policy", "x", "unknown key"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "words"), WRONG, ids=lambda part: str(part)[:40])
def test_a_wrong_value_is_named_with_its_remedy(key, value, words):
    assert re.match(f"{key}: .*{words}", fault({key: value}))
    make_settings(BASE)  # which is right without it


def test_a_judge_needs_two_answers_and_a_reward_model_no_url():
    judge = {"method": "on_policy_judge", "judge_model": "j"}
    assert "num_responses: must be >= 2" in fault(**judge, num_responses=1)
    assert "num_responses: must be >= 2" in fault(**judge | {"method": "judge_then_clair"}, num_responses=1)
    assert re.match("judge_base_url: .*Leave it out", fault(**judge, judge_protocol="reward_model", judge_base_url=URL))
    assert make_settings(BASE | judge).responses == 2
    stronger = {"method": "stronger_preferred", "stronger_model": "p", "stronger_base_url": "http://127.0.0.1:2/v1"}
    assert re.match("policy_model: duplicate .* cache_by_url: true", fault(**stronger))
    assert make_settings(BASE | stronger | {"cache_by_url": True})
    assert make_settings(BASE | stronger | {"stronger_base_url": f"{URL}/"})
    several = {"method": "off_policy_judge", "policy_model": ["a", "b", "c"], "judge_model": "j"}
    made = make_settings(BASE | several)
    assert made.responses == 3
    assert [(role.model, role.base_url) for role in made.policy] == [("a", URL), ("b", URL), ("c", URL)]
    assert re.match("policy_model: .*Correct", fault(**several | {"policy_model": ["a", None]}))
    assert "policy_base_url: 2 values for 3 models" in fault(**several, policy_base_url=[URL, URL])
    assert "policy_api_key_env: 2 values for 3 models" in fault(**several, policy_api_key_env=["A", "B"])


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize(
    "wrap", [str, lambda s: [s], lambda s: {"key": s}, lambda s: [s, s]], ids=["", "[]", "{}", "2"]
)
@pytest.mark.parametrize("role", ["policy", "reviser"])
def test_a_key_in_the_place_of_its_variables_name_is_never_repeated(secret, wrap, role, monkeypatch):
    text = fault(**{f"{role}_api_key_env": wrap(secret)})
    assert secret not in text
    assert f"{role}_api_key_env" in text


@pytest.mark.parametrize("secret", SECRETS)
def test_a_key_anywhere_else_is_never_repeated(secret):
    places = [
        "policy_api_key", "reviser_api_key", "api_key", "openai_api_key", "OPENAI_API_KEY", "policy_apikey",
        "policy_api_keys",
    ]  # fmt: skip
    for key in places:
        text = fault(**{key: secret})
        assert secret not in text
        assert re.search(r"set (policy|reviser|ROLE)_api_key_env", text), text
    for body in ({"api_key": secret}, {"Authorization": secret}, f'{{"x-api-key": "{secret}"}}', secret):
        text = fault(policy_extra_body=body)
        assert text.startswith("policy_extra_body: ")
        assert secret not in text
    for url in (
        f"http://user:{secret}@host/v1", f"http://{secret}@host/v1", f"http://host/v1?key={secret}",
        f"http://host/v1#{secret}", f"http://host:{secret}/v1", f"http://[{secret}/v1", f"{secret}", f"ftp://{secret}",
        f"http://host/v1 {secret}", "http:///v1", "http://host:port/v1", "host:8000/v1", "", [f"http://{secret}", "x"],
    ):  # fmt: skip
        text = fault(reviser_base_url=url)
        assert secret not in text, url
        assert text.startswith("reviser_base_url"), url


@pytest.mark.parametrize("wrap", [str, lambda s: [s, s], lambda s: {"key": s}], ids=["", "[]", "{}"])
def test_no_message_of_any_key_repeats_a_string(wrap):
    messages = []
    for key in known_keys():
        try:
            make_settings(BASE | {key: wrap(SECRETS[0])}, environment=False)
        except InputError as error:
            messages.append("".join(traceback.format_exception(error)))  # with pydantic's own message, if chained
    assert len(messages) >= 50
    assert not any(SECRETS[0] in message for message in messages)


def test_a_variable_must_be_set_and_hold_a_key_alone(monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    named = {"reviser_api_key_env": "MY_KEY"}
    assert "Export it." in fault(**named)
    make_settings(BASE | named, environment=False)
    make_settings(BASE | named | {"dry_run": True})  # nothing is sent
    make_settings(BASE | named | {"method": "stronger_preferred", "stronger_model": "s"})  # not asked
    for value in ("", "  ", "two words", "line\nbreak", "schl\u00fcssel"):
        monkeypatch.setenv("MY_KEY", value)
        text = fault(**named)
        assert "reviser_api_key_env" in text
        assert not value.strip() or value not in text
    monkeypatch.setenv("MY_KEY", " sk-1\n")  # as `export MY_KEY="$(cat file; echo)"` would
    assert make_settings(BASE | named).reviser.api_key == "sk-1"
    assert make_settings(BASE).reviser.api_key == "none"


@pytest.mark.parametrize(
    ("text", "share"), [("0/4", (0, 4)), ("4/4", (0, 4)), ("1/4", (1, 4)), (" 3/4 ", (3, 4)), ("1/1", (0, 1))]
)
def test_shares_count_from_zero_or_from_one(text, share):
    assert shard_of(text) == share
    assert make_settings(BASE | {"shard": text}).folder.as_posix() == f"out/shards/{share[0]}-of-{share[1]}"


@pytest.mark.parametrize(
    "text", ["5/4", "x", "1/0", "0/0", "-1/4", "1", "1/4/2", "1.0/4", "1/" + "9" * 5000, "٣/٤", "/"]
)
def test_an_invalid_share_is_refused(text):
    assert re.match(r"shard: must be i/n", fault(shard=text))


def test_null_leaves_out_what_a_server_refuses_and_text_is_read_as_yaml_is():
    made = make_settings(BASE | {"policy_temperature": "null", "policy_max_tokens": None, "policy_extra_body": None})
    assert (made.policy[0].temperature, made.policy[0].max_tokens, made.policy[0].extra_body) == (None, None, {})
    for word in (None, "null", "none", "None", "NULL", " none "):
        assert make_settings(BASE | {"policy_base_url": word}).policy[0].base_url is None
    made = make_settings(BASE | {"seed": str(2**53 + 1), "policy_top_p": "0.5", "reviser_model": "4"})
    assert (made.seed, made.policy[0].top_p, made.reviser.model) == (2**53 + 1, 0.5, "4")


SAMPLES = {
    "int": ("7", 7),
    "float": ("0.5", 0.5),
    "bool": ("true", True),
    "list": ("a", ["a"]),
    "str": ("text", "text"),
}
SPECIAL = {
    "method": "judge_then_clair", "judge_protocol": "pointwise", "shard": "1/2", "max_length_ratio": "1.5",
    "policy_base_url": URL, "reviser_base_url": URL, "judge_base_url": URL, "stronger_base_url": URL,
}  # fmt: skip


def test_every_key_has_a_flag_that_lands_in_settings(tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("x")
    keys = known_keys()
    assert len(keys) == 22 + 4 * 19 - 6
    seen = 0
    needed = {f"{role}_{name}": value for role in ROLES for name, value in (("model", "m"), ("base_url", URL))}
    for key, entry in keys.items():
        kind = kind_of(entry).lower()
        text, value = SAMPLES.get(kind, ('{"min_p": 0.05}', {"min_p": 0.05}))
        if key in SPECIAL:
            text = value = SPECIAL[key]
            value = float(value) if kind == "float" else value
        elif key.endswith("_template"):
            text = value = str(template)
        base = BASE | needed | {"tokenizer": "t", "policy_input_price": 1}
        base |= {"method": "stronger_preferred"} if key.startswith("stronger_") else {"method": "judge_then_clair"}
        if key.endswith("_function"):
            base |= dict.fromkeys(key.replace("function", other) for other in ("model", "base_url"))
        given = flags(f"--{key}", text)
        assert set(given) == {key}
        made = make_settings(base | given, environment=False)
        if key in Settings.model_fields:
            found = getattr(made, key)
        else:
            role, name = key.split("_", 1)
            found = getattr(made.policy[0] if role == "policy" else getattr(made, role), name)
        assert found == value, key
        assert type(found) is type(value), key
        # The file says the same in its own words.
        told = make_settings(base | {key: yaml.safe_load(json.dumps(value))}, environment=False)
        assert told.described() == made.described()
        seen += 1
    assert seen == 92


def test_flags_win_over_the_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(BASE | {"seed": 1, "policy_temperature": 0.3, "dry_run": False}))
    given = flags("--seed", "2", "--dry_run", "--policy_extra_body", '{"min_p": 0.05}', "--policy_temperature", "null")
    made = parse(str(file), given)
    assert (made.seed, made.dry_run, made.policy[0].temperature) == (2, True, None)
    assert made.policy[0].extra_body == {"min_p": 0.05}
    assert parse(str(file), flags("--dry_run", "false")).dry_run is False
    assert parse(str(file), flags("--dry_run", "True")).dry_run is True
    more = flags("--method", "off_policy_judge", "--policy_model", "a", "b", "--judge_model", "j")
    assert [role.model for role in parse(str(file), more).policy] == ["a", "b"]
    file.write_text("- a list")
    with pytest.raises(InputError, match="must have `key: value` lines"):
        parse(str(file), {})
    with pytest.raises(InputError, match="Did you mean 'pairs/clair'"):
        parse("pairs/clare", {})


def test_roles_are_told_apart_by_identity():
    first, second = make_settings(
        BASE | {"method": "off_policy_judge", "policy_model": ["a", "b"], "judge_model": "j"}
    ).policy
    assert first != second
    assert len({first: 1, second: 2}) == 2


def test_the_help_shows_defaults_that_are_zero(capsys):
    parser = argparse.ArgumentParser(prog="x")
    add_arguments(parser)
    text = " ".join(parser.format_help().split())
    for words in ("of sampling (default: 0)", "--ROLE_temperature FLOAT of sampling; null leaves it out (default: 0.7, "
                  "policy 1, judge 0)", "--ROLE_timeout FLOAT seconds without a byte that end a try (default: 600)",
                  "(default: pairwise)"):  # fmt: skip
        assert words in text


def test_packaged_recipes_parse_and_are_ok():
    names = recipe_names("pairs")
    assert len(names) == 7
    assert {parse(name, {}, environment=False).method for name in names} == set(METHODS)
    for name in names:
        assert check(name) == []


def test_a_broken_recipe_is_an_error_of_check(tmp_path):
    text = find_recipe("pairs/clair").read_text()
    for change, words in [
        ("polcy_seed: 1", "Did you mean 'policy_"), ("seed: x", "seed: must be"),
        ("reviser_template: no", "reviser_template"),
        (f"policy_api_key: {SECRETS[0]}", "policy_api_key_env"), ("concurrency: 0", "concurrency: must be"),
    ]:  # fmt: skip
        file = tmp_path / "broken.yaml"
        file.write_text(text + change + "\n")
        (finding,) = check(str(file))
        assert finding.level == "error"
        assert words in finding.text
        assert SECRETS[0] not in finding.text


def test_what_is_described_can_be_shown_to_anyone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    template, model = tmp_path / "private" / "mine.jinja", tmp_path / "private" / "checkpoint-5"
    model.mkdir(parents=True)
    template.write_text("{{ answer }}")
    made = make_settings(
        BASE
        | {"method": "off_policy_judge", "policy_model": [str(model), "org/b", "private/checkpoint-5/"], "seed": 3,
           "policy_base_url": ["http://secret.host/v1", "http://secret.host/v1", None], "judge_model": "~/judges/j",
           "judge_base_url": "https://secret.host/v1", "judge_api_key_env": "SECRET_NAME", "eval_sets": ["private/e"],
           "judge_template": str(template), "policy_api_key_env": "SECRET_NAME", "policy_extra_body": {"min_p": 0.1},
           "tokenizer": str(model), "max_length": 5, "prompts": str(tmp_path / "p.jsonl")},
        environment=False,
    )  # fmt: skip
    shown = made.described()
    assert shown == {
        "method": "off_policy_judge", "seed": 3, "policy_model": ["checkpoint-5", "org/b", "checkpoint-5"],
        "policy_temperature": 1.0, "policy_max_tokens": 1024, "policy_extra_body": {"min_p": 0.1}, "judge_model": "j",
        "judge_temperature": 0.0, "judge_max_tokens": 1024, "judge_template": "mine.jinja",
    }  # fmt: skip
    text = json.dumps(shown)
    for word in ("secret", "SECRET", "private", str(tmp_path), "http", "~"):
        assert word not in text
