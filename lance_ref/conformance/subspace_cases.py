"""The subspaces of the kit: calibration by energy, directions that earlier tasks need, and the metrics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lance_ref.conformance import definitions
from lance_ref.conformance.case import Case, Numbers
from lance_ref.conformance.layer_cases import Layer

DTYPES = ("float32", "float64")


@dataclass(frozen=True)
class Calibrated:
    """The inputs of one layer in several batches, and what is asked of them."""

    name: str
    about: str
    shapes: Sequence[tuple[int, ...]]
    epsilon: float
    modes: tuple[bool, ...]  #: Which modes are compressed.
    protected: int = 0  #: Number of directions of the feature mode to leave alone.
    mean_free: bool = False


ALL = (True, True, True, True)
SPACES: Sequence[Calibrated] = (
    Calibrated("calibrate_one_batch", "HOSVD of one activation", [(5, 4, 6, 3)], 0.9, ALL),
    Calibrated("calibrate_batches", "three batches, each with the same weight", [(5, 4, 6, 3)] * 3, 0.9, ALL),
    Calibrated(
        "calibrate_batch_sizes", "the batch mode left alone, batches of 1, 6 and 3: every sample with the same weight",
        [(1, 4, 3, 4), (6, 4, 3, 4), (3, 4, 3, 4)], 0.85, (False, True, True, True),
    ),
    Calibrated("calibrate_low", "a low threshold", [(4, 5, 4, 4)] * 2, 0.6, ALL),
    Calibrated("calibrate_full", "ε = 1 is full rank, exactly", [(3, 4, 2, 5)], 1.0, ALL),
    Calibrated(
        "calibrate_deficient_full", "ε = 1 is full rank where energies are zero, too",
        [(2, 6)], 1.0, (False, True),
    ),
    Calibrated("calibrate_linear", "(B, I)", [(7, 6)] * 2, 0.9, (True, True)),
    Calibrated("calibrate_tokens", "(B, L, I)", [(4, 5, 6)] * 2, 0.9, (True, True, True)),
    Calibrated("calibrate_mean_free", "orthogonal to the mean", [(4, 5, 4, 3)] * 2, 0.8, ALL, mean_free=True),
    Calibrated(
        "calibrate_mean_free_batch_sizes", "the mean of all samples, not of the batches' means",
        [(1, 5), (8, 5)], 0.7, (False, True), mean_free=True,
    ),
    Calibrated("calibrate_protected", "orthogonal to two directions", [(4, 6, 3, 3)] * 2, 0.85, ALL, protected=2),
    Calibrated("calibrate_protected_full", "all that two directions leave", [(9, 6)], 1.0, (False, True), protected=2),
    Calibrated(
        "calibrate_protected_mean_free", "tokens, orthogonal to two directions and to the mean",
        [(3, 4, 7)] * 2, 0.75, (False, True, True), protected=2, mean_free=True,
    ),
)  # fmt: skip


def activations_of(space: Calibrated) -> list[np.ndarray]:
    """Batches of falling energy in every mode, not negative, the first one apart from the others."""
    numbers = Numbers(space.name)
    batches = []
    for j, shape in enumerate(space.shapes):
        A = np.maximum(numbers.array(*shape) + 0.5, 0.0)
        for mode, n in enumerate(shape):
            falling = np.ldexp(1.0, -np.arange(n).clip(max=3))  # powers of two: exact
            falling = np.roll(falling, j)  # no two batches prefer the same direction
            A = A * np.expand_dims(falling, [m for m in range(A.ndim) if m != mode])
        batches.append(A / (1 + j % 2))
    return batches


def calibration_cases() -> Iterator[Case]:
    """Factors of several batches, and the Gram matrices that they come from."""
    for space in SPACES:
        for dtype in DTYPES:
            case, numbers = Case(f"{space.name}.{dtype}", space.about, dtype), Numbers(space.name + " protected")
            given = [A.astype(dtype) for A in activations_of(space)]
            A = [batch.astype(np.float64) for batch in given]
            batches = [case.array(f"activation_{j}", batch) for j, batch in enumerate(given)]
            feature = 1 if A[0].ndim == 4 else A[0].ndim - 1
            M = numbers.orthonormal(A[0].shape[feature], space.protected)
            arguments = {
                "activations": batches,
                "epsilon": space.epsilon,
                "modes": list(space.modes),
                "protected": case.array("protected", M),
                "mean_free": space.mean_free,
            }
            factors = definitions.calibrate(A, space.epsilon, space.modes, M, space.mean_free)
            case.expect_bases("calibrate", arguments, factors)
            if not space.protected and not space.mean_free:
                K = definitions.gram([definitions.unfold(batch, feature) for batch in A])
                case.expect_array("gram", {"activations": batches, "mode": feature}, K, "float64")
            yield case


PATCHES: Sequence[Layer] = (
    Layer(
        "patches", "a 2×3 kernel with stride and padding",
        (2, 2, 4, 5), (1, 2, 3), (None,) * 4, (1, 2), ((1, 0), (0, 2)),
    ),
    Layer("patches_dilation", "a 2×2 kernel with dilation", (3, 2, 4, 5), (1, 2, 2), (None,) * 4, dilation=(2, 3)),
)  # fmt: skip


def patch_cases() -> Iterator[Case]:
    """Gram matrices of a convolution's patches, over two batches of different sizes."""
    for layer in PATCHES:
        for dtype in DTYPES:
            case, numbers = Case(f"{layer.name}.{dtype}", layer.about, dtype), Numbers(layer.name)
            geometry = layer.geometry()
            B, *rest = layer.input_shape
            batches = [numbers.array(b, *rest) for b in (B, B + 2)]
            K = definitions.gram([definitions.patch_columns(A, geometry) for A in batches])
            references = [case.array(f"activation_{j}", A.astype(dtype)) for j, A in enumerate(batches)]
            case.expect_array("patch_gram", {"activations": references, "geometry": geometry}, K, "float64")
            yield case


