"""Gradients that are written over where nobody else can see them: same bits, and nobody's array is touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lance_ref import F, Tensor, nn
from lance_ref.algebra.kernels.threads import numba_enabled
from lance_ref.engine import autograd, blocks, ownership, tensor
from lance_ref.engine.autograd import Function
from lance_ref.engine.ownership import alone, has_own_memory, lie_alike
from lance_ref.functional.activations import Elu, LeakyRelu, Silu
from lance_ref.functional.group_norms import RmsNorm
from lance_ref.functional.nonlinearities import Relu
from lance_ref.functional.normalization import BatchNorm, LayerNorm

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": F.tanh,
    "sigmoid": F.sigmoid,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "silu": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "elu": F.elu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.3),
    "softmax": lambda x: F.softmax(x, 1),
    "log_softmax": lambda x: F.log_softmax(x, 0) * 0.1,
    "neg": lambda x: -x,
    "exp": lambda x: F.exp(F.tanh(x)),
    "log": lambda x: F.log(x * x + 1),
    "sqrt": lambda x: F.sqrt(x * x + 1),
    "pow": lambda x: (x * x + 1) ** 1.5,
    "transpose": lambda x: x.transpose(0, 1).reshape(4, 6) * 0.5,
    "view": lambda x: x.reshape(6, 4).permute(1, 0),
    "index": lambda x: x[::-1],
    "sum": lambda x: x - x.sum(1, keepdim=True),
    "mean": lambda x: x * x.mean(0, keepdim=True),
    "norm": lambda x: F.batch_norm(x, np.zeros(6), np.full(6, 2.0), np.linspace(1, 2, 6), np.ones(6)),
    "trained norm": lambda x: F.layer_norm(x, 6, np.linspace(1, 2, 6), np.ones(6)),
    "plain norm": lambda x: F.layer_norm(x, 6),
    "norm of squares": lambda x: F.rms_norm(x, 6, np.linspace(1, 2, 6)),
    "norm in loops": lambda x: F.batch_norm(x.reshape(1, 2, 12), None, None, training=True).reshape(4, 6),
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b * 0.3,
    "div": lambda a, b: a / (b * b + 1),
    "repeated": lambda a, b: a * b[0:1] - b[1:2],
    "joined": lambda a, b: F.concatenate([a[:2], b[:2]], 0),
}

Step = tuple[str, int, int]
STEPS = st.lists(st.tuples(st.sampled_from([*UNARY, *BINARY]), st.integers(0, 40), st.integers(0, 40)), max_size=12)


@contextmanager
def never_written_over() -> Iterator[None]:
    """Inside the ``with`` block every gradient is a new array."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (autograd, tensor):
            patch.setattr(module, "alone", lambda array, **others: False)
        yield


