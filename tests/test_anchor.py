"""`apo-trl anchor` and `apo-trl compare` on constructed data, by deterministic judges: the right loss, or none."""

import json
import math
import random
import re

import pytest
from chat_server import ChatServer
from conftest import curve
from test_cli import write

from apo_trl.cli import main as cli
from apo_trl.errors import InputError
from apo_trl.evaluation.anchor import suggest, write_dataset
from apo_trl.evaluation.compare import length_controlled, summarise


def referee(body):
    """A policy whose answers are all of quality 5, and a judge that reads qualities; below 0.5 apart is a tie."""
    last = body["messages"][-1]["content"]
    found = re.findall(r"<answer_[ab]>\nquality ([0-9.]+)", last)
    if len(found) == 2:
        first, second = map(float, found)
        return "Read. [[C]]" if abs(first - second) < 0.5 else f"Read. [[{'A' if first > second else 'B'}]]"
    if found := re.findall(r"<answer>\nquality ([0-9.]+)", last):
        return f"Read. [[{found[0]}]]"
    return "quality 5"


def dataset(path, qualities):
    return write(
        path,
        [
            {
                "id": f"p{at}",
                "prompt": [{"role": "user", "content": f"Question {at}?"}],
                "chosen": [{"role": "assistant", "content": f"quality {quality} of {at}"}],
                "rejected": [{"role": "assistant", "content": f"quality 1 of {at}"}],
                "mine": f"quality 5 of {at}",
                "score": quality,
                "policy_score": 5,
            }
            for at, quality in enumerate(qualities)
        ],
    )


def run(capsys, *arguments):
    cli.main(["anchor", *map(str, arguments)])
    return capsys.readouterr().out


def judged(server):
    return [
        "--policy", "policy", "--policy_base_url", server.url, "--judge", "judge", "--judge_base_url", server.url
    ]  # fmt: skip


DATA = {
    "winners clearly better": ([9] * 38 + [1] * 2, "apo_zero"),
    "winners clearly worse": ([2] * 38 + [9] * 2, "apo_down"),
    "half and half": ([9] * 20 + [1] * 20, "apo_blend"),
}


@pytest.mark.parametrize("protocol", ["pairwise", "pointwise"])
@pytest.mark.parametrize("name", DATA)
def test_it_names_the_right_loss(name, protocol, tmp_path, capsys):
    qualities, loss = DATA[name]
    path, out = dataset(tmp_path / "pairs.jsonl", qualities), tmp_path / "out"
    with ChatServer(referee) as server:
        printed = run(capsys, "--dataset", path, *judged(server), "--judge_protocol", protocol, "--output_dir", out)
    assert f"loss_type: {loss} " in printed
    report = json.loads((out / "anchor.json").read_text())
    wins = sum(quality > 5 for quality in qualities)
    assert (report["chosen"]["wins"], report["chosen"]["losses"]) == (wins, 40 - wins)
    assert (report["rejected"]["wins"], report["rejected"]["losses"]) == (0, 40)
    assert report["suggestion"] == loss
    rows = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    assert [row["chosen_wins"] for row in rows] == [float(quality > 5) for quality in qualities]
    assert {row["chosen_wins_from"] for row in rows} == {"judge"}
    assert [row["id"] for row in rows] == [f"p{at}" for at in range(40)]


@pytest.mark.parametrize("quality", [9, 1])
def test_on_ten_rows_it_abstains(quality, tmp_path, capsys):
    path, out = dataset(tmp_path / "pairs.jsonl", [quality] * 10), tmp_path / "out"
    with ChatServer(referee) as server:
        printed = run(capsys, "--dataset", path, *judged(server), "--output_dir", out)
    assert "No loss is suggested: too little evidence: 10 comparisons have a winner, 20 are needed" in printed
    assert json.loads((out / "anchor.json").read_text())["suggestion"] is None


