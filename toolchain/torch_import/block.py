"""A block of the ONNX graph as a torch module over ONNX value names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from onnx import helper

from ..graph import ONNX_DOMAINS
from ..partition import Block
from ..source import SourceModel, ValueTypes
from . import convolution, fallback, linear, padding, pooling, reduction, shaping
from .operator import Converter

_CONVERTERS: Mapping[str, Converter] = {
    "Conv": convolution.conv,
    "ConvTranspose": convolution.conv_transpose,
    "Gemm": linear.gemm,
    "MatMul": linear.matmul,
    "MaxPool": pooling.max_pool,
    "AveragePool": pooling.average_pool,
    "GlobalMaxPool": pooling.global_max_pool,
    "Pad": padding.pad,
    "Reshape": shaping.reshape,
    "Slice": shaping.slice_,
    **reduction.CONVERTERS,
}
_SMALL = 65536  # elements: larger constants are never shapes or bounds, converters do not need to read them

Observer = Callable[[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class _Step:
    node: str
    call: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    frees: tuple[str, ...]


class TorchBlock(torch.nn.Module):
    """Runs the nodes of a block on tensors known by their ONNX value names.

    Weights and biases are arguments like any other value, in their ONNX layout: a quantized weight is fed by the name of the float one,
    and a weight that two nodes share is one tensor. Everything else constant is held as a buffer.
    """

    def __init__(self, block: Block, steps: tuple[_Step, ...], weights: tuple[str, ...], constants: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.block = block
        self.weights = weights
        self._steps = steps
        self._modules_of_steps = torch.nn.ModuleList([s.call for s in steps if isinstance(s.call, torch.nn.Module)])
        self._constant_names = tuple(constants)
        for index, tensor in enumerate(constants.values()):
            self.register_buffer(f"constant_{index}", tensor)

    def forward(self, values: Mapping[str, torch.Tensor], observe: Observer | None = None) -> dict[str, torch.Tensor]:
        """Compute the block's outputs.

        Args:
            values: the block's inputs and weights by name.
            observe: called with the name and tensor of every value the nodes make; what it returns takes the tensor's place.
        """
        alive = {name: self.get_buffer(f"constant_{index}") for index, name in enumerate(self._constant_names)}
        alive |= values
        for step in self._steps:
            made = step.call(*(alive[name] if name else None for name in step.inputs))
            for name, tensor in zip(step.outputs, made if isinstance(made, (tuple, list)) else (made,), strict=False):
                if name:
                    alive[name] = tensor if observe is None else observe(name, tensor)
            for name in step.frees:
                del alive[name]
        return {name: alive[name] for name in self.block.outputs}


def import_block(source: SourceModel, types: ValueTypes, block: Block) -> TorchBlock:
    """Import the nodes of a block, each with this project's converter or onnx2torch's.

    Raises:
        UnsupportedModelError: a node that neither can convert.
    """
    protos = [source.node_protos[node.name] for node in block.nodes]
    weights = tuple(
        dict.fromkeys(name for node in block.nodes for name in (source.graph.weight(node), source.graph.bias(node)) if name is not None)
    )
    small = {
        name: source.constants[name]
        for node in block.nodes
        for name in node.inputs
        if name in source.constants and name not in weights and source.constants[name].size <= _SMALL
    }
    graph = _subgraph(source, types, protos, block, set(weights))
    steps: list[_Step] = []
    last_read = {name: index for index, node in enumerate(block.nodes) for name in (*node.inputs, *node.outputs)}
    for index, (node, proto) in enumerate(zip(block.nodes, protos, strict=True)):
        converter = _CONVERTERS.get(node.op_type) if node.domain in ONNX_DOMAINS else None
        operator = converter(proto, small) if converter is not None else None
        if operator is None:
            operator, _ = fallback.convert(proto, graph, source.opset if node.domain in ONNX_DOMAINS else 1)
        frees = tuple(
            name
            for name, position in last_read.items()
            if position == index and name and name not in block.outputs and name not in source.constants
        )
        steps.append(_Step(node.name, operator.call, operator.inputs, node.outputs, frees))
    read = dict.fromkeys(name for step in steps for name in step.inputs if name in source.constants and name not in weights)
    constants = {name: torch.from_numpy(np.array(source.constants[name])) for name in read}
    return TorchBlock(block, tuple(steps), weights, constants).eval()


def _subgraph(source: SourceModel, types: ValueTypes, protos: list[onnx.NodeProto], block: Block, weights: set[str]) -> onnx.GraphProto:
    """The block as a graph of its own, as onnx2torch wants to see it: declared values, small constants, weights as inputs."""
    names = dict.fromkeys(name for node in block.nodes for name in (*node.inputs, *node.outputs) if name)
    infos = {
        name: helper.make_tensor_value_info(name, types.dtypes[name], ["N", *types.shapes[name]])
        for name in names
        if name in types.shapes and types.dtypes.get(name)
    }
    inputs = [infos.get(name) or onnx.ValueInfoProto(name=name) for name in [*block.inputs, *weights]]
    outputs = [infos.get(name) or onnx.ValueInfoProto(name=name) for name in block.outputs]
    tensors = [t for t in source.model.graph.initializer if t.name in names and t.name not in weights]
    inner = [info for name, info in infos.items() if name not in block.inputs and name not in block.outputs]
    return helper.make_graph(protos, block.name, inputs, outputs, tensors, value_info=inner)
