"""Where does the error of a quantized file enter? It is held against its float model value by value, under ONNX Runtime alone.

Two numbers tell layers that make errors from layers that only pass them on. The *total* error of a value is that of the file as it runs.
The *added* error is that of the same operators when the quantizers in front of them read the float model's values: the file is cut at every
QuantizeLinear and fed from the float model, so that nothing is inherited. For the layers that add most, the file is run once more with that
layer float and everything else as it is: what that gains is what `--keep-float` would.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from . import runtime
from .errors import UsageError
from .graph import Node
from .quant_table import Copy
from .runtime import Optimization
from .samples import Samples
from .source import SourceModel
from .validation import sqnr

_FED = "__float"
_WORTH_KEEPING = 0.5  # dB of the output that leaving one layer float must gain to be suggested
_CLIPPED = 0.02  # share of an activation beyond its grid from which its range is questioned; ranges of least error clip some on purpose
_DOMINANT = 0.25  # share of all added noise from which one layer counts as the culprit


@dataclass(frozen=True)
class LayerError:
    """One weighted layer. Ratios are signal to noise in dB; infinite where nothing differs.

    Attributes:
        node: its name in the float model.
        op_type: its operator.
        value: where it is measured: the result that the next quantizer reads, or a graph output.
        added: of that value when the layer's quantizers read the float model's values.
        total: of that value in the file as it runs.
        share: of all noise that layers add, each relative to its own signal, from 0 to 1.
        weight: of the weight alone; None where it is not quantized.
        input: of the layer's input on its grid alone; None where it has none.
        clipped: share of the input beyond its grid, 0 to 1.
        gain: what the worst output gains, in dB, when this layer alone is float; None where it was not tried.
    """

    node: str
    op_type: str
    value: str
    added: float
    total: float
    share: float
    weight: float | None
    input: float | None
    clipped: float
    gain: float | None = None


@dataclass(frozen=True)
class Diagnosis:
    """All layers, those that add most first; `outputs` has the SQNR of each graph output; `suggestions` are flags to try, with reasons."""

    samples: int
    outputs: Mapping[str, float]
    layers: tuple[LayerError, ...]
    suggestions: tuple[str, ...]


def diagnose(
    source: SourceModel,
    quantized: onnx.ModelProto,
    samples: Samples,
    tried: int = 8,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Diagnosis:
    """Compare a file that `quantize` wrote with its float model.

    Args:
        source: the float model.
        quantized: the file.
        samples: all are used, and every compared value is held for all of them.
        tried: how many of the layers that add most are run float one at a time.
        progress: called with (layers tried, layers to try).

    Raises:
        UsageError: the file has no quantizers named as `quantize` names them, or was made from another model.
    """
    source = source.with_copies(_copies(source, quantized))
    quantizers = _quantizers(source, quantized)
    outputs = list(source.graph.outputs)
    origins = {name: node.input[0] for name, node in quantizers.items()}
    observed = list(dict.fromkeys([*outputs, *origins.values()]))
    known = {*source.graph.inputs, *(value for node in source.graph.nodes for value in node.outputs)}
    floats = runtime.run_exposed(source.model, samples.inputs, [v for v in dict.fromkeys([*observed, *quantizers]) if v in known])
    observed = [value for value in observed if value in floats and floats[value].dtype.kind == "f"]
    running = _exposed(quantized, samples.inputs, observed)
    cut = _exposed(_cut(quantized, quantizers, floats), {**samples.inputs, **{name + _FED: floats[name] for name in quantizers}}, observed)
    added = {value: sqnr(floats[value], cut[value]) for value in observed}
    total = {value: sqnr(floats[value], running[value]) for value in observed}
    layers = _layers(source, quantized, quantizers, floats, added, total)
    finals = {name: total[name] for name in outputs if name in total}
    worst = min(finals.values(), default=float("inf"))
    for position, layer in enumerate(layers[:tried]):
        changed = _with_float_layer(source, quantized, quantizers, layer.node)
        found = _exposed(changed, samples.inputs, list(finals))
        gain = min((sqnr(floats[name], found[name]) for name in finals), default=worst) - worst
        layers[position] = LayerError(**{**vars(layer), "gain": float(gain)})
        progress(position + 1, min(tried, len(layers)))
    return Diagnosis(samples.count, finals, tuple(layers), tuple(_suggestions(layers)))


def _copies(source: SourceModel, quantized: onnx.ModelProto) -> dict[str, Copy]:
    """The values that layers requantize for themselves, told from quantizers that read what another one made."""
    known = {*source.graph.inputs, *source.graph.producer}
    producer = {value: node for node in quantized.graph.node for value in node.output}
    made = {node.name: node.output[0] for node in quantized.graph.node if node.op_type == "DequantizeLinear"}
    found = {}
    for node in quantized.graph.node:
        name = node.name.removesuffix("_QuantizeLinear")
        read = node.input[0] if node.op_type == "QuantizeLinear" and node.name.endswith("_QuantizeLinear") and name not in known else None
        before = producer.get(read) if read is not None else None
        if before is not None and before.op_type == "Clip":  # it keeps the copy's floats in range
            before = producer.get(before.input[0])
        if before is None or before.op_type != "DequantizeLinear":
            continue
        origin, own = before.name.removesuffix("_DequantizeLinear"), made.get(f"{name}_DequantizeLinear")
        if origin in known and own is not None:
            found[name] = Copy(origin, tuple(reader.name for reader in quantized.graph.node if own in reader.input))
    return found


def _quantizers(source: SourceModel, quantized: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """The QuantizeLinear of each value, by the value's name in the float model."""
    ending = "_QuantizeLinear"
    found = {n.name.removesuffix(ending): n for n in quantized.graph.node if n.op_type == "QuantizeLinear" and n.name.endswith(ending)}
    known = {*source.graph.inputs, *(value for node in source.graph.nodes for value in node.outputs)}
    if not any(node.op_type == "DequantizeLinear" for node in quantized.graph.node):
        raise UsageError("the second file has no DequantizeLinear: give the float model first and the file that `quantize` wrote second")
    strangers = [name for name in found if name not in known]
    if strangers:
        raise UsageError(f"the quantized file has a value {strangers[0]!r} that the float model lacks: it was made from another model")
    if not found and any(node.op_type == "QuantizeLinear" for node in quantized.graph.node):
        raise UsageError(
            "the quantizers of this file are not named <value>_QuantizeLinear: only files that `quantize` wrote are understood"
        )
    return found


