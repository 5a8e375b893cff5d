"""All converters of this room by operator; what is not here is asked of onnx2torch."""

from collections.abc import Mapping

from . import convolution, linear, padding, pooling, reduction, shaping
from .operator import Converter

_STANDARD = (convolution, linear, padding, pooling, reduction, shaping)

CONVERTERS: Mapping[tuple[str, str], Converter] = {("", name): c for family in _STANDARD for name, c in family.CONVERTERS.items()}
