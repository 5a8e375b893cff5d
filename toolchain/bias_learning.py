"""The learned biases of a unit: Adam on the float biases, beside the rounding of the weights."""

from collections.abc import Mapping

import numpy as np
import torch

from .placement import Bias
from .quant_table import QuantTable


class LearnedBiases:
    """The biases of a unit, each moved by a share of the magnitude of its channel: |w_c| times a quarter of the input's range.

    So the learning rate means the same for every layer and bit width.
    """

    def __init__(self, biases: Mapping[str, Bias], floats: Mapping[str, np.ndarray], table: QuantTable, device: torch.device) -> None:
        self._floats: dict[str, torch.Tensor] = {}
        self._magnitudes: dict[str, torch.Tensor] = {}
        for name, bias in biases.items():
            array = floats[name]
            self._floats[name] = torch.tensor(array).to(device)
            self._magnitudes[name] = torch.tensor(_magnitude(bias, array, floats[bias.weight], table)).to(device)
        self._moves = {name: torch.zeros_like(bias, requires_grad=True) for name, bias in self._floats.items()}

    @property
    def parameters(self) -> list[torch.Tensor]:
        """What an optimiser moves, in shares of the channels' magnitudes."""
        return list(self._moves.values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """The biases as they are now, by name."""
        return {name: torch.addcmul(bias, self._moves[name], self._magnitudes[name]) for name, bias in self._floats.items()}

    @torch.no_grad()
    def arrays(self) -> dict[str, np.ndarray]:
        """The same, as arrays."""
        return {name: tensor.cpu().numpy() for name, tensor in self.tensors().items()}


def _magnitude(bias: Bias, array: np.ndarray, weight: np.ndarray, table: QuantTable) -> np.ndarray:
    axis, read = table[bias.weight].spec.axis, table[bias.input]
    others = tuple(a for a in range(weight.ndim) if a != axis) if axis is not None else None
    norms = np.sqrt(np.square(weight, dtype=np.float64).sum(axis=others) / (1 if axis is not None else array.size))
    span = float(read.scale) * (read.spec.qmax - read.spec.qmin)
    return np.broadcast_to(0.25 * span * norms, array.size).reshape(array.shape).astype(np.float32)
