"""The paper's claims on a small real model: trains, evaluates, stores, draws. What it found is in docs/evidence.md.

    python docs/evidence.py          (or `make evidence`)   every run that is not stored yet, then figures and tables
    python docs/evidence.py --draw                          figures and tables from docs/evidence/results.json alone
    python docs/evidence.py --fresh                         forget what is stored, and do all of it anew

SmolLM2-135M-Instruct, LoRA on all linear layers, float32, two CPU cores. Every seed has its own split of the 112
CLAIR pairs, its own order and its own adapter. Everything is measured on held-out pairs, as log-ratios to the model
that the run started from.
"""

import argparse
import json
import statistics
import tempfile
import time

from evidence_data import clair, lengths, mixture, split, unrelated
from evidence_figures import RATES, STORE, chosen_rate, draw, planned, swept, write_page

STEPS, BATCH = 18, 4  # once through the 72 pairs


class Lab:
    """The model and what runs share: sampled answers, references, token counts."""

    def __init__(self, model: str | None = None, steps: int = STEPS) -> None:
        from sample_demo_pairs import demo_rows

        from apo_trl.models.packaged import resolve_model

        self.model = model or resolve_model("SmolLM2-135M-Instruct")
        self.steps = steps
        self.references: dict = {}  # log-probs of held-out pairs before training
        self.rows = demo_rows()

    def samples(self) -> dict[str, str]:
        """Another answer of the model to every prompt, at temperature 1; kept, since it takes minutes."""
        path = STORE / "samples.json"
        if not path.exists():
            from apo_trl.pairs.llm.in_process import Generator

            generator = Generator(self.model, batch_size=16)
            bodies = [
                {"messages": row["prompt"], "temperature": 1.0, "max_tokens": 96, "seed": at}
                for at, row in enumerate(self.rows)
            ]
            texts = [reply["choices"][0]["message"]["content"] for reply in generator.answer(bodies)]
            found = {row["id"]: text or "." for row, text in zip(self.rows, texts, strict=True)}
            path.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        return json.loads(path.read_text(encoding="utf-8"))

    def sets(self, run: dict) -> tuple[list[dict], list[dict]]:
        make = {
            "clair": clair,
            "unrelated": lambda rows: unrelated(rows, self.samples()),
            "lengths": lambda rows: lengths(rows, run["seed"]),
            "mixture": lambda rows: mixture(rows, run["seed"]),
        }[run["data"]]
        return tuple(make(part) for part in split(self.rows, run["seed"]))

    def train(self, run: dict) -> dict:
        """Train one run, and return the results on its held-out pairs."""
        import torch
        from datasets import Dataset
        from peft import LoraConfig
        from transformers import PrinterCallback

        from apo_trl import APOConfig, APOTrainer
        from apo_trl.evaluation.scoring import pair_logps, tokenize_pairs
        from apo_trl.models.loading import pad_token

        began = time.monotonic()
        train, held_out = self.sets(run)
        beta = run["beta"] * (mean_tokens(train) if run["loss"].endswith("_norm") else 1)
        with tempfile.TemporaryDirectory() as folder:
            config = APOConfig(
                folder, loss_type=run["loss"], beta=beta, learning_rate=run["rate"], seed=run["seed"],
                max_steps=self.steps, per_device_train_batch_size=BATCH, lr_scheduler_type="constant_with_warmup",
                warmup_steps=2, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
                save_strategy="no", logging_steps=1, disable_tqdm=True, precompute_ref_log_probs=True, max_length=1024,
                model_init_kwargs={"dtype": "float32"},
            )  # fmt: skip
            torch.manual_seed(run["seed"])
            trainer = APOTrainer(
                model=self.model, args=config, train_dataset=Dataset.from_list(train),
                peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        model = trainer.model.eval()
        pairs = tokenize_pairs(held_out, trainer.processing_class)
        scoring = {"pad_token_id": pad_token(trainer.processing_class), "batch_size": 20}
        policy = pair_logps(model, pairs, **scoring)
        place = (run["data"], run["seed"])
        if place not in self.references:
            with model.disable_adapter():
                self.references[place] = pair_logps(model, pairs, **scoring)
        reference = self.references[place]
        history = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
        return {
            "run": run,
            "beta": round(beta, 3),
            "held_out": [
                {
                    "id": pair["id"], "kind": row["kind"], "c": round(c - rc, 4), "r": round(r - rr, 4),
                    "n": [len(pair["chosen_ids"]), len(pair["rejected_ids"])],
                }
                for pair, row, (c, r), (rc, rr) in zip(pairs, held_out, policy, reference, strict=True)
            ],
            "margins": [round(margin, 4) for margin in history],
            "seconds": round(time.monotonic() - began, 1),
        }  # fmt: skip


def mean_tokens(rows: list[dict]) -> float:
    """Tokens of a chosen answer on average, a beta per token's factor; a word is about 1.4 of SmolLM2's tokens."""
    return 1.4 * statistics.fmean(len(row["chosen"][0]["content"].split()) for row in rows)


def load() -> list[dict]:
    path = STORE / "results.json"
    return json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else []


def save(results: list[dict]) -> None:
    from importlib.metadata import version

    packages = ("trl", "transformers", "torch", "peft")
    lines = ",\n".join(json.dumps(result) for result in results)
    text = f'{{"versions": {json.dumps({name: version(name) for name in packages})},\n"results": [\n{lines}\n]}}\n'
    (STORE / "results.json").write_text(text, encoding="utf-8")


def run_all(lab: Lab, say=print) -> list[dict]:
    """Do what is not stored, the sweep first; every result is stored as it comes."""
    STORE.mkdir(exist_ok=True)
    results = load()
    began, done = time.monotonic(), 0

    def do(runs: list[dict], then: int = 0) -> None:
        nonlocal done
        left = [run for run in runs if run not in [result["run"] for result in results]]
        for number, run in enumerate(left, start=1):
            results.append(lab.train(run))
            save(results)
            done += 1
            rest = len(left) - number + then
            say(
                f"{run['data']} {run['loss']} rate {run['rate']:g} seed {run['seed']}: {results[-1]['seconds']:.0f} s, "
                f"{rest} runs left, about {(time.monotonic() - began) / done * rest / 60:.0f} min",
                flush=True,
            )

    beyond = [run for run in planned(RATES[0]) if run not in swept()]
    do(swept(), then=len(beyond) - sum(result["run"] not in swept() for result in results))
    do(planned(chosen_rate(results)))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="only draw")
    parser.add_argument("--fresh", action="store_true", help="forget what is stored")
    options = parser.parse_args()
    if options.fresh:
        (STORE / "results.json").unlink(missing_ok=True)
    if options.draw:
        results = load()
    else:
        from datasets import disable_progress_bars
        from transformers.utils.logging import disable_progress_bar

        from apo_trl.training.console import quiet_libraries

        quiet_libraries()
        disable_progress_bars()  # of seconds each; a run gets a line
        disable_progress_bar()
        results = run_all(Lab())
    draw(results)
    write_page(results)


if __name__ == "__main__":
    main()
