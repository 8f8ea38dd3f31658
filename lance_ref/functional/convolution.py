"""What the layers with weights have in common, and two of them: linear and 2-D convolution.

They leave it to an activation store to decide what is kept of the input for the weight
gradient (:mod:`lance_ref.stores`). The input gradient needs the weight alone, so nothing is
kept for it, and it is exact under every store that does not say otherwise.

A weight may be given as a sum, W = s·W_0 + D ×₂ Q, of which D alone has a gradient (:mod:`lance_ref.algebra.basis`).
The operation's inputs are then (x, D, [bias], W_0, s): what trains stands where the weight stands otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from lance_ref.algebra.basis import Basis
from lance_ref.algebra.convolution import Convolution
from lance_ref.algebra.geometry import ConvGeometry, Geometry, LinearGeometry, Padding, Pair
from lance_ref.engine.autograd import Function, Node
from lance_ref.engine.state import state
from lance_ref.engine.tensor import FLOATS, Shape, Tensor, as_tensor
from lance_ref.stores import EXACT, ActivationStore


class Update(NamedTuple):
    """The part of a weight that trains, W = s·W_0 + D ×₂ Q.

    Attributes
    ----------
    weight : Tensor
        D, of ``basis.update_shape(W_0.shape)``.
    decay : Tensor ()
        s, what weight decay has left of W_0. Its gradient is zero: it follows the optimiser's rule alone.
    basis : Basis
        Q.
    """

    weight: Tensor
    decay: Tensor
    basis: Basis


class Weighted(Function):
    """What all layers with weights share: output = geometry(x, weight) + bias."""

    @classmethod
    def run(
        cls, ctx: Node, geometry: Geometry, store: ActivationStore, update: Basis | None, inputs: Sequence[np.ndarray]
    ) -> np.ndarray:
        """The output without bias; saves what the gradients of x and weight will need."""
        x, weight, base, decay = *inputs[:2], *inputs[-2:]  # the last two of a sum
        out = geometry.forward(x, weight) if update is None else update.output(x, base, decay, weight, geometry)
        ctx.geometry, ctx.store, ctx.update, ctx.kept = geometry, store, update, ()  # type: ignore[attr-defined]
        if ctx.needs_input_grad[0]:
            ctx.save_input("weight", 1)
            if update is not None:  # Backward writes W down once more: keeping it would keep a second weight.
                ctx.save_input("base", len(inputs) - 2)
                ctx.save_input("decay", len(inputs) - 1)
        if ctx.needs_input_grad[1]:
            # Here and below without a ``with``, whose overhead is that of a small product.
            outer, state.kind = state.kind, "projection"
            try:
                kept = store.save_for(x, geometry)
            except ValueError as error:
                raise _of_layer(error) from None
            finally:
                state.kind = outer
            ctx.kept = tuple(kept)  # type: ignore[attr-defined]
            for name, array in kept.items():
                if array is x:
                    ctx.save_input(name, 0)
                else:
                    ctx.save_for_backward(**{name: array})
        return out

    @classmethod
    def gradients(cls, ctx: Node, grad_output: np.ndarray) -> list[np.ndarray | None]:
        """Gradients of all inputs but the bias."""
        store, update, geometry = ctx.store, ctx.update, ctx.geometry  # type: ignore[attr-defined]
        grads: list[np.ndarray | None] = [None] * len(ctx.needs_input_grad)
        outer = state.kind
        try:
            if ctx.needs_input_grad[0]:
                state.kind = "grad_input"
                if update is None:
                    grads[0] = store.input_gradient(ctx["weight"], grad_output, geometry)
                else:
                    grads[0] = update.input_gradient(ctx["base"], ctx["decay"], ctx["weight"], grad_output, geometry)
            if ctx.needs_input_grad[1]:
                state.kind = "grad_weight"
                saved = {name: ctx[name] for name in ctx.kept}  # type: ignore[attr-defined]
                if update is None:
                    grads[1] = store.weight_gradient(saved, grad_output, geometry)
                else:
                    grads[1] = store.update_gradient(saved, grad_output, geometry, update)
        finally:
            state.kind = outer
        if update is not None and ctx.needs_input_grad[-1]:
            # The loss depends on s, but s is not there to be learned: it changes by weight decay alone.
            grads[-1] = np.zeros((), grad_output.dtype)
        return grads


class Linear(Weighted):
    """Y = X Wᵀ + b."""

    op = "linear"

    @staticmethod
    def output_shape(x: Tensor, *weights: Tensor, store: ActivationStore, update: Basis | None = None) -> Shape:  # type: ignore[override]
        _check_floating("linear", x)
        weight = weights[0] if update is None else _base("linear", weights, update)
        if weight.ndim != 2:
            raise ValueError(f"linear: weight has shape {weight.shape}, expected 2 dimensions (out, in)")
        if x.ndim < 1 or x.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"linear: x has shape {x.shape}, expected (..., {weight.shape[1]}) for a weight of shape {weight.shape}"
            )
        _check_bias("linear", weights, weight.shape[0])
        _check_store("linear", store, x, weights[0])
        return _linear_geometry(x.shape, weight.shape).output_shape

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Node, *inputs: np.ndarray, store: ActivationStore, update: Basis | None = None
    ) -> np.ndarray:
        weight = inputs[1] if update is None else inputs[-2]
        out = Linear.run(ctx, _linear_geometry(inputs[0].shape, weight.shape), store, update, inputs)
        if has_bias(len(inputs)):
            out += inputs[2]
        return out

    @staticmethod
    def backward(ctx: Node, grad_output: np.ndarray) -> tuple[np.ndarray | None, ...]:
        gradients = Linear.gradients(ctx, grad_output)
        if has_bias(len(gradients)) and ctx.needs_input_grad[2]:
            gradients[2] = grad_output.reshape(-1, grad_output.shape[-1]).sum(axis=0)
        return tuple(gradients)


class Convolved(Weighted):
    """Y = X ⋆ W + b, for a convolution of any kind: a subclass says which geometry a call has."""

    @staticmethod
    def geometry(x: Shape, weight: Shape, attributes: dict[str, Any]) -> Convolution:
        """The sizes of a call, from shapes and the operation's attributes."""
        raise NotImplementedError

    @classmethod
    def output_shape(cls, x: Tensor, *weights: Tensor, **attributes: Any) -> Shape:  # type: ignore[override]
        update = attributes.get("update")
        weight = weights[0] if update is None else _base(cls.op, weights, update)
        geometry = cls.geometry(x.shape, weight.shape, attributes)
        _check_bias(cls.op, weights, geometry.out_channels)
        _check_store(cls.op, attributes["store"], x, weights[0])
        return geometry.output_shape

    @classmethod
    def forward(cls, ctx: Node, *inputs: np.ndarray, **attributes: Any) -> np.ndarray:
        update = attributes.get("update")
        weight = inputs[1] if update is None else inputs[-2]
        geometry = cls.geometry(inputs[0].shape, weight.shape, attributes)
        out = cls.run(ctx, geometry, attributes["store"], update, inputs)
        if has_bias(len(inputs)):
            out += inputs[2].reshape(-1, *[1] * len(geometry.kernel))
        return out

    @classmethod
    def backward(cls, ctx: Node, grad_output: np.ndarray) -> tuple[np.ndarray | None, ...]:
        gradients = cls.gradients(ctx, grad_output)
        if has_bias(len(gradients)) and ctx.needs_input_grad[2]:
            gradients[2] = grad_output.sum(axis=(0, *range(2, grad_output.ndim)))
        return tuple(gradients)


