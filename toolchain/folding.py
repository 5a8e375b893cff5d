"""What is added to the channels of a layer, or multiplies them, in the layer: for integer kernels, which know weights and biases only.

ONNX Runtime folds what follows a convolution at once and has one number, or one along the second axis, for each channel.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from . import large
from .graph import ONNX_DOMAINS, free_name
from .protos import defined, inferred_shapes, number_in, read_counts, replace_nodes

_AXES = ("Squeeze", "Unsqueeze", "Transpose")
_FOLDED = ("Add", "Sub", "Mul", "Div")
_LEAST = 1e-6  # of a factor, and of its inverse
_LARGEST_SHIFT = 1e3  # in multiples of what it is added to: float32 keeps four digits beside it


def fold_channels(model: onnx.ModelProto) -> None:
    """Fold constants by channel into the convolution or matrix product that they follow, over Squeeze, Unsqueeze and Transpose; in place.

    Converters write convolutions of sequences as ones of images with a height of 1, so that their biases and normalizations come behind the
    Squeeze; networks that scale their branches do so behind the product and its bias.
    """
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    readers = read_counts(graph)
    producer = {node.output[0]: node for node in graph.node if len(node.output) == 1}
    taken = set(defined(graph))
    shapes: dict[str, list[int]] | None = None
    folded: set[int] = set()
    for position, node in enumerate(graph.node):
        if node.op_type not in _FOLDED or node.domain not in ONNX_DOMAINS:
            continue
        computed, constants = ([name for name in node.input if (name in tensors) == is_constant] for is_constant in (False, True))
        if len(computed) != 1 or len(constants) != 1 or tensors[constants[0]].data_type != TensorProto.FLOAT:
            continue
        if node.op_type in ("Sub", "Div") and node.input[0] != computed[0]:
            continue
        layer = _layer_of(computed[0], producer, readers, tensors)
        if layer is None:
            continue
        if layer.rank is None:
            shapes = inferred_shapes(model) if shapes is None else shapes
            layer = replace(layer, rank=len(shapes.get(computed[0], [])) or None)
        values = _by_channel(large.array(tensors[constants[0]]), layer, tensors)
        if values is None or not np.isfinite(values := _inverse(node.op_type, values)).all():
            continue
        kind = "Add" if node.op_type in ("Add", "Sub") else "Mul"
        if not _fold(kind, layer, values, graph, tensors, readers, taken):
            continue
        last = layer.last
        last.output[0] = node.output[0]
        producer[node.output[0]] = last
        folded.add(position)
    replace_nodes(graph, [node for position, node in enumerate(graph.node) if position not in folded])


def fold_numbers(graph: onnx.GraphProto) -> None:
    """Fold a number that multiplies or shifts what layers alone read into these layers, in place.

    s x + b in front of weights W is x + b / s in front of s W, whatever a convolution pads with zeros; in front of layers that pad nothing
    the shift is a bias. Networks have such numbers as learned ones behind an activation.
    """
    folder, candidates = _Numbers(graph), [node for node in graph.node if node.op_type in _FOLDED]
    gone: list[onnx.NodeProto] = []
    for node in reversed(candidates):  # the last of several first
        if folder.folds(node):
            gone.append(node)
    names = {node.output[0] for node in gone}
    replace_nodes(graph, [node for node in graph.node if not (node.output and node.output[0] in names)])


class _Numbers:
    """Changes layers of one graph, whose nodes stay; those whose number was folded have no readers any more."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        self._counts = read_counts(graph)
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for value in dict.fromkeys(node.input):
                self._readers.setdefault(value, []).append(node)
        self._producer = {node.output[0]: node for node in graph.node if node.output}
        self._taken = set(defined(graph))

    def folds(self, node: onnx.NodeProto) -> bool:
        """Fold the number of a node, where that can be done."""
        x, number = self._parts(node)
        if x is None or number is None or not np.isfinite(number):
            return False
        is_factor = node.op_type in ("Mul", "Div")
        if not (self._fold_factor(node, x, number) if is_factor else self._fold_shift(node, number)):
            return False
        value, behind = node.output[0], self._readers.pop(node.output[0])
        for reader in behind:
            reader.input[:] = [x if name == value else name for name in reader.input]
        self._readers[x] = [reader for reader in self._readers[x] if reader is not node] + behind
        self._counts[x] += self._counts.pop(value) - 1
        return True

    def _fold_factor(self, node: onnx.NodeProto, x: str, number: float) -> bool:
        """A factor, and what is added behind it, where layers follow whose weights nothing else reads."""
        factor = 1 / number if node.op_type == "Div" and number else number
        if not _LEAST < abs(factor) < 1 / _LEAST or self._is_gelu(x):
            return False
        value, shifts = node.output[0], list[onnx.NodeProto]()
        while self._counts[value] == len(only := self._readers.get(value, [])) == 1 and only[0].op_type in ("Add", "Sub"):
            shift = self._parts(only[0])[1]
            if shift is None or abs(shift) >= _LARGEST_SHIFT * abs(factor):
                break
            shifts.append(only[0])
            value = only[0].output[0]
        layers = self._layers(value)
        if not layers or any(self._counts[layer.input[1]] > 1 for layer in layers):
            return False
        for shift in shifts:
            index = next(i for i, name in enumerate(shift.input) if name in self._tensors)
            shift.input[index] = self._constant(f"{shift.output[0]}_shift", self._array(shift.input[index]) / np.float32(factor))
        for layer in layers:
            tensor = self._tensors[layer.input[1]]
            tensor.CopyFrom(numpy_helper.from_array(large.array(tensor) * np.float32(factor), tensor.name))
        return True

    def _fold_shift(self, node: onnx.NodeProto, number: float) -> bool:
        """What is added, where layers follow that read nothing but it, and have a place for a bias."""
        layers = self._layers(node.output[0])
        if not layers or not all(map(self._takes_bias, layers)):
            return False
        number = -number if node.op_type == "Sub" else number
        for layer in layers:
            weight = self._array(layer.input[1])
            is_turned = any(a.name == "transB" and a.i for a in layer.attribute)
            summed = (0,) if layer.op_type == "Gemm" and not is_turned else tuple(range(1, weight.ndim))
            alpha = next((a.f for a in layer.attribute if a.name == "alpha"), 1.0)
            added = (np.float32(alpha * number) * weight.sum(summed, np.float64)).astype(np.float32)
            bias = layer.input[2] if len(layer.input) > 2 else ""
            name = self._constant(f"{layer.output[0]}_bias", added if not bias else self._array(bias) + added)
            del layer.input[2:]
            layer.input.append(name)
        return True

    def _parts(self, node: onnx.NodeProto) -> tuple[str | None, float | None]:
        """What is computed of a node's operands, and the other where it is one number."""
        constants = [name for name in node.input if name in self._tensors]
        if node.domain not in ONNX_DOMAINS or len(node.input) != 2 or len(constants) != 1:
            return None, None
        if node.op_type in ("Div", "Sub") and node.input[0] in self._tensors:
            return None, None
        return next(name for name in node.input if name not in self._tensors), number_in(self._tensors[constants[0]])

    def _layers(self, value: str) -> Sequence[onnx.NodeProto]:
        """The layers with float32 weights that alone read a value, as what they multiply; none where others do."""
        layers = self._readers.get(value, [])
        return layers if self._counts[value] == len(layers) and all(self._multiplies(layer, value) for layer in layers) else ()

    def _multiplies(self, node: onnx.NodeProto, value: str) -> bool:
        is_layer = node.op_type in ("Conv", "Gemm", "MatMul") and node.domain in ONNX_DOMAINS and node.input[0] == value
        return is_layer and node.input[1] in self._tensors and self._tensors[node.input[1]].data_type == TensorProto.FLOAT

    def _takes_bias(self, layer: onnx.NodeProto) -> bool:
        attributes = {a.name: helper.get_attribute_value(a) for a in layer.attribute}
        if layer.op_type == "Gemm":
            has_bias = len(layer.input) < 3 or not layer.input[2] or layer.input[2] in self._tensors
            return has_bias and attributes.get("beta", 1.0) == 1.0
        if layer.op_type != "Conv" or not all(name in self._tensors for name in layer.input[2:] if name):
            return False
        return not any(attributes.get("pads", ())) and attributes.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")

    def _is_gelu(self, value: str) -> bool:
        """Whether a value is x (1 + erf(...)) or x (1 + tanh(...)), which ONNX Runtime fuses with the 1 / 2 that follows."""
        product = self._producer.get(value)
        if product is None or product.op_type != "Mul" or not self._tensors.keys().isdisjoint(product.input):
            return False
        sums = [self._producer.get(name) for name in product.input]
        inside = [self._producer.get(name) for one in sums if one is not None and one.op_type == "Add" for name in one.input]
        return any(node is not None and node.op_type in ("Erf", "Tanh") for node in inside)

    def _array(self, name: str) -> np.ndarray:
        return large.array(self._tensors[name])

    def _constant(self, name: str, array: np.ndarray) -> str:
        name = free_name(name, self._taken)
        self._graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array, np.float32) if array.ndim else array, name))
        self._tensors[name] = self._graph.initializer[-1]
        self._counts[name] = 1
        return name


