"""The tasks and the sets of pairs of docs/answers.py: pure functions of prompts, sampled answers and a seed."""

import json
import random
import re
from typing import Any, NamedTuple

from apo_trl.checks import broken
from apo_trl.io.resources import DEMO_PAIRS
from apo_trl.pairs import instructions

PAIRS = 128  # of every set
SAMPLES = 4  # answers of the model to a prompt at temperature 0.8
OFF_POLICY = 2  # answers at a higher temperature, in the place of a third model


class Task(NamedTuple):
    """Prompts to train on and held-out ones, rows with `id`, `prompt`, `kind` and the columns of the two functions."""

    train: list[dict]
    test: list[dict]
    reward: Any
    revise: Any
    max_tokens: int


def load_task(name: str) -> Task:
    if name == "instructions":
        folder = DEMO_PAIRS.parent / "instructions"
        rows = [_read(folder / f"{split}.jsonl") for split in ("train", "test")]
        return Task(*rows, instructions.reward, instructions.revise, 64)
    notes = [_note(number) for number in range(480 + 96)]
    return Task(notes[:480], notes[480:], note_reward, note_revise, 48)


def _read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


_NAMES = "Anna Ben Clara David Emma Felix Greta Hugo Ida Jonas Karl Lena Mia Noah Olga Paul Rosa Sam".split()  # noqa: SIM905
_CITIES = "Paris Leeds Oslo Rome Madrid Vienna Dublin Lisbon Prague Athens Berlin Warsaw".split()  # noqa: SIM905
_THINGS = "apples lamps books chairs pens cups keys maps bags hats".split()  # noqa: SIM905


