"""The file of measured spectra: written by ``python -m analysis.spectra``, read by the cost model.

A file may come from anywhere; nothing in it is believed before it is checked.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from analysis.ranks.batch_law import batch_spectrum, rank_for_energy
from lance_ref.io.whole_file import SEAL, read_bytes, sealed, unsealed, write_text

MAX_FILE_BYTES = 64 * 2**20
FORMAT = "lance_ref spectra"
VERSION = 1
MEND = "measure the spectra again (python -m analysis.spectra)"
PROVENANCE = ("weights", "images", "image_count", "batches", "command")
MODE_NAMES = {
    5: ("batch", "channel", "depth", "height", "width"),
    4: ("batch", "channel", "height", "width"),
    3: ("batch", "token", "feature"),
    2: ("batch", "feature"),
}
"""Names of an activation's modes, by its number of dimensions."""


@dataclass(frozen=True)
class LayerSpectra:
    """One layer's measured spectra."""

    shape: tuple[int, ...]  #: Of the activation that was measured, batch first.
    energies: tuple[np.ndarray, ...]  #: Eigenvalues of each mode's Gram matrix, descending.

    def ranks(self, epsilon: float, batch: int) -> tuple[int, ...]:
        """Rank of each mode at a batch size, by energy; see :mod:`analysis.ranks.batch_law`."""
        first = batch_spectrum(self.energies[0], batch)
        return tuple(rank_for_energy(energies, epsilon) for energies in (first, *self.energies[1:]))


@dataclass(frozen=True)
class Spectra:
    """Spectra of a net's layers, and where they came from."""

    net: str
    batch: int
    input_shape: tuple[int, ...]
    provenance: dict[str, Any]
    layers: dict[str, LayerSpectra]

    @property
    def source(self) -> str:
        """One line: weights, images, count."""
        p = self.provenance
        return f"{p['weights']}, {p['image_count']} images of {p['images']} in {p['batches']} batches of {self.batch}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file; eigenvalues to 6 significant digits, as shares of their sum."""
        document = {
            "format": FORMAT,
            "version": VERSION,
            "net": self.net,
            "batch": self.batch,
            "input_shape": list(self.input_shape),
            "provenance": self.provenance,
        }
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in document.items()]
        layers = []
        for name, layer in self.layers.items():
            modes = zip(MODE_NAMES[len(layer.shape)], layer.energies, strict=True)
            shares = [(mode, ", ".join(f"{share:.6g}" for share in of / of.sum())) for mode, of in modes]
            rows = [f"  {json.dumps(mode)}: [{listed}]" for mode, listed in shares]
            shape = f'  "shape": {json.dumps(list(layer.shape))}'
            layers.append(f" {json.dumps(name)}: {{\n" + ",\n".join([shape, *rows]) + "}")
        lines.append('"layers": {\n' + ",\n".join(layers) + "}")
        plain = "{" + ",\n".join(lines)
        seal = sealed(json.loads(plain + "}"))[SEAL]
        write_text(path, f"{plain},\n{json.dumps(SEAL)}: {json.dumps(seal)}}}\n")


def load_spectra(path: str | os.PathLike[str]) -> Spectra:
    """Read and check a file of spectra.

    Raises
    ------
    ValueError
        In one line, naming the file and what is wrong with it.
    OSError
        If it cannot be read.
    """
    path = Path(path)
    try:
        content = read_bytes(path, MAX_FILE_BYTES)
    except OSError as error:
        raise type(error)(f"spectra file {str(path)!r} (--spectra): {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"spectra file {error}") from None
    try:
        return _spectra_in(content)
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        message = f"no entry {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"spectra file {path}: {message.removesuffix(f'; {MEND}')}; {MEND}") from None


@lru_cache(maxsize=4)
def _spectra_in(content: bytes) -> Spectra:
    """What a file with this content says; read again and again, it is understood once."""
    document = json.loads(content)
    if not isinstance(document, dict) or document.get("format") != FORMAT or document.get("version") != VERSION:
        raise ValueError(f'not a file of spectra, expected an object with "format": "{FORMAT}", "version": {VERSION}')
    document = unsealed(document, "its contents", MEND)
    provenance = document["provenance"]
    if not isinstance(provenance, dict) or any(name not in provenance for name in PROVENANCE):
        raise ValueError(f"provenance must be an object with {', '.join(PROVENANCE)}")
    if not isinstance(document["net"], str) or not isinstance(document["layers"], dict) or not document["layers"]:
        raise ValueError("net must be a name, and layers an object that is not empty")
    (batch,) = _sizes("batch", [document["batch"]])
    input_shape = _sizes("input_shape", document["input_shape"])
    layers = {name: _parse_layer(name, layer, batch) for name, layer in document["layers"].items()}
    return Spectra(document["net"], batch, input_shape, provenance, layers)


def _parse_layer(name: str, layer: Any, batch: int) -> LayerSpectra:
    if not isinstance(layer, dict):
        raise ValueError(f"layer {name!r} is no object")
    shape = _sizes(f"shape of layer {name!r}", layer["shape"])
    if len(shape) not in MODE_NAMES or shape[0] != batch:
        raise ValueError(f"layer {name!r} has shape {shape}, expected 2 to 5 sizes, the first {batch}")
    energies = []
    for mode, n in zip(MODE_NAMES[len(shape)], shape, strict=True):
        values = layer[mode]
        if not isinstance(values, list) or len(values) != n or not set(map(type, values)) <= {int, float}:
            raise ValueError(f"layer {name!r}, mode {mode}: expected {n} numbers")
        array = np.array(values, dtype=np.float64)
        if not (array.min() >= 0 and 0 < array.sum() < math.inf):  # neither holds where one is NaN
            raise ValueError(f"layer {name!r}, mode {mode}: energies must be finite, not negative, and not all zero")
        array = np.sort(array)[::-1]
        array.flags.writeable = False  # whoever reads the same file gets the same arrays
        energies.append(array)
    return LayerSpectra(shape, tuple(energies))


def _sizes(what: str, values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not values or any(type(n) is not int or not 0 < n < 2**31 for n in values):
        raise ValueError(f"{what} must be positive integers, got {str(values)[:60]}")
    return tuple(values)
