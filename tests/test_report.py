"""`apo-trl report`: what its page says is read back from it, for made-up runs and real ones; a browser opens it."""

import html
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import rows as examples

from apo_trl.errors import InputError
from apo_trl.evaluation.report import report

VOID = {"meta", "link", "img", "br"}
KINDS = ["rewards", "regimes", "pairs", "plane", "losses", "saved"]
REGIME_POINTS = {"separated": (2.0, -3.0), "both_up": (2.0, 1.0), "displaced": (-2.0, -3.0), "other": (-3.0, -2.0)}


# Runs as training and `apo-trl evaluate` leave them.


def metrics(chosen, rejected, separated=0.5, displaced=0.25, both_up=0.125, *, prefix="", apo=True, **more):
    values = {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/accuracies": 0.75, "loss": 0.9} | more
    if apo:
        values |= {"apo/separated": separated, "apo/displaced": displaced, "apo/both_up": both_up}
        values |= {"apo/tokens_saved": 1.5}
    return {prefix + key: value for key, value in values.items()}


def history(*, apo=True, top=1.0, last=30):
    """Training at steps 10, 20, ... and an evaluation with each."""
    log = [{"step": 0} | metrics(0.0, 0.0, 0, 0, 0, prefix="eval_", apo=apo)]
    for step in range(10, last + 1, 10):
        chosen = top * step / last
        log.append({"step": step, "learning_rate": 1e-4 / step} | metrics(chosen, -2 * chosen, apo=apo))
        log.append({"step": step} | metrics(chosen / 2, -chosen, prefix="eval_", apo=apo))
    return [*log, {"step": last, "train_loss": 0.5, "train_runtime": 1.0}]


def pair(identity, regime="separated", **changed):
    chosen, rejected = REGIME_POINTS[regime]
    row = {"id": identity, "regime": regime, "chosen_logratio": chosen, "rejected_logratio": rejected}
    row |= {"ref_chosen_logp": -20.0, "ref_rejected_logp": -30.0, "chosen_tokens": 10, "rejected_tokens": 20}
    row |= {"dtype": "float32", "trained_on": None}
    row |= {
        "prompt": f"Prompt {identity}",
        "chosen": f"Chosen {identity}",
        "rejected": f"Rejected {identity}",
    } | changed
    for side in ("chosen", "rejected"):
        row.setdefault(f"{side}_logp", row[f"ref_{side}_logp"] + row[f"{side}_logratio"])
        row.setdefault(f"{side}_logratio_per_token", row[f"{side}_logratio"] / row[f"{side}_tokens"])
    return row


def pairs(**counts):
    """So many pairs of each regime."""
    return [pair(f"{regime}-{at}", regime) for regime, count in counts.items() for at in range(count)]


def record(**settings):
    versions = {"apo-trl": "0.1.0", "torch": "2.13.0+cpu"}
    return {"model": "some/model", "dataset": "some-pairs", "settings": settings, "versions": versions}


def write_run(folder, log, *, rows=None, run=None, **state):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps(state | {"log_history": log}))
    if run is not None:
        (folder / "run.json").write_text(json.dumps(run))
    if rows is not None:
        pq.write_table(pa.Table.from_pylist(rows), folder / "evaluation.parquet")
    return str(folder)


@pytest.fixture
def run(tmp_path):
    """A run with everything."""
    rows = pairs(separated=5, displaced=3, both_up=1, other=1)
    return write_run(tmp_path / "a-run", history(), rows=rows, run=record(), global_step=30, max_steps=30)


@pytest.fixture
def make(tmp_path):
    """Give the page of some runs."""

    def made(*runs):
        return Page(report(runs, str(tmp_path / "page" / "report.html")))

    return made


@pytest.fixture(scope="module")
def two_sets(model_dir, tmp_path_factory):
    """The folders of two real runs with two evaluation sets, of this trainer and of plain TRL."""
    import trl
    from datasets import Dataset

    import apo_trl

    folders = {kind: tmp_path_factory.mktemp("sets") / kind for kind in ("ours", "plain")}
    sets = {"help": Dataset.from_list(examples()[:5]), "harm_less": Dataset.from_list(examples()[5:])}
    settings = {"max_steps": 4, "eval_steps": 2, "eval_strategy": "steps", "logging_steps": 1, "learning_rate": 1e-2}
    settings |= {"report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True}
    classes = {"ours": (apo_trl.APOTrainer, apo_trl.APOConfig), "plain": (trl.DPOTrainer, trl.DPOConfig)}
    for kind, (trainer_class, config_class) in classes.items():
        config = config_class(str(folders[kind]), **settings)
        data = Dataset.from_list(examples())
        trainer = trainer_class(model=str(model_dir), args=config, train_dataset=data, eval_dataset=sets)
        trainer.train()
        trainer.save_state()
    return folders


class Page(HTMLParser):
    """A page as its reader sees it: text, tables, images, and whether its elements nest."""

    def __init__(self, path):
        super().__init__()
        self.path, self.source = path, path.read_text(encoding="utf-8")
        self.open, self.elements, self.images, self.rows, self.parts = [], [], [], [], []
        self.feed(self.source)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.parts).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "img":
            self.images.append(dict(attrs))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.parts.append(data)
        if self.rows and ("td" in self.open or "th" in self.open):
            self.rows[-1][-1] = " ".join(f"{self.rows[-1][-1]} {data}".split())

    def row(self, label):
        found = [row[1:] for row in self.rows if row[0] == label]
        assert len(found) == 1, f"{len(found)} rows are called {label!r}: {[row[0] for row in self.rows]}"
        return found[0]

    def section(self, title):
        """The text from one heading of the page to the next."""
        headings = re.split(r"<h2>(.*?)</h2>", self.source)
        found = dict(zip(headings[1::2], headings[2::2], strict=True))[title]
        within_a_line = re.sub(r"</?(?:b|bdi|code|span)\b[^>]*>", "", found)
        return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", within_a_line)).split())


