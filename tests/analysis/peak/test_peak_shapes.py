"""The peak of one operation, forward and back, over shapes: predicted within 5 % of what tracemalloc sees.

Broadcasting along any axes and from either side, reductions and losses of many rows and of few, norms of long and of
short stretches. Peaks from 1 MiB on count; below, Python's own objects do.
"""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.peak.arrays import BLOCK, blocks, order_of, piece
from analysis.peak.lifetimes import Watcher, lifetimes
from analysis.peak.memory import measure_peak, peak
from analysis.rules.layouts import Layout, Storage, packed_strides
from lance_ref import functional as F
from lance_ref import nn, record
from lance_ref.algebra.kernels.threads import numba_enabled
from lance_ref.algebra.subspace import Subspace
from lance_ref.engine.arguments import unbroadcast
from lance_ref.engine.blocks import pieces
from lance_ref.engine.state import state
from lance_ref.engine.tensor import Tensor
from lance_ref.stores import ActivationStore, Lance, Quantized, Sketch

MIB = 2**20
compiled = pytest.mark.skipif(not numba_enabled(), reason="the rules are those of the compiled loops")
Operation = Callable[..., Tensor]
Shapes = Sequence[tuple[int, ...]]


def measured(operation: Operation, shapes: Shapes, needs: Sequence[bool]) -> tuple[int, int]:
    """Bytes at the peak of the forward pass and of the backward pass, the inputs counted."""
    rng = np.random.default_rng(0)
    inputs = [
        Tensor(rng.uniform(0.1, 1, shape).astype(np.float32), requires_grad=needed)
        for shape, needed in zip(shapes, needs, strict=True)
    ]

    def once() -> tuple[int, int]:
        tracemalloc.start()
        try:
            result = operation(*inputs)
            forward = tracemalloc.get_traced_memory()[1]
            gradient = np.ones(result.shape, np.float32)
            tracemalloc.reset_peak()
            result.backward(gradient)
            return forward, tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
            for x in inputs:
                x.grad = None

    once()  # compiled loops, caches
    forward, backward = once()
    held = sum(x.data.nbytes for x in inputs)
    return held + forward, held + backward


def predicted(operation: Operation, shapes: Shapes, needs: Sequence[bool]) -> tuple[int, int]:
    inputs = [Tensor.meta(shape, np.float32, needed) for shape, needed in zip(shapes, needs, strict=True)]
    watcher = Watcher({})
    previous, state.recorder = state.recorder, watcher
    try:
        result = operation(*inputs)
        ends = dict(watcher.ends)
    finally:
        state.recorder = previous
    del result
    found = peak(list(watcher.records), lifetimes=ends)
    return found.forward_bytes, found.backward_bytes


def check(operation: Operation, shapes: Shapes, needs: Sequence[bool], not_counted: int = 0) -> None:
    """Both passes within 5 %, where they take a MiB or more; ``not_counted``: bytes of inputs left out by the rules."""
    have, want = predicted(operation, shapes, needs), measured(operation, shapes, needs)
    for moment, ours, theirs in zip(("forward", "backward"), have, want, strict=True):
        seen = theirs - not_counted
        if max(ours, seen) >= MIB:
            assert ours == pytest.approx(seen, rel=0.05), f"{moment}: predicted {ours:,}, measured {seen:,} bytes"


# ---- the two that were reported ----------------------------------------------------------------


