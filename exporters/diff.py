"""What quantization changed in a graph, and whether anything else did: quantizers looked through, the rest held against the float model.

Nothing here relies on the names that this project gives. A file of another tool is compared as well, as long as it keeps the names of the
float model's values.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper, version_converter

from toolchain.repeats import without_repeats

from . import fusions, swishes

_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
_FOLDED = ("Relu", "Clip")


@dataclass(frozen=True)
class Grid:
    """The parameters of a quantized value, and the integers of a constant; `axis` is that of the channels, `block` their stretch."""

    kind: str
    scale: np.ndarray
    zero_point: np.ndarray
    axis: int
    block: int
    codes: np.ndarray | None = None

    def dequantized(self) -> np.ndarray:
        """The constant that the codes stand for."""
        assert self.codes is not None
        scale, zero_point = (self._expanded(np.asarray(p, np.float32)) for p in (self.scale, self.zero_point))
        return (np.asarray(self.codes, np.float32) - zero_point) * scale

    def steps(self, difference: np.ndarray) -> np.ndarray:
        """Differences of the constant in steps of its grid."""
        return difference / self._expanded(np.asarray(self.scale, np.float32))

    def _expanded(self, parameter: np.ndarray) -> np.ndarray:
        assert self.codes is not None
        if parameter.size == 1:
            return parameter.reshape(())
        axis = self.axis % self.codes.ndim
        if self.block:
            return np.repeat(parameter, self.block, axis=axis).take(np.arange(self.codes.shape[axis]), axis=axis)
        return parameter.reshape([-1 if position == axis else 1 for position in range(self.codes.ndim)])


@dataclass(frozen=True)
class Constant:
    """A constant that changed: how far it moved in steps of its grid (None: it is floats still), and the signal to noise in dB.

    `sqnr` is minus infinity where the constant was all zeros, as biases often are that correction then moves.
    """

    name: str
    kind: str
    steps: float | None
    sqnr: float


@dataclass(frozen=True)
class Difference:
    """What `compare` found. `changes` is what quantization does not explain: one line each, empty for a faithful file."""

    values: Mapping[str, Grid]
    constants: tuple[Constant, ...]
    folded: tuple[str, ...]
    kept: int
    changes: tuple[str, ...]


@dataclass(frozen=True)
class GridChange:
    """One value in two quantized files: the ratio of their scales, the percentage of codes that differ, and the largest difference."""

    name: str
    first: str
    second: str
    scale_ratio: float
    codes_percent: float | None
    most: int | None


class QdqGraph:
    """A graph with its quantizers looked through."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.producer = {value: node for node in model.graph.node for value in node.output if value}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for value in filter(None, dict.fromkeys(node.input)):
                self.readers.setdefault(value, []).append(node)

    @property
    def is_quantized(self) -> bool:
        return any(node.op_type in _QUANTIZERS for node in self.graph.node)

    def grid(self, value: str) -> Grid | None:
        """The grid of a dequantized value."""
        node = self.producer.get(value)
        if node is None or node.op_type != "DequantizeLinear" or node.input[1] not in self.constants or self._is_zero(node):
            return None
        scale = numpy_helper.to_array(self.constants[node.input[1]])
        has_zero = len(node.input) > 2 and node.input[2] in self.constants
        codes = self.constants.get(node.input[0])
        kind = self.constants[node.input[2]].data_type if has_zero else codes.data_type if codes is not None else TensorProto.UINT8
        zero_point = numpy_helper.to_array(self.constants[node.input[2]]) if has_zero else np.zeros(scale.shape, np.uint8)
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        parameters = (np.asarray(scale, np.float32), np.asarray(zero_point, np.float32), attributes.get("axis", 1))
        array = numpy_helper.to_array(codes) if codes is not None else None
        return Grid(TensorProto.DataType.Name(kind).lower(), *parameters, attributes.get("block_size", 0), array)

    def behind(self, value: str, known: frozenset[str]) -> str:
        """The value of the float graph that this one carries: quantizers, and what serves them, looked through.

        A quantized graph output has the name that the float graph gives to what is in front of the pair: `known` ends the way only after a
        step.
        """
        node = self.producer.get(value)
        while node is not None and (node.op_type in _QUANTIZERS or (value not in known and self.serves(node))):
            value = node.input[0]
            if value in known and (made := self.producer.get(value)) is not None and made.op_type not in _QUANTIZERS:
                break
            node = self.producer.get(value)
        return value

    def serves(self, node: onnx.NodeProto) -> bool:
        """A node that only stands between quantizers."""
        return node.op_type == "Clip" or self.adds_zero(node) or self.passes_on(node)

    def passes_on(self, node: onnx.NodeProto) -> bool:
        """A Max with the least float, which keeps ONNX Runtime from what is behind (`kept_float`)."""
        least = self.constants.get(node.input[1]) if node.op_type == "Max" and len(node.input) == 2 else None
        return least is not None and least.dims == [] and numpy_helper.to_array(least) == np.finfo(np.float32).min

    def adds_zero(self, node: onnx.NodeProto) -> bool:
        """An Add of a dequantized zero: it lets a requantization run as an integer kernel."""
        zero = self.producer.get(node.input[1]) if node.op_type == "Add" else None
        return zero is not None and self._is_zero(zero)

    def is_gate(self, add: onnx.NodeProto, gate: onnx.NodeProto) -> bool:
        """Whether an Add of dequantized values has the slope and the shift of a HardSigmoid, as near as float32 has them."""
        scaled, number = (self.producer.get(value) for value in add.input)
        if scaled is None or number is None or scaled.op_type != "DequantizeLinear":
            return False
        codes = self.producer.get(scaled.input[0])
        codes = self.producer.get(codes.input[0]) if codes is not None and codes.op_type == "Clip" else codes
        grid = self.grid(number.output[0])
        shift = 0.0 if self._is_zero(number) else grid.dequantized() if grid is not None and grid.codes is not None else None
        if codes is None or codes.op_type != "QuantizeLinear" or shift is None:
            return False
        slope = np.divide(*(numpy_helper.to_array(self.constants[node.input[1]]).astype(np.float64) for node in (scaled, codes)))
        attributes = {attribute.name: attribute.f for attribute in gate.attribute}
        wanted = attributes.get("alpha", 0.2), attributes.get("beta", 0.5)
        return bool(np.allclose((float(slope), float(shift)), wanted, rtol=1e-4, atol=1e-9))  # `qdq` moves ties

    def _is_zero(self, node: onnx.NodeProto) -> bool:
        """A scalar that is its own zero point, dequantized."""
        if node.op_type != "DequantizeLinear" or len(node.input) < 3 or not self.constants.keys() >= {node.input[0], node.input[2]}:
            return False
        code, zero_point = (numpy_helper.to_array(self.constants[name]) for name in (node.input[0], node.input[2]))
        return code.shape == () and bool((code == zero_point).all())


