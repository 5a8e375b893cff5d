"""Where the error enters: held against exported models that differ in one layer only."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from exporters import export_qdq
from tests import zoo
from toolchain import diagnosis as diagnosis_room
from toolchain import runtime
from toolchain.config import Config
from toolchain.config_file import dump_config, resolved
from toolchain.data_config import DataConfig
from toolchain.diagnosis import Diagnosis, LayerError, diagnose
from toolchain.errors import UsageError
from toolchain.graph import Node
from toolchain.noise import sqnr
from toolchain.pipeline import quantize
from toolchain.quant_table import QuantTable
from toolchain.quant_table import quantize as encode
from toolchain.samples import Samples
from toolchain.source import SourceModel
from toolchain.suggestions import suggestions
from toolchain.wider import gains_of_wider, wider

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
    """As the diagnosis runs files: as they are written, without kernels of the runtime's own that round otherwise."""
    models = source.model, export_qdq(source.model, table)
    floats, found = (runtime.run(runtime.session(m, optimization=runtime.Optimization.NONE), SAMPLES.inputs) for m in models)
    return min(sqnr(floats[name], found[name]) for name in floats)


def test_samples_that_do_not_fit_together_are_compared_in_parts(
    case: tuple[SourceModel, QuantTable, Diagnosis], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, table, whole = case
    monkeypatch.setattr(diagnosis_room, "_HELD", 4 * 10_000)  # few samples of this network
    steps: list[tuple[str, int, int]] = []
    found = diagnose(source, export_qdq(source.model, table), SAMPLES, 9, lambda what, done, of, _: steps.append((what, done, of)))
    assert [step for step in steps if step[0] == "comparing values"][-1][2] > 2
    assert [layer.node for layer in found.layers] == [layer.node for layer in whole.layers]
    for one, other in zip(found.layers, whole.layers, strict=True):
        for name in ("added", "total", "share", "input", "clipped", "clip_noise", "gain"):
            # Convolutions of another batch size may sum in another order, and so move a code.
            assert getattr(one, name) == pytest.approx(getattr(other, name), abs=0.05), name
    assert found.float_weights == pytest.approx(whole.float_weights, abs=0.05)
    assert found.outputs == pytest.approx(whole.outputs, abs=0.05)


def test_the_wrecked_layer_is_found(case: tuple[SourceModel, QuantTable, Diagnosis]) -> None:
    source, _, found = case
    culprit = source.graph.weighted[1].name
    assert found.layers[0].node == culprit
    assert found.layers[0].share > 0.7
    assert found.layers[0].added < found.layers[1].added - 5
    assert any(culprit in text and "gains" in text for text in suggestions(found))
    assert culprit in found.together[0]
    assert found.float_weights > found.float_activations + 3  # it is a weight that is wrecked
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


def test_float_weights_and_float_activations_are_tables_without_the_others(case: tuple[SourceModel, QuantTable, Diagnosis]) -> None:
    source, table, found = case
    constants = {name for node in source.graph.weighted for name in (source.graph.weight(node), source.graph.bias(node)) if name}
    activations = QuantTable({name: grid for name, grid in table.tensors.items() if name not in constants})
    assert found.float_weights == pytest.approx(output_sqnr(source, activations), abs=0.1)
    weights = onnx.ModelProto()
    weights.CopyFrom(source.model)
    for tensor in weights.graph.initializer:
        if tensor.name in constants:
            tensor.CopyFrom(onnx.numpy_helper.from_array(table[tensor.name].dequantized().astype(np.float32), tensor.name))
    floats, made = (runtime.run(runtime.session(m), SAMPLES.inputs) for m in (source.model, weights))
    assert found.float_activations == pytest.approx(min(sqnr(floats[name], made[name]) for name in floats), abs=0.01)


def test_the_layers_that_add_most_are_freed_at_once(case: tuple[SourceModel, QuantTable, Diagnosis]) -> None:
    _, _, found = case
    names, gain = found.together
    assert list(names) == [layer.node for layer in found.layers[:3]]
    assert gain > max(layer.gain or 0.0 for layer in found.layers[:3])


def layer(node: str, **facts: Any) -> LayerError:
    fields: dict[str, Any] = {"op_type": "Conv", "value": node, "added": 20.0, "total": 15.0, "share": 0.1, "weight": 20.0, "input": 20.0}
    fields |= {"clipped": 0.0, "clip_noise": 0.0} | facts
    return LayerError(node=node, **fields)


def diagnosis(*layers: LayerError, **facts: Any) -> Diagnosis:
    settings = {"weight-bits": 4, "activation-bits": 4, "algorithm": "qdrop", "preset": "default"} | facts.pop("settings", {})
    found = Diagnosis(16, {"y": 10.0}, 11.0, 12.0, layers, ((), 0.0), settings)
    return replace(found, **facts)


def test_outputs_without_noise_gain_nothing() -> None:
    eight = {"weight-bits": 8, "activation-bits": 8, "target": "ort-cpu"}
    found = diagnosis(layer("a"), outputs={"y": np.inf}, float_weights=np.inf, float_activations=np.inf, settings=eight)
    assert found.gain_of_float_weights == found.gain_of_float_activations == 0.0
    assert not any("reduce-range" in text or "nan" in text for text in suggestions(found))


def test_suggestions_are_flags_with_their_reasons() -> None:
    """Each follows from what was measured and from how the file was made."""
    coarse = [layer("a", input=10.0), layer("b", input=12.0)]
    (text,) = suggestions(diagnosis(*coarse), {"w8a4": 4.2, "w4a8": 3.9})  # learning makes up for the rounding of weights
    assert text == "-p w4a8: with all rounded to nearest the output gains 3.9 dB by it, 4.2 dB with w8a4"
    _, text = suggestions(diagnosis(*coarse, settings={"algorithm": "mse"}), {"w8a4": 4.2, "w4a8": 3.9})
    assert text.startswith("-p w8a4: with all rounded to nearest the output gains 4.2 dB by it")
    (text,) = suggestions(diagnosis(*coarse, settings={"weight-bits": 8, "activation-bits": 8}), {"w8a16": 2.0})
    assert text.startswith("-p w8a16")
    assert "compute in float" in text
    assert suggestions(diagnosis(*coarse), {"w8a4": 0.4, "w4a8": -0.9}) == []
    first, *_ = suggestions(diagnosis(*coarse, settings={"algorithm": "mse"}))
    assert first.startswith("--algorithm qdrop: the weights were rounded to nearest (mse)")
    assert suggestions(diagnosis(*coarse, settings={"iterations": 60}))[-1].startswith("--preset default, or best")
    narrow = {"weight_bits": 4, "input_bits": 4}
    adding = [layer("a/b (c)", share=0.3, gain=0.1, **narrow), layer("d", share=0.2, gain=-0.4, **narrow), layer("e", gain=0.9, **narrow)]
    most, alone = suggestions(diagnosis(*adding, together=(("a/b (c)", "d"), 0.7)))
    assert most.startswith("--bits 'a/b (c)=w8a8' --bits d=w8a8: of 3 layers these add 50 % of all noise; the output gains 0.7 dB")
    assert alone.startswith("--bits e=w8a8: the output gains 0.9 dB when this layer alone is float")
    adding = [replace(row, weight_bits=7, input_bits=8) for row in adding]  # as the first and last layers have them
    eight = {"weight-bits": 8, "activation-bits": 8}
    most, alone = suggestions(diagnosis(*adding, together=(("a/b (c)", "d"), 0.7), settings=eight))
    assert most.startswith("--keep-float 'a/b (c)': it adds 30 % of all noise, most of it by its input")
    assert alone.startswith("--keep-float e: the output gains 0.9 dB")
    (text,) = suggestions(diagnosis(layer("a"), settings=eight | {"target": "openvino"}, float_weights=13.7))
    assert text.startswith("--no-reduce-range: weights that meet 8-bit activations have 7 bits")
    assert text.endswith("gains 3.7 dB when all weights are float")
    others: list[dict[str, Any]] = [{"target": "tensorrt"}, {"target": "openvino", "reduce-range": False}, {"activation-bits": 4}, {}]
    for other in others:  # all of these have 8 bits already
        assert suggestions(diagnosis(layer("a"), settings=eight | other, float_weights=13.7)) == []
    (text,) = suggestions(diagnosis(layer("f", clipped=0.05)))
    assert "5.0 % of the input of f lies beyond its grid" in text
    assert suggestions(diagnosis(layer("g"))) == []


def test_a_file_says_how_it_was_made(case: tuple[SourceModel, QuantTable, Diagnosis]) -> None:
    source, table, found = case
    assert found.settings == {}
    text = dump_config(Config(algorithm="mse"), DataConfig())
    assert diagnose(source, export_qdq(source.model, table, {"config": text}), SAMPLES, tried=0).settings["algorithm"] == "mse"


def test_more_bits_are_measured_before_they_are_suggested(tmp_path: Path) -> None:
    source = zoo.loaded(zoo.tiny_resnet(), tmp_path)
    config = Config(device="cpu", weight_bits=2, activation_bits=4, iterations=3)
    gains = gains_of_wider(source, resolved(config, DataConfig()), zoo.images(64))
    assert list(gains) == ["w4a4", "w2a8"]
    assert gains["w4a4"] > 3  # two bits are 12 dB of a weight that makes most of the noise
    assert gains["w2a8"] < gains["w4a4"]
    assert gains_of_wider(source, {}, zoo.images(64)) == {}
    assert gains_of_wider(source, resolved(config, DataConfig()), zoo.images(15)) == {}
    assert [one.label for one in wider(Config(weight_bits=8, activation_bits=8))] == ["w8a16"]
    assert wider(Config(weight_bits=8, activation_bits=8, target="tensorrt")) == ()  # it has no 16-bit integers


def layers_of(case: tuple[SourceModel, QuantTable, Diagnosis]) -> Iterator[tuple[LayerError, Node, str]]:
    """The rows of a diagnosis with their nodes and the names of their weights."""
    source, _, found = case
    for row in found.layers:
        node = next(node for node in source.graph.weighted if node.name == row.node)
        weight = source.graph.weight(node)
        assert weight is not None
        yield row, node, weight


def test_bits_are_read_from_the_codes(case: tuple[SourceModel, QuantTable, Diagnosis]) -> None:
    source, table, _ = case
    for row, node, weight in layers_of(case):
        assert row.weight_bits == (table[weight].spec.bits if node is not source.graph.weighted[1] else 3)  # its grid is 4 times as coarse
        assert row.input_bits == table[node.inputs[0]].spec.bits
        assert row.has_room == (row.input_bits == 4)


def test_parts_of_the_added_error(case: tuple[SourceModel, QuantTable, Diagnosis]) -> None:
    source, table, _ = case
    for layer, _, weight in layers_of(case):
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


def test_values_need_not_count_samples_first(tmp_path: Path) -> None:
    """Tokens of all samples in one axis, and a table that all samples share."""
    b = zoo.Builder({"x": ["N", 3, 8]})
    rows = b.op("Relu", b.op("Reshape", "x", b.constant("rows", np.array([-1, 8], np.int64))))
    y = b.op("Reshape", b.linear(rows, 8, 8), b.constant("back", np.array([-1, 3, 8], np.int64)))
    places = b.op("MatMul", b.op("Relu", b.op("ReduceMean", "x", axes=[0])), b.weight("projection", (8, 8), 8))
    model = b.model(b.op("MatMul", b.op("Add", y, places), b.weight("last", (8, 4), 8)))
    samples = Samples({"x": np.random.default_rng(0).normal(size=(10, 3, 8)).astype(np.float32)})
    source = zoo.loaded(model, tmp_path)
    table = quantize(source, samples, Config(algorithm="mse", device="cpu")).table
    found = diagnose(source, export_qdq(source.model, table), samples, tried=3)
    assert len(found.layers) == 3
    assert all(layer.gain is not None for layer in found.layers)


def test_an_open_axis_need_not_fit_one_element(tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 1, "T"]})
    x = b.op("Conv", "x", b.weight("w", (4, 1, 5), 5), name="first")
    model = b.model(b.op("Conv", b.op("Relu", x), b.weight("w2", (2, 4, 5), 20), name="second"))
    samples = Samples({"x": np.random.default_rng(0).normal(size=(8, 1, 20)).astype(np.float32)})
    source = zoo.loaded(model, tmp_path)
    table = quantize(source, samples, Config(algorithm="mse", device="cpu")).table
    found = diagnose(source, export_qdq(source.model, table), samples, tried=1)
    assert all(layer.weight is not None and 0 < layer.weight < 100 for layer in found.layers)


