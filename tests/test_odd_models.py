"""Models that are unusual in one thing each go through the whole command: quantized, written, run and reported."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from tests import zoo
from toolchain.cli import main
from toolchain.config import Config
from toolchain.errors import UnsupportedModelError
from toolchain.pipeline import quantize
from toolchain.samples import Samples, check_samples
from toolchain.source import load_source

RNG = np.random.default_rng(0)
Arrays = dict[str, np.ndarray]
FLOAT = TensorProto.FLOAT
VECTORS = RNG.normal(size=(24, 8)).astype(np.float32)


def weight(*shape: int) -> np.ndarray:
    return (RNG.normal(size=shape) * np.sqrt(2 / shape[-2])).astype(np.float32)


def value(name: str, kind: int, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, list(shape))


def made(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    constants: Arrays,
    domains: Sequence[tuple[str, int]] = (),
) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    imports = [helper.make_opsetid("", 17), *(helper.make_opsetid(*entry) for entry in domains)]
    return helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, tensors), opset_imports=imports, ir_version=8)


def two_layers(extra: Sequence[onnx.NodeProto] = (), *outputs: onnx.ValueInfoProto, domains: Sequence[tuple[str, int]] = (), **more: Any):
    """x [N, 8] -> Gemm -> Relu -> Gemm -> y [N, 4], with what a case adds."""
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "v"], ["y"]),
        *extra,
    ]
    constants = {"w": weight(8, 16), "v": weight(16, 4), **more}
    return made(nodes, [value("x", FLOAT, "N", 8)], outputs or [value("y", FLOAT, "N", 4)], constants, domains)


def constant_outputs() -> tuple[onnx.ModelProto, Arrays]:
    """Anchors that every call gives back, and a weight that is an output."""
    model = two_layers((), value("y", FLOAT, "N", 4), value("anchors", FLOAT, 3), value("v", FLOAT, 16, 4), anchors=np.ones(3, np.float32))
    return model, {"x": VECTORS}


def class_maps() -> tuple[onnx.ModelProto, Arrays]:
    """What converters of scikit-learn write: a map from class to score for each sample, and class names."""
    kind = helper.make_sequence_type_proto(helper.make_map_type_proto(TensorProto.STRING, helper.make_tensor_type_proto(FLOAT, [])))
    nodes = [
        helper.make_node("ZipMap", ["y"], ["scores"], domain="ai.onnx.ml", classlabels_strings=list("abcd")),
        helper.make_node("ArgMax", ["y"], ["best"], axis=1, keepdims=0),
        helper.make_node(
            "LabelEncoder", ["best"], ["label"], domain="ai.onnx.ml", keys_int64s=[0, 1, 2, 3], values_strings=list("abcd")
        ),
    ]  # fmt: skip
    outputs = [helper.make_value_info("scores", kind), value("label", TensorProto.STRING, "N")]
    return two_layers(nodes, *outputs, domains=[("ai.onnx.ml", 3)]), {"x": VECTORS}


def unequal_sequence() -> tuple[onnx.ModelProto, Arrays]:
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(FLOAT, None))
    node = helper.make_node("SplitToSequence", ["y", "three"], ["parts"], axis=1)
    return two_layers([node], helper.make_value_info("parts", kind), three=np.int64(3) * np.ones((), np.int64)), {"x": VECTORS}


def strings_in() -> tuple[onnx.ModelProto, Arrays]:
    nodes = [
        helper.make_node("LabelEncoder", ["s"], ["i"], domain="ai.onnx.ml", keys_strings=list("abc"), values_int64s=[0, 1, 2]),
        helper.make_node("Gather", ["table", "i"], ["e"]),
        helper.make_node("Gemm", ["e", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "v"], ["y"]),
    ]
    constants = {"table": weight(3, 8), "w": weight(8, 16), "v": weight(16, 4)}
    inputs, outputs = [value("s", TensorProto.STRING, "N")], [value("y", FLOAT, "N", 4)]
    return made(nodes, inputs, outputs, constants, [("ai.onnx.ml", 3)]), {"s": np.array(list("abc" * 8))}


def strange_names() -> tuple[onnx.ModelProto, Arrays]:
    nodes = [
        helper.make_node("Gemm", ["in put:0", "w é/ß"], ["%r[0]"]),
        helper.make_node("Relu", ["%r[0]"], ["{r}"], name="n" * 300),
        helper.make_node("Gemm", ["{r}", "weird'\"\\w\\1"], ["<y>&"]),
    ]
    constants = {"w é/ß": weight(8, 16), "weird'\"\\w\\1": weight(16, 4)}
    return made(nodes, [value("in put:0", FLOAT, "N", 8)], [value("<y>&", FLOAT, "N", 4)], constants), {"in put:0": VECTORS}


def infinite_weight() -> tuple[onnx.ModelProto, Arrays]:
    """An infinite weight, whose results a Sigmoid makes 0 or 1."""
    model = two_layers()
    broken = weight(8, 16)
    broken[0, 0] = np.inf
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(broken, "w"))
    model.graph.node[1].op_type = "Sigmoid"
    return model, {"x": VECTORS}


def sparse() -> tuple[onnx.ModelProto, Arrays]:
    """A weight as a sparse constant, and one that is made of a shape."""
    values = helper.make_tensor("s", FLOAT, [3], [1.0, 2.0, 3.0])
    places = helper.make_tensor("", TensorProto.INT64, [3], [3, 20, 50])
    nodes = [
        helper.make_node("Constant", [], ["s"], sparse_value=helper.make_sparse_tensor(values, places, [16, 4])),
        helper.make_node("ConstantOfShape", ["shape"], ["c"], value=helper.make_tensor("", FLOAT, [1], [0.1])),
        helper.make_node("Gemm", ["x", "c"], ["h"]),
        helper.make_node("Gemm", ["h", "s"], ["y"]),
    ]
    return made(nodes, [value("x", FLOAT, "N", 8)], [value("y", FLOAT, "N", 4)], {"shape": np.array([8, 16])}), {"x": VECTORS}


def stacked_weights() -> tuple[onnx.ModelProto, Arrays]:
    """A product with a stack of matrices, one for each head."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "v"], ["y"])]
    inputs, outputs = [value("x", FLOAT, "N", 2, 5, 8)], [value("y", FLOAT, "N", 2, 5, 4)]
    constants = {"w": weight(2, 8, 16), "v": weight(2, 16, 4)}
    return made(nodes, inputs, outputs, constants), {"x": RNG.normal(size=(24, 2, 5, 8)).astype(np.float32)}


