"""The definitions as sums written out: every number that the kit expects is computed here.

Nothing of the rest of the library is used, so that the library is checked like any other implementation. Sums are
rounded once (``math.fsum``) and nothing but + − × ÷ √ is used, which IEEE 754 fixes to the last bit: the expected
numbers are the same on every machine. That is slow, and meant for arrays of a few hundred numbers in float64.

A *geometry* is a mapping as it stands in the kit's JSON: ``kind`` ("conv" or "linear"), ``input_shape``,
``weight_shape``, ``output_shape``, and for a convolution ``stride``, ``padding``, ``dilation`` and ``groups``. Factors
are one (n, r) array per mode, or None for a mode that is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from typing import Any

import numpy as np

Geometry = Mapping[str, Any]
Factors = Sequence[np.ndarray | None]


def dot(a: np.ndarray, b: np.ndarray) -> float:
    """Σ a·b over all entries of two arrays of one shape, the sum rounded once."""
    return math.fsum((a * b).ravel().tolist())


def matrix_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(m, k) times (k, n)."""
    return np.array([[dot(row, column) for column in b.T] for row in a]).reshape(len(a), b.shape[1])


def mode_product(tensor: np.ndarray, matrix: np.ndarray, mode: int) -> np.ndarray:
    """A ×_n M: (.., n, ..) and (J, n) to (.., J, ..)."""
    rows = np.moveaxis(tensor, mode, -1)  # (.., n)
    product = matrix_product(rows.reshape(-1, rows.shape[-1]), matrix.T)
    return np.moveaxis(product.reshape(*rows.shape[:-1], len(matrix)), -1, mode)


# ---- a layer -----------------------------------------------------------------------------------


def windows(padded: np.ndarray, geometry: Geometry) -> Iterator[tuple[int, int, np.ndarray]]:
    """(h', w', what the kernel sees there) for each place of the output, a view (B, C_in, k_h, k_w) of the padded."""
    (s_h, s_w), (d_h, d_w) = geometry["stride"], geometry["dilation"]
    k_h, k_w = geometry["weight_shape"][2:]
    H_out, W_out = geometry["output_shape"][2:]
    for h in range(H_out):
        for w in range(W_out):
            rows = slice(s_h * h, s_h * h + d_h * (k_h - 1) + 1, d_h)
            columns = slice(s_w * w, s_w * w + d_w * (k_w - 1) + 1, d_w)
            yield h, w, padded[:, :, rows, columns]


def pad(activation: np.ndarray, geometry: Geometry) -> np.ndarray:
    """The activation with the zeros of the padding around it."""
    return np.pad(activation, ((0, 0), (0, 0), *map(tuple, geometry["padding"])))


def seen_by(output: int, geometry: Geometry) -> slice:
    """The input channels that an output channel sees: those of its group."""
    C_out, width = geometry["weight_shape"][:2]
    group = output // (C_out // geometry["groups"])
    return slice(group * width, (group + 1) * width)


