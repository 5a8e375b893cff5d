"""Every converter against ONNX Runtime: several shapes, attributes and opset versions."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tests import zoo
from toolchain.errors import InstallationError, UnsupportedModelError
from toolchain.graph import Graph, Node
from toolchain.partition import Block
from toolchain.source import InputSpec, SourceModel, infer_types
from toolchain.torch_import import can_import, fallback, import_block

from .parity import check, executed, imported, node_model, normal


@given(
    rank=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    group=st.sampled_from([1, 2, 4]),
    auto=st.sampled_from(["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]),
    pads=st.lists(st.integers(0, 2), min_size=6, max_size=6),
    bias=st.booleans(),
    opset=st.sampled_from([11, 17, 22]),
)
@settings(max_examples=60, deadline=None)
def test_conv(rank: int, kernel: int, stride: int, dilation: int, group: int, auto: str, pads: list[int], bias: bool, opset: int) -> None:
    if auto.startswith("SAME"):
        dilation = 1  # ONNX Runtime refuses dilations with SAME padding
    weight = normal(8, 4 // group, *[kernel] * rank, seed=1)
    attributes: dict[str, Any] = {"strides": [stride] * rank, "dilations": [dilation] * rank, "group": group}
    attributes |= {"pads": [*pads[:rank], *pads[3 : 3 + rank]]} if auto == "NOTSET" else {"auto_pad": auto}
    constants: dict[str, np.ndarray | None] = {"w": weight, **({"b": normal(8, seed=2)} if bias else {})}
    check("Conv", normal(2, 4, *[7] * rank), constants, opset, **attributes)


@pytest.mark.parametrize("opset", [11, 17, 22])
@pytest.mark.parametrize("pads", [[0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]])
@pytest.mark.parametrize("group", [1, 2])
def test_conv_transpose(opset: int, pads: list[int], group: int) -> None:
    constants: dict[str, np.ndarray | None] = {"w": normal(4, 3, 3, 3, seed=1), "b": normal(3 * group, seed=2)}
    check("ConvTranspose", normal(2, 4, 5, 5), constants, opset, strides=[2, 2], pads=pads, group=group, output_padding=[1, 1])


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("bias", [None, (6,), (1, 6), (1,)])
def test_gemm(trans_a: int, trans_b: int, alpha: float, beta: float, bias: tuple[int, ...] | None) -> None:
    constants: dict[str, np.ndarray | None] = {"w": normal(*((6, 5) if trans_b else (5, 6)), seed=1)}
    if bias is not None:
        constants["b"] = normal(*bias, seed=2)
    check("Gemm", normal(*((5, 3) if trans_a else (3, 5))), constants, 13, transA=trans_a, transB=trans_b, alpha=alpha, beta=beta)


@pytest.mark.parametrize("shapes", [((3, 5), (5, 6)), ((2, 3, 5), (5, 6)), ((2, 4, 3, 5), (4, 5, 6))])
def test_matmul(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    check("MatMul", normal(*shapes[0]), {"w": normal(*shapes[1], seed=1)})


@given(
    rank=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    auto=st.sampled_from(["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]),
    pads=st.lists(st.integers(0, 2), min_size=6, max_size=6),
    include=st.integers(0, 1),
    kind=st.sampled_from(["MaxPool", "AveragePool"]),
    opset=st.sampled_from([11, 17, 22]),
)
@settings(max_examples=80, deadline=None)
def test_pooling(rank: int, kernel: int, stride: int, auto: str, pads: list[int], include: int, kind: str, opset: int) -> None:
    low, high = ([min(p, kernel - 1) for p in part] for part in (pads[:rank], pads[3 : 3 + rank]))
    attributes: dict[str, Any] = {"kernel_shape": [kernel] * rank, "strides": [stride] * rank}
    attributes |= {"pads": [*low, *high]} if auto == "NOTSET" else {"auto_pad": auto}
    if kind == "AveragePool":
        attributes["count_include_pad"] = include
    check(kind, normal(2, 3, *[7] * rank), opset=opset, **attributes)


@pytest.mark.parametrize("kind", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize("size", [6, 7, 8])
def test_pooling_with_ceil_mode(kind: str, size: int) -> None:
    check(kind, normal(2, 3, size, size), kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)


def test_global_pooling() -> None:
    check("GlobalMaxPool", normal(2, 3, 5, 4))
    check("GlobalAveragePool", normal(2, 3, 5, 4))
    check("GlobalAveragePool", normal(2, 3, 5, 4), opset=22)


@pytest.mark.parametrize("opset", [13, 18, 19, 21])
@pytest.mark.parametrize("mode", ["constant", "reflect", "edge"])
def test_pad(opset: int, mode: str) -> None:
    check("Pad", normal(2, 3, 5, 5), {"pads": np.array([0, 0, 1, 2, 0, 0, 2, 1], np.int64)}, opset, mode=mode)


def test_pad_with_axes_and_value() -> None:
    pads, value, axes = np.array([1, 2, 2, 0], np.int64), np.array(3.5, np.float32), np.array([1, -1], np.int64)
    check("Pad", normal(2, 3, 5, 5), {"pads": pads, "v": value, "axes": axes}, 18)
    check("Pad", normal(2, 3, 5, 5), {"pads": pads, "v": None, "axes": axes}, 18)


def test_pad_may_cut() -> None:
    check("Pad", normal(2, 3, 5, 5), {"pads": np.array([0, 0, -1, 1, 0, 0, 0, -2], np.int64)}, 13)


KINDS = ["ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("axes", [[2, 3], [-1], None])
def test_reductions_of_both_generations(kind: str, keepdims: int, axes: list[int] | None) -> None:
    x = normal(2, 3, 4, 5)
    constants: dict[str, np.ndarray | None] = {"axes": np.array(axes, np.int64)} if axes else {}
    check(kind, x, constants, 18, keepdims=keepdims)
    if kind == "ReduceSum":
        check(kind, x, constants, 13, keepdims=keepdims)
    elif axes:
        check(kind, x, {}, 13, keepdims=keepdims, axes=axes)


def test_reduction_without_axes_can_be_the_identity() -> None:
    check("ReduceSum", normal(2, 3), {}, 13, noop_with_empty_axes=1)


@pytest.mark.parametrize("opset", [14, 19, 21, 23])
@pytest.mark.parametrize("shape", [[0, -1], [2, 3, -1], [0, 0, 20]])
def test_reshape(opset: int, shape: list[int]) -> None:
    check("Reshape", normal(2, 3, 4, 5), {"shape": np.array(shape, np.int64)}, opset)


@given(st.lists(st.tuples(st.integers(-6, 6), st.integers(-6, 6), st.integers(1, 3)), min_size=1, max_size=2))
@settings(max_examples=60, deadline=None)
def test_slice(cuts: list[tuple[int, int, int]]) -> None:
    x = normal(2, 5, 4)
    index = (slice(None), *(slice(*cut) for cut in cuts))
    if 0 in x[index].shape:
        return  # an empty result is the subject of nothing here
    starts, ends, steps = (np.array(column, np.int64) for column in zip(*cuts, strict=True))
    check("Slice", x, {"starts": starts, "ends": ends, "axes": np.arange(1, 1 + len(cuts)), "steps": steps})


@pytest.mark.parametrize(
    ("kind", "opset", "attributes"),
    [
        ("Relu", 14, {}),
        ("Sigmoid", 13, {}),
        ("Softmax", 13, {"axis": 1}),
        ("Flatten", 21, {}),
        ("Transpose", 21, {"perm": [0, 2, 3, 1]}),
        ("LeakyRelu", 16, {"alpha": 0.2}),
        ("HardSwish", 14, {}),
        ("Identity", 21, {}),
    ],
)
def test_operators_at_newer_versions(kind: str, opset: int, attributes: dict[str, Any]) -> None:
    check(kind, normal(2, 3, 4, 5), opset=opset, **attributes)


def test_what_cannot_be_imported_is_known_beforehand() -> None:
    def reason(kind: str, **attributes: Any) -> str | None:
        model = node_model(kind, {"x": normal(2, 3)}, {}, 17, **attributes)
        proto = model.graph.node[0]
        node = Node(proto.name, proto.op_type, tuple(proto.input), tuple(proto.output))
        graph = Graph((node,), ("x",), ("y",), frozenset())
        source = SourceModel(Path("test"), "", model, graph, (InputSpec("x", np.dtype("f4"), (2, 3)),))
        return can_import(source, infer_types(source, {"x": (3,)}), node)

    assert reason("Relu") is None
    assert reason("Bernoulli") == "Converter is not implemented"


def test_an_unknown_operator_names_its_node() -> None:
    with pytest.raises(UnsupportedModelError, match=r"node 'node'.*Bernoulli"):
        imported(node_model("Bernoulli", {"x": normal(2, 3)}, {}, 17), {"x": normal(2, 3)})


def test_types_that_torch_does_not_compute_with_are_refused() -> None:
    x = np.ones((2, 3), np.uint16)
    with pytest.raises(UnsupportedModelError, match="torch does not compute with uint16"):
        imported(node_model("Add", {"x": x, "z": x}, {}, 14), {"x": x, "z": x})


def test_shape_arithmetic_of_a_dynamic_batch() -> None:
    """Shape -> Gather -> Concat -> Reshape, and fills and ranges made from it, as exporters write them: numbers stay on the CPU."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], "shape"),
        helper.make_node("Gather", ["shape", "zero"], ["batch"], "batch"),
        helper.make_node("Unsqueeze", ["batch", "axis"], ["batch1"], "batch1"),
        helper.make_node("Concat", ["batch1", "rest"], ["wanted"], "wanted", axis=0),
        helper.make_node("Reshape", ["x", "wanted"], ["flat"], "flat"),
        helper.make_node("ConstantOfShape", ["wanted0"], ["fill"], "fill"),
        helper.make_node("Concat", ["batch1", "width"], ["wanted0"], "wanted0", axis=0),
        helper.make_node("Range", ["zero", "batch", "one"], ["steps"], "steps"),
        helper.make_node("Gather", ["flat", "steps"], ["same"], "same"),
        helper.make_node("Add", ["same", "fill"], ["y"], "y"),
    ]
    constants = {"zero": np.array(0), "one": np.array(1), "axis": np.array([0]), "rest": np.array([-1]), "width": np.array([20])}
    order = ["shape", "batch", "batch1", "wanted", "flat", "wanted0", "fill", "steps", "same", "y"]
    nodes = [next(n for n in nodes if n.name == name) for name in order]
    x = normal(3, 4, 5)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    np.testing.assert_array_equal(imported(model, {"x": x})["y"].numpy(), executed(model, {"x": x})["y"])


