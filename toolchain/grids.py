"""The grids of a whole model: observed ranges to scales and zero points, biases whose scales follow, and values that repeat another's."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from .activations import TorchModel, observed, run_piece
from .calibration import Histogram, calibrate_activation, calibrate_bias, calibrate_weight, fit_bias
from .config import Config
from .partition import Block
from .placement import Placement, without
from .progress import Progress
from .quant_table import BIAS_BITS, QuantTable, TensorQuant
from .quant_table import quantize as encode
from .samples import Samples
from .source import SourceModel


def calibrate(
    model: TorchModel, placement: Placement, samples: Samples, config: Config, progress: Progress = lambda *_: None
) -> QuantTable:
    """Grids of all activations, from the float stream, and of all weights, with the codes of rounding to nearest.

    Activations that have no range (never made, or not finite) get none.
    """
    histograms: dict[str, Histogram] = {}
    endless: set[str] = set()

    def observe(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name in placement.activations and name not in endless and tensor.numel():
            if not torch.isfinite(tensor.aminmax()[1] - tensor.aminmax()[0]):
                endless.add(name)
                return tensor
            seen = Histogram.of(tensor)
            histograms[name] = histograms[name].merged(seen) if name in histograms else seen
        return tensor

    stream = model.stream(samples.inputs)
    for name, value in stream.of(model.source.graph.inputs).items():
        observed(name, value, observe)
    for position, piece in enumerate(model.pieces):
        progress("calibrating", position, len(model.pieces), float("nan"))
        stream.advance(run_piece(piece, stream.of(piece.block.inputs), model.constants(piece), stream.passes, observe))
    placement = without(placement, endless | (placement.activations.keys() - histograms.keys()))
    activation_range, weight_range = config.activation_range, config.weight_range
    if config.algorithm == "minmax":
        activation_range = weight_range = "minmax"
    table: dict[str, TensorQuant] = {
        name: calibrate_activation(histograms[name], spec, activation_range, config.percentile)
        for name, spec in placement.activations.items()
    }
    table |= shared_grids(placement, histograms, activation_range, config.percentile)
    for name, origin in placement.tied.items():
        table[name] = replace(table[origin], tied_to=origin)
    for name, spec in placement.weights.items():
        table[name] = calibrate_weight(model.source.constants[name], spec, weight_range, config.percentile)
    for name, bias in placement.biases.items():
        table[bias.weight] = fit_bias(table[bias.weight], model.source.constants[name], table[bias.input].scale)
    for name in placement.weights:
        table[name] = replace(table[name], codes=encode(model.source.constants[name], table[name]))
    return QuantTable(table | stored_grids(model.source, placement, weight_range, config.percentile))


def stored_grids(source: SourceModel, placement: Placement, method: str, percentile: float) -> dict[str, TensorQuant]:
    """Grids and codes of the weights that are only stored.

    At 8 bits their range is min-max: a search gains nothing there, and tables are large.
    """
    found = {}
    for name, spec in placement.stored.items():
        array = source.constants[name]
        grid = calibrate_weight(array, spec, "minmax" if spec.bits >= 8 else method, percentile)
        found[name] = replace(grid, codes=encode(array, grid), fixed=True)
    return found


def shared_grids(placement: Placement, histograms: Mapping[str, Histogram], method: str, percentile: float) -> dict[str, TensorQuant]:
    """One grid for all values that share one, from all that was seen of them."""
    seen: dict[str, Histogram] = {}
    for name, leader in placement.shared.items():
        seen[leader] = seen[leader].merged(histograms[name]) if leader in seen else histograms[name]
    grids = {name: calibrate_activation(found, placement.activations[name], method, percentile) for name, found in seen.items()}
    return {name: replace(grids[leader], fixed=True) for name, leader in placement.shared.items()}


def with_biases(source: SourceModel, placement: Placement, block: Block, table: QuantTable) -> QuantTable:
    """Add the int32 codes of a block's biases, whose scales follow from the inputs' and the weights'."""
    inside = {node.name for node in block.nodes}
    return table.updated(
        {
            name: calibrate_bias(source.constants[name], table[bias.weight], table[bias.input].scale, BIAS_BITS)
            for name, bias in placement.biases.items()
            if bias.node in inside
        }
    )


def retied(placement: Placement, table: QuantTable) -> QuantTable:
    """Let tied values follow the grid that they repeat."""
    return table.updated({name: replace(table[origin], tied_to=origin) for name, origin in placement.tied.items()})
