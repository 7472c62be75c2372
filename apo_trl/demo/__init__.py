"""The embedded run: APO-zero with LoRA on a real small model, its own answers revised, on a CPU, in minutes."""

import os
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from apo_trl.errors import InputError
from apo_trl.io.files import write_json
from apo_trl.io.resources import DEMO_PAIRS
from apo_trl.models.packaged import smollm2
from apo_trl.training.screen import quiet_libraries

__all__ = ["run_demo"]


def run_demo(output_dir: str, *, model: str | None = None, max_steps: int | None = None) -> dict[str, Any]:
    """Train on the demo pairs, compare held-out pairs before and after, and give what `summary.json` holds.

    Writes the adapter, `report.png` and `summary.json` to `output_dir`.
    """
    if find_spec("matplotlib") is None:
        raise InputError("The demo draws its report with matplotlib: run `pip install 'apo-trl[demo]'`.")
    started = time.monotonic()
    os.environ.setdefault("HF_HUB_OFFLINE", "1" if model is None else "0")  # a packaged model needs no hub
    quiet_libraries()

    from apo_trl.evaluation.report import draw_report
    from apo_trl.io.resources import find_recipe
    from apo_trl.training.arguments import parse
    from apo_trl.training.script import make_trainer

    arguments = ["--config", str(find_recipe("smollm2-135m/demo")), "--dataset_name", str(DEMO_PAIRS)]
    arguments += ["--model_name_or_path", model or str(smollm2()), "--output_dir", output_dir]
    run, _ = parse(arguments + ([] if max_steps is None else ["--max_steps", str(max_steps)]))
    trainer, points = _with_points(make_trainer, run)
    _show_progress_only(trainer)

    questions = [row["prompt"] for row in trainer.eval_dataset.select(range(2))]
    print("Held-out pairs before training ...", flush=True)
    trainer.evaluate()
    history = list(trainer.state.log_history)  # training starts a new one
    before = _summary(points, run.training.beta)
    answers = [_answers(trainer, questions)]
    trainer.train()
    print("Held-out pairs after training ...", flush=True)
    points.clear()
    trainer.evaluate()
    after = _summary(points, run.training.beta)
    answers.append(_answers(trainer, questions))
    trainer.save_model(output_dir)

    folder = Path(output_dir)
    draw_report(history + trainer.state.log_history, points, folder / "report.png", beta=run.training.beta)
    summary = {"seconds": round(time.monotonic() - started, 1), "before": before, "after": after}
    write_json(folder / "summary.json", summary)
    _show(summary, questions, answers, pairs=len(trainer.eval_dataset), folder=folder)
    return summary


def _with_points(make_trainer: Any, run: Any) -> tuple[Any, list[tuple[float, float]]]:
    """Build the trainer so that the log-ratios of every evaluated pair are kept."""
    from apo_trl.trainer import APOTrainer

    points: list[tuple[float, float]] = []

    class Trainer(APOTrainer):
        def _log_pairs(self, pairs: dict[str, Any], terms: dict[str, Any]) -> None:
            super()._log_pairs(pairs, terms)
            if not self.model.training:
                points.extend(
                    zip(pairs["chosen_logratios"].tolist(), pairs["rejected_logratios"].tolist(), strict=True)
                )

    return make_trainer(run, Trainer), points


def _show_progress_only(trainer: Any) -> None:
    """Have the progress bar carry the rewards, where the host prints thirty metrics every second step."""
    from transformers import ProgressCallback

    class Progress(ProgressCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if self.training_bar is not None and logs and "rewards/chosen" in logs:
                self.training_bar.set_postfix(
                    {side: f"{logs[f'rewards/{side}']:+.2f}" for side in ("chosen", "rejected")}
                )

    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress)


def _summary(points: list[tuple[float, float]], beta: float) -> dict[str, float]:
    """Take means over all pairs; the host's own are means over batches, of which the last is smaller."""
    regimes = {
        "chosen_up": [chosen > 0 for chosen, _ in points],
        "rejected_down": [rejected < 0 for _, rejected in points],
        "displaced": [rejected < chosen < 0 for chosen, rejected in points],
        "accuracy": [chosen > rejected for chosen, rejected in points],
    }
    rewards = {
        "rewards/chosen": [beta * chosen for chosen, _ in points],
        "rewards/rejected": [beta * rejected for _, rejected in points],
    }
    return {name: round(fmean(values), 4) for name, values in (rewards | regimes).items()}


def _answers(trainer: Any, questions: list[Any]) -> list[str]:
    tokenizer, texts = trainer.processing_class, []
    for question in questions:
        inputs = tokenizer.apply_chat_template(
            question, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = trainer.model.generate(**inputs, max_new_tokens=64, do_sample=False)
        texts.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return texts


def _show(summary: dict[str, Any], questions: list[Any], answers: list[list[str]], *, pairs: int, folder: Path) -> None:
    print(f"\n{pairs} held-out pairs        before     after")
    for name in summary["after"]:
        form = "{:10.3f}" if "/" in name else "{:10.0%}"
        print(f"  {name:<18}" + form.format(summary["before"][name]) + form.format(summary["after"][name]))
    print("  (rewards are beta x log-ratio: 0 is the reference, the anchor; the others are shares of pairs)")
    for question, before, after in zip(questions, *answers, strict=True):
        print(f"\n  {question[-1]['content']}\n    before: {before}\n    after:  {after}")
    print(f"\n{summary['seconds']:.0f} s. Look at {folder / 'report.png'}; the adapter and summary.json are beside it.")
