"""What the runs of docs/answers.py say: shares with intervals, verdicts on the claims, tables and the figure."""

import statistics
from pathlib import Path

import numpy as np
from answers import LOSSES, ROUNDS, SEEDS, SHARES, STEPS, TASKS, planned, run_of
from evidence_figures import fill, table

HERE = Path(__file__).parent
PAGE = HERE / "answers.md"
FIGURE = HERE / "evidence" / "answers.png"
SETS = {
    "clair": "revisions",
    "on-policy": "on-policy judge",
    "off-policy": "off-policy judge",
    "stronger": "stronger preferred",
}
TITLES = {"instructions": "Instructions", "notes": "Notes"}
NEAR = 0.05  # "at least as good": not more than five points worse


def of(results: list[dict], task: str, data: str, method: str, steps: int | None = None, part: int | None = None):
    """Return the stored results of a row by seed; `part` is the number of a round."""
    run = {"task": task, "data": data, "method": method}
    found = [one for one in results if {**run, "seed": one["run"]["seed"]} | _steps(steps) == one["run"]]
    found.sort(key=lambda one: one["run"]["seed"])
    return found if part is None else [one["rounds"][part - 1] | {"run": one["run"]} for one in found]


def _steps(steps: int | None) -> dict:
    return {} if steps is None else {"steps": steps}


def matrix(found: list[dict]) -> np.ndarray:
    """Return followed, 0 or 1, as seeds x prompts."""
    return np.array([one["followed"] for one in found], dtype=float)


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Return the mean of seeds x prompts and its 95 % interval, a bootstrap over seeds and over prompts."""
    chance = np.random.default_rng(0)
    seeds, prompts = values.shape
    rows, columns = chance.integers(seeds, size=(2000, seeds)), chance.integers(prompts, size=(2000, prompts))
    means = [values[row][:, column].mean() for row, column in zip(rows, columns, strict=True)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def difference(results: list[dict], task: str, first: dict, second: dict) -> tuple[tuple | None, int]:
    """Return how many more prompts the first row follows, with its interval, and the number of seeds."""
    found = [{one["run"]["seed"]: one for one in of(results, task, **row)} for row in (first, second)]
    seeds = sorted(found[0].keys() & found[1].keys())
    one, two = (matrix([results[seed] for seed in seeds]) for results in found)
    return (interval(one - two) if seeds else None), len(seeds)


def rows(task: str) -> list[tuple[str, dict]]:
    """Every row of the table of a task: its label and its runs."""
    named = [("the model before", {"data": "none", "method": "before"})]
    named += [("SFT on chosen", {"data": "clair", "method": "sft"})]
    named += [
        (f"{words}, {loss}", run_of(data, method)) for data, words in SETS.items() for loss, method in LOSSES.items()
    ]
    named += [("revisions, apo_zero_norm", {"data": "clair", "method": "apo_zero_norm"})]
    named += [(f"RLOO, {data}", {"data": data, "method": "rloo"}) for data in ("verifier", "reward model")]
    named += [(f"revisions, APO-zero, round {part}", ROUNDS | {"part": part}) for part in (2, 3)]
    return [
        *named,
        ("revisions, APO-zero, 3 times the steps", {"data": "clair", "method": "apo_zero", "steps": 3 * STEPS}),
    ]


def _share(values: np.ndarray) -> str:
    mean, low, high = (f"{100 * value:.0f}" for value in interval(values))
    return f"{mean} % ({low} to {high})"


def _mean(found: list[dict], name: str) -> float | None:
    values = [one[name] for one in found if one.get(name) is not None]
    return statistics.fmean(values) if values else None


def _line(label: str, found: list[dict], kinds: list[str]) -> list[str]:
    if not found:
        return [label, "not run", *[""] * (len(kinds) + 8)]
    values = matrix(found)
    of_kind = np.array(found[0]["kinds"])
    numbers = [(_mean(found, name), form) for name, form in (("kl", ".2f"), ("words", ".0f"))]
    broken = statistics.fmean(one["broken"] for one in found) / values.shape[1]
    numbers += [(broken, ".0%"), (_mean(found, "displaced"), ".0%"), (_mean(found, "pairs"), ".0f")]
    numbers += [(_mean(found, "tokens"), ",.0f"), (statistics.fmean(one["cpu"] for one in found) / 60, ".1f")]
    numbers += [(len(found), "d")]
    return [
        label,
        _share(values),
        *(f"{100 * values[:, of_kind == kind].mean():.0f} %" for kind in kinds),
        *("" if value is None else f"{value:{form}}".replace("%", " %") for value, form in numbers),
    ]


def main_table(results: list[dict], task: str) -> str:
    before = of(results, task, "none", "before")
    kinds = sorted(set(before[0]["kinds"])) if before else []
    head = ["", "followed", *kinds, "KL", "words", "broken", "displaced", "pairs", "tokens", "CPU minutes", "seeds"]
    lines = [_line(label, of(results, task, **row), kinds) for label, row in rows(task)]
    return table([name.replace("_", " ") for name in head], lines)


def shares_table(results: list[dict]) -> str:
    """The table of the anchor's advice: followed by the share of winners that beat the policy."""
    lines = []
    for share in SHARES:
        runs = [run_of(f"{share} %", method) for method in ("apo_zero", "apo_down", "apo_blend")]
        found = [of(results, "instructions", **run) for run in runs]
        cells = [_share(matrix(one)) if one else "not run" for one in found]
        gap, _ = difference(results, "instructions", *runs[:2])
        lines.append([f"{share} %", *cells, _gap(gap)])
    losses = ["APO-zero", "APO-down", "APO-blend"]
    return table(["winners that beat the policy", *losses, "APO-zero minus APO-down"], lines)


