"""Does the model answer better? The paper's comparison with verifiers in the place of a judge: docs/answers.md.

    python docs/answers.py                       every run that is not stored yet, then figures and tables
    python docs/answers.py --draw                figures and tables from docs/evidence/answers.json alone
    python docs/answers.py --fresh               forget what is stored, and do all of it anew
    python docs/answers.py --only instructions   the runs whose name contains the text

SmolLM2-135M-Instruct on two CPU cores: two processes with one thread each. LoRA (rank 16, all linear layers, bfloat16
base), 16 steps of 8 pairs, once through 128 pairs. The answers to the held-out prompts are greedy, in bfloat16.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a process each core
os.environ["HF_HUB_OFFLINE"] = "1"

from answers_data import OFF_POLICY, PAIRS, SAMPLES, SETS, clair, load_task, mixture
from evidence import mean_tokens

STORE = Path(__file__).parent / "evidence" / "answers.json"
SAMPLED = Path(os.environ.get("APO_TRL_ANSWERS", tempfile.gettempdir())) / "apo-trl-answers"  # remade if missing

MODEL = "SmolLM2-135M-Instruct"
TASKS = ("instructions", "notes")
SEEDS = (0, 1, 2)
STEPS, BATCH = PAIRS // 8, 8
RATE, BETA, RANK = 3e-4, 0.1, 16
RLOO_RATE = 1e-3
KL_PROMPTS = 16
OFF_POLICY_TEMPERATURE = {"instructions": 1.3, "notes": 1.1}  # at 1.3 only 62 pairs of notes had a right answer
LOSSES = {"APO-zero": "apo_zero", "APO-down": "apo_down", "DPO": "sigmoid"}
SHARES = (0, 25, 50, 75, 100)
ROUNDS = {"data": "clair", "method": "rounds"}
PARTS = {"none": 0, "on-policy": SAMPLES, "stronger": SAMPLES, "off-policy": SAMPLES + OFF_POLICY}  # answers a prompt


def run_of(data: str, method: str) -> dict:
    """Return the run of a set and a loss. Some are parts of another one: the first round is APO-zero on revisions."""
    if method == "apo_blend":  # at the ends it is one of the losses that it blends
        method = {"0 %": "apo_down", "100 %": "apo_zero"}.get(data, method)
    if data == "100 %":
        data = "clair"
    return ROUNDS | {"part": 1} if (data, method) == ("clair", "apo_zero") else {"data": data, "method": method}


def planned() -> list[dict]:
    """Every run, the ones that decide most first."""
    of_pairs = [run_of(data, loss) for loss in LOSSES.values() for data in SETS]
    of_pairs += [{"data": "clair", "method": method} for method in ("sft", "apo_zero_norm")]
    of_shares = [run_of(f"{share} %", loss) for share in SHARES for loss in ("apo_zero", "apo_down", "apo_blend")]
    others = [{"data": data, "method": "rloo"} for data in ("verifier", "reward model")]
    others += [{"data": "clair", "method": "apo_zero", "steps": 3 * STEPS}]
    runs = [{"task": task, "data": "none", "method": "before", "seed": 0} for task in TASKS]
    for tasks, of_task in ((TASKS, of_pairs), (TASKS[:1], of_shares), (TASKS, others)):
        runs += [{"task": task, **run, "seed": seed} for seed in SEEDS for task in tasks for run in of_task]
    whole = [{key: value for key, value in run.items() if key != "part"} for run in runs]
    return list({json.dumps(run): run for run in whole}.values())


@lru_cache
def model_folder() -> str:
    from apo_trl.models.packaged import resolve_model

    return str(resolve_model(MODEL))


def answer(folder: str, prompts: list[str], *, temperature: float, max_tokens: int, seed: int) -> tuple[list[str], int]:
    """Return the answer to each prompt, and the number of generated tokens."""
    from apo_trl.pairs.llm.in_process import Generator

    generator = Generator(folder, batch_size=48, dtype="bfloat16")
    bodies = [
        {
            "messages": [{"role": "user", "content": prompt}],
            "temperature": temperature,
            "max_tokens": max_tokens,
            "seed": seed + number,
        }
        for number, prompt in enumerate(prompts)
    ]
    replies = list(generator.answer(bodies))
    texts = [reply["choices"][0]["message"]["content"] or "" for reply in replies]
    return texts, sum(reply["usage"]["completion_tokens"] for reply in replies)


def sample(task_name: str, part: int) -> Path:
    """Sample one answer to every prompt to train on, if it is not there; the last ones are off-policy."""
    path = SAMPLED / f"{task_name}-{part}.json"
    if not path.exists():
        task = load_task(task_name)
        temperature = 0.8 if part < SAMPLES else OFF_POLICY_TEMPERATURE[task_name]
        prompts = [row["prompt"] for row in task.train]
        found = answer(
            model_folder(), prompts, temperature=temperature, max_tokens=task.max_tokens, seed=1_000_000 * (part + 1)
        )
        SAMPLED.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".new").write_text(json.dumps(found), encoding="utf-8")
        path.with_suffix(".new").replace(path)
    return path


def parts(data: str) -> range:
    """Return the parts of the samples that a set is made of; RLOO has the prompts and the budget of the revisions."""
    return range(SAMPLES + OFF_POLICY if data.endswith("%") else PARTS.get(data, 1))


def samples(task_name: str, data: str) -> dict[str, list[str]]:
    texts = [json.loads(sample(task_name, part).read_text(encoding="utf-8"))[0] for part in parts(data)]
    ids = [row["id"] for row in load_task(task_name).train]
    return {name: list(row) for name, row in zip(ids, zip(*texts, strict=True), strict=True)}


def sampled_tokens(task_name: str, data: str, share: float) -> int:
    """Count the tokens that were sampled for a set: of all prompts, as far as the set needed them."""
    counted = {"on-policy": range(SAMPLES), "off-policy": range(SAMPLES, SAMPLES + OFF_POLICY)}.get(data, range(1))
    tokens = sum(json.loads(sample(task_name, part).read_text(encoding="utf-8"))[1] for part in counted)
    return round(tokens * min(1.0, share))


def pairs_of(task_name: str, data: str, seed: int) -> list[dict]:
    task = load_task(task_name)
    if data.endswith("%"):
        return mixture(task, samples(task_name, data), seed, int(data.split()[0]))
    return SETS[data](task, samples(task_name, data), seed)


def _common(folder: str, seed: int, steps: int, rate: float = RATE) -> dict:
    return {
        "output_dir": folder, "learning_rate": rate, "seed": seed, "max_steps": steps,
        "per_device_train_batch_size": BATCH, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2,
        "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no",
        "logging_steps": 1, "disable_tqdm": True,
    }  # fmt: skip


def _lora(**more):
    from peft import LoraConfig

    wanted = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**wanted | more)


def _run(trainer) -> list[dict]:
    """Train without printing, and return the logs."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.state.log_history


