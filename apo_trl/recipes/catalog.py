"""What a recipe trains, for the table of `apo-trl recipes`."""

from pathlib import Path

from apo_trl.io.resources import find_recipe, read_yaml

__all__ = ["describe", "is_unpaired"]


_UNPAIRED = {"kto", "apo_zero_unpaired"}  # the losses of TRL's KTOTrainer


def describe(name: str) -> dict[str, str]:
    """Say what a recipe is: `name`, `model`, `loss`, `method` and `hardware`, in words for a table."""
    path = find_recipe(name)
    config = read_yaml(path)
    losses = config.get("loss_type", "apo_zero")
    method = "LoRA" if config.get("use_peft") else "full"
    hardware = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# Hardware:")]
    return {
        "name": name,
        "model": str(config.get("model_name_or_path", "packaged SmolLM2-135M")).split("/")[-1],
        "loss": losses if isinstance(losses, str) else "+".join(losses),
        "method": "QLoRA" if config.get("load_in_4bit") else method,
        "hardware": hardware[0].removeprefix("# Hardware:").split(";")[0].strip(" .") if hardware else "",
    }


def is_unpaired(path: Path) -> bool:
    """Say whether a file is for TRL's KTOTrainer, whose settings are of another class."""
    losses = read_yaml(path).get("loss_type", [])
    return bool(_UNPAIRED.intersection([losses] if isinstance(losses, str) else losses))
