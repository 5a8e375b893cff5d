"""Weights that are too large to be held: they stay in a file, and a model only says where in it each of them is.

ONNX calls that external data. A model read from such a file, or larger than `OUTSIDE`, is a skeleton from then on: copying, cutting and
rewriting it costs nothing, ONNX Runtime and NumPy map the file into memory, and the system keeps of it what there is room for. What may be
written in one piece is limited by protobuf to 2 GB; beyond that, weights go into a file beside the model.
"""

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference

from .errors import UnsupportedModelError

LIMIT = (1 << 31) - (1 << 20)  # bytes of weights; the rest of a graph fits into the last MiB
OUTSIDE = 1 << 28  # bytes of weights from which they are kept outside; less is faster in memory
SUFFIX = ".data"  # of the file beside a model that holds its weights
_LARGEST_GRAPH = 1 << 26  # bytes without weights
_SMALL = 1024  # bytes; shapes and scalars stay in the graph, where shape inference looks for them
_ALIGNMENT = 4096  # so that a weight can be mapped into memory
# Half precision is widened, and packed integers are unpacked, which takes a copy anyhow.
_MAPPED = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT8, TensorProto.UINT8, TensorProto.INT32, TensorProto.INT64)
_FOLDER = "basepath"  # where ONNX's own tools note the folder, too; it is not for files


class Shelf:
    """A folder for weights that vanishes with the last who holds it, and at the end of the program."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="mrecg-onnx-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)


def weight_bytes(model: onnx.ModelProto) -> int:
    """The bytes of a model's weights, wherever they are."""
    return sum(_size(tensor) for tensor in model.graph.initializer)


def is_large(model: onnx.ModelProto) -> bool:
    """Whether a model cannot be serialised in one piece."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer) > LIMIT


def is_outside(tensor: TensorProto) -> bool:
    """Whether a tensor's values are in another file."""
    return tensor.data_location == TensorProto.EXTERNAL


def folder_of(model: onnx.ModelProto) -> Path | None:
    """The folder of the weights that are outside; None where there are none."""
    return next((Path(_entries(tensor)[_FOLDER]) for tensor in model.graph.initializer if is_outside(tensor)), None)


def load(path: Path) -> onnx.ModelProto:
    """Read a model; its weights stay in their files where they are more than `OUTSIDE`.

    Raises:
        UnsupportedModelError: a file of weights is missing, too short, or in another folder.
    """
    model = onnx.load(path, load_external_data=False)
    outside = [tensor for tensor in model.graph.initializer if is_outside(tensor)]
    if all(tensor.data_type in _MAPPED for tensor in outside) and sum(map(_declared_size, outside)) > OUTSIDE:
        _attach(outside, path)
        return model
    return onnx.load(path) if outside else model


def file_bytes(path: Path) -> int:
    """The size of a model's file, with those of the files beside it that its weights are in."""
    if path.stat().st_size > _LARGEST_GRAPH:  # then the weights are in it
        return path.stat().st_size
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    names = {_entries(tensor)["location"] for tensor in tensors if is_outside(tensor)}
    return path.stat().st_size + sum((path.parent / name).stat().st_size for name in names)


def array(tensor: TensorProto) -> np.ndarray:
    """A tensor's values; those that are outside are mapped, not read."""
    if not is_outside(tensor):
        return numpy_helper.to_array(tensor)
    entries, dtype = _entries(tensor), helper.tensor_dtype_to_np_dtype(tensor.data_type)
    place = Path(entries[_FOLDER]) / entries["location"]
    return np.asarray(np.memmap(place, dtype.newbyteorder("<"), "r", int(entries.get("offset", 0)), tuple(tensor.dims)))


def moved_out(model: onnx.ModelProto, file: Path) -> None:
    """Move the weights that a model holds, if any, into a file, one after another, and let it say where they are."""
    held = [tensor for tensor in model.graph.initializer if len(tensor.raw_data) >= _SMALL]
    if not held:
        return
    with file.open("wb") as stream:
        for tensor in held:
            _set_place(tensor, file.name, _written(tensor.raw_data, stream), len(tensor.raw_data), file.parent)
            tensor.ClearField("raw_data")


def brought_in(model: onnx.ModelProto) -> None:
    """Read the weights that are outside into the model."""
    for tensor in model.graph.initializer:
        if is_outside(tensor):
            values = array(tensor).tobytes()
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.raw_data = values


def serialized(model: onnx.ModelProto) -> bytes:
    """A model as the bytes of a file in the folder of its weights."""
    if folder_of(model) is None:
        return model.SerializeToString(deterministic=True)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if is_outside(tensor):
            _keep_entries(tensor, {key: value for key, value in _entries(tensor).items() if key != _FOLDER})
    return copy.SerializeToString(deterministic=True)


def skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a model whose weights, wherever they are, are inputs of the same types: for tools that look at the graph only."""
    result = _without_tensors(model)
    given = {value.name for value in model.graph.input}
    for tensor in model.graph.initializer:
        if tensor.name in given:
            continue
        if is_outside(tensor) or len(tensor.raw_data) >= _SMALL:
            result.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
        else:
            result.graph.initializer.add().CopyFrom(tensor)
    return result


def inferred_values(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """What is known of the values of a model: what it declares, and what ONNX infers where it can."""
    try:
        graph = shape_inference.infer_shapes(skeleton(model)).graph
    except shape_inference.InferenceError:
        graph = model.graph
    return [*graph.input, *graph.value_info, *graph.output]


def with_weights_of(model: onnx.ModelProto, change: Callable[[onnx.ModelProto], onnx.ModelProto]) -> onnx.ModelProto:
    """A changed model, where the change does not see the weights that are outside."""
    if folder_of(model) is None:
        return change(model)
    changed = change(skeleton(model))
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    lent = [value for value in changed.graph.input if value.name in tensors]
    for value in lent:
        changed.graph.input.remove(value)
        changed.graph.initializer.add().CopyFrom(tensors[value.name])
    return changed


def stored(model: onnx.ModelProto, path: Path) -> None:
    """Write a model with its weights in `path` + `.data`; no second copy of them is made, and the model is unchanged.

    Both files are written beside their places and moved there when they are whole.

    Raises:
        OSError: the folder cannot be written.
    """
    data, result = path.with_name(path.name + SUFFIX), _without_tensors(model)
    parts = [_part(path), _part(data)]
    try:
        with parts[1].open("wb") as stream:
            for tensor in model.graph.initializer:
                kept = result.graph.initializer.add()
                if not is_outside(tensor) and len(tensor.raw_data) < _SMALL:
                    kept.CopyFrom(tensor)
                    continue
                kept.name, kept.data_type = tensor.name, tensor.data_type
                kept.dims.extend(tensor.dims)
                values = array(tensor).reshape(-1).view(np.uint8).data if is_outside(tensor) else tensor.raw_data
                _set_place(kept, data.name, _written(values, stream), len(values), None)
        parts[0].write_bytes(result.SerializeToString(deterministic=True))
        os.replace(parts[1], data)
        os.replace(parts[0], path)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def _without_tensors(model: onnx.ModelProto) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.ir_version = model.ir_version
    result.producer_name, result.producer_version, result.doc_string = model.producer_name, model.producer_version, model.doc_string
    result.opset_import.extend(model.opset_import)
    result.metadata_props.extend(model.metadata_props)
    result.functions.extend(model.functions)
    graph = result.graph
    graph.name, graph.doc_string = model.graph.name, model.graph.doc_string
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    graph.value_info.extend(model.graph.value_info)
    return result


def _attach(tensors: Iterable[TensorProto], path: Path) -> None:
    """Note the folder of external weights, and see that they are there."""
    for tensor in tensors:
        entries = _entries(tensor)
        place = path.parent / entries.get("location", "")
        if not place.is_file() or path.parent.resolve() not in place.resolve().parents:
            raise UnsupportedModelError(f"{path}: the weights of {tensor.name!r} are not in a file beside it: {entries.get('location')!r}")
        needed = _declared_size(tensor)
        offset, length = (int(entries.get(key, default)) for key, default in (("offset", 0), ("length", needed)))
        if length != needed or offset < 0 or offset + length > place.stat().st_size:
            raise UnsupportedModelError(
                f"{path}: the weights of {tensor.name!r} are {needed:,} bytes, of which {place.name} has {length:,} at {offset:,}; it is "
                f"{place.stat().st_size:,} bytes long"
            )
        _keep_entries(tensor, entries | {_FOLDER: str(path.parent.resolve())})


def _entries(tensor: TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _keep_entries(tensor: TensorProto, entries: dict[str, str]) -> None:
    tensor.ClearField("external_data")
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)


def _set_place(tensor: TensorProto, location: str, offset: int, length: int, folder: Path | None) -> None:
    tensor.data_location = TensorProto.EXTERNAL
    entries = {"location": location, "offset": str(offset), "length": str(length)}
    _keep_entries(tensor, entries if folder is None else entries | {_FOLDER: str(folder)})


def _written(values: bytes | memoryview, stream: BinaryIO) -> int:
    """Append values at an aligned place; returns it."""
    stream.write(b"\0" * (-stream.tell() % _ALIGNMENT))
    offset = stream.tell()
    stream.write(values)
    return offset


def _declared_size(tensor: TensorProto) -> int:
    return int(np.prod(tensor.dims, dtype=np.int64)) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _size(tensor: TensorProto) -> int:
    return _declared_size(tensor) if is_outside(tensor) else len(tensor.raw_data)


def _part(path: Path) -> Path:
    """A file beside a place, that nobody else has."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(descriptor)
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(name, 0o666 & ~umask)  # mkstemp makes private files
    return Path(name)
