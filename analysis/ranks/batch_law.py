"""From spectra to ranks, and the spectrum of the batch mode at another batch size.

For shuffled data all images of a batch are alike in distribution, so the expected Gram matrix of the
batch mode is v·I + m·11ᵀ: E⟨aᵢ, aⱼ⟩ = m = ‖E a‖² for i ≠ j, and E‖a‖² = v + m. Its eigenvalues are
v + n·m once, and v for the other n − 1. Two numbers, fitted at one batch size, give it at any.

A measured spectrum is one of finitely many batches, and there the n − 1 small eigenvalues spread about
v. A Gram matrix averaged over a fixed number of batches spreads as a Marchenko-Pastur law does: the
square roots of its eigenvalues lie within about √v ± √v·√(n/N_eff), so the half-width of the square
roots grows with √n. :func:`batch_spectrum` therefore takes the measured bulk as it is, stretches its
square roots about their mean by √(n'/n), and rescales so that its mean stays v. At the measured batch
size that is the measured spectrum itself, and with ever more batches it becomes the plain law.
"""

from __future__ import annotations

import numpy as np


def rank_for_energy(energies: np.ndarray, epsilon: float) -> int:
    """The smallest r whose r largest energies hold at least the share ``epsilon``; all of them at 1.

    >>> rank_for_energy(np.array([6.0, 3.0, 1.0]), 0.7)
    2
    """
    if epsilon == 1:
        return energies.size
    kept = np.cumsum(np.sort(energies)[::-1])
    return int(np.searchsorted(kept, epsilon * kept[-1])) + 1


def fit_batch_law(energies: np.ndarray) -> tuple[float, float]:
    """(v, m) of the batch-mode spectrum v + n·m, v, v, …: from the largest eigenvalue and the trace.

    >>> fit_batch_law(np.array([14.0, 2.0, 2.0, 2.0]))
    (2.0, 3.0)
    """
    n = energies.size
    if n == 1:
        return 0.0, float(energies[0])  # one image a batch: v and m cannot be told apart, nor need they be
    largest = float(energies.max())
    v = (float(energies.sum()) - largest) / (n - 1)
    return v, (largest - v) / n


def batch_spectrum(energies: np.ndarray, n: int) -> np.ndarray:
    """The batch-mode spectrum to expect at batch size ``n``, descending, from one measured at another.

    ``energies`` are eigenvalues of the measured Gram matrix, summed or averaged over batches; the trace of the result
    is n·(v + m). ValueError if a single measured image a batch leaves v and m unknown, and ``n`` is larger than that.
    """
    measured = np.sort(energies)[::-1]
    if n == measured.size:
        return measured
    if measured.size == 1:
        raise ValueError(f"spectra measured with one image a batch say nothing about a batch of {n}")
    v, m = fit_batch_law(measured)
    places = (np.arange(n - 1) + 0.5) / (n - 1) if n > 1 else np.empty(0)
    roots = np.sqrt(measured[1:])
    known = (np.arange(roots.size) + 0.5) / roots.size
    stretch = np.sqrt(n / measured.size)
    bulk = np.maximum(roots.mean() + stretch * (np.interp(places, known, roots) - roots.mean()), 0.0) ** 2
    if n > 1 and v > 0:
        bulk *= v / bulk.mean()
    return np.sort(np.concatenate([[v + n * m], bulk]))[::-1]