def test_ties_are_no_evidence_and_half_a_win(tmp_path, capsys):
    path, out = dataset(tmp_path / "pairs.jsonl", [5.2] * 30 + [9] * 5), tmp_path / "out"
    with ChatServer(referee) as server:
        printed = run(capsys, "--dataset", path, *judged(server), "--output_dir", out)
    assert "take a judge that can tell the answers apart" in printed
    rows = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    assert [row["chosen_wins"] for row in rows] == [0.5] * 30 + [1.0] * 5


def test_a_judge_that_always_says_the_first_decides_nothing(tmp_path, capsys):
    def first(body):
        return "[[A]]" if "<answer_a>" in body["messages"][-1]["content"] else "quality 5"

    path, out = dataset(tmp_path / "pairs.jsonl", [9] * 40), tmp_path / "out"
    with ChatServer(first) as server:
        printed = run(capsys, "--dataset", path, *judged(server), "--output_dir", out)
    report = json.loads((out / "anchor.json").read_text())
    assert report["chosen"]["orders_disagree"] == 40
    assert report["suggestion"] is None
    assert "the answer shown first wins 100% of verdicts" in printed


def test_a_second_run_asks_nothing_and_a_limit_draws_by_seed(tmp_path, capsys):
    path, out = dataset(tmp_path / "pairs.jsonl", [9] * 60), tmp_path / "out"
    with ChatServer(referee) as server:
        arguments = ["--dataset", path, *judged(server), "--output_dir", out, "--limit", "25"]
        run(capsys, *arguments)
        asked = server.count
        run(capsys, *arguments)
        assert server.count == asked
        drawn = {body["messages"][-1]["content"] for body in server.bodies if body["model"] == "policy"}
        run(capsys, *arguments, "--seed", "1", "--output_dir", tmp_path / "other")
        again = {body["messages"][-1]["content"] for body in server.bodies[asked:] if body["model"] == "policy"}
    assert len(drawn) == len(again) == 25 + 1  # and the probe's
    assert drawn != again
    rows = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    assert len(rows) == 60
    # 25 judged, all won; the others get (25 + 1) / (25 + 2).
    assert sorted({row["chosen_wins"] for row in rows}) == [pytest.approx(26 / 27), 1.0]
    assert sum(row["chosen_wins_from"] == "judge" for row in rows) == 25


def test_a_request_that_fails_is_no_verdict_and_is_asked_again(tmp_path, capsys):
    path, out = dataset(tmp_path / "pairs.jsonl", [9] * 30), tmp_path / "out"
    broken = lambda number, body: "400" if "Question 7?" in str(body) and body["model"] == "judge" else None  # noqa: E731
    with ChatServer(referee, faults=broken) as server:
        printed = run(capsys, "--dataset", path, *judged(server), "--output_dir", out, "--judge_max_retries", "0")
        assert "No verdict: 1 judge_error." in printed
    assert json.loads((out / "anchor.json").read_text())["chosen"]["wins"] == 29
    with ChatServer(referee, port=server.port) as server:
        run(capsys, "--dataset", path, *judged(server), "--output_dir", out, "--judge_max_retries", "0")
        assert server.count <= 4
    assert json.loads((out / "anchor.json").read_text())["chosen"]["wins"] == 30


def test_scores_in_the_data_stand_in_for_a_judge_and_likelihoods_are_told(tmp_path, capsys, model_dir):
    path, out = dataset(tmp_path / "pairs.jsonl", [9] * 30 + [5.5] * 4 + [1]), tmp_path / "out"
    columns = ["--chosen_score", "score", "--policy_score", "policy_score"]
    printed = run(capsys, "--dataset", path, "--policy", model_dir, *columns, "--output_dir", out)
    assert "loss_type: apo_zero " in printed
    report = json.loads((out / "anchor.json").read_text())
    assert report["chosen"] == {"wins": 30, "losses": 1, "ties": 4, "orders_disagree": 0, "invalid": 0}
    # A model with random weights gives every byte about one chance in 260.
    assert report["likelihoods"]["chosen"][0] == pytest.approx(-math.log(260), abs=0.5)
    assert "nats a token" in printed
    printed = run(
        capsys, "--dataset", path, "--policy", model_dir, *columns, "--judge_margin", "0.2", "--output_dir", out
    )
    assert json.loads((out / "anchor.json").read_text())["chosen"]["wins"] == 34


