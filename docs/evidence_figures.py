"""What the runs of docs/evidence.py say: which there are, their shares and means, tables for the page, pictures."""

import re
import statistics
from pathlib import Path

HERE = Path(__file__).parent
STORE = HERE / "evidence"
PAGE = HERE / "evidence.md"

SEEDS = (0, 1, 2)
LOSSES = ("apo_zero", "apo_down", "sigmoid")
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
BETA = 0.5
NAMES = {"sigmoid": "DPO", "apo_zero": "APO-zero", "apo_down": "APO-down", "apo_blend": "APO-blend",
         "apo_zero_norm": "APO-zero, per token"}  # fmt: skip


def planned(rate: float) -> list[dict]:
    """Every run after the sweep, by what it compares; the losses on revisions also at twice the learning rate."""
    runs = [{"data": "clair", "loss": loss, "seed": seed} for loss in LOSSES for seed in SEEDS]
    twice = [run | {"rate": 2 * rate, "beta": BETA} for run in runs]
    runs += [{"data": "unrelated", "loss": loss, "seed": seed} for loss in LOSSES for seed in SEEDS]
    runs += [{"data": "lengths", "loss": loss, "seed": s} for loss in ("apo_zero", "apo_zero_norm") for s in SEEDS]
    runs += [
        {"data": "mixture", "loss": loss, "seed": seed}
        for loss in ("apo_zero", "apo_down", "apo_blend")
        for seed in SEEDS
    ]
    return [run | {"rate": rate, "beta": BETA} for run in runs] + twice


def swept() -> list[dict]:
    return [{"data": "clair", "loss": loss, "seed": 0, "rate": rate, "beta": BETA} for rate in RATES for loss in LOSSES]


