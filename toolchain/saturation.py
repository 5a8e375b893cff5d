"""Weights of 8 bits whose products do not saturate on x86 CPUs without VNNI instructions.

There ONNX Runtime multiplies bytes with vpmaddubsw, which adds two neighbouring products in 16 bits, silently saturated: 2 x 255 x 127 is
beyond, 255 x 128 is not. Weights of 7 bits never get there; but it is enough that two neighbours of one sign have codes that add up to 128,
which costs a channel a third of a bit where 7 bits cost it a whole one. Neighbours are the 1st and 2nd, 3rd and 4th of what is summed up:
matrix products pack their axis so, convolutions run channels last, the channels of one place before those of the next. Depthwise
convolutions multiply in 32 bits. (MLAS: QgemmU8X8KernelAvx2, ConvSymKernelAvx2.)
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .quant_table import TensorQuant

MOST = 128  # that two neighbouring codes of one sign may add up to
_ROUNDED = 1  # more than two numbers of steps may their codes add up to


def summed_axes(op_type: str, shape: Sequence[int], channel_axis: int) -> tuple[int, ...] | None:
    """The axes of a weight that are summed over, in that order, slowest first; None where no product saturates.

    Args:
        op_type: Conv, ConvTranspose (which has no integer kernel), Gemm or MatMul.
        shape: of the weight in its ONNX layout.
        channel_axis: that of its output channels.
    """
    if op_type == "Conv":
        is_depthwise = shape[1] == 1 and shape[0] > 1
        return None if is_depthwise else (*range(2, len(shape)), 1)
    return (2 * len(shape) - 3 - channel_axis,) if op_type in ("Gemm", "MatMul") else None


def fitted(weight: np.ndarray, grid: TensorQuant) -> TensorQuant:
    """The grid with steps so wide that no two neighbours, rounded to nearest, add up to more than `MOST`."""
    if grid.spec.summed is None:
        return grid
    first, second = _pairs(weight.astype(np.float32), grid.spec.summed)
    load = _load(first, second).max(axis=-1, initial=0.0)
    if grid.spec.axis is None:
        load = load.max(initial=0.0)
    scale = np.maximum(grid.scale, (load / (MOST - _ROUNDED)).astype(np.float32))
    return replace(grid, scale=scale)


def settled(grid: TensorQuant) -> TensorQuant:
    """The grid with codes that add up to at most `MOST`: both of a pair that learning moved beyond give up half of what is too much."""
    if grid.spec.summed is None or grid.codes is None:
        return grid
    codes = grid.codes.astype(np.int32)
    first, second = _pairs(codes, grid.spec.summed)
    excess = _load(first, second) - MOST
    if not (excess > 0).any():
        return grid
    excess = np.where((excess > 0) & (first * second > 0), excess, 0)
    is_first = np.abs(first) >= np.abs(second)
    larger, smaller = (excess + 1) // 2, excess // 2
    first = first - np.sign(first) * np.where(is_first, larger, smaller)
    second = second - np.sign(second) * np.where(is_first, smaller, larger)
    return replace(grid, codes=_unpaired(first, second, codes, grid.spec.summed))


def _load(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """What the activations of a pair can at most be multiplied with together: the sum of what has one sign."""
    return np.maximum(np.maximum(first, 0) + np.maximum(second, 0), np.maximum(-first, 0) + np.maximum(-second, 0))


def _pairs(array: np.ndarray, summed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours along the axes that are summed over, [..., pairs]; one that is left over has a zero beside it."""
    rows = np.moveaxis(array, summed, range(-len(summed), 0))
    rows = rows.reshape(*rows.shape[: rows.ndim - len(summed)], -1)
    if rows.shape[-1] % 2:
        rows = np.concatenate([rows, np.zeros((*rows.shape[:-1], 1), rows.dtype)], axis=-1)
    return rows[..., 0::2], rows[..., 1::2]


def _unpaired(first: np.ndarray, second: np.ndarray, like: np.ndarray, summed: tuple[int, ...]) -> np.ndarray:
    """An array of a layout from its pairs."""
    turned = np.moveaxis(like, summed, range(-len(summed), 0)).shape
    rows = np.stack([first, second], axis=-1).reshape(*first.shape[:-1], -1)
    rows = rows[..., : int(np.prod(turned[len(turned) - len(summed) :]))]
    return np.ascontiguousarray(np.moveaxis(rows.reshape(turned), range(-len(summed), 0), summed))
