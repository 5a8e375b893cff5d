"""ONNX Runtime: the only room that imports it. Sessions, batched runs, and its hardware-independent graph clean-up."""

import ctypes
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort

from . import large
from .errors import UnsupportedModelError, UsageError, first_line
from .graph import BLOCKED_DOMAIN
from .protos import replace_nodes, value_names
from .quant_table import FLOAT8

ort.set_default_logger_severity(4)  # what fails is raised; ONNX Runtime would print it as well
Session = ort.InferenceSession
BATCH = 64  # samples per run when the model leaves its batch axis open
CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
_BLOCKED = "_nchwc"
# In front of an fp8 QuantizeLinear, ONNX Runtime 1.31 fails on a Clip and drops a Relu, as if negative numbers could not pass it.
_FLOAT8_BREAKS = frozenset({"ClipQuantRewrite", "ReluQuantRewrite"})
_WITHOUT_KERNELS = ("session.disable_quant_qdq", "1")
# How axes that count samples are called; those of sequences and sets are called otherwise.
_BATCH_NAME = re.compile(r"n|b|bs|bsz|samples|.*batch.*", re.IGNORECASE)
# How ONNX Runtime spells element types: `float` is FLOAT, the others are as in ONNX.
_ELEMENT_TYPES: Mapping[str, int] = {name.lower(): number for name, number in onnx.TensorProto.DataType.items()}


class Optimization(Enum):
    """How far ONNX Runtime may rewrite the graph."""

    NONE = "none"  # what the file says, node by node
    BASIC = "basic"  # folding only, no runtime-specific operators
    UNFUSED = "unfused"  # all but integer kernels: what stands between quantizers is computed in float
    DEFAULT = "default"  # what a deployed session does

    def options(self) -> ort.SessionOptions:
        """New session options of this level."""
        found, level = ort.SessionOptions(), ort.GraphOptimizationLevel
        found.graph_optimization_level = {"none": level.ORT_DISABLE_ALL, "basic": level.ORT_ENABLE_BASIC}.get(
            self.value, level.ORT_ENABLE_ALL
        )
        found.intra_op_num_threads = _threads()
        if self is Optimization.UNFUSED:
            found.add_session_config_entry(*_WITHOUT_KERNELS)
        return found