def run(steps: list[Step], leaves: list[Tensor]) -> Tensor:
    """An expression in which any value may be used any number of times."""
    values = list(leaves)
    for name, first, second in steps:
        a, b = values[first % len(values)], values[second % len(values)]
        values.append(UNARY[name](a) if name in UNARY else BINARY[name](a, b))
    return values[-1] + values[len(values) // 2]


def leaves_of(seed: int = 0) -> list[Tensor]:
    rng = np.random.default_rng(seed)
    return [Tensor(rng.standard_normal((4, 6)), requires_grad=True) for _ in range(2)]


def gradients(steps: list[Step], backward: Callable[[Tensor], object]) -> list[np.ndarray | None]:
    leaves = leaves_of()
    backward(run(steps, leaves))
    return [leaf.grad for leaf in leaves]


def assert_same(found: list[np.ndarray | None], expected: list[np.ndarray | None]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            np.testing.assert_array_equal(a.view(np.uint64), b.view(np.uint64))


SEED = np.random.default_rng(1).standard_normal((4, 6))


@given(STEPS, st.booleans())
@settings(max_examples=150)
def test_the_same_bits_as_with_new_arrays(steps: list[Step], in_blocks: bool) -> None:
    """Any expression, formulas in blocks too, given a gradient that stays as it was."""
    with pytest.MonkeyPatch.context() as patch:
        if in_blocks:
            patch.setattr(blocks, "BLOCK_ELEMENTS", 8)
        seed = SEED.copy()
        found = gradients(steps, lambda result: result.backward(seed))
        np.testing.assert_array_equal(seed, SEED)
        with never_written_over():
            expected = gradients(steps, lambda result: result.backward(SEED))
    assert_same(found, expected)


@given(STEPS)
@settings(max_examples=60)
def test_a_graph_that_is_kept_gives_the_same_twice(steps: list[Step]) -> None:
    """Nothing that a second backward pass reads was written over by the first; the old gradient is the caller's."""
    leaves = leaves_of()
    result = run(steps, leaves)
    forward = result.data.copy()
    result.backward(SEED, retain_graph=True)
    first = [leaf.grad for leaf in leaves]
    copies = [None if grad is None else grad.copy() for grad in first]
    for leaf in leaves:
        leaf.grad = None
    result.backward(SEED)
    assert_same([leaf.grad for leaf in leaves], copies)
    assert_same(first, copies)
    np.testing.assert_array_equal(result.data, forward)


@given(STEPS, st.sampled_from(["nothing", "array", "look", "memory"]))
@settings(max_examples=60)
def test_a_gradient_that_somebody_holds_stays(steps: list[Step], held: str) -> None:
    """A second backward pass adds to ``.grad`` in place only if nobody holds it, nor a look at it."""
    leaves = leaves_of()
    run(steps, leaves).backward(SEED)
    before: list[Any] = []
    copies = []
    for leaf in leaves:
        if leaf.grad is not None and held != "nothing":
            ways = {"array": lambda g: g, "look": lambda g: g[1:, ::2], "memory": memoryview}
            before.append(ways[held](leaf.grad))
            copies.append(np.array(before[-1]))
    run(steps, leaves).backward(SEED)
    for array, copy in zip(before, copies, strict=True):
        np.testing.assert_array_equal(np.asarray(array), copy)
    with never_written_over():
        expected = leaves_of()
        for _ in range(2):
            run(steps, expected).backward(SEED)
    assert_same([leaf.grad for leaf in leaves], [leaf.grad for leaf in expected])


def test_a_leaf_adds_up_in_its_own_array() -> None:
    """The second gradient needs no third array."""
    leaf = Tensor(np.ones((4, 6)), requires_grad=True)
    (leaf * 2.0).sum().backward()
    assert leaf.grad is not None
    address = leaf.grad.ctypes.data
    (leaf * 3.0).sum().backward()
    assert leaf.grad.ctypes.data == address
    np.testing.assert_array_equal(leaf.grad, np.full((4, 6), 5.0))


class Remembering(Function):
    """Gives back a gradient that it keeps for itself."""

    op = "remembering"
    kept: np.ndarray = np.full((4, 6), 2.0)
    seen: np.ndarray | None = None

    @staticmethod
    def output_shape(x: Tensor) -> tuple[int, ...]:
        return x.shape

    @staticmethod
    def forward(ctx: Any, x: np.ndarray) -> np.ndarray:
        return x + 1

    @staticmethod
    def backward(ctx: Any, grad_output: np.ndarray) -> tuple[np.ndarray]:
        Remembering.seen = grad_output
        return (Remembering.kept,)


def test_arrays_that_an_operation_keeps_stay() -> None:
    """What its backward got, and what it gave, whoever comes next."""
    x = Tensor(np.ones((4, 6)), requires_grad=True)
    y = F.tanh(Remembering.apply(F.tanh(x)) * 3.0)
    y.backward(SEED)
    seen = Remembering.seen
    assert seen is not None
    np.testing.assert_array_equal(Remembering.kept, np.full((4, 6), 2.0))
    np.testing.assert_allclose(seen, SEED * (1 - np.tanh(3 * (1 + np.tanh(1.0))) ** 2) * 3)


def test_a_relu_writes_over_what_only_the_tape_knows() -> None:
    """A chain of three takes one array, and the first of it is that of the seed."""
    given_to: list[int] = []

    def backward(ctx: Any, grad_output: np.ndarray) -> Any:
        given_to.append(grad_output.ctypes.data)
        return plain(ctx, grad_output)

    plain = Relu.backward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Relu, "backward", staticmethod(backward))
        x = Tensor(np.ones((4, 6)), requires_grad=True)
        F.relu(F.relu(F.relu(x))).backward(SEED)
    assert given_to[0] == SEED.ctypes.data
    assert given_to[1] == given_to[2] != given_to[0]
    assert x.grad is not None
    assert x.grad.ctypes.data == given_to[2]


@pytest.mark.parametrize(
    ("function", "apply"),
    [
        (LayerNorm, UNARY["trained norm"]),
        (RmsNorm, UNARY["norm of squares"]),
        (LeakyRelu, UNARY["leaky_relu"]),
        (Silu, F.silu),
        (Elu, F.elu),
        (BatchNorm, UNARY["norm in loops"]),
    ],
)
def test_norms_and_activations_write_over_it_too(
    function: type[Function], apply: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a chain of three the second and the third get the same array; formulas in blocks, as of large maps."""
    if function is BatchNorm and not numba_enabled():
        pytest.skip("NumPy's batch norm makes an array")
    plain, given_to = function.backward, []

    def backward(ctx: Any, grad_output: np.ndarray) -> Any:
        given_to.append(grad_output.ctypes.data)
        return plain(ctx, grad_output)

    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 8)
    monkeypatch.setattr(function, "backward", staticmethod(backward))
    apply(apply(apply(leaves_of()[0]))).backward(SEED)
    assert given_to[0] == SEED.ctypes.data
    assert given_to[1] == given_to[2] != given_to[0]


def test_what_is_written_over_lies_as_a_new_array_would() -> None:
    """Not where an operand of the same shape lies otherwise: NumPy would give the result that operand's order too."""
    node, grad = autograd.Node(Relu, (), requires_grad=False), np.zeros((3, 4))
    assert node.reused(grad) is None  # somebody else's
    node.owns_gradient = True
    assert node.reused(grad) is node.reused(grad, np.zeros((3, 4)), np.zeros(4)) is grad
    assert node.reused(grad, np.zeros((3, 4)), np.zeros((4, 3)).T) is None


@pytest.mark.parametrize("module", [autograd, tensor])
def test_planted_everything_is_written_over(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both uses of the question matter: without it somebody's array is written over."""
    monkeypatch.setattr(module, "alone", lambda array, **others: array.flags.writeable)
    leaf = Tensor(np.full((4, 6), -1.0), requires_grad=True)
    if module is autograd:
        seed = SEED.copy()
        F.relu(leaf).backward(seed)
        np.testing.assert_array_equal(seed, 0)
    else:
        (leaf * 2.0).backward(SEED)
        old = leaf.grad
        (leaf * 2.0).backward(SEED)
        np.testing.assert_array_equal(old, 4 * SEED)


# ---- the question itself ---------------------------------------------------------------------


def test_who_is_alone() -> None:
    """Of what can refer to an array, each is noticed."""
    array: Any = np.zeros((3, 4))
    assert alone(array)
    other = array
    assert not alone(array)
    assert alone(array, others=1)
    del other
    kept = {"name": array}
    assert not alone(array)
    kept.clear()
    look = array[1:]
    assert not alone(array)
    assert not alone(look)
    del look
    memory = memoryview(array)
    assert not alone(array)
    memory.release()
    assert alone(array)
    array.flags.writeable = False
    assert not alone(array)


def test_a_look_at_an_array_that_nobody_else_has() -> None:
    """All of it, in any order of axes, but not a part of it, nor backwards."""
    array: Any = np.zeros((3, 4)).T
    assert alone(array)
    array = np.zeros(12).reshape(3, 4)
    assert alone(array)
    array = np.zeros((3, 4))[1:]
    assert not alone(array)
    array = np.zeros((3, 4))[::-1]
    assert not alone(array)
    array = np.broadcast_to(np.zeros(1), (3, 4))
    assert not alone(array)
    array = np.frombuffer(bytearray(24), np.float64)
    assert not alone(array)
    array = np.float64(1.0)
    assert not alone(array)
    base = np.zeros(12)
    array = base.reshape(3, 4)
    assert not alone(array)


@given(st.permutations([0, 1, 2]), st.permutations([0, 1, 2]))
def test_which_arrays_lie_alike(a: list[int], b: list[int]) -> None:
    """The order of their axes in memory, those of one element aside."""
    sizes = np.array([3, 1, 2])

    def laid_out(order: list[int]) -> np.ndarray:
        return np.zeros(sizes[order]).transpose(np.argsort(order))

    same = [axis for axis in a if axis != 1] == [axis for axis in b if axis != 1]
    assert lie_alike(laid_out(a), laid_out(b)) == same
    assert not lie_alike(laid_out(a), laid_out(a).astype(np.float32))
    assert not lie_alike(laid_out(a), laid_out(a)[..., :1])
    assert not lie_alike(laid_out(a), np.zeros(()))
    assert not lie_alike(np.zeros((1, 1)), np.zeros((1, 1), np.float32))  # strides say nothing of one number


def test_a_gradient_of_another_dtype_is_not_written_into() -> None:
    """One that was there before the parameter became float64: the sum is float64, as of any two arrays."""
    leaf = Tensor(np.ones((4, 6)), requires_grad=True)
    leaf.grad = np.ones((4, 6), np.float32)
    (leaf * 2.0).backward(SEED)
    assert leaf.grad.dtype == np.float64
    np.testing.assert_array_equal(leaf.grad, 1 + 2 * SEED)


def test_a_network_of_views_and_shortcuts() -> None:
    """A residual block with two convolutions, trained in float32: the same bits, some steps long."""

    def trained() -> list[np.ndarray]:
        rng = np.random.default_rng(0)
        convs = nn.Sequential(nn.Conv2d(3, 4, 1, rng=rng), nn.Conv2d(4, 4, 3, padding=1, rng=rng), nn.ReLU6())
        norm, head = nn.BatchNorm2d(4).eval(), nn.Linear(4, 3, rng=rng)
        x = rng.standard_normal((5, 3, 6, 6)).astype(np.float32)
        for _ in range(3):
            y = norm(convs[0](x))
            y = convs[2](y + convs[1](F.hardswish(y)))
            y = y * F.hardsigmoid(y.mean((2, 3), keepdim=True))
            F.cross_entropy(head(y.mean((2, 3))), np.arange(5) % 3).backward()
        return [p.grad.copy() for p in (*convs.parameters(), *norm.parameters(), *head.parameters())]

    found = trained()
    with never_written_over():
        expected = trained()
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_where_references_are_counted_otherwise() -> None:
    """The count for one name is measured, not assumed: it is what this interpreter gives."""
    array = np.zeros(1)
    assert ownership._references(array) == ownership._ONE


def test_a_leaf_takes_a_look_at_memory_of_its_own() -> None:
    """A product that was reshaped is not copied; a look at what others see is."""
    a, b = Tensor(np.ones((2, 3, 4)), requires_grad=True), Tensor(np.ones((4, 5)), requires_grad=True)
    F.matmul(a, b).backward(np.ones((2, 3, 5)))
    for leaf in (a, b):
        assert leaf.grad is not None
        assert has_own_memory(leaf.grad)
    array: Any = np.zeros(12).reshape(3, 4)
    assert has_own_memory(array)
    other = array.base
    assert not has_own_memory(array)
    del other
    for look in (np.zeros((3, 4))[1:], np.zeros((3, 4)).T, np.broadcast_to(np.zeros(1), 3)):
        assert not has_own_memory(look)
    x = Tensor(np.ones((4, 6)), requires_grad=True)
    seed = SEED.copy()
    x.reshape(24).backward(seed.reshape(24))
    assert x.grad is not None
    assert not np.shares_memory(x.grad, seed)