class Gated(nn.Module):
    """x · gate with one number of the gate for each map, which is made from the map itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.squeeze = nn.Conv2d(3, 24, 3, padding=1, rng=0), nn.Linear(24, 24, rng=1)
        self.head = nn.Linear(24, 10, rng=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        gate = F.sigmoid(self.squeeze(x.mean((2, 3))))
        return self.head((x * gate.reshape(*gate.shape, 1, 1)).mean((2, 3)))


@compiled
@pytest.mark.usefixtures("single_thread")
@pytest.mark.parametrize("batch", [4, 16])
def test_a_squeeze_and_excitation_gate(batch: int) -> None:
    """The gradient of the gate is a sum of products, which are made in pieces."""
    net = Gated().train()
    images = np.random.default_rng(0).standard_normal((batch, 3, 48, 48)).astype(np.float32)
    with record(net) as records:
        F.cross_entropy(net(Tensor.meta(images.shape)), Tensor.meta((batch,), np.int64))
    real = measure_peak(net, images, np.arange(batch) % 10)
    assert peak(records, lifetimes=lifetimes(net, images.shape)).peak_bytes == pytest.approx(real, rel=0.05)


@compiled
@pytest.mark.parametrize(("B", "K"), [(200_000, 2), (300_000, 1), (50_000, 10), (1_000, 600), (2, 200_000)])
def test_cross_entropy_of_many_rows_and_of_few(B: int, K: int) -> None:
    """Where rows are short, their numbers, labels, maxima and sums are what counts."""
    labels = Tensor(np.arange(B) % K)

    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(x, Tensor.meta((B,), np.int64) if x.is_meta else labels)

    check(loss, [(B, K)], [True], not_counted=-8 * B)


# ---- broadcasting ------------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize("op", ["add", "sub", "mul", "div"])
@given(data=st.data())
@settings(max_examples=20)
def test_broadcasting_along_any_axes_from_either_side(op: str, data: Any) -> None:
    """Also a number, a row against a column, and both the same shape."""
    full = data.draw(
        st.sampled_from([(16, 32, 24, 24), (2, 3, 224, 224), (150_000, 2), (2, 150_000), (500, 700), (7, 200, 300)])
    )
    shapes = []
    for _ in range(2):
        kept = data.draw(st.tuples(*[st.booleans()] * len(full)))
        shape = tuple(n if yes else 1 for n, yes in zip(full, kept, strict=True))
        while shape and shape[0] == 1 and data.draw(st.booleans()):
            shape = shape[1:]
        shapes.append(shape)
    shapes[data.draw(st.sampled_from([0, 1]))] = full
    needs = data.draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    check(getattr(F, op), shapes, needs)


@compiled
@pytest.mark.parametrize("op", ["add", "mul", "div"])
@pytest.mark.parametrize("shapes", [((600, 1), (1, 700)), ((1, 500), (600, 1)), ((64, 1, 9, 9), (1, 100, 1, 1))])
def test_both_are_repeated(op: str, shapes: Shapes) -> None:
    """An outer sum or product: each gradient is a sum of all of it."""
    for needs in ((True, True), (True, False), (False, True)):
        check(getattr(F, op), shapes, needs)


@compiled
@pytest.mark.parametrize(
    ("shape", "full"),
    [((300_000, 1), (300_000, 4)), ((3, 1, 4000), (3, 50, 4000)), ((), (500, 700)), ((16, 32, 1, 1), (16, 32, 30, 30))],
)
def test_expanding(shape: tuple[int, ...], full: tuple[int, ...]) -> None:
    """The result is whole, its gradient a sum that a leaf takes over as it is."""
    check(lambda x: F.expand(x, full), [shape], [True])


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1), (1, 3), (2, 3), (1, 1, 1), (4, 1, 3), (4, 2, 1)])
def test_a_sum_over_what_was_repeated_is_an_array_of_its_own(shape: tuple[int, ...]) -> None:
    """Not a view of the sum, which a leaf would have to copy; with the numbers of a loop."""
    gradient = np.arange(24.0).reshape(4, 2, 3)
    result = unbroadcast(gradient, shape)
    want = np.zeros(shape)
    for index in np.ndindex(4, 2, 3):
        want[tuple(0 if n == 1 else i for n, i in zip(shape, index[3 - len(shape) :], strict=True))] += gradient[index]
    assert result.base is None
    np.testing.assert_array_equal(result, want)


# ---- reductions, losses, norms -----------------------------------------------------------------

MATRICES = [(150_000, 3), (3, 150_000), (1000, 600), (8, 16, 48, 64), (2, 3, 200, 200), (300_000,), (1, 300_000)]


@compiled
@pytest.mark.parametrize("op", ["softmax", "log_softmax"])
@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_softmax_along_every_axis(op: str, shape: tuple[int, ...]) -> None:
    """Many rows of few columns, few rows of many, and axes in between."""
    for dim in range(len(shape)):
        check(lambda x, dim=dim: getattr(F, op)(x, dim), [shape], [True])


@compiled
@pytest.mark.parametrize("op", ["sum", "mean", "max", "var"])
@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_reductions_along_every_axis(op: str, shape: tuple[int, ...]) -> None:
    """One axis, all of them, and the last two."""
    axes: list[Any] = [None, *range(len(shape))]
    if op != "max" and len(shape) > 2:
        axes.append((len(shape) - 2, len(shape) - 1))
    for dim in axes:
        over = range(len(shape)) if dim is None else [dim] if isinstance(dim, int) else dim
        if op == "var" and math.prod(shape[i] for i in over) < 2:
            continue
        check(lambda x, dim=dim: getattr(F, op)(x, dim), [shape], [True])


@compiled
@pytest.mark.parametrize("shape", [(200_000, 2), (2, 200_000), (600, 500), (20_000, 30)])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_squared_differences(shape: tuple[int, ...], needs: tuple[bool, bool]) -> None:
    """The gradient of the second alone is the negative of one that is made for it."""
    check(F.mse_loss, [shape, shape], needs)


NEEDS = [(True, True, True), (True, False, False), (False, True, True), (False, True, False), (False, False, True)]


@compiled
@pytest.mark.parametrize(
    ("shape", "count"),
    [((150_000, 2), 1), ((2, 150_000), 1), ((1000, 600), 1), ((16, 20, 30, 40), 1), ((16, 20, 30, 40), 3),
     ((3, 2, 100_000), 2), ((50_000, 2, 3), 2), ((20, 700, 50), 1)],
)  # fmt: skip
def test_layer_norms_of_long_and_of_short_stretches(shape: tuple[int, ...], count: int) -> None:
    """Every pattern of gradients, with weight and bias and without."""
    inner = shape[-count:]
    for needs in NEEDS:
        check(lambda x, w, b: F.layer_norm(x, inner, w, b), [shape, inner, inner], needs)
    check(lambda x: F.layer_norm(x, inner), [shape], [True])


@compiled
@pytest.mark.parametrize(
    "operation",
    [
        lambda x: F.layer_norm(x, x.shape[-1]),
        lambda x: F.rms_norm(x, x.shape[-1]),
        lambda x: F.batch_norm(x, None, None, training=True),
        lambda x: F.leaky_relu(x, 0.1),
        F.silu,
        F.elu,
    ],
    ids=["layer_norm", "rms_norm", "batch_norm", "leaky_relu", "silu", "elu"],
)
def test_gradients_that_are_written_over(operation: Operation) -> None:
    """The gradient that comes in is the product's own, and the next one takes its place."""
    check(lambda x: (operation(x) * 2.0).sum(), [(16, 20, 30, 40)], [True])


