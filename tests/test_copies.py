"""Operands of their own: what sums read in more bits than layers do."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporters import export_qdq, write_model
from exporters.diff import compare
from tests import zoo
from toolchain import encodings, run_folder, runtime
from toolchain.config import Config
from toolchain.kernels import kernel_differences
from toolchain.pipeline import Quantized, quantize
from toolchain.quant_table import QuantTable
from toolchain.run_folder import RunFolder
from toolchain.runtime import Optimization
from toolchain.simulation import simulate
from toolchain.source import SourceModel

SAMPLES = zoo.images(32)


def quantized(folder: Path, model: Any = None, **options: Any) -> tuple[SourceModel, Quantized]:
    source = zoo.loaded(model or zoo.tiny_resnet(), folder)
    return source, quantize(source, SAMPLES, Config(**{"algorithm": "mse", "device": "cpu", **options}))


def test_a_shortcut_keeps_its_bits_and_the_layer_beside_it_reads_a_copy(tmp_path: Path) -> None:
    source, found = quantized(tmp_path)
    name, copy = next(iter(found.table.copies.items()))
    add = next(node for node in source.graph.nodes if node.op_type == "Add")
    assert list(found.table.copies) == [name]  # the projection shortcut is a convolution's result: nothing but a sum reads that
    assert copy.origin == add.inputs[1]
    assert set(copy.readers) == {node.name for node in source.graph.readers_of(copy.origin)} - {add.name}
    assert (found.table[copy.origin].spec.bits, found.table[name].spec.bits) == (8, 4)


@pytest.mark.parametrize(
    "options",
    [
        {"requantize": False},
        {"weight_bits": 8, "activation_bits": 8},
        {"weight_bits": 4, "activation_bits": 8},
        {"activation_bits": 32},
        {"target": "academic"},
        {"target": "ort-cuda"},
    ],
)
def test_no_copy_where_all_readers_want_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    _, found = quantized(tmp_path, **options)
    assert not found.table.copies


def test_a_layer_that_stays_float_reads_the_value_itself(tmp_path: Path) -> None:
    source, found = quantized(tmp_path)
    (copy,) = found.table.copies.values()
    source, found = quantized(tmp_path, keep_float=copy.readers)
    assert not found.table.copies
    exported = export_qdq(source.model, found.table)
    (reader,) = (node for node in exported.graph.node if node.name == copy.readers[0])
    pairs = {node.output[0]: node for node in exported.graph.node if node.op_type == "DequantizeLinear"}
    assert pairs[reader.input[0]].input[0] == pairs[f"{copy.origin}_dequantized"].input[0]  # by channel, for ONNX Runtime to leave it float


def test_bits_asked_for_the_layer_are_those_of_its_copy(tmp_path: Path) -> None:
    _, found = quantized(tmp_path)
    (name,), (copy,) = found.table.copies, found.table.copies.values()
    _, found = quantized(tmp_path, bits=(f"{copy.readers[0]}=w4a6",))
    assert (found.table[copy.origin].spec.bits, found.table[name].spec.bits) == (8, 6)
    _, found = quantized(tmp_path, bits=(f"{copy.readers[0]}=w8a8",))
    assert not found.table.copies


def test_values_moved_between_a_sum_and_a_layer(tmp_path: Path) -> None:
    """The layer behind the MaxPool reads a copy of the pooled value; the sum behind it keeps the 8 bits of what was pooled."""
    b = zoo.Builder({"x": ["N", 3, 8, 8]})
    stem = b.conv("x", 3, 8, act="relu")
    pooled = b.op("MaxPool", stem, kernel_shape=[2, 2], strides=[2, 2])
    block = b.op("Relu", b.op("Add", b.conv(pooled, 8, 8), pooled))
    _, found = quantized(tmp_path, b.model(b.head(block, 8)))
    assert [copy.origin for copy in found.table.copies.values()] == [pooled]
    assert found.table[pooled].tied_to == stem
    assert found.table[stem].spec.bits == 8


def test_the_names_of_copies_are_free(tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 3, 8, 8]})
    x = b.conv("x", 3, 8, act="relu")
    y = b.op("Relu", b.op("Add", b.conv(x, 8, 8), x))
    model = b.model(b.head(b.conv(y, 8, 8), 8))
    taken = f"{x}_operand"
    for node in model.graph.node:
        node.input[:] = [taken if value == y else value for value in node.input]
        node.output[:] = [taken if value == y else value for value in node.output]
    _, found = quantized(tmp_path, model)
    assert list(found.table.copies) == [f"{taken}1"]


@pytest.mark.parametrize("target", ["ort-cpu", "tensorrt", "openvino", "qnn", "portable"])
def test_the_file_computes_what_was_simulated(target: str, tmp_path: Path) -> None:
    source, found = quantized(tmp_path, zoo.every_rule(), target=target)
    assert found.table.copies
    exported = export_qdq(source.model, found.table, scheme=Config(target=target).scheme)
    assert "Identity" not in {node.op_type for node in exported.graph.node}
    name = source.graph.outputs[0]
    ran = runtime.run(runtime.session(exported, optimization=Optimization.NONE), SAMPLES.inputs)[name]
    simulated = simulate(source, found.table, SAMPLES, torch.device("cpu"), scheme=Config(target=target).scheme)[name]
    # A code flips where two float sums straddle a rounding tie; it moves few samples.
    assert (np.abs(ran - simulated).max(axis=1) <= 1e-4 * np.abs(simulated).max()).mean() >= 0.9


def with_copy_scale(source: SourceModel, found: Quantized, steps: float) -> QuantTable:
    """The table with the one copy's step so many times as wide as that of what it copies, and the bias behind it on its grid."""
    ((name, copy),) = found.table.copies.items()
    (reader,) = (node for node in source.graph.nodes if node.name in copy.readers)
    scale = np.float32(steps * float(found.table[copy.origin].scale))
    bias = source.graph.bias(reader)
    assert bias is not None
    wider = found.table[bias].scale * (scale / found.table[name].scale)
    changed = {name: replace(found.table[name], scale=scale), bias: replace(found.table[bias], scale=wider.astype(np.float32))}
    return QuantTable({**found.table.tensors, **changed})


