"""Draws what `policies` found: accuracy against targets met, over the load."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

SHOWN = {
    "ours": "black",
    "reserve": "dimgray",
    "slackfit": "tab:blue",
    "maxbatch": "tab:cyan",
    "maxacc": "tab:orange",
    "infaas": "tab:red",
    "clipper": "tab:purple",
    "bentoml": "tab:brown",
    "clockwork": "tab:olive",
    "nexus": "tab:pink",
    "nexus-smallest": "goldenrod",
    "largest": "tab:gray",
    "middle": "darkseagreen",
    "smallest": "tab:green",
}


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a picture: a column for each kind of arrivals; missed targets above, accuracy below."""
    columns = list(dict.fromkeys(row["arrivals"] for row in rows))
    figure = Figure(figsize=(3 * len(columns) + 1.5, 6), layout="constrained")
    axes = figure.subplots(2, len(columns), sharex=True, sharey="row", squeeze=False)
    for column, arrivals in enumerate(columns):
        for policy, color in SHOWN.items():
            own = [
                row
                for row in rows
                if row["arrivals"] == arrivals
                and row["policy"] == policy
                and row["targets"] == "one"
            ]
            loads = [row["load"] for row in own]
            missed = [max(1e-5, 1 - row["met"][0]) for row in own]
            accuracy = [100 * row["accuracy"][0] if row["accuracy"] else None for row in own]
            line = "--" if policy == "reserve" else "-"
            style = {"color": color, "marker": ".", "linestyle": line, "label": policy}
            axes[0][column].plot(loads, missed, **style)
            axes[1][column].plot(loads, accuracy, **style)
        axes[0][column].set_title(arrivals)
        axes[0][column].set_yscale("log")
        axes[1][column].set_xlabel("load over the largest point's capacity")
    axes[0][0].set_ylabel("targets missed (1e-5: none)")
    axes[1][0].set_ylabel("accuracy of targets met, %")
    lines = axes[0][0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=110)