def forward(activation: np.ndarray, weight: np.ndarray, bias: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Y[b,o,h,w] = bias[o] + Σ_{c,p,q} W[o,c,p,q] · X[b, c, s·h + d·p − top, s·w + d·q − left]; Y = X Wᵀ + bias."""
    if geometry["kind"] == "linear":
        return mode_product(activation, weight, activation.ndim - 1) + bias
    out = np.zeros(geometry["output_shape"])
    for h, w, window in windows(pad(activation, geometry), geometry):
        for o, kernel in enumerate(weight):
            for b, image in enumerate(window[:, seen_by(o, geometry)]):
                out[b, o, h, w] = dot(image, kernel) + bias[o]
    return out


def weight_gradient(activation: np.ndarray, grad_output: np.ndarray, geometry: Geometry) -> np.ndarray:
    """dW[o,c,p,q] = Σ_{b,h,w} G[b,o,h,w] · X[b, c, s·h + d·p − top, s·w + d·q − left]; dW = Gᵀ X."""
    if geometry["kind"] == "linear":
        O, I = geometry["weight_shape"]  # noqa: E741
        return matrix_product(grad_output.reshape(-1, O).T, activation.reshape(-1, I))
    C_out, _, k_h, k_w = geometry["weight_shape"]
    seen = np.stack([window for _, _, window in windows(pad(activation, geometry), geometry)])  # (L, B, C, k_h, k_w)
    places = grad_output.transpose(2, 3, 0, 1).reshape(-1, len(activation), C_out)  # (L, B, C_out)
    return np.array(
        [
            [
                [[dot(channel[:, :, p, q], places[:, :, o]) for q in range(k_w)] for p in range(k_h)]
                for channel in np.moveaxis(seen[:, :, seen_by(o, geometry)], 2, 0)
            ]
            for o in range(C_out)
        ]
    )


def input_gradient(weight: np.ndarray, grad_output: np.ndarray, geometry: Geometry) -> np.ndarray:
    """dX: G at each place times the kernel, added where the kernel looked; dX = G W."""
    if geometry["kind"] == "linear":
        return mode_product(grad_output, weight.T, grad_output.ndim - 1)
    padded = pad(np.zeros(geometry["input_shape"]), geometry)
    for h, w, window in windows(padded, geometry):
        for o, kernel in enumerate(weight):
            window[:, seen_by(o, geometry)] += grad_output[:, o, h, w][:, None, None, None] * kernel
    (top, _), (left, _) = geometry["padding"]
    H, W = geometry["input_shape"][2:]
    return padded[:, :, top : top + H, left : left + W].copy()


def bias_gradient(grad_output: np.ndarray, geometry: Geometry) -> np.ndarray:
    """db[o] = Σ G over everything but the output's features."""
    mode = 1 if geometry["kind"] == "conv" else grad_output.ndim - 1
    return np.array([math.fsum(part.ravel().tolist()) for part in np.moveaxis(grad_output, mode, 0)])


# ---- what LANCE keeps of it --------------------------------------------------------------------


def project(activation: np.ndarray, factors: Factors) -> np.ndarray:
    """S = A ×₁U_1ᵀ ×₂U_2ᵀ …"""
    for mode, U in enumerate(factors):
        activation = activation if U is None else mode_product(activation, U.T, mode)
    return activation


def expand(core: np.ndarray, factors: Factors) -> np.ndarray:
    """Ã = S ×₁U_1 ×₂U_2 …"""
    for mode, U in enumerate(factors):
        core = core if U is None else mode_product(core, U, mode)
    return core


# ---- subspaces -----------------------------------------------------------------------------------


def gram(matrices: Sequence[np.ndarray]) -> np.ndarray:
    """Σ_j R_j R_jᵀ of matrices with the same number of rows."""
    side_by_side = np.hstack(matrices)
    return matrix_product(side_by_side, side_by_side.T)


def unfold(tensor: np.ndarray, mode: int) -> np.ndarray:
    """A_(n): (n, everything else)"""
    return np.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1)


def patch_columns(activation: np.ndarray, geometry: Geometry) -> np.ndarray:
    """What the kernel of a convolution of one group sees: (C_in·k_h·k_w, B·L), the rows in the weight's order."""
    seen = [window.reshape(len(activation), -1) for _, _, window in windows(pad(activation, geometry), geometry)]
    return np.concatenate(seen).T


