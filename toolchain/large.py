"""Models beyond what one protobuf may hold (2 GB): written with their weights in a file beside them, tensor by tensor."""

from pathlib import Path

import onnx
from onnx import TensorProto

LIMIT = (1 << 31) - (1 << 20)  # bytes of weights; the rest of a graph fits into the last MiB
_SMALL = 1024  # bytes; shapes and scalars stay in the graph, where shape inference looks for them
_ALIGNMENT = 4096  # so that the runtime can map a weight into memory


def is_large(model: onnx.ModelProto) -> bool:
    """Whether a model cannot be serialised in one piece."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer) > LIMIT


def stored(model: onnx.ModelProto, folder: Path) -> Path:
    """Write a model as `model.onnx` and `model.weights` into a folder; no second copy of the weights is made, the model is unchanged."""
    skeleton = onnx.ModelProto()
    skeleton.ir_version = model.ir_version
    skeleton.opset_import.extend(model.opset_import)
    skeleton.metadata_props.extend(model.metadata_props)
    skeleton.functions.extend(model.functions)
    graph = skeleton.graph
    graph.name = model.graph.name
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    graph.value_info.extend(model.graph.value_info)
    with (folder / "model.weights").open("wb") as file:
        for tensor in model.graph.initializer:
            if len(tensor.raw_data) < _SMALL:
                graph.initializer.add().CopyFrom(tensor)
                continue
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
            kept = graph.initializer.add()
            kept.name, kept.data_type, kept.data_location = tensor.name, tensor.data_type, TensorProto.EXTERNAL
            kept.dims.extend(tensor.dims)
            place = {"location": "model.weights", "offset": str(file.tell()), "length": str(len(tensor.raw_data))}
            for key, value in place.items():
                kept.external_data.add(key=key, value=value)
            file.write(tensor.raw_data)
    path = folder / "model.onnx"
    path.write_bytes(skeleton.SerializeToString())
    return path