@pytest.fixture
def drawn(monkeypatch):
    """The axes that are saved: for each picture its limits."""
    from matplotlib.figure import Figure

    found, save = [], Figure.savefig

    def saved(figure, *args, **kwargs):
        save(figure, *args, **kwargs)
        axes = figure.axes[0]
        found.append((axes.get_xlabel(), axes.get_ylabel(), axes.get_xlim(), axes.get_ylim(), axes.get_position()))

    monkeypatch.setattr(Figure, "savefig", saved)
    return found


class TestResults:
    def test_the_numbers_of_the_table(self, run, make):
        page = make(run)
        assert page.rows[0] == ["", "a-run"]
        assert "docs/metrics.md" in page.text
        assert page.row("Steps") == ["30"]
        assert page.row("Last training loss") == ["0.9000"]
        assert page.row("Accuracy") == ["90.0% (59.6% to 98.2%) 9 of 10"]
        assert page.row("Evaluated") == ["10 evaluated pairs, in float32"]
        assert "75.0%" not in page.text  # the accuracy of the log, of the same model

    @pytest.mark.parametrize(("apo", "over"), [(True, "pairs"), (False, "batches")])
    def test_without_an_evaluation_of_each_pair_the_means_of_the_log(self, apo, over, tmp_path, make):
        page = make(write_run(tmp_path / "run", history(apo=apo)))
        assert page.row("Reward of chosen in training") == [f"+0.500 mean over {over}"]
        assert page.row("Reward of rejected in training") == [f"-1.000 mean over {over}"]
        assert page.row("Accuracy in training") == [f"75.0% mean over {over}"]

    @pytest.mark.parametrize(
        ("of_ten", "expected"),
        [(5, "50.0% (23.7% to 76.3%) 5 of 10"), (0, "0.0% (0.0% to 27.8%) 0 of 10")],
    )
    def test_shares_have_wilsons_interval(self, of_ten, expected, tmp_path, make):
        rows = pairs(displaced=of_ten, other=10 - of_ten)
        page = make(write_run(tmp_path / "run", history(), rows=rows))
        assert page.row("Displaced pairs") == [expected]
        assert page.row("Separated pairs")[0].endswith("0 of 10")

    def test_settings_that_are_recorded(self, tmp_path, make):
        mixture = record(loss_type=["apo_zero", "sft"], loss_weights=[1.0, 0.1], beta=0.5, learning_rate=2e-4)
        one = record(loss_type=["sigmoid"], beta=0.1)
        page = make(
            write_run(tmp_path / "a", history(), run=mixture),
            write_run(tmp_path / "b", history(), run=one),
            write_run(tmp_path / "c", history(apo=False), run=record()),  # of single answers, with other defaults
        )
        assert page.row("Loss") == ["apo_zero, sft", "sigmoid", "default"]
        assert "different beta (0.1, 0.5, default)" in page.section("Rewards")
        assert page.rows[1] == ["Loss", *page.row("Loss")]
        beta, setting = (row[1:] for row in page.rows if row[0] == "beta")
        assert beta == setting == ["0.5", "0.1", "default"]
        assert page.row("Learning rate") == ["0.0002", "default", "default"]
        assert page.row("loss_weights") == ["1.0, 0.1", "default", "default"]

    def test_without_a_record_the_log_tells_what_it_can(self, tmp_path, make):
        page = make(write_run(tmp_path / "run", history()))
        assert page.row("Loss") == page.row("beta") == ["not known"]
        assert page.row("Learning rate") == ["1e-05 (largest logged)"]
        assert "settings of run are not known" in page.section("Settings and versions")

    def test_of_a_step_that_was_logged_twice_the_last_counts(self, tmp_path, make):
        log = [{"step": 20, "loss": 5.0}, {"step": 10, "loss": 4.0}, {"step": 20, "loss": 0.25}, {"epoch": 1.0}]
        page = make(write_run(tmp_path / "run", log))
        assert page.row("Last training loss") == ["0.2500"]
        (losses,) = [image["alt"] for image in page.images]
        assert "from 4 at step 10 to 0.25 at step 20" in losses

    def test_an_unfinished_run_says_how_far_it_came(self, tmp_path, make):
        log = history()[:-3]  # up to the last training step but one
        page = make(write_run(tmp_path / "run", log, global_step=20, max_steps=100))
        assert page.row("Steps") == ["20 of 100"]

    def test_an_evaluation_before_the_end_says_so(self, tmp_path, make):
        log = [entry for entry in history() if not (entry["step"] == 30 and "eval_loss" in entry)]
        page = make(write_run(tmp_path / "run", log))
        assert page.row("Reward of chosen in training") == ["+0.333 at step 20 mean over pairs"]

    @pytest.mark.parametrize("kind", ["ours", "plain"])
    def test_several_evaluation_sets(self, kind, two_sets, make):
        page = make(str(two_sets[kind]))
        log = json.loads((two_sets[kind] / "trainer_state.json").read_text())["log_history"]
        for name in ("help", "harm_less"):
            (*_, last) = (entry for entry in log if f"eval_{name}_loss" in entry)
            prefix = f"eval_{name}_" if kind == "ours" else "eval_"
            for label, key, form in (
                ("Reward of chosen", "chosen", "+.3f"), ("Reward of rejected", "rejected", "+.3f"),
                ("Accuracy", "accuracies", ".1%"),
            ):  # fmt: skip
                expected = (
                    f"{last[f'{prefix}rewards/{key}']:{form}} mean over {'pairs' if kind == 'ours' else 'batches'}"
                )
                assert page.row(f"{label} in training: {name}") == [expected]
            if kind == "ours":
                assert f"Evaluation pairs: {name}" in page.section("Regimes")
                number = 1 + (name == "harm_less")
                assert [*page.path.parent.glob(f"report_figures/regimes-{number:02}-*{name}.png")]
        help, harmless = (page.row(f"Reward of chosen in training: {name}") for name in ("help", "harm_less"))
        assert help != harmless
        assert not [row for row in page.rows if row[0] == "Reward of chosen in training"]

    def test_runs_on_different_pairs_are_not_to_be_compared(self, tmp_path, make):
        same = [write_run(tmp_path / name, history(), rows=pairs(separated=2)) for name in "ab"]
        assert "different pairs" not in make(*same).text
        other = write_run(tmp_path / "c", history(), rows=pairs(displaced=2))
        assert "evaluated on different pairs, so their shares cannot be compared" in make(*same, other).text


