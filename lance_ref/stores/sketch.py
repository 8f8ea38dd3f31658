"""A random sketch of the batch: fresh random directions at every step, kept as a seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lance_ref.algebra.geometry import Geometry
from lance_ref.algebra.modes import mode_product
from lance_ref.engine import counting
from lance_ref.engine.counting import spending_on
from lance_ref.engine.tensor import Shape
from lance_ref.stores.base import ActivationStore, check_kept


class BatchSketch:
    """Random directions of the batch mode, drawn anew at every step and drawn again in backward.

    S = √(n/r)·U (n, r), U uniformly distributed among matrices with orthonormal columns (Haar), so that
    E[S Sᵀ] = I: whatever is bilinear in Sᵀ A and Sᵀ G has its expectation right.

    Parameters
    ----------
    ratio : float
        Directions per image, in (0, 1]: r = max(1, round(ratio·n)) of a batch of n, halves to the even number.
    seed : int
        The directions of step k depend on (seed, k) alone.
    name : str
        What an error calls ``ratio``.
    """

    def __init__(self, ratio: float, seed: int, name: str = "ratio") -> None:
        number = isinstance(ratio, (int, float, np.integer, np.floating)) and not isinstance(ratio, bool)
        if not (number and 0 < ratio <= 1):
            raise ValueError(f"{name} is {ratio!r}, expected a number in (0, 1]")
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
            raise ValueError(f"seed is {seed!r}, expected a non-negative integer")
        self.ratio, self.seed, self.step = float(ratio), int(seed), 0

    def rank(self, n: int) -> int:
        """r for a batch of n."""
        return max(1, round(self.ratio * n))

    def next_seed(self) -> np.ndarray:
        """The seed of this step, (1,) uint64; every call is a step."""
        words = np.random.SeedSequence([self.seed, self.step]).generate_state(1, np.uint64)
        self.step += 1
        return np.array(words)

    def directions(self, seed: np.ndarray, n: int, dtype: Any) -> np.ndarray:
        """S (n, r) of a seed; booked as decomposition, at the nominal count of its QR."""
        r = self.rank(n)
        with spending_on("decomposition"):
            counting.add(counting.qr_macs(n, r))
            return np.sqrt(n / r).astype(dtype) * haar_columns(n, r, np.random.default_rng(seed)).astype(dtype)

    def state(self) -> dict[str, np.ndarray]:
        return {"step": np.array(self.step)}

    def load_state(self, store: str, state: Mapping[str, np.ndarray]) -> None:
        if set(state) != {"step"} or np.shape(state["step"]) != () or int(state["step"]) < 0:
            raise ValueError(f"store {store!r}: the state is {dict(state)}, expected 'step', a non-negative integer")
        self.step = int(state["step"])


class Sketch(ActivationStore):
    """Keep a random sketch of the activation along the batch (Bershatsky et al. 2022, arXiv 2201.13195).

    At each step a fresh U (n, r) with orthonormal columns is drawn for a batch of n. Forward keeps
    √(n/r)·A ×₁Uᵀ and a seed of 8 bytes, from which backward draws U again; the weight gradient is the exact one
    of r "images", of the sketched A and the sketched G. For a linear layer that is

        dŴ = (n/r)·Gᵀ U Uᵀ A,    E[dŴ] = Gᵀ A = dW.

    It is unbiased for every layer, since dW is bilinear in A and G; :func:`sketch_variance` says how far it is
    from dW. Sketches of several batches are independent; so are those of layers whose seeds differ.

    Parameters
    ----------
    ratio : float
        r = max(1, round(ratio·n)), in (0, 1].
    seed : int
        Together with the number of activations saved so far it determines U.

    Notes
    -----
    Bershatsky et al. sketch the rows of a linear layer's input, tokens and images alike, by any random S with
    E[S Sᵀ] = I. Here S has orthogonal columns, and only the batch mode is sketched, for (B, L, I) too, so that
    LANCE's batch mode and this store are one mechanism.
    """

    name = "sketch"

    def __init__(self, ratio: float, seed: int = 0) -> None:
        self.sketch = BatchSketch(ratio, seed)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "ratio": self.sketch.ratio}

    def settings(self) -> dict[str, Any]:
        return {"seed": self.sketch.seed}

    def check(self, input_shape: Shape) -> None:
        if len(input_shape) < 2:
            raise ValueError(f"activation has shape {input_shape}, expected a batch (B, I), (B, L, I) or (B, C, H, W)")

    def state(self) -> dict[str, np.ndarray]:
        return self.sketch.state()

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        self.sketch.load_state(self.name, state)

    def save(self, activation: np.ndarray) -> dict[str, np.ndarray]:
        """``sketch`` (r, ..) and ``seed`` (1,) uint64."""
        self.check(activation.shape)
        seed = self.sketch.next_seed()
        S = self.sketch.directions(seed, len(activation), activation.dtype)
        with np.errstate(invalid="ignore", over="ignore"):  # reported by name
            sketch = mode_product(activation, S.T, 0)
        check_kept("Sketch", sketch, activation.shape)
        return {"sketch": sketch, "seed": seed}

    def weight_gradient(
        self, saved: Mapping[str, np.ndarray], grad_output: np.ndarray, geometry: Geometry
    ) -> np.ndarray:
        S = self.sketch.directions(saved["seed"], len(grad_output), grad_output.dtype)
        sketch = saved["sketch"]
        images = dataclasses.replace(geometry, input_shape=sketch.shape)
        return images.weight_gradient(sketch, mode_product(grad_output, S.T, 0))


def haar_columns(n: int, r: int, rng: np.random.Generator) -> np.ndarray:
    """A random (n, r) float64 matrix with orthonormal columns, uniformly distributed.

    The Q of a Gaussian matrix is uniformly distributed if R has a positive diagonal, which LAPACK does not promise
    (Mezzadri 2007, arXiv math-ph/0609050).
    """
    Q, R = np.linalg.qr(rng.standard_normal((n, r)))
    return Q * np.where(np.diag(R) < 0, -1.0, 1.0)


def sketch_variance(activation: np.ndarray, grad_output: np.ndarray, geometry: Geometry, r: int) -> float:
    """E‖dŴ − dW‖²_F of :class:`Sketch`, exactly, over all uniformly distributed U.

    Parameters
    ----------
    activation, grad_output : arrays of the geometry's input and output shape
    geometry : ConvGeometry or LinearGeometry
        Of a batch of n.
    r : int
        Directions, 1 to n.

    Returns
    -------
    float
        Takes n² weight gradients of single images.

    Notes
    -----
    Let M_ij be the weight gradient of image i's activation with image j's output gradient. Then dW = Σ_i M_ii and,
    with P = U Uᵀ, dŴ = (n/r) Σ_ij P_ij M_ij.

    P's distribution does not change when P becomes O P Oᵀ for an orthogonal O, so its fourth moments have the form

        E[P_ij P_kl] = a·δ_ij δ_kl + b·(δ_ik δ_jl + δ_il δ_jk).

    Two contractions are known: (tr P)² = r² gives n²a + 2nb = r², and tr P² = r gives na + n(n+1)b = r. Hence

        b = r(n − r) / (n(n − 1)(n + 2)),    a = r((n + 1)r − 2) / (n(n − 1)(n + 2)).

    With E[P] = (r/n)·I, so that E[dŴ] = dW, it follows that

        E‖dŴ − dW‖² = ((n/r)²a − 1)·‖dW‖² + (n/r)²b · Σ_ij (‖M_ij‖² + ⟨M_ij, M_ji⟩).

    For a linear layer on (B, I) the sum is ‖A‖²‖G‖² + ⟨A Aᵀ, G Gᵀ⟩. At r = n the error is 0.

    >>> from lance_ref.algebra.geometry import LinearGeometry
    >>> ones = np.ones((2, 1))  # P = u uᵀ; dŴ = 2·(u_1 + u_2)² = 4·cos²φ, of mean 2 and variance 2
    >>> sketch_variance(ones, ones, LinearGeometry((2, 1), (1, 1)), 1)
    2.0
    """
    n = len(activation)
    if not 1 <= r <= n:
        raise ValueError(f"r is {r}, expected an integer from 1 to {n}, the batch of {activation.shape}")
    if r == n:
        return 0.0
    single = dataclasses.replace(geometry, input_shape=(1, *geometry.input_shape[1:]))

    def pair(i: int, j: int) -> np.ndarray:  # M_ij
        product = single.weight_gradient(activation[i : i + 1], grad_output[j : j + 1])
        return product.astype(np.float64)  # it is squared

    dW = np.zeros(geometry.weight_shape)
    pairs = 0.0  # Σ_ij (‖M_ij‖² + ⟨M_ij, M_ji⟩) = Σ_i 2‖M_ii‖² + Σ_{i<j} ‖M_ij + M_ji‖²
    for i in range(n):
        own = pair(i, i)
        dW += own
        pairs += 2 * float(np.sum(own**2))
        pairs += sum(float(np.sum((pair(i, j) + pair(j, i)) ** 2)) for j in range(i))
    scale = (n / r) ** 2 / (n * (n - 1) * (n + 2))
    a, b = r * ((n + 1) * r - 2), r * (n - r)
    return float((scale * a - 1) * np.sum(dW**2) + scale * b * pairs)
