"""Operators that take or put elements by index. Negative indices count from the end, as everywhere in ONNX."""

from collections.abc import Sequence

import torch

from .operator import Converter, NodeView, Operator, with_numbers

_REDUCE = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def gather(view: NodeView) -> Operator:
    """Gather: whole slices along an axis, by indices of any shape."""
    axis = view.attrs.get("axis", 0)
    indices = view.constant(1)
    wrap = indices is None or bool((indices < 0).any())

    def call(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        position = axis % x.dim()
        flat = index.reshape(-1)
        taken = x.index_select(position, _wrapped(flat, x.shape[position]) if wrap else flat)
        return taken.reshape([*x.shape[:position], *index.shape, *x.shape[position + 1 :]])

    return Operator(call, view.inputs)


def gather_elements(view: NodeView) -> Operator:
    """GatherElements: single elements along an axis."""
    axis = view.attrs.get("axis", 0)
    return Operator(lambda x, index: torch.gather(x, axis, _wrapped(index, x.shape[axis]).long()), view.inputs)


def gather_nd(view: NodeView) -> Operator:
    """GatherND: slices by tuples of indices, after `batch_dims` axes that both tensors share."""
    batch = view.attrs.get("batch_dims", 0)

    def call(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        axes = x.shape[batch : batch + index.shape[-1]]
        rows = x.reshape(*x.shape[:batch], -1, *x.shape[batch + len(axes) :])
        flat = _linear(index, axes)  # [*batch, ...]
        grids = torch.meshgrid(*(torch.arange(size, device=x.device) for size in flat.shape[:batch]), indexing="ij") if batch else ()
        grids = [grid.reshape([*grid.shape, *[1] * (flat.dim() - batch)]) for grid in grids]
        return rows[(*grids, flat)]

    return Operator(call, view.inputs)


def scatter_elements(view: NodeView) -> Operator:
    """ScatterElements (and Scatter, its older name): single elements put or reduced into a copy."""
    axis, reduction = view.attrs.get("axis", 0), view.attrs.get("reduction", "none")

    def call(x: torch.Tensor, index: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
        where = _wrapped(index, x.shape[axis]).long()
        if reduction == "none":
            return x.scatter(axis, where, updates)
        return x.scatter_reduce(axis, where, updates, _REDUCE[reduction])

    return Operator(call, view.inputs)


def scatter_nd(view: NodeView) -> Operator:
    """ScatterND: slices put or reduced into a copy by tuples of indices."""
    reduction = view.attrs.get("reduction", "none")

    def call(x: torch.Tensor, index: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
        axes = x.shape[: index.shape[-1]]
        rest = x.shape[len(axes) :]
        flat = _linear(index, axes).reshape(-1)
        rows, values = x.reshape(-1, rest.numel()), updates.reshape(-1, rest.numel())
        where = flat.unsqueeze(1).expand(-1, rest.numel())
        if reduction == "none":
            return rows.scatter(0, where, values).reshape(x.shape)
        return rows.scatter_reduce(0, where, values, _REDUCE[reduction]).reshape(x.shape)

    return Operator(call, view.inputs)


def one_hot(view: NodeView) -> Operator:
    """OneHot along a new axis; indices out of range give no hot element."""
    axis = view.attrs.get("axis", -1)

    def call(index: torch.Tensor, depth: Sequence[int], values: torch.Tensor) -> torch.Tensor:
        count = int(depth[0])
        position = axis % (index.dim() + 1)
        index = torch.where(index < 0, index + count, index).unsqueeze(position)
        classes = torch.arange(count, device=index.device).reshape(-1, *[1] * (index.dim() - position - 1))
        return torch.where(index == classes, values[1], values[0])

    return with_numbers(view, (1,), call)


def compress(view: NodeView) -> Operator:
    """Compress: the slices (without `axis` the elements) where the condition holds."""
    axis = view.attrs.get("axis")

    def call(x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        x, position = (x.reshape(-1), 0) if axis is None else (x, axis)
        return x.index_select(position, condition.nonzero().reshape(-1))

    return Operator(call, view.inputs)


def non_zero(view: NodeView) -> Operator:
    """NonZero: the coordinates of the elements that are not zero, one row for each axis."""
    return Operator(lambda x: torch.nonzero(x).t(), view.inputs)


def reverse_sequence(view: NodeView) -> Operator:
    """ReverseSequence: the first elements of each sequence turned around, as many as its length."""
    batch_axis, time_axis = view.attrs.get("batch_axis", 1), view.attrs.get("time_axis", 0)

    def call(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        y = x.movedim((batch_axis, time_axis), (0, 1))
        time = torch.arange(y.shape[1], device=x.device).unsqueeze(0)
        ends = lengths.unsqueeze(1)
        order = torch.where(time < ends, ends - 1 - time, time)
        index = order.reshape(*order.shape, *[1] * (y.dim() - 2)).expand(y.shape)
        return y.gather(1, index).movedim((0, 1), (batch_axis, time_axis))

    return Operator(call, view.inputs)


def top_k(view: NodeView) -> Operator:
    """TopK of every version, ties in order of index, which a stable sort keeps."""
    axis = view.attrs.get("axis", -1)
    largest = bool(view.attrs.get("largest", 1))

    def call(x: torch.Tensor, k: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        values, index = torch.sort(x, dim=axis, descending=largest, stable=True)
        return values.narrow(axis, 0, int(k[0])), index.narrow(axis, 0, int(k[0]))

    if "k" in view.attrs:
        fixed = [view.attrs["k"]]
        return Operator(lambda x: call(x, fixed), view.inputs)
    return with_numbers(view, (1,), call)


def _wrapped(index: torch.Tensor, size: int) -> torch.Tensor:
    return torch.where(index < 0, index + size, index)


def _linear(index: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    """Tuples of indices [..., k] into these axes as indices into the axes taken as one."""
    flat = torch.zeros(index.shape[:-1], dtype=torch.int64, device=index.device)
    for part, size in zip(index.unbind(-1), axes, strict=True):
        flat = flat * size + _wrapped(part, size)
    return flat


CONVERTERS: dict[str, Converter] = {
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "Scatter": scatter_elements,
    "ScatterElements": scatter_elements,
    "ScatterND": scatter_nd,
    "OneHot": one_hot,
    "Compress": compress,
    "NonZero": non_zero,
    "ReverseSequence": reverse_sequence,
    "TopK": top_k,
}
