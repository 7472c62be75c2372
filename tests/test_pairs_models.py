"""Building pairs with models that are really run: in this process, and behind `transformers serve`."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from chat_server import ChatServer
from conftest import make_model, make_tokenizer
from test_pairs_build import answer, numbered, pairs, prompts, text  # noqa: F401  (a fixture among them)

from apo_trl.pairs.build import build
from apo_trl.pairs.config.settings import make_settings


@pytest.mark.slow
def test_a_policy_in_this_process_and_training_on_what_it_made(prompts, train, model_dir, tmp_path):  # noqa: F811
    from apo_trl.io.readers import load_dataset

    recipe = {
        "method": "clair", "prompts": prompts(numbered(12)), "output_dir": str(tmp_path / "pairs"),
        # So hot that each of the 260 tokens, the end token among them, is about as likely as any other.
        "policy_model": str(model_dir), "policy_max_tokens": 400, "policy_temperature": 100.0, "policy_batch_size": 4,
        "reviser_model": "reviser", "max_edit_distance": 1.0,
    }  # fmt: skip
    with ChatServer(answer) as server:
        report = build(make_settings(recipe | {"reviser_base_url": server.url})).report
        before = server.count
        again = build(make_settings(recipe | {"reviser_base_url": server.url})).report
        assert server.count == before
    assert report["asked"] == 12 == report["kept"] + sum(report["dropped"].values())
    assert report["kept"] >= 4, report["dropped"]
    assert set(report["dropped"]) <= {"policy_truncated", "policy_empty"}
    assert report["roles"]["policy"]["requests"] == 12
    assert again == report
    rows = pairs(tmp_path / "pairs")
    assert len({text(row["rejected"]) for row in rows}) == len(rows), "every row draws its own sample"

    dataset = load_dataset(str(tmp_path / "pairs"), split="train")
    assert dataset["id"] == [row["id"] for row in rows]
    trainer = train(data=dataset, steps=1)
    assert len(trainer.train_dataset) == len(rows)


@pytest.mark.slow
def test_the_seed_decides_what_a_policy_in_this_process_says(prompts, model_dir, tmp_path):  # noqa: F811
    def run(name, **more):
        recipe = {
            "method": "stronger_preferred", "prompts": prompts(numbered(3)), "output_dir": str(tmp_path / name),
            "policy_model": str(model_dir), "policy_max_tokens": 400, "policy_temperature": 100.0,
            "stronger_model": "s",
        }  # fmt: skip
        with ChatServer(answer) as server:
            build(make_settings(recipe | {"stronger_base_url": server.url} | more))
        return [text(row["rejected"]) for row in pairs(tmp_path / name)]

    one = run("one")
    assert one
    assert one == run("same", policy_batch_size=1)
    assert one != run("other", seed=1)


def test_a_reward_model_ranks_without_any_server(prompts, tmp_path):  # noqa: F811
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(**make_model().config.to_dict() | {"num_labels": 1})
    model = LlamaForSequenceClassification(config)
    model.save_pretrained(tmp_path / "reward")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "reward")
    rows = [{"id": str(i), "prompt": f"Which {i}?", "responses": [f"one {i}", f"two {i}", "three"]} for i in range(5)]
    recipe = {
        "method": "on_policy_judge", "judge_protocol": "reward_model", "judge_model": str(tmp_path / "reward"),
        "judge_margin": 0.0, "prompts": prompts(rows), "output_dir": str(tmp_path / "out"),
    }  # fmt: skip
    report = build(make_settings(recipe)).report
    assert report["kept"] == 5
    assert report["judge"] == {"scores": 15, "invalid": 0}

    template = tokenizer.chat_template
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + template
    )
    tokenizer.save_pretrained(tmp_path / "reward")
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which?"}]
    again = build(make_settings(recipe | {"prompts": prompts([*rows, rows[0] | {"id": "s", "prompt": system}])})).report
    assert (again["kept"], again["dropped"]) == (5, {"judge_error": 1})

    def score(row, reply):
        chat = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": reply}]
        ids = tokenizer.apply_chat_template(chat, return_dict=True, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            return float(model(ids).logits)

    for row, pair in zip(rows, pairs(tmp_path / "out"), strict=True):
        best, worst = (choose(row["responses"], key=lambda reply: score(row, reply)) for choose in (max, min))
        assert (text(pair["chosen"]), text(pair["rejected"])) == (best, worst)
        assert pair["margin"] == pytest.approx(score(row, best) - score(row, worst), abs=1e-5)


def test_a_model_that_cannot_be_loaded_stops_the_run_in_one_sentence(prompts, tmp_path, capfd):  # noqa: F811
    from apo_trl.cli import main as cli

    (tmp_path / "recipe.yaml").write_text(
        json.dumps(
            {
                "method": "clair",
                "prompts": prompts(numbered(50)),
                "output_dir": str(tmp_path / "out"),
                "policy_model": str(tmp_path / "nothing"),
                "reviser_model": "r",
                "reviser_base_url": "http://127.0.0.1:9/v1",
            }
        )
    )
    with pytest.raises(SystemExit) as stop:
        cli.main(["pairs", "build", str(tmp_path / "recipe.yaml")])
    assert stop.value.code == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert str(tmp_path / "nothing") in line


@pytest.fixture
def served(tmp_path):
    """SmolLM2 behind `transformers serve`: the name of the model there, and the URL."""
    from apo_trl.models.packaged import smollm2

    model = smollm2()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path / "serve.log").open("w")
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / "transformers"), "serve", str(model), "--host", "127.0.0.1", "--port",
         str(port), "--device", "cpu"],
        stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "serve.log").read_text()[-2000:]
                time.sleep(0.5)
        yield str(model), f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(timeout=30)
        log.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_real_server_from_prompts_to_training(served, prompts, tmp_path):  # noqa: F811
    """Two samples of SmolLM2 at different temperatures make a pair; it then tries to revise them."""
    model, url = served
    rows = [
        *(
            {"id": thing, "prompt": f"Describe {thing} in one short sentence."}
            for thing in ("snow", "tea", "a cat", "iron")
        ),
        {"id": "day", "prompt": [{"role": "system", "content": "Be very brief."}, {"role": "user", "content": "Hi!"}]},
    ]
    recipe = {
        "method": "stronger_preferred", "prompts": prompts(rows), "output_dir": str(tmp_path / "pairs"),
        "policy_base_url": url, "policy_model": model, "policy_max_tokens": 64, "policy_temperature": 1.3,
            # Left alone, this server takes every temperature and answers greedily.
            "policy_extra_body": {"generation_config": json.dumps({"do_sample": True, "eos_token_id": 2})},
        "stronger_base_url": url, "stronger_model": model, "stronger_max_tokens": 64, "stronger_temperature": 0.0,
        "concurrency": 2,
    }  # fmt: skip
    report = build(make_settings(recipe)).report
    assert report["asked"] == 5 == report["kept"] + sum(report["dropped"].values())
    assert set(report["dropped"]) <= {"policy_truncated", "stronger_truncated", "identical"}
    assert report["roles"]["policy"]["prompt_tokens"] > 50
    (honours,) = {found for place, found in report["servers"].items() if place.startswith("policy")}
    assert "ignores n" in honours
    assert report["kept"] >= 1, report["dropped"]

    clair = {key: value for key, value in recipe.items() if not key.startswith("stronger_")} | {
        "method": "clair", "reviser_base_url": url, "reviser_model": model, "reviser_max_tokens": 96,
    }  # fmt: skip
    revised = build(make_settings(clair)).report
    assert revised["roles"]["policy"] == report["roles"]["policy"], "the policy's answers are not sampled again"
    assert revised["asked"] == 5 == revised["kept"] + sum(revised["dropped"].values())

    build(make_settings(recipe))
    done = subprocess.run(
        [sys.executable, "-m", "apo_trl.cli.main", "train", "smollm2-135m/apo_zero_lora", "--model_name_or_path", model,
         "--dataset_name", str(tmp_path / "pairs"), "--output_dir", str(tmp_path / "out"), "--max_steps", "1",
         "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1", "--use_cpu", "--bf16", "false",
         "--eval_strategy", "no", "--report_to", "none", "--num_processes", "1"],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert list((tmp_path / "out").glob("adapter_model.safetensors"))


def test_requests_in_this_process_wait_together_for_one_batch():
    import asyncio
    from types import SimpleNamespace

    from apo_trl.pairs.llm.backends import InProcess
    from apo_trl.pairs.llm.requests import RequestFailed

    batches = []

    def generate(bodies):
        batches.append(list(bodies))
        return [{"error": {"message": "too long"}} if body == "bad" else {"choices": body} for body in bodies]

    async def main():
        keys = {"method": "clair", "prompts": "p", "output_dir": "o", "policy_batch_size": 3, "reviser_model": "r"}
        settings = make_settings(keys)
        role = settings.policy[0]
        backend = InProcess(role, settings)
        backend._model = SimpleNamespace(answer=generate)
        bodies = ["a", "b", "bad", "c", "d"]
        answers = await asyncio.gather(*(backend.complete(role, body) for body in bodies), return_exceptions=True)
        alone = await backend.complete(role, "e")
        await backend.close()
        return [*answers, alone]

    a, b, bad, *rest = asyncio.run(main())
    assert [a, b, *rest] == [{"choices": body} for body in "abcde"]
    assert isinstance(bad, RequestFailed)
    assert bad.message == "too long"
    assert batches == [["a", "b", "bad"], ["c", "d"], ["e"]]