@pytest.mark.parametrize("steps", [16.9, 9.53, 1.7, 16.0, 13.6])  # the last two have codes of 8 bits halfway between two of 4 bits
def test_a_copy_is_one_integer_kernel_where_that_makes_the_same_codes(steps: float, tmp_path: Path) -> None:
    source, found = quantized(tmp_path)
    table = with_copy_scale(source, found, steps)
    copied = f"{next(iter(table.copies))}_clipped"
    model = export_qdq(source.model, table)
    write_model(model, tmp_path / "q.onnx")
    kinds = Counter(node.op_type for node in runtime.optimized(tmp_path / "q.onnx").node)
    has_ties = steps in (16.0, 13.6)
    assert (kinds["QLinearConv"], kinds["QGemm"]) == (6, 1)
    assert (kinds["QLinearAdd"], kinds["QuantizeLinear"], kinds["DequantizeLinear"]) == ((2, 2, 1) if has_ties else (3, 1, 0))
    assert not {"Conv", "FusedConv", "Gemm", "Add", "Relu", "Identity", "Squeeze"} & set(kinds)
    (moved,) = (found for found in kernel_differences(model, SAMPLES.inputs) if found.name == copied)
    assert moved.steps == 0.0
    assert not compare(source.model, model).changes


def test_a_finer_shortcut_is_a_better_model(tmp_path: Path) -> None:
    """The block's output with an 8-bit shortcut is nearer to the float model's than with one of 3 bits."""
    source, own = quantized(tmp_path, activation_bits=3)
    _, shared = quantized(tmp_path, activation_bits=3, requantize=False)
    name = source.graph.outputs[0]
    reference = runtime.run(runtime.session(source.model), SAMPLES.inputs)[name]
    errors = [np.square(simulate(source, q.table, SAMPLES, torch.device("cpu"))[name] - reference).mean() for q in (own, shared)]
    assert errors[0] < errors[1]


def test_a_table_with_copies_survives_its_file(tmp_path: Path) -> None:
    source, found = quantized(tmp_path)
    kept = encodings.loads(encodings.dumps(encodings.Encodings(found.table, "0", "ort-cpu", "w4a4")), "table").table
    assert kept.copies == found.table.copies
    assert export_qdq(source.model, kept) == export_qdq(source.model, found.table)


def test_inserting_twice_changes_nothing(tmp_path: Path) -> None:
    source, found = quantized(tmp_path)
    once = source.with_copies(found.table.copies)
    assert once.with_copies(found.table.copies) is once
    assert source.with_copies({}) is source
    assert export_qdq(once.model, found.table) == export_qdq(source.model, found.table)
    assert not set(found.table.copies) & set(source.graph.producer)
    assert QuantTable().copies == {}


def test_a_run_folder_keeps_copies(tmp_path: Path) -> None:
    source, config, facts = zoo.loaded(zoo.tiny_resnet(), tmp_path), Config(iterations=3, device="cpu"), {"format": run_folder._FORMAT}
    first = quantize(source, SAMPLES, config, run=RunFolder.create(tmp_path / "x.run", facts, "here")).table
    again = quantize(source, SAMPLES, config, run=RunFolder.resume(tmp_path / "x.run", facts)).table  # everything is in the folder
    assert first.copies
    assert again.copies == first.copies