def chosen_rate(results: list[dict]) -> float:
    """Of the rates whose held-out accuracy, over the losses, is within one pair of the best, the middle one.

    Less than one pair of 40 is noise, and the middle is furthest from where nothing moves and from where all breaks.
    """
    found = {rate: _mean_over_losses(of_rate(results, rate))[0] for rate in RATES}
    good = [rate for rate in RATES if found[rate] > max(found.values()) - 1 / 40 - 1e-9]
    return good[(len(good) - 1) // 2]


def of_rate(results: list[dict], rate: float) -> list[dict[str, float]]:
    """The shares of one rate of the sweep, by loss."""
    runs = [run for run in swept() if run["rate"] == rate]
    return [shares(result) for run in runs for result in results if result["run"] == run]


def _mean_over_losses(found: list[dict[str, float]]) -> tuple[float, float]:
    """Accuracy and margin, in nats."""
    margins = [one["chosen"] - one["rejected"] for one in found]
    return statistics.fmean(one["accuracy"] for one in found), statistics.fmean(margins)


def shares(result: dict, kind: str | None = None) -> dict[str, float]:
    """Shares and means over the held-out pairs of a run, of one kind or all; log-ratios in nats."""
    pairs = [pair for pair in result["held_out"] if kind in (None, pair["kind"])]
    return {
        "chosen": statistics.fmean(pair["c"] for pair in pairs),
        "rejected": statistics.fmean(pair["r"] for pair in pairs),
        "chosen_up": statistics.fmean(pair["c"] > 0 for pair in pairs),
        "rejected_down": statistics.fmean(pair["r"] < 0 for pair in pairs),
        "displaced": statistics.fmean(pair["r"] < pair["c"] < 0 for pair in pairs),
        "accuracy": statistics.fmean(pair["c"] > pair["r"] for pair in pairs),
        "chosen_per_token": statistics.fmean(pair["c"] / pair["n"][0] for pair in pairs),
        "rejected_per_token": statistics.fmean(pair["r"] / pair["n"][1] for pair in pairs),
    }


def of_loss(results: list[dict], data: str, loss: str, times: int = 1) -> list[dict]:
    """The runs of one loss on one set after the sweep, by seed, at so many times the learning rate."""
    rate = chosen_rate(results)
    wanted = [
        run for run in planned(rate) if [run[key] for key in ("data", "loss", "rate")] == [data, loss, times * rate]
    ]
    found = [result for run in wanted for result in results if result["run"] == run]
    if len(found) != len(SEEDS):
        raise SystemExit(f"There are {len(found)} of {len(SEEDS)} runs of {loss} on {data}; run `make evidence`.")
    return found


def over_seeds(
    results: list[dict], data: str, loss: str, kind: str | None = None, times: int = 1
) -> dict[str, list[float]]:
    """Each figure for each seed, of the runs after the sweep."""
    each = [shares(result, kind) for result in of_loss(results, data, loss, times)]
    return {name: [one[name] for one in each] for name in each[0]}


def _cell(values: list[float], share: bool = False) -> str:
    scale, form = (100, ".0f") if share else (1, "+.1f")
    mean, low, high = (
        f"{scale * value + 1e-9:{form}}" for value in (statistics.fmean(values), min(values), max(values))
    )
    return f"{mean}{' %' if share else ''} ({low} to {high})"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def tables(results: list[dict]) -> dict[str, str]:
    """Every table of the page by its name."""
    taken, sweep = chosen_rate(results), []
    for rate in RATES:
        found = of_rate(results, rate)
        cells = [f"{one['accuracy']:.1%}, {one['chosen']:+.1f}, {one['rejected']:+.1f}" for one in found]
        accuracy, margin = _mean_over_losses(found)
        sweep.append([f"{rate:.0e}{' (taken)' * (rate == taken)}", *cells, f"{accuracy:.1%}", f"{margin:.1f}"])
    whole = ["chosen", "rejected", "chosen_up", "rejected_down", "displaced", "accuracy"]
    head = ["", "chosen", "rejected", "chosen up", "rejected down", "displaced", "accuracy"]

    def line(data: str, loss: str, label: str = "", times: int = 1) -> list[str]:
        found = over_seeds(results, data, loss, times=times)
        return [
            label or NAMES[loss],
            *(_cell(found[name], "_" in name or name in ("displaced", "accuracy")) for name in whole),
        ]

    per_token = []
    for loss in ("apo_zero", "apo_zero_norm"):
        for kind in ("short", "long"):
            found = over_seeds(results, "lengths", loss, kind)
            cells = [_cell([100 * value for value in found[f"{side}_per_token"]]) for side in ("chosen", "rejected")]
            more = [_cell(found[name], True) for name in ("chosen_up", "rejected_down", "displaced")]
            per_token.append([f"{NAMES[loss]}: {kind} pairs", *cells, *more])
    blend = []
    for loss in ("apo_zero", "apo_down", "apo_blend"):
        better, worse = (over_seeds(results, "mixture", loss, kind) for kind in ("better", "worse"))
        right = [(up + 1 - down) / 2 for up, down in zip(better["chosen_up"], worse["chosen_up"], strict=True)]
        cells = [_cell(side["chosen"]) for side in (better, worse)]
        cells += [_cell(found, True) for found in (right, better["accuracy"], worse["accuracy"])]
        blend.append([NAMES[loss], *cells])
    return {
        "sweep": table(["learning rate", *(NAMES[loss] for loss in LOSSES), "mean accuracy", "mean margin"], sweep),
        "losses": table(
            head,
            [line("clair", loss) for loss in LOSSES]
            + [line("clair", loss, label=f"{NAMES[loss]}, twice the rate", times=2) for loss in LOSSES],
        ),
        "pairs": table(
            head,
            [line(data, loss, label=f"{NAMES[loss]}, {words}") for loss in LOSSES
             for data, words in (("clair", "revisions"), ("unrelated", "unrelated"))],
        ),
        "lengths": table(
            ["", "chosen, nats per 100 tokens", "rejected", "chosen up", "rejected down", "displaced"], per_token
        ),
        "mixture": table(
            ["", "better winners, nats", "worse winners, nats", "winners moved the right way", "accuracy, better",
             "accuracy, worse"], blend
        ),
    }  # fmt: skip


def write_page(results: list[dict]) -> None:
    fill(PAGE, tables(results))


def fill(page: Path, tables: dict[str, str]) -> None:
    """Put the tables into a page, between the marks that name them."""
    text = page.read_text(encoding="utf-8")
    for name, lines in tables.items():
        text, count = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)",
            lambda found, lines=lines: f"{found[1]}{lines}\n{found[2]}",
            text,
            flags=re.S,
        )
        assert count == 1, f"the page has {count} places for the table {name}"
    page.write_text(text, encoding="utf-8")


