"""Models for the tests, built node by node: the shapes of well-known architectures, and small ones that stress one thing each."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from toolchain.samples import Samples
from toolchain.source import SourceModel, load_source


class Builder:
    """Appends nodes to a graph; every method returns the name of the value it makes. Weights are random and seeded."""

    def __init__(self, inputs: dict[str, Sequence[int | str]], seed: int = 0, opset: int = 17, ir_version: int = 8) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.inputs = inputs
        self.dtypes: dict[str, int] = {}  # of inputs that are not float32
        self.opset, self.ir_version = opset, ir_version
        self._rng = np.random.default_rng(seed)

    def constant(self, name: str, array: np.ndarray) -> str:
        self.tensors.append(numpy_helper.from_array(array, name))
        return name

    def op(self, kind: str, *inputs: str, name: str | None = None, outputs: int = 1, **attributes: Any) -> str:
        name = name or f"{kind.lower()}{len(self.nodes)}"
        made = [name] if outputs == 1 else [f"{name}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), made, f"node_{name}", **attributes))
        return made[0]

    def weight(self, name: str, shape: Sequence[int], fan_in: int) -> str:
        return self.constant(name, (self._rng.normal(size=shape) * np.sqrt(2 / fan_in)).astype(np.float32))

    def conv(
        self, x: str, inp: int, out: int, kernel: int = 3, stride: int = 1, group: int = 1, bias: bool = True, act: str | None = None
    ) -> str:
        name = f"conv{len(self.nodes)}"
        arguments = [x, self.weight(f"{name}_w", (out, inp // group, kernel, kernel), inp // group * kernel * kernel)]
        if bias:
            arguments.append(self.constant(f"{name}_b", self._rng.normal(size=out).astype(np.float32) * 0.1))
        pad = kernel // 2
        y = self.op("Conv", *arguments, name=name, strides=[stride, stride], pads=[pad] * 4, group=group)
        return self.activation(y, act)

    def activation(self, x: str, kind: str | None) -> str:
        if kind == "relu6":
            zero, six = (self.constant(f"{x}_{v}", np.array(v, np.float32)) for v in (0.0, 6.0))
            return self.op("Clip", x, zero, six)
        return self.op({"relu": "Relu", "sigmoid": "Sigmoid"}[kind], x) if kind else x

    def linear(self, x: str, inp: int, out: int) -> str:
        name = f"gemm{len(self.nodes)}"
        w = self.weight(f"{name}_w", (out, inp), inp)
        return self.op("Gemm", x, w, self.constant(f"{name}_b", np.zeros(out, np.float32)), name=name, transB=1)

    def foreign(self, x: str) -> str:
        """An operator that only ONNX Runtime executes; it gives back what it is fed, unless that is NaN."""
        return self.op("Imputer", x, domain="ai.onnx.ml", imputed_value_floats=[0.0], replaced_value_float=float("nan"))

    def head(self, x: str, channels: int, classes: int = 10) -> str:
        return self.linear(self.op("Flatten", self.op("GlobalAveragePool", x)), channels, classes)

    def model(self, *outputs: str) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "test",
            [helper.make_tensor_value_info(n, self.dtypes.get(n, TensorProto.FLOAT), list(shape)) for n, shape in self.inputs.items()],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            self.tensors,
        )
        imports = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(d, 1) for d in {n.domain for n in self.nodes} - {""})]
        model = helper.make_model(graph, opset_imports=imports, ir_version=self.ir_version)
        return onnx.shape_inference.infer_shapes(model)


def resnet(depths: Sequence[int], bottleneck: bool = False, widths: Sequence[int] = (8, 16, 32, 64), groups: int = 1) -> onnx.ModelProto:
    """A ResNet or RegNetX: stem with max pooling, residual stages with projection shortcuts, pooled classifier."""
    b = Builder({"x": ["N", 3, 64, 64]})
    x, inp = b.conv("x", 3, widths[0], 7, 2, act="relu"), widths[0]
    x = b.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        out = width * 4 if bottleneck else width
        for block in range(depth):
            stride = 2 if block == 0 and stage > 0 else 1
            if bottleneck:
                y = b.conv(b.conv(x, inp, width, 1, act="relu"), width, width, 3, stride, group=groups, act="relu")
                y = b.conv(y, width, out, 1)
            else:
                y = b.conv(b.conv(x, inp, width, 3, stride, act="relu"), width, width, 3)
            shortcut = x if inp == out and stride == 1 else b.conv(x, inp, out, 1, stride)
            x, inp = b.op("Relu", b.op("Add", y, shortcut)), out
    return b.model(b.head(x, inp))


def mobilenet_v2(width: float = 1.0, image: int = 32) -> onnx.ModelProto:
    """MobileNetV2 with its real channel counts."""

    def divisible(channels: float) -> int:
        rounded = max(8, int(channels + 4) // 8 * 8)
        return rounded + 8 if rounded < 0.9 * channels else rounded

    b = Builder({"x": ["N", 3, image, image]})
    inp = divisible(32 * width)
    x = b.conv("x", 3, inp, 3, 2, act="relu6")
    stages = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    for expansion, channels, repeats, first_stride in stages:
        out = divisible(channels * width)
        for block in range(repeats):
            stride = first_stride if block == 0 else 1
            hidden = inp * expansion
            y = b.conv(x, inp, hidden, 1, act="relu6") if expansion > 1 else x
            y = b.conv(b.conv(y, hidden, hidden, 3, stride, group=hidden, act="relu6"), hidden, out, 1)
            x = b.op("Add", x, y) if stride == 1 and inp == out else y
            inp = out
    x = b.conv(x, inp, 1280, 1, act="relu6")
    return b.model(b.head(x, 1280, 1000))


def tiny_resnet(seed: int = 0, batch: int | str = "N", opset: int = 17) -> onnx.ModelProto:
    """Stem, an identity block, a projection block and a head, on 3x8x8 images: everything a CNN has, in milliseconds."""
    b = Builder({"x": [batch, 3, 8, 8]}, seed, opset)
    x = b.conv("x", 3, 8, act="relu")
    x = b.op("Relu", b.op("Add", b.conv(b.conv(x, 8, 8, act="relu"), 8, 8), x))
    y = b.conv(b.conv(x, 8, 12, stride=2, act="relu6"), 12, 12)
    x = b.op("Relu", b.op("Add", y, b.conv(x, 8, 12, 1, 2)))
    return b.model(b.head(x, 12))


def every_rule(opset: int = 17) -> onnx.ModelProto:
    """What the targets treat differently: a residual sum, a gate with a known range, a Concat read twice, pooling, MatMul and Gemm."""
    b = Builder({"x": ["N", 3, 8, 8]}, opset=opset)
    x = b.conv("x", 3, 8, act="relu")
    x = b.op("Relu", b.op("Add", b.conv(x, 8, 8), x, name="sum"), name="block")
    y = b.conv(x, 8, 8, stride=2)
    y = b.op("Mul", y, b.op("Sigmoid", y, name="gate"), name="swish")
    pooled = b.op("AveragePool", x, name="pooled", kernel_shape=[2, 2], strides=[2, 2])
    z = b.conv(b.op("Concat", y, pooled, name="joined", axis=1), 16, 12, 1, act="relu6")
    z = b.op("Flatten", b.op("GlobalAveragePool", z))
    z = b.op("Relu", b.op("MatMul", z, b.weight("matmul_w", (12, 16), 12)))
    return b.model(b.linear(z, 16, 10))


def detector(image: int = 8) -> onnx.ModelProto:
    """What YOLO is made of: a Split whose parts go through convolutions, sums and a Concat, gates, and an upsampling neck."""
    b = Builder({"x": ["N", 3, image, image]})

    def silu(x: str) -> str:
        return b.op("Mul", x, b.op("Sigmoid", x))

    shallow = silu(b.conv("x", 3, 16))
    halves = b.constant("halves", np.array([8, 8], np.int64))
    first = b.op("Split", silu(b.conv(shallow, 16, 16, 1)), halves, name="split", outputs=2, axis=1)
    second = first.removesuffix("0") + "1"
    deep = b.op("Add", silu(b.conv(second, 8, 8)), second, name="sum")
    x = silu(b.conv(b.op("Concat", first, second, deep, name="joined", axis=1), 24, 16, 1))
    x = silu(b.conv(x, 16, 16, stride=2))
    scales = b.constant("scales", np.array([1, 1, 2, 2], np.float32))
    x = b.op("Resize", x, "", scales, name="up", mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")
    x = silu(b.conv(b.op("Concat", x, shallow, name="neck", axis=1), 32, 16))
    return b.model(b.head(x, 16))


def images(count: int = 32, shape: Sequence[int] = (3, 8, 8), seed: int = 1, name: str = "x") -> Samples:
    """Smooth random images: neighbouring pixels are correlated, as in real ones."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(count, *shape)).astype(np.float32)
    for axis in range(2, noise.ndim):
        noise = (noise + np.roll(noise, 1, axis) + np.roll(noise, 2, axis)) / np.float32(np.sqrt(3))
    return Samples({name: np.ascontiguousarray(noise, np.float32)})


def loaded(model: onnx.ModelProto, folder: Path) -> SourceModel:
    """Save a model and load it the way a user's file is."""
    path = folder / "model.onnx"
    onnx.save(model, path)
    return load_source(path)


def recurrent(hidden: int = 12, last_only: bool = False) -> onnx.ModelProto:
    """An LSTM between two products: [N, 5, 8] to [N, 4]; with all its results, or the last one alone as Keras' are."""
    b = Builder({"x": ["N", 5, 8]})
    x = b.op("Relu", b.op("MatMul", "x", b.weight("before", (8, 8), 8)))
    w, r = b.weight("rec_w", (1, 4 * hidden, 8), 8), b.weight("rec_r", (1, 4 * hidden, hidden), hidden)
    y = b.op("LSTM", b.op("Transpose", x, perm=[1, 0, 2]), w, r, hidden_size=hidden, outputs=2)
    if last_only:
        b.nodes[-1].output[:] = ["", "last_result"]
    last = "last_result" if last_only else b.op("Gather", y, b.constant("last", np.array(-1, np.int64)))
    squeezed = b.op("Squeeze", last, b.constant("axis", np.array([0], np.int64)))
    return b.model(b.op("MatMul", squeezed, b.weight("after", (hidden, 4), hidden)))
