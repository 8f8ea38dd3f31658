"""One case of the kit: arrays, and what each function of an adapter should make of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lance_ref.conformance.definitions import matrix_product, orthonormal

FORMAT = "lance_ref conformance kit"
VERSION = 1
SEED = 0

TOLERANCES = {"float32": 2e-5, "float64": 1e-12}
"""Largest relative error, max|x − y| / max|y|, by the dtype of a case: about 170 and 4500 roundings."""

FUNCTIONS = (
    "forward",
    "input_gradient",
    "bias_gradient",
    "project",
    "weight_gradient",
    "saved_bytes",
    "projection_macs",
    "weight_gradient_macs",
    "gram",
    "patch_gram",
    "energy_rank",
    "leading_directions",
    "calibrate",
    "update_protected",
    "task_subspace",
    "protected_gradient",
    "metrics",
)
"""What an adapter may implement; ``docs/conformance.md`` specifies each."""

EXACT = ("saved_bytes", "projection_macs", "weight_gradient_macs", "energy_rank")
"""Those that return an integer."""


@dataclass(frozen=True)
class Check:
    """One call of one function."""

    function: str  #: One of :data:`FUNCTIONS`.
    arguments: dict[str, Any]  #: By name, as in the JSON; ``{"array": name}`` stands for an array of the case.
    expected: dict[str, Any]  #: As in the JSON: ``kind`` and what belongs to it.


@dataclass(frozen=True)
class Case:
    """A few arrays, and the checks that use them."""

    name: str  #: Ends with the dtype: ``conv_stride.float32``.
    about: str  #: One line: what the case is there for.
    dtype: str  #: "float32" or "float64".
    arrays: dict[str, np.ndarray] = field(default_factory=dict)  #: Arguments and expected results.
    checks: list[Check] = field(default_factory=list)

    def array(self, name: str, value: np.ndarray) -> dict[str, str]:
        """Add an array, a copy that nobody can change; how arguments and expectations refer to it."""
        if name in self.arrays:
            raise ValueError(f"case {self.name} has two arrays {name!r}")
        self.arrays[name] = np.array(value, order="C")
        self.arrays[name].setflags(write=False)
        return {"array": name}

    def expect_array(
        self, function: str, arguments: Mapping[str, Any], value: np.ndarray, dtype: str | None = None
    ) -> None:
        """Add a check for an array, expected in the case's dtype if not in another."""
        expected = self.array(f"expected_{function}", value)
        self._add(function, arguments, {"kind": "array", "value": expected, "dtype": dtype or self.dtype})

    def expect_exactly(self, function: str, arguments: Mapping[str, Any], value: int) -> None:
        """Add a check for an integer."""
        self._add(function, arguments, {"kind": "integer", "value": value})

    def expect_numbers(self, function: str, arguments: Mapping[str, Any], value: Mapping[str, float]) -> None:
        """Add a check for numbers by name."""
        self._add(function, arguments, {"kind": "numbers", "value": dict(value)})

    def expect_basis(self, function: str, arguments: Mapping[str, Any], U: np.ndarray) -> None:
        """Add a check for an orthonormal basis: its rank, and the projector U Uᵀ, since signs are arbitrary."""
        self._add(function, arguments, self._basis(f"expected_{function}", U))

    def expect_bases(self, function: str, arguments: Mapping[str, Any], factors: list[np.ndarray | None]) -> None:
        """Add a check for one orthonormal basis per mode, None where the mode is left alone."""
        items = [None if U is None else self._basis(f"expected_{function}_{n}", U) for n, U in enumerate(factors)]
        self._add(function, arguments, {"kind": "list", "value": items})

    def _basis(self, name: str, U: np.ndarray) -> dict[str, Any]:
        return {"kind": "basis", "rank": U.shape[1], "projector": self.array(name, projector(U))}

    def _add(self, function: str, arguments: Mapping[str, Any], expected: dict[str, Any]) -> None:
        self.checks.append(Check(function, dict(arguments), expected))


def projector(U: np.ndarray) -> np.ndarray:
    """U Uᵀ"""
    return matrix_product(U, U.T)


class Numbers:
    """Random numbers of a case, the same on every machine: multiples of 2⁻²² in [−2, 2), exact in float32 too.

    They are bits of PCG64, whose stream NumPy guarantees; the distributions of its Generator may change.
    """

    def __init__(self, name: str) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence([SEED, *name.encode()]))

    def array(self, *shape: int) -> np.ndarray:
        """An array of random numbers of this shape, float64."""
        raw = self._bits.random_raw(int(np.prod(shape)))
        return ((raw >> np.uint64(40)).astype(np.float64) / 2**22 - 2).reshape(shape)

    def orthonormal(self, n: int, r: int) -> np.ndarray:
        """r orthonormal columns of n numbers, float64."""
        return orthonormal(self.array(n, r)) if r else np.zeros((n, 0))