def compare(source: onnx.ModelProto, quantized: onnx.ModelProto) -> Difference:
    """Hold a quantized file against the float model that it was made from.

    Args:
        source: the float model, normalised.
        quantized: a QDQ file of any tool that keeps the names of values.
    """
    quantized = fusions.joined(source.graph, without_repeats(quantized))
    source = _at_opset_of(source, quantized)
    before = QdqGraph(source)
    known = frozenset({*before.producer, *(value.name for value in before.graph.input)})
    if any(node.op_type == "HardSigmoid" for node in source.graph.node):
        quantized = _with_gates(before, quantized, known)
    after = QdqGraph(quantized)
    changes = [*_interface(source, quantized)]
    constants: dict[str, Constant] = {}
    folded: dict[str, None] = {}
    seen: set[int] = set()
    kept = 0
    for node in before.graph.node:
        found = _counterpart(node, before, after, known)
        if found is None:
            if node.op_type in _FOLDED and _is_folded(node, before, after, known):
                folded[node.name or node.output[0]] = None
            else:
                changes.append(f"{node.op_type} {node.name or node.output[0]}: is gone")
            continue
        seen.add(id(found))
        complaints = [*_node_changes(node, found, before, after, known, constants, folded)]
        changes += complaints
        kept += not complaints
    for node in after.graph.node:
        if id(node) not in seen and node.op_type not in _QUANTIZERS and not _serves_quantizers(node, after):
            changes.append(f"{node.op_type} {node.name or node.output[0]}: is new")
    values = {name: grid for name in after.producer if (grid := after.grid(name)) is not None and grid.codes is None}
    named = {after.behind(name, known): grid for name, grid in values.items()}
    return Difference(named, tuple(constants.values()), tuple(folded), kept, tuple(changes))