def train_pairs(model: str, pairs: list[dict], method: str, seed: int, steps: int, folder: str) -> dict:
    """Train on pairs with a loss of APOTrainer, or on the chosen answers with SFTTrainer; save the merged model."""
    import torch
    from datasets import Dataset

    torch.manual_seed(seed)
    columns = ("prompt", "chosen", "rejected", *(["chosen_wins"] if method == "apo_blend" else []))
    dtype = {"model_init_kwargs": {"dtype": "bfloat16"}}
    if method == "sft":
        from trl import SFTConfig, SFTTrainer

        rows = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
        config = SFTConfig(**_common(folder, seed, steps), **dtype)
        trainer = SFTTrainer(model, config, train_dataset=Dataset.from_list(rows), peft_config=_lora())
    else:
        from apo_trl import APOConfig, APOTrainer

        beta = BETA * mean_tokens(pairs) if method.endswith("_norm") else BETA
        rows = [{name: pair[name] for name in columns} for pair in pairs]
        config = APOConfig(**_common(folder, seed, steps), **dtype, loss_type=method, beta=beta, max_length=1024)
        trainer = APOTrainer(model, args=config, train_dataset=Dataset.from_list(rows), peft_config=_lora())
    logs = _run(trainer)
    names = [key for entry in logs for key in entry if key.endswith("displaced")]
    displaced = [entry[names[0]] for entry in logs if names and names[0] in entry]
    return _saved(trainer, folder) | {
        "displaced": round(statistics.fmean(displaced[-(len(displaced) // 2) :]), 3) if displaced else None
    }


def _saved(trainer, folder: str) -> dict:
    """Save the model with its adapter merged, which answers and from which a next round starts."""
    trainer.model.merge_and_unload().save_pretrained(f"{folder}/merged")
    trainer.processing_class.save_pretrained(f"{folder}/merged")
    return {"folder": f"{folder}/merged"}


def train_rloo(task_name: str, reward, tokens: int, seed: int, folder: str) -> dict:
    """Train with TRL's RLOO until about `tokens` are sampled; `reward` is a function, or the folder of a model."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import RLOOConfig, RLOOTrainer

    task = load_task(task_name)
    torch.manual_seed(seed)
    per_step, group, lengths = 32, 4, []

    class Budget(TrainerCallback):
        """Ends training at the step at which the number of sampled tokens is nearest to `tokens`."""

        def on_log(self, args, state, control, logs=None, **others):
            if "completions/mean_length" in logs:
                lengths.append(logs["completions/mean_length"])
                control.should_training_stop = (sum(lengths) + lengths[-1] / 2) * per_step >= tokens

    rows = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in task.train]
    config = RLOOConfig(
        **_common(folder, seed, 50, rate=RLOO_RATE) | {"per_device_train_batch_size": per_step},
        num_generations=group, max_completion_length=task.max_tokens, temperature=1.0, beta=0.0,
        model_init_kwargs={"dtype": "bfloat16"},
    )  # fmt: skip
    dataset = Dataset.from_list(rows)
    trainer = RLOOTrainer(
        model_folder(), reward, config, train_dataset=dataset, peft_config=_lora(), callbacks=[Budget()]
    )
    logs = _run(trainer)
    means = [entry["reward"] for entry in logs if "reward" in entry]
    return _saved(trainer, folder) | {
        "steps": len(lengths),
        "rewards": [round(value, 3) for value in means],
        "tokens": round(sum(lengths) * per_step),
    }


def train_reward_model(pairs: list[dict], seed: int, folder: str) -> tuple[str, float]:
    """Train TRL's reward model on pairs; return its merged folder and the accuracy of the last half of its steps."""
    import torch
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    torch.manual_seed(seed)
    rows = [{name: pair[name] for name in ("prompt", "chosen", "rejected")} for pair in pairs]
    config = RewardConfig(**_common(folder, seed, STEPS), model_init_kwargs={"dtype": "float32"})
    lora = _lora(task_type="SEQ_CLS", modules_to_save=["score"])
    trainer = RewardTrainer(model_folder(), config, train_dataset=Dataset.from_list(rows), peft_config=lora)
    logs = _run(trainer)
    merged = trainer.model.merge_and_unload()
    merged.save_pretrained(f"{folder}/reward")
    trainer.processing_class.save_pretrained(f"{folder}/reward")
    accuracies = [entry["accuracy"] for entry in logs if "accuracy" in entry]
    return f"{folder}/reward", round(statistics.fmean(accuracies[len(accuracies) // 2 :]), 3)


def note_reward_function(task_name: str):
    """Return the verifier for TRL's trainers, which give completions as messages."""
    task = load_task(task_name)

    def reward(completions, **columns):
        return task.reward(completions=[completion[-1]["content"] for completion in completions], **columns)

    return reward


def evaluate(task_name: str, folder: str, *, distance: bool = True) -> dict:
    """Answer the held-out prompts, and return what each answer is, and with `distance` how far the model has moved."""
    from apo_trl.checks import broken

    task = load_task(task_name)
    test = task.test[:96]
    texts, _ = answer(folder, [row["prompt"] for row in test], temperature=0.0, max_tokens=task.max_tokens, seed=0)
    columns = {name: [row[name] for row in test] for name in test[0] if name not in ("id", "prompt")}
    scores = task.reward(completions=texts, **columns)
    return {
        "followed": [int(score) for score in scores],
        "kinds": [row["kind"] for row in test],
        "broken": sum(broken(text) is not None for text in texts),
        "words": round(statistics.fmean(len(text.split()) for text in texts), 1),
        "kl": round(kl(folder, test[:KL_PROMPTS], texts[:KL_PROMPTS]), 4) if distance else None,
        "examples": [[row["prompt"], text] for row, text in zip(test[:3], texts[:3], strict=True)],
    }


def kl(folder: str, rows: list[dict], texts: list[str]) -> float:
    """Compute KL(model || start) in nats per token, exact at each position, on the model's own greedy answers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    models = [AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32) for name in (folder, model_folder())]
    total, count = 0.0, 0
    for row, text in zip(rows, texts, strict=True):
        messages = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = prompt + tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            policy, start = (
                model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for model in models
            )
        total += float((policy.exp() * (policy - start)).sum())
        count += len(ids) - len(prompt)
    return total / count


def do(run: dict) -> dict:
    """Compute the result of one run, in this process."""
    from apo_trl.training.console import quiet_libraries

    quiet_libraries()
    from datasets import disable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bars()
    disable_progress_bar()
    began, cpu = time.monotonic(), time.process_time()
    task_name, seed, method = run["task"], run["seed"], run["method"]
    steps = run.get("steps", STEPS)
    result: dict = {"run": run}
    with tempfile.TemporaryDirectory() as folder:
        if method == "before":
            result |= evaluate(task_name, model_folder(), distance=False) | {"kl": 0.0}
        elif method == "rloo":
            pairs = pairs_of(task_name, "clair", seed)
            tokens = sampled_tokens(task_name, "clair", PAIRS / len(pairs))
            reward = note_reward_function(task_name)
            if run["data"] == "reward model":
                reward, result["accuracy"] = train_reward_model(pairs[:PAIRS], seed, folder)
            result |= train_rloo(task_name, reward, tokens, seed, folder)
            result |= evaluate(task_name, result.pop("folder"))
        elif method == "rounds":
            result["rounds"] = rounds(task_name, seed, folder)
        else:
            pairs = pairs_of(task_name, run["data"], seed)
            result |= {"pairs": len(pairs[:PAIRS]), "found": len(pairs), "steps": steps}
            in_table = not run["data"].endswith("%")
            if in_table:
                result["tokens"] = sampled_tokens(task_name, run["data"], PAIRS / len(pairs))
            result |= train_pairs(model_folder(), pairs[:PAIRS], method, seed, steps, folder)
            result |= evaluate(task_name, result.pop("folder"), distance=in_table)
    return result | {"seconds": round(time.monotonic() - began, 1), "cpu": round(time.process_time() - cpu, 1)}


def rounds(task_name: str, seed: int, folder: str) -> list[dict]:
    """Three rounds: the answers of the policy are revised, it trains on these pairs, and is the next round's policy."""
    task, policy, done = load_task(task_name), model_folder(), []
    prompts = [row["prompt"] for row in task.train]
    for number in (1, 2, 3):
        began = time.process_time()
        if number == 1:
            pairs = pairs_of(task_name, "clair", seed)
            tokens = sampled_tokens(task_name, "clair", PAIRS / len(pairs))
        else:
            chance = 10_000 * (10 * seed + number)
            texts, tokens = answer(policy, prompts, temperature=0.8, max_tokens=task.max_tokens, seed=chance)
            found = {row["id"]: [text] for row, text in zip(task.train, texts, strict=True)}
            pairs = clair(task, found, seed + 100 * number)
            tokens = round(tokens * min(1.0, PAIRS / len(pairs)))
        result = {"pairs": len(pairs[:PAIRS]), "found": len(pairs), "tokens": tokens, "steps": STEPS}
        result |= train_pairs(policy, pairs[:PAIRS], "apo_zero", seed, STEPS, f"{folder}/{number}")
        policy = result.pop("folder")
        result |= evaluate(task_name, policy)
        done.append(result | {"cpu": round(time.process_time() - began, 1)})
    return done


def load() -> list[dict]:
    return json.loads(STORE.read_text(encoding="utf-8"))["results"] if STORE.exists() else []


def save(results: list[dict]) -> None:
    from importlib.metadata import version

    packages = ("trl", "transformers", "torch", "peft")
    runs = planned()
    results = sorted(results, key=lambda result: runs.index(result["run"]))
    lines = ",\n".join(json.dumps(result, ensure_ascii=False) for result in results)
    text = f'{{"versions": {json.dumps({name: version(name) for name in packages})},\n"results": [\n{lines}\n]}}\n'
    STORE.with_suffix(".new").write_text(text, encoding="utf-8")
    STORE.with_suffix(".new").replace(STORE)


def run_all(only: str = "") -> list[dict]:
    """Compute the results that are not stored, two runs at a time, and store each as it comes."""
    results = load()
    stored = [result["run"] for result in results]
    left = [run for run in planned() if run not in stored and only in json.dumps(run)]
    began = time.monotonic()
    # ProcessPoolExecutor starts no process in the place of one that has had its tasks (Python's issue 115634).
    with get_context("spawn").Pool(2, maxtasksperchild=10) as pool:
        needed = {(run["task"], part) for run in left for part in parts(run["data"])}
        sampled = [pool.apply_async(sample, part) for part in sorted(needed)]
        for number, one in enumerate(sampled, start=1):
            print(f"samples {one.get().stem}: {number} of {len(sampled)}", flush=True)
        for number, result in enumerate(pool.imap_unordered(do, left), start=1):
            results.append(result)
            save(results)
            rest = len(left) - number
            print(
                f"{' '.join(map(str, result['run'].values()))}: {result['seconds']:.0f} s, {rest} runs left, "
                f"about {(time.monotonic() - began) / number * rest / 60:.0f} min",
                flush=True,
            )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="only draw")
    parser.add_argument("--fresh", action="store_true", help="forget what is stored")
    parser.add_argument("--only", default="", help="part of a run's description")
    options = parser.parse_args()
    if options.fresh:
        STORE.unlink(missing_ok=True)
    results = load() if options.draw else run_all(options.only)
    from answers_page import draw, write_page

    draw(results)
    write_page(results)


if __name__ == "__main__":
    main()
