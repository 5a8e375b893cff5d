"""ONNX padding conventions in torch terms, and the Pad operator."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .operator import Converter, NodeView, Operator, with_numbers

_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


def to_torch(begin: Sequence[int], end: Sequence[int]) -> list[int]:
    """ONNX lists all begins, then all ends, first axis first; `F.pad` wants (begin, end) pairs, last axis first."""
    return [p for pair in zip(reversed(begin), reversed(end), strict=True) for p in pair]


@dataclass(frozen=True)
class WindowPads:
    """Padding of a sliding window (convolution, pooling): explicit, or computed from the input size (auto_pad SAME_*)."""

    begin: tuple[int, ...]
    end: tuple[int, ...]
    auto: str
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]

    @classmethod
    def of(cls, attrs: Mapping[str, Any], kernel: Sequence[int]) -> "WindowPads":
        rank = len(kernel)
        pads = attrs.get("pads", [0] * (2 * rank))
        auto = attrs.get("auto_pad", "NOTSET")
        if auto == "VALID":
            pads, auto = [0] * (2 * rank), "NOTSET"
        return cls(
            tuple(pads[:rank]),
            tuple(pads[rank:]),
            auto,
            tuple(kernel),
            tuple(attrs.get("strides", [1] * rank)),
            tuple(attrs.get("dilations", [1] * rank)),
        )

    @property
    def symmetric(self) -> bool:
        return self.auto == "NOTSET" and self.begin == self.end

    def sizes(self, spatial: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
        """(begin, end) pads for an input of these spatial sizes."""
        if self.auto == "NOTSET":
            return self.begin, self.end
        totals = [
            max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            for size, stride, kernel, dilation in zip(spatial, self.strides, self.kernel, self.dilations, strict=True)
        ]
        small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
        return (small, large) if self.auto == "SAME_UPPER" else (large, small)

    def pad(self, x: torch.Tensor, value: float = 0.0) -> torch.Tensor:
        begin, end = self.sizes(x.shape[2:])
        return F.pad(x, to_torch(begin, end), value=value) if any((*begin, *end)) else x


def pad(view: NodeView) -> Operator:
    """Pad of every version: pads and value are attributes before opset 11, axes may be given from 18, `wrap` is a mode from 19."""
    mode = view.attrs.get("mode", "constant")
    if mode not in _MODES:
        view.refuse(f"mode {mode!r} is not known")

    def call(x: torch.Tensor, pads: Sequence[int], value: Sequence[float] | None = None, axes: Sequence[int] | None = None) -> torch.Tensor:
        half = len(pads) // 2
        begin, end = [0] * x.dim(), [0] * x.dim()
        for axis, low, high in zip(axes if axes is not None else range(x.dim()), pads[:half], pads[half:], strict=True):
            begin[axis], end[axis] = low, high
        if mode == "constant":
            return F.pad(x, to_torch(begin, end), value=value[0] if value else 0)
        if min((*begin, *end), default=0) < 0:  # cut first: only what is left is repeated
            x = F.pad(x, to_torch([min(low, 0) for low in begin], [min(high, 0) for high in end]))
            begin, end = [max(low, 0) for low in begin], [max(high, 0) for high in end]
        return _repeat(x, begin, end, mode)

    if "pads" in view.attrs or "paddings" in view.attrs:
        pads, value = view.attrs.get("pads", view.attrs.get("paddings")), [view.attrs.get("value", 0.0)]
        return Operator(lambda x: call(x, pads, value), view.inputs[:1])
    return with_numbers(view, (1, 2, 3), call)


def _repeat(x: torch.Tensor, begin: Sequence[int], end: Sequence[int], mode: str) -> torch.Tensor:
    """Pad with the tensor's own elements. torch does so on up to three spatial axes and less far than ONNX allows; the rest is indexing."""
    reach = [size - 1 if mode == "reflect" else size for size in x.shape]
    if x.dim() in (3, 4, 5) and not any((*begin[:2], *end[:2])) and all(max(b, e) <= r for b, e, r in zip(begin, end, reach, strict=True)):
        return F.pad(x, to_torch(begin[2:], end[2:]), mode=_MODES[mode])
    for axis, (low, high) in enumerate(zip(begin, end, strict=True)):
        if low or high:
            size = x.shape[axis]
            index = torch.arange(-low, size + high, device=x.device)
            if mode == "edge":
                index = index.clamp(0, size - 1)
            elif mode == "wrap":
                index = index % size
            else:
                index = (index % max(2 * size - 2, 1)).sub(size - 1).abs().neg().add(size - 1)
            x = x.index_select(axis, index)
    return x


CONVERTERS: dict[str, Converter] = {"Pad": pad}