class TestConclusion:
    """The first section: a sentence for each run, by what was evaluated, else by the log."""

    def test_evaluated_pairs(self, tmp_path, make):
        rows = [row | {"trained_on": False} for row in pairs(separated=3, displaced=1)]
        settings = record(
            loss_type=["apo_zero"], beta=0.1, precision="bfloat16, no autocast", label_names=[], seed=None
        )
        page = make(write_run(tmp_path / "run", history(), rows=rows, run=settings | {"date": "2026-01-02T03:04:05"}))
        assert page.section("Conclusion") == (
            "APO-zero separated 75% of 4 held-out pairs and displaced 25%; chosen answers rose by 1.0 nats, rejected "
            "answers fell by 3.0 nats; computed in float32. Model some/model; data some-pairs; started "
            "2026-01-02T03:04:05."
        )
        assert page.row("Evaluated") == ["4 held-out pairs, in float32"]
        assert page.row("Trained") == ["in bfloat16, no autocast"]
        assert not {"label_names", "seed"} & {row[0] for row in page.rows}  # they are empty

    @pytest.mark.parametrize(
        ("trained", "expected"),
        [
            ([False, False], "2 held-out pairs"),
            ([True, True], "2 pairs that were trained on"),
            ([False, True], "2 pairs (1 trained on)"),
            ([None, None], "2 evaluated pairs"),
        ],
    )
    def test_only_pairs_that_were_not_trained_on_are_held_out(self, trained, expected, tmp_path, make):
        rows = [row | {"trained_on": each} for row, each in zip(pairs(separated=2), trained, strict=True)]
        page = make(write_run(tmp_path / "run", history(), rows=rows))
        assert f"separated 100% of {expected} and" in page.section("Conclusion")
        assert ("held-out" in page.text.lower()) is (trained == [False, False])

    def test_without_evaluated_pairs(self, tmp_path, make):
        page = make(write_run(tmp_path / "run", history(), run=record(loss_type=["apo_zero_norm", "sft"], beta=0.5)))
        sentence = page.section("Conclusion")
        assert sentence.startswith("APO-zero-norm + sft separated 50% of the pairs of the last evaluation in training")
        assert "chosen answers rose by 1.0 nats, rejected answers fell by 2.0 nats" in sentence  # +0.5 and -1 by 0.5
        page = make(write_run(tmp_path / "plain", history(apo=False)))
        assert "run `apo-trl evaluate`" in page.section("Conclusion")

    @pytest.mark.parametrize(("nats", "still"), [(0.006, True), (2.0, False)])
    @pytest.mark.parametrize("evaluated", [True, False])
    def test_a_run_that_hardly_moved_has_no_shares(self, nats, still, evaluated, tmp_path, make):
        log = [{"step": at} | metrics(0.1 * nats, -0.1 * nats, prefix="eval_") for at in (1, 2)]
        for entry in log:
            entry |= {
                "eval_apo/chosen_logratio_per_token": nats / 10,
                "eval_apo/rejected_logratio_per_token": -nats / 20,
            }
        rows = [pair("p", chosen_logratio=nats, rejected_logratio=-nats)] if evaluated else None
        settings = record(loss_type=["apo_zero"], beta=0.1, learning_rate=5e-6)
        sentence = make(write_run(tmp_path / "run", log, rows=rows, run=settings, global_step=30)).section("Conclusion")
        assert sentence.startswith("Hardly moved") is still
        assert ("learning_rate (now 5e-06) or max_steps (now 30)" in sentence) is still

    @pytest.mark.parametrize(("separated", "better"), [(19, True), (18, False)])
    def test_a_run_is_better_only_if_the_intervals_do_not_overlap(self, separated, better, tmp_path, make):
        def evaluated(name, count):
            rows = [pair(str(at), "separated" if at < count else "other") for at in range(20)]
            return write_run(tmp_path / name, history(), rows=rows)

        sentences = make(evaluated("a", 10), evaluated("b", separated)).section("Conclusion")
        # Wilson's intervals of 10, 18 and 19 of 20: 0.299 to 0.701, 0.699 to 0.972, 0.764 to 0.991.
        assert ("b separates more pairs than a: 95% against 50%" in sentences) is better
        assert ("intervals overlap" in sentences) is not better
        still = [pair(str(at), chosen_logratio=1e-3, rejected_logratio=-1e-3) for at in range(20)]
        sentences = make(str(tmp_path / "a"), write_run(tmp_path / "c", history(), rows=still)).section("Conclusion")
        assert "c separates" not in sentences