def _note(number: int) -> dict:
    """A note on one to three people, and a question about one of them. A note occurs once, so that test is held out."""
    chance = random.Random(f"note {number}")
    people = 1 + number % 3
    draws = [chance.sample(pool, people) for pool in (_NAMES, _CITIES, range(2, 20), _THINGS)]
    note = " ".join("{} from {} bought {} {}.".format(*row) for row in zip(*draws, strict=True))
    names, cities, counts, things = draws
    at = chance.randrange(people)
    kind, question, values, sentence = [
        ("where", f"Where is {names[at]} from?", cities, f"{names[at]} is from {{}}."),
        ("how many", f"How many {things[at]} did {names[at]} buy?", counts, f"{names[at]} bought {{}} {things[at]}."),
        ("who", f"Who bought the {things[at]}?", names, f"{{}} bought the {things[at]}."),
        ("what", f"What did {names[at]} buy?", things, f"{names[at]} bought {{}}."),
    ][number // 3 % 4]
    return {
        "id": f"note-{number}", "prompt": f"{note} {question}", "kind": kind, "answer": str(values[at]),
        "others": [str(value) for value in values if value != values[at]], "sentence": sentence,
    }  # fmt: skip


def _has(text: str, value: str) -> bool:
    return re.search(rf"\b{re.escape(value)}\b", text, re.I) is not None


def note_reward(completions, answer, others, **columns) -> list[float]:
    """1.0 for an answer that names the asked value and no other of its kind, or another number."""
    return [float(_right(*row)) for row in zip(completions, answer, others, strict=True)]


def _right(text: str, answer: str, others: list[str]) -> bool:
    numbers = set(re.findall(r"\d+", text)) - {answer} if answer.isdigit() else set()
    return _has(text, answer) and not any(_has(text, value) for value in others) and not numbers and not broken(text)


def note_revise(completions, answer, others, sentence, **columns) -> list[str | None]:
    """The first sentence that is right alone, or that is right with its wrong value replaced; else a plain sentence."""
    return [_corrected(*row) for row in zip(completions, answer, others, sentence, strict=True)]


def _corrected(text: str, answer: str, others: list[str], sentence: str) -> str | None:
    if _right(text, answer, others):
        return None
    parts = [part.strip() for part in re.split(r"(?<=[.!?])\s+|\n+", text) if len(part.split()) > 2]
    if kept := [part for part in parts if _right(part, answer, others)]:
        return kept[0]
    for part in parts:
        wrong = [value for value in others if _has(part, value)]
        if len(wrong) == 1 and _right(made := re.sub(rf"\b{wrong[0]}\b", answer, part, flags=re.I), answer, others):
            return made
    return sentence.format(answer)


def clair(task: Task, samples: dict, seed: int) -> list[dict]:
    """The model's own answer, and its smallest revision that follows."""
    rows = _shuffled(task.train, seed)
    revised = _revise(task, rows, [samples[row["id"]][0] for row in rows])
    return [_pair(row, new, samples[row["id"]][0]) for row, new in zip(rows, revised, strict=True) if new]


def stronger(task: Task, samples: dict, seed: int) -> list[dict]:
    """The same rejected answers; chosen follows as well, and is made of another answer, without a look at rejected."""
    pairs = []
    for pair in clair(task, samples, seed):
        row, others = pair["row"], samples[pair["row"]["id"]][1:SAMPLES]
        revised = _revise(task, [row] * len(others), others)
        scores = task.reward(completions=others, **_columns([row] * len(others)))
        good = [text if score else new for text, score, new in zip(others, scores, revised, strict=True)]
        if good := [text for text in good if text and text != pair["chosen"][0]["content"]]:
            pairs.append(_pair(row, good[0], pair["rejected"][0]["content"]))
    return pairs


def on_policy(task: Task, samples: dict, seed: int) -> list[dict]:
    """The best and the worst of the model's own answers; no pair if all follow or none."""
    return _judged(task, {key: texts[:SAMPLES] for key, texts in samples.items()}, seed)


def off_policy(task: Task, samples: dict, seed: int) -> list[dict]:
    """The better and the worse of two answers at a higher temperature, which the model itself seldom gives."""
    return _judged(task, {key: texts[SAMPLES:] for key, texts in samples.items()}, seed)


def _judged(task: Task, samples: dict, seed: int) -> list[dict]:
    pairs = []
    for row in _shuffled(task.train, seed):
        texts = samples[row["id"]]
        scores = task.reward(completions=texts, **_columns([row] * len(texts)))
        if max(scores) > min(scores):
            pairs.append(_pair(row, texts[scores.index(max(scores))], texts[scores.index(min(scores))]))
    return pairs


def worse(task: Task, samples: dict, seed: int) -> list[dict]:
    """Both answers are worse than one of the model's own, which follows: neither does, and words are missing."""
    pairs = []
    for row in _shuffled(task.train, seed):
        texts = samples[row["id"]]
        scores = task.reward(completions=texts, **_columns([row] * len(texts)))
        bad = [text for text, score in zip(texts, scores, strict=True) if not score and len(text.split()) > 5]
        if not any(scores[:SAMPLES]) or not bad:
            continue
        words = bad[0].split()
        chosen = " ".join(word for at, word in enumerate(words) if at % 5 != 4)
        rejected = " ".join(random.Random(f"{seed} {row['id']}").sample(words, len(words)))
        if not any(task.reward(completions=[chosen, rejected], **_columns([row] * 2))) and chosen != rejected:
            pairs.append(_pair(row, chosen, rejected))
    return pairs


def mixture(task: Task, samples: dict, seed: int, share: int) -> list[dict]:
    """`share` per cent of pairs whose chosen answer beats the model's own (`clair`), the others from `worse`."""
    good = round(PAIRS * share / 100)
    better = [pair | {"chosen_wins": 1.0} for pair in clair(task, samples, seed)[:good]]
    rest = [pair | {"chosen_wins": 0.0} for pair in worse(task, samples, seed)[: PAIRS - good]]
    return _shuffled(better + rest, seed)


SETS = {"clair": clair, "stronger": stronger, "on-policy": on_policy, "off-policy": off_policy}


def _shuffled(rows: list, seed: int) -> list:
    return random.Random(seed).sample(rows, len(rows))


def _columns(rows: list[dict]) -> dict[str, list]:
    return {name: [row[name] for row in rows] for name in rows[0] if name not in ("id", "prompt")}


def _revise(task: Task, rows: list[dict], texts: list[str]) -> list[str | None]:
    return task.revise(completions=texts, **_columns(rows))


def _pair(row: dict, chosen: str, rejected: str) -> dict:
    return {
        "row": row,
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }
