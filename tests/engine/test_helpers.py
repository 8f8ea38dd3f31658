"""The checkers can fail: faults planted in gradients and in memory are caught."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import check_live_bytes, check_vjp

from lance_ref import F, Tensor, tape
from lance_ref.engine.autograd import Function
from lance_ref.engine.tape_report import TapeEntry, TapeReport
from lance_ref.engine.tensor import Shape

X = np.random.default_rng(0).standard_normal((3, 4))


def cube(alter: Callable[[np.ndarray], Any], saves: str = "input") -> Callable[[Tensor], Tensor]:
    """x³, its gradient passed through ``alter``, and x kept on the tape or behind its back."""
    hidden: list[np.ndarray] = []

    class Cube(Function):
        op = "cube"

        @staticmethod
        def output_shape(*inputs: Tensor, **attributes: Any) -> Shape:
            return inputs[0].shape

        @staticmethod
        def forward(ctx: Any, *inputs: np.ndarray, **attributes: Any) -> np.ndarray:
            if saves == "input":
                ctx.save_input("x", 0)
            elif saves == "attribute":
                ctx.x = inputs[0]
            else:
                hidden.append(inputs[0])
            return inputs[0] ** 3

        @staticmethod
        def backward(ctx: Any, grad_output: np.ndarray) -> tuple[np.ndarray | None, ...]:
            return (alter(3 * ctx["x"] ** 2 * grad_output),)

    return lambda x: Cube.apply(x)


def one_entry(grad: np.ndarray) -> np.ndarray:
    grad[1, 2] *= 1.001
    return grad


def test_a_right_gradient_passes() -> None:
    """Otherwise the faults below would prove nothing."""
    check_vjp(cube(lambda grad: grad), X)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(lambda grad: grad * 1.001, id="0.1 percent too large"),
        pytest.param(one_entry, id="0.1 percent in one entry"),
        pytest.param(lambda grad: grad * (1 + 1e-5), id="1e-5 too large"),
        pytest.param(lambda grad: -grad, id="sign"),
        pytest.param(lambda grad: np.roll(grad, 1, axis=0), id="another row's"),
        pytest.param(lambda grad: None, id="missing"),
    ],
)
def test_a_wrong_gradient_is_caught(fault: Callable[[np.ndarray], Any]) -> None:
    """A checker that sampled one entry, or had a loose tolerance, would let these pass."""
    with pytest.raises(AssertionError):
        check_vjp(cube(fault), X)


def test_a_gradient_that_nobody_asked_for_is_caught() -> None:
    """Gradients of constants cost time and memory for nothing; the tape drops them, so plant one by hand."""

    def leaky(a: Tensor, b: Tensor) -> Tensor:
        if not b.requires_grad:
            b.grad = np.ones(b.shape)
        return a * b

    with pytest.raises(AssertionError, match="nobody asked"):
        check_vjp(leaky, X, X)


@pytest.mark.parametrize("saves", ["attribute", "closure"])
def test_hidden_references_are_caught(saves: str) -> None:
    """An array kept in a ctx attribute or a closure is in memory but not in the report."""
    x = Tensor(np.zeros(1 << 19, np.float32), requires_grad=True)
    check_live_bytes(lambda: cube(lambda grad: grad)(x + 1.0).sum(), operations=3)
    hiding = cube(lambda grad: grad, saves)
    with pytest.raises(AssertionError, match="alive"):
        check_live_bytes(lambda: hiding(x + 1.0).sum(), operations=3)


def test_counting_a_buffer_twice_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report that bills each entry its own size counts the shared input of two layers twice."""
    x = Tensor(np.zeros(1 << 18, np.float32), requires_grad=True)

    def loss() -> Tensor:
        h = x + 1.0
        return (h * h.log()).sum()  # mul keeps h and log(h), log keeps h: two buffers in three entries

    report = check_live_bytes(loss, operations=4)
    assert report.total_bytes == 2 * x.data.nbytes

    def naive(tensor: Tensor) -> TapeReport:
        entries = [
            TapeEntry(e.path, e.op, e.what, e.shape, e.dtype, int(np.prod(e.shape)) * np.dtype(e.dtype).itemsize)
            for e in tape(tensor).entries
        ]
        return TapeReport(entries, [])

    monkeypatch.setattr("helpers.tape", naive)
    with pytest.raises(AssertionError, match="reported"):
        check_live_bytes(loss, operations=4)


def test_the_checker_wants_float64() -> None:
    """Differences of float32 values have no six digits."""
    with pytest.raises(AssertionError, match="float64"):
        check_vjp(F.exp, X.astype(np.float32))
