"""Losses against PyTorch, at extremes, and with labels that do not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_ref import F, Tensor, tape


@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    reduction=st.sampled_from(["mean", "sum"]),
    scale=st.sampled_from([1.0, 100.0]),
    double=st.booleans(),
    seed=st.integers(0, 99),
)
def test_cross_entropy_equals_pytorch(
    shape: tuple[int, int], reduction: str, scale: float, double: bool, seed: int
) -> None:
    """Value and gradient, for saturated scores too."""
    torch = pytest.importorskip("torch")
    dtype, tolerance = (np.float64, 1e-12) if double else (np.float32, 1e-4)
    rng = np.random.default_rng(seed)
    x, target = (scale * rng.standard_normal(shape)).astype(dtype), rng.integers(0, shape[1], shape[0])
    ours, theirs = Tensor(x, requires_grad=True), torch.tensor(x, requires_grad=True)
    loss = F.cross_entropy(ours, target, reduction=reduction)
    expected = torch.nn.functional.cross_entropy(theirs, torch.tensor(target), reduction=reduction)
    np.testing.assert_allclose(loss.data, expected.detach().numpy(), rtol=tolerance, atol=tolerance)
    loss.backward()
    expected.backward()
    np.testing.assert_allclose(ours.grad, theirs.grad.numpy(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_mse_loss_equals_pytorch(reduction: str) -> None:
    """Value and both gradients."""
    torch = pytest.importorskip("torch")
    arrays = np.random.default_rng(0).standard_normal((2, 3, 4))
    ours = [Tensor(array, requires_grad=True) for array in arrays]
    theirs = [torch.tensor(array, requires_grad=True) for array in arrays]
    loss = F.mse_loss(*ours, reduction=reduction)
    expected = torch.nn.functional.mse_loss(*theirs, reduction=reduction)
    np.testing.assert_allclose(loss.data, expected.detach().numpy())
    loss.backward()
    expected.backward()
    for mine, peer in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine.grad, peer.grad.numpy())


def test_extreme_scores_do_not_overflow() -> None:
    """Warnings are errors: e^10000 would raise; a sure and wrong answer costs exactly its margin."""
    x = Tensor(np.array([[1e4, 0.0], [0.0, -1e4]], np.float32), requires_grad=True)
    loss = F.cross_entropy(x, [1, 0], reduction="sum")
    assert loss.item() == 1e4
    loss.backward()
    np.testing.assert_array_equal(x.grad, [[1, -1], [0, 0]])


@pytest.mark.parametrize(("K", "dtype"), [(1, "uint8"), (256, "uint8"), (257, "uint16")])
def test_labels_are_kept_in_the_smallest_type(K: int, dtype: str) -> None:
    """The label K − 1 must survive."""
    x = Tensor(np.zeros((3, K), np.float32), requires_grad=True)
    loss = F.cross_entropy(x, np.array([0, K - 1, K - 1]), reduction="sum")
    entries = {entry.what: entry for entry in tape(loss).entries}
    assert (entries["labels"].dtype, entries["labels"].nbytes) == (dtype, 3 * np.dtype(dtype).itemsize)
    assert entries["probabilities"].nbytes == 3 * K * 4
    loss.backward()
    np.testing.assert_allclose(x.grad[1, K - 1], 1 / K - 1, rtol=1e-6)


@pytest.mark.parametrize(
    "target",
    [[1, 0], (1, 0), np.array([1, 0]), np.array([1, 0], np.uint8), Tensor(np.array([1, 0], np.int32))],
    ids=lambda target: type(target).__name__,
)
def test_labels_may_be_any_integers(target: Any) -> None:
    """A list of Python integers must not become floats."""
    loss = F.cross_entropy(np.array([[0.0, 1.0], [1.0, 0.0]]), target)
    assert loss.item() == pytest.approx(np.log(1 + np.exp(-1)))


def test_labels_without_data() -> None:
    """In a trace neither scores nor labels have values; only shapes are checked."""
    out = F.cross_entropy(Tensor.meta((4, 10)), Tensor.meta((4,), np.int64))
    assert out.is_meta
    assert out.shape == ()
    with pytest.raises(ValueError, match="target has shape"):
        F.cross_entropy(Tensor.meta((4, 10)), Tensor.meta((5,), np.int64))


SCORES = np.zeros((2, 3))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: F.cross_entropy(SCORES, [0, 3]), ValueError, r"target\[1\] is 3, expected labels in \[0, 3\)"),
        (lambda: F.cross_entropy(SCORES, [-1, 0]), ValueError, r"target\[0\] is -1"),
        (lambda: F.cross_entropy(SCORES, [0]), ValueError, r"target has shape \(1,\), expected \(2,\)"),
        (lambda: F.cross_entropy(SCORES, [[0, 1]]), ValueError, r"target has shape \(1, 2\)"),
        (lambda: F.cross_entropy(SCORES, [0.0, 1.0]), TypeError, "target has dtype float64, expected integer labels"),
        (lambda: F.cross_entropy(SCORES, [True, False]), TypeError, "target has dtype bool"),
        (lambda: F.cross_entropy(SCORES[0], [0]), ValueError, r"x has shape \(3,\), expected \(B, K\)"),
        (lambda: F.cross_entropy(np.zeros((0, 3)), np.zeros(0, int)), ValueError, "at least 1"),
        (lambda: F.cross_entropy(SCORES, [0, 1], "none"), ValueError, "reduction is 'none'"),
        (lambda: F.cross_entropy(SCORES.astype(int), [0, 1]), TypeError, "cross_entropy.*int64"),
        (lambda: F.mse_loss(SCORES, SCORES[0]), ValueError, r"mse_loss: a has shape \(2, 3\) and b \(3,\)"),
        (lambda: F.mse_loss(np.zeros(0), np.zeros(0)), ValueError, "non-empty"),
        (lambda: F.mse_loss(SCORES, SCORES, "max"), ValueError, "reduction is 'max'"),
        (lambda: F.mse_loss(SCORES, SCORES.astype(np.float32)), TypeError, "float64.*float32"),
        (lambda: F.mse_loss(SCORES, SCORES.astype(int)), TypeError, "b has dtype int64"),
    ],
)
def test_bad_arguments_are_named(call: Any, error: type[Exception], says: str) -> None:
    """The message must say which argument, what came and what was expected."""
    with pytest.raises(error, match=says):
        call()