class TestPairs:
    def test_those_displaced_most_come_first_and_at_most_ten(self, tmp_path, make):
        falls = [3.0, 12.0, 1.0, 7.0, 2.0, 9.0, 11.0, 5.0, 4.0, 8.0, 10.0, 6.0]
        rows = [pair(f"p{fall:.0f}", "displaced", chosen_logratio=-fall, rejected_logratio=-20.0) for fall in falls]
        rows.append(pair("reversed", "other", chosen_logratio=-40.0, rejected_logratio=-5.0))
        section = make(write_run(tmp_path / "run", history(), rows=rows)).section("Pairs displaced most")
        assert re.findall(r"(\d+)\. (\w+) ", section) == [(str(at), f"p{13 - at}") for at in range(1, 11)]
        assert "chosen -12.00 nats (-1.200 per token); rejected -20.00 nats (-1.000 per token)" in section
        assert "Prompt p12" in section
        assert "Chosen p12" in section
        assert "Rejected p12" in section
        assert "reversed" not in section

    def test_none_displaced(self, tmp_path, make):
        page = make(write_run(tmp_path / "run", history(), rows=pairs(separated=3)))
        assert "No pair was displaced." in page.section("Pairs displaced most")

    def test_a_long_text_is_folded(self, tmp_path, make):
        words = " ".join(f"word{at}" for at in range(100))
        rows = [
            pair("long", "displaced", prompt=words, chosen="Short.", rejected="x" * 30_000),
            pair("short", "displaced", prompt="Say hello.", chosen="Hello!", rejected="No."),
        ]
        page = make(write_run(tmp_path / "run", history(), rows=rows))
        assert sum(tag == "details" for tag, _ in page.elements) == 2
        assert f"All {len(words)} characters." in page.text
        assert words in page.text
        shown = re.search(r'Prompt</p><div class="words" dir="auto">(.*?)…</div><details>', page.source)[1]
        assert words.startswith(f"{shown} ")
        assert 200 < len(shown) <= 280
        assert "All 30,000 characters. The first 20,000 are here." in page.text
        assert "x" * 20_001 not in page.source

    def test_arrows_go_from_the_reference_to_the_policy_per_token(self, tmp_path, make, monkeypatch):
        from matplotlib.axes import Axes

        seen, draw = [], Axes.quiver
        monkeypatch.setattr(Axes, "quiver", lambda axes, *args, **k: seen.append(args) or draw(axes, *args, **k))
        make(write_run(tmp_path / "run", history(), rows=[pair("one")]))
        # -20 nats over 10 tokens and -30 over 20; +2 over 10 and -3 over 20.
        ((x, y, ahead, up),) = seen
        assert [*x, *y, *ahead, *up] == pytest.approx([-2, -1.5, 0.2, -0.15])

    def test_of_very_many_only_some_are_drawn_and_all_are_counted(self, tmp_path, make):
        page = make(write_run(tmp_path / "run", history(), rows=pairs(separated=1200)))
        assert "400 of 1,200 pairs are drawn; 0 are not finite." in page.text
        assert page.row("Separated pairs")[0].endswith("1,200 of 1,200")