class Conv2d(Convolved):
    """Y = X ⋆ W + b (cross-correlation)."""

    op = "conv2d"

    @staticmethod
    def geometry(x: Shape, weight: Shape, attributes: dict[str, Any]) -> Convolution:
        a = attributes
        return _geometry(x, weight, a["stride"], a["padding"], a["dilation"], a["groups"])


def has_bias(inputs: int) -> bool:
    """Whether a bias is among so many inputs: (x, W) and (x, D, W_0, s) have none."""
    return inputs % 2 == 1


def _base(op: str, weights: tuple[Tensor, ...], update: Basis) -> Tensor:
    """W_0 of (D, [b], W_0, s)."""
    base = weights[-2]
    wanted = update.update_shape(base.shape)
    if weights[0].shape != wanted or weights[-1].shape != ():
        raise ValueError(
            f"{op}: the update has shape {weights[0].shape} and decay {weights[-1].shape}, expected {wanted} and () "
            f"for a weight of shape {base.shape}"
        )
    return base


def linear(
    x: Any,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    store: ActivationStore = EXACT,
    update: Update | None = None,
) -> Tensor:
    """``x @ weight.T + bias``.

    Parameters
    ----------
    x : Tensor (..., I)
    weight : Tensor (O, I)
    bias : Tensor (O,), optional
    store : ActivationStore
        What is kept of ``x`` for the weight gradient; all of it by default.
    update : Update, optional
        What trains in place of the weight, which is W_0 then.

    Returns
    -------
    Tensor (..., O)

    Raises
    ------
    ValueError, TypeError
        If shapes or dtypes do not fit.
    """
    inputs, more = _inputs(as_tensor(x), as_tensor(weight), bias, update)
    return Linear.apply(*inputs, store=store, **more)


