"""LAPQ: Powell's method on known functions, the choice of p, the loss of the network, and that it never ends above its start."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import zoo
from toolchain.activations import TorchModel
from toolchain.baselines import lapq, powell
from toolchain.config import Config
from toolchain.grids import grids_of, methods, observe, with_biases
from toolchain.importing import cut_blocks
from toolchain.placement import place
from toolchain.quant_table import QuantTable
from toolchain.samples import Samples
from toolchain.source import infer_types


def minimised(function: Any, start: list[float], evaluations: int = 400, bound: float = 10.0) -> tuple[np.ndarray, float, int]:
    calls = 0

    def counted(x: np.ndarray) -> float:
        nonlocal calls
        calls += 1
        return function(x)

    begin = np.array(start)
    x, value = powell.minimise(counted, begin, function(begin), step=0.1, bound=bound, evaluations=evaluations, tolerance=1e-8)
    assert value == pytest.approx(function(x))
    assert calls <= evaluations
    return x, value, calls


def test_powell_finds_the_minimum_of_a_tilted_valley() -> None:
    """Coordinates alone would zigzag: the two are strongly coupled."""
    matrix = np.array([[1.0, 0.95], [0.95, 1.0]])
    target = np.array([1.0, -2.0])
    x, value, calls = minimised(lambda p: float((p - target) @ matrix @ (p - target)), [4.0, 3.0])
    np.testing.assert_allclose(x, target, atol=0.05)
    assert value < 1e-3
    assert calls < 400


def test_powell_on_rosenbrock_goes_down_the_bend() -> None:
    _, value, _ = minimised(lambda p: float(100 * (p[1] - p[0] ** 2) ** 2 + (1 - p[0]) ** 2), [-1.2, 1.0], 2000)
    assert value < 1.0  # 24.2 at the start, 4 where the valley bends


@pytest.mark.parametrize("evaluations", [0, 1, 2, 7])
def test_powell_keeps_its_budget_and_its_bounds(evaluations: int) -> None:
    x, value, calls = minimised(lambda p: float(p.sum()), [0.0, 0.0], evaluations, bound=0.25)
    assert np.abs(x).max() <= 0.25
    assert value <= 0.0
    assert calls <= evaluations


def test_powell_goes_around_what_is_not_finite() -> None:
    x, _, _ = minimised(lambda p: float("nan") if p[0] > 0.5 else float((p[0] - 0.4) ** 2), [0.0])
    assert x[0] == pytest.approx(0.4, abs=0.05)


def test_the_best_p_is_the_vertex_of_the_parabola() -> None:
    norms = lapq.NORMS.tolist()
    assert lapq.best_norm(norms, [(p - 2.9) ** 2 + 1 for p in norms]) == pytest.approx(2.9)
    assert lapq.best_norm(norms, [(p - 9.0) ** 2 for p in norms]) == 4.0
    assert lapq.best_norm(norms, [-((p - 2.9) ** 2) for p in norms]) in (2.0, 4.0)  # opens downwards: the best one tried
    assert lapq.best_norm(norms, [float("nan")] * 9 + [1.0]) == 4.0


def network(folder: Path, labels: np.ndarray | None = None, bits: int = 3) -> tuple[lapq.NetworkLoss, TorchModel, QuantTable]:
    source, samples = zoo.loaded(zoo.tiny_resnet(), folder), replace(zoo.images(32), labels=labels)
    config = Config(algorithm="lapq", weight_bits=bits, activation_bits=bits, device="cpu")
    types = infer_types(source, samples.shapes, samples.inputs)
    model = TorchModel.of(source, types, cut_blocks(source, types, {}, config), torch.device("cpu"))
    placement = place(source, types, config.scheme, config.precision, frozenset())
    table = grids_of(source, placement, observe(model, placement, samples), methods(config))

    def finish(position: int, found: QuantTable) -> QuantTable:
        return with_biases(source, placement, model.pieces[position].block, found)

    return lapq.NetworkLoss(model, placement, table, samples, finish), model, table


def test_a_held_stream_changes_no_loss(tmp_path: Path) -> None:
    """Whatever is held in front of which layer, a point has the loss that it has from scratch."""
    held, model, table = network(tmp_path)
    rng = np.random.default_rng(0)
    x = np.zeros(len(held.names))
    for _ in range(12):
        index = int(rng.integers(len(x)))
        if rng.random() < 0.7:
            held.settle(x, index)
        candidate = x.copy()
        candidate[rng.integers(len(x)) if rng.random() < 0.3 else index] += rng.normal() * 0.2
        fresh = lapq.NetworkLoss(model, held._placement, table, zoo.images(32), held._finish, held.aim)
        assert held(candidate) == fresh(candidate)
        if rng.random() < 0.5:
            x = candidate


def test_names_are_in_the_order_of_execution(tmp_path: Path) -> None:
    loss, model, table = network(tmp_path)
    assert loss.names[0] == "x"
    assert set(loss.names) == {name for name, grid in table.tensors.items() if grid.tied_to is None and not grid.fixed}
    weights = [name for name in loss.names if name in model.source.constants]
    assert weights == sorted(weights, key=[model.source.graph.weight(node) for node in model.source.graph.weighted].index)


def test_the_loss_is_the_cross_entropy(tmp_path: Path) -> None:
    labels = np.arange(32, dtype=np.int64) % 10
    with_labels, model, _ = network(tmp_path, labels)
    without, _, _ = network(tmp_path)
    stream = model.stream(zoo.images(32).inputs)
    for piece in model.pieces:
        stream.advance(model.run(piece, stream))
    (logits,) = stream.of(model.source.graph.outputs).values()
    assert isinstance(logits, torch.Tensor)
    outputs = stream.of(model.source.graph.outputs)
    expected = float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)))
    assert with_labels.aim.loss(outputs, stream.passes) == pytest.approx(expected, rel=1e-5)
    entropy = float(torch.distributions.Categorical(logits=logits).entropy().mean())  # the least that soft targets allow
    assert without.aim.loss(outputs, stream.passes) == pytest.approx(entropy, rel=1e-4)
    assert without(np.zeros(len(without.names))) > entropy


@pytest.mark.parametrize("iterations", [11, 60])
def test_it_never_ends_above_its_start(iterations: int, tmp_path: Path) -> None:
    loss, model, _ = network(tmp_path)
    placement = loss._placement
    samples = zoo.images(32)
    seen = observe(model, placement, samples)

    def grids(norm: float) -> QuantTable:
        return grids_of(model.source, placement, seen, methods(Config(algorithm="lapq"), norm))

    reported: list[tuple[str, int, int, float]] = []
    found = lapq.calibrate_jointly(model, placement, samples, iterations, grids, loss._finish, lambda *call: reported.append(call))
    losses = {p: lapq.NetworkLoss(model, placement, grids(p), samples, loss._finish) for p in (2.0, 4.0)}
    ends = lapq.NetworkLoss(model, placement, found, samples, loss._finish)
    end = ends(np.zeros(len(ends.names)))
    assert end == pytest.approx(reported[-1][3], rel=1e-6)
    assert all(end <= start(np.zeros(len(start.names))) for start in losses.values())
    minmax = lapq.NetworkLoss(
        model, placement, grids_of(model.source, placement, seen, methods(Config(algorithm="minmax"))), samples, loss._finish
    )
    assert end < minmax(np.zeros(len(minmax.names)))
    assert reported[-1][1] <= reported[-1][2] == iterations


def test_outputs_that_are_no_classes_are_compared_by_energy(tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 3, 8, 8]})
    source = zoo.loaded(b.model(b.conv(b.conv("x", 3, 8, act="relu"), 8, 3)), tmp_path)
    samples = Samples(zoo.images(16).inputs)
    types = infer_types(source, samples.shapes, samples.inputs)
    model = TorchModel.of(source, types, cut_blocks(source, types, {}, Config()), torch.device("cpu"))
    aim, stream = lapq.Aim.of(model, samples), model.stream(samples.inputs)
    for piece in model.pieces:
        stream.advance(model.run(piece, stream))
    outputs = stream.of(source.graph.outputs)
    assert aim.loss(outputs, stream.passes) == 0.0
    halved = {name: value * 0.5 for name, value in outputs.items() if isinstance(value, torch.Tensor)}
    assert aim.loss(halved, stream.passes) == pytest.approx(0.25, rel=1e-5)
