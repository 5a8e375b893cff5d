"""Sampling of images at computed places."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .operator import Converter, NodeView, Operator, with_numbers

_MODES = {"linear": "bilinear", "bilinear": "bilinear", "nearest": "nearest", "cubic": "bicubic", "bicubic": "bicubic"}


def grid_sample(view: NodeView) -> Operator:
    """GridSample over two axes, or three without cubic interpolation."""
    mode, padding = _MODES[view.attrs.get("mode", "linear")], view.attrs.get("padding_mode", "zeros")
    corners = bool(view.attrs.get("align_corners", 0))
    rank = view.rank(0)
    if rank not in (4, 5) or (rank == 5 and mode == "bicubic"):
        view.refuse(f"torch has no {mode} sampling over {rank - 2} axes")
    return Operator(lambda x, grid: F.grid_sample(x, grid.to(x.dtype), mode, padding, corners), view.inputs)


def affine_grid(view: NodeView) -> Operator:
    """AffineGrid in two or three dimensions."""
    corners = bool(view.attrs.get("align_corners", 0))

    def call(theta: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        return F.affine_grid(theta, list(size), corners)

    return with_numbers(view, (1,), call)


CONVERTERS: dict[str, Converter] = {"GridSample": grid_sample, "AffineGrid": affine_grid}