def conv2d(
    x: Any,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[Any] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    store: ActivationStore = EXACT,
    update: Update | None = None,
) -> Tensor:
    """2-D convolution (cross-correlation) of a batch of images.

    Parameters
    ----------
    x : Tensor (B, C_in, H, W)
    weight : Tensor (C_out, C_in/groups, k_h, k_w)
    bias : Tensor (C_out,), optional
    stride, dilation : int or pair
        For (height, width).
    padding : int, pair, ((top, bottom), (left, right)), "valid" or "same"
        Zeros around the image. ``"same"`` gives H_out = ceil(H / stride), with the odd zero at the
        bottom and right; with stride 1 that is PyTorch's "same", and TensorFlow's with any stride.
    groups : int
        Divides C_in and C_out; ``groups = C_in`` is the depthwise convolution.
    store : ActivationStore
        What is kept of ``x`` for the weight gradient; all of it by default.
    update : Update, optional
        What trains in place of the weight, which is W_0 then.

    Returns
    -------
    Tensor (B, C_out, H_out, W_out)
        H_out = floor((H + top + bottom − dilation·(k_h − 1) − 1) / stride) + 1.

    Raises
    ------
    ValueError, TypeError
        If shapes or dtypes do not fit, ``groups`` does not divide, or the output would be empty.
    """
    x, weight = as_tensor(x), as_tensor(weight)
    _check_floating("conv2d", x)
    if x.ndim != 4:
        raise ValueError(f"conv2d: x has shape {x.shape}, expected 4 dimensions (B, C_in, H, W)")
    if weight.ndim != 4:
        raise ValueError(
            f"conv2d: weight has shape {weight.shape}, expected 4 dimensions (C_out, C_in/groups, k_h, k_w)"
        )
    if 0 in weight.shape:
        raise ValueError(f"conv2d: weight has shape {weight.shape}, expected sizes of at least 1")
    strides, dilations = pair("stride", stride, 1), pair("dilation", dilation, 1)
    if not isinstance(groups, (int, np.integer)) or isinstance(groups, bool) or groups < 1:
        raise ValueError(f"conv2d: groups is {groups!r}, expected a positive integer")
    C_in, C_out = x.shape[1], weight.shape[0]
    if C_in % groups or C_out % groups:
        raise ValueError(f"conv2d: groups is {groups}, expected a divisor of C_in = {C_in} and C_out = {C_out}")
    if weight.shape[1] != C_in // groups:
        raise ValueError(
            f"conv2d: weight has shape {weight.shape}, expected (C_out, {C_in // groups}, k_h, k_w) "
            f"for x of shape {x.shape} and groups = {groups}"
        )
    size, kernel = (x.shape[2], x.shape[3]), (weight.shape[2], weight.shape[3])
    pads = resolve_padding(padding, size, kernel, strides, dilations)
    geometry = _geometry(x.shape, weight.shape, strides, pads, dilations, int(groups))
    if min(geometry.output_shape) < 1:
        raise ValueError(
            f"conv2d: the output would be empty, {geometry.output_shape}: x has shape {x.shape}, "
            f"weight {weight.shape}, stride {strides}, padding {pads}, dilation {dilations}"
        )
    inputs, more = _inputs(x, weight, bias, update)
    return Conv2d.apply(
        *inputs, stride=strides, padding=pads, dilation=dilations, groups=int(groups), store=store, **more
    )


