"""The four sets of pairs that docs/evidence.py trains on, made of the CLAIR pairs: functions of rows and a seed."""

import random

HELD_OUT = 40


def split(rows: list[dict], seed: int) -> tuple[list[dict], list[dict]]:
    """Give the rows to train on and those held out, another choice for every seed."""
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    return [rows[at] for at in order[HELD_OUT:]], [rows[at] for at in order[:HELD_OUT]]


def clair(rows: list[dict]) -> list[dict]:
    """The CLAIR pairs: the model's own answer, and that answer minimally revised."""
    return [{key: row[key] for key in ("id", "prompt", "chosen", "rejected")} | {"kind": "clair"} for row in rows]


def unrelated(rows: list[dict], samples: dict[str, str]) -> list[dict]:
    """The same chosen answers; rejected is another answer of the model, sampled and not the one that was revised."""
    return [row | {"rejected": answer(samples[row["id"]]), "kind": "unrelated"} for row in clair(rows)]


def lengths(rows: list[dict], seed: int) -> list[dict]:
    """Every second row as it is; the others in groups of five, which become one pair of five questions and answers."""
    made = clair(rows)
    short, rest = made[::2], made[1::2]
    long = []
    for at in range(0, len(rest) - len(rest) % 5, 5):
        group = rest[at : at + 5]
        joined = {
            side: "\n".join(f"{number}. {row[side][0]['content']}" for number, row in enumerate(group, start=1))
            for side in ("prompt", "chosen", "rejected")
        }
        long.append(
            {
                "id": "+".join(row["id"] for row in group),
                "prompt": [{"role": "user", "content": joined["prompt"]}],
                "chosen": answer(joined["chosen"]),
                "rejected": answer(joined["rejected"]),
            }
        )
    pairs = [row | {"kind": "short"} for row in short] + [row | {"kind": "long"} for row in long]
    return random.Random(seed).sample(pairs, len(pairs))


def mixture(rows: list[dict], seed: int) -> list[dict]:
    """Half of the rows as they are (chosen beats the model), half with both answers worse than the model's own.

    There the chosen answer is the model's own with every fifth word gone, the rejected one is it in a random order.
    """
    pairs = []
    for number, row in enumerate(clair(rows)):
        if number % 2 == 0:
            pairs.append(row | {"kind": "better", "chosen_wins": 1.0})
            continue
        words = row["rejected"][0]["content"].split()
        kept = [word for at, word in enumerate(words) if at % 5 != 4] if len(words) > 4 else words[:-1] or words
        mixed = random.Random(f"{seed} {row['id']}").sample(words, len(words))
        if mixed == kept:
            mixed = mixed[::-1]
        pairs.append(
            row
            | {
                "chosen": answer(" ".join(kept)),
                "rejected": answer(" ".join(mixed)),
                "kind": "worse",
                "chosen_wins": 0.0,
            }
        )
    return pairs


def answer(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]
