"""What of a model's weights and biases stays float, and why."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from onnx import TensorProto

from .graph import Node
from .quant_table import QuantSpec
from .source import SourceModel, ValueTypes
from .stored import CONTROL_FLOW, RECURRENT

ON_REQUEST = "kept float on request"
UNSOUND = "NaN or infinite numbers have no codes"
_LARGE = 4096  # numbers of a constant that is worth a word
_FUSED = frozenset({"Attention", "EmbedLayerNormalization"})  # of com.microsoft, with weights among their inputs


@dataclass(frozen=True)
class FloatRow:
    """A node with weights that stays float, and why."""

    node: str
    op_type: str
    reason: str


def reasons_of(keep_float: AbstractSet[str], islands: Mapping[str, str]) -> dict[str, str]:
    """Why nodes are left alone, by name."""
    return {name: f"in a float island: {reason}" for name, reason in islands.items()} | dict.fromkeys(keep_float, ON_REQUEST)


def float_reason(source: SourceModel, types: ValueTypes, node: Node, reasons: Mapping[str, str]) -> str | None:
    """Why a node that has weights stays float; None for quantized nodes and for nodes without weights."""
    graph = source.graph
    weight = graph.weight(node)
    if weight is None:
        if node.op_type in RECURRENT or (node.op_type in _FUSED and not node.is_standard):
            return "no integer form of this operator is supported"
        if node.op_type == "Einsum" and any(name in graph.constants for name in node.inputs):
            return "no integer form of its equation is supported"
        return None
    if node.name in reasons:
        return reasons[node.name]
    if source.constants[weight].dtype.name != "float32":
        return f"its weight is {source.constants[weight].dtype.name}, not float32"
    if source.constants[weight].size == 0:
        return "its weight is empty"
    if source.constants[weight].ndim < 2:
        return "its weight is a vector"
    if weight in source.unsound:
        return f"its weight cannot be on a grid: {UNSOUND}"
    if any(output.name == weight for output in source.model.graph.output):
        return "its weight is an output of the model, too"
    if any(
        graph.weight(reader) != weight or reader.inputs.count(weight) > 1 or reader.name in reasons for reader in graph.readers_of(weight)
    ):
        return "its weight is read by a node that stays float, too"
    if types.dtypes.get(node.inputs[0]) != TensorProto.FLOAT:
        return "the type of its input is not known to be float32"
    return None


def float_bias_reason(source: SourceModel, node: Node, bias: str) -> str | None:
    """Why the bias of a quantized layer stays float; None where it can have int32 codes."""
    array = source.constants[bias]
    if node.op_type == "ConvTranspose":
        return "transposed convolutions run in float"
    if array.dtype.name != "float32":
        return f"it is {array.dtype.name}"
    if bias in source.unsound:
        return UNSOUND
    if len(source.graph.readers_of(bias)) > 1 or node.inputs.count(bias) > 1:
        return "several nodes share it"
    channels = source.constants[node.inputs[1]].shape[source.channel_axis(node)]
    if array.size != channels or array.shape[-1:] != (channels,):
        return f"its shape {list(array.shape)} is not one value per channel"
    attributes = {a.name: a.f for a in source.node_protos[node.name].attribute}
    if node.op_type == "Gemm" and (attributes.get("alpha", 1.0), attributes.get("beta", 1.0)) != (1.0, 1.0):
        return "Gemm scales it (alpha or beta is not 1)"
    return None


def other_constants(source: SourceModel) -> list[FloatRow]:
    """Large constants that are no weights: what some layer adds, a table that is sliced."""
    graph = source.graph
    known = {name for node in graph.nodes for name in source.weights_of(node)} | source.stored.keys()
    rows = []
    for name, array in source.constants.items():
        if name not in known and array.dtype.name == "float32" and array.size >= _LARGE and (readers := graph.readers_of(name)):
            what = f"{name!r}, {array.size:,} numbers: neither an operand of a layer nor looked up"
            rows.append(FloatRow(readers[0].name, readers[0].op_type, what))
    return rows


def with_storage(source: SourceModel, floats: Sequence[FloatRow], stored: Mapping[str, QuantSpec]) -> list[FloatRow]:
    """Say of nodes that compute in float that their weights are codes all the same; add control flow, which has no row of its own."""
    held: dict[str, list[str]] = {}
    nodes = {node.name: node for node in source.graph.nodes}
    for name in stored:
        use = source.stored.get(name)
        for node in use.nodes if use is not None else [n.name for n in source.graph.readers_of(name)]:
            if use is None or not use.is_table:
                held.setdefault(node, []).append(name)
    rows = [row for row in floats if row.node not in held]
    reasons = {row.node: row.reason for row in floats}
    for node, names in held.items():
        count, bits = sum(source.constants[name].size for name in names), max(stored[name].bits for name in names)
        kind = nodes[node].op_type
        own = f"what is inside {kind} runs in float" if kind in CONTROL_FLOW else f"no integer form of this {kind} is supported"
        reason = reasons.get(node, own)
        rows.append(FloatRow(node, kind, f"{reason}; its {count:,} weights are stored as {bits}-bit codes"))
    return rows
