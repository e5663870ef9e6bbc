"""Draws an artifact's points: accuracy against this host's latency, or MACs where unmeasured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from maestro_core.artifact import Artifact


def draw(artifact: Artifact, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a picture of the points, `rows` as server.answers gives them.

    Raises:
        ValueError: matplotlib does not know the picture format of `path`.
    """
    measured = rows[0]["p50_ms"] is not None
    x = [row["p50_ms"] if measured else row["macs"] for row in rows]
    y = [100 * row["accuracy"] for row in rows]
    spread = [
        [100 * abs(row["accuracy"] - row[f"accuracy_{side}"]) for row in rows]
        for side in ("low", "high")
    ]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(x, y, spread, fmt="o-", capsize=3, color="tab:blue", ecolor="lightsteelblue")
    for row, at_x, at_y in zip(rows, x, y, strict=True):
        axes.annotate(str(row["point"]), (at_x, at_y), (4, -11), textcoords="offset points")
    metric = artifact.manifest.metric
    axes.set_xlabel("p50 latency of one sample on this host, ms" if measured else "MACs")
    axes.set_ylabel(f"{metric.name}, % ({metric.data_set}, 95 % interval)")
    axes.set_title(f"{artifact.manifest.name}: one network, {len(rows)} points")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