@compiled
@pytest.mark.parametrize("shape", [(150_000, 2), (2, 150_000), (1000, 600), (16, 20, 30, 40), (64, 3, 64, 64)])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norms_of_many_channels_and_of_few(shape: tuple[int, ...], training: bool) -> None:
    """Every pattern of gradients; the running statistics belong to the module."""
    C, few = (shape[1],), [False, False]

    def norm(x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return F.batch_norm(x, mean, var, w, b, training=training)

    for needs in NEEDS:
        check(norm, [shape, C, C, C, C], [*needs, *few], not_counted=8 * shape[1])
    plain = lambda x, mean, var: F.batch_norm(x, mean, var, training=training)  # noqa: E731
    check(plain, [shape, C, C], [True, *few], not_counted=8 * shape[1])


# ---- element by element, moving, pooling, products ---------------------------------------------


@compiled
@pytest.mark.parametrize(
    "op",
    ["neg", "exp", "log", "sqrt", "tanh", "sigmoid", "gelu", "hardsigmoid", "hardswish", "relu", "relu6", "erf",
     "gelu_tanh", "clip", "fake_quantize", "dropout", "pow", "silu", "mish", "softplus", "elu", "leaky_relu"],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(8, 16, 48, 64), (60_000,), (300, 1000)], ids=str)
def test_formulas(op: str, shape: tuple[int, ...], request: pytest.FixtureRequest) -> None:
    """Of one array, larger than a block and smaller; with a gradient that is an array, and one that is repeated."""
    if op == "relu":  # its rule counts the blocks of one thread
        request.getfixturevalue("single_thread")
    options = {"clip": (0.3, 0.7), "fake_quantize": (0.01,), "dropout": (0.3,), "pow": (3,)}.get(op, ())

    def formula(x: Tensor) -> Tensor:
        return getattr(F, op)(x, *options)

    check(formula, [shape], [True])
    check(lambda x: formula(x).mean(len(shape) - 1), [shape], [True])


@compiled
@pytest.mark.parametrize("op", ["tanh", "sigmoid", "relu", "softmax", "log_softmax", "clip", "fake_quantize"])
def test_formulas_of_a_permutation(op: str) -> None:
    """The result keeps the order of the axes in memory, or is packed; the gradient comes in another order."""
    options = {"clip": (0.3, 0.7), "fake_quantize": (0.01,)}.get(op, ())

    def formula(x: Tensor) -> Tensor:
        factor = Tensor.meta((1,)) if x.is_meta else Tensor(np.ones(1, np.float32))
        return (getattr(F, op)(x.permute(0, 2, 1), *options) * factor).sum()

    check(formula, [(64, 100, 90)], [True])