def _inverse(kind: str, values: np.ndarray) -> np.ndarray:
    """What to add in place of subtracting values, or to multiply with in place of dividing by them."""
    if kind == "Sub":
        return -values
    with np.errstate(divide="ignore", over="ignore"):
        return 1 / values if kind == "Div" else values


@dataclass(frozen=True)
class _Layer:
    """A layer with constant weights whose result alone a value is, the Add of its bias where that is a node, and the moves behind.

    `rank` counts the axes of the result, of which `axis` are the channels; the weight has them as its `channels`. None: not known, the last
    one.
    """

    node: onnx.NodeProto
    added: onnx.NodeProto | None
    moves: Sequence[onnx.NodeProto]
    channels: int
    axis: int
    rank: int | None

    @property
    def last(self) -> onnx.NodeProto:
        """The node that makes the value."""
        return self.moves[-1] if self.moves else self.added if self.added is not None else self.node

    @property
    def weight(self) -> str:
        return self.node.input[1]


def _layer_of(
    value: str, producer: Mapping[str, onnx.NodeProto], readers: Counter[str], tensors: Mapping[str, onnx.TensorProto]
) -> _Layer | None:
    """The layer whose result alone a value is, behind changes of its axes."""
    moves: list[onnx.NodeProto] = []
    added: onnx.NodeProto | None = None
    while (node := producer.get(value)) is not None and readers[value] == 1 and node.domain in ONNX_DOMAINS:
        has_weight = node.op_type in ("Conv", "Gemm", "MatMul") and node.input[0] not in tensors and node.input[1] in tensors
        if has_weight and all(not name or name in tensors for name in node.input[2:]):
            dims, behind = tensors[node.input[1]].dims, moves[::-1]
            if node.op_type == "Conv" and added is None:
                return _Layer(node, None, behind, 0, 1, len(dims))
            if node.op_type == "Gemm" and added is None:
                is_turned = any(a.name == "transB" and a.i for a in node.attribute)
                return _Layer(node, None, behind, 0 if is_turned else 1, 1, 2)
            if node.op_type == "MatMul" and len(dims) == 2:
                rank = len(_permutation(behind[0], 0)) if behind and behind[0].op_type == "Transpose" else None
                return _Layer(node, added, behind, 1, -1, rank) if rank or not behind else None
            return None
        if node.op_type == "Add" and added is None and any(_is_vector(name, tensors) for name in node.input):
            added = node
            value = next((name for name in node.input if name not in tensors), "")
            continue
        if node.op_type not in _AXES or added is not None:
            break
        moves.append(node)
        value = node.input[0]
    return None


