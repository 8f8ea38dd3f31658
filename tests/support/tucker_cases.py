"""Activations of known ranks, and what a core and its factors stand for, by other means than the library's."""

from __future__ import annotations

from typing import Any

import numpy as np

LETTERS = "abcd"


def low_rank(shape: tuple[int, ...], ranks: tuple[int, ...], seed: int, dtype: Any = np.float64) -> np.ndarray:
    """An activation whose unfoldings have at most these ranks, and its directions in general position."""
    rng = np.random.default_rng(seed)
    tensor = rng.standard_normal(ranks)
    for mode, n in enumerate(shape):
        tensor = np.moveaxis(np.tensordot(rng.standard_normal((n, ranks[mode])), tensor, (1, mode)), 0, mode)
    return tensor.astype(dtype)


def rebuild(saved: dict[str, np.ndarray]) -> np.ndarray:
    """Ã = S ×₁U_1 ×₂U_2 … by one einsum, formed in full."""
    core = saved["core"]
    modes = [mode for mode in range(core.ndim) if f"factor_{mode}" in saved]
    terms = [LETTERS[: core.ndim]] + [LETTERS[mode].upper() + LETTERS[mode] for mode in modes]
    result = "".join(LETTERS[mode].upper() if mode in modes else LETTERS[mode] for mode in range(core.ndim))
    return np.einsum(f"{','.join(terms)}->{result}", core, *(saved[f"factor_{mode}"] for mode in modes))


def singular(x: np.ndarray, mode: int) -> tuple[np.ndarray, np.ndarray]:
    """Left singular vectors and energies of an unfolding, by NumPy's SVD."""
    U, s, _ = np.linalg.svd(np.moveaxis(x, mode, 0).reshape(x.shape[mode], -1))
    return U, np.concatenate([s**2, np.zeros(x.shape[mode] - len(s))])