@compiled
@pytest.mark.parametrize("op", ["max_pool2d", "avg_pool2d", "without padding", "adaptive_avg_pool2d"])
@pytest.mark.parametrize("shape", [(8, 16, 64, 64), (2, 3, 300, 300), (100, 80, 6, 6), (128, 200, 3, 3)], ids=str)
def test_pooling(op: str, shape: tuple[int, ...]) -> None:
    """Maps large and small, windows that overlap and that do not."""
    for size in (1, 2, 3):
        if op == "adaptive_avg_pool2d":
            check(lambda x, size=size: F.adaptive_avg_pool2d(x, size), [shape], [True])
        elif op == "without padding":
            check(lambda x, s=size: F.avg_pool2d(x, 3, s, 1, count_include_pad=False), [shape], [True])
        else:
            check(lambda x, size=size: getattr(F, op)(x, 3, size, 1), [shape], [True])


@compiled
def test_indexing_and_joining() -> None:
    """Arrays of positions, of one axis and of two; slices; joints along each axis."""
    rows, columns = np.arange(200_000) % 400, np.arange(200_000) % 1500
    check(lambda x: x[rows], [(400, 3)], [True])
    check(lambda x: x[rows, columns], [(400, 1500)], [True])
    check(lambda x: x[:, ::2], [(400, 1500)], [True])
    for dim, other in ((0, (200, 500)), (1, (300, 400))):
        check(lambda x, y, dim=dim: F.concatenate([x, y], dim), [(300, 500), other], [True, False])


@compiled
@pytest.mark.usefixtures("single_thread")  # of two threads the columns may live together, or not
@pytest.mark.parametrize(
    ("x", "weight", "options"),
    [
        ((512, 200, 2, 2), (100, 200, 2, 2), {}),  # the kernel covers the map: patches are views
        ((16, 64, 8, 8), (64, 64, 8, 8), {}),
        ((8, 16, 48, 64), (24, 16, 1, 1), {}),
        ((8, 16, 48, 64), (24, 16, 1, 1), {"stride": 2}),
        ((64, 32, 14, 14), (16, 32, 1, 1), {"padding": 1}),
        ((8, 16, 48, 64), (24, 8, 1, 1), {"groups": 2}),
        ((8, 16, 48, 64), (24, 16, 3, 2), {"padding": 2, "dilation": (2, 3)}),
        ((100, 40, 6, 5), (30, 20, 3, 2), {"groups": 2}),
        ((64, 32, 14, 14), (32, 1, 5, 3), {"groups": 32, "padding": (2, 1), "stride": 2}),
    ],
)  # fmt: skip
def test_convolutions(x: tuple[int, ...], weight: tuple[int, ...], options: dict[str, Any]) -> None:
    """Patches that are laid out and patches that are views; every pattern of gradients."""
    for needs in NEEDS:
        check(lambda a, w, b: F.conv2d(a, w, b, **options), [x, weight, weight[:1]], needs)
    check(lambda a, w: F.conv2d(a, w, **options).mean((2, 3)), [x, weight], [True, True])