def draw(results: list[dict]) -> None:
    """Draw the held-out pairs by loss, and the other comparisons, as PNG beside the results."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    blue, orange, green, grey = "#0072B2", "#E69F00", "#009E73", "#777777"

    for data, name in (("clair", "losses"), ("unrelated", "unrelated")):
        figure, panels = pyplot.subplots(1, 3, figsize=(12, 4.2), layout="constrained", sharex=True, sharey=True)
        for axes, loss in zip(panels, LOSSES, strict=True):
            for result in of_loss(results, data, loss):
                pairs = result["held_out"]
                axes.scatter(
                    [pair["c"] for pair in pairs], [pair["r"] for pair in pairs], s=22, alpha=0.75, color=blue,
                    marker="o^s"[result["run"]["seed"]], edgecolor="white", linewidth=0.4,
                    label=f"seed {result['run']['seed']}",
                )  # fmt: skip
            axes.axhline(0, color=grey, linewidth=1, linestyle="--")
            axes.axvline(0, color=grey, linewidth=1, linestyle="--")
            axes.axline((0, 0), slope=1, color=grey, linewidth=0.8, linestyle=":")
            found = over_seeds(results, data, loss)
            axes.set_title(f"{NAMES[loss]}: {statistics.fmean(found['displaced']):.0%} displaced")
            axes.set_xlabel("log-ratio of chosen (nats)")
        panels[0].set_ylabel("log-ratio of rejected (nats)")
        panels[0].legend(frameon=False, fontsize=9)
        figure.savefig(STORE / f"{name}.png", dpi=110)
        pyplot.close(figure)

    def bars(axes, groups: list[tuple[str, list[float]]], colours, hatches) -> None:
        for at, (_, values) in enumerate(groups):
            mean = statistics.fmean(values)
            axes.bar(at, mean, color=colours[at], hatch=hatches[at], edgecolor="white", width=0.75)
            axes.plot([at, at], [min(values), max(values)], color="black", linewidth=1.5)
            axes.plot([at] * len(values), values, ".", color="black", markersize=5)
        axes.axhline(0, color=grey, linewidth=1)
        axes.set_xticks(range(len(groups)), [label for label, _ in groups], fontsize=9)

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    groups, colours, hatches = [], [], []
    for loss in ("apo_zero", "apo_zero_norm"):
        for kind in ("short", "long"):
            found = over_seeds(results, "lengths", loss, kind)
            values = [
                100 * (c - r) for c, r in zip(found["chosen_per_token"], found["rejected_per_token"], strict=True)
            ]
            groups.append((f"{'per token' if 'norm' in loss else 'sum'}:\n{kind} pairs", values))
            colours.append(blue if kind == "short" else orange)
            hatches.append("" if kind == "short" else "//")
    bars(left, groups, colours, hatches)
    left.set(title="APO-zero on pairs of one and of five answers", ylabel="margin, nats per 100 tokens")
    groups, colours, hatches = [], [], []
    for loss in ("apo_zero", "apo_down", "apo_blend"):
        for kind in ("better", "worse"):
            groups.append((f"{NAMES[loss]}:\n{kind}", over_seeds(results, "mixture", loss, kind)["chosen"]))
            colours.append(green if kind == "better" else orange)
            hatches.append("" if kind == "better" else "//")
    bars(right, groups, colours, hatches)
    right.set(title="Winners better and worse than the model", ylabel="log-ratio of chosen (nats)")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(STORE / "comparisons.png", dpi=110)
    pyplot.close(figure)
