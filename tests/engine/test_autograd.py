"""The tape's semantics: gradients add up, graphs are consumed once, changes are noticed, buffers are freed."""

from __future__ import annotations

import threading
import weakref
from typing import Any, ClassVar

import numpy as np
import pytest
from helpers import check_vjp
from op_cases import CASES, Case

from lance_ref import F, Tensor, nn, no_grad, tape
from lance_ref.engine.autograd import Function
from lance_ref.engine.tensor import Shape


def leaf(*values: float) -> Tensor:
    return Tensor(np.array(values, np.float64), requires_grad=True)


# ---- gradients add up --------------------------------------------------------------------


def test_a_tensor_used_twice() -> None:
    """x·x + x has slope 2x + 1; one use forgotten would give x + 1 or 1."""
    x = leaf(3.0)
    (x * x + x).sum().backward()
    np.testing.assert_array_equal(x.grad, [7])


def test_a_diamond() -> None:
    """Two ways from x to y, of different length, and a second diamond on top: visited once each, in order."""

    def diamonds(x: Tensor) -> Tensor:
        y = F.exp(x)
        z = y * F.tanh(F.sigmoid(y)) + y
        return z * F.sigmoid(z) / (z + y + 1)

    check_vjp(diamonds, np.array([0.3, -0.2]))


def test_a_layer_used_twice() -> None:
    """Both calls add to the same weights."""
    layer = nn.Linear(3, 3, rng=0).to(np.float64)
    x = np.random.default_rng(0).standard_normal((4, 3))

    def twice(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(F.tanh(F.linear(x, weight, bias)), weight, bias)

    layer(F.tanh(layer(x))).sum().backward()
    copies = [Tensor(p.data.copy(), requires_grad=True) for p in (layer.weight, layer.bias)]
    twice(Tensor(x), *copies).sum().backward()
    np.testing.assert_array_equal(layer.weight.grad, copies[0].grad)
    check_vjp(twice, x, layer.weight.data, layer.bias.data)


def test_a_parameter_shared_by_two_layers() -> None:
    """Tied weights: the gradient is the sum of what two separate ones would get."""
    arrays = [np.random.default_rng(i).standard_normal((3, 3)) for i in range(2)]
    net = nn.Sequential(nn.Linear(3, 3, False, rng=0), nn.Tanh(), nn.Linear(3, 3, False, rng=0)).to(np.float64)
    net(arrays[0]).sum().backward()
    apart = net[0].weight.grad + net[2].weight.grad
    net[2].weight = net[0].weight
    net.zero_grad()
    net(arrays[0]).sum().backward()
    np.testing.assert_allclose(net[0].weight.grad, apart)


def test_backward_adds_to_what_is_there() -> None:
    """Two losses, one after the other, as in gradient accumulation."""
    x = leaf(1.0, 2.0)
    (x * 3).sum().backward()
    first = x.grad
    (x * 4).sum().backward()
    np.testing.assert_array_equal(x.grad, [7, 7])
    np.testing.assert_array_equal(first, [3, 3])  # whoever kept the old array keeps the old values


def test_ten_thousand_operations_in_a_row() -> None:
    """No recursion: not in the sort, not in backward, and not when a graph is thrown away."""
    x = leaf(1.0)
    y = x
    for _ in range(10_000):
        y = y + 0.001
    y.sum().backward()
    np.testing.assert_array_equal(x.grad, [1])
    y = x
    for _ in range(10_000):
        y = F.exp(y * 0.0)
    assert len(tape(y).entries) == 20_000
    del y  # without backward


def test_constants_get_no_gradient_and_no_tape() -> None:
    """Only what leads to something that requires gradients is recorded."""
    x, constant = leaf(1.0), Tensor(np.array([2.0]))
    frozen = F.exp(constant) * 3
    assert not frozen.requires_grad
    assert frozen.is_leaf
    out = x + frozen
    assert out.requires_grad
    assert not out.is_leaf
    out.sum().backward()
    assert constant.grad is None
    assert tape(frozen).entries == []


# ---- a graph is consumed once ------------------------------------------------------------


def test_a_second_backward_raises() -> None:
    """Silently wrong gradients are the alternative."""
    net = nn.Sequential(nn.Linear(2, 2, rng=0), nn.Tanh())
    loss = net(np.ones((1, 2), np.float32)).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match=r"sum in the root module: the graph was already consumed.*retain_graph"):
        loss.backward()


