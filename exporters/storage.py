"""Which integer type of ONNX carries the codes of a grid, and from which opset on."""

from dataclasses import dataclass

import numpy as np
import onnx

from toolchain.errors import ExportError
from toolchain.quant_table import BIAS_BITS, QuantSpec


@dataclass(frozen=True)
class Storage:
    """An ONNX element type with its range; `opset` is the first whose QuantizeLinear and DequantizeLinear take it."""

    dtype: np.dtype
    opset: int

    @property
    def onnx_type(self) -> int:
        return onnx.helper.np_dtype_to_tensor_dtype(self.dtype)

    @property
    def low(self) -> int:
        return int(np.iinfo(self.dtype).min)

    @property
    def high(self) -> int:
        return int(np.iinfo(self.dtype).max)


def storage_of(spec: QuantSpec) -> Storage:
    """The type that integer kernels read: 2 to 8 bits travel in 8-bit integers.

    ONNX Runtime has integer kernels for 8-bit types only; packed int4 and int2 are dequantized and executed in float, and several of their
    combinations fail to load with default options.
    """
    if spec.bits == BIAS_BITS:
        return Storage(np.dtype(np.int32), 13)
    if spec.bits <= 8:
        return Storage(np.dtype(np.int8 if spec.signed else np.uint8), 13)
    if spec.bits == 16:
        return Storage(np.dtype(np.int16 if spec.signed else np.uint16), 21)
    raise ExportError(f"{spec.bits}-bit grids have no ONNX integer type; use 2 to 8, or 16 bits")
