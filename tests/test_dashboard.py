"""The Grafana dashboard asks for metrics, labels and buckets that the server has."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.answers import Inference
from server.metrics import Metrics

DASHBOARD = json.loads(
    (Path(__file__).parents[1] / "deploy" / "grafana-dashboard.json").read_text()
)
METRIC = re.compile(r"\b(maestro_[a-z_]+)(?:\{([^}]*)\})?")
FROM_THE_SCRAPE = {"job"}


def exported() -> dict[str, list[dict[str, str]]]:
    """Return the label sets of each series of a server that has answered and refused."""
    metrics = Metrics()
    output = np.zeros((1, 10), np.float32)
    metrics.answered(Inference(output, 0, 1.0, 5.0, 1.0, 1), 6.1, target_ms=3.0)
    metrics.refused("unavailable", "overloaded")
    metrics.decided(1e-5)
    metrics.ran(0, 1, 0.001, 0.001)
    found: dict[str, list[dict[str, str]]] = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


def queries() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


@pytest.mark.parametrize("query", queries())
def test_a_query_names_what_is_exported(query: str) -> None:
    series = exported()
    named = METRIC.findall(query)
    assert named
    for name, matchers in named:
        assert name in series
        for label, operator, value in re.findall(r'(\w+)(=~|!=|=)"([^"]*)"', matchers):
            if label in FROM_THE_SCRAPE:
                continue
            assert any(label in labels for labels in series[name]), f"{name} has no {label}"
            if operator == "=":
                assert any(labels[label] == value for labels in series[name]), f"{label}={value}"


@pytest.mark.parametrize("query", queries())
def test_what_is_grouped_by_is_a_label(query: str) -> None:
    names = {name for name, _ in METRIC.findall(query)}
    grouped = {
        label for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(", ")
    }
    known = {label for name in names for labels in exported()[name] for label in labels}

    assert grouped <= known


def test_no_quantile_is_taken_of_whole_numbers() -> None:
    """Prometheus interpolates from 0 to 1: half a sample, where every batch has one."""
    assert not [query for query in queries() if re.search("quantile.*batch_size", query)]


def test_panels_have_names_of_their_own_and_do_not_overlap() -> None:
    panels: list[dict[str, Any]] = DASHBOARD["panels"]
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]

    assert len({panel["title"] for panel in panels}) == len(panels)
    assert len(set(places)) == len(panels)
    assert all(panel["description"] for panel in panels)
