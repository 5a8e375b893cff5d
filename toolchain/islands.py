"""Float islands: the nodes that torch cannot run, left to ONNX Runtime, so that no operator ever blocks a model.

An island is a piece of the graph between units. It runs like a `TorchBlock` on values known by their ONNX names, so that the stages that
move activations need not know of it. Gradients never cross the boundary of a unit, so nothing around an island loses by it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from . import runtime
from .graph import WEIGHT_INPUT, Graph, Node
from .partition import Block
from .protos import subgraphs
from .source import QUANTIZED_OPS, SourceModel, ValueTypes
from .stored import CONTROL_FLOW
from .torch_import import Observer, can_import

_RANDOM = frozenset({"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"})
_DATA_DEPENDENT = frozenset({"NonMaxSuppression", "NonZero", "Unique", "Compress"})
# The element types that torch and NumPy share.
_TORCH_TYPES = frozenset(
    {
        TensorProto.FLOAT,
        TensorProto.FLOAT16,
        TensorProto.DOUBLE,
        TensorProto.INT8,
        TensorProto.INT16,
        TensorProto.INT32,
        TensorProto.INT64,
        TensorProto.UINT8,
        TensorProto.BOOL,
    }
)


@dataclass(frozen=True)
class IslandRow:
    """One island as the report shows it: its block, nodes with their operator types, why each is there, and the weights it holds."""

    block: str
    nodes: tuple[str, ...]
    operators: tuple[str, ...]
    reasons: tuple[str, ...]
    weights: int


@dataclass(frozen=True)
class Island:
    """Runs the nodes of a block in ONNX Runtime; called like a `TorchBlock`, with its weights among the values."""

    block: Block
    source: SourceModel
    types: ValueTypes
    device: torch.device

    @cached_property
    def weights(self) -> tuple[str, ...]:
        """The constants of its nodes that may be on a grid."""
        return tuple(dict.fromkeys(name for node in self.block.nodes for name in self.source.weights_of(node)))

    def __call__(self, values: Mapping[str, Any], observe: Observer | None = None) -> dict[str, Any]:
        """Compute the block's outputs. What is no tensor for torch (strings, sequences) is handed on as ONNX Runtime made it.

        Args:
            values: the block's inputs and weights by name.
            observe: called with the name and tensor of every output that is a tensor; what it returns takes its place.
        """
        fed = {name: _fed(values[name]) for name in (*self.block.inputs, *self.weights)}
        made = runtime.execute(self._session, fed, self.block.outputs)
        outputs = {name: self._taken(name, value) for name, value in made.items()}
        if observe is None:
            return outputs
        return {name: observe(name, value) if isinstance(value, torch.Tensor) else value for name, value in outputs.items()}

    @cached_property
    def _session(self) -> runtime.Session:
        return runtime.session(cut(self.source, self.types, self.block, self.weights), optimization=runtime.Optimization.BASIC)

    def _taken(self, name: str, value: Any) -> Any:
        if self.types.dtypes.get(name) not in _TORCH_TYPES:
            return value
        array = np.asarray(value)
        return torch.from_numpy(array if array.flags.writeable else array.copy()).to(self.device)


def find_islands(source: SourceModel, types: ValueTypes) -> dict[str, str]:
    """The nodes that torch cannot run, by name, each with the reason."""
    found: dict[str, str] = {}
    for node in source.graph.nodes:
        reason = _foreign(source.graph, types, node)
        refusal = can_import(source, types, node) if reason is None else None
        if refusal is not None:
            unknown = refusal == "Converter is not implemented"
            reason = f"{node.op_type} has no torch converter" if unknown else f"{node.op_type} has no torch converter for this: {refusal}"
        if reason is not None:
            found[node.name] = reason
    return found


def island_rows(source: SourceModel, blocks: Iterable[Block], reasons: Mapping[str, str]) -> tuple[IslandRow, ...]:
    """What a report says of the islands among the blocks. Weights that several share are held by the first."""
    rows, counted = [], set[str]()
    for block in blocks:
        if block.is_island:
            why = tuple(dict.fromkeys(reasons[node.name] for node in block.nodes if node.name in reasons))
            own = {name for node in block.nodes for name in source.weights_of(node) if name != source.graph.bias(node)} - counted
            held = sum(source.constants[name].size for name in own) + sum(held_weights(source, node) for node in block.nodes)
            counted |= own
            kinds = tuple(dict.fromkeys(node.op_type for node in block.nodes))
            rows.append(IslandRow(block.name, tuple(node.name for node in block.nodes), kinds, why, held))
    return tuple(rows)


def held_weights(source: SourceModel, node: Node) -> int:
    """How many weights of Conv, Gemm and MatMul nodes are left inside the subgraphs of a control-flow node."""
    return sum(_inner_weights(graph) for graph in subgraphs(source.node_protos[node.name]))


def cut(source: SourceModel, types: ValueTypes, block: Block, fed: Sequence[str] = ()) -> onnx.ModelProto:
    """The nodes of a block as a model of their own, with the constants they read; those that are `fed` are inputs of it."""
    names = {name for node in block.nodes for name in node.inputs} - set(fed)
    arrays = {name: source.constants[name] for name in fed}
    inputs = [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in arrays.items()]
    for name in block.inputs:
        if name in types.others:
            inputs.append(helper.make_value_info(name, types.others[name]))
        else:
            inputs.append(helper.make_tensor_value_info(name, types.dtypes.get(name, TensorProto.FLOAT), None))
    graph = helper.make_graph(
        [source.node_protos[node.name] for node in block.nodes],
        block.name,
        inputs,
        [onnx.ValueInfoProto(name=name) for name in block.outputs],
        [tensor for tensor in source.model.graph.initializer if tensor.name in names],
    )
    return helper.make_model(graph, opset_imports=list(source.model.opset_import), ir_version=source.model.ir_version)


def _foreign(graph: Graph, types: ValueTypes, node: Node) -> str | None:
    """Why a node is none of torch's business, whatever converters there are."""
    if node.op_type in CONTROL_FLOW and node.is_standard:
        return f"{node.op_type} is control flow"
    if node.op_type in QUANTIZED_OPS or node.op_type.startswith("QLinear"):
        return f"{node.op_type} is quantized already"
    if node.op_type in _RANDOM and node.is_standard:
        return f"{node.op_type} draws random numbers"
    if node.op_type in _DATA_DEPENDENT and node.is_standard:
        return f"the size of what {node.op_type} makes follows from the data"
    for value in (*graph.data_inputs(node), *(v for v in node.outputs if v)):
        if value in types.others:
            return f"{node.op_type} works on {types.others[value].WhichOneof('value').removesuffix('_type')}s"
        if types.dtypes.get(value) not in _TORCH_TYPES:
            kind = types.dtypes.get(value)
            return f"{node.op_type} works on {TensorProto.DataType.Name(kind).lower() if kind else 'unknown'} tensors"
    return None


def _inner_weights(graph: onnx.GraphProto) -> int:
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            sizes[node.output[0]] = sum(int(np.prod(a.t.dims)) for a in node.attribute if a.name == "value")
    own = sum(sizes.get(node.input[WEIGHT_INPUT[node.op_type]], 0) for node in graph.node if node.op_type in WEIGHT_INPUT)
    return own + sum(_inner_weights(inner) for node in graph.node for inner in subgraphs(node))


def _fed(value: Any) -> Any:
    return np.asarray(value.detach().cpu().numpy(), order="C") if isinstance(value, torch.Tensor) else value
