"""How values sit on their grids, and how much each layer hurts: held against a direct computation."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from exporters import export_qdq
from tests import zoo
from toolchain import fit, runtime
from toolchain.activations import TorchModel
from toolchain.config import Config
from toolchain.examination import examine
from toolchain.importing import cut_blocks
from toolchain.noise import sqnr
from toolchain.pipeline import Quantized, quantize
from toolchain.quant_table import QuantTable
from toolchain.quant_table import quantize as encode
from toolchain.samples import Samples
from toolchain.sensitivity import sensitivity
from toolchain.source import SourceModel, infer_types

SAMPLES = zoo.images(16)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[SourceModel, Quantized, TorchModel]:
    source = zoo.loaded(zoo.tiny_resnet(), tmp_path_factory.mktemp("fit"))
    found = quantize(source, SAMPLES, Config(algorithm="mse", weight_bits=3, device="cpu"))
    source = source.with_copies(found.table.copies)
    types = infer_types(source, SAMPLES.shapes)
    model = TorchModel.of(source, types, cut_blocks(source, types, found.islands, Config()), torch.device("cpu"))
    return source, found, model


def test_fits_agree_with_the_arithmetic_of_the_table(case: tuple[SourceModel, Quantized, TorchModel]) -> None:
    source, found, model = case
    activations = {f.name: f for f in fit.activation_fits(model, found.table, SAMPLES)}
    wanted = {name for name, grid in found.table.tensors.items() if grid.codes is None and grid.tied_to is None}
    assert set(activations) == wanted
    values = runtime.run_exposed(source.model, SAMPLES.inputs, sorted(wanted - {"x"})) | dict(SAMPLES.inputs)
    for name, found_fit in activations.items():
        grid, x = found.table[name], values[name]
        codes = encode(x, grid)
        rounded = (codes - grid.zero_point).astype(np.float32) * grid.scale
        assert found_fit.sqnr == pytest.approx(sqnr(x, rounded), abs=0.05)  # torch and ONNX Runtime sum convolutions in another order
        assert sum(found_fit.counts) == x.size
        assert (found_fit.low, found_fit.high) == pytest.approx((x.min(), x.max()), abs=1e-4)


def test_clipping_is_what_lies_beyond_the_grid(case: tuple[SourceModel, Quantized, TorchModel]) -> None:
    source, found, _ = case
    name = next(f.name for f in fit.weight_fits(source, found.table))
    grid = found.table[name]
    narrow = QuantTable({name: replace(grid, scale=np.asarray(grid.scale, np.float32) / 4)})
    narrow = QuantTable({name: replace(narrow[name], codes=encode(source.constants[name], narrow[name]))})
    (row,) = fit.weight_fits(source, narrow)
    shape = (-1, *[1] * (source.constants[name].ndim - 1))
    steps = source.constants[name] / np.reshape(narrow[name].scale, shape)
    beyond = (steps < grid.spec.qmin - 0.5) | (steps > grid.spec.qmax + 0.5)
    assert row.clipped == pytest.approx(beyond.mean(), abs=1e-6)
    assert row.clipped > 0.2
    assert fit.worst([row, *fit.weight_fits(source, found.table)], 1) == (row,)


def exported_sqnr(source: SourceModel, table: QuantTable) -> float:
    """The output's signal to noise of a table as ONNX Runtime executes it."""
    run = [runtime.run(runtime.session(m), SAMPLES.inputs) for m in (source.model, export_qdq(source.model, table))]
    (name,) = run[0]
    return sqnr(run[0][name], run[1][name])


def made_of(source: SourceModel, table: QuantTable, value: str) -> str | None:
    """The layer that a value on a grid, which no layer reads, is computed from without another in between: the last of several."""
    graph = source.graph
    layers = [node.name for node in graph.weighted]
    read = {table[node.inputs[0]].tied_to or node.inputs[0] for node in graph.weighted} | {node.inputs[0] for node in graph.weighted}
    if table[value].codes is not None or {value, table[value].tied_to} & read:
        return None
    found, values = set[str](), [value]
    while values:
        node = graph.producer.get(values.pop())
        if node is not None and node.name in layers:
            found.add(node.name)
        elif node is not None:
            values += node.inputs
    return max(found, key=layers.index, default=None)