def _gap(gap: tuple[float, float, float] | None) -> str:
    return "not run" if gap is None else "{:+.0f} points ({:+.0f} to {:+.0f})".format(*(100 * value for value in gap))


ZERO, DOWN, DPO = (run_of("clair", method) for method in LOSSES.values())

CLAIMS: list[tuple[str, dict, dict, float]] = [
    ("Revisions beat the on-policy judge's pairs", ZERO, {"data": "on-policy", "method": "apo_zero"}, 0),
    ("Revisions beat the off-policy judge's pairs", ZERO, {"data": "off-policy", "method": "apo_zero"}, 0),
    ("Revisions beat pairs with a stronger answer", ZERO, {"data": "stronger", "method": "apo_zero"}, 0),
    ("APO-zero is at least as good as DPO on revisions", ZERO, DPO, -NEAR),
    ("On revisions APO-zero beats APO-down", ZERO, DOWN, 0),
    ("Stronger preferred helps less than the on-policy judge's pairs", {"data": "on-policy", "method": "apo_zero"},
     {"data": "stronger", "method": "apo_zero"}, 0),
    ("If all winners are worse than the model, APO-down beats APO-zero", {"data": "0 %", "method": "apo_down"},
     {"data": "0 %", "method": "apo_zero"}, 0),
    ("Three rounds beat three times the steps on the first round's pairs",
     ROUNDS | {"part": 3}, {"data": "clair", "method": "apo_zero", "steps": 3 * STEPS}, 0),
    ("Revisions with APO-zero beat RLOO with the verifier at equal generated tokens", ZERO,
     {"data": "verifier", "method": "rloo"}, 0),
    ("The verifier beats a reward model in RLOO", {"data": "verifier", "method": "rloo"},
     {"data": "reward model", "method": "rloo"}, 0),
]  # fmt: skip
"""Written before the runs: the sentence, the row that should follow more, the other, and the least difference."""


def verdict(gap: tuple[float, float, float] | None, least: float, seeds: int = len(SEEDS)) -> str:
    """Return what a difference and its interval decide, if every seed has run."""
    if gap is None:
        return "not run"
    if seeds < len(SEEDS):
        return f"open: {seeds} of {len(SEEDS)} seeds"
    _, low, high = gap
    return "holds" if low > least else "does not hold" if high < least else "undecided"


