"""When the compressed weight gradient points downhill and when not: the mathematics, and cases to try it on.

Every store here gives the weight gradient of Ã = A ×₁Q_1 ×₂Q_2 …, each Q_n = U_n U_nᵀ an orthogonal projection, or the
identity for a mode left alone. Write the activation of a linear layer or a 1×1 convolution as a matrix A (N, I), a row
for each image, token or pixel; let Q (N, N) be the Kronecker product of the projections of all modes but the feature
mode, and P (I, I) that of the feature mode. With the output gradient G (N, O)

    dW = Gᵀ A,    dŴ = Gᵀ Q A P,    ⟨dW, dŴ⟩ = tr(Gᵀ Q K G),    K = A P Aᵀ.

1. Feature mode alone (Q = I): dŴ = dW P, so ⟨dW, dŴ⟩ = ‖dŴ‖² ≥ 0. A convolution of one group with any kernel has
   dŴ = dW ×₂ P as well. With several groups it has not: Ã mixes the channels of different groups, each group's gradient
   sees its own rows of P only, and it may point against the true one (:data:`GROUPS`).

2. Otherwise ⟨dW, dŴ⟩ ≥ 0 for *every* G if and only if Q K = K Q. The product of commuting positive semidefinite
   matrices is positive semidefinite. Conversely let M = (Q K + K Q)/2 be positive semidefinite and Q v = 0. Then
   vᵀM v = 0, so that M v = 0, that is Q K v = 0. Hence Q K (I − Q) = 0, and Q K = Q K Q is symmetric: Q K = K Q.
   A fixed U_1 knows nothing of A, so they do not commute (:data:`FIXED_BATCH_MODE`, cosine −1).

3. HOSVD of the very batch, A of two modes: let A = Σ σ_i u_i v_iᵀ, with U_1 = (u_1 … u_r1) and U_2 = (v_1 … v_r2). Then
   K = Σ_{i≤r2} σ_i² u_i u_iᵀ commutes with Q = Σ_{i≤r1} u_i u_iᵀ, and with k = min(r1, r2)

       Ã = U_1 U_1ᵀ A U_2 U_2ᵀ = Σ_{i≤k} σ_i u_i v_iᵀ = A V_k V_kᵀ,    dŴ = dW V_k V_kᵀ:

   an orthogonal projection again. This needs u_i and v_i that belong together. Where σ_r = σ_{r+1}, eigenvectors of
   A Aᵀ and of Aᵀ A may be chosen that do not, and the claim fails (:data:`EQUAL_SINGULAR_VALUES`).

4. HOSVD of the very batch, three or four modes: Q is a product over batch, height and width, each factor the leading
   directions of its own unfolding, and there is no reason for it to commute with K; :data:`HOSVD_4D` has cosine −1.

5. A sketched batch mode: E[dŴ] = dW ×₂ P, a descent direction in the mean; a single draw need not be.

How often, if A and G are noise and U_1 of rank r knows nothing of them: dW = X + Y, X = dŴ = Gᵀ Q A from r directions
of the batch and Y from the other B − r. Take their n = I·O entries as independent normal, of variances r and B − r.
Then ⟨dW, dŴ⟩ = ‖X‖² + ⟨X, Y⟩ is negative where a standard normal lies below −‖X‖/√(B − r), that is with the probability

    P(T_n < −√(n r/(B − r))),    T_n of Student's t distribution with n degrees of freedom (:func:`chance`).

One weight and r = B/4 give 1/3, 16 weights 0.017, thousands of independent weights nothing that can be observed. In
training the entries are far from independent, and :mod:`experiments.descent.command` sees it in a layer of 144 weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from lance_ref import Subspace
from lance_ref.algebra.geometry import ConvGeometry, Geometry, LinearGeometry
from lance_ref.algebra.subspace import mode_names
from lance_ref.stores import ActivationStore, Hosvd, Lance
from lance_ref.stores.sketch import sketch_variance

ROUNDING = 1e-10
"""Cosines in float64 above −ROUNDING do not count as negative."""
FLOAT32_ROUNDING = 1e-5
"""The same for gradients in float32."""
ALIGNMENTS = (0.0, 0.5, 0.9, 1.0)
BATCHES = (2, 4, 8, 16, 32)
RANK_SHARES = (1 / 8, 1 / 4, 1 / 2)
SIZES = ((1, 1), (4, 4), (16, 16))
"""(I, O) of the linear layers whose batch mode is compressed."""

KINDS = (
    "linear (B, I)",
    "linear (B, L, I)",
    "1x1 convolution",
    "3x3 convolution",
    "3x3 in two groups",
    "3x3 depthwise",
)


class Example(NamedTuple):
    """A layer's arrays, small enough to check by hand; ``exact`` is dW and ``compressed`` dŴ, by hand."""

    geometry: Geometry
    activation: np.ndarray
    grad_output: np.ndarray
    factors: tuple[np.ndarray | None, ...]
    exact: np.ndarray
    compressed: np.ndarray


