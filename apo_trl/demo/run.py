"""The demo: APO-zero trains a packaged small model on revisions of its own answers, minutes on a CPU."""

import os
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from apo_trl.errors import InputError
from apo_trl.io.files import write_json
from apo_trl.io.resources import DEMO_PAIRS
from apo_trl.metrics import regimes
from apo_trl.models.packaged import resolve_model
from apo_trl.pairs import check_installed
from apo_trl.training.console import quiet_libraries
from apo_trl.training.threads import choose_threads

__all__ = ["run_demo"]

_INSTRUCTIONS = DEMO_PAIRS.parent / "instructions"


def run_demo(
    output_dir: str, *, model: str | None = None, max_steps: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Score the model on held-out prompts, train it on pairs, score it again; return what `summary.json` holds.

    Writes the adapter, the answers in `before` and `after`, `report.png`, `summary.json`, and what `apo-trl report`
    reads, to `output_dir`.
    """
    if find_spec("matplotlib") is None:
        raise InputError("matplotlib: required for the demo's report, not found. Run `pip install 'apo-trl[demo]'`.")
    check_installed()
    started, folder = time.monotonic(), Path(output_dir)
    os.environ.setdefault("HF_HUB_OFFLINE", "1" if model is None else "0")  # the packaged model needs no hub
    choose_threads()
    quiet_libraries()
    from apo_trl.evaluation.report import draw_report
    from apo_trl.training.arguments import parse
    from apo_trl.training.progress import show_progress

    name = resolve_model(model or "SmolLM2-135M-Instruct", "model")
    arguments = ["smollm2-135m/demo", "--dataset_name", str(_INSTRUCTIONS / "pairs"), "--output_dir", output_dir]
    arguments += ["--model_name_or_path", name, "--seed", str(seed)]
    run, _ = parse(arguments + ([] if max_steps is None else ["--max_steps", str(max_steps)]))
    print("1/3 The model answers held-out prompts ...", flush=True)
    before, old = _score(name, folder / "before")
    print("2/3 APO-zero trains on pairs of its own answers and their revisions ...", flush=True)
    show_progress()
    trainer, points = _train(run)
    print("3/3 The trained model answers the held-out prompts ...", flush=True)
    after, new = _score(output_dir, folder / "after")
    beta = run.training.beta
    draw_report(trainer.state.log_history, points, folder / "report.png", beta=beta)
    dtype = str(trainer.model.dtype).removeprefix("torch.")
    summary = {
        "seconds": round(time.monotonic() - started, 1), "seed": seed, "dtype": dtype,
        "before": before, "after": after, "held_out_pairs": _summarise(points, beta),
    }  # fmt: skip
    write_json(folder / "summary.json", summary)
    print("\n".join(_table(summary, len(points), beta)))
    examples = {one["kind"]: (one, two) for one, two in zip(old, new, strict=True) if _improved(one, two)}
    for one, two in list(examples.values())[:2]:
        print(f"\n  {one['prompt'][-1]['content']}\n    before: {one['answer']}\n    after:  {two['answer']}")
    print(f"\n{summary['seconds']:.0f} s. See {folder / 'report.png'}; the adapter and summary.json are beside it.")
    print(f"All answers: {folder / 'after' / 'answers.parquet'}\nAll that was logged: apo-trl report {folder}")
    return summary


def _score(model: str, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the summary of a model's answers to held-out prompts, as `apo-trl score` computes it, and the answers."""
    import pyarrow.parquet as pq

    from apo_trl.evaluation.score import score
    from apo_trl.pairs.config.settings import make_settings

    settings = {
        "method": "on_policy_judge", "judge_function": "apo_trl.pairs.instructions:reward", "output_dir": str(folder),
        "prompts": str(_INSTRUCTIONS / "test.jsonl"), "max_prompts": 96, "max_failures": 1000, "policy_model": model,
        "policy_temperature": 0, "policy_max_tokens": 64, "policy_batch_size": 48, "policy_dtype": "bfloat16",
    }  # fmt: skip
    report = score(make_settings(settings))
    if report["followed"] is None:
        raise InputError(f"model: none of its answers has a score. Read {folder / 'score.json'}.")
    kept = ("prompts", "followed", "by_kind", "broken", "words")
    return {key: report[key] for key in kept}, pq.read_table(folder / "answers.parquet").to_pylist()


def _train(run: Any) -> tuple[Any, list[tuple[float, float]]]:
    """Train and save; return the trainer, and the two log-ratios of each held-out pair after training."""
    from apo_trl.trainer import APOTrainer
    from apo_trl.training.script import make_trainer

    points: list[tuple[float, float]] = []

    class Trainer(APOTrainer):
        def _log_pairs(self, pairs: dict[str, Any], terms: dict[str, Any]) -> None:
            super()._log_pairs(pairs, terms)
            if not self.model.training:
                chosen, rejected = pairs["chosen_logratios"].tolist(), pairs["rejected_logratios"].tolist()
                points.extend(zip(chosen, rejected, strict=True))

    trainer = make_trainer(run, Trainer)
    trainer.train()  # which evaluates at the end
    trainer.save_model(run.training.output_dir)
    trainer.create_model_card(Path(run.training.output_dir).name)  # in the place of PEFT's empty one
    trainer.save_state()  # the logs, for `apo-trl report`
    return trainer, points


def _summarise(points: list[tuple[float, float]], beta: float) -> dict[str, float]:
    """Return means over pairs; those that TRL logs are over batches, the last of which is smaller."""
    chosen, rejected = np.transpose(points)
    shares = regimes(chosen, rejected) | {"accuracy": chosen > rejected}
    values = {"rewards/chosen": beta * chosen, "rewards/rejected": beta * rejected}
    values |= {name: shares[name] for name in ("chosen_up", "rejected_down", "displaced", "accuracy")}
    return {name: round(float(value.mean()), 4) for name, value in values.items()}


def _improved(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return (old["score"], new["score"]) == (0, 1) and old["finish"] == "stop" and new["words"] > 5


def _table(summary: Mapping[str, Any], pairs: int, beta: float) -> list[str]:
    before, after = summary["before"], summary["after"]
    lines = ["", f"{after['prompts']} held-out prompts".ljust(28) + "before            after"]
    for name in ("", *after["by_kind"]):
        old, new = (part["by_kind"][name]["followed"] if name else part["followed"] for part in (before, after))
        label = f"    {name}" if name else "  instruction followed"
        shares = (f"{share:5.0%} ({low:.0%}-{high:.0%})".ljust(18) for share, low, high in (old, new))
        lines.append(f"{label:<24}{''.join(shares)}".rstrip())
    lines.append("  broken answers".ljust(24) + f"{before['broken']:5.0%}".ljust(18) + f"{after['broken']:5.0%}")
    lines.append("  words".ljust(24) + f"{before['words']:5.0f}".ljust(18) + f"{after['words']:5.0f}")
    lines.append("  (greedy answers; in brackets 95 % confidence intervals)")
    lines += ["", f"{pairs} held-out pairs".ljust(28) + "after"]
    for name, value in summary["held_out_pairs"].items():
        lines.append(f"  {name}".ljust(23) + f"{value:{'10.3f' if '/' in name else '10.0%'}}")
    note = f"rewards are {beta:g} x log-ratio: 0 is the reference, the anchor"
    return [*lines, f"  (means over pairs, computed in {summary['dtype']}; {note})"]
