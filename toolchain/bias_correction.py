"""Bias correction: the shift that rounding a layer's weights gives to the mean of its output is taken out of its bias.

Rounding errors of few weights (a depthwise filter has nine) on inputs of one sign do not cancel: they move a whole channel, and what moves
every sample alike costs more accuracy than noise. Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction"
(ICCV 2019), section 4.2: b - E[(W~ - W) x], with the expectation over calibration samples in place of BatchNorm statistics. The inputs are
those of the float model: the shift that clipped activations cause is left alone, since a few outliers decide its mean, and a constant
that makes up for them is wrong for every other sample. Reconstruction needs none of this: its loss sees the shift.
"""

import numpy as np
import torch

from .activations import TorchModel, run_piece
from .calibration import calibrate_bias
from .placement import Placement
from .quant_table import BIAS_BITS, QuantTable
from .samples import Samples

SAMPLES = 64  # each mean is also over all positions of an image


class _Means:
    """An observer that adds up values by channel (axis 1)."""

    def __init__(self, names: set[str]) -> None:
        self._names = names
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}

    def __call__(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name in self._names and tensor.dim() > 1:
            total = tensor.double().sum(dim=[axis for axis in range(tensor.dim()) if axis != 1])
            self._sums[name] = self._sums[name] + total if name in self._sums else total
            self._counts[name] = self._counts.get(name, 0) + tensor.numel() // tensor.shape[1]
        return tensor

    def of(self, name: str) -> np.ndarray:
        """The mean of each channel [C]."""
        return (self._sums[name] / max(self._counts[name], 1)).cpu().numpy()


def correct_biases(model: TorchModel, placement: Placement, table: QuantTable, samples: Samples) -> QuantTable:
    """Return the table with int32 codes of biases that keep the mean of each channel under the rounded weights.

    Each piece is run in float, once as it is and once with the rounded weights of each of its layers.

    Args:
        model: the pieces of the model in order.
        placement: says which biases are int32.
        table: grids and codes of everything, biases included.
        samples: the calibration samples, of which the first are taken.
    """
    stream = model.stream(samples.first(SAMPLES).whole(model.types.batch).inputs)
    bias_of = {bias.node: name for name, bias in placement.biases.items()}
    for piece in model.pieces:
        layers = {node.outputs[0]: bias_of[node.name] for node in piece.block.nodes if node.name in bias_of}
        inputs, constants, rounded = stream.of(piece.block.inputs), model.constants(piece), model.constants(piece, table)
        expected = _Means(set(layers))
        made = run_piece(piece, inputs, constants, stream.passes, expected)
        for value, name in layers.items():
            bias, found = placement.biases[name], _Means({value})
            run_piece(piece, inputs, constants | {bias.weight: rounded[bias.weight]}, stream.passes, found)
            known = model.source.constants[name]
            shifted = known + (expected.of(value) - found.of(value)).reshape(known.shape).astype(np.float32)
            if np.isfinite(shifted).all():
                table = table.updated({name: calibrate_bias(shifted, table[bias.weight], table[bias.input].scale, BIAS_BITS)})
        stream.advance(made)
    return table
