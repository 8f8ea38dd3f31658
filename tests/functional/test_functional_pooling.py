"""Pooling against PyTorch over random geometries, edges of the image, and bad arguments."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lance_ref import F, Tensor, nn, tape


@st.composite
def pools(draw: Any) -> tuple[tuple[int, ...], dict[str, Any]]:
    """An image shape and window arguments with a non-empty output."""
    H, W = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    stride = draw(st.one_of(st.none(), st.tuples(st.integers(1, 4), st.integers(1, 4))))
    assume(H + 2 * padding[0] >= kernel[0] and W + 2 * padding[1] >= kernel[1])
    return (draw(st.integers(1, 3)), draw(st.integers(1, 3)), H, W), {
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
    }


def compare_with_pytorch(name: str, x: np.ndarray, **arguments: Any) -> None:
    """Values and gradients of ours and PyTorch's function of that name."""
    torch = pytest.importorskip("torch")
    tolerance = 1e-12 if x.dtype == np.float64 else 1e-5
    ours, theirs = Tensor(x, requires_grad=True), torch.tensor(x, requires_grad=True)
    out = getattr(F, name)(ours, **arguments)
    expected = getattr(torch.nn.functional, name)(theirs, **arguments)
    assert out.shape == tuple(expected.shape)
    g = np.random.default_rng(1).standard_normal(out.shape).astype(x.dtype)
    out.backward(g)
    expected.backward(torch.tensor(g))
    np.testing.assert_allclose(out.data, expected.detach().numpy(), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(ours.grad, theirs.grad.numpy(), rtol=tolerance, atol=tolerance)


@given(pool=pools(), seed=st.integers(0, 99), levels=st.sampled_from([2, 5, 10**6]), double=st.booleans())
def test_max_pool_equals_pytorch(pool: Any, seed: int, levels: int, double: bool) -> None:
    """With few levels most windows have ties: the gradient must go where PyTorch sends it."""
    shape, arguments = pool
    x = np.random.default_rng(seed).integers(-levels, levels, shape).astype(np.float64 if double else np.float32)
    compare_with_pytorch("max_pool2d", x, **arguments)


@given(pool=pools(), include=st.booleans(), double=st.booleans())
def test_avg_pool_equals_pytorch(pool: Any, include: bool, double: bool) -> None:
    """Whether zeros outside count in the mean, for any padding and stride."""
    shape, arguments = pool
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float64 if double else np.float32)
    compare_with_pytorch("avg_pool2d", x, **arguments, count_include_pad=include)


