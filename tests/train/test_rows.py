"""``fit`` and ``evaluate`` on arrays and on batches of them, whatever their floating type."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lance_ref import evaluate, fit, nn, tune
from lance_ref.nn.module import Module

RNG = np.random.default_rng(0)
Y = RNG.integers(0, 3, 96)
X = RNG.standard_normal((96, 5)) + 2 * np.eye(3, 5)[Y]


def net() -> Module:
    made = nn.Sequential(nn.Linear(5, 8, rng=0), nn.ReLU(), nn.Linear(8, 3, rng=1))
    tune(made, "all")
    return made


def weights(data: Any, **options: Any) -> np.ndarray:
    made = net()
    fit(made, data, epochs=2, batch_size=16, **options)
    return made[0].weight.data


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_arrays_of_any_floating_type(dtype: Any) -> None:
    """In the network's own type; the same as batches of the same rows, in any number and from a generator."""
    x = X.astype(dtype)
    arrays = weights((x, Y))
    assert arrays.dtype == np.float32
    np.testing.assert_array_equal(arrays, weights([(x[:50], Y[:50]), (x[50:], Y[50:])]))
    np.testing.assert_array_equal(arrays, weights((x[i : i + 32], Y[i : i + 32]) for i in range(0, 96, 32)))
    np.testing.assert_array_equal(arrays, weights((x, Y.astype(np.uint8))))


def test_they_are_learned_and_evaluated() -> None:
    """Better than chance, and the report says that nothing was cached."""
    made = net()
    result = fit(made, (X, Y), (X[:40], Y[:40]), epochs=20, batch_size=16, lr=0.2)
    assert result.test_accuracy == evaluate(made, (X[:40], Y[:40]))
    assert result.test_accuracy is not None
    assert result.test_accuracy > 0.7
    assert not result.cached
    assert result.cache_note == "The whole network ran at every step: arrays were given."


def test_indices_stay_integers() -> None:
    """Rows of a table are not made floating."""

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 4, rng=0), nn.Linear(4, 2, rng=1)

        def forward(self, x: Any) -> Any:
            return self.head(self.table(x).mean(1))

    words = RNG.integers(0, 9, (32, 6))
    assert fit(Words(), (words, words[:, 0] % 2), epochs=1, batch_size=8).steps == 4


BAD: dict[str, tuple[Any, str]] = {
    "lengths": ((X, Y[:-1]), "labels \\(95,\\)"),
    "labels": ((X, Y.astype(float)), "expected \\(N, ...\\) numbers and \\(N,\\) integers"),
    "negative": ((X, Y - 1), "labels run from -1"),
    "nan": ((X * np.nan, Y), "NaN or infinite"),
    "none": ([], "train is empty: no batches"),
    "a batch": ([X], "batch 0 is a ndarray, expected a pair"),
    "two shapes": ([(X, Y), (X[:, :4], Y)], "expected one shape"),
    "text": ("digits", "train is a str, expected a Dataset, Features"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_named(case: str) -> None:
    """What came, and what was expected."""
    data, words = BAD[case]
    with pytest.raises((ValueError, TypeError), match=words):
        fit(net(), data, epochs=1, batch_size=16)
    with pytest.raises(ValueError, match=r"normalise is 0\.5, but train is arrays"):
        fit(net(), (X, Y), epochs=1, batch_size=16, normalise=0.5)