def test_a_shared_part_is_consumed_too() -> None:
    """Two losses on one body: the second backward meets a consumed node, and says where."""
    net = nn.Sequential(nn.Linear(2, 2, rng=0))
    features = net(np.ones((1, 2), np.float32))
    first, second = features.sum(), (features * features).sum()
    first.backward()
    with pytest.raises(RuntimeError, match="linear in 0: the graph was already consumed"):
        second.backward()


def test_retain_graph_allows_another() -> None:
    """And each backward adds the same gradient once more."""
    x = leaf(0.5)
    loss = F.exp(x * x).sum()
    for count in (1, 2, 3):
        loss.backward(retain_graph=count < 3)
        np.testing.assert_allclose(x.grad, [count * np.exp(0.25)])
    with pytest.raises(RuntimeError, match="already consumed"):
        loss.backward()


class Probe(Function):
    """The identity; in backward it calls back."""

    op = "probe"

    @staticmethod
    def output_shape(*inputs: Tensor, **attributes: Any) -> Shape:
        return inputs[0].shape

    @staticmethod
    def forward(ctx: Any, *inputs: np.ndarray, **attributes: Any) -> np.ndarray:
        ctx.call = attributes["call"]
        return inputs[0].copy()

    @staticmethod
    def backward(ctx: Any, grad_output: np.ndarray) -> tuple[np.ndarray | None, ...]:
        ctx.call()
        return (grad_output,)


def test_saved_buffers_are_freed_one_by_one() -> None:
    """While backward runs, what it has passed is gone and what lies before is still there."""
    x = leaf(*np.ones(1000))
    buffers: list[weakref.ref[np.ndarray]] = []
    alive: list[list[bool]] = []

    def keep(y: Tensor) -> Tensor:
        y = F.exp(y * 0.1)
        buffers.append(weakref.ref(y.data))
        return y

    def look() -> None:
        alive.append([buffer() is not None for buffer in buffers])

    y = keep(keep(x))
    y = Probe.apply(y, call=look)
    y = keep(keep(y))
    y = Probe.apply(y, call=look)
    loss = keep(y).sum()
    del y
    loss.backward()
    assert alive == [[True] * 4 + [False], [True] * 2 + [False] * 3]
    assert not any(buffer() is not None for buffer in buffers)
    assert tape(loss).entries == []


def test_after_backward_nothing_but_gradients_is_left() -> None:
    """The activations are gone even while the loss and a tensor on the way to it are kept."""
    x = Tensor(np.ones(1000), requires_grad=True)
    hidden = F.exp(x)
    reference = weakref.ref(hidden.data)
    logits = F.log(hidden)  # its node saved ``hidden``
    loss = logits.sum()
    del hidden
    assert reference() is not None
    loss.backward()
    assert reference() is None
    assert logits.requires_grad


# ---- changes are noticed -----------------------------------------------------------------


def test_a_parameter_replaced_before_backward() -> None:
    """An optimiser step in between: the input gradient would use the new weights."""
    net = nn.Sequential(nn.Linear(2, 2, rng=0), nn.Linear(2, 2, rng=0))
    loss = net(np.ones((1, 2), np.float32)).sum()
    net[1].weight.data = net[1].weight.data * 0.9
    with pytest.raises(
        RuntimeError, match=r"linear in 1: the parameter 'weight' saved for backward was changed .*1 change"
    ):
        loss.backward()


def test_a_parameter_changed_in_place_before_backward() -> None:
    """``p.data -= step`` and ``p[...] = values`` are changes as well."""
    for change in ("augmented", "item", "to"):
        layer = nn.Linear(2, 2, rng=0)
        x = Tensor(np.ones((1, 2), np.float32), requires_grad=True)
        loss = layer(x).sum()
        if change == "augmented":
            layer.weight.data -= 1
        elif change == "item":
            with no_grad():
                layer.weight[0] = 0
        else:
            layer.to(np.float64)
        with pytest.raises(RuntimeError, match="'weight' saved for backward was changed"):
            loss.backward()


