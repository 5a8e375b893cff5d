"""Load a float ONNX model, check it, and bring it into the one form that every later stage works on."""

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, shape_inference

from . import large, runtime
from .copies import insert_copies
from .errors import MrecgError, UnsupportedModelError
from .graph import WEIGHT_INPUT, Graph, Node, channel_axis, schedule
from .normalise import normalised, read
from .protos import subgraphs
from .quant_table import Copy
from .raising import MIN_OPSET, opset_of
from .single_precision import in_float32
from .stored import StoredWeight, find_stored, lift_weights
from .unfusing import is_for_one_cpu

QUANTIZED_OPS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger")
Shape = tuple[int | None, ...]
_MOST_NOISE = 1 << 26  # elements of a sample that is only made up to look at shapes
_BESIDE = 4  # samples that are run together to see whether each has the result that it has alone
_FEW, _SMALL = 4, 8  # samples, and the size of other open axes, where it is only to be seen whether an axis counts samples
# Axes that are called so may count the parts of one sample.
_STEPS = re.compile(r"seq|time|len|frame|step|token|point|node|edge|word|char|^[tl]$", re.IGNORECASE)
_LARGE = 1024  # elements; shape inference needs the values of shapes and axes, never those of weights


_FOR_ONE_CPU = (
    "the file was saved by ONNX Runtime as it is optimised for one kind of CPU (nchwc): its convolutions cannot be quantized; give the "
    "model that it was made from, or save it with ORT_ENABLE_BASIC"
)


@dataclass(frozen=True)
class InputSpec:
    """A graph input: `shape` has an int for a fixed axis, a name or None for an open one; `axis` is the sample axis.

    An input without a sample axis (None) is shared by all samples of a run: a sampling rate, a threshold. A model none of whose inputs has
    one takes each sample, whole, in a run of its own.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int | str | None, ...]
    axis: int | None = 0

    @property
    def sample_shape(self) -> tuple[int | str | None, ...]:
        """The shape of one sample."""
        return self.shape if self.axis is None else (*self.shape[: self.axis], *self.shape[self.axis + 1 :])

    def full_shape(self, count: int, sample: Sequence[int]) -> tuple[int, ...]:
        """The input's shape for `count` samples of a shape."""
        return tuple(sample) if self.axis is None else (*sample[: self.axis], count, *sample[self.axis :])

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}{[d if d is not None else '?' for d in self.shape]}"


