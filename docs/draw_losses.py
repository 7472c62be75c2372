"""Draw `losses.png`: where each loss pulls a pair, over the plane of its two log-ratios. Run by `make figures`."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot

from apo_trl import LOSSES

LENGTHS = {"chosen_lengths": 100.0, "rejected_lengths": 20.0}
PANELS = {
    "DPO (sigmoid), beta 0.1": (lambda c, r: -torch.nn.functional.logsigmoid(0.1 * (c - r)), {}),
    "apo_zero, beta 0.1": (LOSSES["apo_zero"], {"beta": 0.1}),
    "apo_down, beta 0.1": (LOSSES["apo_down"], {"beta": 0.1}),
    "apo_blend, beta 0.1,\nchosen_wins 0.5": (LOSSES["apo_blend"], {"beta": 0.1, "chosen_wins": 0.5}),
    "apo_zero_norm, beta 5,\n100 tokens against 20": (LOSSES["apo_zero_norm"], {"beta": 5.0, **LENGTHS}),
    "apo_down_norm, beta 5,\n100 tokens against 20": (LOSSES["apo_down_norm"], {"beta": 5.0, **LENGTHS}),
}
REACH = 60


def pulls(loss, settings):
    """Give the step of steepest descent at every point of the plane."""
    line = torch.linspace(-REACH, REACH, 17, dtype=torch.float64)
    points = torch.cartesian_prod(line, line).requires_grad_()
    wide = {key: value if key == "beta" else torch.full((len(points),), value) for key, value in settings.items()}
    loss(points[:, 0], points[:, 1], **wide).sum().backward()
    return points.detach(), -points.grad


figure, axes = pyplot.subplots(2, 3, figsize=(12, 8), layout="constrained", sharex=True, sharey=True)
for panel, (title, (loss, settings)) in zip(axes.flat, PANELS.items(), strict=True):
    points, step = pulls(loss, settings)
    strength = step.norm(dim=1)
    direction = step / strength.clamp(min=1e-12).unsqueeze(1)
    strength = strength / strength.max()
    arrows = panel.quiver(
        points[:, 0], points[:, 1], direction[:, 0], direction[:, 1], strength,
        cmap="viridis_r", clim=(0, 1), pivot="mid", scale=22, width=0.006,
    )  # fmt: skip
    panel.axhline(0, color="#777777", linewidth=1, linestyle="--", zorder=0)
    panel.axvline(0, color="#777777", linewidth=1, linestyle="--", zorder=0)
    panel.set(title=title, aspect="equal", xlim=(-REACH - 4, REACH + 4), ylim=(-REACH - 4, REACH + 4))
    panel.spines[["top", "right"]].set_visible(False)
for panel in axes[1]:
    panel.set_xlabel("log-ratio of chosen (nats)")
for panel in axes[:, 0]:
    panel.set_ylabel("log-ratio of rejected (nats)")
figure.colorbar(arrows, ax=axes, label="pull, as a share of the strongest in the panel", shrink=0.6)
figure.savefig(Path(__file__).parent / "losses.png", dpi=110)
