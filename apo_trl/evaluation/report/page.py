"""The HTML of a report: one file that needs no other, no script and no host, on screen and on paper.

Whatever comes from a log, a folder's name or a dataset goes through `_text`, and nothing else puts it into the page.
"""

import base64
import html
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apo_trl.evaluation.intervals import wilson

if TYPE_CHECKING:
    from apo_trl.evaluation.report.figures import Panel
    from apo_trl.evaluation.report.runs import Run

__all__ = ["page"]

# Of APOConfig, for runs of `apo-trl train` on pairs: run.json holds only what differs. A test compares them.
_DEFAULTS = {"loss_type": "apo_zero", "beta": "0.1", "learning_rate": "1e-06"}
_SIDE_BY_SIDE = 4  # runs in one table; more would not fit on paper
_DISPLACED = 10
_PREVIEW, _LINES, _WHOLE = 280, 7, 20_000  # characters, lines, characters

_SECTIONS = {
    "rewards": (
        "Rewards",
        "Mean rewards, beta times the log-ratio of policy and reference. The dotted line at 0 is the anchor, where the"
        " model says what the reference says. Chosen answers are solid lines with filled markers, rejected ones dashed"
        " with empty markers; the thin lines without markers are training.",
    ),
    "regimes": (
        "Regimes",
        "What became of the two sides of each pair. Separated: chosen rose and rejected fell. Both up: both rose."
        " Displaced: the margin is right, and still the chosen answer fell. Rest: none of these, as all pairs are at"
        " the first step. The areas lie in this order from the bottom.",
    ),
    "pairs": (
        "Held-out pairs, before and after",
        "Each pair by its log-probs per token (nats): an empty circle under the reference, before training, and at the"
        " end of the arrow under the policy. An arrow to the right says that the chosen answer became likelier, one"
        " down that the rejected answer became less likely. Colour and marker name the regime.",
    ),
    "plane": (
        "Held-out pairs by their log-ratios",
        "How far each side went from the reference, summed over its tokens. The dashed lines are the anchors of the"
        " two sides; below the dotted line the margin is right.",
    ),
    "losses": (
        "Losses",
        "The loss in training and, with markers, held out; of a mixture each term too, before its weight.",
    ),
    "saved": ("Tokens saved", "Padded tokens of a batch over those computed, with `padding_free`: 1 saves nothing."),
}

_READING = """<p>A log-ratio is the log-probability of an answer under the trained model less that under the reference,
summed over its tokens, in nats; its anchor is 0. <b>Under <code>apo_zero</code></b> (and <code>apo_zero_norm</code>)
chosen answers should rise above the anchor and rejected ones fall below it: good is a share separated that keeps
growing, more than half of the chosen answers up, and few pairs displaced. If chosen answers do not rise, add a small
<code>sft</code> term, raise <code>beta</code>, or lower the learning rate. <b>Under <code>apo_down</code></b> (and
<code>apo_down_norm</code>) rejected answers should fall, and chosen ones are meant to fall less: displaced pairs are
expected, and separated ones are few. <b>Under any other loss</b> displacement is a warning: the mass of the chosen
answer went to answers that you do not see. Rejected answers should fall under every loss; if they do not, the learning
rate is too small or labels are wrong. The distance from accuracy to the share separated is the share of pairs whose
margin is right while one side went the wrong way. Pairs with both sides up share most of their tokens; if they stay so,
training rewards the style that both share. An interval says how far a share could be off on other pairs of the same
kind, not on another run. More is in <code>docs/metrics.md</code> of apo-trl.</p>"""

_CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


