"""Attention and RotaryEmbedding as ONNX defines them (opset 23 on), computed step by step so that every optional output is there."""

import math

import torch
import torch.nn.functional as F

from .casting import DTYPES, type_name
from .operator import Converter, NodeView, Operator


def attention(view: NodeView) -> Operator:
    """Attention with grouped heads, masks, caches, soft capping and windows."""
    attrs = view.attrs
    q_heads, kv_heads = attrs.get("q_num_heads", 0), attrs.get("kv_num_heads", 0)
    causal, softcap = bool(attrs.get("is_causal", 0)), attrs.get("softcap", 0.0)
    left, right = attrs.get("left_window_size", -1), attrs.get("right_window_size", -1)
    shown = attrs.get("qk_matmul_output_mode", 0)
    precision = attrs.get("softmax_precision")
    if precision is not None and precision not in DTYPES:
        view.refuse(f"torch does not compute with {type_name(precision)}")
    outputs = view.outputs

    def call(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None = None,
        past_k: torch.Tensor | None = None,
        past_v: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        flat = q.dim() == 3
        if flat:
            q, k, v = split_heads(q, q_heads), split_heads(k, kv_heads), split_heads(v, kv_heads)
        scale = math.sqrt(attrs.get("scale", 1 / math.sqrt(q.shape[-1])))
        k = k if past_k is None else torch.cat([past_k, k], dim=2)
        v = v if past_v is None else torch.cat([past_v, v], dim=2)
        offset: int | torch.Tensor = past_k.shape[2] if past_k is not None else 0
        if past_k is None and lengths is not None:
            offset = lengths.reshape(-1, 1, 1, 1) - q.shape[2]
        bias = _bias(q, k.shape[2], mask, lengths, offset, (left, 0 if causal and right < 0 else min(right, 0) if causal else right))
        repeats = q.shape[1] // k.shape[1]
        keys, values = (t.repeat_interleave(repeats, dim=1) if repeats > 1 else t for t in (k, v))
        scores = (q * scale) @ (keys * scale).transpose(-1, -2)
        raw = scores
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        capped = scores
        if bias is not None:
            scores = scores + bias
        weights = torch.softmax(scores if precision is None else scores.to(DTYPES[precision]), dim=-1)
        if bias is not None:  # a query that may look at nothing gives zeros
            weights = weights.masked_fill(torch.isneginf(bias).all(dim=-1, keepdim=True), 0)
        weights = weights.to(q.dtype)
        y = weights @ values
        y = y.transpose(1, 2).flatten(2) if flat else y
        return (y, k, v, (raw, capped, scores, weights)[shown])[:outputs]

    return Operator(call, view.inputs)


def split_heads(x: torch.Tensor, count: int) -> torch.Tensor:
    """[N, S, heads * size] -> [N, heads, S, size]."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, bias: torch.Tensor | None) -> torch.Tensor:
    """Plain scaled attention over [N, heads, S, size]; the bias is added to the scores."""
    scores = (q @ k.transpose(-1, -2)) * scale
    return torch.softmax(scores if bias is None else scores + bias, dim=-1) @ v


def _bias(
    q: torch.Tensor,
    keys: int,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    offset: int | torch.Tensor,
    window: tuple[int, int],
) -> torch.Tensor | None:
    """What is added to the scores: 0 or the mask where a query may look at a key, -inf elsewhere. None: every key."""
    hidden = torch.zeros((), dtype=q.dtype, device=q.device)
    closed = torch.full((), float("-inf"), dtype=q.dtype, device=q.device)
    bias = None
    if mask is not None:
        bias = torch.where(mask, hidden, closed) if mask.dtype == torch.bool else mask.to(q.dtype)
        if bias.shape[-1] < keys:
            bias = F.pad(bias, (0, keys - bias.shape[-1]), value=float("-inf"))
    column = torch.arange(keys, device=q.device)
    left, right = window
    allowed = None
    if left >= 0 or right >= 0:
        ahead = column - (torch.arange(q.shape[2], device=q.device).unsqueeze(1) + offset)
        allowed = torch.ones_like(ahead, dtype=torch.bool)
        allowed = allowed & (ahead >= -left) if left >= 0 else allowed
        allowed = allowed & (ahead <= right) if right >= 0 else allowed
    if lengths is not None:
        real = column < lengths.reshape(-1, 1, 1, 1)
        allowed = real if allowed is None else allowed & real
    if allowed is None:
        return bias
    open_ = torch.where(allowed, hidden, closed)
    return open_ if bias is None else bias + open_


def rotary_embedding(view: NodeView) -> Operator:
    """RotaryEmbedding: pairs of features turned by an angle that grows with the position."""
    attrs = view.attrs
    heads, interleaved = attrs.get("num_heads", 0), bool(attrs.get("interleaved", 0))
    dim = attrs.get("rotary_embedding_dim", 0)

    def call(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        y = split_heads(x, heads) if x.dim() == 3 else x
        if positions is not None:
            cos, sin = cos[positions], sin[positions]
        y = rotated(y, cos.unsqueeze(1), sin.unsqueeze(1), interleaved, dim or y.shape[-1])
        return y.transpose(1, 2).flatten(2) if x.dim() == 3 else y

    return Operator(call, view.inputs)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, dim: int) -> torch.Tensor:
    """The first `dim` features of x [N, heads, S, size] turned; cos and sin are [N, 1, S, dim / 2]."""
    turned, rest = x[..., :dim], x[..., dim:]
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    real, imaginary = cos * first - sin * second, sin * first + cos * second
    both = torch.stack([real, imaginary], dim=-1).flatten(-2) if interleaved else torch.cat([real, imaginary], dim=-1)
    return torch.cat([both, rest], dim=-1)


CONVERTERS: dict[str, Converter] = {"Attention": attention, "RotaryEmbedding": rotary_embedding}
