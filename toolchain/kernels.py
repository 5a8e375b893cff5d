"""Does the file say what was simulated, and do the integer kernels compute what the file says? Held against each other value by value.

Whole networks cannot answer that: a code that sits on a rounding tie falls either way, and later roundings amplify it, so that two exact
executions of a deep network can drift apart. So the graph is cut at every quantized value: each operator starts from the codes that the
reference gave to its inputs, and may end at most one step away.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from . import runtime
from .quant_table import QuantTable
from .quant_table import quantize as encode
from .runtime import Optimization

_FED = "__fed"
_SAMPLES = 8
_FLOAT_STEPS = 255  # float outputs are compared in steps of an 8-bit grid over their range


@dataclass(frozen=True)
class KernelCheck:
    """The largest difference of an operator's result in quantization steps, the value it was found at, and the share of codes that differ.

    `values` counts the results that were compared; `share` is in percent of all codes, whatever the size of the difference.
    """

    values: int
    worst: str
    steps: float
    share: float


def check_kernels(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray], provider: str = runtime.CPU) -> KernelCheck:
    """Compare ONNX Runtime's default execution with its unoptimised one, operator by operator, over a few samples.

    Args:
        model: a QDQ model.
        feeds: samples by input name, [N, ...]; the first few are used.

    Raises:
        UnsupportedModelError: ONNX Runtime does not load the model.
    """
    outputs = [output.name for output in model.graph.output]
    codes = _codes(model)
    whole = runtime.session(_with_outputs(model, [*outputs, *codes]), provider, Optimization.NONE)
    count = runtime.fixed_batch(whole) or _SAMPLES
    some = {name: array[np.arange(count) % len(array)] if runtime.fixed_batch(whole) else array[:count] for name, array in feeds.items()}
    expected = dict(zip([*outputs, *codes], map(np.asarray, whole.run([*outputs, *codes], some)), strict=True))
    return _compared(model, expected, codes, some, provider, Optimization.DEFAULT)


def check_simulation(
    model: onnx.ModelProto, table: QuantTable, values: Mapping[str, np.ndarray], feeds: Mapping[str, np.ndarray]
) -> KernelCheck:
    """Compare the file, executed as it is written, with the torch simulation on every value that both know by name.

    Args:
        model: the exported model, whose quantized values keep the names that `exporters.qdq` gives them.
        table: its grids.
        values: every value of the simulation by name [N, ...], on its grid where it has one.
        feeds: the samples that the simulation ran on.

    Raises:
        UnsupportedModelError: ONNX Runtime does not load the model.
    """
    codes, expected = [], {}
    for node in model.graph.node:
        value = node.name.removesuffix("_DequantizeLinear")
        if node.op_type == "DequantizeLinear" and value in table and table[value].codes is None and node.input[0] not in expected:
            dtype = next(t for t in model.graph.initializer if t.name == node.input[2]).data_type
            codes.append(node.input[0])
            expected[node.input[0]] = encode(values[value], table[value]).astype(helper.tensor_dtype_to_np_dtype(dtype))
    made = {value for node in model.graph.node for value in node.output}
    expected |= {name: array for name, array in values.items() if name in made and name not in table}
    return _compared(model, expected, codes, feeds, runtime.CPU, Optimization.NONE)


def _compared(
    model: onnx.ModelProto,
    expected: Mapping[str, np.ndarray],
    codes: list[str],
    feeds: Mapping[str, np.ndarray],
    provider: str,
    optimization: Optimization,
) -> KernelCheck:
    """Run the model with the expected codes fed to every operator, and compare what each makes of them."""
    cut = runtime.session(_cut(model, {name: expected[name] for name in codes}, list(expected)), provider, optimization)
    fed = {name + _FED: expected[name] for name in codes} | dict(feeds)
    names = {entry.name for entry in cut.get_inputs()}
    results = cut.run(list(expected), {name: array for name, array in fed.items() if name in names})
    found = dict(zip(expected, map(np.asarray, results), strict=True))
    differences = {name: _steps(expected[name], found[name]) for name in expected}
    worst = max(differences, key=lambda name: float(differences[name].max(initial=0.0)), default="")
    off = sum(int((differences[name] >= 1).sum()) for name in codes)
    return KernelCheck(
        values=len(differences),
        worst=worst,
        steps=float(differences[worst].max(initial=0.0)) if worst else 0.0,
        share=100.0 * off / max(sum(differences[name].size for name in codes), 1),
    )


def _codes(model: onnx.ModelProto) -> list[str]:
    """The integer values that are computed and then dequantized."""
    made = {value for node in model.graph.node for value in node.output}
    return list(dict.fromkeys(node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in made))


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
        if node.op_type == "DequantizeLinear" and node.input[0] in codes:
            node.input[0] += _FED
    changed.graph.input.extend(
        helper.make_tensor_value_info(name + _FED, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in codes.items()
    )
    del changed.graph.value_info[:]
    return changed


def _steps(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Differences in steps: of codes, or of an 8-bit grid over the range of a float value."""
    difference = np.abs(expected.astype(np.float64) - found.astype(np.float64))
    if np.issubdtype(expected.dtype, np.integer):
        return difference
    width = float(np.ptp(expected)) / _FLOAT_STEPS if expected.size else 0.0
    return difference / width if width > 0 else difference