def _threads() -> int:
    """Threads of a session: those that OMP_NUM_THREADS asks for, which ONNX Runtime does not look at by itself; 0 for its own choice."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() else 0


def pick_provider(device: str) -> str:
    """Return the execution provider for `auto`, `cuda` or `cpu`; asking for CUDA where there is none is an error."""
    available = ort.get_available_providers()
    if device == "cpu":
        return CPU
    if CUDA in available and _cuda_works():
        return CUDA
    if device == "cuda":
        raise UsageError(f"--device cuda: ONNX Runtime {ort.__version__} finds no usable CUDA device; use --device cpu or auto")
    return CPU


def session(
    model: onnx.ModelProto | Path,
    provider: str = CPU,
    optimization: Optimization = Optimization.DEFAULT,
    without: frozenset[str] = frozenset(),
) -> ort.InferenceSession:
    """Open a session that runs on `provider` only (with CPU for what it lacks), `without` some optimisers by name.

    Raises:
        UnsupportedModelError: ONNX Runtime does not load the model.
    """
    return _open(model, optimization.options(), provider, without)


def kernel_counts(model: Path, provider: str = CPU) -> Counter[str]:
    """Count the operator types that ONNX Runtime executes for a file after its default optimisation."""
    return Counter(node.op_type for node in optimized(model, provider).node)


def optimized(model: Path, provider: str = CPU, optimization: Optimization = Optimization.DEFAULT) -> onnx.GraphProto:
    """The graph that ONNX Runtime executes for a file, to be read: what it lays out in blocks has the names that it had before."""
    with tempfile.TemporaryDirectory() as folder:
        options = optimization.options()
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        _open(model, options, provider)
        graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
    is_blocked = any(node.domain == BLOCKED_DOMAIN for node in graph.node)
    return _unblocked(graph, value_names(onnx.load(model, load_external_data=False).graph)) if is_blocked else graph


def _unblocked(graph: onnx.GraphProto, known: AbstractSet[str]) -> onnx.GraphProto:
    """The graph with the types and names that float operators had before they were laid out for the vector registers of the CPU.

    There values are called `reorder_token_3`, a node is named after the value of the file that it makes, which is in `known`, and
    BatchNormalization is a convolution.
    """
    named: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        node.input[:] = [named.get(value, value) for value in node.input]
        is_blocked = node.domain == BLOCKED_DOMAIN
        if is_blocked and node.op_type == "ReorderInput":
            named[node.output[0]] = node.input[0]
            continue
        if is_blocked and node.op_type == "ReorderOutput" and node.input[0] == node.output[0]:
            continue
        name = node.name.removesuffix(_BLOCKED)
        if is_blocked and name not in known and name.removesuffix("_bn") in known:
            name, node.op_type = name.removesuffix("_bn"), "BatchNormalization"
        if is_blocked and name in known:
            named[node.output[0]] = node.output[0] = node.name = name
        nodes.append(node)
    replace_nodes(graph, nodes)
    return graph


def cleaned(model: onnx.ModelProto, shelf: Path | None = None, name: str = "cleaned") -> onnx.ModelProto:
    """Return the model after ONNX Runtime's basic level: constants lifted and folded, BatchNorm and padding folded, identities removed.

    With a `shelf`, a folder, its weights are outside, in a file of this name there.

    Compared on the benchmark models: onnxruntime basic, onnxslim 0.1.98, onnxscript 0.7 and onnxsim 0.8 all keep value names and outputs.
    This one folds as much as the best of them, is the fastest (under 0.1 s), needs no further dependency, and is by construction what the
    deployed session would do first; onnxscript leaves shape arithmetic, onnxsim leaves Constant nodes and invents value names.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = Optimization.BASIC.options()
        options.optimized_model_filepath = str(Path(folder) / f"{name}.onnx")
        if shelf is None:
            _open(model, options, CPU)
            return onnx.load(options.optimized_model_filepath)
        options.optimized_model_filepath = str(shelf / f"{name}.onnx")
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{name}.weights")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        _open(model, options, CPU)
        return large.load(shelf / f"{name}.onnx")


def known_shapes(model: onnx.ModelProto) -> dict[str, tuple[int | None, ...]]:
    """The shapes of values for inputs of any size, None where an axis is open, by symbolic shape inference; empty where that fails."""
    from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference  # imports sympy, which takes a while

    inference = SymbolicShapeInference(int_max=2**31 - 1, auto_merge=False, guess_output_rank=False, verbose=0)
    try:
        inference._preprocess(model)
        while inference.run_:
            inference._infer_impl()
    except Exception:  # whatever it makes of operators that it does not know
        return {}
    kinds = {name: value.type.tensor_type for name, value in inference.known_vi_.items()}
    return {
        name: tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim)
        for name, kind in kinds.items()
        if kind.HasField("shape")
    }


