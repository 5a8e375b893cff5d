"""All converters of this room by operator."""

from collections.abc import Mapping

from . import (
    activation,
    arithmetic,
    attention,
    casting,
    contrib,
    convolution,
    functions,
    generating,
    indexing,
    linear,
    normalization,
    padding,
    pooling,
    recurrent,
    reduction,
    resize,
    sampling,
    shaping,
)
from .operator import Converter

_STANDARD = (
    activation,
    arithmetic,
    attention,
    casting,
    convolution,
    functions,
    generating,
    indexing,
    linear,
    normalization,
    padding,
    pooling,
    recurrent,
    reduction,
    resize,
    sampling,
    shaping,
)

CONVERTERS: Mapping[tuple[str, str], Converter] = {
    **{("", name): converter for family in _STANDARD for name, converter in family.CONVERTERS.items()},
    **{("", name): converter for name, converter in contrib.STANDARD_DOMAIN.items()},
    **{(contrib.DOMAIN, name): converter for name, converter in contrib.CONVERTERS.items()},
}
