"""Small steps, one per operation and pattern of gradients, for comparing predictions with what runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lance_ref import functional as F
from lance_ref.engine.recording import OpRecord
from lance_ref.engine.tensor import Tensor
from lance_ref.nn.module import Parameter
from lance_ref.nn.tracing import record


@dataclass
class Maker:
    """Makes a case's tensors: real ones, or ones that have a shape only."""

    real: bool
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def x(self, *shape: int, grad: bool = True) -> Tensor:
        """Positive numbers, as a leaf that is no parameter."""
        if not self.real:
            return Tensor.meta(shape, np.float32, grad)
        return Tensor(self.rng.uniform(0.1, 1, shape).astype(np.float32), requires_grad=grad)

    def w(self, *shape: int, grad: bool = True) -> Parameter:
        """A parameter."""
        if not self.real:
            parameter = Parameter.meta_parameter(shape)
            parameter.requires_grad_(grad)
            return parameter
        return Parameter(self.rng.uniform(0.1, 1, shape).astype(np.float32), requires_grad=grad)

    def mask(self, *shape: int) -> Tensor:
        """Booleans, true in at least one place of each row."""
        if not self.real:
            return Tensor.meta(shape, np.bool_)
        return (
            Tensor(np.arange(np.prod(shape)).reshape(shape) % 3 == 0) if shape[-1] > 2 else Tensor(np.ones(shape, bool))
        )

    def labels(self, count: int, classes: int) -> Tensor:
        if not self.real:
            return Tensor.meta((count,), np.int64)
        return Tensor(self.rng.integers(0, classes, count))


Step = Callable[[Maker], Tensor]


def _unary(function: Callable[[Tensor], Tensor]) -> Step:
    return lambda t: function(t.x(2, 3, 5, 4)).sum()