def run(opened: ort.InferenceSession, feeds: Mapping[str, np.ndarray], names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Run a session over all samples in batches and return its outputs, joined along the first axis.

    A model whose batch axis is fixed is fed that many samples at a time; a last incomplete batch is filled up and the filling cut off.
    Outputs whose shapes differ from batch to batch (detections) are joined as flat arrays. Those of a model without a sample axis are
    stacked: [N, one output's shape].

    Args:
        opened: the session.
        feeds: arrays [N, one sample's shape] by input name; see `batched`.
        names: of the outputs; default all.
    """
    return together(passes(opened, feeds, names))


def run_each(opened: ort.InferenceSession, feeds: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, list[np.ndarray]]:
    """What outputs are for each sample alone, in its order, as the model makes them: for shapes that follow from the data."""
    count = len(next(iter(feeds.values()))) if feeds else 1
    found = [run(opened, {name: array[i : i + 1] for name, array in feeds.items()}, names) for i in range(count)]
    return {name: [one[name] for one in found] for name in names}


@dataclass(frozen=True)
class Pass:
    """One run of a session: what it was fed, in the model's own layout, and what it made.

    `size` samples were fed, `count` of them are real. `stacks`: the samples of the model are counted by no axis of its values.
    """

    fed: Mapping[str, np.ndarray]
    made: Mapping[str, Any]
    size: int
    count: int
    stacks: bool


def passes(opened: ort.InferenceSession, feeds: Mapping[str, np.ndarray], names: Sequence[str] | None = None) -> Iterator[Pass]:
    """Run a session over all samples, as they are asked for; see `run`."""
    names = list(names) if names is not None else [output.name for output in opened.get_outputs()]
    stacks = takes_each(session_axes(opened, feeds))
    for fed, size, count in batches(opened, feeds):
        yield Pass(fed, execute(opened, fed, names), size, count, stacks)


def together(found: Iterable[Pass]) -> dict[str, np.ndarray]:
    """What all passes made, joined along the first axis. Nothing else of a pass is kept."""
    parts: dict[str, list[np.ndarray]] = {}
    for one in found:
        for name, value in one.made.items():
            array = as_array(value)
            array = array[np.newaxis] if one.stacks else array
            parts.setdefault(name, []).append(array[: one.count] if array.ndim and array.shape[0] == one.size else array)
    return {name: joined(some) for name, some in parts.items()}


def batches(opened: ort.InferenceSession, feeds: Mapping[str, np.ndarray]) -> Iterator[tuple[dict[str, np.ndarray], int, int]]:
    """The samples as the session takes them: (feeds, samples fed, how many of them are real) for each run."""
    axes, fixed = session_axes(opened, feeds), fixed_batch(opened, feeds)
    size = fixed or (1 if differing(feeds, axes) else BATCH)
    count = len(next(iter(feeds.values()))) if feeds else 1
    for start in range(0, count, size):
        rows = np.arange(start, min(start + size, count))
        filled = np.resize(rows, size) if fixed else rows
        yield batched({name: array[filled] for name, array in feeds.items()}, axes), len(filled), len(rows)


def batched(feeds: Mapping[str, np.ndarray], axes: Mapping[str, int | None]) -> dict[str, np.ndarray]:
    """Arrays [N, one sample's shape] as a model wants them: samples along its own sample axis; what has none is fed once, not N times."""
    return {
        name: array if axes.get(name, 0) == 0 else np.asarray(array[0]) if (axis := axes[name]) is None else np.moveaxis(array, 0, axis)
        for name, array in feeds.items()
    }


def differing(feeds: Mapping[str, np.ndarray], axes: Mapping[str, int | None]) -> bool:
    """Whether samples differ in an input without a sample axis, so that each needs a run of its own."""
    return takes_each(axes) or any(
        axes.get(name, 0) is None and array.strides[0] != 0 and (array != array[:1]).any() for name, array in feeds.items()
    )


def takes_each(axes: Mapping[str, int | None]) -> bool:
    """Whether no input has a sample axis: the model takes one sample, whole, in each run."""
    return bool(axes) and all(axis is None for axis in axes.values())


def sample_axes(shapes: Mapping[str, Sequence[int | str | None]]) -> dict[str, int | None]:
    """Which axis of each input counts samples, told from the declared shapes; None for inputs that all samples share.

    The axis that is named like a batch. Without such a name axis 0 where it is open. Where that is fixed and another input's is open, the
    axis of the same name, or the only open one (a recurrent state [layers, N, width]). A model without open axes takes as many samples as
    the first axis of its largest input says.
    """
    named = {size for shape in shapes.values() for size in shape if isinstance(size, str) and _BATCH_NAME.fullmatch(size)}
    first = {shape[0] for shape in shapes.values() if shape and not _is_fixed(shape[0])}
    largest = max(shapes.values(), key=len, default=())
    return {name: _sample_axis(shape, named or first or set(largest[:1])) for name, shape in shapes.items()}


def fed_axes(shapes: Mapping[str, Sequence[int | str | None]], feeds: Mapping[str, np.ndarray]) -> dict[str, int | None]:
    """`sample_axes` for feeds [N, one sample's shape]: what has an axis more than the model's input is taken sample by sample."""
    whole = {name for name, shape in shapes.items() if name in feeds and feeds[name].ndim > len(shape)}
    return {name: None if name in whole else axis for name, axis in sample_axes(shapes).items()}


def session_axes(opened: ort.InferenceSession, feeds: Mapping[str, np.ndarray]) -> dict[str, int | None]:
    """`fed_axes` of a session's inputs."""
    return fed_axes({entry.name: entry.shape for entry in opened.get_inputs()}, feeds)


def input_axes(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> dict[str, int | None]:
    """`fed_axes` of a model's inputs."""
    return fed_axes({value.name: declared_shape(value) for value in model.graph.input}, feeds)


def declared_shape(value: onnx.ValueInfoProto) -> tuple[int | str | None, ...]:
    """A value's axes: an int where fixed, else a name or None."""
    dims = value.type.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else (d.dim_param or None) for d in dims)


def _sample_axis(shape: Sequence[int | str | None], counts: AbstractSet[int | str | None]) -> int | None:
    if not shape:
        return None
    if any(_is_fixed(count) for count in counts):
        return next((axis for axis, size in enumerate(shape) if size in counts), None)
    if not _is_fixed(shape[0]) and counts.isdisjoint(shape[1:]):
        return 0
    found = [axis for axis, size in enumerate(shape) if not _is_fixed(size)]
    named = [axis for axis in found if shape[axis] in counts]
    return named[0] if named else found[0] if len(found) == 1 else None


def _is_fixed(size: int | str | None) -> bool:
    return isinstance(size, int) and size > 0


def as_array(value: Any) -> np.ndarray:
    """What ONNX Runtime made, as an array: maps from class to score as rows of scores [N, C], a sequence of unequal tensors flat."""
    if not isinstance(value, list) or not value:
        return np.asarray(value)
    if isinstance(value[0], dict):
        return np.array([list(scores.values()) for scores in value])
    alike = all(np.shape(part) == np.shape(value[0]) for part in value)
    return np.asarray(value) if alike else np.concatenate([np.ravel(part) for part in value])


def joined(parts: list[np.ndarray]) -> np.ndarray:
    """The results of several runs as one array: along the first axis, or flat where their shapes differ beyond it."""
    parts = [np.atleast_1d(part) for part in parts]
    same = all(part.shape[1:] == parts[0].shape[1:] for part in parts)
    return np.concatenate(parts if same else [part.reshape(-1) for part in parts])


def fixed_batch(opened: ort.InferenceSession, feeds: Mapping[str, np.ndarray]) -> int | None:
    """The sample count that the model insists on for feeds [N, one sample's shape], or None where it takes any, or each on its own."""
    shapes = {entry.name: entry.shape for entry in opened.get_inputs()}
    sizes = [shapes[name][axis] for name, axis in fed_axes(shapes, feeds).items() if axis is not None]
    return next((size for size in sizes if _is_fixed(size)), None)


def exposing(model: onnx.ModelProto, names: Sequence[str], optimization: Optimization = Optimization.BASIC) -> ort.InferenceSession:
    """A session on a model whose outputs are values from inside it; values that are no outputs of a node cannot be asked for."""
    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    del exposed.graph.output[:]
    exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return session(exposed, optimization=optimization)


def run_exposed(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Run a model and return values from inside it by name."""
    return run(exposing(model, names), feeds, names)


def execute(opened: ort.InferenceSession, feeds: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """One run of a session on feeds in the model's own layout. Values are arrays, or lists of them for sequences.

    Raises:
        UnsupportedModelError: ONNX Runtime fails on these values.
    """
    try:
        found = dict(zip(names, opened.run(list(names), {name: _fed(value) for name, value in feeds.items()}), strict=True))
    except Exception as error:  # as in `_open`
        raise UnsupportedModelError(f"ONNX Runtime {ort.__version__} cannot run the model: {first_line(error)}") from error
    bits = {entry.name for entry in opened.get_outputs() if entry.type == "tensor(float8e4m3fn)"}
    return {name: np.asarray(value).view(FLOAT8) if name in bits else value for name, value in found.items()}


def _fed(value: Any) -> Any:
    """NumPy has no 8-bit floats that ONNX Runtime takes as they are."""
    if not isinstance(value, np.ndarray) or value.dtype != FLOAT8:
        return value
    bits = np.ascontiguousarray(value).view(np.uint8)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, onnx.TensorProto.FLOAT8E4M3FN)


def declared_types(opened: ort.InferenceSession) -> dict[str, onnx.TypeProto]:
    """The types of a session's outputs as ONNX Runtime infers them, without shapes."""
    return {entry.name: _type_proto(entry.type) for entry in opened.get_outputs()}


def _type_proto(text: str) -> onnx.TypeProto:
    """From ONNX Runtime's spelling, such as `seq(tensor(float))`."""
    kind, _, inner = text.removesuffix(")").partition("(")
    if kind in ("tensor", "sparse_tensor"):
        return onnx.helper.make_tensor_type_proto(_ELEMENT_TYPES.get(inner, onnx.TensorProto.UNDEFINED), None)
    if kind == "seq":
        return onnx.helper.make_sequence_type_proto(_type_proto(inner))
    if kind == "optional":
        return onnx.helper.make_optional_type_proto(_type_proto(inner))
    key, _, value = inner.partition(",")
    return onnx.helper.make_map_type_proto(_ELEMENT_TYPES[key], _type_proto(value))


def _open(
    model: onnx.ModelProto | Path, options: ort.SessionOptions, provider: str, without: frozenset[str] = frozenset()
) -> ort.InferenceSession:
    # TF32, which the CUDA provider takes by itself, moves values across rounding ties: float32, as in torch.
    providers = [CPU] if provider == CPU else [(provider, {"use_tf32": "0"}), CPU]
    if isinstance(model, onnx.ModelProto) and large.is_large(model):
        with tempfile.TemporaryDirectory() as folder:
            large.stored(model, Path(folder) / "model.onnx")
            return _open(Path(folder) / "model.onnx", options, provider, without)
    if isinstance(model, onnx.ModelProto) and (weights := large.folder_of(model)) is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
        options.add_session_config_entry("session.disable_prepacking", "1")  # it would copy what is mapped into memory
    if _quantizes_to_float8(model):
        # Operands in fp8 are fused into integer kernels that do not exist. Files for TensorRT run here without that.
        options.add_session_config_entry(*_WITHOUT_KERNELS)
        without |= _FLOAT8_BREAKS
    try:
        serialized = str(model) if isinstance(model, Path) else large.serialized(model)
        # A second try only helps where CUDA failed; on the CPU it would print a banner and fail again.
        return ort.InferenceSession(
            serialized, options, providers=providers, disabled_optimizers=set(without) or None, enable_fallback=int(provider != CPU)
        )
    except Exception as error:  # ONNX Runtime raises a family of C++-born exceptions without a common public base
        raise UnsupportedModelError(f"ONNX Runtime {ort.__version__} cannot load the model: {first_line(error)}") from error


def _quantizes_to_float8(model: onnx.ModelProto | Path) -> bool:
    try:
        graph = (onnx.load(model, load_external_data=False) if isinstance(model, Path) else model).graph
    except Exception:  # ONNX Runtime says it better
        return False
    numbers = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT8E4M3FN}
    return bool(numbers) and any(node.op_type == "QuantizeLinear" and not numbers.isdisjoint(node.input) for node in graph.node)


def _cuda_works() -> bool:
    """The GPU build lists CUDA on machines without a GPU too, so look for a driver, then try a model that does nothing."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    ort.preload_dlls()  # CUDA and cuDNN come as Python packages beside torch
    model = onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 13]> g (float[1] x) => (float[1] y) { y = Identity(x) }')
    try:
        return CUDA in ort.InferenceSession(model.SerializeToString(), providers=[CUDA]).get_providers()
    except Exception:  # same family as above: any failure means that there is no usable GPU
        return False
