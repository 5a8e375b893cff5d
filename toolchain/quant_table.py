"""The quantization table: which value carries which integer grid. Frozen NumPy data, the only thing that crosses from learning to export.

The arithmetic here is the reference (float32, round half to even, as ONNX QuantizeLinear defines it); `fake_quant.py` has the same in
torch, and a test holds the two and ONNX Runtime equal bit for bit.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import ml_dtypes
import numpy as np

BIAS_BITS = 32
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
FLOAT8_MAX = 448.0
FLOAT8_UNIT = 512  # every number of E4M3 is a whole multiple of 2^-9, its smallest


@dataclass(frozen=True)
class QuantSpec:
    """What kind of grid a value gets, before any range is known.

    `axis` is the channel axis for per-channel grids (None: one grid for the tensor). `narrow` leaves out the lowest code (-127..127), which
    keeps 8-bit symmetric weights free of the asymmetric extra code, as runtimes expect. `span` is the range where it is known without
    samples (a Sigmoid's 0 to 1). `block` cuts `axis` into stretches of so many values with a scale each; `axis` is then the one that is
    summed over, and scales have the value's own rank. `float8` keeps of a signed grid around zero only the numbers of E4M3: codes count its
    smallest one, so that all arithmetic is that of integers, and the scale that ONNX knows is 512 times this one. `summed`: the
    axes along which two neighbouring codes of one sign add up to 128 at most (`saturation`).
    """

    bits: int
    signed: bool
    symmetric: bool
    axis: int | None = None
    narrow: bool = False
    span: tuple[float, float] | None = None
    block: int | None = None
    float8: bool = False
    summed: tuple[int, ...] | None = None

    @property
    def qmin(self) -> int:
        if self.float8:
            return -self.qmax
        return (-(1 << (self.bits - 1)) + self.narrow) if self.signed else 0

    @property
    def qmax(self) -> int:
        if self.float8:
            return int(FLOAT8_MAX) * FLOAT8_UNIT
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1


def weight_spec(bits: int, axis: int | None, symmetric: bool, block: int | None = None) -> QuantSpec:
    """Signed grid, per channel where there is an axis.

    8-bit symmetric weights use -127..127, fewer bits use every code (one of 16 is worth having).
    """
    return QuantSpec(bits, signed=True, symmetric=symmetric, axis=axis, narrow=symmetric and bits == 8, block=block)


def activation_spec(bits: int, symmetric: bool, span: tuple[float, float] | None = None) -> QuantSpec:
    """Per-tensor grid: unsigned with a zero point, or signed around zero."""
    return QuantSpec(bits, signed=symmetric, symmetric=symmetric, span=span)


def float8_spec(spec: QuantSpec) -> QuantSpec:
    """The E4M3 grid in place of an 8-bit one."""
    return replace(spec, signed=True, symmetric=True, narrow=False, span=None, float8=True)


@dataclass(frozen=True)
class Copy:
    """A value that has the elements of another, its `origin`, and a grid of its own for the nodes named in `readers`."""

    origin: str
    readers: tuple[str, ...]


@dataclass(frozen=True)
class TensorQuant:
    """The grid of one value: `scale` and `zero_point` are scalars, arrays [C] along `spec.axis`, or one for each block.

    `codes` holds the integers of a constant (weights, biases) in the value's own ONNX layout; activations have none. `tied_to` names the
    value whose grid this one repeats: data movement (MaxPool, Reshape, ...) leaves the grid as it is. `fixed` grids are not learned: their
    range is known, or shared with other values. `copy` is set for values
    that copy one of the model's, for layers that read it in fewer bits than others do.
    """

    spec: QuantSpec
    scale: np.ndarray | np.float32
    zero_point: np.ndarray | np.int32
    codes: np.ndarray | None = None
    tied_to: str | None = None
    fixed: bool = False
    copy: Copy | None = None

    def __post_init__(self) -> None:
        """Codes of up to 8 bits are held in bytes: as int32 (as those of fp8 are) they take as much memory as the float weights."""
        if self.codes is not None and self.spec.bits <= 8 and not self.spec.float8 and self.codes.dtype.itemsize > 1:
            object.__setattr__(self, "codes", self.codes.astype(np.int8 if self.spec.signed else np.uint8))

    def expanded(self, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Scale and zero point, shaped to broadcast against an array of this shape."""
        return tuple(_expanded(np.asarray(parameter), self.spec, shape) for parameter in (self.scale, self.zero_point))  # pyright: ignore[reportReturnType]

    def dequantized(self) -> np.ndarray:
        """Return the constant that the codes stand for, float32 in the value's layout."""
        assert self.codes is not None, "activations have no codes"
        return dequantize(self.codes, self)


@dataclass(frozen=True)
class QuantTable:
    """Frozen mapping from ONNX value name to `TensorQuant`."""

    tensors: Mapping[str, TensorQuant] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> TensorQuant:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def copies(self) -> dict[str, Copy]:
        """The values that the model has not but the table gives it."""
        return {name: grid.copy for name, grid in self.tensors.items() if grid.copy is not None}

    def updated(self, changes: Mapping[str, TensorQuant]) -> "QuantTable":
        return QuantTable({**self.tensors, **changes})


def _expanded(parameter: np.ndarray, spec: QuantSpec, shape: tuple[int, ...]) -> np.ndarray:
    if spec.axis is None or parameter.ndim == 0:
        return parameter
    if spec.block is not None:
        repeated = np.repeat(parameter, spec.block, axis=spec.axis)
        return np.ascontiguousarray(repeated.take(np.arange(shape[spec.axis]), axis=spec.axis))
    channels = [1] * len(shape)
    channels[spec.axis] = -1
    return parameter.reshape(channels)


def quantize(array: np.ndarray, grid: TensorQuant) -> np.ndarray:
    """codes = clip(round_half_even(x / scale) + zero_point, qmin, qmax), as int32 [same shape]."""
    scale, zero_point = grid.expanded(array.shape)
    if grid.spec.float8:
        numbers = np.clip(array.astype(np.float32) / (scale * np.float32(FLOAT8_UNIT)), -FLOAT8_MAX, FLOAT8_MAX).astype(FLOAT8)
        return (numbers.astype(np.float32) * FLOAT8_UNIT).astype(np.int32)
    codes = np.asarray(array.astype(np.float32) / scale)  # one array of floats from here on: weights are large
    np.rint(codes, out=codes)
    codes += zero_point.astype(np.float32)
    return np.clip(codes, grid.spec.qmin, grid.spec.qmax, out=codes).astype(np.int32)


def dequantize(codes: np.ndarray, grid: TensorQuant) -> np.ndarray:
    """x = (codes - zero_point) * scale, float32 [same shape]."""
    scale, zero_point = grid.expanded(codes.shape)
    return ((codes - zero_point).astype(np.float32) * scale).astype(np.float32)
