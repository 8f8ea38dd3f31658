"""Batch and layer normalisation against PyTorch, running statistics, and what is kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_ref import F, Tensor, nn, tape


def compare(ours: list[Tensor], theirs: list[Any], tolerance: float) -> None:
    for mine, peer in zip(ours, theirs, strict=True):
        assert mine.grad is not None
        np.testing.assert_allclose(mine.grad, peer.grad.numpy(), rtol=tolerance, atol=tolerance)


@given(
    shape=st.one_of(
        st.tuples(st.integers(2, 4), st.integers(1, 4)),
        st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(2, 4), st.integers(1, 4)),
        st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(2, 5)),
    ),
    training=st.booleans(),
    affine=st.booleans(),
    momentum=st.sampled_from([0.0, 0.1, 1.0]),
    double=st.booleans(),
    seed=st.integers(0, 99),
)
def test_batch_norm_equals_pytorch(
    shape: tuple[int, ...], training: bool, affine: bool, momentum: float, double: bool, seed: int
) -> None:
    """Output, gradients, and the running statistics after the call, frozen and training."""
    torch = pytest.importorskip("torch")
    dtype, tolerance = (np.float64, 1e-9) if double else (np.float32, 2e-4)
    rng = np.random.default_rng(seed)
    C = shape[1]
    x, g = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    x = x * 3 + 1
    running = [rng.standard_normal(C).astype(dtype), rng.uniform(0.5, 2, C).astype(dtype)]
    parameters = [rng.standard_normal(C).astype(dtype) for _ in range(2 * affine)]
    ours = [Tensor(array, requires_grad=True) for array in (x, *parameters)]
    theirs = [torch.tensor(array, requires_grad=True) for array in (x, *parameters)]
    their_running = [torch.tensor(array) for array in running]
    arguments = {"training": training, "momentum": momentum, "eps": 1e-3}
    out = F.batch_norm(ours[0], *running, *ours[1:], **arguments)
    expected = torch.nn.functional.batch_norm(theirs[0], *their_running, *theirs[1:], **arguments)
    np.testing.assert_allclose(out.data, expected.detach().numpy(), rtol=tolerance, atol=tolerance)
    for mine, peer in zip(running, their_running, strict=True):
        np.testing.assert_allclose(mine, peer.numpy(), rtol=tolerance, atol=tolerance)
        assert mine.dtype == dtype
    out.backward(g)
    expected.backward(torch.tensor(g))
    compare(ours, theirs, tolerance)


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    count=st.integers(1, 4),
    affine=st.booleans(),
    double=st.booleans(),
)
def test_layer_norm_equals_pytorch(shape: list[int], count: int, affine: bool, double: bool) -> None:
    """Any number of trailing dimensions, up to all of them."""
    torch = pytest.importorskip("torch")
    dtype, tolerance = (np.float64, 1e-9) if double else (np.float32, 2e-4)
    rng = np.random.default_rng(0)
    inner = shape[-min(count, len(shape)) :]
    arrays = [rng.standard_normal(s).astype(dtype) for s in (shape, *[inner] * (2 * affine))]
    g = rng.standard_normal(shape).astype(dtype)
    ours = [Tensor(array, requires_grad=True) for array in arrays]
    theirs = [torch.tensor(array, requires_grad=True) for array in arrays]
    out = F.layer_norm(ours[0], inner, *ours[1:], eps=1e-2)
    expected = torch.nn.functional.layer_norm(theirs[0], inner, *theirs[1:], eps=1e-2)
    np.testing.assert_allclose(out.data, expected.detach().numpy(), rtol=tolerance, atol=tolerance)
    out.backward(g)
    expected.backward(torch.tensor(g))
    compare(ours, theirs, tolerance)


@pytest.mark.parametrize("training", [True, False])
def test_a_large_mean_does_not_drown_the_variance(training: bool) -> None:
    """E[x²] − E[x]² would lose all digits in float32."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 2, 16, 16)) + 1000
    weight, bias = np.ones(2), np.zeros(2)
    running = x.mean((0, 2, 3)), x.var((0, 2, 3))
    exact = F.batch_norm(x, *(r.copy() for r in running), weight, bias, training).data
    arrays = [np.asarray(a, np.float32) for a in (x, *running, weight, bias)]
    np.testing.assert_allclose(F.batch_norm(*arrays, training).data, exact, atol=1e-3)


SHAPE = (4, 3, 5, 5)
N, C = 4 * 3 * 5 * 5, 3


