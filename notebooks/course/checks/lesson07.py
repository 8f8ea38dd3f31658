"""Lesson 7: bytes beside GPM's, Adam's step, and directions in a null space."""

from __future__ import annotations

from typing import Any

import numpy as np

from course.checking import answered, exercise, whole_number


@exercise("7.1")
def lance_bytes(answer: Any) -> str | None:
    core, factors = 4 * 20 * 20, 4 * (32 * 20 + 100 * 20)
    hints = {
        core: "that is the tape alone; the factors are in RAM beside it",
        factors: "that is the factors alone; the core is on the tape",
        core + factors + 4 * 100 * 30: "LANCE does not need M while it trains",
        (core + factors) // 4: "that is how many numbers; each takes 4 bytes",
    }
    return whole_number(answer, core + factors, hints, "a core of 20 × 20, and factors of 32 × 20 and 100 × 20")


@exercise("7.2")
def along_protected(answer: Any) -> str | None:
    found = abs(float(answer))
    if found < 1e-3:
        return "that is the part of the gradient itself; take its sign entry by entry first"
    if np.isclose(found, 1, atol=1e-3):
        return "the direction M has length 1: divide by √5"
    return None if np.isclose(found, 1 / np.sqrt(5), atol=1e-3) else "multiply (1, −1) with (2, 1)/√5"


@exercise("7.3")
def free_directions(answer: Any) -> str | None:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((7, 20)) * np.array([5, 4, 3, 2, 1.5, 1, 0.5])[:, None]
    M, K = np.linalg.qr(rng.standard_normal((7, 2)))[0], X @ X.T
    U = np.asarray(answered(answer(K.copy(), M.copy(), 3)))
    if U.shape != (7, 3):
        return f"for n = 7 and r = 3 it has the shape {U.shape}, expected (7, 3)"
    if not np.allclose(U.T @ U, np.eye(3)):
        return "the columns are not orthonormal"
    if not np.allclose(U.T @ M, 0):
        return "a column has a part along M"
    N = np.linalg.qr(M, mode="complete")[0][:, 2:]
    best = np.linalg.eigvalsh(N.T @ K @ N)[-3:].sum()
    kept = np.trace(U.T @ K @ U)
    return None if np.isclose(kept, best) else f"the directions hold {kept / best:.0%} of what the leading ones would"
