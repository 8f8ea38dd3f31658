"""PyTorch's functions behind layers with statistics, windows, tables and states, as functions of this library.

Arguments are those of PyTorch, in its order. What has no counterpart raises ValueError, which says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lance_ref import functional as F
from lance_ref import nn
from lance_ref.engine.tensor import Tensor
from lance_ref.nn.init import shapes_only


def only(**options: tuple[Any, Any]) -> None:
    """Raise ValueError for an option that is not what it has to be; each is (what came, what is expected)."""
    for name, (value, expected) in options.items():
        if value != expected:
            raise ValueError(f"{name} is {value!r}, expected {expected!r}")


# ---- attention -------------------------------------------------------------------------------


def attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """softmax(Q Kᵀ · scale + mask) V; with dropout as single products, for it stands between them."""
    if enable_gqa:
        key, value = (repeat_interleave(x, query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    if not dropout_p:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, is_causal=is_causal, scale=scale)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = F.matmul(query, F.transpose(key, -2, -1)) * factor
    if is_causal:
        attn_mask = np.tri(scores.shape[-2], scores.shape[-1]) > 0
    if attn_mask is not None and attn_mask.dtype.kind == "b":
        scores = F.where(attn_mask, scores, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return F.matmul(F.dropout(F.softmax(scores, -1), dropout_p), value)


def multi_head_attention(
    query: Any, key: Any, value: Any, embed_dim: int, num_heads: int, in_proj_weight: Any, in_proj_bias: Any,
    bias_k: Any, bias_v: Any, add_zero_attn: bool, dropout_p: float, out_proj_weight: Any, out_proj_bias: Any,
    training: bool = True, key_padding_mask: Any = None, need_weights: bool = True, attn_mask: Any = None,
    use_separate_proj_weight: bool = False, q_proj_weight: Any = None, k_proj_weight: Any = None,
    v_proj_weight: Any = None, static_k: Any = None, static_v: Any = None, average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, None]:  # fmt: skip
    """Of sequences (L, B, E), one projection for each of query, key and value, or one for all; without the weights."""
    extras = (bias_k, bias_v, key_padding_mask, static_k, static_v)
    if add_zero_attn or any(each is not None for each in extras):
        raise ValueError("attention has a padding mask, or keys and values of its own, expected none")
    if query.ndim != 3:
        raise ValueError(f"query has shape {query.shape}, expected (L, B, E)")
    if use_separate_proj_weight:
        weights = [q_proj_weight, k_proj_weight, v_proj_weight]
        biases = [None] * 3 if in_proj_bias is None else _parts(in_proj_bias, 3, 0)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    elif query is key and key is value:
        q, k, v = _parts(F.linear(query, in_proj_weight, in_proj_bias), 3, 2)
    else:
        biases = [None] * 3 if in_proj_bias is None else _parts(in_proj_bias, 3, 0)
        weights = _parts(in_proj_weight, 3, 0)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))

    def heads(x: Tensor) -> Tensor:
        """(L, B, E) as (B, heads, L, E/heads)."""
        L, B, E = x.shape
        return F.permute(F.reshape(x, (L, B, num_heads, E // num_heads)), (1, 2, 0, 3))

    mask = attn_mask
    if mask is not None:
        if mask.dtype.kind == "b":
            raise ValueError("attn_mask is Boolean, expected numbers, or none")
        if mask.ndim == 3:
            mask = F.reshape(mask, (-1, num_heads, *mask.shape[1:]))
    # PyTorch takes is_causal for a hint about the mask, which it asks for
    mixed = attention(heads(q), heads(k), heads(v), mask, dropout_p if training else 0.0)
    joined = F.reshape(F.permute(mixed, (2, 0, 1, 3)), query.shape)  # (L, B, E)
    return F.linear(joined, out_proj_weight, out_proj_bias), None


def _parts(x: Any, count: int, dim: int) -> list[Tensor]:
    """Equal parts along a dimension."""
    size = x.shape[dim] // count
    return [F.index(x, (*[slice(None)] * dim, slice(i * size, (i + 1) * size))) for i in range(count)]


def repeat_interleave(x: Any, repeats: int, dim: int | None = None) -> Tensor:
    """Each place of a dimension so many times, one behind the other."""
    if not isinstance(repeats, int) or dim is None:
        raise ValueError("repeat_interleave expects one number of repeats, and a dimension")
    at = dim % x.ndim
    lead, n, rest = x.shape[:at], x.shape[at], x.shape[at + 1 :]
    wide = F.expand(F.reshape(x, (*lead, n, 1, *rest)), (*lead, n, repeats, *rest))
    return F.reshape(wide, (*lead, n * repeats, *rest))


# ---- states ----------------------------------------------------------------------------------


def _recurrent(make: Callable[..., nn.LSTM | nn.GRU], x: Any, states: Any, weights: Sequence[Any], options: Any) -> Any:
    """The layer of this library with these weights: linear layers that stand step by step on the tape."""
    if len(options) != 6 or not isinstance(weights, (tuple, list)):
        raise ValueError("its sequences are packed, expected padded ones")
    has_biases, num_layers, dropout, training, bidirectional, batch_first = options
    each = 4 if has_biases else 2
    directions = 2 if bidirectional else 1
    if len(weights) != each * num_layers * directions:
        raise ValueError("it projects its states, expected no projection")
    hidden = weights[1].shape[1]
    with shapes_only():
        layer = make(x.shape[2], hidden, num_layers, has_biases, batch_first, dropout, bidirectional)
    layer.train(training)
    for number, direction in enumerate(d for d in layer.children() if hasattr(d, "ih")):
        own = weights[number * each : (number + 1) * each]
        for part, weight, bias in ((direction.ih, own[0], own[2:3]), (direction.hh, own[1], own[3:4])):
            part.__dict__.update(weight=weight, bias=bias[0] if bias else None)
    found: Any = layer(x, states)
    output, ends = found
    return (output, *(ends if isinstance(ends, tuple) else (ends,)))


def lstm(x: Any, states: Any, weights: Any, *options: Any) -> Any:
    """Output, last h and last c."""
    return _recurrent(nn.LSTM, x, tuple(states), weights, options)


def gru(x: Any, states: Any, weights: Any, *options: Any) -> Any:
    """Output and last h."""
    return _recurrent(nn.GRU, x, states, weights, options)


# ---- norms -----------------------------------------------------------------------------------


def _affine(weight: Any, bias: Any) -> tuple[Any, Any]:
    """A weight without a bias has one of zeros, of which nothing is kept."""
    if weight is None or bias is not None:
        return weight, bias
    return weight, weight.detach() * 0


def layer_norm(x: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, normalized_shape, *_affine(weight, bias), eps)


def group_norm(x: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    return F.group_norm(x, num_groups, *_affine(weight, bias), eps)


def instance_norm(
    x: Any, running_mean: Any = None, running_var: Any = None, weight: Any = None, bias: Any = None,
    use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    only(use_input_stats=(use_input_stats, True))
    return F.instance_norm(x, *_affine(weight, bias), eps)


def batch_norm(
    x: Any, mean: Any, variance: Any, weight: Any = None, bias: Any = None, training: bool = False,
    momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """Statistics are parameters that do not train; their arrays are moved on where the batch's own are used."""
    means, variances = (each if each is None or each.is_meta else each.data for each in (mean, variance))
    weight, bias = _affine(weight, bias)
    return F.batch_norm(x, means, variances, weight, bias, training=training, momentum=momentum, eps=eps)


