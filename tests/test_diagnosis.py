"""Where the error enters: held against exported models that differ in one layer only."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from exporters import export_qdq
from tests import zoo
from toolchain import runtime
from toolchain.config import Config
from toolchain.diagnosis import Diagnosis, diagnose
from toolchain.errors import UsageError
from toolchain.pipeline import quantize
from toolchain.quant_table import QuantTable
from toolchain.quant_table import quantize as encode
from toolchain.source import SourceModel
from toolchain.validation import sqnr

SAMPLES = zoo.images(16)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[SourceModel, QuantTable, Diagnosis]:
    """A chain with Relu, Clip and no activation, whose second layer has a wrecked weight grid."""
    b = zoo.Builder({"x": ["N", 3, 8, 8]})
    x = b.conv(b.conv(b.conv("x", 3, 8, act="relu"), 8, 8, act="relu6"), 8, 8)
    source = zoo.loaded(b.model(b.head(b.conv(x, 8, 8, act="relu"), 8)), tmp_path_factory.mktemp("chain"))
    table = quantize(source, SAMPLES, Config(algorithm="mse", device="cpu")).table
    weight = source.graph.weight(source.graph.weighted[1])
    assert weight is not None
    coarse = replace(table[weight], scale=np.asarray(table[weight].scale, np.float32) * 4)
    table = table.updated({weight: replace(coarse, codes=encode(source.constants[weight], coarse))})
    return source, table, diagnose(source, export_qdq(source.model, table), SAMPLES, tried=9)


def output_sqnr(source: SourceModel, table: QuantTable) -> float:
    floats, found = (runtime.run(runtime.session(m), SAMPLES.inputs) for m in (source.model, export_qdq(source.model, table)))
    return min(sqnr(floats[name], found[name]) for name in floats)


def test_the_wrecked_layer_is_found(case: tuple[SourceModel, QuantTable, Diagnosis]) -> None:
    source, _, found = case
    culprit = source.graph.weighted[1].name
    assert found.layers[0].node == culprit
    assert found.layers[0].share > 0.7
    assert found.layers[0].added < found.layers[1].added - 5
    assert found.suggestions[0].startswith(f"--keep-float '{culprit}'")
    assert any("adds" in text and "most of it by its weight" in text for text in found.suggestions)
    later = next(layer for layer in found.layers if layer.node == source.graph.weighted[3].name)
    assert later.total < later.added - 3  # what comes after only passes the error on


def test_gains_are_those_of_a_file_without_that_layer(case: tuple[SourceModel, QuantTable, Diagnosis]) -> None:
    """In a chain every value has one reader, so that a layer left float is a table without its names."""
    source, table, found = case
    whole = output_sqnr(source, table)
    assert found.outputs[source.graph.outputs[0]] == pytest.approx(whole, abs=0.1)  # codes on ties
    for layer in found.layers:
        node = next(node for node in source.graph.weighted if node.name == layer.node)
        operand = node.inputs[0]
        own = {source.graph.weight(node), source.graph.bias(node), operand}
        if operand in table and table[operand].tied_to is not None:
            continue  # the Flatten before it carries codes already
        without = QuantTable({name: grid for name, grid in table.tensors.items() if name not in own})
        assert layer.gain == pytest.approx(output_sqnr(source, without) - whole, abs=0.3)


def test_parts_of_the_added_error(case: tuple[SourceModel, QuantTable, Diagnosis]) -> None:
    source, table, found = case
    for layer in found.layers:
        node = next(node for node in source.graph.weighted if node.name == layer.node)
        weight = source.graph.weight(node)
        assert weight is not None
        assert layer.weight == pytest.approx(sqnr(source.constants[weight], table[weight].dequantized()), abs=1e-3)
        assert layer.input is not None
        assert 0 <= layer.clipped < 0.2


def test_nothing_stands_out_in_an_even_network(tmp_path: Path) -> None:
    source = zoo.loaded(zoo.tiny_resnet(), tmp_path)
    table = quantize(source, SAMPLES, Config(algorithm="mse", device="cpu", weight_bits=8, activation_bits=8)).table
    found = diagnose(source, export_qdq(source.model, table), SAMPLES, tried=0)
    assert len(found.layers) == len(source.graph.weighted)
    assert all(layer.gain is None for layer in found.layers)
    assert min(layer.added for layer in found.layers) > 25  # 8 bits


def test_files_of_other_models_are_refused(case: tuple[SourceModel, QuantTable, Diagnosis], tmp_path: Path) -> None:
    source, table, _ = case
    other = zoo.loaded(zoo.tiny_resnet(), tmp_path)
    with pytest.raises(UsageError, match="made from another model"):
        diagnose(other, export_qdq(source.model, table), SAMPLES)
    renamed = export_qdq(source.model, table)
    for node in renamed.graph.node:
        node.name = node.name.replace("_QuantizeLinear", "_Q")
    with pytest.raises(UsageError, match="are not named"):
        diagnose(source, onnx.ModelProto.FromString(renamed.SerializeToString()), SAMPLES)