def _is_vector(name: str, tensors: Mapping[str, onnx.TensorProto]) -> bool:
    return name in tensors and len(tensors[name].dims) == 1 and tensors[name].data_type == TensorProto.FLOAT


def _by_channel(constant: np.ndarray, layer: _Layer, tensors: Mapping[str, onnx.TensorProto]) -> np.ndarray | None:
    """One number for each channel of a layer; None where a constant differs along other axes too."""
    count = tensors[layer.weight].dims[layer.channels]
    if layer.rank is None:
        is_last = constant.size == 1 or (constant.ndim > 0 and constant.shape[-1] == constant.size == count)
        return np.broadcast_to(constant.reshape(-1), count).astype(np.float32) if is_last and constant.ndim <= 1 else None
    axis = layer.axis % layer.rank
    order = _moved(list(range(layer.rank)), layer.moves, tensors)
    if order is None or axis not in order or constant.ndim > len(order):
        return None
    shape = [1] * (len(order) - constant.ndim) + list(constant.shape)
    if any(size != 1 for place, size in enumerate(shape) if order[place] != axis) or shape[order.index(axis)] not in (1, count):
        return None
    return np.broadcast_to(constant.reshape(-1), count).astype(np.float32)


def _moved(order: list[int | None], moves: Iterable[onnx.NodeProto], tensors: Mapping[str, onnx.TensorProto]) -> list[int | None] | None:
    """The axes of a layer's result where they are behind some moves, None for a new one; None where that is not known."""
    for node in moves:
        if node.op_type == "Transpose":
            order = [order[axis] for axis in _permutation(node, len(order))]
            continue
        tensor = tensors.get(node.input[1]) if len(node.input) > 1 else None
        if tensor is None:
            return None
        axes = [int(axis) for axis in large.array(tensor).reshape(-1)]
        rank = len(order) + (len(axes) if node.op_type == "Unsqueeze" else 0)
        places = {axis % rank for axis in axes}
        if node.op_type == "Squeeze":
            order = [axis for place, axis in enumerate(order) if place not in places]
        else:
            rest = iter(order)
            order = [None if place in places else next(rest) for place in range(rank)]
    return order