@pytest.mark.parametrize("opset", [10, 16])
def test_roi_align_is_left_to_onnx2torch(opset: int) -> None:
    boxes = np.array([[0, 0, 4, 4], [1.2, 2.5, 7.7, 6.1], [-1, -1, 3, 9]], np.float32)
    constants = {"boxes": boxes, "batch": np.array([0, 1, 1])}
    check("RoiAlign", normal(2, 3, 8, 8), constants, opset, mode="avg", output_height=3, output_width=4, spatial_scale=0.9)


def test_onnx2torch_is_imported_for_no_other_model() -> None:
    code = (
        "import sys; from tests.parity import imported, node_model, normal\n"
        "imported(node_model('Relu', {'x': normal(2, 3)}, {}, 17), {'x': normal(2, 3)})\n"
        "try:\n    imported(node_model('Bernoulli', {'x': normal(2, 3)}, {}, 17), {'x': normal(2, 3)})\nexcept Exception as e: print(e)\n"
        "print('LOADED', [m for m in ('onnx2torch', 'torchvision') if m in sys.modules])"
    )
    root = Path(__file__).parent.parent
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert "Bernoulli" in out
    assert "LOADED []" in out


def test_a_torchvision_that_does_not_match_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mismatched:
        """What importing torchvision does beside another torch."""

        def find_spec(self, name: str, *_: Any) -> None:
            if name.partition(".")[0] == "torchvision":
                raise RuntimeError("operator torchvision::nms does not exist")

    for name in [name for name in sys.modules if name.partition(".")[0] in ("onnx2torch", "torchvision")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Mismatched(), *sys.meta_path])
    with pytest.raises(InstallationError, match=r"nms does not exist.*install both together") as caught:
        fallback._onnx2torch.__wrapped__()
    assert caught.value.exit_code == 7