RANKS: Sequence[tuple[str, str, list[float], float]] = (
    ("rank", "energies are squared singular values already", [16.0, 8.0, 4.0, 2.0, 1.0], 0.7),
    ("rank_reached", "a threshold that is met exactly is met", [4.0, 2.0, 1.0, 1.0], 0.75),
    ("rank_low", "at least one direction", [4.0, 2.0, 1.0, 1.0], 0.125),
    ("rank_full", "ε = 1 counts energies of zero as well", [4.0, 1.0, 0.0, 0.0], 1.0),
    ("rank_equal", "equal energies", [1.0, 1.0, 1.0, 1.0], 0.5),
)


def gram_cases() -> Iterator[Case]:
    """Ranks by energy, and the leading directions of a Gram matrix."""
    for name, about, energies, epsilon in RANKS:
        case = Case(f"{name}.float64", about, "float64")
        arguments = {"energies": case.array("energies", np.array(energies)), "epsilon": epsilon}
        case.expect_exactly("energy_rank", arguments, definitions.energy_rank(np.array(energies), epsilon))
        yield case
    for name, n, epsilon in (("directions", 6, 0.8), ("directions_high", 7, 0.96), ("directions_full", 4, 1.0)):
        case = Case(f"{name}.float64", f"leading directions at ε = {epsilon:g}", "float64")
        K = _gram(Numbers(name), n)
        energies_of_K, vectors = definitions.outside(K, np.zeros((n, 0)))
        r = definitions.energy_rank(energies_of_K, epsilon)
        definitions.check_clear_cut(energies_of_K, r, epsilon)
        case.expect_basis("leading_directions", {"gram": case.array("gram", K), "epsilon": epsilon}, vectors[:, :r])
        yield case


def _gram(numbers: Numbers, n: int, samples: int | None = None) -> np.ndarray:
    """A Gram matrix whose energies fall by about 4 from one direction to the next."""
    R = numbers.array(n, 3 * n if samples is None else samples)
    mix = numbers.orthonormal(n, n)
    return definitions.gram([definitions.matrix_product(mix, R * np.ldexp(1.0, -np.arange(n))[:, None])])


CONTINUAL: Sequence[tuple[str, str, int, int, float, int | None]] = (
    ("task_first", "the first task: nothing is protected yet", 6, 0, 0.95, None),
    ("task_next", "the energy kept is a share of all of it, not of what is left", 7, 2, 0.9, None),
    ("task_covered", "the threshold is reached already: no direction is added", 6, 5, 0.25, None),
    ("task_everything", "a threshold of 1: all directions are protected", 5, 2, 1.0, None),
    ("task_deficient", "a threshold of 1 and three samples: the range of the inputs, no more", 6, 0, 1.0, 3),
)
"""Name, what for, n, number of protected directions, threshold, samples (many by default)."""


def continual_cases() -> Iterator[Case]:
    """What a task needs, where the next one may learn, and gradients outside of it."""
    for name, about, n, m, threshold, samples in CONTINUAL:
        numbers, case = Numbers(name), Case(f"{name}.float64", about, "float64")
        K, M = _gram(numbers, n, samples), numbers.orthonormal(n, m)
        gram, basis = case.array("gram", K), case.array("basis", M)
        arguments = {"basis": basis, "gram": gram, "threshold": threshold}
        case.expect_basis("update_protected", arguments, definitions.update_protected(M, K, threshold))
        if samples is None:
            epsilon = 1.0 if threshold == 1 else 0.8
            arguments = {"gram": gram, "basis": basis, "epsilon": epsilon}
            case.expect_basis("task_subspace", arguments, definitions.task_subspace(K, M, epsilon))
        yield case
    for name, shape, m in (("gradient_linear", (4, 6), 2), ("gradient_conv", (3, 2, 2, 3), 5)):
        for dtype in DTYPES:
            numbers, case = Numbers(name), Case(f"{name}.{dtype}", "a weight gradient without its part along M", dtype)
            dW, M = numbers.array(*shape), numbers.orthonormal(int(np.prod(shape[1:])), m)
            arguments = {"grad_weight": case.array("grad_weight", dW.astype(dtype)), "basis": case.array("basis", M)}
            case.expect_array("protected_gradient", arguments, definitions.protected_gradient(dW, M))
            yield case


def metric_cases() -> Iterator[Case]:
    """ACC, BWT and FWT of matrices of accuracies."""
    for T in (2, 3, 5):
        name = f"metrics_{T}_tasks"
        numbers, case = Numbers(name), Case(f"{name}.float64", f"{T} tasks, all of the matrix measured", "float64")
        R, b = (numbers.array(T, T) + 2) / 4, (numbers.array(T) + 2) / 4
        arguments = {"accuracy": case.array("accuracy", R), "initial": case.array("initial", b)}
        case.expect_numbers("metrics", arguments, definitions.metrics(R, b))
        yield case


def subspace_cases() -> Iterator[Case]:
    """All of this file."""
    yield from calibration_cases()
    yield from patch_cases()
    yield from gram_cases()
    yield from continual_cases()
    yield from metric_cases()