@dataclass(frozen=True)
class SourceModel:
    """A checked and normalised float model.

    `model` is the normalised protobuf (treated as frozen): constants are initializers, BatchNorm is folded where that is exact, every node
    has a unique name, opset >= 13. Value names, graph inputs and outputs, metadata and open axes are those of the file. `shelf` is the
    folder of a large model's weights, which are outside of `model`; it lives as long as this. `rewritten` says in what the model is written
    otherwise than the file, so that it must be held against it; None where it is not.
    """

    path: Path
    sha256: str
    model: onnx.ModelProto
    graph: Graph
    inputs: tuple[InputSpec, ...]
    notes: tuple[str, ...] = ()
    shelf: large.Shelf | None = field(default=None, repr=False, compare=False)
    rewritten: str | None = None

    @cached_property
    def constants(self) -> Mapping[str, np.ndarray]:
        """The initializers as arrays, by name (read only)."""
        arrays = {tensor.name: large.array(tensor) for tensor in self.model.graph.initializer}
        for array in arrays.values():
            array.setflags(write=False)
        return MappingProxyType(arrays)

    @property
    def batch(self) -> int | None:
        """The number of samples that the inputs declare, or None where it is open."""
        sizes = [spec.shape[spec.axis] for spec in self.inputs if spec.axis is not None]
        return next((size for size in sizes if isinstance(size, int)), None)

    @property
    def axes(self) -> dict[str, int | None]:
        """The sample axis of each input."""
        return {spec.name: spec.axis for spec in self.inputs}

    @property
    def has_samples_first(self) -> bool:
        """Whether the first axis of values counts samples, as `runtime.run` joins or stacks them."""
        return 0 in self.axes.values() or runtime.takes_each(self.axes)

    def channel_axis(self, node: Node) -> int:
        """The output-channel axis of a node's weight in its ONNX layout."""
        transposed = any(a.name == "transB" and a.i for a in self.node_protos[node.name].attribute)
        return channel_axis(node.op_type, self.constants[node.inputs[WEIGHT_INPUT[node.op_type]]].ndim, transposed)

    def with_copies(self, copies: Mapping[str, Copy]) -> "SourceModel":
        """The model with copies of values for some of their readers; itself where it has them already."""
        if copies.keys() <= self.graph.producer.keys():
            return self
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        insert_copies(model.graph, copies)
        nodes = tuple(_node(proto) for proto in model.graph.node)
        copied = replace(self, model=model, graph=replace(self.graph, nodes=nodes))
        copied.__dict__["constants"] = self.constants  # the same arrays, held once
        return copied

    @cached_property
    def opset(self) -> int:
        return next(entry.version for entry in self.model.opset_import if entry.domain in ("", "ai.onnx"))

    @cached_property
    def stored(self) -> Mapping[str, StoredWeight]:
        """The constants that no weighted node reads and that may be kept as codes: tables, recurrent weights, what control flow holds."""
        return MappingProxyType(find_stored(self.model, self.graph))

    @cached_property
    def _stored_of(self) -> Mapping[str, tuple[str, ...]]:
        found: dict[str, list[str]] = {}
        for name, weight in self.stored.items():
            for node in weight.nodes:
                found.setdefault(node, []).append(name)
        return {node: tuple(names) for node, names in found.items()}

    def weights_of(self, node: Node) -> tuple[str, ...]:
        """The constants of a node that may be on a grid: its weight and bias, and those that it, or its body, only has stored."""
        own = (self.graph.weight(node), self.graph.bias(node))
        return (*(name for name in own if name is not None), *self._stored_of.get(node.name, ()))

    @cached_property
    def unsound(self) -> frozenset[str]:
        """Of the constants that may be on a grid: those with NaN or infinite numbers."""
        names = {name for node in self.graph.nodes for name in self.weights_of(node)}
        floats = {name: array for name in names if (array := self.constants[name]).dtype.kind == "f" and array.size}
        return frozenset(name for name, array in floats.items() if not (np.isfinite(array.min()) and np.isfinite(array.max())))

    @cached_property
    def node_protos(self) -> Mapping[str, onnx.NodeProto]:
        return MappingProxyType({node.name: node for node in self.model.graph.node})


@dataclass(frozen=True)
class ValueTypes:
    """What is known of the values for given input shapes: element type, shape of one sample, and which are arrays of samples.

    `stacked` holds the values whose first axis is the sample axis, `batched` the float32 ones of them; where samples come along another
    axis, or one by one, those that have it anywhere, or all. `shared` holds those whose shape does not follow the number of samples, and
    those that are not float32. `others` has the types of values that are no tensors. `batch` is the number of samples that every run must
    have, None where any number will do.
    """

    dtypes: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]
    batched: frozenset[str]
    stacked: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()
    others: Mapping[str, onnx.TypeProto] = field(default_factory=dict)
    batch: int | None = None

    def largest(self, names: Iterable[str]) -> int:
        """Elements of the largest of some values, for each sample; 0 where no shape is known."""
        return max((math.prod(self.shapes[name]) for name in names if name in self.shapes), default=0)

    def with_copies(self, copies: Mapping[str, Copy]) -> "ValueTypes":
        """A copy is what its origin is."""

        def extended(names: frozenset[str]) -> frozenset[str]:
            return names | {name for name, copy in copies.items() if copy.origin in names}

        return replace(
            self,
            dtypes={**self.dtypes, **{name: self.dtypes[copy.origin] for name, copy in copies.items() if copy.origin in self.dtypes}},
            shapes={**self.shapes, **{name: self.shapes[copy.origin] for name, copy in copies.items() if copy.origin in self.shapes}},
            batched=extended(self.batched),
            stacked=extended(self.stacked),
            shared=extended(self.shared),
        )


def load_source(path: str | Path) -> SourceModel:
    """Load a float ONNX file and normalise it.

    Raises:
        UnsupportedModelError: not an ONNX file, fails the checker, is quantized already, or ONNX Runtime does not load it.
    """
    path = Path(path)
    try:
        return _loaded(path)
    except UnsupportedModelError as error:
        raise error if str(error).startswith(str(path)) else UnsupportedModelError(f"{path}: {error}") from error.__cause__
    except MrecgError:
        raise
    except UnicodeDecodeError as error:
        raise UnsupportedModelError(f"{path}: has names that are not UTF-8 ({error.object!r})") from error
    except MemoryError as error:
        raise UnsupportedModelError(f"{path}: does not fit into memory") from error


