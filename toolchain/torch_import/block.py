"""A block of the ONNX graph as a torch module over ONNX value names."""

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import UnsupportedModelError
from ..graph import Node
from ..partition import Block
from ..source import SourceModel, ValueTypes
from . import fallback
from .casting import DTYPES, type_name
from .converters import CONVERTERS
from .operator import NodeView, Operator, Refused

_SMALL = 65536  # elements: larger constants are never shapes or bounds, converters do not need to read them

Observer = Callable[[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Narrowed:
    """What is bfloat16 in a block where all else is float32, by the names of values.

    `products` are computed in it; of their results, those `handed` on in it go to quantizers alone; quantized values `written` in it are
    read by products alone.
    """

    products: frozenset[str] = frozenset()
    handed: frozenset[str] = frozenset()
    written: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Step:
    """One node. `moves` are the positions of host values among its inputs that a device operator computes with.

    `bounds` are those of a node that only holds floats between two numbers, `narrows` one of products that bfloat16 makes faster.
    """

    node: str
    call: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    frees: tuple[str, ...]
    moves: tuple[int, ...] = ()
    bounds: tuple[float, float] | None = None
    narrows: bool = False

    def is_left_to(self, unbounded: AbstractSet[str]) -> bool:
        """Whether whoever applies the bounds of `unbounded` values does this node's work."""
        return self.bounds is not None and self.outputs[0] in unbounded


class TorchBlock(torch.nn.Module):
    """Runs the nodes of a block on tensors known by their ONNX value names.

    Weights and biases are arguments like any other value, in their ONNX layout: a quantized weight is fed by the name of the float one,
    and a weight that two nodes share is one tensor. Everything else constant is held as a buffer.
    """

    def __init__(
        self,
        block: Block,
        steps: tuple[_Step, ...],
        weights: tuple[str, ...],
        constants: Mapping[str, torch.Tensor],
        host_outputs: AbstractSet[str],
    ) -> None:
        super().__init__()
        self.block = block
        self.weights = weights
        self._steps = steps
        self._host_outputs = host_outputs
        self._modules_of_steps = torch.nn.ModuleList([s.call for s in steps if isinstance(s.call, torch.nn.Module)])
        self._constant_names = tuple(constants)
        self._copies: dict[tuple[Any, ...], torch.Tensor] = {}
        for index, tensor in enumerate(constants.values()):
            self.register_buffer(f"constant_{index}", tensor)

    @property
    def bounds(self) -> dict[str, tuple[float, float]]:
        """The values that are another one held between two numbers (Relu, Clip), by name."""
        return {step.outputs[0]: step.bounds for step in self._steps if step.bounds is not None}

    def narrowed(self, quantized: AbstractSet[str], unbounded: AbstractSet[str]) -> Narrowed:
        """All products that bfloat16 makes faster, with what needs not be float32 between them and quantizers, which take either.

        Args:
            quantized: the values that `observe` quantizes.
            unbounded: as in `forward`; these are quantized.
        """
        readers: dict[str, list[_Step]] = {name: [] for step in self._steps for name in step.outputs}
        for step in self._steps:
            for name in readers.keys() & set(step.inputs):
                readers[name].append(step)
        products = frozenset(step.outputs[0] for step in self._steps if step.narrows)
        inner = {name for name in readers.keys() - set(self.block.outputs) if readers[name]}
        only_bounded = {name for name in inner if all(step.is_left_to(unbounded) for step in readers[name])}
        only_multiplied = {name for name in inner if all(step.narrows for step in readers[name])}
        return Narrowed(products, products & (quantized | only_bounded), frozenset(quantized & only_multiplied))

    def forward(
        self,
        values: Mapping[str, torch.Tensor],
        observe: Observer | None = None,
        unbounded: AbstractSet[str] = frozenset(),
        narrowed: Narrowed = Narrowed(),
    ) -> dict[str, torch.Tensor]:
        """Compute the block's outputs.

        Args:
            values: the block's inputs and weights by name.
            observe: called with the name and tensor of every value the nodes make; what it returns takes the tensor's place.
            unbounded: names of `bounds` that `observe` is handed without them, and applies them itself.
            narrowed: what is bfloat16; `observe` writes its share of it.
        """
        device = next((tensor.device for tensor in values.values()), torch.device("cpu"))
        alive = {name: self.get_buffer(f"constant_{index}") for index, name in enumerate(self._constant_names)}
        alive |= values
        for step in self._steps:
            arguments = [alive[name] if name else None for name in step.inputs]
            for index in step.moves:
                arguments[index] = self._placed(alive[step.inputs[index]], device)
            if step.is_left_to(unbounded):
                made = alive[step.inputs[0]]
            elif step.outputs[0] in narrowed.products:
                made = step.call(*(_narrow(argument) for argument in arguments))
                if step.outputs[0] not in narrowed.handed and isinstance(made, torch.Tensor):
                    made = made.float()
            else:
                made = step.call(*arguments)
            for name, tensor in zip(step.outputs, made if isinstance(made, (tuple, list)) else (made,), strict=False):
                if name:
                    alive[name] = tensor if observe is None else observe(name, tensor)
            for name in step.frees:
                del alive[name]
        return {name: self._placed(alive[name], device) if name in self._host_outputs else alive[name] for name in self.block.outputs}

    def _placed(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """A value of the host on the block's device, copied there once: to copy it waits for the device, which no graph can capture.

        Such values follow from shapes: there are few.
        """
        if device.type == "cpu":
            return tensor
        key = (device, tensor.dtype, tuple(tensor.shape), tensor.contiguous().numpy().tobytes())
        if key not in self._copies:
            self._copies[key] = tensor.to(device)
        return self._copies[key]


def _narrow(argument: torch.Tensor | None) -> torch.Tensor | None:
    return argument.bfloat16() if argument is not None and argument.dtype == torch.float32 else argument


def import_block(source: SourceModel, types: ValueTypes, block: Block) -> TorchBlock:
    """Import the nodes of a block, each with this project's converter or, where there is none, onnx2torch's.

    Raises:
        UnsupportedModelError: a node that cannot be converted.
    """
    weights = tuple(dict.fromkeys(name for node in block.nodes for name in source.weights_of(node)))
    operators: list[Operator] = []
    for node in block.nodes:
        try:
            operators.append(_convert(source, types, node))
        except Refused as reason:
            raise UnsupportedModelError(
                f"node {node.name!r}: {node.op_type} (opset {_opset(source, node)}) cannot be imported to torch: {reason}"
            ) from reason
    own = frozenset(node.name for node in block.nodes if source.weights_of(node))
    host = _host_values(block.nodes, operators, source.graph.constants, own)
    last_read = {name: index for index, node in enumerate(block.nodes) for name in (*node.inputs, *node.outputs)}
    steps: list[_Step] = []
    for index, (node, operator) in enumerate(zip(block.nodes, operators, strict=True)):
        frees = tuple(
            name
            for name, position in last_read.items()
            if position == index and name and name not in block.outputs and name not in source.constants
        )
        if host.issuperset(name for name in node.outputs if name):
            operator, moves = _on_host(operator, source.constants), ()
        else:
            moves = tuple(i for i, name in enumerate(operator.inputs) if name in host and i not in operator.host)
        steps.append(_Step(node.name, operator.call, operator.inputs, node.outputs, frees, moves, operator.bounds, operator.narrows))
    read = dict.fromkeys(name for step in steps for name in step.inputs if name in source.constants and name not in weights)
    constants = {name: torch.from_numpy(np.array(source.constants[name])) for name in read}
    return TorchBlock(block, tuple(steps), weights, constants, host & set(block.outputs)).eval()


def can_import(source: SourceModel, types: ValueTypes, node: Node) -> str | None:
    """Why a node cannot be imported to torch, or None where it can. Decided by the node alone: a block of such nodes imports."""
    try:
        _convert(source, types, node)
    except Refused as reason:
        return str(reason)
    return None


def _convert(source: SourceModel, types: ValueTypes, node: Node) -> Operator:
    proto = source.node_protos[node.name]
    own = set(source.weights_of(node))
    small = {
        name: source.constants[name]
        for name in node.inputs
        if name in source.constants and name not in own and source.constants[name].size <= _SMALL
    }
    view = NodeView(proto, _opset(source, node), small, types, source.constants)
    for name in (*node.inputs, *node.outputs):
        dtype = types.dtypes.get(name)
        if dtype and dtype not in DTYPES:
            view.refuse(f"torch does not compute with {type_name(dtype)}")
    converter = CONVERTERS.get(("" if node.is_standard else node.domain, node.op_type))
    return converter(view) if converter is not None else fallback.convert(view)


def _opset(source: SourceModel, node: Node) -> int:
    if node.is_standard:
        return source.opset
    return next((entry.version for entry in source.model.opset_import if entry.domain == node.domain), 1)


def _host_values(
    nodes: Iterable[Node], operators: Iterable[Operator], constants: AbstractSet[str], weighted: AbstractSet[str]
) -> frozenset[str]:
    """The values that are computed from shapes alone: they live on the CPU, so that reading them as numbers waits for no device.

    What `weighted` nodes make is not: their weights are fed, on their grids or not (positions looked up as far as a text reaches).
    """
    host: set[str] = set()
    for node, operator in zip(nodes, operators, strict=True):
        computed = [name for name in operator.inputs if name and name not in constants]
        is_shape = node.op_type in ("Shape", "Size", "Constant") or (computed and host.issuperset(computed))
        if node.is_standard and node.name not in weighted and is_shape:
            host.update(name for name in node.outputs if name)
    return frozenset(host)


def _on_host(operator: Operator, arrays: Mapping[str, np.ndarray]) -> Operator:
    """An operator over host values with its constants bound to it: it must not see those that follow the block to its device."""
    bound = {i: torch.from_numpy(np.array(arrays[name])) for i, name in enumerate(operator.inputs) if name in arrays}
    free = tuple(name for i, name in enumerate(operator.inputs) if i not in bound)

    def call(*values: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        rest = iter(values)
        return operator.call(*(bound[i] if i in bound else next(rest) for i in range(len(operator.inputs))))

    return Operator(call, free)
