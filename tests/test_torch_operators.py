"""The operator families of the import against ONNX Runtime: what the official cases (test_conformance.py) leave out."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain.errors import UnsupportedModelError
from toolchain.torch_import.arithmetic import clamp

from .parity import Arrays, check, imported, module, node_model, normal


def integers(*shape: int, low: int = -9, high: int = 10, dtype: type = np.int64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


# ---------------------------------------------------------------- convolution, pooling, padding


@given(
    rank=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    group=st.sampled_from([1, 2]),
    pads=st.lists(st.integers(0, 2), min_size=6, max_size=6),
    auto=st.sampled_from(["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID", "output_shape"]),
    bias=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_conv_transpose(rank: int, kernel: int, stride: int, dilation: int, group: int, pads: list[int], auto: str, bias: bool) -> None:
    attributes: dict[str, Any] = {"strides": [stride] * rank, "group": group, "dilations": [dilation] * rank}
    if auto == "output_shape":
        attributes["output_shape"] = [4 * stride + min(kernel, 2)] * rank
    elif auto == "NOTSET":
        extent = (kernel - 1) * dilation + 1
        low, high = ([min(p, extent - 1) for p in part] for part in (pads[:rank], pads[3 : 3 + rank]))
        attributes |= {"pads": [*low, *high], "output_padding": [stride - 1] * rank}
    else:
        attributes["auto_pad"] = auto
    constants: dict[str, np.ndarray | None] = {"w": normal(4, 3, *[kernel] * rank, seed=1)}
    if bias:
        constants["b"] = normal(3 * group, seed=2)
    check("ConvTranspose", normal(2, 4, *[5] * rank), constants, **attributes)


@given(
    rank=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    size=st.integers(6, 9),
    pads=st.lists(st.integers(0, 2), min_size=6, max_size=6),
    include=st.integers(0, 1),
    kind=st.sampled_from(["MaxPool", "AveragePool", "LpPool"]),
)
@settings(max_examples=100, deadline=None)
def test_pooling_rounds_up(rank: int, kernel: int, stride: int, dilation: int, size: int, pads: list[int], include: int, kind: str) -> None:
    """Asymmetric pads, dilations and ceil_mode together, at the first opset where all three pool with them."""
    low, high = ([min(p, kernel - 1) for p in part] for part in (pads[:rank], pads[3 : 3 + rank]))
    attributes: dict[str, Any] = {"kernel_shape": [kernel] * rank, "strides": [stride] * rank, "ceil_mode": 1, "pads": [*low, *high]}
    attributes["dilations"] = [dilation] * rank
    if kind == "AveragePool":
        attributes["count_include_pad"] = include
    check(kind, normal(2, 3, *[size] * rank), opset=19, **attributes)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("storage_order", [0, 1])
def test_max_pool_indices(rank: int, storage_order: int) -> None:
    attributes: dict[str, Any] = {"kernel_shape": [3] * rank, "strides": [2] * rank, "storage_order": storage_order}
    check("MaxPool", normal(2, 3, *[7] * rank), outputs=2, pads=[1] * rank + [0] * rank, **attributes)
    check("MaxPool", normal(2, 3, *[7] * rank), outputs=2, pads=[1] * (2 * rank), **attributes)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_global_lp_pool(p: int) -> None:
    check("GlobalLpPool", normal(2, 3, 5, 4), p=p)


@pytest.mark.parametrize("mode", ["reflect", "edge", "wrap"])
@pytest.mark.parametrize("pads", [[1, 0, 2, 1, 1, 2, 0, 1], [0, 1, 3, 0, 0, 0, 0, 4], [0, 0, -1, 2, 0, 0, 2, -1]])
def test_pad_repeats_on_any_axis(mode: str, pads: list[int]) -> None:
    check("Pad", normal(3, 4, 5, 6), {"pads": np.array(pads)}, 19, mode=mode)


@pytest.mark.parametrize("opset", [2, 10])
def test_pad_by_attributes(opset: int) -> None:
    check("Pad", normal(2, 3, 5, 5), opset=opset, pads=[0, 0, 1, 2, 0, 0, 2, 1], value=0.5)


# ---------------------------------------------------------------- resizing and sampling

TRANSFORMS = ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"]


@given(
    sizes=st.lists(st.integers(1, 12), min_size=2, max_size=2),
    scales=st.none() | st.lists(st.sampled_from([0.3, 0.5, 0.75, 1.0, 1.3, 2.0, 3.0, 4.0]), min_size=2, max_size=2),
    wanted=st.lists(st.integers(1, 24), min_size=2, max_size=2),
    mode=st.sampled_from(["nearest", "linear", "cubic"]),
    transform=st.sampled_from(TRANSFORMS),
    rounding=st.sampled_from(["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]),
    opset=st.sampled_from([11, 13, 18, 19]),
    flag=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_resize(
    sizes: list[int], scales: list[float] | None, wanted: list[int], mode: str, transform: str, rounding: str, opset: int, flag: bool
) -> None:
    nothing = np.zeros(0, np.float32) if opset < 13 else None
    constants: dict[str, np.ndarray | None] = {"roi": nothing, "scales": nothing, "sizes": np.array([2, 3, *wanted])}
    if scales is not None:
        if any(int(np.float32(size) * np.float32(scale)) == 0 for size, scale in zip(sizes, scales, strict=True)):
            return
        constants = {"roi": nothing, "scales": np.array([1, 1, *scales], np.float32)}
    attributes: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": transform}
    if mode == "nearest":
        attributes["nearest_mode"] = rounding
    elif opset >= 18:
        attributes["antialias"] = int(flag)
    elif mode == "cubic":
        attributes["exclude_outside"] = int(flag)
    check("Resize", normal(2, 3, *sizes), constants, opset, atol=1e-4, **attributes)  # cubic taps outside of [0, 1] amplify rounding


@pytest.mark.parametrize("policy", ["stretch", "not_larger", "not_smaller"])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_resize_of_some_axes_with_an_aspect_ratio(policy: str, mode: str) -> None:
    constants: dict[str, np.ndarray | None] = {"roi": None, "scales": None, "sizes": np.array([9, 20])}
    check("Resize", normal(2, 3, 7, 10), constants, 18, axes=[2, 3], keep_aspect_ratio_policy=policy, mode=mode)


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_resize_of_a_crop(mode: str) -> None:
    roi = np.array([0, 0, 0.1, -0.2, 1, 1, 0.8, 1.1], np.float32)
    constants: dict[str, np.ndarray | None] = {"roi": roi, "scales": np.array([1, 1, 1.5, 0.6], np.float32)}
    check("Resize", normal(2, 3, 7, 10), constants, 19, coordinate_transformation_mode="tf_crop_and_resize", mode=mode)


@pytest.mark.parametrize("kind", ["Upsample", "Resize"])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("scales", [[2.0, 3.0], [1.5, 2.5]])
def test_resize_before_opset_11(kind: str, mode: str, scales: list[float]) -> None:
    constants: dict[str, np.ndarray | None] = {"scales": np.array([1, 1, *scales], np.float32)}
    check(kind, normal(2, 3, 5, 4), constants, 9 if kind == "Upsample" else 10, mode=mode)


def test_upsample_by_attributes() -> None:
    check("Upsample", normal(2, 3, 5, 4), opset=7, mode="nearest", scales=[1.0, 1.0, 2.0, 2.0])


@pytest.mark.parametrize(("rank", "group"), [(1, 1), (2, 1), (2, 4), (3, 1)])
def test_gradient_of_a_bias_that_a_convolution_added(rank: int, group: int) -> None:
    """What autograd makes of the same convolution, to float32 sums in another order; that of input and weight bit for bit."""
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 4, *[6] * rank), (8, 4 // group, *[3] * rank), (8,)
    plain = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    own = [leaf.detach().clone().requires_grad_() for leaf in plain]
    expected = (F.conv1d, F.conv2d, F.conv3d)[rank - 1](plain[0], plain[1], plain[2], groups=group)
    x, w, b = (leaf.detach().numpy() for leaf in own)
    block, _ = module(node_model("Conv", {"x": x}, {"w": w, "b": b}, 13, group=group), ("x",))
    found = block(dict(zip(("x", "w", "b"), own, strict=True)))["y0"]
    assert torch.equal(found, expected)
    towards = torch.randn(expected.shape, generator=generator)
    expected.backward(towards)
    found.backward(towards)
    for index, (ours, theirs) in enumerate(zip(own, plain, strict=True)):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5 if index == 2 else 0, atol=1e-5 if index == 2 else 0)


def test_gradients_flow_through_a_resize() -> None:
    scales = np.array([1, 1, 1.3, 2.5], np.float32)
    inputs = {"x": normal(1, 2, 4, 4)}
    resize, _ = module(node_model("Resize", inputs, {"roi": None, "scales": scales}, 13, mode="linear"), inputs)
    x = torch.ones(1, 2, 4, 4, requires_grad=True)
    made = resize({"x": x})["y0"]
    made.sum().backward()
    assert x.grad is not None
    assert float(x.grad.sum()) == pytest.approx(made.numel(), rel=1e-5)  # each output's taps sum to one


@pytest.mark.parametrize("mode", ["linear", "nearest", "cubic"])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("corners", [0, 1])
def test_grid_sample(mode: str, padding: str, corners: int) -> None:
    inputs = {"x": normal(2, 3, 5, 6), "grid": normal(2, 4, 7, 2, seed=1)}
    check("GridSample", inputs, opset=20, mode=mode, padding_mode=padding, align_corners=corners)


# ---------------------------------------------------------------- element-wise


@pytest.mark.parametrize("opset", [7, 13])
@pytest.mark.parametrize("kind", ["Add", "Sub", "Mul", "Div", "Pow"])
@pytest.mark.parametrize("shapes", [((2, 3, 4), (3, 1)), ((3, 1), (2, 3, 4)), ((2, 3), ())])
def test_arithmetic_broadcasts(kind: str, opset: int, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    left, right = normal(*shapes[0]), normal(*shapes[1], seed=1)
    check(kind, np.abs(left) if kind == "Pow" else left, {"z": np.asarray(right)}, opset)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("kind", ["Add", "Sub", "Mul", "Div", "Max", "Min", "Mod", "Equal", "Less", "GreaterOrEqual"])
def test_integer_arithmetic(kind: str, dtype: type) -> None:
    x, z = integers(4, 5, dtype=dtype), integers(4, 5, low=1, dtype=dtype, seed=1) * np.array([1, -1, 1, -1, 1], dtype)
    check(kind, {"x": x, "z": z})


@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_mod_with_the_sign_of_the_dividend(dtype: type) -> None:
    check("Mod", {"x": integers(4, 5, dtype=dtype), "z": integers(4, 5, low=1, dtype=dtype, seed=1)}, fmod=1)


@pytest.mark.parametrize("base", [np.float32, np.int64])
@pytest.mark.parametrize("exponent", [np.float32, np.int32, np.int64])
def test_pow_has_the_type_of_its_base(base: type, exponent: type) -> None:
    check("Pow", integers(3, 4, low=1, dtype=base), {"z": integers(4, low=0, high=4, dtype=exponent, seed=1)})
    check("Pow", integers(3, 4, low=1, dtype=base), {"z": np.array(2, exponent)})


@pytest.mark.parametrize("opset", [11, 12, 13])
@pytest.mark.parametrize("bounds", [(None, None), (-0.5, None), (None, 0.5), (-0.5, 0.25), (0.5, -0.5)])
def test_clip(opset: int, bounds: tuple[float | None, float | None]) -> None:
    arrays = {name: np.array(v, np.float32) if v is not None else None for name, v in zip(("low", "high"), bounds, strict=True)}
    check("Clip", normal(3, 4), arrays, opset)
    if None not in bounds:
        check("Clip", {"x": normal(3, 4), **{name: a for name, a in arrays.items() if a is not None}}, {}, opset)


def test_clip_by_attributes() -> None:
    check("Clip", normal(3, 4), opset=6, min=-0.5, max=0.5)
    check("Clip", normal(3, 4), opset=6)


@pytest.mark.parametrize("kind", ["Sum", "Mean", "Max", "Min"])
def test_variadic(kind: str) -> None:
    check(kind, {"x": normal(2, 3, 4), "z": normal(3, 1, seed=1), "w": normal(4, seed=2)})
    check(kind, normal(2, 3))


@pytest.mark.parametrize("slope", [(3, 1, 1), (1,), (3, 4, 5)])
def test_prelu(slope: tuple[int, ...]) -> None:
    check("PRelu", normal(2, 3, 4, 5), {"slope": normal(*slope, seed=1)})


@pytest.mark.parametrize(
    ("kind", "opset", "attributes"),
    [
        ("Elu", 6, {"alpha": 0.7}),
        ("Celu", 12, {"alpha": 0.7}),
        ("Selu", 6, {"alpha": 1.5, "gamma": 1.2}),
        ("Selu", 6, {}),
        ("ThresholdedRelu", 10, {"alpha": 0.3}),
        ("HardSigmoid", 6, {"alpha": 0.3, "beta": 0.4}),
        ("Softplus", 1, {}),
        ("Softsign", 1, {}),
        ("Shrink", 9, {"lambd": 0.3, "bias": 0.2}),
        ("Mish", 18, {}),
        ("Gelu", 20, {"approximate": "none"}),
        ("Gelu", 20, {"approximate": "tanh"}),
        ("LpNormalization", 1, {"axis": 1, "p": 1}),
        ("LpNormalization", 1, {"axis": -1, "p": 2}),
        ("LRN", 13, {"size": 3}),
        ("LRN", 13, {"size": 5, "alpha": 0.2, "beta": 0.6, "bias": 1.5}),
        ("MeanVarianceNormalization", 13, {}),
        ("MeanVarianceNormalization", 13, {"axes": [2, 3]}),
        ("Hardmax", 13, {"axis": 1}),
    ],
)
def test_functions(kind: str, opset: int, attributes: dict[str, Any]) -> None:
    check(kind, normal(2, 6, 4, 5), opset=opset, **attributes)


def test_softplus_of_large_numbers() -> None:
    check("Softplus", np.linspace(-120, 120, 49, dtype=np.float32))


@pytest.mark.parametrize("kind", ["Softmax", "LogSoftmax", "Hardmax"])
@pytest.mark.parametrize("opset", [7, 11, 13])
@pytest.mark.parametrize("axis", [None, 0, 1, 2, -1])
def test_softmax_of_both_generations(kind: str, opset: int, axis: int | None) -> None:
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    check(kind, normal(2, 3, 4), opset=opset, **attributes)


# ---------------------------------------------------------------- normalization


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 5), (2, 4, 5, 6), (2, 4, 3, 3, 3)])
@pytest.mark.parametrize("opset", [9, 14, 15])
def test_batch_normalization(shape: tuple[int, ...], opset: int) -> None:
    parts: Arrays = {name: normal(4, seed=i) for i, name in enumerate(("scale", "bias", "mean"), start=1)}
    check("BatchNormalization", normal(*shape), {**parts, "variance": np.abs(normal(4, seed=4)) + 0.1}, opset)


@pytest.mark.parametrize("shape", [(2, 4, 5), (2, 4, 5, 6), (2, 4, 1)])
def test_instance_normalization(shape: tuple[int, ...]) -> None:
    check("InstanceNormalization", normal(*shape), {"scale": normal(4, seed=1), "bias": normal(4, seed=2)})


@pytest.mark.parametrize(("opset", "count"), [(18, 2), (21, 4)])
def test_group_normalization(opset: int, count: int) -> None:
    parts: Arrays = {"scale": normal(count, seed=1), "bias": normal(count, seed=2)}
    check("GroupNormalization", normal(2, 4, 5, 5), parts, opset, num_groups=2)


@pytest.mark.parametrize("axis", [-1, 1, -2])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_normalization(axis: int, bias: bool) -> None:
    x = normal(2, 3, 4)
    parts: dict[str, np.ndarray | None] = {"scale": normal(*x.shape[axis:], seed=1)}
    if bias:
        parts["bias"] = normal(*x.shape[axis:], seed=2)
    check("LayerNormalization", x, parts, axis=axis)
    check("LayerNormalization", x, parts, outputs=3, axis=axis)


@pytest.mark.parametrize("axis", [-1, 1])
def test_rms_normalization(axis: int) -> None:
    x = normal(2, 3, 4)
    check("RMSNormalization", x, {"scale": normal(*x.shape[axis:], seed=1)}, 23, axis=axis)


# ---------------------------------------------------------------- shapes and indices


@pytest.mark.parametrize("opset", [11, 13, 18])
@pytest.mark.parametrize("sizes", [None, [2, 4]])
def test_split(opset: int, sizes: list[int] | None) -> None:
    x = normal(2, 6, 3)
    attributes: dict[str, Any] = {"num_outputs": 2} if opset >= 18 else {}
    if sizes is None:
        check("Split", x, {}, opset, outputs=2, axis=1, **attributes)
    elif opset < 13:
        check("Split", x, {}, opset, outputs=2, axis=1, split=sizes)
    else:
        check("Split", x, {"sizes": np.array(sizes)}, opset, outputs=2, axis=-2)


def test_split_into_unequal_parts() -> None:
    check("Split", normal(2, 7), {}, 18, outputs=3, axis=1, num_outputs=3)


@pytest.mark.parametrize("opset", [11, 13, 21])
def test_squeeze_and_unsqueeze(opset: int) -> None:
    x = normal(2, 1, 3, 1)
    axes: Arrays = {"axes": np.array([1, -1])}
    for kind in ("Squeeze", "Unsqueeze"):
        if opset < 13:
            check(kind, x, {}, opset, axes=[1, 3])
        else:
            check(kind, x, axes, opset)
    check("Squeeze", x, {}, opset)


@given(
    start=st.integers(-8, 8),
    end=st.integers(-8, 8) | st.sampled_from([-(2**63), 2**63 - 1]),
    step=st.sampled_from([-3, -2, -1, 1, 2]),
)
@settings(max_examples=80, deadline=None)
def test_slice_backwards(start: int, end: int, step: int) -> None:
    parts = (np.array([start]), np.array([end]), np.array([1]), np.array([step]))
    check("Slice", normal(2, 6, 3), dict(zip(("starts", "ends", "axes", "steps"), parts, strict=True)))


def test_slice_by_attributes() -> None:
    check("Slice", normal(4, 6, 3), opset=9, starts=[1, -4], ends=[100, -1], axes=[0, 1])


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_to_space(mode: str) -> None:
    check("DepthToSpace", normal(2, 8, 3, 4), blocksize=2, mode=mode)
    check("SpaceToDepth", normal(2, 8, 4, 6), blocksize=2)


@pytest.mark.parametrize("shape", [[3, 1], [2, 3, 4], [1, 1, 1], [2, 1, 3, 4]])
def test_expand_and_tile(shape: list[int]) -> None:
    check("Expand", normal(3, 4), {"shape": np.array(shape)})
    check("Tile", normal(3, 4), {"repeats": np.array([2, 3])})


@pytest.mark.parametrize("to", [1, 2, 3, 5, 6, 7, 9, 10, 11])
def test_cast(to: int) -> None:
    check("Cast", np.abs(normal(3, 4)) * 50, to=to)
    check("Cast", integers(3, 4), to=to)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("index", [np.array(-1), np.array([0, 2, -3]), np.array([[0], [1]])])
def test_gather(axis: int, index: np.ndarray) -> None:
    check("Gather", normal(3, 4, 5), {"index": index}, axis=axis)


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_gather_nd(batch: int) -> None:
    shape = {0: (4, 2), 1: (2, 5, 1), 2: (2, 3, 6, 1)}[batch]
    check("GatherND", normal(2, 3, 4), {"index": integers(*shape, low=-2, high=2)}, batch_dims=batch)


@pytest.mark.parametrize("reduction", ["none", "add", "mul", "max", "min"])
def test_scatter(reduction: str) -> None:
    x = normal(4, 5)
    attributes: dict[str, Any] = {} if reduction == "none" else {"reduction": reduction}
    rows: Arrays = {"index": np.array([[1, -1, 0, 2, 3], [0, 2, 1, 3, 2]]), "updates": normal(2, 5, seed=1)}
    check("ScatterElements", x, rows, 18, axis=0, **attributes)
    check("ScatterND", x, {"index": np.array([[3], [-4], [1]]), "updates": normal(3, 5, seed=1)}, 18, **attributes)
    check("ScatterND", x, {"index": np.array([[3, 1], [0, -1]]), "updates": normal(2, seed=1)}, 18, **attributes)


@pytest.mark.parametrize("largest", [0, 1])
@pytest.mark.parametrize("axis", [0, -1])
def test_top_k_breaks_ties_by_index(largest: int, axis: int) -> None:
    x = integers(5, 6, low=0, high=3, dtype=np.float32)
    check("TopK", x, {"k": np.array([3])}, outputs=2, axis=axis, largest=largest)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_one_hot(axis: int) -> None:
    check("OneHot", integers(3, 4, low=-6, high=7), {"depth": np.array(5), "values": np.array([0.25, 2], np.float32)}, axis=axis)


@pytest.mark.parametrize("upper", [0, 1])
@pytest.mark.parametrize("k", [None, -1, 2])
def test_trilu(upper: int, k: int | None) -> None:
    check("Trilu", normal(2, 4, 5), {"k": np.array(k)} if k is not None else {}, upper=upper)


@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("reverse", [0, 1])
def test_cumsum(exclusive: int, reverse: int) -> None:
    check("CumSum", normal(3, 4), {"axis": np.array(1)}, exclusive=exclusive, reverse=reverse)
    check("CumSum", integers(3, 4), {"axis": np.array(-2)}, exclusive=exclusive, reverse=reverse)


@pytest.mark.parametrize("kind", ["ReduceMax", "ReduceMin", "ReduceSum", "ReduceProd", "ReduceL1", "ReduceSumSquare"])
def test_reductions_of_integers(kind: str) -> None:
    check(kind, integers(3, 4, 2, low=-3, high=4, dtype=np.int32), {"axes": np.array([0, -1])}, 18)


@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("kind", ["ArgMax", "ArgMin"])
def test_arg_reductions(kind: str, keepdims: int, last: int) -> None:
    check(kind, integers(5, 6, low=0, high=3, dtype=np.float32), axis=1, keepdims=keepdims, select_last_index=last)


@pytest.mark.parametrize("equation", ["bij,bjk->bik", "...ij,...kj->...ik", "bhid , bhjd -> bhij", "bii->bi"])
def test_einsum(equation: str) -> None:
    shapes = {"bij,bjk->bik": [(2, 3, 4), (2, 4, 5)], "...ij,...kj->...ik": [(2, 3, 4), (2, 5, 4)], "bii->bi": [(2, 3, 3)]}
    parts = shapes.get(equation, [(2, 3, 4, 5), (2, 3, 6, 5)])
    check("Einsum", {f"x{i}": normal(*shape, seed=i) for i, shape in enumerate(parts)}, equation=equation)


# ---------------------------------------------------------------- recurrent


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("variant", ["plain", "bias", "states", "lengths", "clip"])
@pytest.mark.parametrize("before", [0, 1])
def test_recurrent(kind: str, direction: str, variant: str, before: int) -> None:
    if before and kind != "GRU":
        return
    steps, batch, size, hidden = 5, 3, 4, 6
    ways = 2 if direction == "bidirectional" else 1
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind] * hidden
    parts: dict[str, np.ndarray | None] = {"w": normal(ways, gates, size, seed=1), "r": normal(ways, gates, hidden, seed=2)}
    parts["b"] = normal(ways, 2 * gates, seed=3) if variant != "plain" else None
    parts["lengths"] = np.array([2, 5, 3] if variant == "lengths" else [5, 5, 5], np.int32) if variant in ("lengths", "states") else None
    if variant in ("states", "lengths"):
        parts["h0"] = normal(ways, batch, hidden, seed=4)
        if kind == "LSTM":
            parts["c0"] = normal(ways, batch, hidden, seed=5)
    attributes: dict[str, Any] = {"hidden_size": hidden, "direction": direction}
    if variant == "clip":
        attributes["clip"] = 0.8
    if kind == "GRU":
        attributes["linear_before_reset"] = before
    check(kind, normal(steps, batch, size), parts, 14, outputs=3 if kind == "LSTM" else 2, **attributes)


def test_lstm_with_peepholes_and_other_activations() -> None:
    parts: Arrays = {
        "w": normal(1, 24, 4, seed=1),
        "r": normal(1, 24, 6, seed=2),
        "b": normal(1, 48, seed=3),
        "lengths": None,
        "h0": None,
        "c0": None,
        "p": normal(1, 18, seed=4),
    }
    check("LSTM", normal(5, 3, 4), parts, 14, outputs=3, hidden_size=6)
    activations = ["Sigmoid", "Softsign", "Tanh"]
    check("LSTM", normal(5, 3, 4), {k: parts[k] for k in ("w", "r")}, 14, outputs=["y", "", "c"], hidden_size=6, activations=activations)


def test_rnn_with_relu() -> None:
    check(
        "RNN",
        normal(5, 3, 4),
        {"w": normal(1, 6, 4, seed=1), "r": normal(1, 6, 6, seed=2)},
        14,
        outputs=2,
        hidden_size=6,
        activations=["Relu"],
    )


def test_activations_with_parameters_are_refused() -> None:
    inputs, parts = {"x": normal(5, 3, 4)}, {"w": normal(1, 6, 4), "r": normal(1, 6, 6)}
    with pytest.raises(UnsupportedModelError, match="activation 'LeakyRelu'"):
        imported(node_model("RNN", inputs, parts, 14, hidden_size=6, activations=["LeakyRelu"], activation_alpha=[0.1]), inputs)


# ---------------------------------------------------------------- attention and ONNX Runtime's own domain


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("mask", [None, "float", "bool"])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_attention(causal: int, mask: str | None, kv_heads: int) -> None:
    inputs = {"q": normal(2, 5, 4 * 6), "k": normal(2, 7, kv_heads * 6, seed=1), "v": normal(2, 7, kv_heads * 6, seed=2)}
    constants: Arrays = {}
    if mask is not None:
        constants = {"mask": normal(5, 7, seed=3) if mask == "float" else normal(5, 7, seed=3) > -1}
    check("Attention", inputs, constants, 23, q_num_heads=4, kv_num_heads=kv_heads, is_causal=causal)


@pytest.mark.parametrize("interleaved", [0, 1])
def test_rotary_embedding(interleaved: int) -> None:
    parts: Arrays = {"cos": np.cos(normal(16, 4, seed=1)), "sin": np.sin(normal(16, 4, seed=1)), "ids": integers(2, 5, low=0, high=16)}
    check("RotaryEmbedding", normal(2, 3, 5, 8), parts, 23, interleaved=interleaved)


@pytest.mark.parametrize("kind", ["Gelu", "BiasGelu", "FastGelu", "QuickGelu"])
def test_fused_activations(kind: str) -> None:
    constants: Arrays = {"bias": normal(8, seed=1)} if kind in ("BiasGelu", "FastGelu") else {}
    check(kind, normal(2, 3, 8), constants, domain="com.microsoft")


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
def test_fused_matmul(trans_a: int, trans_b: int) -> None:
    a, b = normal(2, *((4, 3) if trans_a else (3, 4))), normal(2, *((5, 4) if trans_b else (4, 5)), seed=1)
    check("FusedMatMul", {"a": a, "b": b}, domain="com.microsoft", alpha=0.5, transA=trans_a, transB=trans_b)


@pytest.mark.parametrize("bias", [True, False])
def test_skip_layer_normalization(bias: bool) -> None:
    inputs = {"x": normal(2, 3, 8), "skip": normal(2, 3, 8, seed=1)}
    parts: dict[str, np.ndarray | None] = {"gamma": normal(8, seed=2), "beta": normal(8, seed=3)}
    if bias:
        parts["bias"] = normal(8, seed=4)
    names = ["y", "", "", "sum"]
    check("SkipLayerNormalization", inputs, parts, domain="com.microsoft", outputs=names, epsilon=1e-5)
    del parts["beta"]
    check("SkipSimplifiedLayerNormalization", inputs, parts, domain="com.microsoft", outputs=names, epsilon=1e-5)


def test_simplified_layer_normalization() -> None:
    check("SimplifiedLayerNormalization", normal(2, 3, 8), {"scale": normal(8, seed=1)}, axis=-1, epsilon=1e-5, stash_type=1)


@pytest.mark.parametrize("mask", [True, False])
def test_multi_head_attention(mask: bool) -> None:
    inputs = {"q": normal(2, 5, 8), "k": normal(2, 7, 8, seed=1), "v": normal(2, 7, 8, seed=2)}
    constants: dict[str, np.ndarray | None] = {"bias": normal(24, seed=3)}
    if mask:
        constants["mask"] = np.array([[1] * 7, [1] * 4 + [0] * 3], np.int32)
    check("MultiHeadAttention", inputs, constants, domain="com.microsoft", num_heads=2)


@pytest.mark.parametrize("mask", [True, False])
def test_packed_attention(mask: bool) -> None:
    parts: dict[str, np.ndarray | None] = {"w": normal(8, 24, seed=1), "b": normal(24, seed=2)}
    if mask:
        parts["mask"] = np.array([[1] * 5, [1] * 3 + [0] * 2], np.int32)
    check("Attention", normal(2, 5, 8), parts, domain="com.microsoft", num_heads=2)


@pytest.mark.parametrize("mask", [True, False])
def test_embed_layer_normalization(mask: bool) -> None:
    inputs = {"ids": integers(2, 5, low=0, high=9, dtype=np.int32), "segments": integers(2, 5, low=0, high=2, dtype=np.int32)}
    parts: dict[str, np.ndarray | None] = {"words": normal(9, 8, seed=1), "positions": normal(6, 8, seed=2), "kinds": normal(2, 8, seed=3)}
    parts |= {"gamma": normal(8, seed=4), "beta": normal(8, seed=5)}
    if mask:
        parts["mask"] = np.array([[1] * 5, [1] * 3 + [0] * 2], np.int32)
    check("EmbedLayerNormalization", inputs, parts, domain="com.microsoft", outputs=2, epsilon=1e-5)


@pytest.mark.parametrize(("low", "high"), [(0.0, 6.0), (-1.5, None), (None, 0.3), (1.0, -1.0)])
def test_the_gradient_of_clip_is_that_of_torch(low: float | None, high: float | None) -> None:
    """Next to its bounds, and far from them; on a bound there is none, as in torch's newer releases (older ones let it pass there)."""
    ends = [np.float32(end) for end in (low, high) if end is not None]
    around = [np.nextafter(end, np.float32(side)) for end in ends for side in (-np.inf, np.inf)]
    x = torch.tensor(np.array([*ends, *around, -9.0, 0.1, 9.0], np.float32).tolist())
    passed = torch.arange(1.0, len(x) + 1)
    grads = []
    for function in (clamp, torch.clamp):
        leaf = x.clone().requires_grad_()
        out = function(leaf, low, high)
        out.backward(passed)
        grads.append((out.detach(), leaf.grad))
    (made, grad), (expected, of_torch) = grads
    assert torch.equal(made, expected)
    assert torch.equal(grad[len(ends) :], of_torch[len(ends) :])
    if low is None or high is None or low < high:
        assert not grad[: len(ends)].any()