def _loaded(path: Path) -> SourceModel:
    model = read(path)
    quantized = next((n for n in model.graph.node if n.op_type in QUANTIZED_OPS or n.op_type.startswith("QLinear")), None)
    opset = opset_of(model)
    model, kinds = in_float32(model)
    changes = [f"the model was raised from opset {opset} to {MIN_OPSET}"] if opset < MIN_OPSET else []
    changes += ["the model was brought from double precision to float32"] if "double" in kinds else []
    notes = (f"{' and '.join(kinds)} values are computed in float32; graph inputs and outputs keep their types",) if kinds else ()
    notes += (_FOR_ONE_CPU,) if is_for_one_cpu(model.graph) else ()
    notes += _with_defaults(model)
    shelf = large.Shelf() if large.weight_bytes(model) > large.OUTSIDE else None
    model = normalised(model, path, shelf.folder if shelf is not None else None)
    if shelf is None and large.weight_bytes(model) > large.OUTSIDE:  # made by nodes that were folded
        shelf = large.Shelf()
        large.moved_out(model, shelf.folder / "folded.weights")
    lift_weights(model.graph)
    nodes = schedule([_node(proto) for proto in model.graph.node], [output.name for output in model.graph.output])
    if not nodes:
        raise UnsupportedModelError(f"{path}: the graph computes nothing from its inputs; there is nothing to quantize")
    constants = frozenset(tensor.name for tensor in model.graph.initializer)
    protos = {proto.name: proto for proto in model.graph.node}
    ordered = [protos[node.name] for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(ordered)
    inputs = _input_specs([value for value in model.graph.input if value.name not in constants], path)
    computed = tuple(output.name for output in model.graph.output if output.name not in constants)
    graph = Graph(nodes, tuple(spec.name for spec in inputs), computed, constants)
    if not inputs:
        raise UnsupportedModelError(f"{path}: has no inputs; there is nothing to calibrate it on")
    if not graph.weighted and not find_stored(model, graph):
        raise UnsupportedModelError(f"{path}: {_why_weightless(model, quantized)}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return _with_sample_axes(SourceModel(path, digest, model, graph, inputs, notes, shelf, " and ".join(changes) or None))


def _with_defaults(model: onnx.ModelProto) -> tuple[str, ...]:
    """A note of the inputs with a default, which become constants; none of a file that lists all constants as inputs, as old ones do."""
    inputs, constants = ({value.name for value in values} for values in (model.graph.input, model.graph.initializer))
    named = sorted(inputs & constants)
    if not named or constants <= inputs:
        return ()
    return (f"the default of input {', '.join(map(repr, named))} is a constant of the quantized model: it cannot be fed any more",)


def _why_weightless(model: onnx.ModelProto, quantized: onnx.NodeProto | None) -> str:
    if quantized is not None:
        return f"is quantized already (node {quantized.name!r}, {quantized.op_type}); give the float model it was made from"
    control = next((node for node in model.graph.node if subgraphs(node)), None)
    missing = "no Conv, ConvTranspose, Gemm or MatMul node has constant weights"
    if control is not None:
        return (
            f"{missing} outside control flow (node {control.name!r}, {control.op_type}), which is left alone; there is nothing to quantize"
        )
    kinds = list(dict.fromkeys(node.op_type for node in model.graph.node))
    shown = ", ".join(kinds[:6]) + (" ..." if len(kinds) > 6 else "")
    return f"{missing} (it is made of {shown}); there is nothing to quantize"


def infer_types(
    source: SourceModel, sample_shapes: Mapping[str, tuple[int, ...]], examples: Mapping[str, np.ndarray] | None = None
) -> ValueTypes:
    """Infer types and shapes for inputs of the given shapes (one sample each, without the sample axis).

    Shapes are inferred for two different numbers of samples; a value whose first axis follows and whose other axes stay is an array of
    samples. What ONNX's own inference does not know (custom operators, shapes that follow from data), ONNX Runtime is asked for.

    Args:
        source: the model.
        sample_shapes: by input name.
        examples: samples [N, ...] to run where values must be looked at; without them, random ones.
    """
    if examples is None:
        size = sum(math.prod(shape) for shape in sample_shapes.values())
        examples = _random(source, sample_shapes) if size <= _MOST_NOISE else {}
    batch = None if _takes_any_batch(source, examples) else source.batch
    sizes = (2, 3) if batch is None else (batch, batch)
    known = [_inferred(source, sample_shapes, size) for size in sizes]
    values = [value for node in source.graph.nodes for value in node.outputs if value]
    unknown = [v for v in values if any(None in (found.get(v, (0, None))[1] or (None,)) or not found[v][0] for found in known)]
    others: Mapping[str, onnx.TypeProto] = {}
    if unknown:
        others = _ask_runtime(source, examples, unknown, sizes, known)
    dtypes = {name: dtype for name, (dtype, _) in known[0].items() if dtype}
    shapes: dict[str, tuple[int, ...]] = {}
    stacked: set[str] = set()
    floats: set[str] = set()
    shared = {name for name, dtype in dtypes.items() if dtype != TensorProto.FLOAT}
    alone = runtime.takes_each(source.axes)
    for name, (_, shape) in known[0].items():
        other = known[1].get(name, (0, None))[1]
        if shape is None or other is None or None in shape or None in other:
            continue
        if batch is None and shape == other and not alone:
            shared.add(name)
        if not shape:
            continue
        shapes[name] = tuple(d for d in shape[1:] if d is not None)
        axis = _counting_axis(shape, other, sizes)
        if axis == 0:
            stacked.add(name)
        is_batched = axis == 0 or (axis is not None and not source.has_samples_first)
        if (alone or is_batched) and dtypes.get(name) == TensorProto.FLOAT:
            floats.add(name)
    return ValueTypes(
        MappingProxyType(dtypes), MappingProxyType(shapes), frozenset(floats), frozenset(stacked), frozenset(shared), others, batch
    )


def _counting_axis(shape: Shape, other: Shape, sizes: tuple[int, int]) -> int | None:
    """The one axis in which a value's shapes for two numbers of samples differ, as those do; for one fixed number the first or none."""
    if sizes[0] == sizes[1]:
        return 0 if shape == other and shape[0] == sizes[0] else None
    differing = [axis for axis, pair in enumerate(zip(shape, other, strict=False)) if pair[0] != pair[1]]
    is_one = len(shape) == len(other) and len(differing) == 1
    return differing[0] if is_one and (shape[differing[0]], other[differing[0]]) == sizes else None


def folded_values(source: SourceModel, original: onnx.ModelProto) -> frozenset[str]:
    """The values of the file that a model was loaded from which it has no more; copies (Identity) are not among them."""
    made = {value for node in original.graph.node if node.op_type != "Identity" for value in node.output}
    made |= {tensor.name for tensor in original.graph.initializer}
    return frozenset(made - {*source.constants, *source.graph.inputs, *source.graph.producer})


def opened(source: SourceModel) -> onnx.ModelProto:
    """A copy of the model whose inputs declare an open sample axis, and nothing else of its values."""
    model = onnx.ModelProto()
    model.CopyFrom(source.model)
    axes = source.axes
    for value in model.graph.input:
        if (axis := axes.get(value.name)) is not None:
            value.type.tensor_type.shape.dim[axis].dim_param = "samples"
    outputs = [onnx.ValueInfoProto(name=output.name) for output in model.graph.output]
    del model.graph.output[:], model.graph.value_info[:]
    model.graph.output.extend(outputs)
    return model


def _random(source: SourceModel, shapes: Mapping[str, tuple[int, ...]], count: int = 3) -> dict[str, np.ndarray]:
    """A few samples of noise: unit normals, and 0 or 1 where the input is not float."""
    rng = np.random.default_rng(0)
    arrays = {}
    for spec in source.inputs:
        size = (count, *shapes[spec.name])
        drawn = rng.normal(size=size) if spec.dtype.kind == "f" else rng.integers(0, 2, size)
        array = drawn.astype(str).astype(object) if spec.dtype.kind in "OSU" else drawn.astype(spec.dtype)
        arrays[spec.name] = array if spec.axis is not None else np.broadcast_to(array[:1], size)
    return arrays


def _takes_any_batch(source: SourceModel, examples: Mapping[str, np.ndarray]) -> bool:
    """Whether a model with a declared batch size gives each sample the same result in a batch of another size."""
    if source.batch is None or not examples:
        return source.batch is None
    axes = source.axes
    if runtime.differing(examples, axes):
        return False
    names = list(source.graph.outputs)
    count = len(next(iter(examples.values())))
    groups = [(start + np.arange(source.batch)) % count for start in _unlike(examples, max(_BESIDE // source.batch, 2))]

    def results(rows: np.ndarray) -> dict[str, Any]:
        return runtime.execute(session, runtime.batched({name: array[rows] for name, array in examples.items()}, axes), names)

    try:
        session = runtime.session(opened(source))
        alone, together = [results(rows) for rows in groups], results(np.concatenate(groups))
    except UnsupportedModelError:
        return False
    counted = [name for name in names if np.shape(alone[0][name])[:1] == (source.batch,)]
    return bool(counted) and all(
        np.shape(together[name]) == (len(groups) * source.batch, *np.shape(alone[0][name])[1:])
        and all(_alike(found[name], part) for found, part in zip(alone, np.split(together[name], len(groups)), strict=True))
        for name in counted
    )


def _unlike(examples: Mapping[str, np.ndarray], most: int) -> list[int]:
    """Samples to be held beside each other: `most` from all over, and of each input the first that is unlike sample 0 (a shorter mask).

    Alike samples would not tell that a model gives all what is the first one's. One sample is held beside itself.
    """
    count = len(next(iter(examples.values())))
    spread = [int(index) for index in np.linspace(0, count - 1, min(count, most))]
    others = [next((i for i in range(1, count) if not np.array_equal(array[i], array[0])), 0) for array in examples.values()]
    return list(dict.fromkeys([*spread, *others])) if count > 1 else [0, 0]


def _ask_runtime(
    source: SourceModel,
    examples: Mapping[str, np.ndarray],
    names: list[str],
    sizes: tuple[int, int],
    known: "list[dict[str, tuple[int, Shape | None]]]",
) -> dict[str, onnx.TypeProto]:
    """Add the element types, and the shapes of a run, of values that inference does not know; return what are no tensors, with types."""
    axes = source.axes
    try:
        session = runtime.exposing(opened(source), names)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{source.path}: {error}") from error
    types = runtime.declared_types(session)
    others = {name: kind for name, kind in types.items() if not kind.HasField("tensor_type")}
    tensors = [name for name in names if name not in others]
    for found in known:
        found.update({name: (types[name].tensor_type.elem_type, None) for name in tensors})
    if not examples:
        return others
    for size, found in zip(sizes, known, strict=True):
        feeds = {name: array[np.arange(size) % len(array)] for name, array in examples.items()}
        try:
            arrays = runtime.execute(session, runtime.batched(feeds, axes), tensors)
        except UnsupportedModelError:
            break  # these samples are nothing that the model can run on; it is calibrated on real ones
        found.update({name: (types[name].tensor_type.elem_type, tuple(np.shape(array))) for name, array in arrays.items()})
    return others


def _inferred(source: SourceModel, sample_shapes: Mapping[str, tuple[int, ...]], batch: int) -> dict[str, tuple[int, Shape | None]]:
    """Run ONNX shape inference on the graph without its weights and declared shapes."""
    graph = source.model.graph
    fed = []
    for spec in source.inputs:
        dtype = helper.np_dtype_to_tensor_dtype(spec.dtype)
        fed.append(helper.make_tensor_value_info(spec.name, dtype, spec.full_shape(batch, sample_shapes[spec.name])))
    many = [t for t in graph.initializer if int(np.prod(t.dims)) > _LARGE]
    fed += [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in many]
    kept = {t.name for t in many}
    outputs = [onnx.ValueInfoProto(name=output.name) for output in graph.output]
    skeleton = helper.make_graph(list(graph.node), graph.name, fed, outputs, [t for t in graph.initializer if t.name not in kept])
    model = helper.make_model(skeleton, opset_imports=list(source.model.opset_import), ir_version=source.model.ir_version)
    try:
        inferred = shape_inference.infer_shapes(model, data_prop=True).graph
    except shape_inference.InferenceError:  # it stops at what it does not know or believe; ONNX Runtime is asked instead
        inferred = model.graph
    found: dict[str, tuple[int, Shape | None]] = {}
    for value in [*inferred.input, *inferred.value_info, *inferred.output]:
        tensor = value.type.tensor_type
        if not value.type.HasField("tensor_type") or value.name in kept:
            continue
        shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim) if tensor.HasField("shape") else None
        found[value.name] = (tensor.elem_type, shape)
    return found


def _with_sample_axes(source: SourceModel) -> SourceModel:
    """The model without sample axes where those that its declared shapes suggest count something else: colours, steps, points.

    Doubtful are axes of a fixed size other than 1, and open ones that are named like steps. Along those that count samples, results change
    places with them.
    """
    axes = {name: axis for name, axis in source.axes.items() if axis is not None}
    sizes = [spec.shape[axes[spec.name]] for spec in source.inputs if spec.name in axes]
    if not any(size > 1 if isinstance(size, int) else size is not None and _STEPS.search(size) for size in sizes):
        return source
    count = source.batch or _FEW
    open_sizes: dict[str | None, int] = {size: count for size in sizes if isinstance(size, str)}  # same name, same length: nodes x nodes
    shapes = {s.name: tuple(d if isinstance(d, int) else open_sizes.get(d, _SMALL) for d in s.sample_shape) for s in source.inputs}
    if sum(map(math.prod, shapes.values())) * count > _MOST_NOISE:
        return source
    feeds = {name: array[np.arange(count) % len(array)] for name, array in _random(source, shapes, count).items()}
    names = list(source.graph.outputs)
    try:
        session = runtime.session(source.model)
        made, turned = (
            runtime.execute(session, runtime.batched(fed, source.axes), names)
            for fed in (feeds, {name: np.roll(array, 1, axis=0) for name, array in feeds.items()})
        )
    except UnsupportedModelError:
        return source  # noise is nothing that the model runs on
    pairs = [(made[name], turned[name]) for name in names if np.shape(made[name])[:1] == (count,)]
    if pairs and all(_alike(np.roll(one, 1, axis=0), other) for one, other in pairs):
        return source
    note = "no axis of the inputs counts samples: each sample is an input of the declared shape, and has a run of its own"
    return replace(source, inputs=tuple(replace(spec, axis=None) for spec in source.inputs), notes=(*source.notes, note))


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two results are the same up to the rounding of float32 in sums of another order."""
    if one.shape != other.shape or one.dtype.kind != "f":
        return np.array_equal(one, other)
    largest = np.abs(np.nan_to_num(one, posinf=0, neginf=0)).max(initial=0)
    return np.allclose(other, one, rtol=1e-3, atol=1e-3 * largest, equal_nan=True)


def _node(proto: onnx.NodeProto) -> Node:
    """Values that subgraphs of a control-flow node capture are inputs too."""
    captured = [name for subgraph in subgraphs(proto) for name in _captured(subgraph)]
    return Node(proto.name, proto.op_type, (*proto.input, *dict.fromkeys(captured)), tuple(proto.output), proto.domain)


def _captured(graph: onnx.GraphProto) -> list[str]:
    """The values that a subgraph takes from around it."""
    own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    own |= {value for node in graph.node for value in node.output}
    read = [name for node in graph.node for name in (*node.input, *(n for inner in subgraphs(node) for n in _captured(inner)))]
    return [name for name in [*read, *(output.name for output in graph.output)] if name and name not in own]


def _input_specs(inputs: Iterable[onnx.ValueInfoProto], path: Path) -> tuple[InputSpec, ...]:
    shapes: dict[str, tuple[int | str | None, ...]] = {}
    for value in inputs:
        tensor = value.type.tensor_type
        if not value.type.HasField("tensor_type") or not tensor.HasField("shape"):
            raise UnsupportedModelError(f"{path}: input {value.name!r}: only tensors of known rank are supported")
        shapes[value.name] = runtime.declared_shape(value)
    axes = runtime.sample_axes(shapes)
    kinds = {value.name: np.dtype(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)) for value in inputs}
    return tuple(InputSpec(name, kinds[name], shape, axes[name]) for name, shape in shapes.items())