def test_answers_in_a_column_are_not_sampled(tmp_path, capsys):
    path, out = dataset(tmp_path / "pairs.jsonl", [9] * 30), tmp_path / "out"
    with ChatServer(referee) as server:
        run(capsys, "--dataset", path, *judged(server), "--policy_response", "mine", "--output_dir", out)
        assert {body["model"] for body in server.bodies} == {"judge"}
    assert json.loads((out / "anchor.json").read_text())["suggestion"] == "apo_zero"


def test_without_a_judge_only_what_needs_none_is_told(tmp_path, capsys, model_dir):
    path, out = dataset(tmp_path / "pairs.jsonl", [9] * 30), tmp_path / "out"
    printed = run(capsys, "--dataset", path, "--policy", model_dir, "--output_dir", out)
    assert "No loss is suggested: neither --judge, --judge_function nor --chosen_score" in printed
    assert "nats a token" in printed
    assert "Jaccard" in printed
    assert not (out / "pairs.jsonl").exists()


def test_training_takes_what_it_writes(tmp_path, train):
    from datasets import load_dataset

    rows = [json.loads(line) for line in dataset(tmp_path / "pairs.jsonl", [9] * 8).read_text().splitlines()]
    write_dataset(rows, {0: "first", 1: "second", 2: "tie", 3: "judge_invalid"}, tmp_path / "out.jsonl")
    data = load_dataset("json", data_files=str(tmp_path / "out.jsonl"), split="train")
    # Three verdicts, 1.5 won: (1.5 + 1) / (3 + 2) for the rest.
    assert data["chosen_wins"][:] == [1.0, 0.0, 0.5, *[0.5] * 5]
    assert len(curve(train(data=data, loss_type="apo_blend", steps=2))) == 2


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--chosen_score", "score"], "chosen_score: requires policy_score"),
        (["--chosen_score", "score", "--policy_score", "none"], "--policy_score: row 1 has no numbers"),
        (
            ["--judge", "j", "--judge_base_url", "http://127.0.0.1:1/v1", "--policy_response", "no"],
            "--policy_response: row 1 has no 'no'",
        ),
        (["--judge", "j", "--judge_base_url", "nonsense"], "judge_base_url: must start with http://"),
        (["--dataset", "no.jsonl"], "dataset: file no.jsonl not found"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(more, words, tmp_path, capsys):
    path = dataset(tmp_path / "pairs.jsonl", [9] * 3)
    with pytest.raises(SystemExit) as stop:
        run(capsys, "--dataset", path, "--policy", "policy", "--output_dir", tmp_path / "out", *more)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


class TestSuggest:
    @pytest.mark.parametrize(
        ("wins", "losses", "suggestion"),
        [
            (20, 0, "apo_zero"), (19, 0, None), (0, 20, "apo_down"), (0, 19, None), (15, 15, "apo_blend"),
            (8, 24, "apo_blend"), (24, 8, None), (4, 28, None), (0, 0, None),
        ],
    )  # fmt: skip
    def test_where_the_evidence_ends(self, wins, losses, suggestion):
        assert suggest(wins, losses)["suggestion"] == suggestion

    def test_how_often_it_is_wrong(self):
        """Of drawn datasets whose true share lies clearly inside a zone, hardly any is given another loss."""
        chance = random.Random(0)
        for share, loss in ((0.95, "apo_zero"), (0.5, "apo_blend"), (0.02, "apo_down")):
            named = [
                suggest(wins := sum(chance.random() < share for _ in range(60)), 60 - wins)["suggestion"]
                for _ in range(40)
            ]
            assert named.count(loss) >= 38
            assert set(named) <= {loss, None}


class TestCompare:
    def run(self, capsys, tmp_path, answers, count=24, **faults):
        def reply(body):
            name = body["model"]
            return answers(name, body["messages"][-1]["content"]) if name in "ab" else referee(body)

        prompts = write(
            tmp_path / "prompts.jsonl", [{"id": f"p{at}", "prompt": f"Question {at}?"} for at in range(count)]
        )
        with ChatServer(reply, **faults) as server:
            urls = [part for name in ("a", "b", "judge") for part in (f"--{name}_base_url", server.url)]
            cli.main(["compare", "--a", "a", "--b", "b", "--prompts", str(prompts), "--judge", "judge", *urls,
                      "--output_dir", str(tmp_path / "out"), "--judge_max_retries", "0"])  # fmt: skip
        return capsys.readouterr().out, json.loads((tmp_path / "out" / "compare.json").read_text())

    def test_the_better_model_wins_whichever_is_shown_first(self, capsys, tmp_path):
        out, report = self.run(capsys, tmp_path, lambda name, text: f"quality {8 if name == 'b' else 5}")
        assert (report["a_wins"], report["b_wins"], report["judged"]) == (0, 24, 24)
        assert report["win_rate"][:2] == [0, 0]
        assert "A's win rate        0.0%" in out
        assert report["judge"]["orders_agree"] == 1

    def test_the_same_model_twice_is_all_ties(self, capsys, tmp_path):
        _, report = self.run(capsys, tmp_path, lambda name, text: f"quality 5 {text}")
        assert (report["ties"], report["win_rate"][0]) == (24, 0.5)

    def test_a_failure_leaves_the_count(self, capsys, tmp_path):
        broken = lambda number, body: "400" if "Question 3?" in str(body) and body["model"] == "judge" else None  # noqa: E731
        out, report = self.run(capsys, tmp_path, lambda name, text: f"quality {8 if name == 'a' else 5}", faults=broken)
        assert (report["asked"], report["judged"], report["a_wins"]) == (24, 23, 23)
        assert report["dropped"] == {"judge_error": 1}
        assert report["win_rate"][0] == 1
        assert "No verdict: 1 judge_error." in out

    def test_rates_by_hand(self):
        made = [("first", 10, 5)] * 6 + [("second", 5, 10)] * 2 + [("tie", 5, 5), ("disagreement", 6, 5)]
        rows = [{"reason": "", "outcome": o, "a_length": a, "b_length": b} for o, a, b in made]
        rows += [{"reason": "", "outcome": "judge_invalid", "a_length": 1, "b_length": 1}, {"reason": "a_error"}]
        report = summarise(rows)
        assert report["win_rate"][0] == pytest.approx(0.7)  # six and two halves of ten
        assert (report["judged"], report["invalid"], report["dropped"]) == (10, 1, {"a_error": 1})
        assert report["mean_lengths"] == [pytest.approx(8.1), pytest.approx(6.0)]

    def test_a_win_by_length_alone_is_none_at_equal_lengths(self):
        """The longer answer always wins, and A's is longer three times in four."""
        lengths = [(200, 100)] * 75 + [(100, 200)] * 25
        points = [1.0] * 75 + [0.0] * 25
        value, low, high = length_controlled(points, lengths)
        assert abs(value - 0.5) < 0.2
        assert low < 0.6 < 0.75
        # Where lengths say nothing, nothing changes.
        chance = random.Random(0)
        lengths = [(chance.randint(50, 150), chance.randint(50, 150)) for _ in range(400)]
        points = [float(chance.random() < 0.7) for _ in lengths]
        value, low, high = length_controlled(points, lengths)
        assert value == pytest.approx(sum(points) / 400, abs=0.01)
        assert low < 0.7 < high
        assert length_controlled(points, lengths) == (value, low, high)

    def test_one_model_is_not_two(self, tmp_path):
        from apo_trl.evaluation.compare import compare
        from apo_trl.pairs.config.settings import make_settings

        keys = {"method": "off_policy_judge", "prompts": "x", "output_dir": str(tmp_path), "policy_model": "a"}
        with pytest.raises(InputError, match="Set --a and --b"):
            compare(make_settings(keys | {"judge_model": "j"}))
