"""One node through ONNX Runtime and through the import to torch, side by side."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import helper, numpy_helper, shape_inference

from toolchain.graph import Graph, Node, boundary
from toolchain.partition import Block
from toolchain.source import SourceModel, ValueTypes
from toolchain.torch_import import TorchBlock, import_block

ATOL = 2e-5  # float32 sums of at most a few hundred products of unit normals

Arrays = Mapping[str, np.ndarray | None]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def node_model(
    kind: str, inputs: Arrays, constants: Arrays, opset: int, outputs: int | Sequence[str] = 1, domain: str = "", **attributes: Any
) -> onnx.ModelProto:
    """One node that reads the inputs, then the constants, in order (None: absent); outputs are counted, or named ("": absent)."""
    given = {**inputs, **constants}
    made = [f"y{i}" for i in range(outputs)] if isinstance(outputs, int) else list(outputs)
    read = [name if array is not None else "" for name, array in given.items()]
    node = helper.make_node(kind, read, made, "node", domain=domain, **attributes)
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items() if array is not None]
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), list(array.shape))
        for name, array in inputs.items()
        if array is not None
    ]
    graph = helper.make_graph([node], "g", infos, [onnx.ValueInfoProto(name=name) for name in made if name], tensors)
    imports = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def module(model: onnx.ModelProto, inputs: Iterable[str]) -> tuple[TorchBlock, dict[str, torch.Tensor]]:
    """A model imported to torch as one block, exactly as it is (cleaning it up would fold away what is tested), and its weights."""
    nodes = tuple(Node(p.name, p.op_type, tuple(p.input), tuple(p.output), p.domain) for p in model.graph.node)
    constants = frozenset(t.name for t in model.graph.initializer)
    graph = Graph(nodes, tuple(inputs), tuple(o.name for o in model.graph.output), constants)
    source = SourceModel(Path("test"), "", model, graph, ())
    entering, leaving = boundary(graph, nodes)
    made = import_block(source, _types(model), Block("b", nodes, entering, leaving, (), is_residual=False))
    return made, {name: torch.tensor(source.constants[name]) for name in made.weights}


def _types(model: onnx.ModelProto) -> ValueTypes:
    graph = shape_inference.infer_shapes(model).graph
    dtypes, shapes = {}, {}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        tensor = value.type.tensor_type
        dtypes[value.name] = tensor.elem_type
        sizes = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
        if sizes and None not in sizes:
            shapes[value.name] = tuple(sizes[1:])
    return ValueTypes(dtypes, shapes, frozenset())


def imported(model: onnx.ModelProto, inputs: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The outputs of a model imported to torch."""
    made, weights = module(model, inputs)
    return made({**{name: torch.from_numpy(array) for name, array in inputs.items()}, **weights})


def executed(model: onnx.ModelProto, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs of a model in ONNX Runtime without optimisation."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(np.asarray, session.run(names, dict(inputs))), strict=True))


def check(
    kind: str,
    x: np.ndarray | Mapping[str, np.ndarray],
    constants: Arrays | None = None,
    opset: int = 17,
    atol: float = ATOL,
    outputs: int | Sequence[str] = 1,
    domain: str = "",
    **attributes: Any,
) -> None:
    """Hold torch to ONNX Runtime on one node: same types, shapes and, within `atol`, elements."""
    inputs = dict(x) if isinstance(x, Mapping) else {"x": x}
    model = node_model(kind, inputs, constants or {}, opset, outputs, domain, **attributes)
    expected = executed(model, inputs)
    found = imported(model, inputs)
    assert list(found) == list(expected)
    for name, tensor in found.items():
        assert tensor.numpy().dtype == expected[name].dtype
        assert tensor.shape == expected[name].shape
        np.testing.assert_allclose(tensor.numpy(), expected[name], atol=atol, rtol=0)
