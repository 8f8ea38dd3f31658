"""Gradient clipping."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lance_ref import nn
from lance_ref.nn.utils import clip_grad_norm_


def parameters(*grads: Any) -> list[nn.Parameter]:
    """One parameter for each gradient, None for one that has none."""
    made = []
    for grad in grads:
        made.append(nn.Parameter(np.zeros(np.shape(grad) if grad is not None else 2, np.float32)))
        made[-1].grad = None if grad is None else np.asarray(grad, np.float32)
    return made


def test_norm_and_scaling_by_hand() -> None:
    """(3, 4) and (12,) have the joint norm 13; clipped to 6.5 everything is halved."""
    params = parameters([3, 4], None, [12])
    grad = params[0].grad
    assert clip_grad_norm_(iter(params), 6.5) == pytest.approx(13)
    assert params[0].grad is grad
    np.testing.assert_allclose(grad, [1.5, 2], rtol=1e-6)
    np.testing.assert_allclose(params[2].grad, [6], rtol=1e-6)
    assert params[0].grad.dtype == np.float32


def test_small_gradients_are_left_alone() -> None:
    """Never scaled up, and not touched at all."""
    params = parameters([3, 4])
    assert clip_grad_norm_(params, 6) == 5
    np.testing.assert_array_equal(params[0].grad, np.float32([3, 4]))
    assert clip_grad_norm_(params[0], 6) == 5  # one parameter, not in a list
    assert clip_grad_norm_([], 1) == 0
    assert clip_grad_norm_(parameters([0, 0]), 1) == 0


def test_equals_pytorch() -> None:
    """Norm and clipped gradients, with the same small number in the denominator."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    grads = [rng.standard_normal(shape).astype(np.float32) for shape in ((3, 4), (5,), ())]
    ours = parameters(*grads)
    theirs = [torch.nn.Parameter(torch.zeros(grad.shape)) for grad in grads]
    for peer, grad in zip(theirs, grads, strict=True):
        peer.grad = torch.tensor(grad)
    norm = torch.nn.utils.clip_grad_norm_(theirs, 0.7)
    assert clip_grad_norm_(ours, 0.7) == pytest.approx(float(norm), rel=1e-6)
    for mine, peer in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine.grad, peer.grad.numpy(), rtol=1e-5)


def test_large_float32_gradients_do_not_overflow() -> None:
    """1e30² is no float32."""
    params = parameters([1e30, 0])
    assert clip_grad_norm_(params, 1.0) == pytest.approx(1e30)
    np.testing.assert_allclose(params[0].grad, [1, 0], rtol=1e-6)


@pytest.mark.parametrize(("bad", "says"), [(np.nan, "is nan"), (np.inf, "is inf")])
def test_a_diverged_loss_is_named(bad: float, says: str) -> None:
    """Scaling NaN gives NaN weights; the gradients stay as they were for inspection."""
    params = parameters([1.0, bad], [2.0])
    with pytest.raises(ValueError, match=f"norm of the gradients {says}"):
        clip_grad_norm_(params, 1.0)
    np.testing.assert_array_equal(params[1].grad, [2])


@pytest.mark.parametrize("max_norm", [0, -1, float("nan")])
def test_bad_limits_are_named(max_norm: float) -> None:
    """A limit of zero would erase the gradients."""
    with pytest.raises(ValueError, match=f"max_norm is {max_norm}"):
        clip_grad_norm_(parameters([1.0]), max_norm)