def normalize(x: Any, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Any = None) -> Tensor:
    """x / max(‖x‖, eps)"""
    return F.div(x, F.clip(norm(x, p, dim, True), eps))


def norm(x: Any, p: Any = 2, dim: Any = None, keepdim: bool = False, out: Any = None, dtype: Any = None) -> Tensor:
    """√Σ x²"""
    if p not in (2, 2.0, "fro", None):
        raise ValueError(f"p is {p!r}, expected 2")
    return F.sqrt(F.sum(F.pow(x, 2), dim, keepdim))


def weight_norm(v: Any, g: Any, dim: int = 0) -> Tensor:
    """v · g / ‖v‖, the norm over all dimensions but one."""
    others = [i for i in range(v.ndim) if i != dim % v.ndim]
    return F.mul(v, F.div(g, norm(v, 2, others, True)))


# ---- windows ---------------------------------------------------------------------------------


def _single(function: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    def pool(
        x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Tensor:  # fmt: skip
        """The greatest of each window."""
        several = dilation if isinstance(dilation, (tuple, list)) else (dilation,)
        if any(d != 1 for d in several) or return_indices:
            raise ValueError(f"{name} has a dilation or returns indices, which has no counterpart in this library")
        return function(x, kernel_size, stride, padding, **({"ceil_mode": True} if ceil_mode else {}))

    return pool


def avg_pool2d(
    x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: Any = None,
) -> Tensor:  # fmt: skip
    only(divisor_override=(divisor_override, None))
    return F.avg_pool2d(x, kernel_size, stride, padding, ceil_mode=ceil_mode, count_include_pad=count_include_pad)


def avg_pool1d(
    x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:  # fmt: skip
    return F.avg_pool1d(x, kernel_size, stride, padding, ceil_mode=ceil_mode, count_include_pad=count_include_pad)


def avg_pool3d(
    x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: Any = None,
) -> Tensor:  # fmt: skip
    only(divisor_override=(divisor_override, None), ceil_mode=(ceil_mode, False))
    return F.avg_pool3d(x, kernel_size, stride, padding, count_include_pad=count_include_pad)


def adaptive_avg_pool1d(x: Any, output_size: Any) -> Tensor:
    """As that of an image of height 1."""
    (size,) = output_size if isinstance(output_size, (tuple, list)) else (output_size,)
    image = F.reshape(x, (*x.shape[:-1], 1, x.shape[-1]))
    return F.reshape(F.adaptive_avg_pool2d(image, (1, size)), (*x.shape[:-1], size))


def adaptive_avg_pool3d(x: Any, output_size: Any) -> Tensor:
    sizes = tuple(output_size) if isinstance(output_size, (tuple, list)) else (output_size,) * 3
    only(output_size=(sizes, (1, 1, 1)))
    return F.mean(x, (-3, -2, -1), True)


def interpolate(
    x: Any, size: Any = None, scale_factor: Any = None, mode: str = "nearest", align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None, antialias: bool = False,
) -> Tensor:  # fmt: skip
    only(antialias=(antialias, False), recompute_scale_factor=(bool(recompute_scale_factor), False))
    return F.interpolate(x, size, scale_factor, mode, bool(align_corners))


# ---- tables and losses -----------------------------------------------------------------------


def embedding(
    indices: Any, weight: Any, padding_idx: int | None = None, max_norm: float | None = None, norm_type: float = 2.0,
    scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Tensor:  # fmt: skip
    only(max_norm=(max_norm, None), scale_grad_by_freq=(scale_grad_by_freq, False), sparse=(sparse, False))
    return F.embedding(indices, weight, padding_idx)


def cross_entropy(
    x: Any, target: Any, weight: Any = None, size_average: Any = None, ignore_index: int = -100, reduce: Any = None,
    reduction: str = "mean", label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    only(weight=(weight is None, True), label_smoothing=(label_smoothing, 0.0), reduction=(reduction, "mean"))
    if x.ndim != 2 or target.dtype.kind not in "iu":
        raise ValueError(f"cross_entropy takes {x.shape} with {target.dtype} labels, expected (B, K) with integers")
    return F.cross_entropy(x, target)


def mse_loss(a: Any, b: Any, size_average: Any = None, reduce: Any = None, reduction: str = "mean") -> Tensor:
    only(size_average=(size_average, None), reduce=(reduce, None))
    return F.mse_loss(a, b, reduction)


LAYER_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": attention, "multi_head_attention_forward": multi_head_attention,
    "lstm": lstm, "gru": gru,
    "batch_norm": batch_norm, "layer_norm": layer_norm, "group_norm": group_norm, "instance_norm": instance_norm,
    "rms_norm": F.rms_norm, "normalize": normalize, "norm": norm, "_weight_norm": weight_norm,
    "max_pool1d": _single(F.max_pool1d, "max_pool1d"), "max_pool2d": _single(F.max_pool2d, "max_pool2d"),
    "boolean_dispatch": _single(F.max_pool2d, "max_pool2d"), "max_pool3d": _single(F.max_pool3d, "max_pool3d"),
    "avg_pool1d": avg_pool1d, "avg_pool2d": avg_pool2d, "avg_pool3d": avg_pool3d,
    "adaptive_avg_pool1d": adaptive_avg_pool1d, "adaptive_avg_pool2d": F.adaptive_avg_pool2d,
    "adaptive_avg_pool3d": adaptive_avg_pool3d, "interpolate": interpolate,
    "conv1d": F.conv1d, "conv3d": F.conv3d, "conv_transpose2d": F.conv_transpose2d,
    "embedding": embedding, "cross_entropy": cross_entropy, "mse_loss": mse_loss,
    "repeat_interleave": repeat_interleave,
}  # fmt: skip
"""By name; arguments as PyTorch has them."""
