"""Sample the rejected answers of the demo pairs again and print which differ: `python docs/sample_demo_pairs.py`.

They are the answers of SmolLM2-135M-Instruct, decoded greedily in float32, one prompt at a time. Another version of
torch, or another processor, may round a tie the other way.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

from apo_trl.io.resources import DEMO_PAIRS
from apo_trl.models.packaged import smollm2

MAX_NEW_TOKENS = 96


def demo_rows() -> list[dict[str, Any]]:
    """Load the rows of both splits."""
    files = [DEMO_PAIRS / f"{split}.jsonl" for split in ("train", "test")]
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def sample(prompts: list[list[dict[str, str]]]) -> Iterator[str]:
    """Return the model's answer to each conversation."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for prompt in prompts:
        inputs = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        yield tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    from tqdm import tqdm

    rows = demo_rows()
    answers = tqdm(sample([row["prompt"] for row in rows]), total=len(rows), unit="answer")
    changed = [row["id"] for row, answer in zip(rows, answers, strict=True) if answer != row["rejected"][0]["content"]]
    print(f"{len(rows) - len(changed)} of {len(rows)} answers are the same.")
    if changed:
        sys.exit(f"Different: {', '.join(changed)}")


if __name__ == "__main__":
    main()
