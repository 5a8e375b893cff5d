"""Where does the error of a quantized file enter? It is held against its float model value by value, under ONNX Runtime alone.

Two numbers tell layers that make errors from layers that only pass them on. The *total* error of a value is that of the file as it runs.
The *added* error is that of the same operators when the quantizers in front of them read the float model's values: the file is cut at every
QuantizeLinear and fed from the float model, so that nothing is inherited. For the layers that add most, the file is run once more with that
layer float and everything else as it is: what that gains is what `--keep-float` would. Two more runs, one with all weights float and one
with all activations, tell which of the two make the noise.
"""

import tomllib
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from . import runtime
from .equalization import evenable
from .errors import UsageError
from .flow import FUSED_ACTIVATIONS
from .graph import Node
from .noise import Noise, sqnr
from .progress import Progress
from .protos import metadata
from .quant_table import Copy
from .repeats import without_repeats
from .runtime import Optimization
from .samples import Samples
from .source import SourceModel

_FED = "__float"
_HELD = 1 << 28  # bytes of compared values of the float model at a time
_MOST_TOGETHER = 3  # layers that are run float at the same time


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
        clip_noise: share of the noise of the input on its grid that those values make, 0 to 1.
        weight_bits, input_bits: how many bits the codes take that the weight has, and that the input can have; None where there are none.
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
    clip_noise: float
    weight_bits: int | None = None
    input_bits: int | None = None
    gain: float | None = None

    @property
    def has_room(self) -> bool:
        """Whether it has fewer bits than integer kernels take; weights of a reduced range have 7."""
        return (self.weight_bits or 8) < 7 or (self.input_bits or 8) < 8


@dataclass(frozen=True)
class Diagnosis:
    """What was measured of a file. Ratios in dB are those of the worst output.

    Attributes:
        samples: how many it was run on.
        outputs: signal to noise of each graph output.
        float_weights, float_activations: of the worst output when all weights and biases, or all activations, are float.
        layers: those that add most first.
        together: the layers that add most, of those with room for more bits where there are any, and what the output gains when all of
            them are float.
        settings: those that the file was made with, as its metadata has them; empty where there are none.
        evenable: the layers whose inputs `equalize` could even out.
    """

    samples: int
    outputs: Mapping[str, float]
    float_weights: float
    float_activations: float
    layers: tuple[LayerError, ...]
    together: tuple[tuple[str, ...], float]
    settings: Mapping[str, Any]
    evenable: tuple[str, ...] = ()

    @property
    def worst(self) -> float:
        """The least signal to noise of an output; infinite where there is no noise."""
        return min(self.outputs.values(), default=float("inf"))

    @property
    def gain_of_float_weights(self) -> float:
        """What the worst output gains, in dB, when all weights are float."""
        return gained(self.float_weights, self.worst)

    @property
    def gain_of_float_activations(self) -> float:
        """What the worst output gains, in dB, when all activations are float."""
        return gained(self.float_activations, self.worst)