def _conv(grad_x: bool, grad_w: bool, bias: bool, **options: Any) -> Step:
    def step(t: Maker) -> Tensor:
        groups = options.get("groups", 1)
        x = t.x(2, 6, 7, 8, grad=grad_x)
        b = t.w(4, grad=grad_w) if bias else None
        return F.conv2d(x, t.w(4, 6 // groups, 3, 2, grad=grad_w), b, **options).sum()

    return step


def _linear(grad_x: bool, grad_w: bool, *shape: int) -> Step:
    return lambda t: F.linear(t.x(*shape, 5, grad=grad_x), t.w(3, 5, grad=grad_w), t.w(3, grad=grad_w)).sum()


def _batch_norm(training: bool, grad_x: bool, grad_w: bool, affine: bool = True) -> Step:
    def step(t: Maker) -> Tensor:
        x = t.x(2, 3, 4, 5, grad=grad_x)
        weights = (t.w(3, grad=grad_w), t.w(3, grad=grad_w)) if affine else (None, None)
        return F.batch_norm(x, t.x(3, grad=False), t.x(3, grad=False), *weights, training=training).sum()

    return step


def _attention(t: Maker) -> Tensor:
    """Two heads: permuted operands, scaling by a number, softmax used twice."""
    x, w = t.x(2, 3, 8), t.w(8, 24)
    qkv = F.matmul(x, w).reshape(2, 3, 3, 2, 4).permute(2, 0, 3, 1, 4)  # (3, B, heads, L, D)
    weights = F.softmax(F.matmul(qkv[0], qkv[1].transpose(-1, -2)) * 0.5, dim=-1)
    return F.matmul(weights, qkv[2]).permute(0, 2, 1, 3).reshape(2, 3, 8).sum()


def _flat_too(x: Tensor) -> Tensor:
    """Both x and what a reshape makes of it are kept, as one buffer or as two."""
    return F.gelu(x.reshape(-1)).sum() + F.gelu(x).sum()


def _aliases(t: Maker) -> Tensor:
    """One buffer kept by three operations and through two views is billed once."""
    y = F.exp(t.x(4, 6))  # kept as its own output
    flat = y.reshape(24)
    return (flat * t.x(24)).sum() + F.matmul(y, t.w(6, 2)).sum() + F.log(flat).sum()


def _dead_branch(t: Maker) -> Tensor:
    """What does not lead to the loss keeps nothing."""
    x = t.x(4, 6)
    F.exp(x)
    return F.relu(x).sum()


def _scored(*shape: int, **options: Any) -> Step:
    """Attention of queries, keys and values of this shape."""
    return lambda t: F.scaled_dot_product_attention(t.x(*shape), t.x(*shape), t.x(*shape), **options).sum()


def _transposed(*grads: bool, groups: int = 1, **options: Any) -> Step:
    def step(t: Maker) -> Tensor:
        x, w, b = t.x(2, 6, 4, 5, grad=grads[0]), t.w(6, 2, 3, 2, grad=grads[1]), t.w(2 * groups, grad=grads[1])
        return F.conv_transpose2d(x, w, b, groups=groups, **options).sum()

    return step


def _conv3d(*grads: bool, groups: int = 1, **options: Any) -> Step:
    def step(t: Maker) -> Tensor:
        x, w = t.x(2, 4, 5, 4, 6, grad=grads[0]), t.w(6, 4 // groups, 3, 2, 1, grad=grads[1])
        return F.conv3d(x, w, t.w(6, grad=grads[1]), groups=groups, **options).sum()

    return step


CASES: dict[str, Step] = {
    **{
        name: _unary(getattr(F, name))
        for name in (
            "neg",
            "exp",
            "log",
            "sqrt",
            "tanh",
            "sigmoid",
            "gelu",
            "hardsigmoid",
            "hardswish",
            "relu",
            "relu6",
            "silu",
            "mish",
            "softplus",
            "elu",
            "leaky_relu",
            "erf",
            "gelu_tanh",
        )
    },
    "pow": _unary(lambda x: x**3),
    "clip": _unary(lambda x: F.clip(x, 0.3, 0.7)),
    "expand": lambda t: F.log(F.expand(t.x(3, 1, 4), (2, 3, 5, 4))).sum(),
    "fake_quantize": _unary(lambda x: F.fake_quantize(x, 0.01)),
    "dropout": _unary(lambda x: F.dropout(x, 0.3)),
    "softmax": _unary(lambda x: F.softmax(x, dim=1)),
    "log_softmax": _unary(lambda x: F.log_softmax(x, dim=-1)),
    "add": lambda t: (t.x(2, 3) + t.x(3)).sum(),
    "sub": lambda t: (t.x(2, 3) - t.x(3)).sum(),
    "mul both": lambda t: (t.x(2, 3) * t.x(2, 3)).sum(),
    "mul left": lambda t: (t.x(2, 3) * t.x(3, grad=False)).sum(),
    "mul right": lambda t: (t.x(3, grad=False) * t.x(2, 3)).sum(),
    "mul by itself": lambda t: (lambda x: x * x)(t.x(2, 3)).sum(),
    "mul parameter": lambda t: (t.x(2, 3) * t.w(3)).sum(),
    "div both": lambda t: (t.x(2, 3) / t.x(3)).sum(),
    "div left": lambda t: (t.x(2, 3) / t.x(3, grad=False)).sum(),
    "div right": lambda t: (t.x(2, 3, grad=False) / t.x(3)).sum(),
    "matmul": lambda t: F.matmul(t.x(4, 3), t.x(3, 5)).sum(),
    "matmul parameter": lambda t: F.matmul(t.x(4, 3), t.w(3, 5)).sum(),
    "matmul frozen parameter": lambda t: F.matmul(t.x(4, 3), t.w(3, 5, grad=False)).sum(),
    "matmul batch": lambda t: F.matmul(t.x(2, 7, 4, 3), t.x(2, 7, 3, 5)).sum(),
    "matmul batch, broadcast": lambda t: F.matmul(t.x(2, 7, 4, 3), t.x(7, 3, 5)).sum(),
    "matmul batch by matrix": lambda t: F.matmul(t.x(2, 7, 4, 3), t.x(3, 5)).sum(),
    "matmul batch by frozen matrix": lambda t: F.matmul(t.x(2, 7, 4, 3), t.x(3, 5, grad=False)).sum(),
    "matmul matrix by batch": lambda t: F.matmul(t.x(4, 3), t.x(2, 3, 5)).sum(),
    "matmul frozen matrix by batch": lambda t: F.matmul(t.x(4, 3, grad=False), t.x(2, 3, 5)).sum(),
    "matmul permuted batch by matrix": lambda t: F.matmul(t.x(2, 4, 7, 3).permute(0, 2, 1, 3), t.w(3, 5)).sum(),
    "matmul permuted batch by frozen": lambda t: (t.x(2, 4, 7, 3).permute(0, 2, 1, 3) @ t.x(3, 5, grad=False)).sum(),
    "matmul vector": lambda t: F.matmul(t.x(2, 7, 4, 3), t.x(3)).sum(),
    "matmul matrix vector": lambda t: F.matmul(t.x(4, 3), t.w(3)).sum(),
    "matmul vector matrix": lambda t: F.matmul(t.x(3), t.x(3, 5)).sum(),
    "attention": _attention,
    "sum": lambda t: F.relu(t.x(2, 3, 4)).sum(dim=1).sum(),
    "mean": lambda t: t.x(2, 3, 4).mean(dim=(1, 2), keepdim=True).sum(),
    "var": lambda t: t.x(2, 3, 4).var(dim=(0, 2)).sum(),
    "var of all": lambda t: t.x(2, 3, 4).var(),
    "max": lambda t: t.x(2, 300, 4).max(dim=1).sum(),
    "max of all": lambda t: t.x(2, 3, 4).max(),
    "reshape, view": lambda t: F.tanh(t.x(2, 3, 4)).reshape(6, 4).sum(),
    "reshape, copy": lambda t: F.log(t.x(2, 3, 4).permute(2, 0, 1).reshape(8, 3)).sum(),
    "slice kept": lambda t: F.log(t.x(4, 6, 5)[1:3, :, 2]).sum(),
    "array index": lambda t: F.relu(t.x(400, 6)[np.array([0, 3, 3, 399]), 1:]).sum(),
    "two array indices": lambda t: t.x(4, 6, 5)[np.array([0, 3, 3]), :, np.array([4, 0, 1])].sum(),
    "mask index": lambda t: t.x(4, 6)[np.arange(24).reshape(4, 6) % 3 == 0].sum(),
    "concatenate": lambda t: F.tanh(F.concatenate([t.x(2, 3), t.x(4, 3)], dim=0)).sum(),
    "pad": lambda t: F.pad(F.tanh(t.x(2, 3)), (1, 2)).sum(),
    "cross_entropy": lambda t: F.cross_entropy(t.x(5, 300), t.labels(5, 300)),
    "mse_loss": lambda t: F.mse_loss(t.x(5, 3), t.x(5, 3, grad=False)),
    "conv2d": _conv(True, True, True),
    "conv2d frozen weight": _conv(True, False, True),
    "conv2d first layer": _conv(False, True, False, groups=2, stride=(2, 1), padding=1, dilation=(1, 2)),
    "conv2d unequal padding": _conv(True, True, False, padding=((0, 1), (2, 1))),
    "conv2d same": _conv(True, True, False, padding="same", stride=2),
    "linear": _linear(True, True, 4),
    "linear frozen": _linear(True, False, 4),
    "linear first layer": _linear(False, True, 4),
    "linear tokens": _linear(True, True, 4, 7),
    "linear permuted": lambda t: F.linear(t.x(4, 5, 7).permute(0, 2, 1), t.w(3, 5), t.w(3)).sum(),
    "linear of an activation": lambda t: F.linear(t.x(4, 5), t.x(3, 5)).sum(),
    "max_pool2d": lambda t: F.max_pool2d(t.x(2, 3, 7, 8), (3, 2), stride=2, padding=1).sum(),
    "max_pool2d of 17x16": lambda t: F.max_pool2d(t.x(2, 3, 17, 16), (17, 16)).sum(),
    "avg_pool2d": lambda t: F.avg_pool2d(t.x(2, 3, 7, 8), 2).sum(),
    "adaptive_avg_pool2d": lambda t: F.adaptive_avg_pool2d(t.x(2, 3, 7, 8), (2, 3)).sum(),
    "adaptive_avg_pool2d to one": lambda t: F.adaptive_avg_pool2d(t.x(2, 3, 7, 8), 1).sum(),
    "batch_norm frozen": _batch_norm(False, True, False),
    "batch_norm frozen, affine trained": _batch_norm(False, True, True),
    "batch_norm frozen, only affine": _batch_norm(False, False, True),
    "batch_norm frozen, no affine": _batch_norm(False, True, False, affine=False),
    "batch_norm training": _batch_norm(True, True, True),
    "batch_norm training, frozen affine": _batch_norm(True, True, False),
    "batch_norm training, no affine": _batch_norm(True, True, False, affine=False),
    "layer_norm": lambda t: F.layer_norm(t.x(2, 3, 8), (8,), t.w(8), t.w(8)).sum(),
    "layer_norm over two": lambda t: F.layer_norm(t.x(2, 3, 8), (3, 8)).sum(),
    "layer_norm frozen input": lambda t: F.layer_norm(t.x(2, 3, 8, grad=False), (8,), t.w(8), t.w(8)).sum(),
    "reshaped relu of a permutation": lambda t: _flat_too(F.relu(t.x(2, 4, 3).permute(0, 2, 1))),
    "reshaped dropout of a permutation": lambda t: _flat_too(F.dropout(t.x(2, 4, 3).permute(0, 2, 1), 0.1)),
    "reshaped softmax of a permutation": lambda t: _flat_too(F.softmax(t.x(2, 4, 3).permute(0, 2, 1), 1)),
    "reshaped hardsigmoid of a permutation": lambda t: _flat_too(F.hardsigmoid(t.x(2, 4, 3).permute(0, 2, 1))),
    "reshaped clip of a permutation": lambda t: _flat_too(F.clip(t.x(2, 4, 3).permute(0, 2, 1), 0.3, 0.7)),
    "reshaped erf of a permutation": lambda t: _flat_too(F.erf(t.x(2, 4, 3).permute(0, 2, 1))),
    "reshaped grid of a permutation": lambda t: _flat_too(F.fake_quantize(t.x(2, 4, 3).permute(0, 2, 1), 0.1)),
    "reshaped expanded permutation": lambda t: _flat_too(F.expand(t.x(2, 4, 3).permute(0, 2, 1), (5, 2, 3, 4))),
    "reshaped tanh of a permutation": lambda t: _flat_too(F.tanh(t.x(2, 4, 3).permute(0, 2, 1))),
    "reshaped join of permutations": lambda t: _flat_too(F.concatenate([t.x(2, 4, 3).permute(0, 2, 1)] * 2, 1)),
    "reshaped sum of two orders": lambda t: _flat_too(t.x(2, 3, 4) + t.x(2, 4, 3).permute(0, 2, 1)),
    "linear of relu of a permutation": lambda t: F.linear(F.relu(t.x(2, 5, 3).permute(0, 2, 1)), t.w(4, 5)).sum(),
    "prelu": lambda t: F.prelu(t.x(2, 3, 4, 5), t.w(3)).sum(),
    "prelu frozen": lambda t: F.prelu(t.x(2, 3, 4, 5), t.w(3, grad=False)).sum(),
    "prelu first layer": lambda t: F.prelu(t.x(2, 3, 4, 5, grad=False), t.w(1)).sum(),
    "glu": lambda t: F.glu(t.x(2, 6, 4), 1).sum(),
    "where": lambda t: F.where(t.mask(2, 5, 1), t.x(2, 5, 4), t.x(4)).sum(),
    "where, one frozen": lambda t: F.where(t.mask(5, 4), t.x(2, 5, 4, grad=False), t.x(5, 4)).sum(),
    "embedding": lambda t: F.embedding(t.labels(7, 300), t.w(300, 5)).sum(),
    "interpolate": lambda t: F.interpolate(t.x(2, 3, 4, 5), (7, 6)).sum(),
    "interpolate, bilinear": lambda t: F.interpolate(t.x(2, 3, 4, 5), (7, 6), mode="bilinear").sum(),
    "max_pool3d": lambda t: F.max_pool3d(t.x(2, 3, 4, 5, 6), 3, 2, 1).sum(),
    "avg_pool3d": lambda t: F.avg_pool3d(t.x(2, 3, 4, 5, 6), (2, 1, 3)).sum(),
    "conv1d": lambda t: F.conv1d(t.x(2, 6, 9), t.w(4, 3, 3), t.w(4), 2, 1, 1, 2).sum(),
    "max_pool1d": lambda t: F.max_pool1d(t.x(2, 6, 9), 3, 2).sum(),
    "avg_pool1d": lambda t: F.avg_pool1d(t.x(2, 6, 9), 3, 2).sum(),
    "conv_transpose2d": _transposed(True, True, stride=2, padding=1, output_padding=1),
    "conv_transpose2d groups": _transposed(True, True, groups=3, dilation=2),
    "conv_transpose2d frozen": _transposed(True, False),
    "conv_transpose2d first layer": _transposed(False, True, groups=2),
    "conv3d": _conv3d(True, True, stride=2, padding=1),
    "conv3d groups": _conv3d(True, True, groups=2, dilation=(1, 2, 1)),
    "conv3d frozen": _conv3d(True, False),
    "conv3d first layer": _conv3d(False, True),
    "attention in one": _scored(2, 3, 5, 4),
    "attention in one, causal": _scored(2, 3, 5, 4, is_causal=True),
    "attention in one, of three dimensions": _scored(6, 5, 4),
    "attention in one, a mask": lambda t: F.scaled_dot_product_attention(
        t.x(2, 3, 5, 4), t.x(2, 3, 6, 4), t.x(2, 3, 6, 4), t.x(5, 6, grad=False)
    ).sum(),
    "attention in one, a mask of Booleans": lambda t: F.scaled_dot_product_attention(
        t.x(2, 3, 5, 4), t.x(2, 3, 6, 4), t.x(2, 3, 6, 4), t.mask(5, 6)
    ).sum(),
    "attention in one, a trained mask": lambda t: F.scaled_dot_product_attention(
        t.x(2, 3, 5, 4), t.x(2, 3, 6, 4), t.x(2, 3, 6, 4), t.w(3, 5, 6)
    ).sum(),
    "attention in one, values of another size": lambda t: F.scaled_dot_product_attention(
        t.x(2, 3, 5, 4), t.x(2, 3, 6, 4), t.x(2, 3, 6, 7)
    ).sum(),
    "attention in one, values alone": lambda t: F.scaled_dot_product_attention(
        t.x(2, 3, 5, 4, grad=False), t.x(2, 3, 6, 4, grad=False), t.x(2, 3, 6, 4)
    ).sum(),
    "rms_norm": lambda t: F.rms_norm(t.x(2, 3, 8), (8,), t.w(8)).sum(),
    "rms_norm over two": lambda t: F.rms_norm(t.x(2, 3, 8), (3, 8)).sum(),
    "rms_norm frozen input": lambda t: F.rms_norm(t.x(2, 3, 8, grad=False), (8,), t.w(8)).sum(),
    "rms_norm frozen weight": lambda t: F.rms_norm(t.x(2, 3, 8), (8,), t.w(8, grad=False)).sum(),
    "group_norm": lambda t: F.group_norm(t.x(2, 6, 4, 5), 3, t.w(6), t.w(6)).sum(),
    "group_norm plain": lambda t: F.group_norm(t.x(2, 6, 4), 2).sum(),
    "group_norm frozen input": lambda t: F.group_norm(t.x(2, 6, 4, grad=False), 2, t.w(6), t.w(6)).sum(),
    "instance_norm": lambda t: F.instance_norm(t.x(2, 6, 4, 5), t.w(6), t.w(6)).sum(),
    "instance_norm plain": lambda t: F.instance_norm(t.x(2, 6, 4, 5)).sum(),
    "reshaped silu of a permutation": lambda t: _flat_too(F.silu(t.x(2, 4, 3).permute(0, 2, 1))),
    "reshaped leaky relu of a permutation": lambda t: _flat_too(F.leaky_relu(t.x(2, 4, 3).permute(0, 2, 1))),
    "reshaped elu of a permutation": lambda t: _flat_too(F.elu(t.x(2, 4, 3).permute(0, 2, 1))),
    "reshaped prelu of a permutation": lambda t: _flat_too(F.prelu(t.x(2, 4, 3).permute(0, 2, 1), t.w(3))),
    "reshaped glu of a permutation": lambda t: _flat_too(F.glu(t.x(2, 4, 6).permute(0, 2, 1), 1)),
    "reshaped rms norm of a permutation": lambda t: _flat_too(F.rms_norm(t.x(2, 4, 3).permute(0, 2, 1), 4, t.w(4))),
    "reshaped group norm of a permutation": lambda t: _flat_too(F.group_norm(t.x(2, 4, 6).permute(0, 2, 1), 3)),
    "reshaped instance norm of a permutation": lambda t: _flat_too(F.instance_norm(t.x(2, 4, 3).permute(0, 2, 1))),
    "aliases": _aliases,
    "dead branch": _dead_branch,
}


def run(name: str, real: bool) -> tuple[list[OpRecord], Tensor]:
    """The records of a case and its loss."""
    with record() as records:
        loss = CASES[name](Maker(real))
    return list(records), loss