def _exposed(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Values from inside a model as the file says, node by node; what the model lacks is taken from the feeds."""
    made = {value for node in model.graph.node for value in node.output}
    inside = [name for name in names if name in made]
    found = runtime.run(runtime.exposing(model, inside, Optimization.NONE), feeds, inside) if inside else {}
    return found | {name: feeds[name] for name in names if name not in made and name in feeds}


def _cut(quantized: onnx.ModelProto, quantizers: Mapping[str, onnx.NodeProto], floats: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """The file with every quantizer reading the float model's value, fed as an input of its own."""
    changed = onnx.ModelProto()
    changed.CopyFrom(quantized)
    for node in changed.graph.node:
        name = node.name.removesuffix("_QuantizeLinear")
        if node.op_type == "QuantizeLinear" and name in quantizers:
            node.input[0] = name + _FED
    first = "N" if not any(_is_fixed(value) for value in quantized.graph.input) else None
    for name in quantizers:
        array = floats[name]
        shape = [first, *array.shape[1:]] if first else list(array.shape)
        changed.graph.input.append(helper.make_tensor_value_info(name + _FED, helper.np_dtype_to_tensor_dtype(array.dtype), shape))
    del changed.graph.value_info[:]
    return changed


def _is_fixed(value: onnx.ValueInfoProto) -> bool:
    dims = value.type.tensor_type.shape.dim
    return bool(dims) and dims[0].HasField("dim_value") and dims[0].dim_value > 0


def _layers(
    source: SourceModel,
    quantized: onnx.ModelProto,
    quantizers: Mapping[str, onnx.NodeProto],
    floats: Mapping[str, np.ndarray],
    added: Mapping[str, float],
    total: Mapping[str, float],
) -> list[LayerError]:
    """The weighted layers with where they are measured, those that add most noise first."""
    graph = source.graph
    made = {value for node in quantized.graph.node for value in node.output}
    weights = [name for node in graph.weighted if (name := graph.weight(node)) is not None and name in made]
    first = {name: array[:1] for name, array in _first_feeds(source, quantized).items()}
    dequantized = _exposed(quantized, first, weights) if weights else {}
    fitted = {name: _on_grid(quantized, node, floats[name]) for name, node in quantizers.items()}
    rows = []
    for node in graph.weighted:
        value = _measured_at(source, node, added)
        weight = graph.weight(node)
        if value is None or weight is None:
            continue
        own = sqnr(source.constants[weight], dequantized[weight]) if weight in dequantized else None
        operand, clipped = fitted.get(node.inputs[0], (None, 0.0))
        rows.append((node, value, own, operand, clipped))
    noise = {value: 10 ** (-added[value] / 10) for _, value, *_ in rows}
    whole = sum(noise.values()) or 1.0
    layers = [
        LayerError(node.name, node.op_type, value, added[value], total[value], noise[value] / whole, own, operand, clipped)
        for node, value, own, operand, clipped in rows
    ]
    return sorted(layers, key=lambda layer: (layer.added, layer.node))


def _first_feeds(source: SourceModel, quantized: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Zeros for a run that only looks at constants."""
    feeds = {}
    for spec, value in zip(source.inputs, quantized.graph.input, strict=False):
        shape = [axis if isinstance(axis, int) else 1 for axis in spec.shape]
        feeds[value.name] = np.zeros(shape, spec.dtype)
    return feeds


def _measured_at(source: SourceModel, node: Node, added: Mapping[str, float]) -> str | None:
    """The first value from a layer on, along its only reader, that is compared."""
    value = node.outputs[0]
    while value not in added:
        readers = source.graph.readers_of(value)
        if len(readers) != 1 or source.graph.weight(readers[0]) is not None:
            return None
        value = readers[0].outputs[0]
    return value


def _on_grid(quantized: onnx.ModelProto, quantizer: onnx.NodeProto, values: np.ndarray) -> tuple[float, float]:
    """Signal to noise of values on their grid alone, and the share that it clips; bounds that stand for a Relu or Clip clip nothing."""
    constants = {tensor.name: tensor for tensor in quantized.graph.initializer}
    scale, zero_point = (numpy_helper.to_array(constants[name]) for name in quantizer.input[1:3])
    name = quantizer.name.removesuffix("_QuantizeLinear")
    info = np.iinfo(zero_point.dtype) if zero_point.dtype.kind in "iu" else None
    clip = next((node for node in quantized.graph.node if node.name == f"{name}_Clip" and node.input[0] == quantizer.output[0]), None)
    limits = [constants[limit] for limit in clip.input[1:3]] if clip is not None else [None, None]
    low, high = (
        float(numpy_helper.to_array(limit)) if limit is not None else float(getattr(info, end)) if info is not None else None
        for limit, end in zip(limits, ("min", "max"), strict=True)
    )
    codes = np.rint(values.astype(np.float32) / scale) + zero_point.astype(np.float32)
    clipped = np.clip(codes, low, high) if low is not None and high is not None else codes
    back = (clipped - zero_point.astype(np.float32)) * scale
    return sqnr(values, back), float((codes != clipped).mean())


def _with_float_layer(
    source: SourceModel, quantized: onnx.ModelProto, quantizers: Mapping[str, onnx.NodeProto], name: str
) -> onnx.ModelProto:
    """The file with one layer's weight, bias and input unquantized. What the input inherits from the layers before stays."""
    graph = source.graph
    node = next(node for node in graph.weighted if node.name == name)
    changed = onnx.ModelProto()
    changed.CopyFrom(quantized)
    position, target = next((i, n) for i, n in enumerate(changed.graph.node) if n.name == name)
    for index, value in enumerate(node.inputs):
        if value in graph.constants and target.input[index] == value:
            tensor = numpy_helper.from_array(np.ascontiguousarray(source.constants[value]), value + _FED)
            changed.graph.initializer.append(tensor)
            target.input[index] = value + _FED
    operand = node.inputs[0]
    quantizer = quantizers.get(operand)
    if quantizer is not None:
        origin = quantizer.input[0]
        if origin != operand and operand in graph.producer:  # its Relu or Clip was absorbed by the quantizer: put it back
            absorbed = onnx.NodeProto()
            absorbed.CopyFrom(source.node_protos[graph.producer[operand].name])
            absorbed.name, absorbed.input[0], absorbed.output[0] = f"{operand}{_FED}_node", origin, operand + _FED
            present = {tensor.name for tensor in changed.graph.initializer}
            for value in absorbed.input[1:]:
                if value in source.constants and value not in present:
                    changed.graph.initializer.append(numpy_helper.from_array(np.array(source.constants[value]), value))
            changed.graph.node.insert(position, absorbed)
            target = next(n for n in changed.graph.node if n.name == name)
            origin = operand + _FED
        target.input[0] = origin
    del changed.graph.value_info[:]
    return changed


def _suggestions(layers: Sequence[LayerError]) -> list[str]:
    """What to try next, most promising first."""
    found = []
    tried = [layer for layer in layers if layer.gain is not None]
    best = sorted(
        (layer for layer in tried if layer.gain is not None and layer.gain >= _WORTH_KEEPING), key=lambda layer: -(layer.gain or 0)
    )
    for layer in best[:3]:
        found.append(f"--keep-float '{layer.node}': the output gains {layer.gain:.1f} dB when this layer alone is float")
    clipping = [layer for layer in layers if layer.clipped >= _CLIPPED]
    if clipping:
        worst = max(clipping, key=lambda layer: layer.clipped)
        found.append(
            f"more or more varied calibration samples, or --activation-range minmax: {100 * worst.clipped:.1f} % of the input of "
            f"{worst.node} lies beyond its grid on these samples ({len(clipping)} layers above {100 * _CLIPPED:g} %)"
        )
    dominant = [layer for layer in layers if layer.share >= _DOMINANT]
    for layer in dominant[:2]:
        part, flag = "its input", "--activation-bits"
        if layer.weight is not None and (layer.input is None or layer.weight < layer.input):
            part, flag = "its weight", "--weight-bits"
        found.append(f"more bits ({flag}): {layer.node} adds {100 * layer.share:.0f} % of all noise, most of it by {part}")
    if not dominant and not best and layers:
        found.append("--preset best, or more bits everywhere: no single layer stands out, the noise is spread over the network")
    return found
