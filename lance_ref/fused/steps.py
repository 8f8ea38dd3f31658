"""A group of operations on a few images: the source, and what follows it in place, on maps with the channels innermost.

Nothing is folded ahead of time. A batch norm is the scale and the shift of its running statistics, worked out when its
operation was called, and they are applied to the result of the convolution: no weight is changed, none is remembered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lance_ref.algebra.kernels.channels_last import CLAMP, NONE, Activation, columns, depthwise, finish
from lance_ref.algebra.kernels.threads import Padding, Pair
from lance_ref.fused.plan import Group, Op, Ref, is_depthwise, needs_patches
from lance_ref.fused.rules import ACTIVATIONS

Arrays = tuple[np.ndarray, ...]
Maps = Mapping[Ref, np.ndarray]


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a group needs beside its maps.

    Attributes
    ----------
    weight : array or None
        As it is, (C_out, C_in/groups, k_h, k_w).
    scale, shift : (C,) array
    activation : Activation
    """

    weight: np.ndarray | None
    scale: np.ndarray
    shift: np.ndarray
    activation: Activation


def prepare(groups: Sequence[Group], ops: Sequence[Op], own: Sequence[Arrays], dtype: np.dtype) -> list[Prepared]:
    """All that follows the source of each group as one scale, one shift and one activation function.

    Parameters
    ----------
    own : sequence of tuple of array
        By operation: weight and bias of a convolution, scale and shift of a batch norm.
    """
    # A pooling or a mean that nothing follows is not scaled, and may have more channels than what is.
    scaled = [group for group in groups if group.norm is None and not _is_alone(group, ops)]
    most = max((ops[group.result].shape[0] for group in scaled), default=0)
    ones, zeros = np.ones(most, dtype), np.zeros(most, dtype)
    prepared = []
    for group in groups:
        C = ops[group.result].shape[0]
        scale, shift, weight = ones[:C], zeros[:C], None
        if group.source is not None and ops[group.source].op == "conv2d":
            weight, *biases = own[group.source]
            shift = biases[0] if biases else shift
        if group.norm is not None:
            scale, norm_shift = own[group.norm]
            shift = norm_shift if shift.base is zeros else norm_shift + shift * scale
        activation = NONE if group.activation is None else ACTIVATIONS[ops[group.activation].op]
        prepared.append(Prepared(weight, np.ascontiguousarray(scale), np.ascontiguousarray(shift), activation))
    return prepared


def _is_alone(group: Group, ops: Sequence[Op]) -> bool:
    """Whether the group is a source without a weight, and nothing else."""
    return group.source is not None and ops[group.source].op != "conv2d" and group.result == group.source


def run(group: Group, ops: Sequence[Op], its: Prepared, maps: Maps, outside: Maps, workspace: np.ndarray | None) -> int:
    """Run a group on a few images.

    Parameters
    ----------
    maps : mapping
        Of values: (b, H, W, C), contiguous, each in its place of the arena.
    outside : mapping
        The same images of the arrays from outside, with the channels last and any strides.
    workspace : array or None
        For patches, (rows, W_out, K), or the weight of a depthwise convolution, (k_h, k_w, C).

    Returns
    -------
    int
        Multiply-adds.
    """
    out = maps[group.result]  # (b, H_out, W_out, C_out)
    residual = None if group.addition is None else maps[group.addition[1]]
    if group.source is None:
        np.copyto(out, maps[group.reads[0]])
        _finish(out, its, residual)
        return 0
    op = ops[group.source]
    if its.weight is None:
        SOURCES[op.op]([maps[ref] for ref in group.reads], out, *op.detail)
        if group.result != group.source:
            _finish(out, its, residual)
        return 0
    stride, padding, dilation = op.detail[1:4]
    if is_depthwise(op):
        assert workspace is not None
        workspace[:] = its.weight[:, 0].transpose(1, 2, 0)  # (k_h, k_w, C)
        arguments = (maps[group.reads[0]], workspace, out, stride, padding, dilation, its.scale, its.shift)
        if residual is None and its.activation.kind == CLAMP:
            depthwise(*arguments, its.activation.low, its.activation.high)
        else:
            depthwise(*arguments)
            _finish(out, replace(its, scale=np.ones_like(its.scale), shift=np.zeros_like(its.shift)), residual)
    elif needs_patches(op):
        assert workspace is not None
        x = (outside if group.reads[0] < 0 else maps)[group.reads[0]]
        _by_patches(x, out, its, residual, workspace, stride, padding, dilation)
    else:
        np.matmul(_rows(maps[group.reads[0]]), _transposed(its.weight), out=_rows(out))
        _finish(out, its, residual)
    return out.size * math.prod(its.weight.shape[1:])


def _by_patches(
    x: np.ndarray,
    out: np.ndarray,
    its: Prepared,
    residual: np.ndarray | None,
    workspace: np.ndarray,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
) -> None:
    """A convolution as products with patches, some output rows at a time, each finished before the next."""
    assert its.weight is not None
    b, H_out, W_out, C_out = out.shape
    lines = out.reshape(b * H_out, W_out, C_out)
    added = None if residual is None else residual.reshape(lines.shape)
    kernel = (its.weight.shape[2], its.weight.shape[3])
    for start in range(0, len(lines), len(workspace)):
        stop = min(start + len(workspace), len(lines))
        patches = workspace[: stop - start]  # (n, W_out, K)
        columns(x, patches, slice(start, stop), H_out, kernel, stride, padding, dilation)
        block = lines[start:stop]
        np.matmul(_rows(patches), _transposed(its.weight), out=_rows(block))
        _finish(block, its, None if added is None else added[start:stop])


def _rows(array: np.ndarray) -> np.ndarray:
    """(..., C) as (n, C)."""
    return array.reshape(-1, array.shape[-1])


def _transposed(weight: np.ndarray) -> np.ndarray:
    """(C_in·k_h·k_w, C_out), a view."""
    return weight.reshape(len(weight), -1).T


def _finish(y: np.ndarray, its: Prepared, residual: np.ndarray | None) -> None:
    finish(_rows(y), its.scale, its.shift, None if residual is None else _rows(residual), its.activation)


# ---- sources that are no convolutions -------------------------------------------------------


def _global_mean(inputs: Sequence[np.ndarray], out: np.ndarray) -> None:
    (x,) = inputs
    places = x.reshape(len(x), -1, x.shape[3])
    np.add.reduce(places, axis=1, out=out[:, 0, 0])
    out /= places.shape[1]  # np.mean would hold a copy of several images


def _product(inputs: Sequence[np.ndarray], out: np.ndarray) -> None:
    a, b = inputs
    np.multiply(a, b, out=out)  # (b, H, W, C) · (b, H, W, C) or (b, 1, 1, C)


def _maximum(
    inputs: Sequence[np.ndarray],
    out: np.ndarray,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
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
            (target_rows, rows, _), (target_places, places, _) = spans
            targets, sources = out[:, target_rows, target_places], x[:, rows, places]
            for row in range(targets.shape[1]):  # of whole maps that are cut, NumPy holds copies
                np.maximum(targets[:, row], sources[:, row], out=targets[:, row])


SOURCES: dict[str, Callable[..., None]] = {
    "adaptive_avg_pool2d": _global_mean,
    "mul": _product,
    "max_pool2d": _maximum,
}
