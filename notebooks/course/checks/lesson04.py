"""Lesson 4: bytes of a core, the batch mode's law, and a weight gradient from a core."""

from __future__ import annotations

from typing import Any

import numpy as np

from course.checking import answered, exercise, whole_number


@exercise("4.1")
def core_bytes(answer: Any) -> str | None:
    numbers = 64 * 3 * 2 * 3
    hints = {
        numbers: "that is how many numbers it has; each takes 8 bytes",
        4 * numbers: "the lesson computes in float64: 8 bytes a number",
        8 * 17 * 3 * 2 * 3: "that is with 17 directions of the batch",
    }
    return whole_number(answer, 8 * numbers, hints, "the core has 64 × 3 × 2 × 3 numbers: why?")


@exercise("4.2")
def batch_rank(answer: Any) -> str | None:
    for v, m, n, epsilon in ((2.0, 1.0, 8, 0.7), (18.9, 131.0, 64, 0.95), (1.0, 5.0, 10, 0.5), (3.0, 0.5, 16, 0.99)):
        energies = np.array([v + n * m, *[v] * (n - 1)])
        right = int(np.argmax(np.cumsum(energies) >= (epsilon - 1e-12) * energies.sum())) + 1
        found = answered(answer(v, m, n, epsilon))
        if found != right:
            words = f"for v = {v}, m = {m}, n = {n}, ε = {epsilon} it gives {found}"
            return f"{words}; the energies are {v + n * m:g} once and {v:g} for the {n - 1} others"
    return None


@exercise("4.3")
def linear_weight_gradient(answer: Any) -> str | None:
    rng = np.random.default_rng(0)
    A, G = rng.standard_normal((7, 6)), rng.standard_normal((7, 5))
    U1, U2 = (np.linalg.qr(rng.standard_normal((n, r)))[0] for n, r in ((7, 2), (6, 3)))
    S = U1.T @ A @ U2
    found = np.asarray(answered(answer(G, S, U1, U2)))
    if found.shape != (5, 6):
        return f"for G (7, 5) and U2 (6, 3) it has the shape {found.shape}, expected (5, 6)"
    return None if np.allclose(found, G.T @ U1 @ S @ U2.T) else "the shape is right, the numbers are not"
