"""docs/answers.md: its sets are what the page says, its tables are those of the stored results, and a run does run."""

import json
import random
import sys

import numpy as np
import pytest
from conftest import make_model, make_tokenizer
from test_docs import DOCS

sys.path.insert(0, str(DOCS))

import answers
import answers_data as data
import answers_page as page

TASKS = {name: data.load_task(name) for name in answers.TASKS}


def sampled(task):
    """Answers of which about a third follow, as a model would write them, six to a prompt."""
    chance, found = random.Random(0), {}
    for row in task.train:
        texts = []
        for number in range(data.SAMPLES + data.OFF_POLICY):
            text = f"The thing in question number {number} is known to many People. They like it, and they keep it."
            if "sentence" in row:
                text = f"Yes {number}, " + row["sentence"].format(chance.choice([row["answer"], *row["others"]]))
                text = text if number % 2 else text.replace(f" {number}", "")
            elif chance.random() < 0.3:
                (new,) = task.revise(completions=[text], kind=[row["kind"]], argument=[row["argument"]])
                text = new or text
            texts.append(text)
        found[row["id"]] = texts
    return found


@pytest.fixture(scope="module", params=answers.TASKS)
def drawn(request):
    task = TASKS[request.param]
    return task, sampled(task)


def scores(task, pair):
    columns = {name: [value] * 2 for name, value in pair["row"].items() if name not in ("id", "prompt")}
    texts = [pair[side][0]["content"] for side in ("chosen", "rejected")]
    return task.reward(completions=texts, **columns)


@pytest.mark.parametrize("name", data.SETS)
def test_chosen_follows_and_rejected_does_not(drawn, name):
    task, samples = drawn
    pairs = data.SETS[name](task, samples, 0)
    assert len(pairs) > 20
    assert all(scores(task, pair) == [1, 0] for pair in pairs)
    of = {pair["row"]["id"]: pair["rejected"][0]["content"] for pair in pairs}
    places = {"on-policy": range(data.SAMPLES), "off-policy": range(data.SAMPLES, 6)}.get(name, range(1))
    assert all(text in [samples[key][at] for at in places] for key, text in of.items())
    assert pairs != data.SETS[name](task, samples, 1)
    needed = {key: texts[: answers.parts(name).stop] for key, texts in samples.items()}
    assert pairs == data.SETS[name](task, needed, 0)  # the other samples are not drawn for this set


def test_stronger_answers_are_not_made_of_rejected():
    task = TASKS["instructions"]
    samples = sampled(task)
    revised = {pair["row"]["id"]: pair["chosen"] for pair in data.clair(task, samples, 0)}
    pairs = data.stronger(task, samples, 0)
    assert pairs
    assert all(pair["chosen"] != revised[pair["row"]["id"]] for pair in pairs)


@pytest.mark.parametrize("share", answers.SHARES)
def test_the_share_of_winners_that_beat_the_policy(share):
    task = TASKS["instructions"]
    pairs = data.mixture(task, sampled(task), 0, share)
    followed = [scores(task, pair) for pair in pairs]
    better = [pair["chosen_wins"] == 1 for pair in pairs]
    assert sum(better) == round(data.PAIRS * share / 100)
    assert all(score == ([1, 0] if wins else [0, 0]) for score, wins in zip(followed, better, strict=True))


@pytest.mark.parametrize(
    ("text", "score", "revision"),
    [
        ("Anna bought 4 pens.", 1, None),
        ("She bought four pens.", 0, "Anna bought 4 pens."),
        ("Anna bought 7 pens.", 0, "Anna bought 4 pens."),
        ("Anna bought 4 pens. Ben bought 7 cups.", 0, "Anna bought 4 pens."),
        ("Anna bought 4 pens, which is 4 x 10 = 40.", 0, "Anna bought 4 pens."),
        ("", 0, "Anna bought 4 pens."),
    ],
)
def test_a_note_is_answered_or_corrected(text, score, revision):
    columns = {"answer": ["4"], "others": [["7"]], "sentence": ["Anna bought {} pens."]}
    assert data.note_reward([text], **columns) == [score]
    assert data.note_revise([text], **columns) == [revision]


def test_held_out_prompts_are_not_trained_on():
    for task in TASKS.values():
        assert len(task.train) == 480
        assert len(task.test) >= 96
        assert not {row["prompt"] for row in task.train} & {row["prompt"] for row in task.test}


