"""What is added to a convolution's channels, or multiplies them, behind a change of axes: in the convolution, for integer kernels."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from . import large
from .graph import ONNX_DOMAINS
from .protos import read_counts, replace_nodes, value_names

_AXES = ("Squeeze", "Unsqueeze", "Transpose")


def fold_channels(graph: onnx.GraphProto) -> None:
    """Fold constants by channel into the convolution that they follow, over Squeeze, Unsqueeze and Transpose.

    ONNX Runtime folds those that follow at once. Converters write convolutions of sequences as ones of images with a height of 1, so that
    their biases and normalizations come behind the Squeeze.
    """
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    readers = read_counts(graph)
    producer = {node.output[0]: node for node in graph.node if len(node.output) == 1}
    taken = value_names(graph)
    folded: set[int] = set()
    for position, node in enumerate(graph.node):
        if node.op_type not in ("Add", "Mul") or node.domain not in ONNX_DOMAINS:
            continue
        computed, constants = ([name for name in node.input if (name in tensors) == is_constant] for is_constant in (False, True))
        if len(computed) != 1 or len(constants) != 1 or tensors[constants[0]].data_type != TensorProto.FLOAT:
            continue
        layer, moves = _layer_of(computed[0], producer, readers)
        if layer is None or not moves or layer.input[1] not in tensors or any(name and name not in tensors for name in layer.input[2:]):
            continue
        values = _by_channel(large.array(tensors[constants[0]]), list(tensors[layer.input[1]].dims), moves, tensors)
        if values is None or not _fold(node.op_type, layer, values, graph, tensors, readers, taken):
            continue
        moves[-1].output[0] = node.output[0]
        producer[node.output[0]] = moves[-1]
        folded.add(position)
    replace_nodes(graph, [node for position, node in enumerate(graph.node) if position not in folded])


def _layer_of(
    value: str, producer: Mapping[str, onnx.NodeProto], readers: Counter[str]
) -> tuple[onnx.NodeProto | None, Sequence[onnx.NodeProto]]:
    """The convolution whose result alone a value is, and the changes of its axes, in their order."""
    moves: list[onnx.NodeProto] = []
    while (node := producer.get(value)) is not None and readers[value] == 1 and node.domain in ONNX_DOMAINS:
        if node.op_type == "Conv":
            return node, moves[::-1]
        if node.op_type not in _AXES:
            break
        moves.append(node)
        value = node.input[0]
    return None, ()


def _by_channel(
    constant: np.ndarray, weight: Sequence[int], moves: Iterable[onnx.NodeProto], tensors: Mapping[str, onnx.TensorProto]
) -> np.ndarray | None:
    """One number for each channel of a convolution with a weight of this shape; None where a constant differs along other axes too."""
    order: list[int | None] = list(range(len(weight)))  # the axes of the convolution's result where they are now; None for a new one
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
    if 1 not in order or constant.ndim > len(order):
        return None
    shape = [1] * (len(order) - constant.ndim) + list(constant.shape)
    if any(size != 1 for place, size in enumerate(shape) if order[place] != 1) or shape[order.index(1)] not in (1, weight[0]):
        return None
    return np.broadcast_to(constant.reshape(-1), weight[0]).astype(np.float32)


def _permutation(node: onnx.NodeProto, rank: int) -> Sequence[int]:
    return next((list(a.ints) for a in node.attribute if a.name == "perm"), list(range(rank))[::-1])


def _fold(
    kind: str,
    layer: onnx.NodeProto,
    values: np.ndarray,
    graph: onnx.GraphProto,
    tensors: dict[str, onnx.TensorProto],
    readers: Counter[str],
    taken: set[str],
) -> bool:
    """Change the weight and the bias of a convolution, or give it others where something else reads them; whether names were free."""
    weight, bias = layer.input[1], layer.input[2] if len(layer.input) > 2 else ""
    own = {name: f"{layer.output[0]}_{ending}" for name, ending in ((weight, "weight"), (bias, "bias")) if not name or readers[name] > 1}
    if not taken.isdisjoint(own.values()):
        return False
    shift = large.array(tensors[bias]) if bias else np.zeros_like(values)
    changed = {bias: shift + values if kind == "Add" else shift * values}
    if kind == "Mul":
        changed[weight] = large.array(tensors[weight]) * values.reshape(-1, *[1] * (len(tensors[weight].dims) - 1))
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
    inputs = [layer.input[0], own.get(weight, weight) if kind == "Mul" else weight, own.get(bias, bias)]
    del layer.input[:]
    layer.input.extend(inputs)
    return True
