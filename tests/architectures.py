"""Shapes of well-known architectures beyond classifiers, in miniature: long skips, many branches, shared weights, transformers."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx

from tests.zoo import Builder


def unet(depth: int = 4, width: int = 4, convs: int = 2) -> onnx.ModelProto:
    """Encoder and decoder with a skip at each of `depth` levels."""
    b = Builder({"x": ["N", 3, 16, 16]})

    def level(x: str, inp: int, out: int) -> str:
        for i in range(convs):
            x = b.conv(x, inp if i == 0 else out, out, act="relu")
        return x

    x, inp, skips = "x", 3, []
    for i in range(depth):
        x, inp = level(x, inp, width * (i + 1)), width * (i + 1)
        skips.append((x, inp))
        x = b.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = level(x, inp, inp)
    for skip, channels in reversed(skips):
        weight = b.weight(f"up{channels}_w", (inp, channels, 2, 2), inp)
        x = b.op("Concat", b.op("ConvTranspose", x, weight, strides=[2, 2]), skip, axis=1)
        x, inp = level(x, 2 * channels, channels), channels
    return b.model(b.conv(x, inp, 2, 1))


def dense(layers: int = 12, growth: int = 4) -> onnx.ModelProto:
    """A DenseNet block: every layer reads the concatenation of all before it."""
    b = Builder({"x": ["N", 3, 8, 8]})
    features = [b.conv("x", 3, growth, act="relu")]
    for i in range(layers):
        x = b.op("Concat", *features, axis=1) if len(features) > 1 else features[0]
        features.append(b.conv(b.conv(x, growth * (i + 1), 8, 1, act="relu"), 8, growth, act="relu"))
    return b.model(b.head(b.op("Concat", *features, axis=1), growth * (layers + 1)))


def feature_pyramid(levels: int = 4, width: int = 8) -> onnx.ModelProto:
    """A backbone of residual stages, a top-down path with lateral layers, and one head whose weights all levels share (RetinaNet)."""
    b = Builder({"x": ["N", 3, 32, 32]})
    x, stages = b.conv("x", 3, width, stride=2, act="relu"), []
    for level in range(levels):
        y = b.conv(b.conv(x, width, width, stride=1 if level == 0 else 2, act="relu"), width, width)
        shortcut = x if level == 0 else b.conv(x, width, width, 1, 2)
        x = b.op("Relu", b.op("Add", y, shortcut))
        x = b.op("Relu", b.op("Add", b.conv(b.conv(x, width, width, act="relu"), width, width), x))
        stages.append(x)
    head = [b.weight(f"head{i}_w", (width if i == 0 else 6, width, 3, 3), width * 9) for i in range(2)]
    scales = b.constant("scales", np.array([1, 1, 2, 2], np.float32))
    outputs, above = [], None
    for stage in reversed(stages):
        lateral = b.conv(stage, width, width, 1)
        if above is not None:
            raised = b.op("Resize", above, "", scales, mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")
            lateral = b.op("Add", lateral, raised)
        above = lateral
        y = b.conv(lateral, width, width)
        for weight in head:
            y = b.op("Conv", b.op("Relu", y), weight, pads=[1, 1, 1, 1])
        outputs.append(y)
    return b.model(*outputs)


def inception(modules: int = 3, width: int = 8) -> onnx.ModelProto:
    """Four branches of different depth in each module."""
    b = Builder({"x": ["N", 3, 8, 8]})
    x = b.conv("x", 3, 4 * width, act="relu")
    for _ in range(modules):
        one = b.conv(x, 4 * width, width, 1, act="relu")
        three = b.conv(b.conv(x, 4 * width, 4, 1, act="relu"), 4, width, act="relu")
        five = b.conv(b.conv(b.conv(x, 4 * width, 4, 1, act="relu"), 4, 4, act="relu"), 4, width, act="relu")
        pooled = b.conv(b.op("AveragePool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1]), 4 * width, width, 1, act="relu")
        x = b.op("Concat", one, three, five, pooled, axis=1)
    return b.model(b.head(x, 4 * width))


def siamese() -> onnx.ModelProto:
    """Two inputs through the same layers, compared: every weight is read by two nodes."""
    b = Builder({"left": ["N", 3, 8, 8], "right": ["N", 3, 8, 8]})
    shapes = [(8, 3), (8, 8), (8, 8), (6, 8)]
    weights = [b.weight(f"w{i}", (*shape, 3, 3), shape[1] * 9) for i, shape in enumerate(shapes)]
    biases = [b.constant(f"b{i}", np.linspace(-0.1, 0.1, shape[0]).astype(np.float32)) for i, shape in enumerate(shapes)]

    def tower(x: str) -> str:
        for weight, bias in zip(weights, biases, strict=True):
            x = b.op("Relu", b.op("Conv", x, weight, bias, pads=[1, 1, 1, 1]))
        return b.op("Flatten", b.op("GlobalAveragePool", x))

    return b.model(b.linear(b.op("Abs", b.op("Sub", tower("left"), tower("right"))), 6, 2))


Weights = Callable[[str, Sequence[int]], np.ndarray]


def transformer(b: Builder, x: str, layers: int, width: int, heads: int, tokens: int | None, mask: str | None = None, pre: bool = True,
                weights: Weights | None = None, eps: float = 1e-12) -> str:  # fmt: skip
    """Encoder layers on [N, tokens, width]: attention and MLP halves with their shortcuts, normalised before (ViT) or after (BERT).

    `tokens` None leaves their number open. `weights` gives trained ones by name, MatMul weights as [inputs, outputs].
    """
    rng = np.random.default_rng(5)

    def drawn(name: str, shape: Sequence[int]) -> np.ndarray:
        if name.endswith("bias"):
            return np.zeros(shape, np.float32)
        scale = 1.0 if len(shape) == 1 else rng.normal(size=shape) / math.sqrt(shape[0])
        return np.broadcast_to(np.asarray(scale, np.float32), shape).astype(np.float32)

    weights = weights or drawn

    def constant(name: str, *shape: int) -> str:
        return b.constant(name, np.ascontiguousarray(weights(name, shape), np.float32))

    def linear(x: str, name: str, inp: int, out: int) -> str:
        y = b.op("MatMul", x, constant(f"{name}.weight", inp, out))
        return b.op("Add", y, constant(f"{name}.bias", out))

    def norm(x: str, name: str) -> str:
        return b.op("LayerNormalization", x, constant(f"{name}.weight", width), constant(f"{name}.bias", width), epsilon=eps)

    split = b.constant("split_heads", np.array([0, -1 if tokens is None else tokens, heads, width // heads], np.int64))
    join = b.constant("join_heads", np.array([0, -1 if tokens is None else tokens, width], np.int64))
    scale = b.constant("scale", np.array(math.sqrt(width // heads), np.float32))

    def attention(x: str, name: str) -> str:
        q, k, v = (b.op("Reshape", linear(x, f"{name}.{part}", width, width), split) for part in ("query", "key", "value"))
        scores = b.op("MatMul", b.op("Transpose", q, perm=[0, 2, 1, 3]), b.op("Transpose", k, perm=[0, 2, 3, 1]))
        scores = b.op("Div", scores, scale)
        scores = b.op("Softmax", b.op("Add", scores, mask) if mask else scores, axis=-1)
        y = b.op("MatMul", scores, b.op("Transpose", v, perm=[0, 2, 1, 3]))
        return linear(b.op("Reshape", b.op("Transpose", y, perm=[0, 2, 1, 3]), join), f"{name}.output", width, width)

    half, one, root = (b.constant(n, np.array(v, np.float32)) for n, v in (("half", 0.5), ("one", 1.0), ("root", math.sqrt(2))))

    def mlp(x: str, name: str) -> str:
        y = linear(x, f"{name}.in", width, 4 * width)
        y = b.op("Mul", b.op("Mul", y, b.op("Add", b.op("Erf", b.op("Div", y, root)), one)), half)
        return linear(y, f"{name}.out", 4 * width, width)

    for i in range(layers):
        for kind, half_layer in (("attention", attention), ("mlp", mlp)):
            name = f"layer{i}.{kind}"
            if pre:
                x = b.op("Add", x, half_layer(norm(x, f"{name}.norm"), name))
            else:
                x = norm(b.op("Add", half_layer(x, name), x), f"{name}.norm")
    return x


def vit(layers: int = 2, width: int = 32, heads: int = 4) -> onnx.ModelProto:
    """A ViT/DeiT: patches, class token, position embedding, pre-normalised encoder, classifier on the class token."""
    b = Builder({"x": ["N", 3, 16, 16]})
    rng = np.random.default_rng(7)
    patches = b.op("Conv", "x", b.weight("patch_w", (width, 3, 4, 4), 48), strides=[4, 4])
    x = b.op("Transpose", b.op("Reshape", patches, b.constant("flat", np.array([0, width, -1], np.int64))), perm=[0, 2, 1])
    count = b.op("Slice", b.op("Shape", "x"), *(b.constant(n, np.array([v], np.int64)) for n, v in (("from", 0), ("to", 1))))
    shape = b.op("Concat", count, b.constant("one_token", np.array([1, width], np.int64)), axis=0)
    token = b.op("Expand", b.constant("class_token", rng.normal(size=(1, 1, width)).astype(np.float32)), shape)
    x = b.op("Concat", token, x, axis=1)
    x = b.op("Add", x, b.constant("positions", rng.normal(size=(1, 17, width)).astype(np.float32)))
    x = transformer(b, x, layers, width, heads, 17)
    x = b.op("LayerNormalization", x, b.constant("ln_w", np.ones(width, np.float32)), b.constant("ln_b", np.zeros(width, np.float32)))
    x = b.op("Gather", x, b.constant("first", np.array(0, np.int64)), axis=1)
    return b.model(b.linear(x, width, 10))


def bert(
    layers: int = 2, width: int = 32, heads: int = 4, vocabulary: int = 50, positions: int = 64, weights: Weights | None = None,
    masked: float = -1e4, distances: np.ndarray | None = None,
) -> onnx.ModelProto:  # fmt: skip
    """A BERT: embeddings of token ids, an additive attention mask from a graph input, post-normalised encoder, mean pooling.

    `masked` is added to scores of tokens that are not attended to, and `distances` [1, heads, T, T] to all.
    """
    b = Builder({"input_ids": ["N", "T"], "attention_mask": ["N", "T"]})
    b.dtypes = dict.fromkeys(b.inputs, onnx.TensorProto.INT64)
    rng = np.random.default_rng(9)
    weights = weights or (lambda name, shape: rng.normal(size=shape).astype(np.float32) if len(shape) == 2 and "embed" in name
                          else np.zeros(shape, np.float32) if name.endswith("bias")
                          else np.ones(shape, np.float32) if len(shape) == 1
                          else rng.normal(size=shape).astype(np.float32) / math.sqrt(shape[0]))  # fmt: skip

    def constant(name: str, *shape: int) -> str:
        return b.constant(name, np.ascontiguousarray(weights(name, shape), np.float32))

    words = b.op("Gather", constant("embeddings.words", vocabulary, width), "input_ids")
    ends = [b.constant(n, np.array([v], np.int64)) for n, v in (("from", 1), ("to", 2))]
    zero = b.constant("zero_row", np.array([0], np.int64))
    places = b.op("Slice", constant("embeddings.positions", positions, width), zero, b.op("Slice", b.op("Shape", "input_ids"), *ends), zero)
    x = b.op("Add", b.op("Add", words, places), constant("embeddings.types", 1, width))
    x = b.op("LayerNormalization", x, constant("embeddings.norm.weight", width), constant("embeddings.norm.bias", width), epsilon=1e-12)
    kept = b.op("Cast", b.op("Unsqueeze", "attention_mask", b.constant("axes", np.array([1, 2], np.int64))), to=onnx.TensorProto.FLOAT)
    most, lowest = b.constant("most", np.array(1.0, np.float32)), b.constant("lowest", np.array(masked, np.float32))
    mask = b.op("Mul", b.op("Sub", most, kept), lowest)
    if distances is not None:
        mask = b.op("Add", mask, b.constant("distances", distances.astype(np.float32)))
    x = transformer(b, x, layers, width, heads, None, mask, pre=False, weights=weights)
    return b.model(b.op("ReduceMean", x, axes=[1], keepdims=0))