def test_an_interval_covers_seeds_and_prompts():
    assert page.interval(np.ones((3, 50))) == (1, 1, 1)
    of_prompts = np.tile(np.arange(100) % 2, (3, 1))
    mean, low, high = page.interval(of_prompts)
    assert (mean, round(low, 1), round(high, 1)) == (0.5, 0.4, 0.6)
    of_seeds = np.repeat([[0.0], [0.5], [1.0]], 100, axis=1)
    mean, low, high = page.interval(of_seeds)
    assert (mean, low, high) == (0.5, 0.0, 1.0)


@pytest.mark.parametrize(
    ("gap", "least", "said"),
    [
        (None, 0, "not run"),
        ((0.1, 0.02, 0.2), 0, "holds"),
        ((0.1, -0.02, 0.2), 0, "undecided"),
        ((-0.1, -0.2, -0.02), 0, "does not hold"),
        ((-0.01, -0.04, 0.02), -0.05, "holds"),
        ((-0.01, -0.06, 0.02), -0.05, "undecided"),
    ],
)
def test_a_verdict(gap, least, said):
    assert page.verdict(gap, least) == said


def test_no_verdict_before_every_seed_has_run():
    assert page.verdict((0.1, 0.02, 0.2), 0, 2) == "open: 2 of 3 seeds"


def test_the_page_shows_the_stored_results():
    text, results = page.PAGE.read_text(), answers.load()
    for name, lines in page.tables(results).items():
        assert f"<!-- {name} -->\n{lines}\n<!-- end -->" in text
    planned = answers.planned()
    assert all(result["run"] in planned for result in results)
    assert len({json.dumps(run) for run in planned}) == len(planned)


def test_every_row_of_the_page_is_planned():
    planned = answers.planned()
    rows = [(task, row) for task in answers.TASKS for _, row in page.rows(task)]
    rows += [("instructions", row) for _, *claim in page.CLAIMS for row in claim[:2]]
    methods = ("apo_zero", "apo_down", "apo_blend")
    rows += [("instructions", answers.run_of(f"{share} %", method)) for share in answers.SHARES for method in methods]
    used = [{"task": task, **row, "seed": 0} for task, row in rows]
    for run in used:
        assert run.pop("part", 1) in (1, 2, 3)
        assert run in planned
    assert [run for run in planned if run["seed"] == 0 and run not in used] == []


def test_how_far_a_model_is_from_its_start(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "model_folder", lambda: str(model_dir))
    make_model(seed=1).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    rows, texts = [{"prompt": "Where is Ida from?"}], ["Ida is from Rome."]
    assert answers.kl(str(model_dir), rows, texts) == 0
    assert answers.kl(str(tmp_path), rows, texts) > 0.01


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_method_runs(model_dir, tmp_path, monkeypatch):
    task = data.Task(*(rows[:12] for rows in TASKS["instructions"][:2]), *TASKS["instructions"][2:4], 8)
    for module in (answers, data):
        monkeypatch.setattr(module, "load_task", lambda name: task)
    monkeypatch.setattr(answers, "model_folder", lambda: str(model_dir))
    monkeypatch.setattr(answers, "samples", lambda name, data: sampled(task))
    monkeypatch.setattr(answers, "sampled_tokens", lambda *given: 100)
    monkeypatch.setattr(answers, "clair", lambda task, found, seed: data.clair(task, sampled(task), seed))
    monkeypatch.setattr(answers, "STEPS", 1)
    monkeypatch.setattr(answers, "BATCH", 2)
    monkeypatch.setattr(answers, "STORE", tmp_path / "answers.json")
    results = []
    for data_name, method in (
        ("none", "before"), ("clair", "sft"), ("clair", "apo_zero_norm"), ("50 %", "apo_blend"),
        ("verifier", "rloo"), ("reward model", "rloo"), ("clair", "rounds"),
    ):  # fmt: skip
        run = {"task": "instructions", "data": data_name, "method": method, "seed": 0}
        results.append(json.loads(json.dumps(answers.do(run))))
    answers.save(results)
    assert [result["run"] for result in answers.load()] == [
        run for run in answers.planned() if run in [result["run"] for result in results]
    ]
    assert len(results[2]["followed"]) == 12
    assert len(results[-1]["rounds"]) == 3
    table = page.main_table(answers.load(), "instructions")
    assert "| the model before | 0 %" in table