class TestPictures:
    def test_a_run_with_everything_has_every_picture(self, run, make):
        page = make(run)
        folder = page.path.parent / "report_figures"
        assert sorted(path.name for path in folder.iterdir()) == sorted(f"{kind}.png" for kind in KINDS)
        assert len(page.images) == len(KINDS)
        assert all(image["alt"].startswith("a-run") for image in page.images)
        assert all(image["src"].startswith("data:image/png;base64,") for image in page.images)

    def test_what_the_pictures_say_is_also_said_in_words(self, run, make):
        rewards, regimes, arrows, plane, losses, saved = (image["alt"] for image in make(run).images)
        assert "chosen, evaluation: from 0 at step 0 to 0.5 at step 30" in rewards
        assert "separated: from 0 at step 0 to 0.5 at step 30; both up: from 0 at step 0 to 0.125 at step 30" in regimes
        assert "rest: from 1 at step 0 to 0.125 at step 30" in regimes
        counts = "Of 10 pairs: separated 5, both up 1, displaced 3, rest 1."
        assert counts in arrows
        assert counts in plane
        assert "loss, training: from 0.9 at step 10 to 0.9 at step 30" in losses
        assert "tokens saved, training: from 1.5 at step 10" in saved

    def test_the_regimes_have_their_areas(self, tmp_path, make):
        """Three quarters of the plane are separated, in blue; nothing is displaced, in vermillion."""
        from PIL import Image

        log = [{"step": step} | metrics(1.0, -1.0, 0.75, 0, 0, prefix="eval_") for step in (0, 10)]
        page = make(write_run(tmp_path / "run", log))
        with Image.open(page.path.parent / "report_figures" / "regimes.png") as picture:
            colours = {colour: count for count, colour in picture.convert("RGB").getcolors(maxcolors=1 << 20)}
        blue, grey = colours[0x00, 0x72, 0xB2], colours[0xAB, 0xAB, 0xAB]
        assert blue > 2.5 * grey > 0
        assert colours.get((0xD5, 0x5E, 0x00), 0) < 0.02 * blue  # the legend's patch

    def test_several_runs_have_the_same_axes(self, tmp_path, make, drawn):
        rows = [pairs(separated=2), [pair("far", "displaced", chosen_logratio=-60.0, rejected_logratio=-90.0)]]
        page = make(
            write_run(tmp_path / "small", history(top=1.0), rows=rows[0]),
            write_run(tmp_path / "large", history(top=7.0, last=90), rows=rows[1]),
        )
        assert len(drawn) == 2 * len(KINDS)
        by_kind = {}
        for x_label, y_label, *limits, place in drawn:
            by_kind.setdefault((x_label, y_label), []).append((*limits, place.width))
        assert len(by_kind) == len(KINDS)
        for first, second in by_kind.values():
            assert first == second
        steps, rewards, _ = by_kind["step", "mean reward"][0]
        assert steps[1] >= 90
        assert rewards[0] < -14
        assert rewards[1] > 7
        assert by_kind["log-ratio (nats) of chosen", "log-ratio (nats) of rejected"][0][0][0] < -90
        headings = re.findall(r"<figure><figcaption><h3><bdi>(\w+)</bdi></h3>", page.source)
        assert headings == ["small", "large"] * len(KINDS)

    def test_regimes_are_of_training_where_there_are_no_two_evaluations(self, tmp_path, make):
        log = [entry for entry in history() if "eval_loss" not in entry or entry["step"] == 30]
        section = make(write_run(tmp_path / "run", log)).section("Regimes")
        assert "Training pairs, as there are not two evaluations" in section

    def test_pictures_of_an_earlier_report_go_and_others_stay(self, run, tmp_path, make):
        other = write_run(tmp_path / "b-run", history())
        folder = make(run, other).path.parent / "report_figures"
        (folder / "mine.png").write_bytes(b"mine")
        assert (folder / "rewards-02-b-run.png").is_file()
        make(run)
        assert sorted(path.stem for path in folder.iterdir()) == sorted([*KINDS, "mine"])

    def test_the_page_holds_the_files(self, run, make):
        import base64

        page = make(run)
        held = {base64.b64decode(image["src"].partition(",")[2]) for image in page.images}
        assert held == {path.read_bytes() for path in (page.path.parent / "report_figures").iterdir()}

    def test_the_same_runs_give_the_same_page(self, run, make):
        assert make(run).source == make(run).source


class TestMissing:
    def test_a_run_of_plain_trl(self, tmp_path, make):
        page = make(write_run(tmp_path / "run", history(apo=False)))
        assert "call apo_trl.register() before training" in page.section("Regimes")
        assert "which only padding_free does" in page.section("Tokens saved")
        assert "apo-trl evaluate --model FOLDER" in page.section("Evaluated pairs, before and after")
        assert "Not evaluated pair by pair: run" in page.section("Pairs displaced most")
        assert not [row for row in page.rows if row[0] in ("Separated pairs", "Displaced pairs")]
        assert len(page.images) == 2  # rewards and losses

    def test_beside_a_run_that_has_them(self, run, tmp_path, make):
        page = make(run, write_run(tmp_path / "plain", history(apo=False)))
        assert "plain The regimes were logged for fewer than two steps" in page.section("Regimes")
        assert page.row("Displaced pairs")[1] == "not evaluated"
        assert len(page.images) == len(KINDS) + 2

    def test_a_run_that_logged_nothing(self, tmp_path, make):
        page = make(write_run(tmp_path / "run", []))
        assert page.images == []
        assert "No rewards were logged." in page.section("Rewards")
        assert page.row("Last training loss") == ["not logged"]

    def test_an_interrupted_run_is_read_from_its_newest_whole_checkpoint(self, tmp_path, make):
        folder = tmp_path / "run"
        for step in (9, 10, 100):
            write_run(folder / f"checkpoint-{step}", [{"step": step, "loss": step / 4}])
        write_run(folder / "checkpoint-best", [{"step": 1, "loss": 1.0}])
        (folder / "checkpoint-100" / "trainer_state.json").write_text('{"log_history": [{"st')
        page = make(str(folder))
        assert page.row("Last training loss") == ["2.5000"]
        assert "The log of run is that of checkpoint-10:" in page.text

    def test_terms_of_a_mixture_and_losses_of_evaluation_alone(self, tmp_path, make):
        log = [
            {"step": step, "eval_loss": 1.0 / step, "eval_loss/apo_zero": 0.5, "eval_loss/sft": 2.0} for step in (1, 2)
        ]
        (losses,) = make(write_run(tmp_path / "run", log)).images
        for term in (
            "loss, evaluation: from 1 at",
            "loss/apo_zero, evaluation: from 0.5",
            "loss/sft, evaluation: from 2 at",
        ):
            assert term in losses["alt"]

    def test_settings_and_versions(self, tmp_path, make):
        modules = ["q_proj", "v_proj"]
        settings = dict(lora_target_modules=modules, use_peft=True, dataset_name="some-pairs", note="long " * 100)
        page = make(write_run(tmp_path / "run", history(), run=record(**settings)))
        assert page.row("model") == ["some/model"]
        assert page.row("dataset") == ["some-pairs"]
        assert page.row("lora_target_modules") == ["q_proj, v_proj"]
        assert page.row("use_peft") == ["true"]
        assert page.row("torch") == ["2.13.0+cpu"]
        assert "All 500 characters." in page.row("note")[0]
        assert "dataset_name" not in page.text  # is the dataset again


