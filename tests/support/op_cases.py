"""Every operation with every kind of argument, once: gradients, dtypes, trace and tape are tested over this list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lance_ref import F, Tensor

Domain = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape)


def positive(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.uniform(0.5, 2, shape)


def distinct(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """All values at least 0.1 apart, so that no maximum changes place within a difference's step."""
    n = int(np.prod(shape))
    return (rng.permutation(n) - n / 2 + 0.05).reshape(shape) * 0.1


def between(*kinks: float) -> Domain:
    """Values on all sides of the kinks, none within 0.05 of one."""

    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        values = rng.uniform(min(kinks) - 2, max(kinks) + 2, shape)
        for kink in kinks:
            values = np.where(np.abs(values - kink) < 0.05, kink + 0.1, values)
        return values

    return draw


@dataclass(frozen=True)
class Case:
    """One call: ``function`` of as many tensors as there are ``shapes``."""

    op: str
    name: str
    function: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    domain: Domain = normal

    def arrays(self, dtype: Any = np.float64, seed: int = 0) -> list[np.ndarray]:
        rng = np.random.default_rng(seed)
        return [np.asarray(self.domain(rng, shape), dtype) for shape in self.shapes]

    def __str__(self) -> str:
        return f"{self.op}: {self.name}"


def like(x: Tensor, values: Any) -> np.ndarray:
    return np.asarray(values, x.dtype)


LABELS = np.array([2, 0, 3, 3, 1])
ROWS = np.array([3, 0, -1, 3])
MASK = np.array([True, False, True, True])
IMAGE = (2, 3, 5, 6)

BROADCASTS = {
    "equal shapes": ((2, 3), (2, 3)),
    "a row": ((2, 3), (3,)),
    "a column": ((2, 3), (2, 1)),
    "both grow": ((4, 1, 3), (2, 1)),
    "a number without dimensions": ((), (2, 3)),
    "two numbers": ((), ()),
    "size one everywhere": ((1, 1), (2, 3)),
}

ALIASES = {
    **{"cat": "concatenate", "flatten": "reshape", "transpose": "permute"},
    **{f"{op}1d": f"{op}2d" for op in ("conv", "max_pool", "avg_pool")},
}
"""Functions that run another one's operation."""

