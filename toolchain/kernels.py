"""Does the file say what was simulated, and do the integer kernels compute what the file says? Held against each other value by value.

Whole networks cannot answer that: a code that sits on a rounding tie falls either way, and later roundings amplify it, so that two exact
executions of a deep network can drift apart. So the graph is cut at every quantized value: each operator starts from the codes that the
reference gave to its inputs, and may end at most one step away.
"""

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from . import runtime
from .quant_table import FLOAT8, FLOAT8_UNIT, QuantTable
from .quant_table import quantize as encode
from .repeats import codes_of
from .runtime import Optimization

_FED = "__fed"
_READERS = frozenset({"DequantizeLinear", "Gather"})  # of codes; Gather repeats them
# ONNX Runtime rounds float biases of quantized layers to int32 steps of s_x * s_w by itself. Targets that keep them float are for other
# runtimes, which do not; and where a model leaves a shape open that is fixed here, the Add behind a MatMul is a bias to it. What it would
# do to float weights, `exporters.kept_float` keeps it from.
_REWRITES = frozenset({"WeightBiasQuantization"})
_SAMPLES = 8
# Where a rounding error decides between values that are far apart.
_STEP_FUNCTIONS = frozenset(
    {
        *("ArgMax", "ArgMin", "TopK", "Hardmax", "NonMaxSuppression", "NonZero", "Unique", "Round", "Floor", "Ceil", "Sign", "Mod"),
        *("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal", "Multinomial", "Bernoulli", "RandomNormal", "RandomUniform"),
        *("RandomNormalLike", "RandomUniformLike", "RoiAlign"),
    }
)
# Where the rounding of a sum that cancels may be divided by next to nothing (linear attention of tokens that attend to none).
_AMPLIFYING = frozenset({"Div", "Reciprocal", "Pow", "Log"})
_AMPLIFIED = 1e-3  # share of a value's numbers that may be lost to that; an operator that is wrong is so in more of them
_FLOAT_STEPS = 255  # float outputs are compared in steps of an 8-bit grid over their range
_LEAST_RANGE = 1e-3  # of the magnitude: what varies by less (sums of a Softmax, all 1) may vary by the rounding of floats alone


@dataclass(frozen=True)
class KernelCheck:
    """The largest difference of an operator's result in quantization steps, the value it was found at, and the share of codes that differ.

    `values` counts the results that were compared; `share` is in percent of all codes, whatever the size of the difference.
    """

    values: int
    worst: str
    steps: float
    share: float

    @classmethod
    def of(cls, found: "Sequence[Difference]") -> "KernelCheck":
        worst = max(found, key=lambda difference: difference.steps, default=None)
        codes = [difference for difference in found if difference.is_code]
        moved, size = (sum(counts) for counts in zip(*((d.moved, d.size) for d in codes), strict=True)) if codes else (0, 0)
        return cls(len(found), worst.name if worst else "", worst.steps if worst else 0.0, 100.0 * moved / max(size, 1))


@dataclass(frozen=True)
class Difference:
    """How far a value of the model is from the reference: the largest difference in steps, and how many of its numbers are a step away.

    `is_code`: it is a quantized value, whose steps are those of its grid; others are compared in steps of 8 bits over their range.
    """

    name: str
    steps: float
    moved: int
    size: int
    is_code: bool


def check_kernels(
    model: onnx.ModelProto,
    feeds: Mapping[str, np.ndarray],
    provider: str = runtime.CPU,
    optimization: Optimization = Optimization.DEFAULT,
) -> KernelCheck:
    """The worst of `kernel_differences`."""
    return KernelCheck.of(kernel_differences(model, feeds, provider, optimization))


def check_simulation(
    model: onnx.ModelProto, table: QuantTable, values: Mapping[str, np.ndarray], feeds: Mapping[str, np.ndarray]
) -> KernelCheck:
    """The worst of `simulation_differences`."""
    return KernelCheck.of(simulation_differences(model, table, values, feeds))


def kernel_differences(
    model: onnx.ModelProto,
    feeds: Mapping[str, np.ndarray],
    provider: str = runtime.CPU,
    optimization: Optimization = Optimization.DEFAULT,
) -> tuple[Difference, ...]:
    """Compare ONNX Runtime's optimised execution with its unoptimised one, operator by operator, over a few samples.

    Args:
        model: a QDQ model.
        feeds: samples by input name, [N, ...]; the first few are used.
        provider: of both executions.
        optimization: of the one that is compared.

    Raises:
        UnsupportedModelError: ONNX Runtime does not load the model.
    """
    outputs = [output.name for output in model.graph.output]
    codes = _codes(model)
    whole = runtime.session(_with_outputs(model, [*outputs, *codes]), provider, Optimization.NONE)
    axes, fixed = runtime.input_axes(model, feeds), runtime.fixed_batch(whole, feeds)
    count = fixed or (1 if runtime.differing(feeds, axes) else _SAMPLES)
    some = {name: array[np.arange(count) % len(array)] if fixed else array[:count] for name, array in feeds.items()}
    expected = runtime.execute(whole, runtime.batched(some, axes), [*outputs, *codes])
    return _compared(model, expected, codes, some, provider, optimization)