def eigenbasis(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, the largest first, and eigenvectors of a symmetric matrix, by Jacobi's rotations."""
    A, V = matrix.copy(), np.eye(len(matrix))
    for _ in range(60):
        outside = A - np.diag(np.diag(A))
        if dot(outside, outside) <= 1e-32 * dot(A, A):
            break
        for p in range(len(A)):
            for q in range(p + 1, len(A)):
                if A[p, q] != 0:
                    _rotate(A, V, p, q)
    order = np.argsort(-np.diag(A), kind="stable")
    return np.diag(A)[order], V[:, order]


def _rotate(A: np.ndarray, V: np.ndarray, p: int, q: int) -> None:
    """A ← JᵀAJ, V ← VJ with the rotation J of the axes p and q that makes A[p, q] zero."""
    slope = float(A[q, q] - A[p, p]) / (2 * float(A[p, q]))
    tangent = math.copysign(1.0, slope) / (abs(slope) + math.sqrt(slope * slope + 1))
    cosine = 1 / math.sqrt(tangent * tangent + 1)
    sine = tangent * cosine
    for M in (A.T, A, V):  # the rows of A, its columns, the columns of V
        first, second = M[:, p].copy(), M[:, q].copy()
        M[:, p], M[:, q] = cosine * first - sine * second, sine * first + cosine * second


def energy_rank(energies: np.ndarray, epsilon: float) -> int:
    """The smallest r with Σ_{i≤r} λ_i ≥ ε Σ λ_i, λ descending; all of them, exactly, for ε = 1."""
    if epsilon == 1:
        return len(energies)
    values = energies.tolist()
    return next(r for r in range(1, len(values) + 1) if math.fsum(values[:r]) >= epsilon * math.fsum(values))


def outside(K: np.ndarray, M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The n − m energies and eigenvectors of (I − MMᵀ) K (I − MMᵀ) in the null space of M."""
    n, m = M.shape
    P = np.eye(n) - matrix_product(M, M.T)
    inside = matrix_product(matrix_product(P, K), P)
    inside = (inside + inside.T) / 2
    # a negative eigenvalue for the directions of M puts them last, behind directions without energy
    energies, vectors = eigenbasis(inside - math.fsum(np.diag(K).tolist()) * (np.eye(n) - P))
    return np.maximum(energies[: n - m], 0.0), vectors[:, : n - m]


def calibrate(
    activations: Sequence[np.ndarray], epsilon: float, modes: Sequence[bool], protected: np.ndarray, mean_free: bool
) -> list[np.ndarray | None]:
    """Per mode the leading eigenvectors of Σ_j A^(j)_(n) A^(j)_(n)ᵀ, of A ×_f (I − MMᵀ) where M (n, m) has columns."""
    feature = 1 if activations[0].ndim == 4 else activations[0].ndim - 1
    columns = np.hstack([unfold(A, feature) for A in activations])
    M = protected
    if mean_free:
        mean = np.array([math.fsum(row.tolist()) / columns.shape[1] for row in columns])
        M = np.hstack([M, orthonormal(mean[:, None], M)])
    if M.shape[1]:
        P = np.eye(len(M)) - matrix_product(M, M.T)
        activations = [mode_product(A, P, feature) for A in activations]
    factors: list[np.ndarray | None] = []
    for mode, compressed in enumerate(modes):
        if not compressed:
            factors.append(None)
            continue
        K = gram([unfold(A, mode) for A in activations])
        energies, vectors = outside(K, M if mode == feature else np.zeros((len(K), 0)))
        r = energy_rank(energies, epsilon)
        check_clear_cut(energies, r, epsilon)
        factors.append(vectors[:, :r])
    return factors


def check_clear_cut(energies: np.ndarray, r: int, share: float, total: float | None = None) -> None:
    """Raise ValueError where rounding could decide the rank or the directions: such a case would be no test."""
    if r in (0, len(energies)) or energies[r] == 0 or energies[r] <= 1e-14 * energies[0]:
        return
    whole = math.fsum(energies.tolist()) if total is None else total
    before = whole - math.fsum(energies.tolist())
    kept = [(before + math.fsum(energies[:k].tolist())) / whole for k in (r - 1, r)]
    if energies[r - 1] - energies[r] < 0.02 * energies[0] or min(abs(k - share) for k in kept) < 1e-3:
        raise ValueError(f"{r} of the energies {energies} is no clear cut at {share}; choose other numbers")


def orthonormal(columns: np.ndarray, beside: np.ndarray | None = None) -> np.ndarray:
    """The columns made orthonormal, one after the other, and orthogonal to those ``beside`` them (Gram & Schmidt)."""
    given = np.zeros((len(columns), 0)) if beside is None else beside
    basis = list(given.T)
    for column in columns.T:
        rest = column / math.sqrt(dot(column, column))
        for _ in range(3):  # once more, and again, for what rounding left
            for other in basis:
                rest = rest - dot(rest, other) * other
            rest = rest / math.sqrt(dot(rest, rest))
        basis.append(rest)
    return np.stack(basis[given.shape[1] :], axis=1)


# ---- task after task -----------------------------------------------------------------------------


def update_protected(M: np.ndarray, K: np.ndarray, threshold: float) -> np.ndarray:
    """[M, V], V the k leading directions outside M, k ≥ 0 the smallest with tr(MᵀKM) + Σ_{i≤k} λ'_i ≥ θ · tr K."""
    energies, vectors = outside(K, M)
    total = math.fsum(np.diag(K).tolist())
    covered = total - math.fsum(energies.tolist())
    sums = [(covered + math.fsum(energies[:k].tolist())) / total for k in range(len(energies) + 1)]
    k = next(k for k, kept in enumerate(sums) if kept >= threshold - 1e-12)
    check_clear_cut(energies, k, threshold, total)
    return np.hstack([M, vectors[:, :k]])


def task_subspace(K: np.ndarray, M: np.ndarray, epsilon: float) -> np.ndarray:
    """The leading directions outside M that hold the share ε of the energy outside M."""
    energies, vectors = outside(K, M)
    r = energy_rank(energies, epsilon)
    check_clear_cut(energies, r, epsilon)
    return vectors[:, :r]


def protected_gradient(grad_weight: np.ndarray, M: np.ndarray) -> np.ndarray:
    """dW − (dW M) Mᵀ, the weight as a matrix (C_out, n)."""
    rows = grad_weight.reshape(len(grad_weight), -1)
    return (rows - matrix_product(matrix_product(rows, M), M.T)).reshape(grad_weight.shape)


def metrics(accuracy: np.ndarray, initial: np.ndarray) -> dict[str, float]:
    """ACC = mean_i R[T−1,i]; BWT = mean_{i<T−1} (R[T−1,i] − R[i,i]); FWT = mean_{i≥1} (R[i−1,i] − b[i])."""
    T, R = len(accuracy), accuracy.tolist()
    return {
        "acc": math.fsum(R[-1]) / T,
        "bwt": math.fsum(R[-1][i] - R[i][i] for i in range(T - 1)) / (T - 1),
        "fwt": math.fsum(R[i - 1][i] - float(initial[i]) for i in range(1, T)) / (T - 1),
    }


# ---- what it costs -------------------------------------------------------------------------------


def chain_macs(shape: Sequence[int], targets: Sequence[int | None]) -> int:
    """Multiply-adds of mode products that take each mode from its size to its target, in the cheapest order."""
    modes = [mode for mode, target in enumerate(targets) if target is not None]
    costs = []
    for order in permutations(modes):
        sizes, macs = list(shape), 0
        for mode in order:
            macs += math.prod(sizes) * (targets[mode] or 0)
            sizes[mode] = targets[mode] or 0
        costs.append(macs)
    return min(costs)


def projection_macs(shape: Sequence[int], factors: Factors) -> int:
    """Multiply-adds of S = A ×₁U_1ᵀ ×₂U_2ᵀ …"""
    return chain_macs(shape, _ranks(factors))


def weight_gradient_macs(factors: Factors, geometry: Geometry, order: str | None) -> int:
    """Multiply-adds of the weight gradient from the core.

    ``order`` is "papers" or "separable"; None for a linear layer, with Z = G projected on the factors of the outer
    modes the cheaper of (ZᵀS)U_Iᵀ and Zᵀ(SU_Iᵀ).
    """
    ranks = _ranks(factors)
    core = [n if r is None else r for n, r in zip(geometry["input_shape"], ranks, strict=True)]
    output, (C_out, width) = geometry["output_shape"], geometry["weight_shape"][:2]
    if geometry["kind"] == "linear":
        Z, m, r = chain_macs(output, (*ranks[:-1], None)), math.prod(core[:-1]), ranks[-1]
        if r is None:
            return Z + m * C_out * width
        return Z + min(m * C_out * r + C_out * r * width, m * r * width + m * C_out * width)
    k_h, k_w = geometry["weight_shape"][2:]
    (r1, _, r3, r4), (H, W) = core, geometry["input_shape"][2:]
    depth = width if ranks[1] is None else ranks[1]
    back = 0 if ranks[1] is None else C_out * k_h * k_w * depth * width  # ×₂ U_2
    if order == "papers":
        Z1 = chain_macs(output, (ranks[0], None, None, None))
        Z2 = chain_macs(core, (None, None, None if ranks[2] is None else H, None if ranks[3] is None else W))
        return Z1 + Z2 + r1 * math.prod(output[1:]) * depth * k_h * k_w + back
    Z = chain_macs(output, (ranks[0], None, k_h * r3, k_w * r4))
    return Z + C_out * k_h * k_w * depth * r1 * r3 * r4 + back


def _ranks(factors: Factors) -> list[int | None]:
    return [None if U is None else U.shape[1] for U in factors]