def test_values_beyond_the_ranges_ask_for_samples_not_bits() -> None:
    """One sample that the calibration did not cover makes the noise: more bits would round it more finely, and clip it all the same."""
    settings = {"weight-bits": 8, "activation-bits": 8}
    far = [layer("a", input=5.0, weight=40.0, clipped=0.001, clip_noise=0.99), layer("b", input=30.0, weight=40.0)]
    (text,) = suggestions(diagnosis(*far, settings=settings))
    assert text.startswith("calibration samples that cover such as these: values beyond the calibrated ranges make 99 % of the noise")
    assert "most at a (0.1 % of its input)" in text
    near = [layer("a", input=20.0, weight=40.0, clipped=0.001, clip_noise=0.3), layer("b", input=20.0, weight=40.0)]
    (text,) = suggestions(diagnosis(*near, settings=settings), {"w8a16": 3.0})
    assert text.startswith("-p w8a16")


def test_layers_whose_results_several_read_in_float_have_a_row(tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 16]})
    made = b.op("Relu", b.op("MatMul", "x", b.weight("w", (16, 16), 16)))
    source = zoo.loaded(b.model(b.op("Sub", b.op("Exp", made), b.op("ReduceMax", made, keepdims=1, axes=[1]))), tmp_path)
    samples = zoo.images(8, (16,))
    quantized = export_qdq(source.model, quantize(source, samples, Config(algorithm="mse", device="cpu")).table)
    (layer,) = diagnose(source, quantized, samples).layers
    assert layer.node == source.graph.weighted[0].name
    assert layer.gain is not None
    assert layer.gain > 40  # the only noise there is


def test_a_layer_in_float_reads_what_the_clip_of_its_grid_reads(tmp_path: Path) -> None:
    """Targets that take no integers between the pair have a Clip on floats, which is no Relu of the model's."""
    b = zoo.Builder({"x": ["N", 16]})
    y = b.op("Sigmoid", b.op("MatMul", "x", b.weight("w", (16, 16), 16)))
    source = zoo.loaded(b.model(b.op("MatMul", y, b.weight("v", (16, 4), 16))), tmp_path)
    config = Config(algorithm="minmax", device="cpu", target="openvino", first_last_bits="same")
    samples = zoo.images(8, (16,))
    file = export_qdq(source.model, quantize(source, samples, config).table, scheme=config.scheme)
    found = diagnose(source, file, samples)
    assert all(layer.gain is not None and layer.gain > 0.5 for layer in found.layers)  # dB; it was -10 with a Sigmoid of a Sigmoid