@pytest.mark.parametrize(
    ("needs", "training", "affine", "kept"),
    [
        ("x", False, True, {"scale": C}),
        ("x", False, False, {"scale": C}),
        ("w", False, True, {"x": N, "mean": C, "inv_std": C}),
        ("b", False, True, {}),
        ("xw", False, True, {"scale": C, "x": N, "mean": C, "inv_std": C}),
        ("xwb", True, True, {"x": N, "mean": C, "inv_std": C, "weight": C}),
        ("x", True, True, {"x": N, "mean": C, "inv_std": C, "weight": C}),
        ("x", True, False, {"x": N, "mean": C, "inv_std": C}),
        ("w", True, True, {"x": N, "mean": C, "inv_std": C}),
        ("b", True, True, {}),
    ],
)
def test_what_batch_norm_keeps(needs: str, training: bool, affine: bool, kept: dict[str, int]) -> None:
    """Frozen, a number per channel; everything else only for the gradient that needs it."""
    x = Tensor(np.random.default_rng(0).standard_normal(SHAPE), requires_grad="x" in needs)
    weight, bias = (Tensor(np.ones(C), requires_grad=name in needs) for name in "wb")
    others = (weight, bias) if affine else ()
    report = tape(F.batch_norm(x, np.zeros(C), np.ones(C), *others, training=training))
    assert {entry.what: entry.nbytes // 8 for entry in report.entries} == kept


@pytest.mark.parametrize(
    ("needs", "kept"),
    [
        ("xwb", {"x": N, "mean": 60, "inv_std": 60, "weight": 5}),
        ("w", {"x": N, "mean": 60, "inv_std": 60}),
        ("b", {}),
    ],
)
def test_what_layer_norm_keeps(needs: str, kept: dict[str, int]) -> None:
    """The input and two numbers per row, and the weight only for the input's gradient."""
    x = Tensor(np.random.default_rng(0).standard_normal(SHAPE), requires_grad="x" in needs)
    weight, bias = (Tensor(np.ones(5), requires_grad=name in needs) for name in "wb")
    report = tape(F.layer_norm(x, 5, weight, bias))
    assert {entry.what: entry.nbytes // 8 for entry in report.entries} == kept


def test_frozen_gradients_survive_a_later_update_of_the_statistics() -> None:
    """The tape has its own copy of the mean: another batch in training mode does not spoil a gradient."""
    rng = np.random.default_rng(0)
    x, mean, var = rng.standard_normal((4, 2)), np.array([0.5, -1.0]), np.array([1.0, 2.0])
    weight, bias = Tensor(np.ones(2), requires_grad=True), Tensor(np.zeros(2))
    out = F.batch_norm(x, mean, var, weight, bias)
    expected = ((x - mean) / np.sqrt(var + 1e-5)).sum(axis=0)
    F.batch_norm(x, mean, var, training=True)
    out.backward(np.ones((4, 2)))
    np.testing.assert_allclose(weight.grad, expected)


def test_running_statistics_by_hand() -> None:
    """momentum 0.5 on mean 2, unbiased variance 2 (of 1, 2, 3, 2 ± ...): the unbiased one, as PyTorch's."""
    net = nn.BatchNorm2d(1, momentum=0.5)
    net(np.array([1.0, 3.0], np.float32).reshape(2, 1, 1, 1))
    np.testing.assert_allclose(net.running_mean, [1.0])  # (0 + 2) / 2
    np.testing.assert_allclose(net.running_var, [1.5])  # (1 + 2) / 2


def test_statistics_given_as_tensors_are_updated_and_noticed() -> None:
    """A tensor that batch norm writes into counts as changed for whoever saved it."""
    mean, var = Tensor(np.zeros(2)), Tensor(np.ones(2))
    x = Tensor(np.ones(2), requires_grad=True)
    loss = (x * mean).sum()
    F.batch_norm(np.random.default_rng(0).standard_normal((5, 2)), mean, var, training=True)
    assert (mean.data != 0).all()
    with pytest.raises(RuntimeError, match="changed after the forward"):
        loss.backward()


X = np.ones((2, 3, 4, 4))
CHANNELS = np.ones(3)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: F.batch_norm(X, np.ones(4), CHANNELS), ValueError, r"running_mean has shape \(4,\), expected \(3,\)"),
        (lambda: F.batch_norm(X, CHANNELS, CHANNELS, np.ones(2), np.ones(2)), ValueError, r"weight has shape \(2,\)"),
        (lambda: F.batch_norm(X, CHANNELS, CHANNELS, CHANNELS), ValueError, "bias is None, expected weight and bias"),
        (lambda: F.batch_norm(X, None, None), ValueError, "needed when training is False"),
        (lambda: F.batch_norm(X, CHANNELS, None, training=True), ValueError, "go together"),
        (lambda: F.batch_norm(X[:, 0, 0, 0], np.ones(1), np.ones(1)), ValueError, "at least 2 dimensions"),
        (
            lambda: F.batch_norm(X[:1, :, :1, :1], None, None, training=True),
            ValueError,
            "more than one value per channel",
        ),
        (lambda: F.batch_norm(X, CHANNELS, CHANNELS, eps=0), ValueError, "eps is 0"),
        (lambda: F.batch_norm(X, CHANNELS, CHANNELS, momentum=2), ValueError, "momentum is 2"),
        (lambda: F.batch_norm(X, CHANNELS.astype(np.float32), CHANNELS), TypeError, "float64.*float32"),
        (lambda: F.batch_norm(X, CHANNELS.astype(int), CHANNELS), TypeError, "running_mean has dtype int64"),
        (lambda: F.batch_norm(X.astype(int), CHANNELS, CHANNELS), TypeError, "x has dtype int64"),
        (
            lambda: F.batch_norm(X, Tensor(CHANNELS, requires_grad=True), CHANNELS),
            ValueError,
            "running_mean requires gradients",
        ),
        (lambda: F.layer_norm(X, 3), ValueError, r"layer_norm: x has shape .* end in normalized_shape \(3,\)"),
        (lambda: F.layer_norm(X, ()), ValueError, "normalized_shape"),
        (lambda: F.layer_norm(X, 4, CHANNELS, CHANNELS), ValueError, r"weight has shape \(3,\)"),
        (lambda: F.layer_norm(X, 4, bias=np.ones(4)), ValueError, "weight is None"),
        (lambda: F.layer_norm(X, 4, eps=-1), ValueError, "eps is -1"),
    ],
)
def test_bad_arguments_are_named(call: Any, error: type[Exception], says: str) -> None:
    """The message must say which argument, what came and what was expected."""
    with pytest.raises(error, match=says):
        call()


def test_a_refused_batch_leaves_the_statistics_alone() -> None:
    """Checks come before the update."""
    mean, var = np.zeros(3), np.ones(3)
    with pytest.raises(ValueError, match="weight"):
        F.batch_norm(X, mean, var, np.ones(2), np.ones(2), training=True)
    np.testing.assert_array_equal(mean, np.zeros(3))
