"""Points found on this host for the tiny network: nested, verified, served like the others."""

import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper

from benchmarks import host_artifact, host_points, layer_latencies, networks
from benchmarks.correction import Correction
from benchmarks.effort import CancelledError
from benchmarks.host_points import Candidate, Found, Network, Plan
from benchmarks.layer_latencies import LayerLatency, Measuring
from benchmarks.normalisation import recalibrated
from maestro_core import artifact, graph, held_out
from maestro_core.artifact import Artifact, ArtifactError
from maestro_core.frontier import RankTable
from server.engine import Engine
from server.settings import shipped_artifact
from tests.conftest import TINY_LAYERS, tiny_contents, tiny_manifest

TABLES = (
    RankTable((1, 2, 6), (1.0, 2.0, 6.0), (3.0, 1.5, 0.5)),
    RankTable((1, 5, 9, 10), (1.0, 5.0, 9.0, 10.0), (3.0, 1.6, 0.8, 0.5)),
)
MEASURING = Measuring(budget_s=0.6)
CORRECTION = Correction(0.0, 1.0, 0.0, 1.0)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Return the tiny artifact; its samples are labelled by its own dearest point."""
    path = tmp_path_factory.mktemp("host") / "tiny.maestro"
    bare = artifact.save(path, tiny_manifest(), tiny_contents())
    x = np.random.default_rng(0).standard_normal((200, 1, 8, 8)).astype(np.float32)
    labels = Engine(bare).run(x, len(bare.points) - 1).argmax(-1)
    extra = held_out.contents(x, labels, ("conv", "fc"), TABLES)
    return artifact.save(path, tiny_manifest(), {**tiny_contents(), **extra})


@pytest.fixture(scope="module")
def network(source: Artifact) -> Network:
    return Network.of(source)


@pytest.fixture(scope="module")
def found(network: Network) -> Found:
    return host_points.search(network, 4, MEASURING)


def test_the_points_are_nested_and_each_earns_its_latency(found: Found) -> None:
    assert 1 <= len(found.points) <= 4
    for less, more in pairwise(found.points):
        assert all(a <= b for a, b in zip(less.ranks, more.ranks, strict=True))
        assert less.p50_ms < more.p50_ms
        assert less.correct < more.correct


def test_the_best_point_is_as_accurate_as_the_whole_network(found: Found) -> None:
    assert found.points[-1].correct == 150
    assert found.points[-1].score.value == 1.0


def test_saved_points_compute_what_their_graphs_do_from_the_same_file(
    source: Artifact, network: Network, found: Found, tmp_path: Path
) -> None:
    saved = host_artifact.save(network, found, source.path.parent / "host.maestro")

    x = network.samples.x[:5]
    engine = Engine(saved, state_dir=tmp_path)
    assert saved.weights_path.read_bytes() == source.weights_path.read_bytes()
    assert saved.digest != source.digest
    assert saved.manifest.provenance["searched"]["from"] == source.digest
    for i, candidate in enumerate(found.points):
        session = layer_latencies.session_of(candidate.model, network.folder, 1)
        assert engine.run(x, i) == pytest.approx(session.run(None, {"x": x})[0], abs=1e-4)
        assert saved.points[i].score.value == candidate.correct / 150


def test_a_point_known_before_costs_what_it_did(source: Artifact, network: Network) -> None:
    ranks = [point.ranks for point in source.points]
    candidates = [
        Candidate(network.plan(r), network.graph(network.plan(r)), 1, 150, 1.0 + i)
        for i, r in enumerate(ranks)
    ]

    saved = host_artifact.save(
        network,
        Found(tuple(candidates), CORRECTION, frozenset()),
        source.path.parent / "same.maestro",
    )

    for old, new in zip(source.points, saved.points, strict=True):
        assert (old.macs, old.params, old.ranks) == (new.macs, new.params, new.ranks)


def candidate(ranks: tuple[int, int], correct: int, p50_ms: float, *dense: str) -> Candidate:
    return Candidate(Plan(ranks, frozenset(dense)), ModelProto(), correct, 10, p50_ms)


ALL_DENSE = candidate((6, 10), 9, 5.0, "conv", "fc")


def test_a_point_of_the_artifact_is_normalised_as_it_was_exported() -> None:
    shipped = artifact.load(shipped_artifact())
    network = Network.of(shipped)
    plan = network.plan(shipped.points[0].ranks)

    model = network.build(plan, MEASURING)

    x = network.samples.x[:5]
    session = layer_latencies.session_of(model, network.folder, 1)
    (output,) = session.run(None, {shipped.manifest.input.name: x})
    assert output == pytest.approx(Engine(shipped).run(x, 0), abs=1e-4)
    assert network.statistics[plan.ranks]


def test_another_point_is_normalised_much_as_if_it_had_been_exported() -> None:
    whole = Network.of(artifact.load(shipped_artifact()))
    *_, left_out, _ = whole.statistics
    others = {ranks: s for ranks, s in whole.statistics.items() if ranks != left_out}
    network = replace(whole, statistics=others)
    plan = whole.plan(left_out)
    uncorrected = recalibrated(network.graph(plan), network.folder, network.inputs, MEASURING)

    corrected = network.build(plan, MEASURING)

    assert len(network.drifts) == 1
    expected, ours, worse = (
        layer_latencies.session_of(model, network.folder, 1).run(
            None, {whole.artifact.manifest.input.name: network.samples.x[:100]}
        )[0]
        for model in (whole.build(plan, MEASURING), corrected, uncorrected)
    )
    assert np.abs(ours - expected).mean() < 0.5 * np.abs(worse - expected).mean()


def ranks_of(points: list[Candidate]) -> list[tuple[int, ...]]:
    return [one.ranks for one in host_points._best(points, ALL_DENSE, 9)]


def test_points_are_nested_and_each_is_slower_and_more_accurate() -> None:
    seen = [
        candidate((1, 1), 5, 1.0),
        candidate((2, 4), 5, 1.5),  # no more accurate
        candidate((3, 9), 8, 2.0),
        candidate((2, 5), 9, 3.0),  # not nested
        candidate((6, 10), 9, 4.0),
    ]

    assert ranks_of(seen) == [(1, 1), (3, 9), (6, 10)]


def test_of_the_chains_it_is_the_one_that_answers_best_over_all_budgets() -> None:
    seen = [
        candidate((1, 1), 4, 1.0),
        candidate((1, 5), 5, 2.0),
        candidate((1, 6), 6, 3.0),
        candidate((5, 1), 7, 3.5),
        candidate((5, 9), 8, 4.0),
    ]
    assert ranks_of(seen) == [(1, 1), (1, 5), (1, 6), (5, 9), (6, 10)]

    seen[3] = candidate((5, 1), 7, 2.1)  # far better than those that are not nested in it

    assert ranks_of(seen) == [(1, 1), (5, 1), (5, 9), (6, 10)]


def test_a_point_that_is_better_by_chance_does_not_end_a_chain_of_its_own() -> None:
    """Where the most accurate of all by one sample holds few others, another ends the chain."""
    many = [candidate((i, i), 4 + i, float(i)) for i in range(1, 5)]
    by_chance = candidate((1, 10), 9, 4.5)
    all_dense = candidate((6, 10), 8, 4.6, "conv", "fc")

    best = host_points._best([*many, by_chance], all_dense, 9)

    assert [one.ranks for one in best] == [(i, i) for i in range(1, 5)]


def test_the_last_is_surely_not_less_accurate_than_the_best() -> None:
    def of_many(ranks: tuple[int, int], correct: int, p50_ms: float) -> Candidate:
        return replace(candidate(ranks, correct, p50_ms), samples=1000)

    many = [of_many((i, i), 500 + i, float(i)) for i in range(1, 6)]
    surely = of_many((1, 10), 900, 5.5)
    all_dense = replace(candidate((6, 10), 500, 6.0), samples=1000)

    best = host_points._best([*many, surely], all_dense, 9)

    assert [one.ranks for one in best] == [(1, 1), (1, 10)]


def test_no_point_is_slower_than_the_dense_network() -> None:
    slow = [candidate((1, 1), 5, 1.0), candidate((3, 9), 10, 6.0), candidate((6, 10), 9, 5.1)]

    assert host_points._best(slow, ALL_DENSE, 9) == [slow[0], ALL_DENSE]


def test_a_layer_is_whole_in_the_form_that_is_faster(network: Network) -> None:
    latencies = [
        LayerLatency({2: 1.0, 6: 3.0}, dense_ms=2.0),
        LayerLatency({5: 1.0, 10: 1.5}, dense_ms=2.0),
    ]

    tables = host_points.rank_tables(network, latencies)
    dense = host_points.dense_when_whole(network, latencies)
    measured = replace(network, dense_when_whole=dense)

    assert [table.costs for table in tables] == [(1.0, 2.0), (1.0, 1.5)]
    assert measured.plan((6, 10)).dense == {"conv"}
    assert measured.plan((2, 10)).dense == set()


def test_dense_weights_that_the_file_lacks_are_kept_behind_the_others(
    source: Artifact, network: Network, tmp_path: Path
) -> None:
    """As where training has shrunk a layer so far that by MACs it is never dense."""
    lacking = graph.load(source.template_path.read_bytes())
    kept = [tensor for tensor in lacking.graph.initializer if tensor.name != "fc.dense"]
    del lacking.graph.initializer[:]
    lacking.graph.initializer.extend(kept)
    made = graph.dense_weights(lacking, TINY_LAYERS, network.folder)
    shrunk = replace(network, template=lacking, dense=made)
    plan = Plan((6, 10), frozenset({"fc"}))
    (found,) = host_points.verified(shrunk, [plan], MEASURING)

    saved = host_artifact.save(
        shrunk, Found((found,), CORRECTION, frozenset()), tmp_path / "host.maestro"
    )

    x = network.samples.x[:5]
    whole = Engine(source).run(x, len(source.points) - 1)
    weights = source.weights_path.read_bytes()
    assert saved.weights_path.read_bytes()[: len(weights)] == weights
    assert saved.weights_path.stat().st_size >= len(weights) + 4 * 10 * 384
    assert saved.graph_path(0).stat().st_size < 4096
    assert Engine(saved).run(x, 0) == pytest.approx(whole, rel=1e-4)
    assert saved.points[0].macs == 64 * 6 * (6 + 9) + 10 * 384


def test_layers_alike_are_measured_once(tmp_path: Path) -> None:
    network = networks.resnet18()
    template, weights = graph.pack(network.template, network.layers)
    (tmp_path / graph.LOCATION).write_bytes(weights)
    grids = [(layer.max_rank,) for layer in network.layers]

    found = layer_latencies.layer_latencies(
        template, network.layers, grids, {}, tmp_path, MEASURING
    )

    at = {layer.name: ms for layer, ms in zip(network.layers, found, strict=True)}
    assert at["layer1.0.conv1"] == at["layer1.1.conv2"]
    assert at["layer2.0.conv1"] != at["layer2.0.conv2"]


def test_layers_read_the_shapes_they_have_in_the_network(network: Network) -> None:
    shapes = layer_latencies.input_shapes(network.template, TINY_LAYERS, 3)

    assert shapes == [(3, 1, 8, 8), (3, 384)]


def behind_an_unknown_node(network: Network, *dims: int | str) -> ModelProto:
    """Return the template with a node before `fc` whose output ONNX knows no shape of."""
    template = ModelProto()
    template.CopyFrom(network.template)
    template.opset_import.append(helper.make_opsetid("own", 1))
    template.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    at, node = next((i, n) for i, n in enumerate(template.graph.node) if "fc.down" in n.input)
    template.graph.node.insert(at, helper.make_node("Other", [node.input[0]], ["y"], domain="own"))
    template.graph.node[at + 1].input[0] = "y"
    template.graph.value_info.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, dims))
    return template


def test_a_shape_that_onnx_does_not_find_is_the_template_s(network: Network) -> None:
    template = behind_an_unknown_node(network, "batch", 384)

    shapes = layer_latencies.input_shapes(template, TINY_LAYERS, 3)

    assert shapes == [(3, 1, 8, 8), (3, 384)]


def test_a_layer_of_unknown_shape_is_named(network: Network) -> None:
    template = behind_an_unknown_node(network, "batch", "other")

    with pytest.raises(ArtifactError, match="layer 'fc' reads a tensor whose shape the graph"):
        layer_latencies.input_shapes(template, TINY_LAYERS, 3)


def test_factors_never_get_faster_as_rank_grows(network: Network) -> None:
    for latency in host_points.measured(network, MEASURING):
        assert list(latency.factors_ms) == sorted(latency.factors_ms)
        assert list(latency.factors_ms.values()) == sorted(latency.factors_ms.values())
        assert latency.dense_ms > 0


@pytest.mark.parametrize(
    ("runs", "afforded"),
    [
        (1e9, (1000, 32)),  # all of both
        (20_000, (400, 32)),  # 40 evaluations of 500
        (8_000, (200, 18)),  # 26 of 300
        (1, (200, 8)),  # the least
    ],
)
def test_samples_are_given_up_before_tries(runs: float, afforded: tuple[int, int]) -> None:
    assert host_points.affordable(runs, 100, 1000, tries=32, steps=8) == afforded


def test_a_search_can_be_cancelled(network: Network) -> None:
    with pytest.raises(CancelledError):
        host_points.search(network, 4, Measuring(budget_s=0.6, cancelled=lambda: True))


def test_the_place_depends_on_artifact_and_threads(source: Artifact, tmp_path: Path) -> None:
    one, two = (host_artifact.host_path(source, tmp_path, threads) for threads in (1, 2))

    assert one != two
    assert one == host_artifact.host_path(source, tmp_path, 1)


def searched(source: Artifact, state_dir: Path) -> Artifact:
    """Find points and keep them, as a calibration does that ends well."""
    with host_artifact.searched(source, state_dir, MEASURING) as found:
        return host_artifact.keep(found, source, state_dir, MEASURING.intra_op_threads)


def test_points_found_are_kept_and_found_again(source: Artifact, tmp_path: Path) -> None:
    # As a directory that another process removes while it is looked at.
    (tmp_path / "found-gone").symlink_to(tmp_path / "nowhere")

    made = searched(source, tmp_path)

    assert host_artifact.of_host(source, tmp_path, 1) == (made, None)
    assert host_artifact.of_host(source, tmp_path, 2) == (source, None)


def test_points_found_by_what_then_fails_are_not_kept(source: Artifact, tmp_path: Path) -> None:
    abandoned = tmp_path / "found-before"
    abandoned.mkdir()
    os.utime(abandoned, (0, 0))

    def fail() -> None:
        with host_artifact.searched(source, tmp_path, MEASURING) as found:
            assert found.path.exists()
            raise CancelledError

    with pytest.raises(CancelledError):
        fail()

    assert host_artifact.of_host(source, tmp_path, 1) == (source, None)
    assert not list(tmp_path.glob("found-*"))


def test_points_of_artifacts_served_long_ago_give_way(source: Artifact, tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / "points" / str(i)).mkdir(parents=True)
        os.utime(tmp_path / "points" / str(i), (i, i))

    made = searched(source, tmp_path)

    left = {path.name for path in (tmp_path / "points").iterdir()}
    assert left == {"1", "2", "3", made.path.name}


def test_damaged_points_are_reported_and_not_used(source: Artifact, tmp_path: Path) -> None:
    made = searched(source, tmp_path)
    made.graph_path(0).write_bytes(b"half")

    kept = host_artifact.of_host(source, tmp_path, 1)

    assert kept.artifact == source
    assert kept.note is not None
    assert "00.onnx" in kept.note
    assert "search again" in kept.note