def test_sensitivity_is_that_of_exported_models(case: tuple[SourceModel, Quantized, TorchModel]) -> None:
    source, found, model = case
    result = sensitivity(model, found.table, SAMPLES)
    assert [row.node for row in result.layers] == [node.name for node in source.graph.weighted]
    assert result.all_quantized == pytest.approx(exported_sqnr(source, found.table), abs=1.0)  # codes on ties fall either way
    for node in (source.graph.weighted[0], source.graph.weighted[3]):
        row = next(row for row in result.layers if row.node == node.name)
        weight, operand = source.graph.weight(node), node.inputs[0]
        assert weight is not None
        own = {weight, source.graph.bias(node), operand, found.table[operand].tied_to or operand}
        own |= {name for name in found.table.tensors if made_of(source, found.table, name) == node.name}
        others = QuantTable({name: grid for name, grid in found.table.tensors.items() if name not in own})
        alone = QuantTable({name: grid for name, grid in found.table.tensors.items() if name in own})
        assert row.only_quantized == pytest.approx(exported_sqnr(source, alone), abs=0.5)
        assert row.only_float == pytest.approx(exported_sqnr(source, others), abs=1.0)


def test_sensitivity_is_skipped_with_its_reason(case: tuple[SourceModel, Quantized, TorchModel]) -> None:
    source, found, model = case
    late = sensitivity(model, found.table, SAMPLES, limit=1e-9)
    assert late.layers == ()
    assert late.skipped is not None
    assert "--sensitivity" in late.skipped
    _, off = examine(source, found, SAMPLES, 0.0)
    assert off.skipped == "--no-sensitivity"


def test_a_model_that_shares_an_input_quantizer(tmp_path: Path) -> None:
    """Two layers read one value, and a Reshape repeats its grid: each layer is measured all the same."""
    b = zoo.Builder({"x": ["N", 3, 8, 8]})
    x = b.conv("x", 3, 8, act="relu")
    y = b.op("Add", b.conv(x, 8, 8), b.conv(x, 8, 8, 1))
    source = zoo.loaded(onnx.ModelProto.FromString(b.model(b.head(y, 8)).SerializeToString()), tmp_path)
    found = quantize(source, SAMPLES, Config(algorithm="mse", device="cpu"))
    fits, layers = examine(source, found, SAMPLES, None)
    assert len(layers.layers) == 4
    assert all(np.isfinite([row.only_quantized, row.only_float]).all() for row in layers.layers)
    assert len({f.name for f in fits}) == len(fits)


def test_samples_that_make_no_finite_values_are_said_and_judged_by_the_rest(tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 16]})
    first = b.op("Sqrt", b.op("MatMul", "x", b.constant("one", np.eye(16, dtype=np.float32))), name="root")
    source = zoo.loaded(b.model(b.op("MatMul", first, b.weight("w", (16, 16), 16))), tmp_path)
    good = Samples({"x": np.abs(zoo.images(8, (16,)).inputs["x"])})
    bad = Samples({"x": good.inputs["x"].copy()})
    bad.inputs["x"][0] = -1.0
    config = Config(algorithm="mse", device="cpu")
    found = quantize(source, good, config)
    assert found.notes == ()
    types = infer_types(source, good.shapes)
    model = TorchModel.of(source, types, cut_blocks(source, types, found.islands, config), torch.device("cpu"))
    fits = {f.name: f for f in fit.activation_fits(model, found.table, bad)}
    assert sum(fits["root"].counts) == 7 * 16
    assert np.isfinite(fits["root"].sqnr)
    nowhere = fit.activation_fits(model, found.table, Samples({"x": -good.inputs["x"]}))
    assert [f.name for f in nowhere] == ["x"]
    (note,) = quantize(source, bad, config).notes
    assert note == "no range was seen of 'root': never made, empty, or not finite (NaN, infinite) on a calibration sample; float there"
