"""A picture of a run from its ``metrics.jsonl``: the loss, and spectral norms against the radius."""

import json
from pathlib import Path


def draw(folder: Path) -> Path:
    """Write ``run.png`` into a run's folder.

    Args:
        folder: what ``--spectral-run-dir`` named.

    Returns:
        The picture's path.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    summary = json.loads((folder / "summary.json").read_text())
    normed = [r for r in records if "median_norm_over_radius" in r]
    figure, axes = plt.subplots(1, 2 if normed else 1, figsize=(10, 4), squeeze=False)
    loss_axis = axes[0][0]
    loss_axis.plot([r["iteration"] for r in records], [r["loss"] for r in records], "k-", lw=1.2)
    if summary["val_loss"] is not None:
        loss_axis.plot(summary["iterations"], summary["val_loss"], "ks", mfc="w", label="validation")
        loss_axis.legend()
    loss_axis.set(xlabel="iteration", ylabel="loss (nats a token)", title="Training loss")
    if normed:
        norm_axis = axes[0][1]
        steps = [r["iteration"] for r in normed]
        styles = {"largest": "C3-", "median": "C0--", "smallest": "C7:"}
        for which, style in styles.items():
            values = [r[f"{which}_norm_over_radius"] for r in normed]
            norm_axis.plot(steps, values, style, label=which)
        norm_axis.axhline(1.0, color="k", lw=0.6)
        norm_axis.set(
            xlabel="iteration",
            ylabel=r"$\|W\|_2 / R$ before retraction",
            title="Spectral norms against the radius",
        )
        norm_axis.legend()
    for axis in axes[0]:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    path = folder / "run.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
