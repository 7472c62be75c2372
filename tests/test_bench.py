"""`apo-trl bench`: that it measures what it says, small; its figures are in docs/performance.md."""

import json
import re

import fake_flash
import pytest
import torch
from conftest import rows
from test_cli import write
from transformers import LlamaConfig

from apo_trl.benchmark import measure
from apo_trl.benchmark.cases import CASES, Case, build_model, random_batches
from apo_trl.cli import main as cli
from apo_trl.prefix_sharing import enable_prefix_sharing


@pytest.mark.filterwarnings("ignore:.*None of the inputs have requires_grad.*:UserWarning")
def test_it_compares_while_it_times(model_dir, tmp_path, capsys):
    write(tmp_path / "mine.jsonl", rows(8))
    cli.main(
        ["bench", str(tmp_path / "mine.jsonl"), "--model", str(model_dir), "--repeats", "1", "--device", "cpu",
         "--json", str(tmp_path / "figures.json")]
    )  # fmt: skip
    figures = {row["name"]: row for row in json.loads((tmp_path / "figures.json").read_text())}
    assert list(figures) == [*CASES, "the CLAIR pairs", "mine.jsonl"]
    for row in figures.values():
        assert row["tokens_saved"] > 1
        assert row["step_time"] > 0
        assert row["logps_differ"] < 1e-4
        assert row["gradients_differ"] < 1e-4
        assert 0 < row["peak_memory"] < 2
        assert re.fullmatch(r"\w.*; TRL: sdpa", row["kernel"])
    # Three ranked answers: by hand, six rows of about 320 tokens against one prompt and three answers, about 620.
    assert figures["3 pairs of 3 ranked answers, 170 / 150"]["tokens_saved"] > 2.5
    out = capsys.readouterr().out
    assert out.count("\n|") == 2 + len(figures)


def test_the_distance_from_float32_is_measured_without_a_flash_kernel():
    """The kernels take bfloat16 and float16 only; the stand-in would take float32, too."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=1, use_cache=False, **shape)
    with fake_flash.installed():
        network = build_model(config, 1, "bfloat16", "cpu", attention="flash_attention_2")
        padded = network.forward
        enable_prefix_sharing(network)
        (batch,) = random_batches(Case(8, 8, batches=1), 64)
        assert 0 < measure._error(network, (padded, network.forward), batch) < 2
        assert {call["dtype"] for call in fake_flash.CALLS} == {torch.bfloat16}
        assert network.config._attn_implementation == "flash_attention_2"


def test_a_model_that_cannot_be_loaded(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "--model", str(tmp_path)])
    assert stop.value.code == 2
    assert f"{tmp_path} cannot be loaded" in capsys.readouterr().err
