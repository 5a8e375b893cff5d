"""Which element type of ONNX carries the codes of a grid, and from which opset on."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx

from toolchain.errors import ExportError
from toolchain.quant_table import BIAS_BITS, FLOAT8, FLOAT8_UNIT, QuantSpec


@dataclass(frozen=True)
class Storage:
    """An ONNX element type with its range; `opset` and `ir` are the first in which QuantizeLinear and DequantizeLinear take it.

    A number of the type is `unit` codes.
    """

    dtype: np.dtype
    opset: int
    ir: int = 7
    unit: int = 1

    @property
    def onnx_type(self) -> int:
        return onnx.helper.np_dtype_to_tensor_dtype(self.dtype)

    @property
    def low(self) -> int:
        return -self.high if self.is_float else int(ml_dtypes.iinfo(self.dtype).min)

    @property
    def high(self) -> int:
        return int(ml_dtypes.finfo(self.dtype).max) * self.unit if self.is_float else int(ml_dtypes.iinfo(self.dtype).max)

    @property
    def is_float(self) -> bool:
        return self.dtype == FLOAT8

    def numbers(self, codes: np.ndarray) -> np.ndarray:
        """Codes as numbers of the type."""
        return (codes.astype(np.float32) / self.unit).astype(self.dtype) if self.is_float else codes.astype(self.dtype)


INT4 = Storage(np.dtype(ml_dtypes.int4), 21, 10)
E4M3 = Storage(FLOAT8, 19, 9, FLOAT8_UNIT)
INT2 = Storage(np.dtype(ml_dtypes.int2), 25, 13)


def storage_of(spec: QuantSpec) -> Storage:
    """The type that integer kernels read: 2 to 8 bits travel in 8-bit integers.

    ONNX Runtime has integer kernels for 8-bit types only; packed int4 and int2 are dequantized and executed in float, and several of their
    combinations fail to load with default options.
    """
    if spec.float8:
        return E4M3
    if spec.bits == BIAS_BITS:
        return Storage(np.dtype(np.int32), 13)
    if spec.bits <= 8:
        return Storage(np.dtype(np.int8 if spec.signed else np.uint8), 21 if spec.block else 13, 10 if spec.block else 7)
    if spec.bits == 16:
        return Storage(np.dtype(np.int16 if spec.signed else np.uint16), 21, 10)
    raise ExportError(f"{spec.bits}-bit grids have no ONNX integer type; use 2 to 8, or 16 bits")


def packed_storage_of(spec: QuantSpec, beside_bytes: bool) -> Storage:
    """The smallest type for the codes of a weight.

    `beside_bytes`: an 8-bit activation meets the weight. ONNX Runtime (1.31) then takes int2 for int8 and builds an integer kernel that
    does not exist, so that the file would not load; int4 holds the codes there.
    """
    if spec.bits == 2 and not beside_bytes:
        return INT2
    return INT4 if spec.bits <= 4 else storage_of(spec)