def _column(*values: float) -> np.ndarray:
    return np.array(values, dtype=float)[:, None]


FIXED_BATCH_MODE = Example(
    LinearGeometry((2, 1), (1, 1)), _column(1, 2), _column(1, -1), (_column(1, 0), None), _column(-1), _column(1)
)
"""Two images of one number each; calibrated on (1, 0), U_1 = e_1. dW = 1·1 − 1·2 = −1, but dŴ = 1·1 = 1."""

GROUPS = Example(
    ConvGeometry((1, 2, 1, 1), (2, 1, 1, 1), groups=2),
    np.array([2.0, -4]).reshape(1, 2, 1, 1),
    np.array([1.0, 0]).reshape(1, 2, 1, 1),
    (None, _column(1, 1) / np.sqrt(2), None, None),
    np.array([2.0, 0]).reshape(2, 1, 1, 1),
    np.array([-1.0, 0]).reshape(2, 1, 1, 1),
)
"""A depthwise 1×1 convolution. P averages the channels (2, −4) to (−1, −1): dW = (2, 0), but dŴ = (−1, 0)."""

EQUAL_SINGULAR_VALUES = Example(
    LinearGeometry((2, 2), (1, 2)),
    np.array([[1.0, -1], [1, 1]]),
    _column(2, 1),
    (_column(0, 1), _column(0, 1)),
    np.array([[3.0, -1]]),
    np.array([[0.0, 1]]),
)
"""A Aᵀ = Aᵀ A = 2 I, so that e_2 is a leading direction of both modes. dW = 2·(1, −1) + (1, 1); dŴ = (0, 1)."""

HOSVD_4D = Example(
    ConvGeometry((2, 1, 2, 1), (1, 1, 1, 1)),
    np.diag([2.0, 1]).reshape(2, 1, 2, 1),
    np.diag([1.0, -3]).reshape(2, 1, 2, 1),
    (_column(1, 0), None, _column(1, 0), None),
    np.full((1, 1, 1, 1), -1.0),
    np.full((1, 1, 1, 1), 2.0),
)
"""Images (2, 0) and (0, 1) of one channel and two rows. ε = 0.7 keeps the first image and the first row, which hold
4/5 of the energy: Ã is 2 there and 0 elsewhere. dW = 2·1 − 1·3 = −1, but dŴ = 2·1 = 2."""

EXAMPLES = {
    "fixed batch mode": FIXED_BATCH_MODE,
    "channel mode, groups": GROUPS,
    "HOSVD, equal singular values": EQUAL_SINGULAR_VALUES,
    "HOSVD, four modes": HOSVD_4D,
}


# ---- one cosine ---------------------------------------------------------------------------------


def cosine(dW: np.ndarray, dW_hat: np.ndarray) -> float:
    """⟨dW, dŴ⟩ / (‖dW‖ ‖dŴ‖), and 0 where one of them is 0."""
    a, b = dW.astype(np.float64).ravel(), dW_hat.astype(np.float64).ravel()
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms > 0 else 0.0


def fixed_store(shape: Sequence[int], factors: Sequence[np.ndarray | None], **options: Any) -> Lance:
    """A Lance store in float64 with these factors."""
    names = mode_names(shape)
    return Lance(Subspace(tuple(shape), names, tuple(factors), (None,) * len(names)), dtype=np.float64, **options)