def test_a_saved_activation_changed_before_backward() -> None:
    """An input, an operation's own result, and a view of either, written to through a detached tensor."""
    x = leaf(0.1, 0.2)
    y = x + 0.0
    saves_input = F.log(y).sum()
    y.detach()[0] = 5
    with pytest.raises(RuntimeError, match="log in the root module: the tensor 'x' saved"):
        saves_input.backward()
    y = F.exp(x)
    loss = y.sum()
    y.detach()[0] = 5
    with pytest.raises(RuntimeError, match="exp in the root module: the tensor 'output' saved"):
        loss.backward()
    y = F.exp(x)
    loss = y.sum()
    y.reshape(2, 1).transpose(0, 1).detach()[0, 1] = 5
    with pytest.raises(RuntimeError, match=r"exp.*'output'"):
        loss.backward()


def test_a_change_of_what_was_not_saved_is_fine() -> None:
    """The bias and the first layer's weight are not needed: changing them must not raise."""
    layer = nn.Linear(2, 2, rng=0)
    loss = layer(np.ones((1, 2), np.float32)).sum()
    layer.bias.data = layer.bias.data + 1
    layer.weight.data = layer.weight.data + 1  # the input needs no gradient
    loss.backward()
    np.testing.assert_array_equal(layer.weight.grad, np.ones((2, 2)))


def test_writing_in_place_is_refused_where_it_has_a_history() -> None:
    """The result of an operation, and a leaf outside no_grad."""
    x = leaf(1.0, 2.0)
    with pytest.raises(RuntimeError, match="result of a differentiable operation"):
        (x * 2)[0] = 1
    with pytest.raises(RuntimeError, match="only inside no_grad"):
        x[0] = 1
    with no_grad():
        x[0] = Tensor(5.0)
    np.testing.assert_array_equal(x.data, [5, 2])


# ---- .grad -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_nobody_elses_buffer(case: Case) -> None:
    """Clipping one gradient in place must not change another, the seed, or the data."""
    tensors = [Tensor(array, requires_grad=True) for array in case.arrays()]
    out = case.function(*tensors)
    seed = np.ones(out.shape)
    out.backward(seed)
    others = [seed, out.data, *(tensor.data for tensor in tensors)]
    for tensor in tensors:
        assert isinstance(tensor.grad, np.ndarray)
        assert tensor.grad.flags.writeable
        assert not any(np.shares_memory(tensor.grad, other) for other in others)
        others.append(tensor.grad)


def test_the_seed_is_copied_into_a_leaf() -> None:
    """backward on a leaf itself: its gradient is the seed, but not the seed's array."""
    x, seed = leaf(1.0, 2.0), np.array([3.0, 4.0])
    x.backward(seed)
    seed[:] = 0
    np.testing.assert_array_equal(x.grad, [3, 4])


def test_gradients_of_numbers_are_arrays() -> None:
    """NumPy turns arrays without dimensions into scalars at every step; ``.grad`` stays an array."""
    x = Tensor(np.array(2.0), requires_grad=True)
    for _ in range(2):
        (x * x * 3).backward()
        assert isinstance(x.grad, np.ndarray)
        assert x.grad.shape == ()
    assert x.grad == 24


def test_a_gradient_given_to_backward_weights_the_result() -> None:
    """As an array or a Tensor."""
    x = leaf(1.0, 2.0)
    (x * x).backward(np.array([1.0, 10.0]))
    (x * x).backward(Tensor(np.array([1.0, 10.0])))
    np.testing.assert_array_equal(x.grad, [4, 80])


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: Tensor(1.0).backward(), RuntimeError, "does not require gradients"),
        (lambda: (leaf(1, 2) * 2).backward(), RuntimeError, r"single element, this has shape \(2,\)"),
        (lambda: (leaf(1, 2) * 2).backward(np.ones(3)), ValueError, r"gradient has shape \(3,\), expected \(2,\)"),
        (lambda: (leaf(1, 2) * 2).backward(np.ones(2, np.float32)), TypeError, "dtype float32, expected float64"),
        (lambda: Tensor(np.arange(3), requires_grad=True), TypeError, "only float32 and float64.*int64"),
        (lambda: (leaf(1) * 2).requires_grad_(False), RuntimeError, "only a leaf"),
    ],
)
def test_wrong_uses_of_backward_are_explained(call: Any, error: type[Exception], says: str) -> None:
    """Each with what came and what was expected."""
    with pytest.raises(error, match=says):
        call()


