"""Operators of ONNX Runtime's own domain that its optimizer and popular exporters write: fused activations, normalizations, attention."""

import math

import torch
import torch.nn.functional as F

from .attention import attend, split_heads
from .operator import Converter, NodeView, Operator

DOMAIN = "com.microsoft"


def gelu(view: NodeView) -> Operator:
    """Gelu, BiasGelu and FastGelu (the tanh approximation), the latter two after adding a bias."""
    approximate = "tanh" if view.proto.op_type == "FastGelu" else "none"

    def call(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.gelu(x if bias is None else x + bias, approximate=approximate)

    return Operator(call, view.inputs)


def quick_gelu(view: NodeView) -> Operator:
    """QuickGelu: x * sigmoid(alpha * x)."""
    alpha = view.attrs.get("alpha", 1.702)
    return Operator(lambda x: x * torch.sigmoid(alpha * x), view.inputs)


def fused_matmul(view: NodeView) -> Operator:
    """FusedMatMul: a product with transposed and scaled operands; the batch axes may be rotated too."""
    attrs = view.attrs
    if attrs.get("transBatchA", 0) or attrs.get("transBatchB", 0):
        view.refuse("its batch axes are transposed")
    alpha, trans_a, trans_b = attrs.get("alpha", 1.0), attrs.get("transA", 0), attrs.get("transB", 0)

    def call(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a, b = a.transpose(-1, -2) if trans_a and a.dim() > 1 else a, b.transpose(-1, -2) if trans_b and b.dim() > 1 else b
        return alpha * (a @ b)

    return Operator(call, view.inputs)


def skip_layer_normalization(view: NodeView) -> Operator:
    """SkipLayerNormalization and SkipSimplifiedLayerNormalization: input + skip (+ bias), normalized; the sum is the fourth output."""
    simplified = view.proto.op_type == "SkipSimplifiedLayerNormalization"
    epsilon = view.attrs.get("epsilon", 1e-12 if not simplified else 1e-5)
    if view.has_output(1) or view.has_output(2):
        view.refuse("its statistics are asked for")

    def normalized(total: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor | None) -> torch.Tensor:
        if simplified:
            return total * torch.rsqrt(total.square().mean(dim=-1, keepdim=True) + epsilon) * gamma
        return F.layer_norm(total, gamma.shape, gamma, beta, epsilon)

    def call(x: torch.Tensor, skip: torch.Tensor, gamma: torch.Tensor, *rest: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        beta, bias = (None, *rest, None)[:2] if simplified else (*rest, None, None)[:2]
        total = x + skip if bias is None else x + skip + bias
        return normalized(total, gamma, beta), total, total, total  # nobody asks for the two in the middle

    return Operator(call, view.inputs)


def simplified_layer_normalization(view: NodeView) -> Operator:
    """SimplifiedLayerNormalization: RMS normalization over the last axes."""
    axis, epsilon = view.attrs.get("axis", -1), view.attrs.get("epsilon", 1e-5)
    if view.has_output(1):
        view.refuse("its statistics are asked for")

    def call(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        axes = tuple(range(axis % x.dim(), x.dim()))
        return x * torch.rsqrt(x.square().mean(dim=axes, keepdim=True) + epsilon) * scale

    return Operator(call, view.inputs)


def multi_head_attention(view: NodeView) -> Operator:
    """MultiHeadAttention over separate 3-D query, key and value, with bias, padding mask and attention bias."""
    attrs = view.attrs
    heads, scale = attrs["num_heads"], attrs.get("scale", 0.0)
    if attrs.get("unidirectional", 0) or any(view.has(index) for index in range(6, len(view.inputs))) or view.outputs > 1:
        view.refuse("it is causal or has a cache")
    if not (view.has(1) and view.has(2)) or any(view.rank(index) != 3 for index in range(3)):
        view.refuse("its query, key and value are packed")
    if view.has(4) and view.rank(4) not in (1, 2):
        view.refuse("its padding mask is neither [N, keys] nor lengths [N]")
    hidden = attrs.get("mask_filter_value", -10000.0)

    def call(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        added: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if bias is not None:
            first, second, third = bias.split([q.shape[-1], k.shape[-1], v.shape[-1]])
            q, k, v = q + first, k + second, v + third
        return _merged(q, k, v, heads, scale, _padding(mask, hidden, k), added)

    return Operator(call, view.inputs)


def attention(view: NodeView) -> Operator:
    """Attention: query, key and value are one product of the input with a packed weight."""
    attrs = view.attrs
    heads, scale = attrs["num_heads"], attrs.get("scale", 0.0)
    causal = attrs.get("unidirectional", 0) or attrs.get("do_rotary", 0)
    if causal or any(view.has(index) for index in (4, 6)) or view.outputs > 1 or "qkv_hidden_sizes" in attrs:
        view.refuse("it is causal, has a cache or unequal sizes")
    if view.has(3) and view.rank(3) != 2:
        view.refuse("its mask is not [N, keys]")
    hidden = attrs.get("mask_filter_value", -10000.0)

    def call(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        past: None = None,
        added: torch.Tensor | None = None,
    ) -> torch.Tensor:
        packed = x @ weight if bias is None else x @ weight + bias
        q, k, v = packed.chunk(3, dim=-1)
        return _merged(q, k, v, heads, scale, _padding(mask, hidden, k), added)

    return Operator(call, view.inputs)


def embed_layer_normalization(view: NodeView) -> Operator:
    """EmbedLayerNormalization: word, position and segment embeddings summed and normalized."""
    epsilon = view.attrs.get("epsilon", 1e-12)
    by_count = view.attrs.get("mask_index_type", 1) != 0

    def call(
        ids: torch.Tensor,
        segments: torch.Tensor | None,
        words: torch.Tensor,
        positions: torch.Tensor,
        segment_table: torch.Tensor | None,
        gamma: torch.Tensor,
        beta: torch.Tensor,
        mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        total = F.embedding(ids, words) + (positions[: ids.shape[1]] if position_ids is None else F.embedding(position_ids, positions))
        if segments is not None and segment_table is not None:
            total = total + F.embedding(segments, segment_table)
        count = mask.sum(dim=1, dtype=torch.int32) if mask is not None and by_count else ids.new_zeros(len(ids), dtype=torch.int32)
        return F.layer_norm(total, gamma.shape, gamma, beta, epsilon), count, total

    return Operator(call, view.inputs)


def _padding(mask: torch.Tensor | None, hidden: float, keys: torch.Tensor) -> torch.Tensor | None:
    """What a mask [N, keys] (1: real, 0: padding), or one of lengths [N], adds to the scores of keys [N, keys, C]."""
    if mask is None:
        return None
    if mask.dim() == 1:
        mask = torch.arange(keys.shape[1], device=mask.device) < mask.unsqueeze(1)
    return ((1 - mask.to(keys.dtype)) * hidden)[:, None, None]


def _merged(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, scale: float, *biases: torch.Tensor | None) -> torch.Tensor:
    q, k, v = (split_heads(t, heads) for t in (q, k, v))
    given = [bias for bias in biases if bias is not None]
    bias = sum(given[1:], given[0]) if given else None
    return attend(q, k, v, scale or 1 / math.sqrt(q.shape[-1]), bias).transpose(1, 2).flatten(2)


CONVERTERS: dict[str, Converter] = {
    "Gelu": gelu,
    "BiasGelu": gelu,
    "FastGelu": gelu,
    "QuickGelu": quick_gelu,
    "FusedMatMul": fused_matmul,
    "SkipLayerNormalization": skip_layer_normalization,
    "SkipSimplifiedLayerNormalization": skip_layer_normalization,
    "MultiHeadAttention": multi_head_attention,
    "Attention": attention,
    "EmbedLayerNormalization": embed_layer_normalization,
}
STANDARD_DOMAIN: dict[str, Converter] = {"SimplifiedLayerNormalization": simplified_layer_normalization}
"""What ONNX Runtime adds to the standard domain itself."""
