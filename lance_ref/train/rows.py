"""Training data that is no data set: two arrays, or any batches of them, taken as they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from lance_ref.datasets import Dataset
from lance_ref.io.npz import digest
from lance_ref.train.features import Features


def as_data(name: str, data: Any, normalise: Any = None, image_size: Any = None) -> Dataset | Features:
    """A Dataset or Features as it is; arrays and batches as features that no stage of a network has seen.

    Parameters
    ----------
    name : str
        What errors call it: "train" or "test".
    data : Dataset, Features, pair of arrays, or iterable of such pairs
        Inputs (N, ...) of any floating or integer type, and integer labels (N,). Batches are put together in memory.
    normalise, image_size
        Refused with arrays: these are what the network takes already.

    Raises
    ------
    TypeError, ValueError
        If it is none of these, or inputs and labels do not fit each other.
    """
    if isinstance(data, (Dataset, Features)):
        return data
    x, y = _arrays(name, data)
    for option, value in (("normalise", normalise), ("image_size", image_size)):
        if value is not None:
            raise ValueError(f"{option} is {value!r}, but {name} is arrays, which the network takes as they are")
    if x.ndim < 1 or x.dtype.kind not in "fiu" or y.ndim != 1 or y.dtype.kind not in "iu" or len(x) != len(y):
        raise ValueError(
            f"{name}: inputs have shape {x.shape} and dtype {x.dtype}, labels {y.shape} and {y.dtype}, expected "
            "(N, ...) numbers and (N,) integers"
        )
    if not len(y):
        raise ValueError(f"{name} is empty: 0 inputs")
    if int(y.min()) < 0:
        raise ValueError(f"{name}: labels run from {y.min()}, expected at least 0")
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        raise ValueError(f"{name}: inputs have entries that are NaN or infinite")
    labels = y.astype(np.int64)
    fingerprint = digest({"x": x, "y": labels})
    return Features(x, labels, int(labels.max()) + 1, 0, "arrays", name, "", fingerprint)


def _arrays(name: str, data: Any) -> tuple[np.ndarray, np.ndarray]:
    expected = "a Dataset, Features, a pair of arrays (x, y), or batches (x, y)"
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(hasattr(part, "dtype") for part in data):
        return np.asarray(data[0]), np.asarray(data[1])
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes, dict, np.ndarray)):
        raise TypeError(f"{name} is a {type(data).__name__}, expected {expected}")
    batches = []
    for i, batch in enumerate(data):
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise TypeError(f"{name}: batch {i} is a {type(batch).__name__}, expected a pair (x, y)")
        batches.append((np.asarray(batch[0]), np.asarray(batch[1])))
    if not batches:
        raise ValueError(f"{name} is empty: no batches")
    shapes = {(x.shape[1:], x.dtype.kind) for x, _ in batches}
    if len(shapes) > 1:
        raise ValueError(f"{name}: batches have inputs of shapes {sorted(map(str, shapes))}, expected one shape")
    return np.concatenate([x for x, _ in batches]), np.concatenate([y for _, y in batches])