def _permutation(node: onnx.NodeProto, rank: int) -> Sequence[int]:
    return next((list(a.ints) for a in node.attribute if a.name == "perm"), list(range(rank))[::-1])


def _fold(
    kind: str,
    layer: _Layer,
    values: np.ndarray,
    graph: onnx.GraphProto,
    tensors: dict[str, onnx.TensorProto],
    readers: Counter[str],
    taken: set[str],
) -> bool:
    """Change the weight and the bias of a layer, or give it others where something else reads them; whether it has a place for them."""
    node, weight = layer.node, layer.weight
    if layer.added is not None:
        holder, index = layer.added, next(i for i, name in enumerate(layer.added.input) if name in tensors)
    else:
        holder, index = node, 2
    bias = holder.input[index] if index < len(holder.input) else ""
    if bias == weight:
        return False
    if kind == "Add" and node.op_type == "MatMul" and layer.added is None:
        return False  # which has no bias: the Add stays behind it
    if kind == "Mul" and readers[weight] > 1 and not layer.moves:
        return False  # heads that share their weights, with a scale for each: copies would not be shared
    if node.op_type == "Gemm" and (kind == "Add" or bias) and any(a.name == "beta" and a.f != 1 for a in node.attribute):
        return False
    shift = large.array(tensors[bias]) if bias else np.zeros_like(values)
    changed: dict[str, np.ndarray] = {}
    if bias or kind == "Add":
        changed[bias] = shift + values if kind == "Add" else shift * values
    if kind == "Mul":
        array = large.array(tensors[weight])
        with np.errstate(over="ignore"):
            changed[weight] = array * values.reshape([-1 if axis == layer.channels else 1 for axis in range(array.ndim)])
    if not all(np.isfinite(array).all() for array in changed.values()):
        return False
    own = {name: f"{node.output[0]}_{'weight' if name == weight else 'bias'}" for name in changed if not name or readers[name] > 1}
    if not taken.isdisjoint(own.values()):
        return False
    for name, array in changed.items():
        new = own.get(name, name)
        made = numpy_helper.from_array(np.ascontiguousarray(array, np.float32), new)
        if new in tensors:
            tensors[new].CopyFrom(made)
        else:
            graph.initializer.append(made)
            tensors[new] = graph.initializer[-1]
            taken.add(new)
            readers[name] -= 1
            readers[new] = 1
    node.input[1] = own.get(weight, weight)
    if bias in own:
        while len(holder.input) <= index:
            holder.input.append("")
        holder.input[index] = own[bias]
    return True
