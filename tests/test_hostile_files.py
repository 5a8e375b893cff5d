"""Files that are broken, hostile, or merely unusual: a clear error of the project, or a correct result; never a traceback or a hang."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from exporters import export_qdq
from tests import zoo
from tests.test_islands import control_flow
from toolchain import runtime
from toolchain.cli import main
from toolchain.config import Config
from toolchain.errors import MrecgError, UnsupportedModelError
from toolchain.noise import sqnr
from toolchain.pipeline import quantize
from toolchain.source import load_source
from toolchain.survey import inspect, sample_shapes

TINY = zoo.tiny_resnet()


def changed(change: Callable[[onnx.ModelProto], object]) -> onnx.ModelProto:
    model = onnx.ModelProto()
    model.CopyFrom(TINY)
    change(model)
    return model


def cyclic(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = model.graph.node[-1].output[0]


def dangling(model: onnx.ModelProto) -> None:
    model.graph.node[2].input[0] = "nobody_makes_this"


def same_output_twice(model: onnx.ModelProto) -> None:
    model.graph.node[3].output[0] = model.graph.node[2].output[0]


def same_initializer_twice(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(model.graph.initializer[0])


def wrong_weight_shape(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[0] = 7


def huge_weight(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [1 << 40, 1 << 20, 3, 3]


def negative_dims(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[0] = -8


def missing_external_data(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="not_there.bin")


def outside_external_data(model: onnx.ModelProto) -> None:
    missing_external_data(model)
    model.graph.initializer[0].external_data[0].value = "../../etc/passwd"


def unknown_domain(model: onnx.ModelProto) -> None:
    model.graph.node[1].domain = "nowhere"
    model.opset_import.append(helper.make_opsetid("nowhere", 1))


def no_outputs(model: onnx.ModelProto) -> None:
    del model.graph.output[:]


def no_opset(model: onnx.ModelProto) -> None:
    del model.opset_import[:]


def future_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 999


def no_inputs(model: onnx.ModelProto) -> None:
    value = numpy_helper.from_array(np.ones((2, 3, 8, 8), np.float32), "x")
    del model.graph.input[:]
    model.graph.initializer.append(value)


def unknown_element_type(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_type = 77


def empty_weight(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros((0, 3, 3, 3), np.float32), model.graph.initializer[0].name))


BROKEN = [
    cyclic, dangling, same_output_twice, wrong_weight_shape, huge_weight, negative_dims, missing_external_data,
    outside_external_data, unknown_domain, no_outputs, no_opset, future_opset, no_inputs, unknown_element_type, empty_weight,
]  # fmt: skip


@pytest.mark.parametrize("change", BROKEN, ids=lambda change: change.__name__)
def test_broken_files_are_refused_in_one_line(change: Callable[[onnx.ModelProto], object], tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(changed(change).SerializeToString())
    result = CliRunner().invoke(main, ["inspect", str(path)])
    assert result.exit_code == 3, result.output
    assert result.output.startswith(f"error: {path}: ")
    assert "Traceback" not in result.output


def test_a_constant_that_is_there_twice_counts_once(tmp_path: Path) -> None:
    source = zoo.loaded(changed(same_initializer_twice), tmp_path)
    samples = zoo.images(4)
    expected = runtime.run(runtime.session(TINY), samples.inputs)
    for name, array in runtime.run(runtime.session(source.model), samples.inputs).items():
        np.testing.assert_allclose(array, expected[name], atol=1e-5, rtol=0)


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.onnx"
    path.write_bytes(TINY.SerializeToString().replace(b"conv0_w", b"conv\xff_w"))
    with pytest.raises(UnsupportedModelError, match=r"latin\.onnx: "):
        load_source(path)


def test_inputs_of_astronomic_size_are_not_made_up(tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 3, 1 << 20, 1 << 20]})
    source = zoo.loaded(b.model(b.head(b.conv("x", 3, 8, act="relu"), 8)), tmp_path)
    plan, islands = inspect(source, sample_shapes(source, {})[0], Config(units="modcap"))
    assert not islands
    assert len(plan.rows) == 1


def test_names_that_the_exporter_would_give(tmp_path: Path) -> None:
    """A model may use the names of scales and codes for values of its own."""
    b = zoo.Builder({"x": ["N", 3, 8, 8]})
    y = b.conv("x", 3, 8, act="relu")
    taken = b.constant("conv0_w_scale", np.full((1, 8, 1, 1), 0.5, np.float32))
    y = b.op("Mul", y, taken, name="x_quantized")
    source = zoo.loaded(b.model(b.head(b.conv(y, 8, 8, act="relu"), 8)), tmp_path)
    samples = zoo.images(16)
    exported = export_qdq(source.model, quantize(source, samples, Config(device="cpu", algorithm="minmax", weight_bits=8)).table)
    floats, outputs = (runtime.run(runtime.session(model), samples.inputs) for model in (source.model, exported))
    assert min(sqnr(floats[name], outputs[name]) for name in floats) > 15  # 4-bit activations


def half(kind: int) -> onnx.ModelProto:
    """The tiny network as a converter to half precision leaves it: weights, inputs and outputs."""
    model = changed(lambda model: model.graph.value_info.__delitem__(slice(None)))
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor).astype(helper.tensor_dtype_to_np_dtype(kind))
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = kind
    return model


def test_half_precision_constants_that_do_not_fit_their_shape_are_named(tmp_path: Path) -> None:
    """Found by mutation: the checker does not count the numbers of 16-bit tensors."""
    model = half(TensorProto.FLOAT16)
    model.graph.initializer[0].dims[:] = [3]
    path = tmp_path / "damaged.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UnsupportedModelError, match=f"the constant '{model.graph.initializer[0].name}' is damaged"):
        load_source(path)


def test_half_precision_models_are_quantized_and_keep_their_interface(tmp_path: Path) -> None:
    source = zoo.loaded(half(TensorProto.FLOAT16), tmp_path)
    assert source.notes == ("float16 values are computed in float32; graph inputs and outputs keep their types",)
    samples = zoo.images(16)
    narrow = type(samples)({"x": samples.inputs["x"].astype(np.float16)})
    quantized = quantize(source, narrow, Config(device="cpu", algorithm="minmax", weight_bits=8, activation_bits=8))
    assert len(quantized.placement.weights) == len(source.graph.weighted) == 7
    exported = export_qdq(source.model, quantized.table)
    assert {v.type.tensor_type.elem_type for v in (*exported.graph.input, *exported.graph.output)} == {TensorProto.FLOAT16}
    expected = runtime.run(runtime.session(half(TensorProto.FLOAT16)), narrow.inputs)
    for name, array in runtime.run(runtime.session(exported), narrow.inputs).items():
        assert array.dtype == np.float16
        assert sqnr(expected[name], array) > 20


def test_a_weight_that_something_else_reads_stays_float(tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 6]})
    w = b.weight("w", (6, 6), 6)
    y = b.op("MatMul", b.op("Add", b.op("MatMul", "x", w), b.op("ReduceMean", w, axes=[0], keepdims=1)), b.weight("v", (6, 4), 6))
    source = zoo.loaded(b.model(y), tmp_path)
    found = quantize(source, zoo.images(8, (6,)), Config(device="cpu", algorithm="minmax"))
    if any(node.op_type == "ReduceMean" for node in source.graph.nodes):  # ONNX Runtime may have folded it
        assert [row.reason for row in found.placement.floats] == ["its weight is read by a node that stays float, too"]


def surveyed(data: bytes, folder: Path) -> None:
    path = folder / "mutated.onnx"
    path.write_bytes(data)
    source = load_source(path)
    inspect(source, sample_shapes(source, {})[0], Config(units="modcap"))


SERIALS = [TINY.SerializeToString(), half(TensorProto.FLOAT16).SerializeToString(), control_flow().SerializeToString()]


@given(st.sampled_from(SERIALS), st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_bytes(tmp_path: Path, serial: bytes, changes: list[tuple[float, int]]) -> None:
    data = bytearray(serial)
    for share, value in changes:
        data[int(share * len(data))] = value
    with contextlib.suppress(MrecgError):
        surveyed(bytes(data), tmp_path)


@st.composite
def mutations(draw: st.DrawFn) -> onnx.ModelProto:
    """The tiny network with a few of its parts replaced by other parts of it."""
    model = changed(lambda _: None)
    graph = model.graph
    names = [value for node in graph.node for value in (*node.input, *node.output)] + ["", "nobody"]
    for _ in range(draw(st.integers(1, 3))):
        node = draw(st.sampled_from(list(graph.node)))
        tensor = draw(st.sampled_from(list(graph.initializer)))
        match draw(st.integers(0, 9)):
            case 0:
                node.input[draw(st.integers(0, len(node.input) - 1))] = draw(st.sampled_from(names))
            case 1:
                node.output[0] = draw(st.sampled_from(names))
            case 2:
                node.op_type = draw(
                    st.sampled_from(["Conv", "Relu", "Add", "Gemm", "If", "Nothing", "NonZero", "Concat", "Shape", "Softmax"])
                )
            case 3:
                graph.node.remove(node)
                if not graph.node:
                    break
            case 4:
                graph.node.append(node)
            case 5 if node.attribute:
                del node.attribute[draw(st.integers(0, len(node.attribute) - 1))]
            case 6 if node.attribute:
                attribute = node.attribute[draw(st.integers(0, len(node.attribute) - 1))]
                if attribute.ints:
                    attribute.ints[0] = draw(st.integers(-3, 3))
                else:
                    attribute.i = draw(st.integers(-3, 3))
            case 7:
                tensor.dims[:] = draw(st.lists(st.integers(-1, 9), max_size=5))
            case 8:
                tensor.data_type = draw(st.integers(0, 25))
            case 9:
                shape = graph.input[0].type.tensor_type.shape
                shape.dim[draw(st.integers(0, 3))].dim_value = draw(st.integers(-1, 9))
            case _:
                node.name = ""
    return model


@given(mutations())
@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_structure(tmp_path: Path, model: onnx.ModelProto) -> None:
    with contextlib.suppress(MrecgError):
        surveyed(model.SerializeToString(), tmp_path)