def folded_windows() -> tuple[onnx.ModelProto, Arrays]:
    """Windows are folded into a batch of one, and back, with every shape written out."""
    shapes = {"s": np.array([16, 4, 4]), "back": np.array([1, 64, 8]), "w": weight(4, 8), "v": weight(8, 4)}
    nodes = [
        helper.make_node("Reshape", ["x", "s"], ["a"]),
        helper.make_node("MatMul", ["a", "w"], ["b"]),
        helper.make_node("Reshape", ["b", "back"], ["c"]),
        helper.make_node("MatMul", ["c", "v"], ["y"]),
    ]
    inputs, outputs = [value("x", FLOAT, 1, 64, 4)], [value("y", FLOAT, 1, 64, 4)]
    return made(nodes, inputs, outputs, shapes), {"x": RNG.normal(size=(24, 64, 4)).astype(np.float32)}


def causal_mask() -> tuple[onnx.ModelProto, Arrays]:
    """Attention behind a mask of minus infinity."""
    nodes = [
        *(helper.make_node("MatMul", ["x", f"w{k}"], [k]) for k in "qkv"),
        helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "kt"], ["s"]),
        helper.make_node("Add", ["s", "mask"], ["m"]),
        helper.make_node("Softmax", ["m"], ["p"]),
        helper.make_node("MatMul", ["p", "v"], ["y"]),
    ]
    constants = {f"w{k}": weight(8, 8) for k in "qkv"} | {"mask": np.triu(np.full((6, 6), -np.inf, np.float32), 1)}
    inputs, outputs = [value("x", FLOAT, "N", 6, 8)], [value("y", FLOAT, "N", 6, 8)]
    return made(nodes, inputs, outputs, constants), {"x": RNG.normal(size=(24, 6, 8)).astype(np.float32)}


def steps_first() -> tuple[onnx.ModelProto, Arrays]:
    """Samples along the second axis, which is named for them."""
    model = layers_of_steps(["steps", "batch", 8], ["steps", "batch", 4])
    return model, {"x": RNG.normal(size=(6, 24, 8)).astype(np.float32)}