def compare_grids(first: onnx.ModelProto, second: onnx.ModelProto) -> tuple[list[GridChange], list[str], list[str]]:
    """The grids of two quantized files of one model: those that both have, and the names that only the first or only the second has."""
    one, two = (_grids(QdqGraph(model)) for model in (first, second))
    changes = []
    for name in one:
        if name not in two:
            continue
        a, b = one[name], two[name]
        ratio = float(np.max(b.scale) / np.max(a.scale))
        share = most = None
        if a.codes is not None and b.codes is not None and a.codes.shape == b.codes.shape:
            moved = np.abs(np.asarray(a.codes, np.float32) - np.asarray(b.codes, np.float32))
            share, most = 100.0 * float((moved > 0).mean()), int(moved.max(initial=0))
        changes.append(GridChange(name, a.kind, b.kind, ratio, share, most))
    return changes, [name for name in one if name not in two], [name for name in two if name not in one]


def _grids(graph: QdqGraph) -> dict[str, Grid]:
    """The grids of a file by the name of what is quantized, which every tool puts in front of `_scale`."""
    found = {name: grid for name in graph.producer if (grid := graph.grid(name)) is not None}
    return {graph.producer[name].input[1].removesuffix("_scale"): grid for name, grid in found.items()}


def _at_opset_of(source: onnx.ModelProto, quantized: onnx.ModelProto) -> onnx.ModelProto:
    """The source at the opset of the file, which packed integers raise."""
    opsets = [next((e.version for e in model.opset_import if e.domain in ("", "ai.onnx")), 0) for model in (source, quantized)]
    if opsets[0] >= opsets[1]:
        return source
    try:
        return version_converter.convert_version(source, opsets[1])
    except Exception:  # the C++ converter raises bare RuntimeErrors; then the differences of the opsets are listed
        return source


def _with_gates(before: QdqGraph, quantized: onnx.ModelProto, known: frozenset[str]) -> onnx.ModelProto:
    """The file with a HardSigmoid where an Add stands for the source's: of its operand's codes times the slope, and of the shift.

    What `swishes` spelled out is joined again.
    """
    file = QdqGraph(quantized)
    gates: dict[str, onnx.NodeProto] = {}

    def carries(value: str, wanted: str) -> bool:
        """Whether a value of the file is one of the source's, or what it is before a Relu or Clip that a quantizer took over."""
        origin = file.behind(value, known)
        origin = gates[origin].output[0] if origin in gates else origin
        while wanted != origin and (made := before.producer.get(wanted)) is not None and made.op_type in _FOLDED:
            wanted = made.input[0]
        return wanted == origin

    for gate in (node for node in before.graph.node if node.op_type == "HardSigmoid"):
        adds = (node for node in quantized.graph.node if node.op_type == "Add" and node.output[0] not in gates)
        found = next((add for add in adds if file.is_gate(add, gate) and carries(add.input[0], gate.input[0])), None)
        if found is not None:
            gates[found.output[0]] = gate
    changed = onnx.ModelProto()
    changed.CopyFrom(quantized)
    swishes.join(before.graph, changed.graph, lambda value: file.behind(value, known))
    for node in changed.graph.node:
        if node.op_type == "Add" and node.output[0] in gates:
            gate, scaled = gates[node.output[0]], node.input[0]
            node.CopyFrom(gate)
            node.input[0], node.output[0] = scaled, gate.output[0]
        elif node.op_type == "QuantizeLinear" and node.input[0] in gates:
            node.input[0] = gates[node.input[0]].output[0]
    return changed


def _interface(source: onnx.ModelProto, quantized: onnx.ModelProto) -> Iterator[str]:
    for what, first, second in (
        ("inputs", source.graph.input, quantized.graph.input),
        ("outputs", source.graph.output, quantized.graph.output),
    ):
        if [(v.name, v.type) for v in first] != [(v.name, v.type) for v in second]:
            names = (", ".join(value.name for value in side) for side in (first, second))
            yield f"graph {what}: {' -> '.join(names)}, or their types"
    props = {entry.key: entry.value for entry in quantized.metadata_props}
    for entry in source.metadata_props:
        if props.get(entry.key) != entry.value:
            yield f"metadata {entry.key}: changed"
    if source.graph.doc_string != quantized.graph.doc_string:
        yield "doc string of the graph: changed"


def _counterpart(node: onnx.NodeProto, before: QdqGraph, after: QdqGraph, known: frozenset[str]) -> onnx.NodeProto | None:
    """The node of the quantized graph that makes what this one makes, or what a folded Relu behind it made."""
    own = next(filter(None, node.output), "")  # a recurrent layer may leave its first result out
    readers = before.readers.get(own, [])
    behind = [readers[0].output[0]] if len(readers) == 1 and readers[0].op_type in _FOLDED else []
    for value in (own, *behind):
        made = after.producer.get(value)
        if made is not None and made.op_type in _QUANTIZERS:
            made = after.producer.get(after.behind(value, known - {value}))
        if made is not None and made.op_type == node.op_type:
            return made
    return None


