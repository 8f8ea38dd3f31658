"""Initial weights: PyTorch's distribution, repeatable seeds, and networks that are shapes alone."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from lance_ref import manual_seed, nn, trace
from lance_ref.nn import init


def test_bounds_are_pytorchs() -> None:
    """U(±1/√fan_in) for weight and bias: the extremes of many draws nearly touch the bound, PyTorch's too."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    for ours, theirs, fan_in in (
        (nn.Conv2d(32, 64, 3, groups=2, rng=0), torch.nn.Conv2d(32, 64, 3, groups=2), 16 * 9),
        (nn.Linear(100, 2000, rng=0), torch.nn.Linear(100, 2000), 100),
    ):
        bound = 1 / np.sqrt(fan_in)
        for mine, peer in ((ours.weight.data, theirs.weight), (ours.bias.data, theirs.bias)):
            values = peer.detach().numpy()
            assert mine.dtype == np.float32
            for array in (mine, values):
                assert 0.9 * bound < np.abs(array).max() <= bound * (1 + 1e-6)
            assert mine.std() == pytest.approx(bound / np.sqrt(3), rel=0.15)
            assert abs(mine.mean()) < 6 * bound / np.sqrt(3 * mine.size)


def test_norm_layers_start_as_the_identity() -> None:
    """Weight 1, bias 0, mean 0, variance 1."""
    norm = nn.BatchNorm2d(3)
    assert [a.tolist() for a in (norm.weight.data, norm.bias.data)] == [[1, 1, 1], [0, 0, 0]]
    assert [a.tolist() for a in (norm.running_mean, norm.running_var)] == [[0, 0, 0], [1, 1, 1]]


def test_seeds_repeat() -> None:
    """An explicit seed, a generator, and the default generator after manual_seed."""
    first = nn.Linear(4, 3, rng=7).weight.data
    np.testing.assert_array_equal(nn.Linear(4, 3, rng=7).weight.data, first)
    assert (nn.Linear(4, 3, rng=8).weight.data != first).any()
    rng = np.random.default_rng(7)
    np.testing.assert_array_equal(nn.Linear(4, 3, rng=rng).weight.data, first)
    assert (nn.Linear(4, 3, rng=rng).weight.data != first).any()
    manual_seed(3)
    default = nn.Linear(4, 3).weight.data
    assert (nn.Linear(4, 3).weight.data != default).any()
    manual_seed(3)
    np.testing.assert_array_equal(nn.Linear(4, 3).weight.data, default)
    assert init.as_generator() is init.as_generator(None)


@pytest.mark.parametrize("seed", [-1, 1.0, "0", True])
def test_bad_seeds_are_named(seed: object) -> None:
    """NumPy would take some of these, or fail with words of its own."""
    with pytest.raises(ValueError, match=r"seed is .*expected a non-negative integer"):
        manual_seed(seed)  # type: ignore[arg-type]


def test_shapes_only_takes_no_memory() -> None:
    """A linear layer of 40 GB can be made and traced, but not run; outside everything is as before."""
    tracemalloc.start()
    try:
        with init.shapes_only():
            net = nn.Sequential(nn.Linear(100_000, 100_000), nn.BatchNorm2d(8), nn.LayerNorm(50))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert all(parameter.is_meta and parameter.requires_grad for parameter in net.parameters())
    assert [r.output.shape for r in trace(net[:1], (2, 100_000))] == [(2, 100_000)]
    with pytest.raises(RuntimeError, match="has no data"):
        net.state_dict()
    assert not nn.Linear(2, 2).weight.is_meta


def test_shapes_only_ends_with_an_error_inside() -> None:
    """A layer that cannot be made must not leave the switch on."""
    with init.shapes_only(), pytest.raises(ValueError, match="in_features"):
        nn.Linear(0, 1)
    with pytest.raises(ValueError, match="in_features"), init.shapes_only():
        nn.Linear(0, 1)
    assert not nn.Linear(2, 2).weight.is_meta