def one_sequence() -> tuple[onnx.ModelProto, Arrays]:
    """No axis for samples: the first is of steps that depend on each other."""
    return layers_of_steps(["seq_len", 1, 8], ["seq_len", 1, 4]), {"x": RNG.normal(size=(24, 6, 1, 8)).astype(np.float32)}


def layers_of_steps(shape: Sequence[int | str], result: Sequence[int | str]) -> onnx.ModelProto:
    nodes = [
        helper.make_node("CumSum", ["x", "zero"], ["c"]),
        helper.make_node("MatMul", ["c", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "v"], ["y"]),
    ]
    constants = {"w": weight(8, 16), "v": weight(16, 4), "zero": np.int64(0) * np.ones((), np.int64)}
    return made(nodes, [value("x", FLOAT, *shape)], [value("y", FLOAT, *result)], constants)


def one_image() -> tuple[onnx.ModelProto, Arrays]:
    """No axis for samples: the first, of 3, is of colours, in the result too."""
    nodes = [
        helper.make_node("Unsqueeze", ["x", "zero"], ["i"]),
        helper.make_node("Conv", ["i", "w"], ["h"], pads=[1] * 4),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Conv", ["r", "v"], ["o"], pads=[1] * 4),
        helper.make_node("Squeeze", ["o", "zero"], ["y"]),
    ]
    constants = {"w": weight(8, 3, 3, 3) / 4, "v": weight(3, 8, 3, 3) / 4, "zero": np.zeros(1, np.int64)}
    inputs, outputs = [value("x", FLOAT, 3, 8, 8)], [value("y", FLOAT, 3, 8, 8)]
    return made(nodes, inputs, outputs, constants), {"x": RNG.normal(size=(24, 3, 8, 8)).astype(np.float32)}


def one_vector() -> tuple[onnx.ModelProto, Arrays]:
    """An input [8] and an output [4], whose classes count nevertheless."""
    model = two_layers()
    for node in model.graph.node:
        node.op_type = node.op_type.replace("Gemm", "MatMul")
    model.graph.input[0].CopyFrom(value("x", FLOAT, 8))
    model.graph.output[0].CopyFrom(value("y", FLOAT, 4))
    return model, {"x": VECTORS, "labels": np.arange(24) % 4}


def doubles() -> tuple[onnx.ModelProto, Arrays]:
    model = two_layers((), value("y", TensorProto.DOUBLE, "N", 4))
    model.graph.input[0].CopyFrom(value("x", TensorProto.DOUBLE, "N", 8))
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    return model, {"x": VECTORS.astype(np.float64)}


def inputs_handed_out() -> tuple[onnx.ModelProto, Arrays]:
    """Outputs that are the input, and a part of it, which a layer reads too."""
    nodes = [helper.make_node("Identity", ["x"], ["same"]), helper.make_node("Slice", ["x", "zero", "four", "one"], ["part"])]
    outputs = value("y", FLOAT, "N", 4), value("same", FLOAT, "N", 8), value("part", FLOAT, "N", 4)
    ends = {name: np.array([number]) for name, number in (("zero", 0), ("four", 4), ("one", 1))}
    model = two_layers(nodes, *outputs)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in ends.items())
    return model, {"x": VECTORS}


def halves() -> tuple[onnx.ModelProto, Arrays]:
    model, samples = doubles()
    for entry in (*model.graph.input, *model.graph.output):
        entry.type.tensor_type.elem_type = TensorProto.FLOAT16
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    return model, {"x": samples["x"].astype(np.float16)}


def fixed_rows() -> tuple[onnx.ModelProto, Arrays]:
    """Four samples in each run, alike to the model, and never another number of them: a constant was expanded to four rows."""
    nodes = [helper.make_node("Add", ["x", "rows"], ["s"]), helper.make_node("MatMul", ["s", "w"], ["y"])]
    rows = np.repeat(RNG.normal(size=(1, 8)), 4, axis=0).astype(np.float32)
    weight = RNG.normal(size=(8, 4)).astype(np.float32)
    return made(nodes, [value("x", FLOAT, 4, 8)], [value("y", FLOAT, 4, 4)], {"rows": rows, "w": weight}), {"x": VECTORS}