def test_what_differs_between_runs_is_bold(tmp_path, make):
    runs = [write_run(tmp_path / f"{seed}", history(), run=record(seed=seed, beta=0.5)) for seed in (1, 2)]
    bold = re.findall(
        r'<tr role="row" class="differs">\s*<th scope="row" role="rowheader"><bdi>(\w+)', make(*runs).source
    )
    assert bold == ["seed"]


HOSTILE = (
    "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>\u202egnirts\x00\x1b\ud800 $x_1$ _\N{OGHAM SPACE MARK}"
)


class TestHostile:
    def test_texts_from_anywhere_are_texts(self, tmp_path, make):
        row = pair(HOSTILE.replace("\ud800", ""), "displaced")
        row |= dict.fromkeys(("prompt", "chosen", "rejected"), HOSTILE.replace("\ud800", ""))
        log = [{"step": at} | metrics(0.1 * at, -0.1 * at, prefix=f"eval_{HOSTILE}_") for at in (1, 2)]
        log += [{"step": at, "loss": 1.0, f"loss/{HOSTILE}": 0.5, "loss/_hidden": 0.4} for at in (1, 2)]
        settings = record(**{HOSTILE: HOSTILE, "loss_type": [HOSTILE, HOSTILE], "beta": HOSTILE})
        settings |= {"model": HOSTILE, "dataset": {HOSTILE: [HOSTILE]}} | {"versions": {HOSTILE: HOSTILE}}
        folder = tmp_path / "<b onclick=alert(3)> $y$"
        page = make(write_run(folder, log, rows=[row], run=settings), write_run(tmp_path / "b", history()))
        tags = {tag for tag, _ in page.elements}
        assert not tags & {"script", "iframe", "object", "b onclick"}
        assert all(set(attrs) == {"src", "alt"} for tag, attrs in page.elements if tag == "img")
        assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
        assert page.text.count("<script>alert(1)</script>") > 10
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", page.source)

    def test_right_to_left_text_keeps_to_itself(self, tmp_path, make):
        row = pair("p", "displaced", chosen="صباح الخير")
        page = make(write_run(tmp_path / "run", history(), rows=[row]))
        assert '<div class="words" dir="auto">صباح الخير</div>' in page.source

    def test_numbers_that_are_none(self, tmp_path, make):
        log = history()
        log += [{"step": 40, "loss": math.nan, "rewards/chosen": math.inf, "rewards/rejected": -(10**400)}]
        log += [{"step": 40, "eval_loss": math.nan, "eval_rewards/chosen": math.nan, "eval_rewards/rejected": -1e308}]
        log += [{"step": step, "loss": 1.0} for step in ("50", True, -1, 10**30, None)]
        log += [None, "x", {"loss": 1}, {"step": 41, "rewards/chosen": "<b>", "rewards/rejected": None, "loss": True}]
        page = make(write_run(tmp_path / "run", log))
        assert page.row("Last training loss") == ["nan"]
        assert page.row("Reward of chosen in training") == ["+nan mean over pairs"]
        assert page.row("Reward of rejected in training") == ["-inf mean over pairs"]
        assert "not finite numbers, and so are not drawn: 4." in page.section("Rewards")
        assert "not finite numbers, and so are not drawn: 2." in page.section("Losses")

    def test_pairs_without_finite_numbers(self, tmp_path, make):
        rows = [
            pair("good"),
            pair("bad", "displaced", chosen_logratio=math.nan),
            pair("none", chosen_logp=None, rejected_logp=math.inf),
        ]
        page = make(write_run(tmp_path / "a", history(), rows=rows))
        assert "2 of 3 pairs are drawn; 1 are not finite." in page.section("Evaluated pairs by their log-ratios")
        assert "1 of 3 pairs are drawn; 2 are not finite." in page.section("Evaluated pairs, before and after")
        assert "chosen +nan nats" in page.section("Pairs displaced most")
        worst = make(write_run(tmp_path / "b", history(), rows=rows[1:2]))
        assert "0 of 1 pairs are drawn; 1 are not finite." in worst.section("Evaluated pairs by their log-ratios")

    def test_a_single_step_can_be_seen(self, tmp_path, make):
        page = make(write_run(tmp_path / "run", [{"step": 1} | metrics(0.0, 0.0)]))
        assert "chosen, training: 0 at step 1" in page.images[0]["alt"]
        assert "fewer than two steps" in page.section("Regimes")