def _is_folded(node: onnx.NodeProto, before: QdqGraph, after: QdqGraph, known: frozenset[str]) -> bool:
    """Whether a quantizer took over a Relu or Clip: it reads what the node reads, or the node in front makes what this one made."""
    origin = after.behind(node.input[0], known)
    made, front = after.producer.get(node.output[0]), before.producer.get(node.input[0])
    if made is not None and front is not None and made.op_type == front.op_type:
        return any(reader.op_type == "QuantizeLinear" for reader in after.readers.get(node.output[0], []))
    return any(reader.op_type == "QuantizeLinear" for reader in after.readers.get(origin, []))


def _serves_quantizers(node: onnx.NodeProto, after: QdqGraph) -> bool:
    """A Clip or an Add of zero whose every reader, or whose input, is a quantizer; a Max that passes on what it reads."""
    if after.passes_on(node):
        return True
    made = after.producer.get(node.input[0]) if after.serves(node) else None
    readers = after.readers.get(node.output[0], []) if after.serves(node) else []
    behind = made is not None and made.op_type == "QuantizeLinear"
    return behind or (bool(readers) and all(reader.op_type == "QuantizeLinear" for reader in readers))


def _node_changes(
    node: onnx.NodeProto,
    found: onnx.NodeProto,
    before: QdqGraph,
    after: QdqGraph,
    known: frozenset[str],
    constants: dict[str, Constant],
    folded: dict[str, None],
) -> Iterator[str]:
    where = f"{node.op_type} {node.name or node.output[0]}"
    if _attributes(node) != _attributes(found):
        yield f"{where}: its attributes changed"
    if node.doc_string != found.doc_string:
        yield f"{where}: its doc string changed"
    if len(node.input) != len(found.input):
        yield f"{where}: reads {len(found.input)} values in place of {len(node.input)}"
        return
    for name, value in zip(node.input, found.input, strict=True):
        if name in before.constants:
            yield from _constant_changes(where, name, value, before, after, constants)
            continue
        origin = value if value == name else after.behind(value, known)
        while name != origin:
            made = before.producer.get(name)
            if made is None or made.op_type not in _FOLDED:
                yield f"{where}: reads {origin!r} in place of {name!r}"
                break
            folded[made.name or made.output[0]] = None
            name = made.input[0]


def _constant_changes(
    where: str, name: str, value: str, before: QdqGraph, after: QdqGraph, constants: dict[str, Constant]
) -> Iterator[str]:
    array = numpy_helper.to_array(before.constants[name])
    grid = after.grid(value)
    if grid is not None and grid.codes is not None:
        if grid.codes.shape != array.shape:
            yield f"{where}: the shape of {name!r} changed from {list(array.shape)} to {list(grid.codes.shape)}"
            return
        now = grid.dequantized()
        steps = float(np.max(grid.steps(np.abs(now.astype(np.float64) - array)), initial=0.0))
        constants[name] = Constant(name, grid.kind, None if grid.kind.startswith("float") else steps, _sqnr(array, now))
        return
    if value not in after.constants:
        yield f"{where}: reads {value!r} in place of the constant {name!r}"
        return
    now = numpy_helper.to_array(after.constants[value])
    if now.dtype.kind in "iu" and array.dtype.kind == "f":
        return  # codes that are dequantized behind a lookup
    if now.shape != array.shape or now.dtype != array.dtype:
        yield f"{where}: the shape or type of {name!r} changed"
    elif not np.array_equal(now, array):
        constants[name] = Constant(name, now.dtype.name, None, _sqnr(array, now))


def _sqnr(array: np.ndarray, now: np.ndarray) -> float:
    """Signal to noise in dB; infinite where nothing changed, minus infinity where zeros did."""
    signal, noise = (float(np.square(numbers, dtype=np.float64).sum()) for numbers in (array, now.astype(np.float64) - array))
    if noise == 0:
        return float("inf")
    return float(10 * np.log10(signal / noise)) if signal > 0 else float("-inf")


def _attributes(node: onnx.NodeProto) -> dict[str, bytes]:
    """Attributes by name; of a body only the operators that are no quantizers, since its constants may be codes."""
    found = {}
    for attribute in node.attribute:
        if attribute.HasField("g"):
            kinds = sorted(inner.op_type for inner in attribute.g.node if inner.op_type not in _QUANTIZERS)
            found[attribute.name] = ",".join(kinds).encode()
        else:
            found[attribute.name] = attribute.SerializeToString(deterministic=True)
    return found
