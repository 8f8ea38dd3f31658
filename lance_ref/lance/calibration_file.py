"""A calibration as a file: an ``.npz`` with one Gram matrix per layer and mode, and JSON for the rest."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from lance_ref.algebra.frame import Frame, checked_protected, feature_mode
from lance_ref.algebra.grams import LayerGrams
from lance_ref.algebra.tucker import check_epsilon
from lance_ref.engine.tensor import Shape
from lance_ref.io.npz import has_checksum, load_npz, save_npz

KIND = "lance_ref.calibration"
SCHEMA = 3
READABLE = (1, 2, 3)
"""Schema 1 knows neither means nor protected directions; files of schemas 1 and 2 have no checksum."""

Ranks = tuple[int | None, ...]
FRAME = ("protected", "mean")
Parts = tuple[dict[str, LayerGrams], dict[str, float], dict[str, Ranks]]
"""What a calibration is made of, by layer path: Grams, energy thresholds, and ranks where they were given."""


def save(
    path: str | os.PathLike[str],
    grams: Mapping[str, LayerGrams],
    epsilon: Mapping[str, float],
    ranks: Mapping[str, Ranks],
) -> None:
    """Write the parts of a calibration, all or nothing."""
    layers, arrays = [], {}
    for i, (name, layer) in enumerate(grams.items()):
        layers.append(
            {
                "path": name,
                "shape": list(layer.shape),
                "modes": [mode for mode, K in enumerate(layer.grams) if K is not None],
                "samples": layer.samples,
                "batches": layer.batches,
                **({"unit": layer.unit} if layer.unit else {}),
                "epsilon": epsilon[name],
                "ranks": ranks.get(name),
            }
        )
        arrays.update({f"gram{i}.{mode}": K for mode, K in enumerate(layer.grams) if K is not None})
        for what in FRAME:
            if (array := getattr(layer.frame, what)) is not None:
                arrays[f"{what}{i}"] = array
    metadata = json.dumps({"kind": KIND, "schema": SCHEMA, "layers": layers})
    save_npz(path, {"metadata": np.frombuffer(metadata.encode(), np.uint8), **arrays})


def load(path: str | os.PathLike[str]) -> Parts:
    """Read what :func:`save` wrote; ValueError, in one line that names the file, for anything else."""
    arrays = load_npz(path)
    try:
        metadata = json.loads(arrays.pop("metadata").tobytes())
        kind, schema = metadata["kind"], metadata["schema"]
        if kind != KIND or type(schema) is not int or schema not in READABLE:
            raise ValueError(f"it is {kind!r} schema {schema}, expected {KIND!r} schema {SCHEMA} or an earlier one")
        if schema == SCHEMA and not has_checksum(path):
            raise ValueError(f"it has no checksum, as a file of schema {SCHEMA} has: calibrate again")
        grams, epsilon, ranks = {}, {}, {}
        for i, layer in enumerate(metadata["layers"]):
            name = str(layer["path"])
            grams[name] = _load_layer(name, layer, arrays, i)
            epsilon[name] = check_epsilon(layer["epsilon"])
            if layer["ranks"] is not None:
                grams[name].check_ranks(layer["ranks"])
                ranks[name] = tuple(layer["ranks"])
        if not grams:
            raise ValueError("it has no layers")
        if arrays:
            raise ValueError(f"it holds arrays that belong to no layer: {sorted(arrays)}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        what = f"it has no entry {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{os.fspath(path)}: not a calibration file: {what}") from None
    return grams, epsilon, ranks


def _load_layer(name: str, entry: Mapping[str, Any], arrays: dict[str, np.ndarray], index: int) -> LayerGrams:
    """One layer of a file; takes its arrays out of ``arrays``."""
    shape = tuple(operator.index(n) for n in entry["shape"])
    if min(shape, default=0) < 1:
        raise ValueError(f"layer {name!r} has shape {shape}, expected sizes of at least 1")
    modes = {operator.index(mode) for mode in entry["modes"]}
    if not modes or not modes <= set(range(len(shape))):
        raise ValueError(f"layer {name!r} of shape {shape} has modes {sorted(modes)}")
    stored = {mode: arrays.pop(f"gram{index}.{mode}") for mode in sorted(modes)}
    for mode, K in stored.items():
        n = shape[mode]
        if K.shape != (n, n) or K.dtype != np.float64 or not np.isfinite(K).all():
            came = f"{K.shape} {K.dtype}" if K.shape != (n, n) or K.dtype != np.float64 else "not finite"
            raise ValueError(
                f"layer {name!r} of shape {shape}: Gram of mode {mode} is {came}, expected ({n}, {n}) float64"
            )
    layer = LayerGrams(name, shape, [False] * len(shape), _load_frame(name, shape, arrays, index))
    layer.grams = tuple(stored.get(mode) for mode in range(len(shape)))
    layer.set_unit(operator.index(entry.get("unit", 0)))
    layer.samples, layer.batches = operator.index(entry["samples"]), operator.index(entry["batches"])
    layer.check_energy()
    return layer


def _load_frame(name: str, shape: Shape, arrays: dict[str, np.ndarray], index: int) -> Frame:
    """The mean and the protected directions of one layer, where the file has them."""
    n = shape[feature_mode(shape)]
    protected, mean = (arrays.pop(f"{what}{index}", None) for what in FRAME)
    if mean is not None and (mean.shape != (n,) or mean.dtype != np.float64 or not np.isfinite(mean).all()):
        raise ValueError(f"layer {name!r} of shape {shape}: its mean is {mean.shape} {mean.dtype}, expected ({n},)")
    return Frame(None if protected is None else checked_protected(name, protected, n), mean)