class TestNames:
    def test_as_much_of_the_path_as_is_needed(self, tmp_path, make):
        runs = [write_run(tmp_path / name, history()) for name in ("x/out", "y/out", "y/other", "a/y/out")]
        assert make(*runs).rows[0] == ["", "x/out", f"{tmp_path.name}/y/out", "other", "a/y/out"]

    def test_many_runs_share_the_width_evenly(self, tmp_path, make):
        runs = [write_run(tmp_path / f"r{at}", history()) for at in range(5)]
        page = make(*runs)
        heads = [row[1:] for row in page.rows if row[0] == ""]
        assert heads[:2] == [["r0", "r1", "r2"], ["r3", "r4"]]

    def test_long_names_keep_their_ends(self, tmp_path, make):
        runs = [write_run(tmp_path / f"{'long-' * 40}seed{at}", history()) for at in (1, 2)]
        first, second = make(*runs).rows[0][1:]
        assert len(first) == 121
        assert first.startswith("long-")
        assert (first[-5:], second[-5:]) == ("seed1", "seed2")

    def test_a_trailing_slash_and_a_relative_path(self, run, make, monkeypatch):
        monkeypatch.chdir(run)
        assert make("./").rows[0] == ["", "a-run"]


class TestRefusals:
    def test_a_run_given_twice(self, run, make):
        with pytest.raises(InputError, match="runs: duplicate"):
            make(run, f"{run}/../a-run")

    def test_what_is_no_folder(self, tmp_path, make):
        with pytest.raises(InputError, match=r"runs: no readable trainer_state\.json in .*nowhere"):
            make(str(tmp_path / "nowhere"))

    def test_a_folder_without_a_log(self, tmp_path, make):
        (tmp_path / "empty" / "checkpoint-5").mkdir(parents=True)
        with pytest.raises(
            InputError, match=r"trainer_state.json in .*empty or its checkpoints.*trainer\.save_state\(\)"
        ):
            make(str(tmp_path / "empty"))

    def test_the_folder_of_several_runs_names_them(self, run, make):
        with pytest.raises(InputError, match=r"runs: no readable trainer_state.json in .*Set .*a-run\.$"):
            make(str(Path(run).parent))

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"log_history": 3}', "[" * 100_000, "\xff"])
    def test_a_damaged_log(self, content, run, make):
        (Path(run) / "trainer_state.json").write_text(content, encoding="latin-1")
        with pytest.raises(InputError, match=r"runs: no readable trainer_state\.json in"):
            make(run)

    @pytest.mark.parametrize("content", ["{", "[]", '{"settings": []}', '{"versions": "1"}'])
    def test_a_damaged_record(self, content, run, make):
        (Path(run) / "run.json").write_text(content)
        with pytest.raises(InputError, match=r"run\.json: damaged.*Remove it"):
            make(run)

    def test_a_damaged_evaluation(self, run, make):
        path = Path(run) / "evaluation.parquet"
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(InputError, match=r"evaluation.parquet: cannot be read \(.*Run `apo-trl evaluate` again"):
            make(run)

    def test_an_evaluation_without_a_column(self, run, make):
        path = Path(run) / "evaluation.parquet"
        pq.write_table(pq.ParquetFile(path).read().drop_columns(["ref_chosen_logp", "prompt"]), path)
        with pytest.raises(InputError, match=r"cannot be read .*prompt.*Run `apo-trl evaluate` again"):
            make(run)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"regime": "<b>better</b>"}, r"unknown regimes, got \['<b>better</b>'\].*Run `apo-trl evaluate` again"),
            ({"chosen_logratio": "high"}, "cannot be read .*Run `apo-trl evaluate` again"),
        ],
    )
    def test_an_evaluation_with_something_else_in_it(self, change, message, tmp_path, make):
        with pytest.raises(InputError, match=message):
            make(write_run(tmp_path / "run", history(), rows=[pair("p") | change]))

    def test_an_evaluation_without_pairs(self, run, make):
        path = Path(run) / "evaluation.parquet"
        pq.write_table(pq.ParquetFile(path).read().slice(0, 0), path)
        with pytest.raises(InputError, match=r"no pairs or unknown regimes.*Run `apo-trl evaluate` again"):
            make(run)

    def test_an_output_that_cannot_be_written(self, run, tmp_path):
        (tmp_path / "report.html").mkdir()
        with pytest.raises(InputError, match=r"report\.html: cannot be written"):
            report([run], str(tmp_path / "report.html"))

    def test_without_matplotlib(self, run, make, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(InputError, match=r"pip install 'apo-trl\[report\]'"):
            make(run)


def test_the_picture_of_the_demo(tmp_path, monkeypatch):
    """Rewards are beta times log-ratios in both panels, and a pair at the anchor is in no regime of its own."""
    from matplotlib.figure import Figure

    from apo_trl.evaluation.report import draw_report

    seen, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: seen.append(figure) or save(figure, *a, **k))
    path = tmp_path / "new" / "report.png"
    draw_report(history(), [(4.0, -8.0), (-2.0, -4.0), (0.0, 0.0)], path, beta=0.5)
    assert path.read_bytes().startswith(b"\x89PNG")
    left, right = seen[0].axes
    assert left.get_ylabel() == "mean reward (beta = 0.5)"
    assert right.get_title() == "3 held-out pairs after training"
    legend = [text.get_text() for text in right.get_legend().get_texts()]
    assert legend == ["separated (1)", "displaced (1)", "rest (1)"]
    points = [tuple(point) for marks in right.collections for point in marks.get_offsets().tolist()]
    assert points == [(2.0, -4.0), (-1.0, -2.0), (0.0, 0.0)]
    assert right.get_xlim() == right.get_ylim() == pytest.approx((-5.2, 5.2))  # room for the words in the corners