def simulation_differences(
    model: onnx.ModelProto, table: QuantTable, values: Mapping[str, np.ndarray], feeds: Mapping[str, np.ndarray]
) -> tuple[Difference, ...]:
    """Compare the file, executed as it is written, with the torch simulation on every value that both know by name.

    Args:
        model: the exported model, whose quantized values keep the names that `exporters.qdq` gives them.
        table: its grids.
        values: every value of the simulation by name in one forward pass, on its grid where it has one.
        feeds: the samples that the simulation ran on, fit for one run.

    Raises:
        UnsupportedModelError: ONNX Runtime does not load the model.
    """
    codes, expected = [], {}
    made = {value: node for node in model.graph.node for value in node.output}
    for node in model.graph.node:
        value = node.name.removesuffix("_DequantizeLinear")
        if node.op_type != "DequantizeLinear" or value not in table or table[value].codes is not None:
            continue
        code = codes_of(node, made)
        if code not in expected:
            dtype = next(t for t in model.graph.initializer if t.name == node.input[2]).data_type
            codes.append(code)
            expected[code] = _numbers(encode(values[value], table[value]), helper.tensor_dtype_to_np_dtype(dtype))
    expected |= {name: array for name, array in values.items() if name in made and name not in table}
    return _compared(model, expected, codes, feeds, runtime.CPU, Optimization.NONE)


def _compared(
    model: onnx.ModelProto,
    expected: Mapping[str, np.ndarray],
    codes: list[str],
    feeds: Mapping[str, np.ndarray],
    provider: str,
    optimization: Optimization,
) -> tuple[Difference, ...]:
    """Run the model with the expected codes fed to every operator, and compare what each makes of them."""
    given = {name: np.asarray(expected[name]) for name in codes}
    unsteady, amplified = _behind(model, given.keys(), _is_step), _behind(model, given.keys(), _is_amplifying(model))
    expected = {name: runtime.as_array(value) for name, value in expected.items() if name not in unsteady}
    if not expected:  # all of it is inside control flow
        return ()
    cut = runtime.session(_cut(model, given, list(expected)), provider, optimization, _REWRITES)
    fed = {name + _FED: array for name, array in given.items()} | runtime.batched(feeds, runtime.input_axes(model, feeds))
    names = {entry.name for entry in cut.get_inputs()}
    found = runtime.execute(cut, {name: array for name, array in fed.items() if name in names}, list(expected))
    fed_codes = set(codes)

    def difference(name: str) -> Difference:
        steps = _steps(expected[name], runtime.as_array(found[name]))
        most = steps.max(initial=0.0)
        if name in amplified and steps.size:
            most = np.quantile(steps, 1 - _AMPLIFIED, method="lower")
        return Difference(name, float(most), int((steps >= 1).sum()), steps.size, name in fed_codes)

    return tuple(difference(name) for name in expected)


def _codes(model: onnx.ModelProto) -> list[str]:
    """The integer values that are computed and then dequantized."""
    made = {value: node for node in model.graph.node for value in node.output}
    found = (codes_of(node, made) for node in model.graph.node if node.op_type == "DequantizeLinear")
    return [code for code in dict.fromkeys(found) if code in made]


def _behind(model: onnx.ModelProto, codes: AbstractSet[str], is_one: Callable[[onnx.NodeProto], bool]) -> set[str]:
    """The values that nodes of a kind stand before, up to the next quantized one."""
    found: set[str] = set()
    for node in model.graph.node:
        if node.op_type in _READERS and node.input[0] in codes:
            continue
        if is_one(node) or found.intersection(node.input):
            found.update(node.output)
    return found


def _is_step(node: onnx.NodeProto) -> bool:
    """Whether a rounding error may change all that a node makes."""
    return node.op_type in _STEP_FUNCTIONS or any(attribute.HasField("g") for attribute in node.attribute)


def _is_amplifying(model: onnx.ModelProto) -> Callable[[onnx.NodeProto], bool]:
    """Whether a rounding error in one number may change that one by any amount: it is divided by what is computed, say."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return lambda node: node.op_type in _AMPLIFYING and node.input[-1] not in constants


def _with_outputs(model: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    del changed.graph.output[:]
    changed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return changed


def _cut(model: onnx.ModelProto, codes: Mapping[str, np.ndarray], outputs: list[str]) -> onnx.ModelProto:
    """The model with every DequantizeLinear reading codes that are fed; what used to make them is an output."""
    changed = _with_outputs(model, outputs)
    for node in changed.graph.node:
        if node.op_type in _READERS and node.input[0] in codes:
            node.input[0] += _FED
    changed.graph.input.extend(
        helper.make_tensor_value_info(name + _FED, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in codes.items()
    )
    del changed.graph.value_info[:]
    return changed


def _numbers(codes: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Codes as the file holds them."""
    return (codes.astype(np.float32) / FLOAT8_UNIT).astype(dtype) if dtype == FLOAT8 else codes.astype(dtype)


def _places(numbers: np.ndarray) -> np.ndarray:
    """The place of each number among those of E4M3, from the lowest up."""
    bits = numbers.view(np.uint8).astype(np.int64)
    return np.where(bits & 0x80, -(bits & 0x7F), bits)


def _steps(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Differences in steps: of codes, or of an 8-bit grid over the range of a float value."""
    if expected.shape != found.shape:
        return np.full(max(expected.size, 1), np.inf)
    if expected.dtype == FLOAT8:
        expected, found = _places(expected), _places(found)
    if expected.dtype.kind not in "fiub":
        return (expected != found).astype(np.float64)
    expected, found, is_integer = expected.astype(np.float64), found.astype(np.float64), expected.dtype.kind != "f"
    apart = ~((expected == found) | (np.isnan(expected) & np.isnan(found)))
    difference = np.abs(np.subtract(expected, found, where=apart, out=np.zeros_like(expected)))
    if is_integer:
        return difference
    finite = expected[np.isfinite(expected)]
    width = max(float(np.ptp(finite)), _LEAST_RANGE * float(np.abs(finite).max())) / _FLOAT_STEPS if finite.size else 0.0
    return difference / width if width > 0 else difference
