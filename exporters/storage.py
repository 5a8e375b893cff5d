"""Which element type of ONNX carries the codes of a grid, and from which opset on."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx

from toolchain.errors import ExportError
from toolchain.quant_table import BIAS_BITS, QuantSpec


@dataclass(frozen=True)
class Storage:
    """An ONNX element type with its range; `opset` and `ir` are the first in which QuantizeLinear and DequantizeLinear take it."""

    dtype: np.dtype
    opset: int
    ir: int = 7

    @property
    def onnx_type(self) -> int:
        return onnx.helper.np_dtype_to_tensor_dtype(self.dtype)

    @property
    def low(self) -> int:
        return int(ml_dtypes.iinfo(self.dtype).min)

    @property
    def high(self) -> int:
        return int(ml_dtypes.iinfo(self.dtype).max)


INT4 = Storage(np.dtype(ml_dtypes.int4), 21, 10)
INT2 = Storage(np.dtype(ml_dtypes.int2), 25, 13)


def storage_of(spec: QuantSpec) -> Storage:
    """The type that integer kernels read: 2 to 8 bits travel in 8-bit integers.

    ONNX Runtime has integer kernels for 8-bit types only; packed int4 and int2 are dequantized and executed in float, and several of their
    combinations fail to load with default options.
    """
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