def page(runs: Sequence["Run"], figures: Mapping[str, Sequence["Panel"]]) -> str:
    """Give the page of some runs, with the pictures of each kind in it."""
    names = ", ".join(run.name for run in runs)
    figures = {kind: list(panels) for kind, panels in figures.items()}
    parts = [
        _comparison(runs),
        *(_figure(kind, figures[kind]) for kind in ("rewards", "regimes", "pairs", "plane")),
        _displaced(runs),
        *(_figure(kind, figures[kind]) for kind in ("losses", "saved")),
        _settings(runs),
        f'<section id="reading"><h2>How to read this</h2>\n{_READING}</section>',
    ]
    what = "One run" if len(runs) == 1 else f"{len(runs)} runs"
    # The policy is for browsers: even if a text got past the escaping, it could load and run nothing.
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>Preference training: {_text(names, 200)}</title>
<style>{_CSS}</style>
</head>
<body class="{"one" if len(runs) == 1 else "several" if len(runs) == 2 else "several many"}">
<header>
<h1>Preference training: {", ".join(f"{_name(run)}" for run in runs)}</h1>
<p class="quiet">{what}, from logs and evaluations as they lie in the output folders. Made by apo-trl
{_text(version("apo-trl"))}. <a href="#reading">How to read this page</a></p>
</header>
<main>
{chr(10).join(parts)}
</main>
</body>
</html>
"""


# Text.


def _text(value: object, longest: int = _WHOLE) -> str:
    """Give a value as text that can stand anywhere in the page, an attribute included, and is not endless."""
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    if len(text) > longest:
        text = f"{text[:longest]}…"
    text = text.encode("utf-8", "replace").decode("utf-8")  # half of a surrogate pair cannot be written
    text = re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff]", "\ufffd", text.replace("\r\n", "\n"))
    return html.escape(text)


def _name(run: "Run") -> str:
    return f"<bdi>{_text(_middle(run.name))}</bdi>"


def _middle(name: str, longest: int = 120) -> str:
    """Leave out the middle of a long name: names of runs often differ at their ends."""
    return name if len(name) <= longest else f"{name[: longest // 2]}…{name[-longest // 2 :]}"


def _number(value: float, form: str = ".3f") -> str:
    if math.isnan(value):
        return "not a number"
    return ("infinite" if value > 0 else "minus infinite") if math.isinf(value) else format(value, form)


def _words(text: str) -> str:
    """Give a text of a dataset: its beginning, and where that is not all, the whole to be unfolded."""
    beginning = "\n".join(text[:_PREVIEW].split("\n")[:_LINES])
    if beginning == text:
        return f'<div class="words" dir="auto">{_text(text)}</div>'
    if len(beginning) == _PREVIEW:
        beginning = re.sub(r"\s+\S{0,20}$", "", beginning)  # not within a word
    cut = "" if len(text) <= _WHOLE else f" The first {_WHOLE:,} are here."
    return (
        f'<div class="words" dir="auto">{_text(beginning)}…</div>'
        f"<details><summary>All {len(text):,} characters.{cut}</summary>"
        f'<div class="words" dir="auto">{_text(text)}</div></details>'
    )


def _with_code(text: str) -> str:
    """Mark as code what stands between backquotes in words of ours, and keep options whole at the end of a line."""
    text = re.sub("`([^`]*)`", r"<code>\1</code>", html.escape(text))
    return re.sub(r"(?<![\w-])(--?\w[\w-]*)(?=[^<]*</code>)", r"<span>\1</span>", text)


# Tables.


def _table(caption: str, runs: Sequence["Run"], rows: Mapping[str, Sequence[str]], *, mark: bool = False) -> str:
    """Lay rows of cells, one for each run and HTML already, out under the names of the runs, four to a table."""
    tables = []
    title = f"<caption>{caption}</caption>" if caption else ""
    number = math.ceil(len(runs) / math.ceil(len(runs) / _SIDE_BY_SIDE))
    for first in range(0, len(runs), number):
        shown = slice(first, first + number)
        head = "".join(f'<th scope="col" role="columnheader">{_name(run)}</th>' for run in runs[shown])
        names = [_text(_middle(run.name, 60)) for run in runs[shown]]
        body = ""
        for label, cells in rows.items():
            differs = ' class="differs"' if mark and len(set(cells)) > 1 else ""
            body += f'<tr role="row"{differs}><th scope="row" role="rowheader"><bdi>{label}</bdi></th>'
            pairs = zip(names, cells[shown], strict=True)
            body += "".join(f'<td role="cell" data-run="{name}"><div>{cell}</div></td>' for name, cell in pairs)
            body += "</tr>\n"
        # The roles keep it a table for a screen reader where a narrow screen has its rows as blocks.
        tables.append(
            f'<table role="table">{title}\n<thead role="rowgroup"><tr role="row">'
            f'<td role="cell"></td>{head}</tr></thead>\n<tbody role="rowgroup">\n{body}</tbody></table>'
        )
    return "\n".join(tables)


def _comparison(runs: Sequence["Run"]) -> str:
    rows = {
        "Loss": [_loss(run) for run in runs],
        "beta": [_setting(run, "beta") for run in runs],
        "Learning rate": [_learning_rate(run) for run in runs],
        "Steps": [_steps(run) for run in runs],
        "Last training loss": [_last(run, "loss") for run in runs],
    }
    held_out = dict.fromkeys(item for run in runs for item in run.held_out.items()) or {("eval_", "held out"): None}
    for prefix, name in held_out:
        of = _text(name.removeprefix("held out"), 100)
        rows[f"Held-out reward of chosen{of}"] = [_last(run, f"{prefix}rewards/chosen", "+.3f") for run in runs]
        rows[f"Held-out reward of rejected{of}"] = [_last(run, f"{prefix}rewards/rejected", "+.3f") for run in runs]
        rows[f"Held-out accuracy{of}"] = [_last(run, f"{prefix}rewards/accuracies", ".1%") for run in runs]
    rows["Separated pairs"] = [_share(run, "separated") for run in runs]
    rows["Displaced pairs"] = [_share(run, "displaced") for run in runs]
    notes = [
        "Rewards and accuracy are those of the last evaluation in training. Pairs are those of evaluation.parquet, with"
        " Wilson's 95 % interval of the share."
    ]
    sets = {frozenset((pair["prompt"], pair["chosen"], pair["rejected"]) for pair in run.pairs) for run in runs
            if run.pairs is not None}  # fmt: skip
    if len(sets) > 1:
        notes.append("The runs were evaluated on different pairs, so their shares cannot be compared.")
    notes += [
        f"The log of {_name(run)} is that of {_text(run.source.parent.name)}: its folder has none"
        " of a training that ended."
        for run in runs
        if run.source.parent != run.folder
    ]
    told = "".join(f'<p class="quiet">{note}</p>\n' for note in notes)
    return f"<section><h2>Results</h2>\n{_table('', runs, rows)}\n{told}</section>"


def _loss(run: "Run") -> str:
    names, weights = _value(run, "loss_type"), _value(run, "loss_weights")
    if not isinstance(names, list) or len(names) < 2:
        return _setting(run, "loss_type")
    weights = weights if isinstance(weights, list) and len(weights) == len(names) else [1] * len(names)
    terms = zip(weights, names, strict=True)
    return " + ".join(f"<bdi>{_text(weight, 20)} {_text(name, 60)}</bdi>" for weight, name in terms)


def _value(run: "Run", key: str) -> Any:
    return (run.record or {}).get("settings", {}).get(key)


def _setting(run: "Run", key: str) -> str:
    value = _value(run, key)
    if value is not None:
        return _text(value[0] if isinstance(value, list) and len(value) == 1 else value, 120)
    if run.record is None:
        return "not known"
    # Only a run on pairs logs regimes; the classes for single answers have other defaults.
    return f"{_DEFAULTS[key]} (default)" if "apo/separated" in run.log else "default"


def _learning_rate(run: "Run") -> str:
    logged = [value for value in run.log.get("learning_rate", {}).values() if math.isfinite(value)]
    if run.record is None and logged:
        return f"{max(logged):.3g} (largest logged)"
    return _setting(run, "learning_rate")


def _steps(run: "Run") -> str:
    done, planned = run.state.get("global_step"), run.state.get("max_steps")
    if type(done) is not int:
        done = max((step for points in run.log.values() for step in points), default=0)
    unfinished = type(planned) is int and planned > done
    return f"{done:,} of {planned:,}" if unfinished else f"{done:,}"


def _last(run: "Run", key: str, form: str = ".4f") -> str:
    points = run.log.get(key)
    if not points:
        return "not logged"
    end, last = max(step for each in run.log.values() for step in each), max(points)
    early = f' <span class="range">at step {last:,}</span>' if last < end else ""
    return _number(points[last], form) + early


def _share(run: "Run", regime: str) -> str:
    if run.pairs is None:
        return "not evaluated"
    count = sum(pair["regime"] == regime for pair in run.pairs)
    share, low, high = wilson(count, len(run.pairs))
    return (
        f'{share:.1%} <span class="range">({low:.1%} to {high:.1%})</span>'
        f' <span class="range">{count:,} of {len(run.pairs):,}</span>'
    )


def _settings(runs: Sequence["Run"]) -> str:
    records = [run.record for run in runs]
    known = [(run, record) for run, record in zip(runs, records, strict=True) if record is not None]
    told = "".join(
        f'<p class="missing">The settings of {_name(run)} are not known: its folder has no'
        " run.json, which <code>apo-trl train</code> writes.</p>\n"
        for run in runs
        if run.record is None
    )
    if known:
        shown = [run for run, _ in known]
        settings = {key: [_cell(record.get(key)) for _, record in known] for key in ("model", "dataset")}
        keys = {key for _, record in known for key in record.get("settings", {})}
        for key in sorted(keys - {"model_name_or_path", "dataset_name"}):  # which are those two again
            cells = [_cell(record.get("settings", {}).get(key), "default") for _, record in known]
            settings[_text(key, 120)] = cells
        versions = {
            _text(key, 120): [_cell(record.get("versions", {}).get(key), "not installed") for _, record in known]
            for key in sorted({key for _, record in known for key in record.get("versions", {})})
        }
        bold = " What differs between the runs is bold." if len(known) > 1 else ""
        told += f'<p class="lead">Settings that differ from the defaults.{bold}</p>\n'
        told += _table("Settings", shown, settings, mark=True)
        told += _table("Versions", shown, versions, mark=True) if versions else ""
    return f"<section><h2>Settings and versions</h2>\n{told}</section>"


def _cell(value: object, absent: str = "not known") -> str:
    if value is None:
        return absent
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        value = ", ".join(value)
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return _text(text) if len(text) <= 160 else _words(text)


# Figures and pairs.


def _figure(kind: str, panels: Sequence["Panel"]) -> str:
    title, lead = _SECTIONS[kind]
    several = len({panel.run for panel in panels}) > 1
    opening = f'<section class="figure"><h2>{title}</h2>\n'
    if not any(panel.picture for panel in panels):
        # One sentence does for all runs where the reason is the same.
        words = dict.fromkeys(f"{panel.text} {panel.note}".strip() for panel in panels)
        return opening + "".join(f'<p class="missing">{_with_code(each)}</p>\n' for each in words) + "</section>"
    shown = "".join(_panel(panel, several) for panel in panels)
    return f'{opening}<p class="lead">{_with_code(lead)}</p>\n<div class="panels">\n{shown}</div></section>'


def _panel(panel: "Panel", several: bool) -> str:
    heading = f"<h3><bdi>{_text(_middle(panel.run))}</bdi></h3>" if several else ""
    heading += f"<p>{_text(panel.heading, 120)}</p>" if panel.heading else ""
    note = f'<p class="quiet">{_with_code(panel.note)}</p>' if panel.note else ""
    if not panel.picture:
        return f'<div><div>{heading}</div><p class="missing">{_with_code(panel.text)}</p>{note}</div>\n'
    source = base64.b64encode(panel.picture).decode("ascii")
    caption = f"<figcaption>{heading}</figcaption>" if heading else ""
    image = f'<img src="data:image/png;base64,{source}" alt="{_text(panel.text, 1500)}">'
    return f"<figure>{caption}{image}{note}</figure>\n"


def _displaced(runs: Sequence["Run"]) -> str:
    told = "".join(_displaced_of(run, len(runs) > 1) for run in runs if run.pairs is not None)
    without = [run for run in runs if run.pairs is None]
    if without:
        names = ", ".join(f"{_name(run)}" for run in without)
        told += f'<p class="missing">Not evaluated pair by pair: {names}.</p>'
    return (
        f'<section><h2>Pairs displaced most</h2>\n<p class="lead">Their margin is right, and still the chosen answer'
        f" became less likely than under the reference; those whose chosen answer fell furthest come first, at most"
        f" {_DISPLACED}.</p>\n{told}</section>"
    )


def _displaced_of(run: "Run", several: bool) -> str:
    pairs = [pair for pair in run.pairs or () if pair["regime"] == "displaced"]
    worst = sorted(pairs, key=lambda pair: (math.isnan(pair["chosen_logratio"]), pair["chosen_logratio"]))[:_DISPLACED]
    heading = f"<h3>{_name(run)}</h3>\n" if several else ""
    if not worst:
        return f"{heading}<p>No pair was displaced.</p>\n"
    return heading + "".join(_articles(worst, "h4" if several else "h3"))


def _articles(pairs: Sequence[Mapping[str, Any]], level: str) -> Iterator[str]:
    for number, pair in enumerate(pairs, start=1):
        moved = "; ".join(
            f"{side} {_number(pair[f'{side}_logratio'], '+.2f')} nats"
            f" ({_number(pair[f'{side}_logratio_per_token'], '+.3f')} per token)"
            for side in ("chosen", "rejected")
        )
        sides = "".join(
            f'<div><p class="side">{side.capitalize()}</p>{_words(pair[side])}</div>'
            for side in ("prompt", "chosen", "rejected")
        )
        yield (
            f'<article><{level}>{number}. <bdi>{_text(pair["id"], 120)}</bdi></{level}>\n<p class="quiet">{moved}</p>\n'
            f'<div class="sides">{sides}</div></article>\n'
        )
