"""Small networks and data, and what calibration should see of them; shared by the calibration tests."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.testing import assert_allclose

from lance_ref import Calibration, F, Tensor, nn


class ThreeLayers(nn.Module):
    """conv (2 → 4, stride 2), conv in two groups (4 → 6), linear head; dropout between, which eval mode must stop."""

    def __init__(self, dtype: Any = np.float64) -> None:
        super().__init__()
        rng = np.random.default_rng(0)
        self.conv1 = nn.Conv2d(2, 4, 3, stride=2, padding=1, rng=rng)
        self.drop = nn.Dropout(0.5)
        self.conv2 = nn.Conv2d(4, 6, (1, 2), groups=2, rng=rng)
        self.head = nn.Linear(6, 3, rng=rng)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(F.relu(self.conv1(x)))
        return self.head(self.conv2(x).mean((2, 3)))


class Tokens(nn.Module):
    """One linear layer on (B, L, I)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2, rng=np.random.default_rng(0)).to(np.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def batches(count: int = 3, B: int = 5, seed: int = 0, dtype: Any = np.float64) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((B, 2, 7, 5)).astype(dtype) for _ in range(count)]


def layer_inputs(net: ThreeLayers, x: np.ndarray) -> dict[str, np.ndarray]:
    """The inputs of the three layers in evaluation mode, without the library's hooks."""
    hidden = F.relu(net.conv1(Tensor(x)))
    pooled = net.conv2(hidden).mean((2, 3))
    return {"conv1": x, "conv2": hidden.detach().data, "head": pooled.detach().data}


def assert_same(a: Calibration, b: Calibration, **tolerance: float) -> None:
    """Same layers, ranks and spectra; the same subspaces as projectors."""
    assert list(a) == list(b)
    for path in a:
        left, right = a[path], b[path]
        for attribute in ("shape", "ranks", "samples", "batches"):
            assert getattr(left, attribute) == getattr(right, attribute), (path, attribute)
        for U, V, s, t in zip(left.factors, right.factors, left.spectra, right.spectra, strict=True):
            assert (U is None) == (V is None)
            if U is not None and V is not None:
                assert_allclose(s, t, **tolerance)
                assert_allclose(U @ U.T, V @ V.T, **tolerance)
