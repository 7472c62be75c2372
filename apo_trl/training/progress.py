"""What training shows: a bar with a few figures in a terminal, else a line now and then.

Every metric goes to `trainer_state.json` and the trackers.
"""

import logging
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import transformers.trainer
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import ProgressCallback
from transformers.trainer_utils import has_length

__all__ = ["Progress", "show_progress"]

_EVERY = 30.0  # seconds between the lines of a log file
_FIGURES = {
    "loss": "loss {:.4f}",
    "reward": "reward {:.3f}",  # of RLOO
    "accuracy": "accuracy {:.0%}",  # of a reward model
    "rewards/margins": "reward margin {:+.3f}",
    "apo/chosen_up": "chosen up {:.0%}",
    "apo/displaced": "displaced {:.0%}",
    "apo/tokens_saved": "tokens saved {:.2f}x",
}


def show_progress() -> None:
    """Show `Progress` for every trainer that is built afterwards, instead of all logged metrics."""
    module: Any = transformers.trainer
    module.DEFAULT_PROGRESS_CALLBACK = Progress
    module.PrinterCallback = Progress  # which transformers takes if `disable_tqdm` is set


class Progress(ProgressCallback):
    """The progress of a trainer with its time left, and one line after each evaluation and at the end."""

    training_bar: Any
    prediction_bar: Any
    _live, _figures, _started = False, "", 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar, at the step from which training resumes."""
        self.current_step, self._started, self._figures = state.global_step, time.monotonic(), ""
        if state.is_world_process_zero:
            self.training_bar = self._bar(args, "Step", state.max_steps, initial=state.global_step)
            self._redirection = ExitStack()  # log messages above the bar
            loggers = [logging.getLogger(), logging.getLogger("transformers")]
            self._redirection.enter_context(logging_redirect_tqdm(loggers))

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Count a batch of an evaluation."""
        if state.is_world_process_zero:
            if self.prediction_bar is None:
                total = len(eval_dataloader) if has_length(eval_dataloader) else None
                self.prediction_bar = self._bar(args, "Held out: batch", total)
            self.prediction_bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the figures of a training step on the bar, and those of an evaluation as a line."""
        if not state.is_world_process_zero or not logs:
            return
        prefix = next((key.removesuffix("runtime") for key in logs if key.endswith("_runtime")), "")
        figures = _figures(logs, prefix)
        if prefix == "train_" and not self._figures:  # training was shorter than logging_steps
            self._figures = _figures({**logs, "loss": logs["train_loss"]})
        if not prefix and figures and self.training_bar is not None:
            self._figures = figures
            self.training_bar.set_postfix_str(figures, refresh=self._live)
        elif figures and prefix not in ("", "train_"):
            self.on_evaluate(args, state, control)  # or its bar would be drawn again below the line
            name = prefix.removeprefix("eval_").removesuffix("_")
            dataset = f" ({name})" if name else ""
            tqdm.write(f"Step {state.global_step}, held out{dataset}: {figures}")
            sys.stdout.flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Replace the bar by one line with the time and the last figures."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None
            self._redirection.close()
            seconds = tqdm.format_interval(time.monotonic() - self._started)
            end = f"Trained to step {state.global_step} in {seconds}"
            print(f"{end}: {self._figures}" if self._figures else end, flush=True)

    def _bar(self, args: Any, name: str, total: int | None, initial: int = 0) -> Any:
        # A carriage return in a log file would put all states of a bar into one line.
        self._live = sys.stderr.isatty() and not args.disable_tqdm
        bar = " |{bar:10}| " if self._live else ", "
        known = f"{name} {{n_fmt}} of {{total_fmt}}{bar}{{remaining}} left{{postfix}}"
        return tqdm(
            total=total,
            initial=initial,
            leave=False,
            file=sys.stderr if self._live else _Lines(),
            bar_format=known if total else name + " {n_fmt}",
            mininterval=0.1 if self._live else _EVERY,
            delay=0 if self._live else 1e-3,  # without a line for no progress at all
            miniters=1,
            smoothing=0,  # the mean speed, with the evaluations between the steps
            dynamic_ncols=self._live,
        )


class _Lines:
    """A file for tqdm, which prints each of its states as a line."""

    def write(self, text: str) -> None:
        if text.startswith("\r") and text.strip():  # the others move the cursor
            print(text.strip(), flush=True)

    def flush(self) -> None:
        """Return at once: each line is flushed as it is printed."""


def _figures(logs: Mapping[str, Any], prefix: str = "") -> str:
    return ", ".join(form.format(logs[prefix + key]) for key, form in _FIGURES.items() if prefix + key in logs)