CASES = [
    *(Case("add", name, F.add, shapes) for name, shapes in BROADCASTS.items()),
    *(Case("sub", name, F.sub, shapes) for name, shapes in BROADCASTS.items()),
    *(Case("mul", name, F.mul, shapes) for name, shapes in BROADCASTS.items()),
    *(Case("div", name, F.div, shapes, positive) for name, shapes in BROADCASTS.items()),
    Case("add", "a Python number on the left", lambda x: 2 + x, ((2, 3),)),
    Case("sub", "a Python number on the left", lambda x: 2.5 - x, ((2, 3),)),
    Case("mul", "an array", lambda x: x * like(x, [1, -2, 3]), ((2, 3),)),
    Case("mul", "with itself", lambda x: x * x, ((2, 3),)),
    Case("div", "a Python number on the left", lambda x: 2 / x, ((2, 3),), positive),
    Case("neg", "", F.neg, ((2, 3),)),
    Case("neg", "no dimensions", F.neg, ((),)),
    *(Case("pow", f"{n}", lambda x, n=n: x**n, ((2, 3),)) for n in (0, 1, 2, 3, -1)),
    *(Case("pow", f"{n}", lambda x, n=n: x**n, ((2, 3),), positive) for n in (0.5, -1.5)),
    Case("exp", "", F.exp, ((2, 3),)),
    Case("log", "", F.log, ((2, 3),), positive),
    Case("sqrt", "", F.sqrt, ((2, 3),), positive),
    Case("tanh", "", F.tanh, ((2, 3),)),
    Case("sigmoid", "", F.sigmoid, ((2, 3),)),
    Case("gelu", "", F.gelu, ((2, 3),)),
    Case("gelu", "no dimensions", F.gelu, ((),)),
    Case("hardsigmoid", "", F.hardsigmoid, ((4, 5),), between(-3, 3)),
    Case("hardswish", "", F.hardswish, ((4, 5),), between(-3, 3)),
    Case("relu", "", F.relu, ((4, 5),), between(0)),
    Case("relu", "no dimensions", F.relu, ((),), positive),
    Case("relu6", "", F.relu6, ((4, 5),), between(0, 6)),
    Case("erf", "", F.erf, ((2, 3),)),
    Case("gelu_tanh", "", F.gelu_tanh, ((2, 3),)),
    Case("clip", "two bounds", lambda x: F.clip(x, -0.5, 1.5), ((4, 5),), between(-0.5, 1.5)),
    Case("clip", "one bound", lambda x: F.clip(x, high=1), ((4, 5),), between(1)),
    Case("clip", "no dimensions", lambda x: F.clip(x, 0, 9), ((),), positive),
    Case("expand", "", lambda x: F.expand(x, (4, 2, 3)), ((2, 1),)),
    Case("expand", "to its own shape", lambda x: F.expand(x, (2, 3)), ((2, 3),)),
    Case("fake_quantize", "all cut off", lambda x: F.fake_quantize(x, 0.01, 1, 0, 3), ((4, 5),), positive),
    Case("dropout", "", lambda x: F.dropout(x, 0.4, rng=3), ((4, 5),)),
    Case("dropout", "everything", lambda x: F.dropout(x, 1.0), ((4, 5),)),
    Case("matmul", "matrices", F.matmul, ((2, 3), (3, 4))),
    Case("matmul", "batches", F.matmul, ((5, 2, 3), (5, 3, 4))),
    Case("matmul", "batches that broadcast", F.matmul, ((5, 1, 2, 3), (2, 3, 4))),
    Case("matmul", "a batch and one matrix", F.matmul, ((5, 6, 2, 3), (3, 4))),
    Case("matmul", "one matrix and a batch", F.matmul, ((2, 3), (5, 3, 4))),
    Case("matmul", "vectors", F.matmul, ((3,), (3,))),
    Case("matmul", "a vector and a matrix", F.matmul, ((3,), (3, 4))),
    Case("matmul", "a matrix and a vector", F.matmul, ((2, 3), (3,))),
    Case("matmul", "a batch and a vector", F.matmul, ((5, 2, 3), (3,))),
    Case("matmul", "a vector and a batch", F.matmul, ((3,), (5, 3, 2))),
    *(
        case
        for dim in (None, 0, -1, (0, 2), (2, -3), (0, 1, 2))
        for keepdim in (False, True)
        for case in (
            Case("sum", f"dim={dim}, {keepdim}", lambda x, d=dim, k=keepdim: F.sum(x, d, k), ((2, 3, 4),)),
            Case("mean", f"dim={dim}, {keepdim}", lambda x, d=dim, k=keepdim: F.mean(x, d, k), ((2, 3, 4),)),
            Case("var", f"dim={dim}, {keepdim}", lambda x, d=dim, k=keepdim: F.var(x, d, 1, k), ((2, 3, 4),)),
        )
    ),
    Case("sum", "no dimensions", F.sum, ((),)),
    Case("var", "correction 0", lambda x: F.var(x, 1, correction=0), ((2, 3),)),
    *(
        Case("max", f"dim={dim}, {keepdim}", lambda x, d=dim, k=keepdim: F.max(x, d, k), ((2, 3, 4),), distinct)
        for dim in (None, 0, 1, -1)
        for keepdim in (False, True)
        if not (dim is None and keepdim)
    ),
    Case("max", "of all, keepdim", lambda x: F.max(x, None, True), ((2, 3),), distinct),
    Case("reshape", "", lambda x: F.reshape(x, (4, -1)), ((2, 3, 4),)),
    Case("reshape", "of a transpose, a copy", lambda x: x.transpose(0, 1).reshape(6), ((2, 3),)),
    Case("reshape", "flatten", lambda x: F.flatten(x, 1), ((2, 3, 4),)),
    Case("permute", "", lambda x: F.permute(x, (2, 0, 1)), ((2, 3, 4),)),
    Case("permute", "transpose", lambda x: F.transpose(x, 0, -1), ((2, 3, 4),)),
    Case("index", "an integer", lambda x: x[1], ((4, 3),)),
    Case("index", "down to a number", lambda x: x[-1, 2], ((4, 3),)),
    Case("index", "slices", lambda x: x[1:, ::2, None, ..., -1], ((4, 3, 2),)),
    Case("index", "a negative step", lambda x: x[::-1, 2:0:-1], ((4, 3),)),
    Case("index", "rows, one of them twice", lambda x: x[ROWS], ((4, 3),)),
    Case("index", "a list", lambda x: x[:, [0, 2, 2]], ((4, 3),)),
    Case("index", "two arrays", lambda x: x[ROWS, ROWS % 3], ((4, 3),)),
    Case("index", "arrays apart", lambda x: x[ROWS, :, ROWS % 2], ((4, 3, 2),)),
    Case("index", "an array and an integer", lambda x: x[:, ROWS % 3, 1], ((4, 3, 2),)),
    Case("index", "an integer and an array apart", lambda x: x[1, :, ROWS % 2], ((4, 3, 2),)),
    Case("index", "arrays that broadcast", lambda x: x[ROWS[:, None], np.array([0, 2])], ((4, 3),)),
    Case("index", "a mask", lambda x: x[MASK], ((4, 3),)),
    Case("index", "a mask of two dimensions", lambda x: x[np.eye(4, 3, dtype=bool)], ((4, 3, 2),)),
    Case("index", "a tensor", lambda x: x[Tensor(ROWS)], ((4, 3),)),
    Case("concatenate", "", lambda a, b, c: F.concatenate([a, b, c], 1), ((2, 3), (2, 1), (2, 4))),
    Case("concatenate", "the same twice", lambda a: F.cat((a, a)), ((2, 3),)),
    Case("pad", "", lambda x: F.pad(x, (1, 2, 0, 3), value=0.5), ((2, 3, 4),)),
    *(Case("softmax", f"dim={dim}", lambda x, d=dim: F.softmax(x, d), ((3, 4),)) for dim in (0, -1)),
    *(Case("log_softmax", f"dim={dim}", lambda x, d=dim: F.log_softmax(x, d), ((3, 4),)) for dim in (0, -1)),
    *(
        Case("cross_entropy", reduction, lambda x, r=reduction: F.cross_entropy(x, LABELS, r), ((5, 4),))
        for reduction in ("mean", "sum")
    ),
    *(
        Case("mse_loss", reduction, lambda a, b, r=reduction: F.mse_loss(a, b, r), ((2, 3), (2, 3)))
        for reduction in ("mean", "sum")
    ),
    Case("linear", "", F.linear, ((2, 3), (4, 3), (4,))),
    Case("linear", "tokens, no bias", F.linear, ((2, 5, 3), (4, 3))),
    Case(
        "conv2d",
        "groups, stride, padding, dilation",
        lambda x, w, b: F.conv2d(x, w, b, (2, 1), ((1, 0), (2, 1)), (1, 2), 2),
        ((2, 4, 5, 6), (6, 2, 3, 2), (6,)),
    ),
    Case("conv2d", "depthwise", lambda x, w: F.conv2d(x, w, padding="same", groups=3), (IMAGE, (3, 1, 3, 3))),
    Case("max_pool2d", "", lambda x: F.max_pool2d(x, 2), (IMAGE,), distinct),
    Case("max_pool2d", "overlapping", lambda x: F.max_pool2d(x, (3, 2), (1, 2), (1, 0)), (IMAGE,), distinct),
    Case("avg_pool2d", "", lambda x: F.avg_pool2d(x, 2), (IMAGE,)),
    Case("avg_pool2d", "overlapping", lambda x: F.avg_pool2d(x, (3, 2), (1, 2), 1), (IMAGE,)),
    Case(
        "avg_pool2d",
        "padding not counted",
        lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
        (IMAGE,),
    ),
    Case("adaptive_avg_pool2d", "to one", lambda x: F.adaptive_avg_pool2d(x, 1), (IMAGE,)),
    Case("adaptive_avg_pool2d", "uneven windows", lambda x: F.adaptive_avg_pool2d(x, (3, 4)), (IMAGE,)),
    Case("adaptive_avg_pool2d", "larger than the image", lambda x: F.adaptive_avg_pool2d(x, (7, 6)), (IMAGE,)),
    Case(
        "batch_norm",
        "frozen",
        lambda x, w, b: F.batch_norm(x, like(x, [0.1, -1, 2]), like(x, [0.5, 1, 2]), w, b),
        (IMAGE, (3,), (3,)),
    ),
    Case("batch_norm", "frozen, plain", lambda x: F.batch_norm(x, like(x, [0, 1, 2]), like(x, [1, 2, 3])), (IMAGE,)),
    Case(
        "batch_norm",
        "training",
        lambda x, w, b: F.batch_norm(x, like(x, [0, 0, 0]), like(x, [1, 1, 1]), w, b, training=True),
        (IMAGE, (3,), (3,)),
    ),
    Case(
        "batch_norm",
        "training, no running statistics",
        lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
        (IMAGE, (3,), (3,)),
    ),
    Case("batch_norm", "training, plain", lambda x: F.batch_norm(x, None, None, training=True), (IMAGE,)),
    Case("batch_norm", "vectors", lambda x: F.batch_norm(x, None, None, training=True), ((5, 3),)),
    Case("layer_norm", "", lambda x, w, b: F.layer_norm(x, 4, w, b), ((2, 3, 4), (4,), (4,))),
    Case("layer_norm", "two dimensions", lambda x, w, b: F.layer_norm(x, (3, 4), w, b), ((2, 3, 4), (3, 4), (3, 4))),
    Case("layer_norm", "everything", lambda x, w, b: F.layer_norm(x, (3, 4), w, b), ((3, 4), (3, 4), (3, 4))),
    Case("layer_norm", "plain", lambda x: F.layer_norm(x, (4,)), ((2, 3, 4),)),
    Case("silu", "", F.silu, ((2, 3),)),
    Case("mish", "", F.mish, ((2, 3),)),
    Case("softplus", "", F.softplus, ((2, 3),)),
    Case("softplus", "steeper, straight above", lambda x: F.softplus(x, 2, 1.5), ((4, 5),), between(0.75)),
    Case("elu", "", F.elu, ((4, 5),), between(0)),
    Case("elu", "alpha", lambda x: F.elu(x, 0.3), ((4, 5),), between(0)),
    Case("leaky_relu", "", F.leaky_relu, ((4, 5),), between(0)),
    Case("leaky_relu", "a negative slope", lambda x: F.leaky_relu(x, -0.5), ((4, 5),), between(0)),
    Case("leaky_relu", "no dimensions", F.leaky_relu, ((),), positive),
    Case("prelu", "one slope", F.prelu, (IMAGE, (1,)), between(0)),
    Case("prelu", "a slope for each channel", F.prelu, (IMAGE, (3,)), between(0)),
    Case("prelu", "vectors", F.prelu, ((5,), (1,)), between(0)),
    Case("glu", "", F.glu, ((3, 4),)),
    Case("glu", "channels", lambda x: F.glu(x, 1), ((2, 6, 3),)),
    Case("rms_norm", "", lambda x, w: F.rms_norm(x, 4, w), ((2, 3, 4), (4,))),
    Case("rms_norm", "two dimensions", lambda x, w: F.rms_norm(x, (3, 4), w, 0.1), ((2, 3, 4), (3, 4))),
    Case("rms_norm", "plain", lambda x: F.rms_norm(x, (4,)), ((2, 3, 4),)),
    Case("group_norm", "", lambda x, w, b: F.group_norm(x, 2, w, b), ((2, 6, 3, 2), (6,), (6,))),
    Case("group_norm", "one group, plain", lambda x: F.group_norm(x, 1), ((2, 3, 4),)),
    Case("group_norm", "vectors", lambda x, w, b: F.group_norm(x, 2, w, b), ((3, 6), (6,), (6,))),
    Case("instance_norm", "", F.instance_norm, (IMAGE, (3,), (3,))),
    Case("instance_norm", "plain", F.instance_norm, ((2, 3, 4),)),
    Case(
        "scaled_dot_product_attention", "", F.scaled_dot_product_attention, ((2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 7))
    ),
    Case(
        "scaled_dot_product_attention",
        "causal, scaled",
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3),
        ((3, 5, 4), (3, 5, 4), (3, 5, 4)),
    ),
    Case(
        "scaled_dot_product_attention",
        "a mask of numbers",
        F.scaled_dot_product_attention,
        ((2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 4), (3, 1, 6)),
    ),
    Case(
        "scaled_dot_product_attention",
        "a mask of Booleans",
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, np.tri(5, 6, 1, dtype=bool)),
        ((2, 5, 4), (2, 6, 4), (2, 6, 4)),
    ),
    Case("embedding", "", lambda w: F.embedding(np.array([[0, 2, 2], [3, 0, 1]]), w), ((4, 3),)),
    Case("embedding", "a row without gradient", lambda w: F.embedding(np.array([0, 1]), w, 2), ((4, 3),)),
    Case("where", "", lambda a, b: F.where(MASK, a, b), ((2, 4), (2, 1))),
    Case("where", "a number", lambda a: F.where(MASK[:, None], a, 0.5), ((4,),)),
    Case("conv_transpose2d", "", F.conv_transpose2d, ((2, 3, 4, 5), (3, 2, 3, 2), (2,))),
    Case(
        "conv_transpose2d",
        "groups, stride, padding, output padding, dilation",
        lambda x, w, b: F.conv_transpose2d(x, w, b, (2, 3), (1, 0), (1, 2), 2, (1, 2)),
        ((2, 4, 3, 4), (4, 3, 3, 2), (6,)),
    ),
    Case(
        "conv_transpose2d", "depthwise", lambda x, w: F.conv_transpose2d(x, w, None, 2, groups=3), (IMAGE, (3, 1, 3, 3))
    ),
    Case("conv2d", "1-D", lambda x, w, b: F.conv1d(x, w, b, 2, (2, 1), 2, 2), ((2, 4, 9), (6, 2, 3), (6,))),
    Case("conv2d", "1-D, same", lambda x, w: F.conv1d(x, w, padding="same"), ((2, 4, 9), (3, 4, 4))),
    Case("conv3d", "", F.conv3d, ((2, 3, 4, 3, 5), (2, 3, 2, 3, 1), (2,))),
    Case(
        "conv3d",
        "groups, stride, padding, dilation",
        lambda x, w: F.conv3d(x, w, None, (2, 1, 2), (1, 2, 0), (2, 1, 2), 2),
        ((1, 4, 5, 3, 4), (2, 2, 3, 2, 2)),
    ),
    Case("max_pool2d", "1-D", lambda x: F.max_pool1d(x, 3, 2, 1), ((2, 3, 8),), distinct),
    Case("avg_pool2d", "1-D", lambda x: F.avg_pool1d(x, 3, 2, 1), ((2, 3, 8),)),
    Case("max_pool3d", "", lambda x: F.max_pool3d(x, 2), ((2, 3, 4, 5, 2),), distinct),
    Case(
        "max_pool3d",
        "overlapping",
        lambda x: F.max_pool3d(x, (3, 2, 1), (1, 2, 1), (1, 0, 0)),
        ((1, 2, 4, 5, 2),),
        distinct,
    ),
    Case("avg_pool3d", "", lambda x: F.avg_pool3d(x, (3, 2, 1), (1, 2, 1), (1, 1, 0)), ((1, 2, 4, 5, 2),)),
    Case(
        "avg_pool3d",
        "padding not counted",
        lambda x: F.avg_pool3d(x, 3, 2, 1, count_include_pad=False),
        ((1, 2, 4, 5, 3),),
    ),
    Case("interpolate", "nearest", lambda x: F.interpolate(x, (7, 3)), (IMAGE,)),
    Case("interpolate", "by a factor", lambda x: F.interpolate(x, scale_factor=1.7), (IMAGE,)),
    Case("interpolate", "bilinear", lambda x: F.interpolate(x, (7, 4), mode="bilinear"), (IMAGE,)),
    Case("interpolate", "corners", lambda x: F.interpolate(x, 9, mode="linear", align_corners=True), ((2, 3, 5),)),
    Case("interpolate", "trilinear", lambda x: F.interpolate(x, 3, mode="trilinear"), ((1, 2, 2, 4, 3),)),
]