def diagnose(
    source: SourceModel,
    quantized: onnx.ModelProto,
    samples: Samples,
    tried: int = 8,
    progress: Progress = lambda *_: None,
) -> Diagnosis:
    """Compare a file that `quantize` wrote with its float model.

    Args:
        source: the float model.
        quantized: the file.
        samples: all are used, as many at a time as a quarter of a GiB holds the compared values of.
        tried: how many of the layers that add most are run float one at a time.
        progress: called as the work proceeds.

    Raises:
        UsageError: the file has no quantizers named as `quantize` names them, or was made from another model.
    """
    candidates = evenable(source)
    quantized = without_repeats(quantized)
    source = source.with_copies(_copies(source, quantized))
    quantizers = _quantizers(source, quantized)
    outputs = list(source.graph.outputs)
    origins = {name: node.input[0] for name, node in quantizers.items()}
    observed = list(dict.fromkeys([*outputs, *origins.values()]))
    observed += _unseen(source, quantized, observed)
    made = [value for value in dict.fromkeys([*observed, *quantizers]) if value in source.graph.producer]
    session = runtime.exposing(source.model, made)
    running, cut = _Running(quantized, observed), _Cut(quantized, quantizers, observed)
    grids = {name: _Grid.of(quantized, node) for name, node in quantizers.items()}
    added, total = (defaultdict[str, list[Noise]](list) for _ in range(2))
    fits: dict[str, list[_Fit]] = {name: [] for name in quantizers}
    reference: list[dict[str, np.ndarray]] = []
    parts = _parts(session, samples)
    for position, part in enumerate(parts):
        passes = list(runtime.passes(session, part.inputs))
        floats = runtime.together(passes) | dict(part.inputs)
        for found, values in ((total, running.values(part.inputs)), (added, cut.values(passes, floats))):
            for name, array in values.items():
                if name in floats and floats[name].dtype.kind == "f":
                    found[name].append(Noise.of(floats[name], array))
        for name, grid in grids.items():
            fits[name].append(grid.fit(floats[name]))
        reference.append({name: floats[name] for name in outputs if name in total})
        progress("comparing values", position + 1, len(parts), float("nan"))
    whole = {value: Noise.together(some).ratio for value, some in total.items()}
    own = {value: Noise.together(some).ratio for value, some in added.items()}
    layers = _layers(source, quantized, {name: _Fit.together(some) for name, some in fits.items()}, own, whole)
    finals = {name: whole[name] for name in outputs if name in whole}
    worst = min(finals.values(), default=float("inf"))

    def output_of(changed: onnx.ModelProto) -> float:
        file, noise = _Running(changed, list(finals)), defaultdict[str, list[Noise]](list)
        for part, wanted in zip(parts, reference, strict=True):
            found = file.values(part.inputs)
            for name in finals:
                noise[name].append(Noise.of(wanted[name], found[name]))
        return min((Noise.together(some).ratio for some in noise.values()), default=worst)

    def gain_of(names: Sequence[str]) -> float:
        return gained(output_of(_with_float_layers(source, quantized, quantizers, names)), worst)

    for position, layer in enumerate(layers[:tried]):
        layers[position] = replace(layer, gain=gain_of([layer.node]))
        progress("trying layers in float", position + 1, min(tried, len(layers)), float("nan"))
    names = tuple(layer.node for layer in ([layer for layer in layers if layer.has_room] or layers)[:_MOST_TOGETHER])
    return Diagnosis(
        samples.count,
        finals,
        output_of(_with_float_weights(source, quantized)),
        output_of(_with_float_activations(source, quantized)),
        tuple(layers),
        (names, gain_of(names)),
        _settings(quantized),
        candidates,
    )


def gained(after: float, before: float) -> float:
    """What an output gains from one ratio to another, in dB; nothing where it had no noise before."""
    return after - before if before != float("inf") else 0.0


def _copies(source: SourceModel, quantized: onnx.ModelProto) -> dict[str, Copy]:
    """The values that layers quantize for themselves, told from quantizers that read a graph input, or what another one made."""
    known = {*source.graph.inputs, *source.graph.producer}
    producer = {value: node for node in quantized.graph.node for value in node.output}
    made = {node.name: node.output[0] for node in quantized.graph.node if node.op_type == "DequantizeLinear"}
    found = {}
    for node in quantized.graph.node:
        name = node.name.removesuffix("_QuantizeLinear")
        read = node.input[0] if node.op_type == "QuantizeLinear" and node.name.endswith("_QuantizeLinear") and name not in known else None
        before = producer.get(read) if read is not None else None
        if before is not None and before.op_type in ("Clip", "Add"):  # it keeps the copy's floats in range, or adds zero
            before = producer.get(before.input[0])
        if before is not None and before.op_type != "DequantizeLinear":
            continue
        origin = before.name.removesuffix("_DequantizeLinear") if before is not None else read
        own = made.get(f"{name}_DequantizeLinear")
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


