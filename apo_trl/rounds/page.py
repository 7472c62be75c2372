"""The page over all rounds, and `summary.json` with the same figures."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from apo_trl.errors import InputError
from apo_trl.evaluation import report
from apo_trl.evaluation.report.figures import png, style
from apo_trl.evaluation.report.runs import read_log
from apo_trl.io.files import atomic_write, read_json, write_json
from apo_trl.io.html import render
from apo_trl.pairs.text.reasons import WAITING

__all__ = ["disk_use", "failed_requests", "write_page"]


def write_page(folder: Path, rounds: int) -> Path:
    """Write `rounds.html` and `summary.json` from the files of the rounds, and return the page's path."""
    rows = [_round(folder / f"round-{number}", number) for number in range(rounds + 1)]
    summary = {"rounds": rows, "bytes": disk_use(folder)}
    write_json(folder / "summary.json", summary)
    kinds = sorted({kind for row in rows for kind in row["kinds"]})
    css = Path(str(report.__file__)).with_name("page.css").read_text(encoding="utf-8")
    html = render(
        Path(__file__).with_name("page.html.jinja"),
        rows=rows,
        kinds=kinds,
        css=css,
        name=folder.resolve().name,
        size=summary["bytes"],
        picture=b64encode(_figure(rows)).decode(),
    )
    path = folder / "rounds.html"
    with atomic_write(path) as beside:
        beside.write_text(html, encoding="utf-8")
    return path


def disk_use(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


_DROPPED = {"pairs": ("report.json", "dropped"), "score": ("score.json", "problems")}


def failed_requests(folder: Path, stage: str) -> int:
    """Return the number of rows of a round's `pairs` or `score` that have no result because a request failed."""
    file, counts = _DROPPED[stage]
    report = read_json(folder / stage / file)
    dropped = report[counts] if isinstance(report, dict) else {}
    return sum(count for reason, count in dropped.items() if reason in WAITING)


def _round(folder: Path, number: int) -> dict[str, Any]:
    score = read_json(folder / "score" / "score.json")
    if not isinstance(score, dict) or score.get("followed") is None:
        remedy = f"See {folder}/score.log, remove {folder}/score.json, and run again"
        raise InputError(f"{folder}/score/score.json: damaged, or no answer has a score. {remedy}.")
    row = {"round": number} | {key: score[key] for key in ("followed", "broken", "words")}
    row["kinds"] = {kind: part["followed"] for kind, part in score["by_kind"].items()}
    if number:
        row["pairs"] = read_json(folder / "pairs" / "report.json")["kept"]
        log = read_log(read_json(folder / "policy" / "trainer_state.json")["log_history"])
        shares = [*log.get("apo/displaced", {}).values()]
        row["displaced"] = fmean(shares[len(shares) // 2 :]) if shares else None
    markers = [read_json(folder / f"{name}.json") for name in ("pairs", "train", "merge", "score")]
    row["failed_requests"] = sum(failed_requests(folder, stage) for stage in ("pairs", "score"))
    row["seconds"] = round(sum(marker["seconds"] for marker in markers if marker), 1)
    return row


def _figure(rows: Sequence[Mapping[str, Any]]) -> bytes:
    with style():
        from matplotlib.figure import Figure

        figure = Figure()
        axes = figure.subplots()
        numbers, shares = [row["round"] for row in rows], [row["followed"] for row in rows]
        reach = [[each[0] - each[1] for each in shares], [each[2] - each[0] for each in shares]]
        axes.errorbar(numbers, [each[0] for each in shares], yerr=reach, marker="o", capsize=4, label="followed")
        axes.plot(numbers, [row["broken"] for row in rows], "s--", color="#6E6E6E", label="broken")
        axes.set(xlabel="round", ylabel="share of held-out prompts", ylim=(0, 1), xticks=numbers)
        axes.legend()
        return png(figure)
