"""Does torch compute what ONNX Runtime computes? Every block is held against it on a few samples, and a wrong node is found by name."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from . import runtime
from .activations import Piece, TorchModel, Value
from .errors import first_line
from .graph import boundary
from .partition import Block
from .samples import Samples
from .source import opened
from .torch_import import TorchBlock, import_block

TOLERANCE = 1e-4  # of a value's largest magnitude; float32 summation order through a whole network stays well below
_SMALLEST_RANGE = 1e-2  # ONNX Runtime's Sigmoid, Tanh and Erf are approximations to about 1e-7, however small the result
_SAMPLES = 4


def check_import(model: TorchModel, samples: Samples) -> tuple[float, dict[str, str]]:
    """Compare torch with ONNX Runtime at every block boundary on a few samples.

    A block that differs is looked into node by node, each fed what ONNX Runtime computed: a node that differs then is imported wrongly.
    Where none does, the block only amplifies the rounding of float32.

    Returns:
        The worst difference at a boundary, relative to the value's range, and the nodes that torch computes differently with the reasons.

    Raises:
        UnsupportedModelError: ONNX Runtime fails on the samples.
    """
    source, axes = model.source, model.source.axes
    count = 1 if runtime.differing(samples.inputs, axes) else model.types.batch or min(_SAMPLES, model.size)  # one forward pass
    few = samples.taken(np.arange(count) % samples.count)
    proto = opened(source) if model.types.batch is None else source.model
    feeds = runtime.batched(few.inputs, axes)

    def reference(names: list[str]) -> dict[str, Any]:
        return runtime.execute(runtime.exposing(proto, names), feeds, names)

    expected = reference(list(dict.fromkeys(name for piece in model.pieces for name in piece.block.outputs)))
    stream = model.stream(few.inputs)
    worst, strays = 0.0, dict[str, str]()
    for piece in model.pieces:
        failure: Exception | None = None
        outputs: dict[str, Value] = {}
        try:
            outputs = model.run(piece, stream)
            errors = [difference(stream.passes.part(value, 0), expected[name]) for name, value in outputs.items()]
        except Exception as error:  # a converter met a shape or a type that it did not foresee
            if not isinstance(piece, TorchBlock):
                raise
            failure, errors = error, [float("inf")]
        if isinstance(piece, TorchBlock) and not max(errors, default=0.0) <= TOLERANCE:
            found = _strays(model, piece, reference, few)
            if not found and failure is not None:
                found = {node.name: f"torch fails: {first_line(failure)}" for node in piece.block.nodes}
            strays |= found
        if strays:
            return worst, strays
        worst = max([worst, *errors])
        stream.advance(outputs)
    return worst, strays


def difference(found: Any, expected: Any) -> float:
    """The largest difference, over the value's largest magnitude (0.01 at least); 0 for what is no tensor, infinite for another shape."""
    if not isinstance(found, torch.Tensor):
        return 0.0
    a, b = found.detach().cpu().numpy(), np.asarray(expected)
    if a.shape != b.shape:
        return float("inf")
    if b.dtype.kind != "f":
        return float(bool((a != b).any()))
    a, b = a.astype(np.float64), b.astype(np.float64)
    apart = ~((a == b) | (np.isnan(a) & np.isnan(b)))
    largest = np.abs(np.subtract(a, b, where=apart, out=np.zeros_like(b))).max(initial=0.0)
    return float(largest / max(np.abs(b, where=np.isfinite(b), out=np.zeros_like(b)).max(initial=0.0), _SMALLEST_RANGE))


def _strays(model: TorchModel, piece: Piece, reference: Any, samples: Samples) -> dict[str, str]:
    """The nodes of a block whose results differ although they are fed what ONNX Runtime made."""
    source, nodes = model.source, piece.block.nodes
    names = dict.fromkeys(v for node in nodes for v in (*source.graph.data_inputs(node), *node.outputs) if v and v in source.graph.producer)
    values = {name: _tensor(value, model.device) for name, value in reference(list(names)).items()}
    values |= {name: stream_value for name, stream_value in _inputs(model, samples).items() if name not in values}
    strays: dict[str, str] = {}
    for node in nodes:
        inputs, outputs = boundary(source.graph, [node])
        outputs = tuple(v for v in node.outputs if v in outputs)
        try:
            single = import_block(source, model.types, Block(node.name, (node,), inputs, outputs, (), is_residual=False)).to(model.device)
            with torch.no_grad():
                made = single({name: values[name] for name in inputs} | model.constants(single))
            error = max((difference(made[name], _array(values[name])) for name in outputs), default=0.0)
        except Exception as failure:  # as above
            strays[node.name] = f"torch fails on this {node.op_type}: {first_line(failure)}"
            continue
        if not error <= TOLERANCE:
            strays[node.name] = f"torch computes this {node.op_type} differently (by {error:.1e} of the value's range)"
    return strays


def _inputs(model: TorchModel, samples: Samples) -> Mapping[str, Any]:
    stream = model.stream(samples.inputs)
    return {name: stream.passes.part(value, 0) for name, value in stream.of(model.source.graph.inputs).items()}


def _tensor(value: Any, device: torch.device) -> Any:
    return torch.from_numpy(np.array(value)).to(device) if isinstance(value, np.ndarray) and value.dtype.kind in "fiub" else value


def _array(value: Any) -> Any:
    return value.cpu().numpy() if isinstance(value, torch.Tensor) else value
