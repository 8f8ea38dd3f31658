"""Batch normalisation (training and frozen) and layer normalisation.

With x̂ = (x − mean)·inv_std, y = x̂·weight + bias, inv_std = 1/√(var + eps), and the statistics taken
from n elements of x itself,

    dx = weight·inv_std·(g − Σg/n − x̂·Σ(g·x̂)/n),   dweight = Σ g·x̂,   dbias = Σ g

(for layer norm g·weight stands in the place of g in the brackets). Frozen, the statistics are
constants and dx = scale·g with scale = weight·inv_std: only that is kept.
"""
# mypy: disable-error-code="override"

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lance_ref.algebra.kernels.batch_norm import normalise, normalise_backward
from lance_ref.algebra.kernels.elementwise import scale_and_shift
from lance_ref.engine.arguments import (
    Context,
    Gradients,
    positive,
    require_floating,
    share,
)
from lance_ref.engine.autograd import Function
from lance_ref.engine.blocks import pieces
from lance_ref.engine.tensor import Shape, Tensor, as_tensor

_STATISTICS = ("running_mean", "running_var")
_WITH_AFFINE = ("weight", "bias", *_STATISTICS)


class BatchNorm(Function):
    """Inputs: x[, weight, bias][, running_mean, running_var]."""

    op = "batch_norm"

    @staticmethod
    def output_shape(x: Tensor, *others: Tensor, training: bool, affine: bool, eps: float, momentum: float) -> Shape:
        named = dict(zip(_WITH_AFFINE if affine else _STATISTICS, others, strict=False))
        require_floating("batch_norm", x=x, **named)
        if x.ndim < 2:
            raise ValueError(f"batch_norm: x has shape {x.shape}, expected at least 2 dimensions (B, C, ...)")
        for name, tensor in named.items():
            if tensor.shape != (x.shape[1],):
                raise ValueError(
                    f"batch_norm: {name} has shape {tensor.shape}, expected ({x.shape[1]},) for x of shape {x.shape}"
                )
        if 0 in x.shape[1:]:
            raise ValueError(f"batch_norm: x has shape {x.shape}, expected sizes of at least 1 after the batch")
        if training and x.size // max(x.shape[1], 1) < 2:
            raise ValueError(
                f"batch_norm: x has shape {x.shape}, expected more than one value per channel when training"
            )
        return x.shape

    @staticmethod
    def forward(
        ctx: Context, x: np.ndarray, *others: np.ndarray, training: bool, affine: bool, eps: float, momentum: float
    ) -> np.ndarray:
        weight, bias = others[:2] if affine else (None, None)
        running = others[2:] if affine else others
        ctx.training, ctx.affine = training, affine
        if training:
            out, mean, var, inv_std = normalise(x, weight, bias, eps)
            if running:
                _update_running(running[0], running[1], mean, var, x.size // x.shape[1], momentum)
        else:
            mean, inv_std = running[0].copy(), inv_std_of(running[1], eps)
            scale, shift = scale_and_shift_of(others, affine, inv_std)
            out = scale_and_shift(x, scale, shift) if x.size else x.copy()  # of no images
            if ctx.needs_input_grad[0]:
                ctx.save_for_backward(scale=scale)
        needs_x, needs_weight = ctx.needs_input_grad[0], affine and ctx.needs_input_grad[1]
        if needs_weight or (training and needs_x):
            ctx.save_input("x", 0)
            ctx.save_for_backward(mean=mean, inv_std=inv_std)
        if training and needs_x and affine:
            ctx.save_input("weight", 1)
        return out

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        g, needs = grad_output, ctx.needs_input_grad
        needs_weight, needs_bias = (needs[1], needs[2]) if ctx.affine else (False, False)
        grad_x: Any = None
        grad_weight: Any = None
        sum_g: Any = None
        if needs_weight or (ctx.training and needs[0]):
            through = ctx.training and needs[0]
            weight = ctx["weight"] if through and ctx.affine else None
            x, over = ctx["x"], ctx.reused(g, ctx["x"])
            grad_x, grad_weight, sum_g = normalise_backward(g, x, ctx["mean"], ctx["inv_std"], weight, through, over)
        elif needs_bias:
            sum_g = g.sum(axis=(0, *range(2, g.ndim)))  # (C,)
        if needs[0] and not ctx.training:
            grad_x = np.multiply(g, _channels(ctx["scale"], g), out=ctx.reused(g))
        grads = (grad_x, grad_weight if needs_weight else None, sum_g if needs_bias else None)
        return (*grads[: 3 if ctx.affine else 1], *[None] * (len(needs) - (3 if ctx.affine else 1)))


def scale_and_shift_of(
    others: Sequence[np.ndarray], affine: bool, inv_std: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Frozen, y = x·scale + shift: (C,) each, from all inputs but x and :func:`inv_std_of` the last one."""
    running_mean = others[-2]
    if not affine:
        return inv_std, -running_mean * inv_std
    weight, bias = others[:2]
    scale = weight * inv_std
    return scale, bias - running_mean * scale


def inv_std_of(var: np.ndarray, eps: float) -> np.ndarray:
    """1 / √(var + eps), a new array."""
    inv_std: np.ndarray = 1 / np.sqrt(var + var.dtype.type(eps))
    return inv_std


def _channels(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """(C,) as (C, 1, ...), so that it broadcasts against (B, C, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 2))


def _update_running(
    running_mean: np.ndarray, running_var: np.ndarray, mean: np.ndarray, var: np.ndarray, n: int, momentum: float
) -> None:
    """running ← (1 − momentum)·running + momentum·batch, in place, with the unbiased variance."""
    for running, batch in ((running_mean, mean), (running_var, var * (n / (n - 1)))):
        running *= 1 - momentum
        running += momentum * batch


class LayerNorm(Function):
    """Inputs: x[, weight, bias]."""

    op = "layer_norm"

    @staticmethod
    def output_shape(x: Tensor, *others: Tensor, normalized_shape: Shape, eps: float, affine: bool) -> Shape:
        named = dict(zip(("weight", "bias"), others, strict=False))
        require_floating("layer_norm", x=x, **named)
        k = len(normalized_shape)
        if not k or x.shape[-k:] != normalized_shape or 0 in normalized_shape:
            raise ValueError(
                f"layer_norm: x has shape {x.shape}, expected it to end in normalized_shape {normalized_shape}"
            )
        for name, tensor in named.items():
            if tensor.shape != normalized_shape:
                raise ValueError(
                    f"layer_norm: {name} has shape {tensor.shape}, expected normalized_shape {normalized_shape}"
                )
        return x.shape

    @staticmethod
    def forward(
        ctx: Context, x: np.ndarray, *others: np.ndarray, normalized_shape: Shape, eps: float, affine: bool
    ) -> np.ndarray:
        ctx.k, ctx.affine = len(normalized_shape), affine
        axes = tuple(range(x.ndim - ctx.k, x.ndim))
        mean = x.mean(axis=axes, keepdims=True)
        out = x - mean
        var = np.empty_like(mean)
        for part in pieces(x.shape, axes):
            np.square(out[part]).mean(axis=axes, keepdims=True, out=var[part])
        inv_std = 1 / np.sqrt(var + x.dtype.type(eps))
        out *= inv_std
        if affine:
            weight, bias = others
            out *= weight
            out += bias
        if any(ctx.needs_input_grad[:2]):  # x or weight
            ctx.save_input("x", 0)
            ctx.save_for_backward(mean=mean, inv_std=inv_std)
        if affine and ctx.needs_input_grad[0]:
            ctx.save_input("weight", 1)
        return out

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        needs_x, needs_weight, needs_bias = (*ctx.needs_input_grad, False, False)[:3]
        outer = tuple(range(grad_output.ndim - ctx.k))
        inner = tuple(range(grad_output.ndim - ctx.k, grad_output.ndim))
        grad_x = grad_weight = grad_bias = None
        if needs_bias:
            grad_bias = grad_output.sum(axis=outer)
        if needs_weight:
            grad_weight = np.zeros(grad_output.shape[grad_output.ndim - ctx.k :], grad_output.dtype)
        if needs_x:
            over = ctx.reused(grad_output, ctx["x"])
            grad_x = np.empty_like(ctx["x"]) if over is None else over
        for part in pieces(grad_output.shape, inner) if needs_x or needs_weight else ():
            g, inv_std = grad_output[part], ctx["inv_std"][part]
            x_hat = ctx["x"][part] - ctx["mean"][part]
            x_hat *= inv_std
            if grad_weight is not None:
                grad_weight += (g * x_hat).sum(axis=outer)
            if grad_x is not None:
                g = g * ctx["weight"] if ctx.affine else g
                grad_x[part] = _through_statistics(g, x_hat, inv_std, inner)
        return (grad_x, grad_weight, grad_bias) if ctx.affine else (grad_x,)


def _through_statistics(g: np.ndarray, x_hat: np.ndarray, inv_std: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """inv_std·(g − Σg/n − x̂·Σ(g·x̂)/n), sums over ``axes``; written into ``x_hat``."""
    n = math.prod(g.shape[i] for i in axes)
    x_hat *= (g * x_hat).sum(axis=axes, keepdims=True) / -n
    x_hat += g
    x_hat -= g.sum(axis=axes, keepdims=True) / n
    x_hat *= inv_std
    return x_hat


def batch_norm(
    x: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise each channel.

    Parameters
    ----------
    x : Tensor (B, C, ...)
    running_mean, running_var : array or Tensor (C,), or None
        The statistics to use when frozen. When training they are updated in place, in float of the
        same dtype as ``x``, the variance by the unbiased estimate; None keeps no statistics.
    weight, bias : Tensor (C,), optional
        Both or neither.
    training : bool
        True: normalise by the batch's own (biased) statistics; keeps ``x``. False ("frozen"): the
        affine map y = x·scale + shift, which keeps only ``scale``, (C,), unless ``weight`` itself
        needs a gradient.
    momentum : float in [0, 1]
        Weight of the batch in the running statistics.
    eps : float
        Added to the variance.

    Raises
    ------
    ValueError, TypeError
        If shapes or dtypes do not fit, there is only one value per channel when training, ``momentum`` or ``eps`` is
        out of range or not finite, or a variance that is to be used is negative or NaN.
    """
    x = as_tensor(x)
    if (running_mean is None) != (running_var is None) or (running_mean is None and not training):
        raise ValueError("batch_norm: running_mean and running_var go together, and are needed when training is False")
    inputs = [x, *_affine("batch_norm", weight, bias)]
    running = [] if running_mean is None else [as_tensor(running_mean), as_tensor(running_var)]
    for name, tensor in zip(_STATISTICS, running, strict=False):
        if tensor.requires_grad:
            raise ValueError(f"batch_norm: {name} requires gradients, expected plain statistics")
    training, momentum = bool(training), share("batch_norm", "momentum", momentum)
    if not training and not running[1].is_meta and not (running[1].data >= 0).all():  # NaN too
        raise ValueError(f"batch_norm: running_var holds {running[1].data.min()}, expected variances, at least 0")
    output = BatchNorm.apply(
        *inputs,
        *running,
        training=training,
        affine=weight is not None,
        eps=positive("batch_norm", "eps", eps),
        momentum=momentum,
    )
    if training and not output.is_meta:
        for tensor in running:
            tensor._version.value += 1  # written in place
    return output


def layer_norm(
    x: Any, normalized_shape: int | Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    """Normalise over the last dimensions.

    Parameters
    ----------
    x : Tensor of shape ``(..., *normalized_shape)``
    normalized_shape : int or sequence of int
        Sizes of the dimensions whose mean and (biased) variance are taken.
    weight, bias : Tensor of ``normalized_shape``, optional
        Both or neither.
    eps : float
        Added to the variance.
    """
    shape = (normalized_shape,) if isinstance(normalized_shape, (int, np.integer)) else tuple(normalized_shape)
    inputs = [as_tensor(x), *_affine("layer_norm", weight, bias)]
    shape = tuple(int(n) for n in shape)
    return LayerNorm.apply(
        *inputs, normalized_shape=shape, eps=positive("layer_norm", "eps", eps), affine=weight is not None
    )


def _affine(op: str, weight: Any, bias: Any) -> list[Tensor]:
    if (weight is None) != (bias is None):
        missing = "weight" if weight is None else "bias"
        raise ValueError(f"{op}: {missing} is None, expected weight and bias together or neither")
    return [] if weight is None else [as_tensor(weight), as_tensor(bias)]