def pairs() -> tuple[onnx.ModelProto, Arrays]:
    """Two samples make a row of the result, so that one alone cannot be run."""
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Reshape", ["r", "shape"], ["p"]),
        helper.make_node("Gemm", ["p", "v"], ["y"]),
    ]
    constants = {"w": weight(8, 16), "shape": np.array([-1, 32]), "v": weight(32, 4)}
    return made(nodes, [value("x", FLOAT, "two", 8)], [value("y", FLOAT, "one", 4)], constants), {"x": VECTORS}


def even_attention() -> tuple[onnx.ModelProto, Arrays]:
    """Probabilities all near 1/16: a scale that uses all codes for them makes ONNX Runtime's softmax kernel overflow."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["k"]),
        helper.make_node("Add", ["k", "k"], ["q"]),
        helper.make_node("Softmax", ["q"], ["p"]),
        helper.make_node("MatMul", ["p", "v"], ["y"]),
    ]
    constants = {"w": weight(8, 16) * np.float32(0.02), "v": weight(16, 4)}
    return made(nodes, [value("x", FLOAT, "N", 8)], [value("y", FLOAT, "N", 4)], constants), {"x": VECTORS}


def names_of_the_exporter() -> tuple[onnx.ModelProto, Arrays]:
    """Inputs, outputs, values and nodes that have the names which quantizers around others would be given."""
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["h"], name="r_QuantizeLinear"),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Mul", ["r", "x_scale"], ["r_clipped"]),
        helper.make_node("Gemm", ["r_clipped", "v"], ["y"]),
        helper.make_node("Gemm", ["r", "v"], ["r_scale"]),
    ]
    inputs = [value("x", FLOAT, "N", 8), value("x_scale", FLOAT, "N", 1)]
    outputs = [value("y", FLOAT, "N", 4), value("r_scale", FLOAT, "N", 4)]
    arrays = {"x": VECTORS, "x_scale": np.abs(VECTORS[:, :1]) + 1}
    return made(nodes, inputs, outputs, {"w": weight(8, 16), "v": weight(16, 4)}), arrays


def half_function() -> tuple[onnx.ModelProto, Arrays]:
    """Half precision with a function that names the type, a constant output, and an input that is handed out."""
    half = numpy_helper.from_array(np.array(0.5, np.float16), "half")
    body = [helper.make_node("Constant", [], ["half"], value=half), helper.make_node("Mul", ["a", "half"], ["b"])]
    function = helper.make_function("own", "Halved", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    outputs = value("y", FLOAT, "N", 4), value("anchors", FLOAT, 3), value("x", FLOAT, "N", 8)
    model = two_layers((), *outputs, domains=[("own", 1)], anchors=np.ones(3, np.float32))
    model.graph.node[1].input[0] = "halved"
    model.graph.node.insert(1, helper.make_node("Halved", ["h"], ["halved"], domain="own"))
    model.functions.append(function)
    for entry in (*model.graph.input, *model.graph.output):
        entry.type.tensor_type.elem_type = TensorProto.FLOAT16
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    return model, {"x": VECTORS.astype(np.float16)}


def branches_with_one_name() -> tuple[onnx.ModelProto, Arrays]:
    """What is a weight in one branch of an If is a result in the other."""

    def branch(name: str, tensors: Sequence[onnx.TensorProto], *nodes: onnx.NodeProto) -> onnx.GraphProto:
        return helper.make_graph(nodes, name, [], [onnx.ValueInfoProto(name=f"{name}_out")], tensors)

    shared = numpy_helper.from_array(weight(64, 16), "k")
    then = branch("then", [shared], helper.make_node("MatMul", ["r", "k"], ["then_out"]))
    k, out = helper.make_node("Relu", ["r"], ["k"]), helper.make_node("MatMul", ["k", "u"], ["else_out"])
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("ReduceMax", ["r"], ["most"], keepdims=0),
        helper.make_node("Greater", ["most", "none"], ["is_some"]),
        helper.make_node("If", ["is_some"], ["z"], then_branch=then, else_branch=branch("else", [], k, out)),
        helper.make_node("Gemm", ["z", "v"], ["y"]),
    ]
    constants = {"w": weight(8, 64), "u": weight(64, 16), "v": weight(16, 4), "none": np.zeros((), np.float32)}
    return made(nodes, [value("x", FLOAT, "N", 8)], [value("y", FLOAT, "N", 4)], constants), {"x": VECTORS}


def axes_and_windows() -> tuple[onnx.ModelProto, Arrays]:
    """Pad and Resize of some axes, and windows over the end, between convolutions that run channels last."""
    b = zoo.Builder({"x": ["N", 8, 9, 9]}, opset=18)
    axes, pads, zero = (b.constant(n, np.array(a)) for n, a in (("axes", [2, -1]), ("pads", [1, 0, 2, 1]), ("zero", np.float32(0))))
    scales, sizes = b.constant("scales", np.array([2, 1.5], np.float32)), b.constant("sizes", np.array([11, 13]))
    y = b.op("Pad", b.conv("x", 8, 8, act="relu"), pads, zero, axes)
    y = b.op("Resize", b.conv(y, 8, 8, act="relu"), "", scales, mode="linear", axes=[-2, 3])
    y = b.op("Resize", b.conv(y, 8, 8, act="relu"), "", "", sizes, mode="nearest", axes=[2, 3])
    windows = {"kernel_shape": [3, 3], "strides": [3, 3], "ceil_mode": 1, "count_include_pad": 1}
    y = b.op("AveragePool", b.conv(y, 8, 8, act="relu"), **windows)
    model = b.model(b.conv(y, 8, 4))
    return model, {"x": RNG.normal(size=(16, 8, 9, 9)).astype(np.float32)}


def windows_without_a_kernel() -> tuple[onnx.ModelProto, Arrays]:
    """Averages that have no kernel on integers, sizes of some axes, and a crop that becomes a Pad of computed sizes."""
    b = zoo.Builder({"x": ["N", 8, 12, 12]}, opset=19)
    shape, sizes = b.constant("shape", np.array([13, 9])), b.constant("sizes", np.array([11, 13]))
    y = b.op("CenterCropPad", b.conv("x", 8, 8, act="relu"), shape, axes=[-1, 2])
    y = b.op("AveragePool", b.conv(y, 8, 8, act="relu"), kernel_shape=[2, 2], dilations=[2, 2])
    y = b.op("Resize", b.conv(y, 8, 8, act="relu"), "", "", sizes, mode="nearest", axes=[3, 2])
    windows = {"kernel_shape": [3, 3], "strides": [3, 3], "pads": [1, 1, 0, 0], "ceil_mode": 1, "count_include_pad": 1}
    y = b.op("AveragePool", b.conv(y, 8, 8, act="relu"), **windows)
    model = b.model(b.conv(y, 8, 4))
    return model, {"x": RNG.normal(size=(16, 8, 12, 12)).astype(np.float32)}


def number_into_a_loop() -> tuple[onnx.ModelProto, Arrays]:
    """A Loop reads a single number that torch computes: it has no axis there either."""
    steps = helper.make_graph(
        [
            helper.make_node("Unsqueeze", ["level", "axis"], ["u"]),
            helper.make_node("Concat", ["u", "two"], ["pair"], axis=0),
            helper.make_node("Add", ["acc", "pair"], ["next"]),
            helper.make_node("Identity", ["go"], ["going"]),
        ],
        "steps",
        [value("i", TensorProto.INT64), value("go", TensorProto.BOOL), value("acc", FLOAT, 4, 2)],
        [value("going", TensorProto.BOOL), value("next", FLOAT, 4, 2)],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("ReduceMean", ["r"], ["level"], keepdims=0),
        helper.make_node("Loop", ["three", "yes", "r"], ["looped"], body=steps),
        helper.make_node("MatMul", ["looped", "v"], ["y"]),
    ]
    constants = {"w": weight(8, 2), "v": weight(2, 4), "two": np.full(1, 2, np.float32), "axis": np.zeros(1, np.int64)}
    constants |= {"three": np.array(3), "yes": np.array(True)}
    return made(nodes, [value("x", FLOAT, 4, 8)], [value("y", FLOAT, 4, 4)], constants), {"x": VECTORS[:16]}


def products_in_branches() -> tuple[onnx.ModelProto, Arrays]:
    """What ONNX Runtime makes of a MatMul and an Add has one name inside the branches of an If and behind it."""

    def branch(name: str) -> onnx.GraphProto:
        product = helper.make_node("MatMul", ["r", f"{name}_w"], [f"{name}_m"])
        added = helper.make_node("Add", [f"{name}_m", f"{name}_b"], [f"{name}_y"])
        return helper.make_graph([product, added], name, [], [value(f"{name}_y", FLOAT, 1, 5, 16)])

    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "none"], ["is_some"]),
        helper.make_node("If", ["is_some"], ["z"], then_branch=branch("then"), else_branch=branch("else")),
        helper.make_node("MatMul", ["z", "v"], ["m"]),
        helper.make_node("Add", ["m", "c"], ["y"]),
    ]
    constants = {"none": np.zeros((), np.float32), "v": weight(16, 4), "c": weight(1, 4)[0]}
    constants |= {f"{name}_{kind}": array for name in ("then", "else") for kind, array in (("w", weight(8, 16)), ("b", weight(1, 16)[0]))}
    model = made(nodes, [value("x", FLOAT, 1, 5, 8)], [value("y", FLOAT, 1, 5, 4)], constants)
    return model, {"x": RNG.normal(size=(16, 5, 8)).astype(np.float32)}


MODELS = {
    builder.__name__: builder
    for builder in (
        constant_outputs, class_maps, unequal_sequence, strings_in, strange_names, infinite_weight, sparse, stacked_weights, folded_windows,
        causal_mask, steps_first, one_sequence, one_image, one_vector, doubles, halves, inputs_handed_out, fixed_rows,
        even_attention, names_of_the_exporter, half_function, branches_with_one_name, axes_and_windows,
        windows_without_a_kernel, number_into_a_loop, products_in_branches,
    )
}  # fmt: skip
EXACT = {"inputs_handed_out": {"same", "part"}, "half_function": {"x", "anchors"}}
"""Models with outputs that must be those of the float model."""
KEPT = {"infinite_weight": "NaN or infinite", "constant_outputs": "is an output of the model"}
"""Models with a layer that stays float, and what its row says."""


@pytest.mark.parametrize("name", MODELS)
def test_quantized_and_reported(name: str, tmp_path: Path) -> None:
    model, samples = MODELS[name]()
    onnx.save(model, tmp_path / "m.onnx")
    np.savez(tmp_path / "c.npz", **samples)  # pyright: ignore[reportArgumentType]
    arguments = ["quantize", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "q.onnx"), "--calibration-data", str(tmp_path / "c.npz")]
    done = CliRunner().invoke(main, [*arguments, "--json", "--device", "cpu", "-p", "w8a8", "--algorithm", "mse"])
    assert done.exit_code == 0, done.output
    facts = json.loads((tmp_path / "q.report" / "report.json").read_text())
    assert facts["coverage"]["layers_quantized"] == facts["coverage"]["layers"] - (name in KEPT)
    if name in KEPT:
        assert any(KEPT[name] in row["reason"] for row in facts["float_nodes"])
    else:
        noise = [ratio for ratio in facts["validation"]["sqnr"].values() if ratio is not None]
        assert all(ratio > 20 for ratio in noise)  # 8 bits; None is exact
    assert {output for output, ratio in facts["validation"]["sqnr"].items() if ratio is None} >= EXACT.get(name, set())
    assert list(facts["validation"]["sqnr"]) == [output.name for output in model.graph.output]
    written = ort.InferenceSession(str(tmp_path / "q.onnx"), providers=["CPUExecutionProvider"])
    assert [entry.name for entry in written.get_outputs()] == [output.name for output in model.graph.output]


@pytest.mark.parametrize("name", ["inputs_handed_out", "names_of_the_exporter"])
@pytest.mark.parametrize("target", ["qnn", "tensorrt", "openvino"])
def test_other_targets_write_what_runs(name: str, target: str, tmp_path: Path) -> None:
    model, samples = MODELS[name]()
    onnx.save(model, tmp_path / "m.onnx")
    np.savez(tmp_path / "c.npz", **samples)  # pyright: ignore[reportArgumentType]
    arguments = ["quantize", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "q.onnx"), "--calibration-data", str(tmp_path / "c.npz")]
    done = CliRunner().invoke(main, [*arguments, "--target", target, "--device", "cpu", "-p", "w8a8", "--algorithm", "mse"])
    assert done.exit_code == 0, done.output
    facts = json.loads((tmp_path / "q.report" / "report.json").read_text())["validation"]
    assert facts["simulation"]["sqnr"] is None or facts["simulation"]["sqnr"] > 40  # None is exact; a few codes on ties


def test_an_input_with_a_default_becomes_a_constant_and_is_named(tmp_path: Path) -> None:
    model = two_layers(gain=np.ones(16, np.float32))
    model.graph.node[0].output[0] = "g"
    model.graph.node.insert(1, helper.make_node("Mul", ["g", "gain"], ["h"]))
    model.graph.input.append(value("gain", FLOAT, 16))
    onnx.save(model, tmp_path / "m.onnx")
    source = load_source(tmp_path / "m.onnx")
    assert source.notes == ("the default of input 'gain' is a constant of the quantized model: it cannot be fed any more",)
    model.graph.input.extend(value(name, FLOAT, *shape) for name, shape in (("w", (8, 16)), ("v", (16, 4))))
    onnx.save(model, tmp_path / "all.onnx")
    assert not load_source(tmp_path / "all.onnx").notes  # that is how files were once written


@pytest.mark.parametrize(("ir_version", "opset"), [(3, 9), (4, 11), (8, 17)])
def test_half_precision_with_its_constants_listed_as_inputs(ir_version: int, opset: int, tmp_path: Path) -> None:
    """As files were once written: what is float32 now is declared so, or the opset cannot be raised."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "v"], ["y"]),
    ]
    tensors = {"w": weight(8, 16).astype(np.float16), "v": weight(16, 4).astype(np.float16)}
    model = made(nodes, [value("x", TensorProto.FLOAT16, "N", 8)], [value("y", TensorProto.FLOAT16, "N", 4)], tensors)
    model.graph.input.extend(value(name, TensorProto.FLOAT16, *array.shape) for name, array in tensors.items())
    model.ir_version, model.opset_import[0].version = ir_version, opset
    onnx.save(model, tmp_path / "m.onnx")
    source = load_source(tmp_path / "m.onnx")
    assert [spec.name for spec in source.inputs] == ["x"]
    assert {source.constants[name].dtype for name in tensors} == {np.dtype(np.float32)}


