"""What a recipe trains, and on which pairs, if they are in local files."""

from typing import Any

from apo_trl.io.resources import find_recipe, read_yaml
from apo_trl.training.arguments import trl_script

__all__ = ["describe", "local_dataset"]


def describe(name: str) -> dict[str, str]:
    """Return a row for a table: `name`, `model`, `loss`, `method` and `hardware` of a recipe."""
    path = find_recipe(name)
    config, lines = read_yaml(path), path.read_text(encoding="utf-8").splitlines()
    hardware = next((line for line in lines if line.startswith("# Hardware:")), "")
    return {
        "name": name,
        "model": str(config.get("model_name_or_path", "packaged SmolLM2-135M")).split("/")[-1],
        "loss": "+".join(_losses(config)),
        "method": "QLoRA" if config.get("load_in_4bit") else "LoRA" if config.get("use_peft") else "full",
        "hardware": hardware.removeprefix("# Hardware:").split(";")[0].strip(" ."),
    }


def _losses(config: dict[str, Any]) -> list[str]:
    script = trl_script(config)
    losses = config.get("loss_type", "apo_zero" if script == "dpo" else script)
    return [losses] if isinstance(losses, str) else losses


def local_dataset(run: Any) -> dict[str, Any]:
    """Load the splits of a run's pairs as training does, or return none if they are on the hub."""
    from apo_trl.io.readers import file_builder, is_local
    from apo_trl.training.script import load_run_dataset

    name = run.script.dataset_name
    is_here = name and not run.mixture.datasets and (file_builder(name) or is_local(name))
    return dict(load_run_dataset(run)) if is_here else {}