def claims_table(results: list[dict]) -> str:
    lines = []
    for sentence, first, second, least in CLAIMS:
        tasks = [task for task in TASKS if not first["data"].endswith("%") or task == "instructions"]
        for task in tasks:
            gap, seeds = difference(results, task, first, second)
            lines.append([sentence, TITLES[task].lower(), _gap(gap), verdict(gap, least, seeds)])
    for task in TASKS:
        zero, dpo = (of(results, task, **row) for row in (ZERO, DPO))
        gap, decided = "not run", "not run"
        if len(zero) == len(dpo) == len(SEEDS):
            ratios = [one["kl"] / two["kl"] for one, two in zip(zero, dpo, strict=True)]
            gap = f"{statistics.fmean(ratios):.2f} times the KL ({min(ratios):.2f} to {max(ratios):.2f})"
            decided = "holds" if max(ratios) < 1 else "does not hold" if min(ratios) > 1 else "undecided"
        lines.append(["APO-zero moves less than DPO on revisions", TITLES[task].lower(), gap, decided])
    return table(["claim", "task", "difference", "verdict"], lines)


def tables(results: list[dict]) -> dict[str, str]:
    """Every table of the page by its name."""
    stored = sum(run in [result["run"] for result in results] for run in planned())
    hours = sum(result["cpu"] for result in results) / 3600
    return {
        "stored": f"{stored} of {len(planned())} runs are stored; they took {hours:.1f} hours of CPU time.",
        **{task: main_table(results, task) for task in TASKS},
        "claims": claims_table(results),
        "shares": shares_table(results),
    }


def write_page(results: list[dict]) -> None:
    fill(PAGE, tables(results))


def draw(results: list[dict]) -> None:
    """Draw followed with its interval for every row that is stored, and by the share of better winners."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    blue, orange, green, grey = "#0072B2", "#E69F00", "#009E73", "#777777"
    figure, panels = pyplot.subplots(1, 3, figsize=(13, 6), layout="constrained", width_ratios=[1, 1, 0.8])
    for axes, task in zip(panels, TASKS, strict=False):
        named = rows(task)
        for at, (label, row) in enumerate(named):
            if found := of(results, task, **row):
                mean, low, high = (100 * value for value in interval(matrix(found)))
                colour = grey if row["method"] == "before" else orange if row["method"] == "rloo" else blue
                axes.plot([low, high], [at, at], color=colour, linewidth=2)
                axes.plot(mean, at, "o", color=colour, label=label)
                if row["method"] == "before":
                    axes.axvline(mean, color=grey, linewidth=1, linestyle="--")
        axes.set_yticks(range(len(named)), [label for label, _ in named] if axes is panels[0] else [])
        axes.set(title=TITLES[task], xlabel="followed, %", xlim=(0, 100), ylim=(len(named) - 0.5, -0.5))
    axes = panels[2]
    for method, label, colour, mark in (
        ("apo_zero", "APO-zero", blue, "o"),
        ("apo_down", "APO-down", orange, "s"),
        ("apo_blend", "APO-blend", green, "^"),
    ):
        found = {share: of(results, "instructions", **run_of(f"{share} %", method)) for share in SHARES}
        points = {share: [100 * value for value in interval(matrix(one))] for share, one in found.items() if one}
        axes.plot(list(points), [point[0] for point in points.values()], f"{mark}-", color=colour, label=label)
        for share, (_, low, high) in points.items():
            axes.plot([share, share], [low, high], color=colour, linewidth=1)
    axes.set(xlim=(-5, 105), ylim=(0, 100), xlabel="share, %", ylabel="followed, %")
    axes.set_title("Winners that beat the policy")
    axes.legend(frameon=False)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(FIGURE, dpi=110)
    pyplot.close(figure)
