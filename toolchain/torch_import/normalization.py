"""Normalizations at inference."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .operator import Converter, NodeView, Operator


def batch_normalization(view: NodeView) -> Operator:
    """BatchNormalization with its stored mean and variance."""
    if view.attrs.get("training_mode", 0) or view.has_output(1):
        view.refuse("it is in training mode")
    if not view.attrs.get("spatial", 1):
        view.refuse("statistics for each pixel (spatial = 0) are not supported")
    epsilon = view.attrs.get("epsilon", 1e-5)

    def call(x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, mean.to(x.dtype), variance.to(x.dtype), scale.to(x.dtype), bias.to(x.dtype), False, 0.0, epsilon)

    return Operator(call, view.inputs)


def instance_normalization(view: NodeView) -> Operator:
    """InstanceNormalization: each channel of each sample by its own statistics."""
    epsilon = view.attrs.get("epsilon", 1e-5)

    def call(x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.group_norm(x, x.shape[1], scale, bias, epsilon)

    return Operator(call, view.inputs)


def group_normalization(view: NodeView) -> Operator:
    """GroupNormalization; scale and bias are given for each group before opset 21, for each channel from then on."""
    groups, epsilon = view.attrs["num_groups"], view.attrs.get("epsilon", 1e-5)

    def call(x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        if scale.shape[0] != x.shape[1]:
            scale, bias = (t.repeat_interleave(x.shape[1] // groups) for t in (scale, bias))
        return torch.group_norm(x, groups, scale, bias, epsilon)

    return Operator(call, view.inputs)


def layer_normalization(view: NodeView) -> Operator:
    """LayerNormalization, with its mean and inverse standard deviation where they are asked for."""
    axis, epsilon = view.attrs.get("axis", -1), view.attrs.get("epsilon", 1e-5)
    statistics = view.has_output(1) or view.has_output(2)

    def call(x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor | tuple[torch.Tensor, ...]:
        shape = x.shape[axis:]
        fits = scale.shape == shape and (bias is None or bias.shape == shape)
        y = F.layer_norm(x, shape, scale if fits else None, bias if fits else None, epsilon)
        if not fits:
            y = y * scale if bias is None else y * scale + bias
        if not statistics:
            return y
        axes = tuple(range(axis % x.dim(), x.dim()))
        variance, mean = torch.var_mean(x.float(), dim=axes, correction=0, keepdim=True)
        return y, mean, torch.rsqrt(variance + epsilon)

    return Operator(call, view.inputs)


def rms_normalization(view: NodeView) -> Operator:
    """RMSNormalization: divided by the root of the mean square, computed in float32."""
    axis, epsilon = view.attrs.get("axis", -1), view.attrs.get("epsilon", 1e-5)

    def call(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        wide = x.float() if x.dtype == torch.float16 else x
        axes = tuple(range(axis % x.dim(), x.dim()))
        return (wide * torch.rsqrt(wide.square().mean(dim=axes, keepdim=True) + epsilon)).to(x.dtype) * scale

    return Operator(call, view.inputs)


def lp_normalization(view: NodeView) -> Operator:
    """LpNormalization along an axis; what has norm zero stays zero."""
    axis, p = view.attrs.get("axis", -1), view.attrs.get("p", 2)

    def call(x: torch.Tensor) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x, ord=p, dim=axis, keepdim=True)
        return x / norm.masked_fill(norm == 0, 1)

    return Operator(call, view.inputs)


def local_response_normalization(view: NodeView) -> Operator:
    """LRN: x / (bias + alpha / size * sum of squares over `size` channels around it) ^ beta."""
    size = view.attrs["size"]
    alpha, beta, bias = view.attrs.get("alpha", 1e-4), view.attrs.get("beta", 0.75), view.attrs.get("bias", 1.0)

    def call(x: torch.Tensor) -> torch.Tensor:
        squares = x.square().reshape(x.shape[0], 1, x.shape[1], -1)
        padded = F.pad(squares, (0, 0, (size - 1) // 2, size // 2))
        mean = F.avg_pool2d(padded, (size, 1), 1).reshape(x.shape)
        return x / (bias + alpha * mean) ** beta

    return Operator(call, view.inputs)


def mean_variance_normalization(view: NodeView) -> Operator:
    """MeanVarianceNormalization over the given axes."""
    axes: Sequence[int] = view.attrs.get("axes", [0, 2, 3])

    def call(x: torch.Tensor) -> torch.Tensor:
        variance, mean = torch.var_mean(x, dim=tuple(axes), correction=0, keepdim=True)
        return (x - mean) / (variance.sqrt() + 1e-9)

    return Operator(call, view.inputs)


CONVERTERS: dict[str, Converter] = {
    "BatchNormalization": batch_normalization,
    "InstanceNormalization": instance_normalization,
    "GroupNormalization": group_normalization,
    "LayerNormalization": layer_normalization,
    "RMSNormalization": rms_normalization,
    "LpNormalization": lp_normalization,
    "LRN": local_response_normalization,
    "MeanVarianceNormalization": mean_variance_normalization,
}
