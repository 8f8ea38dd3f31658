"""Matrix products: NumPy's results for any batch, multiply-adds by hand, bad shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_ref import F, Tensor, count_macs, nn, tape


@st.composite
def factors(draw: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of two operands: matrices or vectors, with batch dimensions that broadcast."""
    m, k, n = (draw(st.integers(1, 4)) for _ in range(3))
    batch = draw(st.lists(st.integers(1, 3), max_size=2))
    left, right = ([draw(st.sampled_from([size, 1])) for size in batch] for _ in range(2))
    a = (*left[draw(st.integers(0, len(left))) :], m, k)
    b = (*right[draw(st.integers(0, len(right))) :], k, n)
    return draw(st.sampled_from([a, (k,)])), draw(st.sampled_from([b, (k,)]))


@given(shapes=factors())
def test_values_and_gradients_equal_the_definition(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """C = A B is bilinear, so ⟨A, dA⟩ = ⟨B, dB⟩ = ⟨C, G⟩ for these and any other A, B of that shape."""
    rng = np.random.default_rng(0)
    a, b = (Tensor(rng.standard_normal(shape), requires_grad=True) for shape in shapes)
    out = a @ b
    np.testing.assert_allclose(out.data, a.data @ b.data, rtol=1e-12)
    assert F.matmul(Tensor.meta(shapes[0]), Tensor.meta(shapes[1])).shape == out.shape
    g = rng.standard_normal(out.shape)
    out.backward(g)
    other_a, other_b = (rng.standard_normal(shape) for shape in shapes)
    np.testing.assert_allclose(np.sum(other_a * a.grad), np.sum((other_a @ b.data) * g), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(np.sum(other_b * b.grad), np.sum((a.data @ other_b) * g), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("a", "b", "macs"),
    [
        ((2, 3), (3, 5), 2 * 3 * 5),
        ((7, 2, 3), (3, 5), 7 * 2 * 3 * 5),
        ((7, 2, 3), (7, 3, 5), 7 * 2 * 3 * 5),
        ((2, 3), (7, 3, 5), 7 * 2 * 3 * 5),
        ((7, 1, 2, 3), (4, 3, 5), 7 * 4 * 2 * 3 * 5),
        ((3,), (3,), 3),
        ((2, 3), (3,), 6),
    ],
)
def test_multiply_adds_by_hand(a: tuple[int, ...], b: tuple[int, ...], macs: int) -> None:
    """Forward, and once more for each gradient; a forgotten dimension would show."""
    parameter = nn.Parameter(np.ones(b))
    with count_macs() as counter:
        out = F.matmul(Tensor(np.ones(a), requires_grad=True), parameter)
        out.backward(np.ones(out.shape))
    kinds = counter.by_kind()
    assert (kinds["forward"], kinds["grad_input"], kinds["grad_weight"]) == (macs, macs, macs)


def test_the_gradient_of_an_activation_is_no_weight_gradient() -> None:
    """Two activations, as in attention: both gradients are booked under grad_input."""
    a, b = (Tensor(np.ones((2, 2)), requires_grad=True) for _ in range(2))
    with count_macs() as counter:
        (a @ b).sum().backward()
    assert counter.by_kind()["grad_input"] == 16
    assert counter.by_kind()["grad_weight"] == 0


def test_only_what_is_needed_is_kept() -> None:
    """Each operand is kept for the other one's gradient, and not if that needs none."""
    for need_a, need_b, kept in ((True, True, {"a", "b"}), (True, False, {"b"}), (False, True, {"a"})):
        a, b = Tensor(np.ones((2, 3)), requires_grad=need_a), Tensor(np.ones((3, 4)), requires_grad=need_b)
        assert {entry.what for entry in tape(a @ b).entries} == kept


@pytest.mark.parametrize(
    ("a", "b", "says"),
    [
        ((2, 3), (4, 5), r"matmul: a has shape \(2, 3\) and b has shape \(4, 5\), expected \(\.\.\., m, k\)"),
        ((3,), (4,), r"\(3,\).*\(4,\)"),
        ((2, 2, 3), (3, 3, 4), r"\(2, 2, 3\).*\(3, 3, 4\)"),
        ((), (3,), "at least one dimension"),
    ],
)
def test_bad_shapes_are_named(a: tuple[int, ...], b: tuple[int, ...], says: str) -> None:
    """Both shapes must be in the message."""
    with pytest.raises(ValueError, match=says):
        F.matmul(np.ones(a), np.ones(b))


def test_bad_dtypes_are_named() -> None:
    """Integers and mixtures are refused before anything is computed."""
    with pytest.raises(TypeError, match="matmul: b has dtype int64"):
        F.matmul(np.ones((2, 2)), np.ones((2, 2), np.int64))
    with pytest.raises(TypeError, match=r"float64.*float32"):
        F.matmul(np.ones((2, 2)), np.ones((2, 2), np.float32))


@pytest.mark.parametrize("shapes", [((2, 0), (0, 3)), ((2, 3, 0), (0, 4)), ((0, 3), (3, 2)), ((2, 3), (3, 0))])
def test_products_of_nothing_have_gradients(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """Zeros, of the shapes of both operands."""
    a, b = (Tensor(np.ones(shape), requires_grad=True) for shape in shapes)
    F.sum(a @ b).backward()
    assert a.grad is not None
    assert b.grad is not None
    assert (a.grad.shape, b.grad.shape) == shapes
    assert not a.grad.any()
    assert not b.grad.any()
