"""The picture of a ladder: losses over tokens, a line for each size, and the prediction."""

import io
from collections.abc import Mapping
from typing import Any

LEAST_FLOOR = 0.05  # of the predicted loss: a fitted E below that says that the runs show none


def picture(found: Mapping[str, Any], measured: float | None = None) -> str:
    """The picture of a prediction as SVG, with what was measured then; the same bytes each time."""
    import matplotlib as mpl
    import numpy as np
    from matplotlib.figure import Figure

    from nanogpt.scaling import Law

    law, target, predicted = Law(**found["law"]), found["target"], found["prediction"]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot(xlabel="tokens", ylabel="validation loss (nats per token)", xscale="log")
    first, last = min(run["tokens"] for run in found["runs"]), max(run["tokens"] for run in [*found["runs"], target])
    x = np.geomspace(first / 1.3, last * 1.3, 100)
    sizes = sorted({run["parameters"] for run in found["runs"]} | {target["parameters"]})
    for number, size in enumerate(sizes):
        runs = [run for run in found["runs"] if run["parameters"] == size]
        colour = f"C{number}"
        axes.plot(x, [law.loss(size, tokens) for tokens in x], color=colour, linewidth=1, alpha=0.7)
        axes.plot([run["tokens"] for run in runs], [run["loss"] for run in runs], "o", color=colour, label=f"{size:,}")
    low, high = predicted["low"], predicted["high"]
    bars = [[predicted["loss"] - low], [high - predicted["loss"]]]
    axes.errorbar(target["tokens"], predicted["loss"], np.maximum(bars, 0), fmt="s", color="black", label="predicted")
    if measured is not None:
        axes.plot(target["tokens"], measured, "*", color="red", markersize=10, label="measured")
    if law.floor > LEAST_FLOOR * predicted["loss"]:
        axes.axhline(law.floor, color="grey", linewidth=1, label="fitted floor")
    if found["best_possible"] is not None:
        axes.axhline(found["best_possible"], color="grey", linewidth=1, linestyle="--", label="best possible")
    axes.legend(title="parameters", fontsize="small")
    axes.grid(alpha=0.3)
    svg = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "ladder"}):
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return svg.getvalue()