@compiled
@pytest.mark.parametrize(
    ("a", "b"),
    [((200_000, 2), (2, 3)), ((40, 70, 60), (60, 80)), ((70, 60), (40, 60, 80)), ((4, 10, 70, 60), (4, 1, 60, 80)),
     ((700, 800), (800,)), ((1, 70, 60), (100, 60, 80))],
)  # fmt: skip
def test_products(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    """Batches against one matrix, and operands that are repeated: their gradients are summed afterwards."""
    for needs in ((True, True), (True, False), (False, True)):
        check(F.matmul, [a, b], needs)


@compiled
@pytest.mark.parametrize("function", [lambda x: x + x * x, lambda x: F.exp(x) + F.log(x), lambda x: x * x * x])
def test_gradients_that_meet(function: Operation) -> None:
    """A new array for their sum, beside both."""
    check(lambda x: function(F.tanh(x)).sum(), [(500, 600)], [True])
    check(lambda x: function(x).sum(), [(500, 600)], [True])


# ---- by hand -----------------------------------------------------------------------------------


def packed(*shape: int) -> Layout:
    return Layout(Storage(4 * math.prod(shape)), shape, packed_strides(shape))


def test_blocks_by_hand() -> None:
    """Axes that lie in one stretch are one; a block is made of whole inner axes, and of as much of the next as fits."""
    assert BLOCK == 65_536
    assert blocks([packed(8, 16, 48, 64)], BLOCK) == (65_536, 0)
    assert blocks([packed(8, 16, 48, 64), packed(16, 1, 1)], BLOCK) == (49_152, 1)  # 3072 · 16, then 1 of 8
    assert blocks([packed(8, 16, 48, 64), packed(8, 16, 1, 1)], BLOCK) == (21 * 3072, 1)  # of 128 maps
    assert blocks([packed(8, 16, 48, 64), packed(8, 1, 1, 1)], BLOCK) == (49_152, 0)  # one inner stretch is the block
    assert blocks([packed(500, 600), packed(600), packed(500, 1)], BLOCK) == (109 * 600, 2)
    assert blocks([packed(16, 24_000), packed(16, 1)], BLOCK) == (48_000, 1)  # twice as large for one copy
    assert blocks([packed(16, 24_000), packed(16, 1), packed(16, 1)], BLOCK) == (24_000, 0)  # but not for two
    assert blocks([packed(16, 20_000), packed(16, 1), packed(16, 1)], BLOCK) == (60_000, 2)
    assert blocks([packed(3, 200_000), packed(3, 1)], BLOCK) == (65_536, 0)
    assert blocks([packed(64, 100, 90), packed(64, 90, 100).permuted((0, 2, 1))], 8192) == (90 * 91, 1)
    assert blocks([packed(20)], BLOCK) == (20, 0)


def test_orders_by_hand() -> None:
    """C order where the operands disagree; what is repeated has no say."""
    assert order_of([packed(2, 3, 4)]) == [0, 1, 2]
    assert order_of([packed(2, 3, 4).permuted((0, 2, 1))]) == [0, 2, 1]
    assert order_of([packed(2, 4, 3), packed(2, 3, 4).permuted((0, 2, 1))]) == [0, 1, 2]
    repeated = Layout(Storage(4), (2, 4, 3), (0, 0, 0))
    assert order_of([repeated, packed(2, 3, 4).permuted((0, 2, 1))]) == [0, 2, 1]


@given(st.lists(st.integers(1, 400), min_size=1, max_size=4), st.data())
def test_the_largest_piece(shape: list[int], data: Any) -> None:
    """As large as what the library cuts off."""
    whole = data.draw(st.sets(st.integers(0, len(shape) - 1)))
    if math.prod(shape) > 10_000_000:
        return
    one = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), shape, [0] * len(shape))
    assert piece(tuple(shape), whole, 4) == max(one[part].size for part in pieces(shape, whole)) * 4


STORES: dict[str, tuple[Callable[[], ActivationStore], tuple[int, int], int]] = {
    "int8 in blocks": (lambda: Quantized(8), (3000, 1024), 16),
    "int4 in blocks": (lambda: Quantized(4), (3000, 1024), 16),
    "int8 in full blocks": (lambda: Quantized(8), (4096, 1024), 16),
    "int4 in full blocks": (lambda: Quantized(4), (4096, 1024), 16),
    "int8 in one": (lambda: Quantized(8), (500, 1024), 16),
    "int4 in one": (lambda: Quantized(4), (500, 1024), 16),
    "int8 of few": (lambda: Quantized(8), (40, 9000), 16),
    "a sketch of many rows": (lambda: Sketch(0.5), (900, 300), 16),
    "a sketch of five rows": (lambda: Sketch(0.3), (5, 200_000), 4),
    "cores of many rows": (
        lambda: Lance(Subspace.random((600, 900), (500, 10), np.random.default_rng(0))),
        (600, 900),
        700,
    ),
    "cores of few rows": (
        lambda: Lance(Subspace.random((600, 900), (10, 500), np.random.default_rng(0))),
        (600, 900),
        700,
    ),
}


@pytest.mark.parametrize("name", STORES)
def test_stores_of_a_linear_layer(name: str) -> None:
    """What a store makes while it saves and while it gives the weight gradient."""
    make, shape, outputs = STORES[name]
    store = make()
    check(lambda x, w: F.linear(x, w, store=store), [shape, (outputs, shape[1])], [False, True])


@compiled
def test_the_products_of_quantised_images() -> None:
    """A block of images takes less than the patches that are made of it."""
    store = Quantized(8)
    check(lambda x, w: F.conv2d(x, w, padding=2, store=store), [(8, 16, 32, 32), (16, 16, 5, 5)], [False, True])
