"""The tape to the byte: what every operation keeps, by hand, and that nothing else stays in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from helpers import check_live_bytes
from op_cases import ALIASES

from lance_ref import F, Tensor, nn, tape
from lance_ref.engine.tape_report import base_buffer

N = 1 << 20  # elements of the first input: 4 MiB
IMAGES = (16, 64, 32, 32)
MATRIX = (1024, 1024)


@dataclass(frozen=True)
class Kept:
    """One operation on inputs of several MB, and the bytes of everything that it keeps."""

    op: str
    function: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    saved: dict[str, int]


ROWS = np.arange(0, 1024, 2)
CHANNELS = np.ones(64, np.float32)
LABELS = np.arange(1024) % 1000
TABLED = np.eye(1024, dtype=bool)

TABLE = [
    Kept("add", F.add, (MATRIX, MATRIX), {}),
    Kept("sub", F.sub, (MATRIX, MATRIX), {}),
    Kept("mul", F.mul, (MATRIX, MATRIX), {"a": 4 * N, "b": 4 * N}),
    Kept("mul", lambda x: x * 2, (MATRIX,), {"b": 4}),
    Kept("mul", lambda x: x * x, (MATRIX,), {"a": 4 * N, "b": 0}),
    Kept("div", F.div, (MATRIX, MATRIX), {"a": 4 * N, "b": 4 * N}),
    Kept("div", lambda x: 2 / x, (MATRIX,), {"a": 4, "b": 4 * N}),
    Kept("neg", F.neg, (MATRIX,), {}),
    Kept("pow", lambda x: x**3, (MATRIX,), {"x": 4 * N}),
    Kept("exp", F.exp, (MATRIX,), {"output": 4 * N}),
    Kept("log", F.log, (MATRIX,), {"x": 4 * N}),
    Kept("sqrt", F.sqrt, (MATRIX,), {"output": 4 * N}),
    Kept("tanh", F.tanh, (MATRIX,), {"output": 4 * N}),
    Kept("sigmoid", F.sigmoid, (MATRIX,), {"output": 4 * N}),
    Kept("gelu", F.gelu, (MATRIX,), {"x": 4 * N}),
    Kept("hardswish", F.hardswish, (MATRIX,), {"x": 4 * N}),
    Kept("hardsigmoid", F.hardsigmoid, (MATRIX,), {"mask": N // 8}),
    Kept("erf", F.erf, (MATRIX,), {"x": 4 * N}),
    Kept("gelu_tanh", F.gelu_tanh, (MATRIX,), {"x": 4 * N}),
    Kept("clip", lambda x: F.clip(x, -1, 1), (MATRIX,), {"mask": N // 8}),
    Kept("fake_quantize", lambda x: F.fake_quantize(x, 0.1), (MATRIX,), {"mask": N // 8}),
    Kept("expand", lambda x: F.expand(x, (4, 1024, 1024)), (MATRIX,), {}),
    Kept("relu", F.relu, (MATRIX,), {"mask": N // 8}),
    Kept("relu", F.relu, ((1023, 1025),), {"mask": 131_072}),  # (2^20 − 1) bits, rounded up
    Kept("relu6", F.relu6, (MATRIX,), {"mask": N // 8}),
    Kept("dropout", lambda x: F.dropout(x, 0.2), (MATRIX,), {"mask": N // 8}),
    Kept("matmul", F.matmul, (MATRIX, MATRIX), {"a": 4 * N, "b": 4 * N}),
    Kept("sum", lambda x: F.sum(x, 0), (MATRIX,), {}),
    Kept("mean", lambda x: F.mean(x, 1), (MATRIX,), {}),
    Kept("max", lambda x: F.max(x, 1), ((8192, 128),), {"argmax": 8192}),
    Kept("max", lambda x: F.max(x, 0), (MATRIX,), {"argmax": 2 * 1024}),
    Kept("max", F.max, (MATRIX,), {"argmax": 4}),  # one position among 2^20
    Kept("var", lambda x: F.var(x, 1), (MATRIX,), {"x": 4 * N}),
    Kept("reshape", lambda x: F.reshape(x, (2048, 512)), (MATRIX,), {}),
    Kept("reshape", lambda x: F.reshape(F.transpose(x, 0, 1), (2048, 512)), (MATRIX,), {}),
    Kept("permute", lambda x: F.permute(x, (1, 2, 0)), ((16, 256, 256),), {}),
    Kept("index", lambda x: x[::2, 3:], (MATRIX,), {}),
    Kept("index", lambda x: x[ROWS], (MATRIX,), {"index": 2 * 512}),
    Kept("index", lambda x: x[ROWS, ROWS], (MATRIX,), {"index": 2 * 512, "index1": 2 * 512}),
    Kept("concatenate", lambda a, b: F.concatenate([a, b]), (MATRIX, MATRIX), {}),
    Kept("pad", lambda x: F.pad(x, (1, 2, 3, 4)), (MATRIX,), {}),
    Kept("softmax", F.softmax, (MATRIX,), {"output": 4 * N}),
    Kept("log_softmax", F.log_softmax, (MATRIX,), {"output": 4 * N}),
    Kept(
        "cross_entropy", lambda x: F.cross_entropy(x, LABELS), (MATRIX,), {"probabilities": 4 * N, "labels": 2 * 1024}
    ),
    Kept("mse_loss", F.mse_loss, (MATRIX, MATRIX), {"difference": 4 * N}),
    Kept("linear", F.linear, (MATRIX, (64, 1024), (64,)), {"activation": 4 * N, "weight": 4 * 64 * 1024}),
    Kept(
        "conv2d",
        lambda x, w: F.conv2d(x, w, padding=1),
        (IMAGES, (8, 64, 3, 3)),
        {"activation": 4 * N, "weight": 4 * 8 * 64 * 9},
    ),
    Kept(
        "conv2d",
        lambda x, w: F.conv2d(x, w, padding=1, groups=64),
        (IMAGES, (64, 1, 3, 3)),
        {"activation": 4 * N, "weight": 4 * 64 * 9},
    ),
    Kept("max_pool2d", lambda x: F.max_pool2d(x, 2), (IMAGES,), {"argmax": N // 4}),
    Kept("max_pool2d", lambda x: F.max_pool2d(x, 17, 5), (IMAGES,), {"argmax": 2 * 16 * 64 * 4 * 4}),  # 289 > 256
    Kept("avg_pool2d", lambda x: F.avg_pool2d(x, 2), (IMAGES,), {}),
    Kept("adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x, 5), (IMAGES,), {}),
    Kept("batch_norm", lambda x: F.batch_norm(x, CHANNELS * 0, CHANNELS), (IMAGES,), {"scale": 4 * 64}),
    Kept(
        "batch_norm",
        lambda x, w, b: F.batch_norm(x, CHANNELS * 0, CHANNELS, w, b),
        (IMAGES, (64,), (64,)),
        {"scale": 4 * 64, "x": 4 * N, "mean": 4 * 64, "inv_std": 4 * 64},
    ),
    Kept(
        "batch_norm",
        lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
        (IMAGES, (64,), (64,)),
        {"x": 4 * N, "mean": 4 * 64, "inv_std": 4 * 64, "weight": 4 * 64},
    ),
    Kept(
        "layer_norm",
        lambda x, w, b: F.layer_norm(x, 1024, w, b),
        (MATRIX, (1024,), (1024,)),
        {"x": 4 * N, "mean": 4 * 1024, "inv_std": 4 * 1024, "weight": 4 * 1024},
    ),
    *(Kept(op, getattr(F, op), (MATRIX,), {"x": 4 * N}) for op in ("silu", "mish", "softplus", "glu")),
    Kept("elu", F.elu, (MATRIX,), {"output": 4 * N}),
    Kept("leaky_relu", F.leaky_relu, (MATRIX,), {"mask": N // 8}),
    Kept("prelu", F.prelu, (IMAGES, (64,)), {"x": 4 * N, "weight": 4 * 64}),
    Kept("where", lambda a, b: F.where(TABLED, a, b), (MATRIX, MATRIX), {"mask": N // 8}),
    Kept("embedding", lambda w: F.embedding(ROWS, w), (MATRIX,), {"indices": 2 * 512}),
    Kept("interpolate", lambda x: F.interpolate(x, 20, mode="bilinear"), (IMAGES,), {}),
    Kept(
        "rms_norm",
        lambda x, w: F.rms_norm(x, 1024, w),
        (MATRIX, (1024,)),
        {"x": 4 * N, "inv_rms": 4 * 1024, "weight": 4 * 1024},
    ),
    Kept(
        "group_norm",
        lambda x, w, b: F.group_norm(x, 16, w, b),
        (IMAGES, (64,), (64,)),
        {"x": 4 * N, "mean": 4 * 16 * 16, "inv_std": 4 * 16 * 16, "weight": 4 * 64},
    ),
    Kept("instance_norm", F.instance_norm, (IMAGES,), {"x": 4 * N, "mean": 4 * 16 * 64, "inv_std": 4 * 16 * 64}),
    Kept(
        "scaled_dot_product_attention",
        F.scaled_dot_product_attention,
        ((4, 256, 1024), (4, 512, 1024), (4, 512, 64)),
        {"q": 4 * N, "k": 8 * N, "v": 4 * 4 * 512 * 64, "probabilities": 4 * 4 * 256 * 512},
    ),
    Kept(
        "conv_transpose2d",
        F.conv_transpose2d,
        (IMAGES, (64, 8, 3, 3)),
        {"activation": 4 * N, "weight": 4 * 8 * 64 * 9},
    ),
    Kept(
        "conv3d",
        F.conv3d,
        ((4, 16, 16, 32, 32), (8, 16, 3, 3, 3)),
        {"activation": 4 * N, "weight": 4 * 8 * 16 * 27},
    ),
    Kept("max_pool3d", lambda x: F.max_pool3d(x, 2), ((4, 16, 16, 32, 32),), {"argmax": N // 8}),
    Kept("avg_pool3d", lambda x: F.avg_pool3d(x, 2), ((4, 16, 16, 32, 32),), {}),
]


@pytest.mark.parametrize("kept", TABLE, ids=lambda kept: f"{kept.op} {list(kept.saved)}")
def test_bytes_of_every_operation(kept: Kept) -> None:
    """By hand, and against what the interpreter still holds when only the loss is left."""
    rng = np.random.default_rng(0)
    # the inputs are results themselves, so that they live only if the operation keeps them
    leaves = [Tensor(rng.random(shape, dtype=np.float32), requires_grad=True) for shape in kept.shapes]

    def loss() -> Tensor:
        return kept.function(*(leaf + 0.5 for leaf in leaves)).sum()

    report = check_live_bytes(loss, operations=len(leaves) + 3)
    assert {(e.op, e.what): e.nbytes for e in report.entries} == {(kept.op, w): n for w, n in kept.saved.items()}
    assert report.total_bytes == sum(kept.saved.values())
    assert report.parameters == []


def test_every_operation_is_in_the_table() -> None:
    """A new operation must say what it keeps."""
    assert {ALIASES.get(name, name) for name in F.__all__} == {kept.op for kept in TABLE}


@pytest.mark.parametrize("kept", TABLE, ids=lambda kept: f"{kept.op} {list(kept.saved)}")
def test_nothing_is_kept_without_gradients(kept: Kept) -> None:
    """Inference leaves no tape, not even in a loss that also depends on something trained."""
    tensors = [Tensor(np.ones(shape, np.float32)) for shape in kept.shapes]
    trained = Tensor(np.ones((), np.float32), requires_grad=True)
    assert tape(kept.function(*tensors).sum() + trained).entries == []


# ---- buffers -----------------------------------------------------------------------------


def hidden(shape: tuple[int, ...] = (256, 256)) -> Tensor:
    """A result that nothing but the tape keeps."""
    return Tensor(np.ones(shape, np.float32), requires_grad=True) + 1.0


def test_a_buffer_in_several_entries_is_billed_once() -> None:
    """The first operation that saved it pays; later ones, and views of it, are listed with 0."""
    h = hidden()
    loss = (F.log(h) + F.gelu(h) + h.reshape(512, 128).transpose(0, 1).reshape(256, 256) * h).sum()
    nbytes = [(e.op, e.what, e.nbytes) for e in tape(loss).entries]
    assert nbytes == [("log", "x", 1 << 18), ("gelu", "x", 0), ("mul", "a", 1 << 18), ("mul", "b", 0)]  # a: a copy
    assert tape(loss).total_bytes == 2 << 18


def test_relu_keeps_bits_while_its_result_is_the_next_layers_input() -> None:
    """In a chain of linear and ReLU the tape holds each activation once, beside the bits."""
    net = nn.Sequential(nn.Linear(64, 64, rng=0), nn.ReLU(), nn.Linear(64, 64, rng=1), nn.ReLU())
    report = tape(net(np.ones((32, 64), np.float32)).sum())
    assert report.by_op() == {"linear": 2 * 32 * 64 * 4, "relu": 2 * 32 * 64 // 8}
    assert report.by_layer() == {"0": 8192, "1": 256, "2": 8192, "3": 256}
    assert report.total_bytes == 16_896
    assert report.parameter_bytes == 64 * 64 * 4  # the second weight: the input needs no gradient
    assert [(e.path, e.what) for e in report.parameters] == [("2", "weight")]


def test_a_view_costs_the_whole_buffer() -> None:
    """One row kept keeps all rows alive; an honest report says so."""
    leaf = Tensor(np.ones((1024, 256), np.float32), requires_grad=True)
    report = check_live_bytes(lambda: F.log((leaf + 1.0)[3]).sum(), operations=5)
    (entry,) = report.entries
    assert entry.shape == (256,)
    assert entry.nbytes == 1 << 20


def test_views_of_views_lead_to_the_owner() -> None:
    """However many reshapes and slices lie between."""
    array = np.ones((4, 6))
    view = array[1:].reshape(2, 9).T[::2]
    assert base_buffer(view) is array
    assert base_buffer(array) is array


def test_a_buffer_that_two_losses_share() -> None:
    """Each report stands for itself; the sum of two losses bills the shared part once."""
    h = hidden()
    first, second = F.log(h).sum(), F.gelu(h).sum()
    assert tape(first).total_bytes == tape(second).total_bytes == tape(first + second).total_bytes == 1 << 18


def test_parameters_are_listed_apart() -> None:
    """They are in memory anyway; a tied weight is listed for each use and billed once."""
    layer = nn.Linear(8, 8, bias=False, rng=0)
    report = tape(layer(layer(Tensor(np.ones((2, 8), np.float32), requires_grad=True))).sum())
    assert [(e.what, e.nbytes) for e in report.parameters] == [("weight", 256), ("weight", 0)]
    assert report.total_bytes == 2 * 64


def test_the_report_prints_as_a_table() -> None:
    """Layer, operation, name, shape, dtype, bytes; the total; the parameters apart."""
    net = nn.Sequential(nn.Linear(4, 4, rng=0), nn.ReLU())
    x = Tensor(np.ones((300, 4), np.float32), requires_grad=True)
    report = tape((net(x) * 2).sum())
    assert str(report).splitlines() == [
        "layer   op      saved       shape   dtype    bytes",
        "--------------------------------------------------",
        "0       linear  activation  300x4   float32  4,800",
        "1       relu    mask        150     uint8      150",
        "(root)  mul     b           scalar  float32      4",
        "--------------------------------------------------",
        "total                                        4,954",
        "parameters that backward refers to, not counted above: 64 bytes",
    ]
    assert repr(report) == str(report)


def test_the_report_is_empty_after_backward() -> None:
    """Consumed, or never there."""
    loss = F.exp(hidden()).sum()
    assert tape(loss).total_bytes == 1 << 18
    loss.backward()
    assert tape(loss).entries == []
    assert tape(Tensor(1.0)).total_bytes == 0


@pytest.mark.parametrize("thing", [1.0, np.ones(3), None])
def test_only_a_tensor_has_a_tape(thing: Any) -> None:
    """The error names what came."""
    with pytest.raises(TypeError, match=f"got {type(thing).__name__}"):
        tape(thing)
