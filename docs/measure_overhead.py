"""Measure what our metrics and checks cost in a step: stock DPOTrainer and APOTrainer in turn, in one process.

    python docs/measure_overhead.py [--model FOLDER] [--steps N] [--repeats N]

Without --model it takes the demo's. Prints the median time of a step of each and their ratio; the first step of every
run does not count.
"""

import argparse
import statistics
import tempfile
import time
import warnings

warnings.filterwarnings("ignore", category=FutureWarning)

from datasets import load_dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from apo_trl import APOConfig, APOTrainer
from apo_trl.io.resources import DEMO_PAIRS
from apo_trl.models.packaged import smollm2


class Clock(TrainerCallback):
    def __init__(self):
        self.times = []

    def on_step_begin(self, *args, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.times.append(time.perf_counter() - self.started)


def steps(trainer_class, config_class, options):
    """Train a few steps with the same data and settings, and give the time of each but the first."""
    clock = Clock()
    config = config_class(
        tempfile.mkdtemp(), loss_type="apo_zero", max_steps=options.steps + 1, per_device_train_batch_size=4,
        use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no",
        logging_steps=1000, disable_tqdm=True, model_init_kwargs={"dtype": "bfloat16"},
        padding_free=False,  # both with padding: what is measured is what we add
    )  # fmt: skip
    trainer_class(
        model=options.model or str(smollm2()),
        args=config,
        train_dataset=load_dataset(str(DEMO_PAIRS), split="train"),
        peft_config=LoraConfig(r=16, target_modules="all-linear"),
        callbacks=[clock],
    ).train()
    return clock.times[1:]


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model")
parser.add_argument("--steps", type=int, default=6)
parser.add_argument("--repeats", type=int, default=3)
options = parser.parse_args()
times = {"TRL": [], "apo-trl": []}
for _ in range(options.repeats):
    times["TRL"] += steps(DPOTrainer, DPOConfig, options)
    times["apo-trl"] += steps(APOTrainer, APOConfig, options)
medians = {name: statistics.median(values) for name, values in times.items()}
for name, median in medians.items():
    print(f"{name:8} {1000 * median:9.2f} ms a step (median of {len(times[name])})")
print(f"ratio    {medians['apo-trl'] / medians['TRL']:9.3f}")
