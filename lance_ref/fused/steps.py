"""A group of operations on a few images: the source, and what follows it in place, on maps with the channels innermost.

Nothing is folded ahead of time. A batch norm is the scale and the shift of its running statistics, worked out when its
operation was called, and they are applied to the result of the convolution: no weight is changed, none is remembered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lance_ref.algebra.kernels.channels_last import CLAMP, NONE, columns, depthwise, finish
from lance_ref.fused.plan import Group, Op, Plan, Ref, is_depthwise, needs_patches
from lance_ref.fused.rules import ACTIVATIONS

Arrays = tuple[np.ndarray, ...]
Maps = Mapping[Ref, np.ndarray]
Step = Callable[[Maps, np.ndarray], int]
"""Runs a group on the maps (b, H, W, C) of a few images; ``workspace`` takes patches. Gives its multiply-adds."""


@dataclass(frozen=True)
class Prepared:
    """What a group needs beside its maps: nothing here is as large as a map.

    Attributes
    ----------
    weight : array or None
        (C_in·k_h·k_w, C_out), or (k_h, k_w, C) of a depthwise convolution.
    scale, shift : (C,) array
    """

    weight: np.ndarray | None
    scale: np.ndarray
    shift: np.ndarray


def prepare(group: Group, ops: Sequence[Op], own: Sequence[Arrays], dtype: np.dtype) -> Prepared:
    """The weight as the products take it, and all that follows as one scale and shift.

    Parameters
    ----------
    own : sequence of tuple of array
        By operation: weight and bias of a convolution, scale and shift of a batch norm.
    """
    C = ops[group.result].shape[0]
    scale, shift = np.ones(C, dtype), np.zeros(C, dtype)
    weight = None
    if group.source is not None and ops[group.source].op == "conv2d":
        op, (raw, *biases) = ops[group.source], own[group.source]
        weight = raw.reshape(len(raw), -1).T  # (C_in·k_h·k_w, C_out), a view
        if is_depthwise(op):
            weight = np.ascontiguousarray(raw[:, 0].transpose(1, 2, 0))  # (k_h, k_w, C)
        if biases:
            shift = biases[0]
    if group.norm is not None:
        scale, norm_shift = own[group.norm]
        shift = norm_shift + shift * scale
    return Prepared(weight, np.ascontiguousarray(scale, dtype), np.ascontiguousarray(shift, dtype))


def run(
    g: int, plan: Plan, ops: Sequence[Op], prepared: Prepared, maps: Maps, outside: Maps, workspace: np.ndarray | None
) -> int:
    """Run group ``g`` of a plan.

    Parameters
    ----------
    maps : mapping
        Of values: (b, H, W, C), contiguous, each in its place of the arena.
    outside : mapping
        The same images of the arrays from outside, with the channels last and any strides.
    workspace : array or None
        For patches: (rows, W_out, K).

    Returns
    -------
    int
        Multiply-adds.
    """
    group = plan.groups[g]
    out = maps[group.result]  # (b, H_out, W_out, C_out)
    activation = NONE if group.activation is None else ACTIVATIONS[ops[group.activation].op]
    residual = None if group.addition is None else maps[group.addition[1]]
    rows = out.reshape(-1, out.shape[3])
    if group.source is None:
        np.copyto(out, maps[group.reads[0]])
        _finish(rows, prepared, residual, activation)
        return 0
    op, macs = ops[group.source], 0
    if op.op == "conv2d":
        weight, stride, padding, dilation = op.detail[:4]
        macs = out.size * math.prod(weight[1:])
        assert prepared.weight is not None
        if is_depthwise(op):
            geometry = (stride, padding, dilation)
            if residual is None and activation.kind == CLAMP:
                bounds = (activation.low, activation.high)
                depthwise(
                    maps[group.reads[0]], prepared.weight, out, *geometry, prepared.scale, prepared.shift, *bounds
                )
                return macs
            depthwise(maps[group.reads[0]], prepared.weight, out, *geometry, prepared.scale, prepared.shift)
            ones, zeros = np.ones_like(prepared.scale), np.zeros_like(prepared.shift)
            _finish(rows, Prepared(None, ones, zeros), residual, activation)
            return macs
        if needs_patches(op):
            assert workspace is not None
            x = (outside if group.reads[0] < 0 else maps)[group.reads[0]]
            _by_patches(x, out, prepared, residual, activation, workspace, weight[2:], stride, padding, dilation)
            return macs
        np.matmul(maps[group.reads[0]].reshape(len(rows), -1), prepared.weight, out=rows)
    else:
        SOURCES[op.op]([maps[ref] for ref in group.reads], out, *op.detail)
    if group.members() != [group.source] or prepared.weight is not None:
        _finish(rows, prepared, residual, activation)
    return macs


def _finish(rows: np.ndarray, prepared: Prepared, residual: np.ndarray | None, activation) -> None:  # type: ignore[no-untyped-def]
    added = None if residual is None else residual.reshape(rows.shape)
    finish(rows, prepared.scale, prepared.shift, added, activation)


def _by_patches(x, out, prepared, residual, activation, workspace, *geometry):  # type: ignore[no-untyped-def]
    """A convolution as products with patches, some output rows at a time, each finished before the next."""
    b, H_out, W_out, C_out = out.shape
    places = out.reshape(b * H_out, W_out, C_out)
    added = None if residual is None else residual.reshape(places.shape)
    step = len(workspace)
    for start in range(0, b * H_out, step):
        stop = min(start + step, b * H_out)
        patches = workspace[: stop - start]  # (n, W_out, K)
        columns(x, patches, slice(start, stop), H_out, *geometry)
        block = places[start:stop].reshape(-1, C_out)
        np.matmul(patches.reshape(len(block), -1), prepared.weight, out=block)
        _finish(block, prepared, None if added is None else added[start:stop], activation)


# ---- sources that are no convolutions -------------------------------------------------------


def _global_mean(inputs: Sequence[np.ndarray], out: np.ndarray) -> None:
    (x,) = inputs
    np.mean(x, axis=(1, 2), out=out[:, 0, 0])


def _product(inputs: Sequence[np.ndarray], out: np.ndarray) -> None:
    np.multiply(*inputs, out=out)  # (b, H, W, C) · (b, H, W, C) or (b, 1, 1, C)


def _maximum(
    inputs: Sequence[np.ndarray],
    out: np.ndarray,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> None:
    """One position of the window after the other, for all windows that see the image there."""
    (x,) = inputs
    out[...] = -np.inf
    for p, q in np.ndindex(*kernel):
        spans = []
        for axis, offset in ((0, p - padding[0]), (1, q - padding[1])):
            n, n_out, s = x.shape[axis + 1], out.shape[axis + 1], stride[axis]
            first, last = max(0, -(offset // s)), min(n_out - 1, (n - 1 - offset) // s)
            spans.append((slice(first, last + 1), slice(first * s + offset, last * s + offset + 1, s), last >= first))
        if all(span[2] for span in spans):
            target = out[:, spans[0][0], spans[1][0]]
            np.maximum(target, x[:, spans[0][1], spans[1][1]], out=target)


SOURCES: dict[str, Callable[..., None]] = {
    "adaptive_avg_pool2d": _global_mean,
    "mul": _product,
    "max_pool2d": _maximum,
}