def test_importing_it_loads_neither_torch_nor_matplotlib():
    code = "import sys, apo_trl.evaluation.report.page; print({'torch', 'trl', 'matplotlib'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_folder_that_looks_like_a_column(tmp_path, make):
    page = make(write_run(tmp_path / "regime=3", history(), rows=pairs(separated=2)))
    assert page.row("Separated pairs")[0].endswith("2 of 2")


def test_a_run_from_python_without_save_state_is_that_of_its_newest_checkpoint(train, tmp_path, make):
    folder = str(tmp_path / "run")
    train(output_dir=folder, steps=2, beta=0.3, learning_rate=2e-3, save_strategy="steps", save_steps=1)
    page = make(folder)
    assert (page.row("Loss"), page.row("Learning rate"), page.row("Steps")) == (["apo_zero"], ["0.002"], ["2"])
    assert page.rows[2][:2] == ["beta", "0.3"]
    assert "The log of run is that of checkpoint-2" in page.text


def test_real_runs_of_this_trainer_and_of_plain_trl(train, model_dir, dataset, tmp_path, make):
    """What the trainer logs, saves and `evaluate` writes is what is read here."""
    import trl

    from apo_trl.evaluation.evaluate import evaluate, write_rows

    settings = dict(eval_dataset=dataset, eval_strategy="steps", eval_steps=2, steps=4)
    folders = [tmp_path / name for name in ("ours", "plain")]
    for folder, classes in zip(folders, [(None, None), (trl.DPOTrainer, trl.DPOConfig)], strict=True):
        trainer_class, config_class = classes
        less = {} if trainer_class is None else {"loss_type": "sigmoid"}
        trainer = train(trainer_class, config_class, output_dir=str(folder), **settings, **less)
        trainer.save_state()
        trainer.save_model(str(folder))
        last = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in dataset))
    write_rows(evaluate(str(folders[0]), str(data), reference=str(model_dir)), folders[0] / "evaluation.parquet")

    page = make(*map(str, folders))
    assert page.row("Steps") == ["4", "4"]
    assert page.row("Reward of chosen in training")[1] == f"{last['eval_rewards/chosen']:+.3f} mean over batches"
    assert page.row("Separated pairs")[0].endswith("of 8")
    assert "plain The regimes were logged for fewer than two steps" in page.section("Regimes")
    assert "Evaluation pairs" in page.section("Regimes")


# A real browser.

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NEEDS_BROWSER = pytest.mark.skipif(
    CHROMIUM is None or find_spec("playwright") is None,
    reason=f"{'playwright' if CHROMIUM else 'chromium'} is not installed",
)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
SIZES = "Promise.all([...document.images].map(image => image.decode().then(() => image.naturalWidth)))"
UNFOLD = "document.querySelectorAll('details').forEach(each => { each.open = true })"
BESIDE = "[...document.querySelectorAll('tbody td')].map(each => getComputedStyle(each, '::before').content)"
CUT_OFF = """[...document.querySelectorAll('td, th, p, h1, h3, h4, summary, .words')]
  .filter(each => each.clientWidth > 1 && each.scrollWidth > each.clientWidth + 1)
  .map(each => each.outerHTML.slice(0, 200))"""


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.mark.slow
@NEEDS_BROWSER
@pytest.mark.parametrize("number", [1, 3, 5])
def test_a_browser_shows_and_prints_it(number, browser, tmp_path, make):
    folders = [f"run {at} {'with-a-very-long-name-' * (3 * at)}"[:90] for at in range(number)]
    rows = pairs(separated=5, displaced=3, both_up=1, other=1)
    rows[5] |= {"prompt": "w" * 5000, "chosen": "<script>document.title = 'gone'</script>", "rejected": "a b " * 500}
    long = record(**{"output_dir": "/" + "x" * 140, "key" * 30: "value " * 100})
    page = make(*[write_run(tmp_path / name, history(), rows=rows, run=long) for name in folders])

    requests, errors = [], []
    view = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme="dark")
    view.on("request", lambda request: requests.append(request.url))
    view.on("console", lambda message: errors.append(message.text))
    view.on("pageerror", lambda error: errors.append(str(error)))
    view.goto(page.path.as_uri())
    decoded = view.evaluate(SIZES)
    assert len(decoded) == len(KINDS) * number
    assert min(decoded) > 500
    for width in (1200, 400):
        view.set_viewport_size({"width": width, "height": 900})
        assert view.evaluate("document.documentElement.scrollWidth") <= width
        assert view.evaluate(CUT_OFF) == []
    if number > 1:  # with rows as blocks every cell says whose it is
        assert all(content.startswith('"run ') for content in view.evaluate(BESIDE))
    view.evaluate(UNFOLD)
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    assert view.evaluate(CUT_OFF) == []
    assert view.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert view.title().startswith("Preference training: run 0")
    assert view.evaluate("document.documentElement.lang") == "en"
    printed = view.pdf(format="A4")
    assert printed.startswith(b"%PDF")
    assert len(printed) > 50_000
    view.close()
    assert errors == []
    assert requests[0] == page.path.as_uri()
    assert all(url.startswith("data:") for url in requests[1:])