def test_narrowed_products_and_what_is_between_them(tmp_path: Path) -> None:
    """Products with channels enough are bfloat16, what quantizers alone read of them too, and nothing that leaves the block or is added."""
    b = zoo.Builder({"x": ["N", 16, 8, 8]})
    first = b.conv("x", 16, 16, act="relu")
    depthwise = b.conv(first, 16, 16, group=16)
    last = b.conv(depthwise, 16, 16)
    source = zoo.loaded(b.model(b.op("Add", last, "x")), tmp_path)
    nodes = {node.outputs[0]: node for node in source.graph.nodes}
    types = infer_types(source, {"x": (16, 8, 8)})
    block = import_block(source, types, Block("all", tuple(nodes.values()), ("x",), tuple(source.graph.outputs), (), True))
    convolved = nodes[first].inputs[0]
    found = block.narrowed({first, depthwise}, {first})
    assert found.products == {convolved, last}
    assert found.handed == {convolved}  # to the quantizer that has the Relu; the last is added in float32
    assert found.written == {depthwise}  # the first goes into a depthwise convolution

    seen: dict[str, torch.dtype] = {}

    def observe(name: str, x: torch.Tensor) -> torch.Tensor:
        seen[name] = x.dtype
        x = x.relu() if name == first else x
        return x.to(torch.bfloat16 if name in found.written else torch.float32) if name in (first, depthwise) else x

    values = {"x": torch.from_numpy(normal(2, 16, 8, 8)), **{n: torch.from_numpy(source.constants[n].copy()) for n in block.weights}}
    exact, narrow = block(values), block(values, observe, {first}, found)
    assert seen[first] == torch.bfloat16
    assert {seen[name] for name in (depthwise, last)} == {torch.float32}
    for name, value in exact.items():
        assert narrow[name].dtype == torch.float32
        torch.testing.assert_close(narrow[name], value, atol=0.02 * float(value.abs().max()), rtol=0)  # three roundings to 2^-9, amplified