def _inputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, update: Update | None
) -> tuple[list[Tensor], dict[str, Basis]]:
    """The operation's inputs, and the attribute that it has beside its own where a weight is a sum."""
    biases = [] if bias is None else [as_tensor(bias)]
    if update is None:
        return [x, weight, *biases], {}
    return [x, update.weight, *biases, weight, update.decay], {"update": update.basis}


def pair(name: str, value: int | Sequence[int], smallest: int) -> Pair:
    """``3`` and ``(3, 3)`` mean the same; checks that both are integers and large enough."""
    if type(value) is int and value >= smallest:
        return value, value
    values = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    whole = all(isinstance(v, (int, np.integer)) and not isinstance(v, bool) for v in values)
    if len(values) != 2 or not whole or min(values) < smallest:
        raise ValueError(f"{name} is {value!r}, expected an integer of at least {smallest} or a pair of them")
    return int(values[0]), int(values[1])


def resolve_padding(padding: Any, size: Pair, kernel: Pair, stride: Pair, dilation: Pair) -> Padding:
    """Any accepted form of ``padding`` as ((top, bottom), (left, right))."""
    if isinstance(padding, str):
        if padding == "valid":
            return (0, 0), (0, 0)
        if padding != "same":
            raise ValueError(f"padding is {padding!r}, expected 'same', 'valid', integers or pairs")
        totals = [
            max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
            for n, k, s, d in zip(size, kernel, stride, dilation, strict=True)
        ]
        top, left = totals[0] // 2, totals[1] // 2
        return (top, totals[0] - top), (left, totals[1] - left)
    if isinstance(padding, (tuple, list)) and any(isinstance(p, (tuple, list)) for p in padding):
        sides = tuple(padding)
        if len(sides) != 2:
            raise ValueError(f"padding is {padding!r}, expected ((top, bottom), (left, right))")
        return pair("padding of height", sides[0], 0), pair("padding of width", sides[1], 0)
    height, width = pair("padding", padding, 0)
    return (height, height), (width, width)


@lru_cache(maxsize=1024)
def _geometry(x: Shape, weight: Shape, stride: Pair, padding: Padding, dilation: Pair, groups: int) -> ConvGeometry:
    """The sizes of a call, worked out once: a net calls with the same ones at every step."""
    return ConvGeometry(x, weight, stride, padding, dilation, groups)


_linear_geometry = lru_cache(maxsize=1024)(LinearGeometry)


def _check_store(op: str, store: ActivationStore, x: Tensor, weight: Tensor) -> None:
    """A store that cannot take ``x`` matters only where something will be saved: not under no_grad()."""
    if state.grad_enabled and weight.requires_grad:
        try:
            store.check(x.shape)
            store.check_op(op)
        except ValueError as error:
            raise _of_layer(error) from None


def _of_layer(error: ValueError) -> ValueError:
    """An error of a store, with the layer's name."""
    return type(error)(f"layer {state.path or '(root)'}: {error}")


def _check_floating(op: str, x: Tensor) -> None:
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: x has dtype {x.dtype}, expected float32 or float64")


def _check_bias(op: str, weights: tuple[Tensor, ...], size: int) -> None:
    if has_bias(1 + len(weights)) and weights[1].shape != (size,):
        raise ValueError(f"{op}: bias has shape {weights[1].shape}, expected ({size},)")