def test_settings_that_leave_nothing_to_quantize(tmp_path: Path) -> None:
    model, samples = two_layers(), Samples({"x": VECTORS})
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(UnsupportedModelError, match="leave nothing of the model to quantize: Gemm Gemm_0 kept float on request"):
        quantize(load_source(tmp_path / "m.onnx"), samples, Config(keep_float=("Gemm",), device="cpu", algorithm="mse"))


@pytest.mark.parametrize("name", ["doubles", "halves", "fixed_rows", "one_image"])
def test_learned(name: str, tmp_path: Path) -> None:
    """Learning takes these models as rounding to nearest does: mini-batches mix streams of any float type, and keep to a fixed batch."""
    model, samples = MODELS[name]()
    onnx.save(model, tmp_path / "m.onnx")
    source = load_source(tmp_path / "m.onnx")
    fed = check_samples(Samples(samples), source.inputs, "")
    found = quantize(source, fed, Config(weight_bits=4, activation_bits=8, iterations=4, batch_size=8, device="cpu"))
    assert all(math.isfinite(result.loss_after) for result in found.results)
    assert found.results


def test_normalizations_behind_a_computed_bias_are_folded(tmp_path: Path) -> None:
    """As current torch writes a convolution without a bias where its optimizer is off."""
    b = zoo.Builder({"x": ["N", 8, 9, 9]})
    zero = b.op("CastLike", b.constant("zero", np.zeros(1)), b.weight("w", (8, 8, 3, 3), 72))
    y = b.op("Conv", "x", "w", b.op("Expand", zero, b.constant("shape", np.array([8]))))
    moments = [b.constant(name, RNG.uniform(0.5, 2, 8).astype(np.float32)) for name in ("gain", "shift", "mean", "variance")]
    onnx.save(b.model(b.conv(b.op("Relu", b.op("BatchNormalization", y, *moments)), 8, 4)), tmp_path / "m.onnx")
    assert [node.op_type for node in load_source(tmp_path / "m.onnx").graph.nodes] == ["Conv", "Relu", "Conv"]
