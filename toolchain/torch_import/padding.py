"""ONNX padding conventions in torch terms, and the Pad operator."""

from collections.abc import Sequence
from dataclasses import dataclass

import onnx
import torch
import torch.nn.functional as F

from .operator import Constants, Operator, attributes, constant_input, has_input

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
    def of(cls, attrs: dict, kernel: Sequence[int]) -> "WindowPads":
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


def pad(node: onnx.NodeProto, constants: Constants) -> Operator | None:
    """Pad-11 and newer with constant pads (and, from opset 18, axes); other modes than `constant` pad spatial axes only."""
    pads = constant_input(node, 1, constants)
    axes = constant_input(node, 3, constants)
    value = constant_input(node, 2, constants)
    mode = _MODES.get(attributes(node).get("mode", "constant"))
    if pads is None or mode is None or (has_input(node, 3) and axes is None) or (has_input(node, 2) and value is None):
        return None
    fill = float(value.reshape(-1)[0]) if value is not None else 0.0
    half = len(pads) // 2
    begin, end = pads[:half].tolist(), pads[half:].tolist()

    def call(x: torch.Tensor) -> torch.Tensor:
        positions = [int(a) % x.dim() for a in axes] if axes is not None else range(x.dim())
        before, after = [0] * x.dim(), [0] * x.dim()
        for axis, low, high in zip(positions, begin, end, strict=True):
            before[axis], after[axis] = low, high
        if mode == "constant":
            return F.pad(x, to_torch(before, after), value=fill)
        # F.pad takes the other modes for at most the last dim-2 axes, and needs the list cut to those.
        outer = 2 if x.dim() > 2 else 0
        if any(before[:outer]) or any(after[:outer]):
            raise NotImplementedError(f"Pad mode {mode!r} on axis 0 or 1")
        return F.pad(x, to_torch(before[outer:], after[outer:]), mode=mode)

    return Operator(call, (node.input[0],))