# ---- no_grad -----------------------------------------------------------------------------


def test_no_grad_puts_nothing_on_the_tape() -> None:
    """Nested, and off again after an exception."""
    x = leaf(1.0)
    with no_grad():
        with no_grad():
            pass
        y = F.exp(x * 2)
    assert not y.requires_grad
    assert tape(y).entries == []
    with pytest.raises(ZeroDivisionError), no_grad():
        raise ZeroDivisionError
    assert (x * 2).requires_grad


def test_no_grad_holds_for_its_own_thread() -> None:
    """Evaluation in one thread must not switch off training in another."""
    x = leaf(1.0)
    entered, leave = threading.Event(), threading.Event()

    def evaluate() -> None:
        with no_grad():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=evaluate)
    thread.start()
    entered.wait(10)
    assert (x * 2).requires_grad
    leave.set()
    thread.join()


class Twice(Function):
    """Two inputs that get one array as their gradient, which the function has made."""

    op = "twice"
    made: ClassVar[list[np.ndarray]] = []

    @staticmethod
    def output_shape(*inputs: Tensor) -> Shape:
        return inputs[-1].shape

    @staticmethod
    def forward(ctx: Any, *inputs: np.ndarray) -> np.ndarray:
        return sum(x for x in inputs if x.dtype.kind == "f")

    @staticmethod
    def backward(ctx: Any, grad_output: np.ndarray) -> tuple[np.ndarray, ...]:
        grad = grad_output * 1
        Twice.made.append(grad)
        return (grad,) * len(ctx.needs_input_grad)


def test_leaves_that_get_one_array_do_not_share_it() -> None:
    """Clipping the gradient of one in place must not change the other's."""
    x, y = leaf(1.0, 2.0), leaf(3.0, 4.0)
    Twice.apply(x, y).backward(np.array([1.0, 2.0]))
    assert x.grad is not None
    assert y.grad is not None
    x.grad *= 0
    np.testing.assert_array_equal(y.grad, [1, 2])


@pytest.mark.parametrize("function", [Twice.apply, F.add])
def test_results_that_get_one_array_do_not_add_into_it(function: Any) -> None:
    """Where a second gradient arrives at one of them, the other's must stay: d/dx (2x + 3x + 5·2x) = 15."""
    x = leaf(1.0, 2.0)
    once, more = x * 2, x * 3
    function(function(once, more), once * 5).backward(np.ones(2))
    np.testing.assert_array_equal(x.grad, [15, 15])


def test_a_gradient_of_ones_own_is_not_copied() -> None:
    """A leaf keeps the array that was made for it alone: a copy would double what a step takes."""
    x = leaf(1.0, 2.0)
    Twice.apply(x).backward(np.ones(2))
    assert x.grad is Twice.made[-1]


def test_a_gradient_that_was_taken_is_not_changed() -> None:
    """Who kept ``.grad`` of the first backward pass still has it after the second."""
    x = leaf(1.0, 2.0)
    (x * 3).sum().backward()
    first = x.grad
    (x * 3).sum().backward()
    np.testing.assert_array_equal(first, [3, 3])
    np.testing.assert_array_equal(x.grad, [6, 6])


def test_a_view_changes_with_its_base() -> None:
    """A reshaped tensor that was saved is the base's own buffer: a write to the base is noticed."""
    x, weight = Tensor(np.array([1.0, 2.0])), leaf(3.0, 4.0)
    product = x.reshape(2) * weight
    x[0] = 7
    with pytest.raises(RuntimeError, match="changed after the forward pass"):
        product.sum().backward()


def test_no_grad_in_no_grad() -> None:
    """The end of the inner one is not the end of the outer one."""
    x = leaf(1.0)
    with no_grad():
        with no_grad():
            pass
        assert not (x * 2).requires_grad
    assert (x * 2).requires_grad


def test_integers_before_floats() -> None:
    """Labels have no say in the dtype, wherever they stand; two floating dtypes are refused."""
    labels, x = Tensor(np.array([1, 2])), leaf(1.0, 2.0)
    assert Twice.apply(labels, x).dtype == np.float64
    with pytest.raises(TypeError, match="expected one floating dtype"):
        Twice.apply(labels, x, Tensor(np.ones(2, np.float32)))