def both_gradients(
    g: Geometry, store: ActivationStore, activation: np.ndarray, grad_output: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """dW and dŴ of one layer and batch."""
    return g.weight_gradient(activation, grad_output), store.weight_gradient(store.save(activation), grad_output, g)


def worst_grad_output(g: Geometry, store: ActivationStore, activation: np.ndarray) -> tuple[float, np.ndarray]:
    """The output gradient G with ‖G‖ = 1 that makes ⟨dW, dŴ⟩ least, and that least value.

    dW and dŴ are linear in G: with a column for each entry of G, ⟨dW, dŴ⟩ = gᵀ Mᵀ M̂ g, and the wanted g is the first
    eigenvector of (Mᵀ M̂ + M̂ᵀ M)/2. ``store`` must give the same factors whenever it saves ``activation``.
    """
    size = int(np.prod(g.output_shape))
    columns = [both_gradients(g, store, activation, e.reshape(g.output_shape)) for e in np.eye(size)]
    M, M_hat = (np.stack([pair[i].ravel() for pair in columns], axis=1) for i in (0, 1))
    values, vectors = np.linalg.eigh((M.T @ M_hat + M_hat.T @ M) / 2)
    return float(values[0]), vectors[:, 0].reshape(g.output_shape)


# ---- random cases ---------------------------------------------------------------------------------

Draw = Callable[[], tuple[Geometry, ActivationStore, np.ndarray, np.ndarray]]
"""One random case: geometry, store, activation, output gradient."""


def summary(cosines: Sequence[float], rounding: float = ROUNDING) -> dict[str, Any]:
    """How many, the share that is negative, the least and the median."""
    values = np.array(cosines)
    return {
        "trials": len(values),
        "negative": float(np.mean(values < -rounding)),
        "least": round(float(values.min()), 6),
        "median": round(float(np.median(values)), 6),
    }


def tally(draw: Draw, trials: int) -> dict[str, Any]:
    return summary([cosine(*both_gradients(*draw())) for _ in range(trials)])


def random_geometry(kind: str, rng: np.random.Generator) -> Geometry:
    """A small layer; 4-D inputs are at least 2 wide in batch, height and width, so that modes can be cut."""
    B, I, O, L, H, W = (int(n) for n in rng.integers(2, 5, 6))  # noqa: E741
    if kind == "linear (B, I)":
        return LinearGeometry((B, I), (O, I))
    if kind == "linear (B, L, I)":
        return LinearGeometry((B, L, I), (O, I))
    if kind == "1x1 convolution":
        return ConvGeometry((B, I, H, W), (O, I, 1, 1))
    if kind == "3x3 convolution":
        return ConvGeometry((B, I, H, W), (O, I, 3, 3), padding=((1, 1), (1, 1)))
    if kind == "3x3 in two groups":
        return ConvGeometry((B, 2 * I, H, W), (2 * O, I, 3, 3), padding=((1, 1), (1, 1)), groups=2)
    if kind == "3x3 depthwise":
        return ConvGeometry((B, I, H, W), (I, 1, 3, 3), padding=((1, 1), (1, 1)), groups=I)
    raise ValueError(f"kind is {kind!r}, expected one of {KINDS}")


def normal(g: Geometry, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return rng.standard_normal(g.input_shape), rng.standard_normal(g.output_shape)


def one_mode_cases(trials: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Claims 1 and 2: random fixed directions of a single mode, for every kind of layer."""
    for kind, mode in itertools.product(KINDS, range(4)):
        names = mode_names(random_geometry(kind, rng).input_shape)
        if mode >= len(names):
            continue

        def draw(kind: str = kind, mode: int = mode) -> tuple[Geometry, ActivationStore, np.ndarray, np.ndarray]:
            g = random_geometry(kind, rng)
            shape = g.input_shape
            ranks = [int(rng.integers(1, n + 1)) if i == mode else None for i, n in enumerate(shape)]
            return g, fixed_store(shape, Subspace.random(shape, ranks, rng).factors), *normal(g, rng)

        yield {"layer": kind, "mode": names[mode], **tally(draw, trials)}


def ranks_of(B: int) -> list[int]:
    """The ranks that :data:`RANK_SHARES` give for a batch, each once."""
    return sorted({max(1, round(share * B)) for share in RANK_SHARES})


def chance(B: int, r: int, weights: int) -> float:
    """P(T_n < −√(n r/(B − r))), n weights: how often r directions of B that know nothing of the batch mislead."""
    from scipy.special import stdtr

    return float(stdtr(weights, -np.sqrt(weights * r / (B - r))))


def batch_mode_cases(trials: int, rng: np.random.Generator, batches: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Claim 2: U_1 of a calibration batch αA + √(1 − α²)E; (B, I) to (B, O), the feature mode left alone."""
    for B, (I, O), alignment in itertools.product(batches, SIZES, ALIGNMENTS):  # noqa: E741
        if alignment and I * O > 16:
            continue  # already without alignment there is nothing to be seen
        for r in ranks_of(B):
            g = LinearGeometry((B, I), (O, I))

            def draw(
                g: LinearGeometry = g, r: int = r, alignment: float = alignment
            ) -> tuple[Geometry, ActivationStore, np.ndarray, np.ndarray]:
                A, G = normal(g, rng)
                calibration = alignment * A + np.sqrt(1 - alignment**2) * rng.standard_normal(A.shape)
                leading = np.linalg.svd(calibration)[0][:, :r]
                return g, fixed_store(A.shape, (leading, None)), A, G

            row = {"batch": B, "in": I, "out": O, "rank": r, "alignment": alignment, **tally(draw, trials)}
            yield row | ({"chance": round(chance(B, r, I * O), 6)} if alignment == 0 else {})


def same_batch_cases(trials: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Claims 3 and 4: HOSVD of the very batch at random ranks; for a random G, and for the worst G there is."""
    for kind in KINDS[:4]:

        def draw(kind: str = kind) -> tuple[Geometry, ActivationStore, np.ndarray, np.ndarray]:
            g = random_geometry(kind, rng)
            return g, Hosvd(ranks=[int(rng.integers(1, n + 1)) for n in g.input_shape]), *normal(g, rng)

        at_random = tally(draw, trials)
        worst: list[float] = []
        for _ in range(max(1, trials // 20)):
            g, store, A, _ = draw()
            one_output = _with_outputs(g, 1)  # the outputs do not meet each other: one will do
            least, G = worst_grad_output(one_output, store, A)
            # a least value that is 0 to rounding has a meaningless direction
            negative = least < -ROUNDING * float(np.sum(A**2))
            worst.append(cosine(*both_gradients(one_output, store, A, G)) if negative else 0.0)
        yield {"layer": kind, "random_G": at_random, "worst_G": summary(worst)}


def _with_outputs(g: Geometry, O: int) -> Geometry:  # noqa: E741
    if isinstance(g, LinearGeometry):
        return LinearGeometry(g.input_shape, (O, g.weight_shape[1]))
    assert isinstance(g, ConvGeometry)
    return ConvGeometry(g.input_shape, (O, *g.weight_shape[1:]), g.stride, g.padding, g.dilation)


def sketch_cases(trials: int, rng: np.random.Generator, batches: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Claim 5: a fresh random U_1 at every step, scaled by n/r; (B, I) to (B, O), the feature mode left alone.

    ``bias`` is ‖mean dŴ − dW‖ of many draws for one batch, in units of its standard error: about 1 if there is none.
    """
    for B, (I, O) in itertools.product(batches, SIZES):  # noqa: E741
        for r in ranks_of(B):
            g = LinearGeometry((B, I), (O, I))
            store = fixed_store(g.input_shape, (None, None), batch_mode="sketch", batch_ratio=r / B)
            row = tally(lambda g=g, store=store: (g, store, *normal(g, rng)), trials)  # type: ignore[misc]
            A, G = normal(g, rng)
            mean = np.mean([both_gradients(g, store, A, G)[1] for _ in range(trials)], axis=0)
            error = np.sqrt(sketch_variance(A, G, g, r) / trials)
            bias = float(np.linalg.norm(mean - g.weight_gradient(A, G)) / error)
            yield {
                "batch": B, "in": I, "out": O, "rank": r, **row, "chance": round(chance(B, r, I * O), 6),
                "bias": round(bias, 3),
            }  # fmt: skip
