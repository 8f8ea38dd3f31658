"""What a matrix of accuracies says: ACC, BWT, FWT, forgetting and learning accuracy.

R[t, i] is the accuracy on task i after training on task t, t and i from 0; R[t, i] with i > t tells how a network does
on a task that it has not seen.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

DEFINITIONS = {
    "acc": "ACC = mean over i of R[T-1, i]: accuracy on all tasks at the end",
    "bwt": "BWT = mean over i < T-1 of R[T-1, i] - R[i, i]: negative means forgetting",
    "fwt": "FWT = mean over i >= 1 of R[i-1, i] - b[i]: what earlier tasks give to one not yet seen, "
    "b[i] being the accuracy of the random initialisation",
    "forgetting": "forgetting = mean over i < T-1 of max over t < T-1 of R[t, i], minus R[T-1, i] "
    "(Chaudhry et al., ECCV 2018)",
    "learning_accuracy": "learning accuracy = mean over i of R[i, i]: accuracy on each task just learned",
}
"""One line for each metric, for tables and help."""


@dataclass(frozen=True)
class Metrics:
    """The five numbers, as shares (1 = all right); see :data:`DEFINITIONS`."""

    acc: float
    bwt: float
    fwt: float
    forgetting: float
    learning_accuracy: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def metrics(R: np.ndarray, b: np.ndarray) -> Metrics:
    """All five metrics of one run.

    ``R[t, i]`` in [0, 1] is the accuracy on task i after task t, the upper triangle included, and ``b[i]`` that of the
    random initialisation. ValueError if the shapes do not fit, there are fewer than two tasks, or an entry is not in
    [0, 1].

    Notes
    -----
    ACC and BWT as in Lopez-Paz & Ranzato (GEM, NeurIPS 2017), FWT with their b; BWT is divided by T − 1, and so is
    the forgetting.

    Examples
    --------
    >>> metrics(np.array([[1.0, 0.5], [0.75, 1.0]]), np.array([0.5, 0.25]))
    Metrics(acc=0.875, bwt=-0.25, fwt=0.25, forgetting=0.25, learning_accuracy=1.0)
    """
    R, b = np.asarray(R, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if R.ndim != 2 or R.shape[0] != R.shape[1] or b.shape != R.shape[:1]:
        raise ValueError(f"R has shape {R.shape} and b {b.shape}, expected (T, T) and (T,)")
    if len(R) < 2:
        raise ValueError(f"R is of {len(R)} task(s), expected at least 2")
    for name, values in (("R", R), ("b", b)):
        if not ((values >= 0) & (values <= 1)).all():  # NaN too
            raise ValueError(f"{name} has entries outside [0, 1] or not yet measured: {values.tolist()}")
    return Metrics(
        acc=float(R[-1].mean()),
        bwt=float((R[-1] - np.diag(R))[:-1].mean()),
        fwt=float((np.diag(R, 1) - b[1:]).mean()),  # R[i-1, i] for i = 1 .. T-1
        forgetting=float((R[:-1].max(axis=0) - R[-1])[:-1].mean()),
        learning_accuracy=float(np.diag(R).mean()),
    )
