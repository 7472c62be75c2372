"""The demo: APO-zero with LoRA on a packaged small model and its own answers, revised; minutes on a CPU."""

import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from apo_trl.errors import InputError
from apo_trl.io.files import write_json
from apo_trl.io.resources import DEMO_PAIRS
from apo_trl.metrics import regimes
from apo_trl.models.packaged import smollm2
from apo_trl.training.console import quiet_libraries
from apo_trl.training.threads import choose_threads

__all__ = ["run_demo"]


def run_demo(output_dir: str, *, model: str | None = None, max_steps: int | None = None) -> dict[str, Any]:
    """Train on the demo pairs, compare held-out pairs before and after, and return what `summary.json` holds.

    Writes the adapter, `report.png`, `summary.json`, and what `apo-trl report` reads, to `output_dir`.
    """
    if find_spec("matplotlib") is None:
        raise InputError("matplotlib: required for the demo's report, not found. Run `pip install 'apo-trl[demo]'`.")
    started, folder = time.monotonic(), Path(output_dir)
    os.environ.setdefault("HF_HUB_OFFLINE", "1" if model is None else "0")  # the packaged model needs no hub
    choose_threads()
    quiet_libraries()
    from apo_trl.evaluation.report import draw_report
    from apo_trl.training.arguments import parse
    from apo_trl.training.progress import show_progress

    show_progress()
    arguments = ["smollm2-135m/demo", "--dataset_name", str(DEMO_PAIRS), "--output_dir", output_dir]
    arguments += ["--model_name_or_path", model or str(smollm2())]
    run, _ = parse(arguments + ([] if max_steps is None else ["--max_steps", str(max_steps)]))
    beta = run.training.beta
    trainer, points = _build_trainer(run)
    questions = [row["prompt"] for row in trainer.eval_dataset.select(range(2))]

    def evaluate(when: str) -> tuple[dict[str, float], list[str]]:
        print(f"Held-out pairs {when} training ...", flush=True)
        points.clear()
        trainer.evaluate()
        return _summarise(points, beta), [_answer(trainer, question) for question in questions]

    before, old_answers = evaluate("before")
    history = list(trainer.state.log_history)  # training starts a new one
    trainer.train()
    after, new_answers = evaluate("after")
    trainer.save_model(output_dir)
    trainer.create_model_card(folder.name)  # in the place of PEFT's empty one
    trainer.save_state()  # the logs, for `apo-trl report`
    draw_report(history + trainer.state.log_history, points, folder / "report.png", beta=beta)
    summary = {"seconds": round(time.monotonic() - started, 1), "before": before, "after": after}
    write_json(folder / "summary.json", summary)

    print(f"\n{len(points)} held-out pairs        before     after")
    for name, value in after.items():
        form = "10.3f" if "/" in name else "10.0%"
        print(f"  {name:<18}{before[name]:{form}}{value:{form}}")
    dtype = str(trainer.model.dtype).removeprefix("torch.")
    print(f"  (means over pairs, computed in {dtype}; rewards are beta x log-ratio: 0 is the reference, the anchor)")
    for question, old, new in zip(questions, old_answers, new_answers, strict=True):
        print(f"\n  {question[-1]['content']}\n    before: {old}\n    after:  {new}")
    print(f"\n{summary['seconds']:.0f} s. See {folder / 'report.png'}; the adapter and summary.json are beside it.")
    print(f"All that was logged: apo-trl report {folder}")
    return summary


def _build_trainer(run: Any) -> tuple[Any, list[tuple[float, float]]]:
    """Build the trainer, and the list to which it appends the two log-ratios of each evaluated pair."""
    from apo_trl.trainer import APOTrainer
    from apo_trl.training.script import make_trainer

    points: list[tuple[float, float]] = []

    class Trainer(APOTrainer):
        def _log_pairs(self, pairs: dict[str, Any], terms: dict[str, Any]) -> None:
            super()._log_pairs(pairs, terms)
            if not self.model.training:
                chosen, rejected = pairs["chosen_logratios"].tolist(), pairs["rejected_logratios"].tolist()
                points.extend(zip(chosen, rejected, strict=True))

    return make_trainer(run, Trainer), points


def _summarise(points: list[tuple[float, float]], beta: float) -> dict[str, float]:
    """Return means over pairs; those that TRL logs are over batches, the last of which is smaller."""
    chosen, rejected = np.transpose(points)
    shares = regimes(chosen, rejected) | {"accuracy": chosen > rejected}
    values = {"rewards/chosen": beta * chosen, "rewards/rejected": beta * rejected}
    values |= {name: shares[name] for name in ("chosen_up", "rejected_down", "displaced", "accuracy")}
    return {name: round(float(value.mean()), 4) for name, value in values.items()}


def _answer(trainer: Any, prompt: list[dict[str, str]]) -> str:
    tokenizer = trainer.processing_class
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = trainer.model.generate(**inputs, max_new_tokens=64, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
