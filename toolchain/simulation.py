"""The quantized model run in torch: what the exported file is held against."""

from collections.abc import Mapping

import numpy as np
import torch

from . import runtime
from .activations import Parts, TorchModel, quantizing, unpacked
from .config import Config
from .device import full_float32, give_back
from .importing import cut_blocks
from .islands import find_islands
from .quant_table import QuantTable
from .samples import Samples
from .scheme import ORT_CPU, Scheme
from .source import SourceModel, infer_types


@full_float32()
def simulate(
    source: SourceModel,
    table: QuantTable,
    samples: Samples,
    device: torch.device,
    islands: Mapping[str, str] | None = None,
    scheme: Scheme = ORT_CPU,
) -> dict[str, np.ndarray]:
    """Run the quantized model in torch: the graph outputs under the table by name, as `runtime.run` joins them.

    Args:
        source: the float model.
        table: the grids.
        samples: what to run on.
        device: where.
        islands: nodes left to ONNX Runtime, as `Quantized` names them.
        scheme: of the target, which says whether a graph output that layers read too is handed out as it is or as they read it.
    """
    source = source.with_copies(table.copies)
    types = infer_types(source, samples.shapes, samples.inputs)
    islands = find_islands(source, types) if islands is None else islands
    model = TorchModel.of(source, types, cut_blocks(source, types, islands, Config()), device)
    count = samples.count
    if types.batch is not None:
        samples = samples.taken(np.arange(-(-count // types.batch) * types.batch) % count)
    stream = model.stream(samples.inputs, table)
    quantize = quantizing(table)
    made: dict[str, list[torch.Tensor]] = {name: [] for name in source.graph.outputs if name in table and scheme.results != "all"}

    def observe(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name in made:
            made[name].append(tensor.to("cpu", copy=True))
        return quantize(name, tensor)

    for piece in model.pieces:
        stream.advance(model.run(piece, stream, table, observe))
    found: dict[str, np.ndarray] = {}
    for name, kept in stream.of(source.graph.outputs).items():
        value = unpacked(kept)
        parts = made.get(name) or (value if isinstance(value, Parts) else [value])
        arrays = [part.cpu().numpy() if isinstance(part, torch.Tensor) else runtime.as_array(part) for part in parts]
        joined = runtime.joined([array[np.newaxis] for array in arrays] if runtime.takes_each(source.axes) else arrays)
        found[name] = joined[:count] if isinstance(value, torch.Tensor) else joined
    give_back(device)
    return found


@full_float32()
def simulated_values(
    source: SourceModel, table: QuantTable, samples: Samples, islands: Mapping[str, str] | None = None
) -> dict[str, np.ndarray]:
    """Every value of the quantized model in torch on the CPU, graph inputs included, by name, in one forward pass over few samples."""
    source = source.with_copies(table.copies)
    types = infer_types(source, samples.shapes, samples.inputs)
    blocks = cut_blocks(source, types, find_islands(source, types) if islands is None else islands, Config())
    model = TorchModel.of(source, types, blocks, torch.device("cpu"), samples.count)
    stream = model.stream(samples.inputs, table)
    fed = {name: stream.passes.part(value, 0) for name, value in stream.of(source.graph.inputs).items()}
    values = {name: tensor.numpy().copy() for name, tensor in fed.items() if isinstance(tensor, torch.Tensor)}

    def observe(name: str, tensor: torch.Tensor) -> torch.Tensor:
        found = quantizing(table)(name, tensor)
        values[name] = found.numpy().copy()
        return found

    for piece in model.pieces:
        stream.advance(model.run(piece, stream, table, observe))
    return values


def few_samples(source: SourceModel, samples: Samples, count: int) -> Samples:
    """The first samples that one run takes: `count` of them, or as many as the model's fixed batch, going round where there are fewer."""
    one_by_one = runtime.differing(samples.inputs, source.axes)
    size = source.batch or (1 if one_by_one else min(count, samples.count))
    return samples.taken(np.arange(size) % samples.count)