def _parts(session: runtime.Session, samples: Samples) -> list[Samples]:
    """The samples in parts whose values, as a session hands them out, take no more memory than they should."""
    least = runtime.fixed_batch(session, samples.inputs) or 1
    if samples.count <= least:
        return [samples]
    first = samples.first(least)
    made = runtime.run(session, first.inputs)
    size = least * max(1, _HELD // max(sum(array.nbytes for array in made.values()), 1))
    return [samples.taken(np.arange(start, min(start + size, samples.count))) for start in range(0, samples.count, size)]


def _split(model: onnx.ModelProto, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The names of values that nodes of a model make, and the others."""
    made = {value for node in model.graph.node for value in node.output}
    return [name for name in names if name in made], [name for name in names if name not in made]


class _Running:
    """Values from inside a model as the file says, node by node; what the model lacks is taken from the feeds."""

    def __init__(self, model: onnx.ModelProto, names: Sequence[str]) -> None:
        self._inside, self._given = _split(model, names)
        self._session = runtime.exposing(model, self._inside, Optimization.NONE) if self._inside else None

    def values(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = runtime.run(self._session, feeds, self._inside) if self._session is not None else {}
        return found | {name: feeds[name] for name in self._given if name in feeds}


class _Cut:
    """Values of the file with every quantizer reading the float model's value of the same pass, whole, whatever its axes count."""

    def __init__(self, quantized: onnx.ModelProto, quantizers: Mapping[str, onnx.NodeProto], observed: Sequence[str]) -> None:
        self._inside, self._rest = _split(quantized, observed)
        self._quantizers = quantizers
        changed = onnx.ModelProto()
        changed.CopyFrom(quantized)
        for node in changed.graph.node:
            name = node.name.removesuffix("_QuantizeLinear")
            if node.op_type == "QuantizeLinear" and name in quantizers:
                node.input[0] = name + _FED
        for name in quantizers:
            changed.graph.input.append(helper.make_tensor_value_info(name + _FED, TensorProto.FLOAT, None))
        del changed.graph.value_info[:]
        self._session = runtime.exposing(changed, self._inside, Optimization.NONE) if self._inside else None

    def values(self, passes: Iterable[runtime.Pass], floats: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        rest = {name: floats[name] for name in self._rest if name in floats}
        if self._session is None:
            return rest
        session, taken = self._session, {entry.name for entry in self._session.get_inputs()}

        def found(one: runtime.Pass) -> runtime.Pass:
            given = dict(one.fed) | {name + _FED: one.made.get(name, one.fed.get(name)) for name in self._quantizers}
            fed = {name: array for name, array in given.items() if name in taken}
            return replace(one, made=runtime.execute(session, fed, self._inside))

        return runtime.together(map(found, passes)) | rest


def _layers(
    source: SourceModel,
    quantized: onnx.ModelProto,
    fits: Mapping[str, "_Fit"],
    added: Mapping[str, float],
    total: Mapping[str, float],
) -> list[LayerError]:
    """The weighted layers with where they are measured, those that add most noise first."""
    graph = source.graph
    made = {value for node in quantized.graph.node for value in node.output}
    weights = [name for node in graph.weighted if (name := graph.weight(node)) is not None and name in made]
    dequantized = _dequantized(quantized, weights)
    codes = _codes(quantized)
    rows = []
    for node in graph.weighted:
        value = _measured_at(source, node, added)
        weight = graph.weight(node)
        if value is None or weight is None:
            continue
        own = sqnr(source.constants[weight], dequantized[weight]) if weight in dequantized else None
        rows.append((node, value, own, fits.get(node.inputs[0], _Fit()), codes.get(f"{weight}_DequantizeLinear")))
    noise = {value: 10 ** (-added[value] / 10) for _, value, *_ in rows}
    whole = sum(noise.values()) or 1.0
    layers = [
        LayerError(
            node.name,
            node.op_type,
            value,
            added[value],
            total[value],
            noise[value] / whole,
            own,
            fit.noise.ratio if fit.count else None,
            fit.clipped / max(fit.count, 1),
            fit.clip_noise / max(fit.noise.noise, 1e-300),
            _bits(codes) if codes is not None else None,
            fit.bits,
        )
        for node, value, own, fit, codes in rows
    ]
    return sorted(layers, key=lambda layer: (layer.added, layer.node))


def _dequantized(quantized: onnx.ModelProto, names: Sequence[str]) -> dict[str, np.ndarray]:
    """What the codes of weights and biases stand for: the part of the file that makes them, which reads no input, run on its own."""
    if not names:
        return {}
    part = onnx.ModelProto()
    part.CopyFrom(quantized)
    needed, nodes = set(names), list[onnx.NodeProto]()
    for node in reversed(quantized.graph.node):
        if not needed.isdisjoint(node.output):
            nodes.append(node)
            needed.update(node.input)
    del part.graph.node[:], part.graph.input[:], part.graph.value_info[:]
    part.graph.node.extend(reversed(nodes))
    return runtime.execute(runtime.exposing(part, names, Optimization.NONE), {}, names)


def _unseen(source: SourceModel, quantized: onnx.ModelProto, observed: Sequence[str]) -> list[str]:
    """The results of layers that no value on their way is compared for: they are read in float, by several."""
    made = {value for node in quantized.graph.node for value in node.output}
    return [node.outputs[0] for node in source.graph.weighted if _measured_at(source, node, observed) is None and node.outputs[0] in made]


def _measured_at(source: SourceModel, node: Node, added: Container[str]) -> str | None:
    """The first value from a layer on, along its only reader, that is compared."""
    value = node.outputs[0]
    while value not in added:
        readers = source.graph.readers_of(value)
        if len(readers) != 1 or source.graph.weight(readers[0]) is not None:
            return None
        value = readers[0].outputs[0]
    return value


def _codes(quantized: onnx.ModelProto) -> dict[str, np.ndarray]:
    """The ends of the codes of constants, by the names of the nodes that dequantize them."""
    tensors = {tensor.name: tensor for tensor in quantized.graph.initializer}
    pairs = [node for node in quantized.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in tensors]
    arrays = {node.name: numpy_helper.to_array(tensors[node.input[0]]) for node in pairs}
    return {name: np.array([array.min(), array.max()]) for name, array in arrays.items() if array.size and array.dtype.kind in "iu"}


def _bits(ends: np.ndarray) -> int:
    """The bits of a signed grid, or of an unsigned one, that holds codes between two ends."""
    low, high = map(int, ends)
    return max((-low - 1).bit_length() + 1 if low < 0 else 0, high.bit_length() + (low < 0))


@dataclass(frozen=True)
class _Fit:
    """Values on a grid: their noise, how many there are, how many are clipped, what noise these make, and the grid's bits."""

    noise: Noise = field(default_factory=Noise)
    count: int = 0
    clipped: int = 0
    clip_noise: float = 0.0
    bits: int | None = None

    @classmethod
    def together(cls, parts: Sequence["_Fit"]) -> "_Fit":
        noise = Noise.together(part.noise for part in parts)
        count, clipped = sum(part.count for part in parts), sum(part.clipped for part in parts)
        return cls(noise, count, clipped, sum(part.clip_noise for part in parts), parts[0].bits if parts else None)


@dataclass(frozen=True)
class _Grid:
    """The grid of a quantizer and the ends of its codes; bounds that stand for a Relu or Clip clip nothing."""

    scale: np.ndarray
    zero_point: np.ndarray
    low: float | None
    high: float | None

    @classmethod
    def of(cls, quantized: onnx.ModelProto, quantizer: onnx.NodeProto) -> "_Grid":
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
        return cls(scale, zero_point, low, high)

    def fit(self, values: np.ndarray) -> _Fit:
        zero_point = self.zero_point.astype(np.float32)
        codes = np.rint(values.astype(np.float32) / self.scale) + zero_point
        has_ends = self.low is not None and self.high is not None
        clipped = np.clip(codes, self.low, self.high) if has_ends else codes
        back = (clipped - zero_point) * self.scale
        beyond = codes != clipped
        clip_noise = float(np.square((values[beyond] - back[beyond]).astype(np.float64)).sum())
        bits = int(self.high - self.low).bit_length() if self.low is not None and self.high is not None else None
        return _Fit(Noise.of(values, back), values.size, int(beyond.sum()), clip_noise, bits)


def _with_float_weights(source: SourceModel, quantized: onnx.ModelProto) -> onnx.ModelProto:
    """The file with the weights and biases of all layers as the float model has them."""
    changed = onnx.ModelProto()
    changed.CopyFrom(quantized)
    targets = {node.name: node for node in changed.graph.node}
    for node in source.graph.weighted:
        if node.name in targets:
            _restore_constants(source, node, changed, targets[node.name])
    del changed.graph.value_info[:]
    return changed


def _with_float_activations(source: SourceModel, quantized: onnx.ModelProto) -> onnx.ModelProto:
    """The float model with the weights and biases of the file."""
    made = {value for node in quantized.graph.node for value in node.output}
    constants = [name for node in source.graph.weighted for name in node.inputs if name in source.constants and name in made]
    values = _dequantized(quantized, list(dict.fromkeys(constants)))
    changed = onnx.ModelProto()
    changed.CopyFrom(source.model)
    for tensor in changed.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(values[tensor.name], order="C"), tensor.name))
    return changed


def _settings(quantized: onnx.ModelProto) -> dict[str, Any]:
    """The configuration in a file's metadata."""
    try:
        return tomllib.loads(metadata(quantized).get("mrecg_onnx.config", ""))
    except tomllib.TOMLDecodeError:
        return {}


def _restore_constants(source: SourceModel, node: Node, changed: onnx.ModelProto, target: onnx.NodeProto) -> None:
    """Let a layer of a file read its weight and bias from the float model."""
    present = {tensor.name for tensor in changed.graph.initializer}
    for index, value in enumerate(node.inputs):
        if value in source.graph.constants and index < len(target.input) and target.input[index] == value:
            if value + _FED not in present:
                tensor = numpy_helper.from_array(np.asarray(source.constants[value], order="C"), value + _FED)
                changed.graph.initializer.append(tensor)
                present.add(value + _FED)
            target.input[index] = value + _FED


def _with_float_layers(
    source: SourceModel, quantized: onnx.ModelProto, quantizers: Mapping[str, onnx.NodeProto], names: Sequence[str]
) -> onnx.ModelProto:
    """The file with the weights, biases and inputs of some layers unquantized. What an input inherits from the layers before stays."""
    changed = onnx.ModelProto()
    changed.CopyFrom(quantized)
    for name in names:
        _free_layer(source, changed, quantizers, name)
    del changed.graph.value_info[:]
    return changed


def _free_layer(source: SourceModel, changed: onnx.ModelProto, quantizers: Mapping[str, onnx.NodeProto], name: str) -> None:
    graph = source.graph
    node = next(node for node in graph.weighted if node.name == name)
    position, target = next((i, n) for i, n in enumerate(changed.graph.node) if n.name == name)
    _restore_constants(source, node, changed, target)
    operand = node.inputs[0]
    quantizer = quantizers.get(operand)
    if quantizer is None:
        return
    origin = quantizer.input[0]
    serving = next((n for n in changed.graph.node if origin in n.output and n.name in (f"{operand}_Clip", f"{operand}_Add")), None)
    origin = serving.input[0] if serving is not None else origin  # which keeps the value's floats in range, or adds zero
    absorbed_node = graph.producer.get(operand)
    if origin != operand and absorbed_node is not None and absorbed_node.op_type in FUSED_ACTIVATIONS:  # by the quantizer: put it back
        restored = operand + _FED
        if not any(restored in other.output for other in changed.graph.node):
            absorbed = onnx.NodeProto()
            absorbed.CopyFrom(source.node_protos[absorbed_node.name])
            absorbed.name, absorbed.input[0], absorbed.output[0] = f"{restored}_node", origin, restored
            present = {tensor.name for tensor in changed.graph.initializer}
            for value in absorbed.input[1:]:
                if value in source.constants and value not in present:
                    changed.graph.initializer.append(numpy_helper.from_array(np.array(source.constants[value]), value))
            changed.graph.node.insert(position, absorbed)
            target = next(n for n in changed.graph.node if n.name == name)
        origin = restored
    target.input[0] = origin