@given(size=st.tuples(*[st.integers(1, 9)] * 2), output_size=st.tuples(*[st.integers(1, 9)] * 2))
def test_adaptive_pool_equals_pytorch(size: tuple[int, int], output_size: tuple[int, int]) -> None:
    """Windows that overlap, and outputs larger than the image."""
    x = np.random.default_rng(0).standard_normal((2, 3, *size))
    compare_with_pytorch("adaptive_avg_pool2d", x, output_size=output_size)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_window_of_minus_infinity_at_the_border(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The padding never wins, not even a tie: the gradient would be lost or land in another image."""
    if not compiled:
        monkeypatch.setattr("lance_ref.algebra.kernels.elementwise.numba_enabled", lambda: False)
    x = np.full((2, 2, 4, 5), -np.inf)
    compare_with_pytorch("max_pool2d", x, kernel_size=3, stride=2, padding=1)


@pytest.mark.parametrize("compiled", [True, False])
def test_nan_wins(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in PyTorch: a NaN in the window is its maximum, whatever comes before or after it."""
    if not compiled:
        monkeypatch.setattr("lance_ref.algebra.kernels.elementwise.numba_enabled", lambda: False)
    x = np.ones((1, 1, 4, 4))
    x[0, 0, 1, 0] = x[0, 0, 2, 3] = np.nan
    compare_with_pytorch("max_pool2d", x, kernel_size=2)


@pytest.mark.parametrize(("kernel", "dtype"), [((16, 16), "uint8"), ((1, 257), "uint16"), ((2, 2), "uint8")])
def test_positions_take_the_smallest_type(kernel: tuple[int, int], dtype: str) -> None:
    """A byte for windows of up to 256 elements."""
    x = Tensor(np.arange(16 * 257, dtype=np.float64).reshape(1, 1, 16, 257), requires_grad=True)
    out = F.max_pool2d(x, kernel)
    (entry,) = tape(out).entries
    assert (entry.what, entry.dtype, entry.shape) == ("argmax", dtype, out.shape)
    out.backward(np.ones(out.shape))
    assert x.grad is not None
    np.testing.assert_array_equal(x.data[x.grad == 1], np.sort(out.data.reshape(-1)))


def test_not_contiguous_images() -> None:
    """Channels-last images, seen through a transpose, pool like their copies."""
    images = np.random.default_rng(0).standard_normal((2, 6, 5, 3)).transpose(0, 3, 1, 2)
    for call in (
        lambda x: F.max_pool2d(x, 2),
        lambda x: F.avg_pool2d(x, 3, 2, 1),
        lambda x: F.adaptive_avg_pool2d(x, (2, 3)),
    ):
        np.testing.assert_allclose(call(images).data, call(np.ascontiguousarray(images)).data, rtol=1e-12, atol=1e-15)


X = np.ones((2, 3, 5, 6))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: F.max_pool2d(X, 6), ValueError, r"max_pool2d: the output would be empty, \(2, 3, 0, 1\).*kernel_size"),
        (lambda: F.avg_pool2d(X, (1, 7)), ValueError, r"avg_pool2d: the output would be empty.*\(2, 3, 5, 6\)"),
        (lambda: F.max_pool2d(X[0], 2), ValueError, r"max_pool2d: x has shape \(3, 5, 6\).*\(B, C, H, W\)"),
        (lambda: F.avg_pool2d(X[0], 2), ValueError, "avg_pool2d: x has shape"),
        (lambda: F.adaptive_avg_pool2d(X[0], 2), ValueError, "adaptive_avg_pool2d: x has shape"),
        (lambda: F.adaptive_avg_pool2d(np.ones((2, 3, 0, 4)), 1), ValueError, "non-empty image"),
        (lambda: F.max_pool2d(X, 0), ValueError, "kernel_size is 0"),
        (lambda: F.max_pool2d(X, (2, 2, 2)), ValueError, r"kernel_size is \(2, 2, 2\)"),
        (lambda: F.max_pool2d(X, 2.0), ValueError, "kernel_size is 2.0"),
        (lambda: F.max_pool2d(X, 2, 0), ValueError, "stride is 0"),
        (lambda: F.max_pool2d(X, 2, 1, -1), ValueError, "padding is -1"),
        (lambda: F.max_pool2d(X, 3, 1, 2), ValueError, r"max_pool2d: padding is \(2, 2\), expected at most half"),
        (lambda: F.avg_pool2d(X, 3, 1, (0, 2)), ValueError, r"padding is \(0, 2\)"),
        (lambda: F.adaptive_avg_pool2d(X, 0), ValueError, "output_size is 0"),
        (lambda: F.max_pool2d(X.astype(int), 2), TypeError, "max_pool2d.*int64"),
    ],
)
def test_bad_arguments_are_named(call: Any, error: type[Exception], says: str) -> None:
    """The message must say which argument, what came and what was expected."""
    with pytest.raises(error, match=says):
        call()


@pytest.mark.parametrize(("asked", "meant"), [((None, 2), (5, 2)), ((3, None), (3, 6)), (None, (5, 6))])
def test_none_is_the_size_of_the_image(asked: Any, meant: tuple[int, int]) -> None:
    """As PyTorch has it, in the function and in the layer."""
    x = np.random.default_rng(0).standard_normal((2, 3, 5, 6))
    wanted = F.adaptive_avg_pool2d(x, meant).data
    np.testing.assert_array_equal(F.adaptive_avg_pool2d(x, asked).data, wanted)
    np.testing.assert_array_equal(nn.AdaptiveAvgPool2d(asked)(Tensor(x)).data, wanted)


@pytest.mark.parametrize("wrong", [(None, 0), (None, 2, 2), (2.5, None), ("a", "b")])
def test_none_excuses_nothing_else(wrong: Any) -> None:
    """The other number is checked as ever."""
    for call in (lambda: F.adaptive_avg_pool2d(np.zeros((1, 1, 4, 4)), wrong), lambda: nn.AdaptiveAvgPool2d(wrong)):
        with pytest.raises(ValueError, match="output_size"):
            call()
