"""Running an adapter over the cases: every result is compared, every fault is a failed check with its reason."""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lance_ref.conformance.case import FUNCTIONS, Case, Check, projector
from lance_ref.conformance.files import Kit, resolve

STATUSES = PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


@dataclass(frozen=True)
class Outcome:
    """What became of one check."""

    case: str
    dtype: str
    function: str
    status: str  #: {"passed", "failed", "skipped"}
    #: Largest relative error, max|x − y| / max|y|; None where nothing was compared, or integers were.
    error: float | None = None
    reason: str = ""  #: Why it failed or was skipped, on one line.

    @property
    def label(self) -> str:
        """What ``--only`` is compared with: ``conv_stride.float32/weight_gradient``."""
        return f"{self.case}/{self.function}"


class Mismatch(Exception):  # noqa: N818
    """A result that is not what was expected; says why, and how large the error was if there was one."""

    def __init__(self, reason: str, error: float | None = None) -> None:
        super().__init__(reason)
        self.error = error


# ---- adapters ------------------------------------------------------------------------------------


def load_adapter(name: str) -> Any:
    """Import ``pkg.module:adapter``; a class is called, and ``pkg.module`` alone is its ``adapter``, else the module.

    Raises
    ------
    ValueError
        One line: it cannot be imported, or has none of the functions.
    """
    module_name, colon, attribute = name.partition(":")
    if not module_name or (colon and not attribute):
        raise ValueError(f"adapter is {name!r}, expected pkg.module:adapter")
    if "" not in sys.path:
        sys.path.insert(0, "")  # modules of the current folder
    try:
        adapter: Any = importlib.import_module(module_name)
        for part in attribute.split(".") if colon else ["adapter"] if hasattr(adapter, "adapter") else []:
            adapter = getattr(adapter, part)
        if isinstance(adapter, type):
            adapter = adapter()
    except (Exception, SystemExit) as error:
        raise ValueError(f"adapter {name!r} cannot be imported: {_one_line(error)}") from None
    if not any(_implements(adapter, function) for function in FUNCTIONS):
        text = "; ".join([f"adapter {name!r} has none of the functions {', '.join(FUNCTIONS)}", *misspelt(adapter)])
        raise ValueError(text)
    return adapter


def misspelt(adapter: Any) -> list[str]:
    """A hint for each public name that is nearly, but not quite, one of the functions that are missing."""
    missing = [function for function in FUNCTIONS if not _implements(adapter, function)]
    hints = []
    for name in dir(adapter):
        near = difflib.get_close_matches(name, missing, 1, cutoff=0.85)
        if near and not name.startswith("_") and name not in FUNCTIONS:
            hints.append(f"{name!r} is no function of the kit, is {near[0]!r} meant?")
    return hints


def _implements(adapter: Any, function: str) -> bool:
    return callable(getattr(adapter, function, None))


# ---- checks --------------------------------------------------------------------------------------


def check(adapter: Any, kit: Kit, only: str = "*") -> list[Outcome]:
    """Run an adapter over all cases.

    Parameters
    ----------
    adapter : object
        Whatever has some of :data:`~lance_ref.conformance.case.FUNCTIONS` as callable attributes.
    only : str
        Glob over ``case/function``, such as ``conv_*`` or ``*/weight_gradient``.

    Returns
    -------
    list of Outcome
        In the order of the kit. A function that is missing or raises NotImplementedError is skipped; one that raises
        anything else has failed.
    """
    wanted = (
        (case, one)
        for case in kit.cases
        for one in case.checks
        if fnmatch.fnmatchcase(f"{case.name}/{one.function}", only)
    )
    return [_outcome(adapter, case, one, kit.tolerances[case.dtype]) for case, one in wanted]


def _outcome(adapter: Any, case: Case, one: Check, tolerance: float) -> Outcome:
    facts = (case.name, case.dtype, one.function)
    if not _implements(adapter, one.function):
        return Outcome(*facts, SKIPPED, reason="not implemented")
    try:
        result = getattr(adapter, one.function)(**resolve(case, one.arguments))
    except NotImplementedError as error:
        return Outcome(*facts, SKIPPED, reason=" ".join(str(error).split()) or "not implemented")
    except (Exception, SystemExit) as error:
        return Outcome(*facts, FAILED, reason=f"raised {_one_line(error)}")
    try:
        distance = compare(case, one.expected, result, tolerance)
    except Mismatch as mismatch:
        return Outcome(*facts, FAILED, mismatch.error, str(mismatch))
    except (Exception, SystemExit) as error:  # a result whose own methods raise
        return Outcome(*facts, FAILED, reason=f"its result raised {_one_line(error)}")
    return Outcome(*facts, PASSED, distance)


def compare(case: Case, expected: Mapping[str, Any], result: Any, tolerance: float) -> float | None:
    """The relative error of a result, None for integers; Mismatch if it is not what was expected."""
    kind = expected["kind"]
    if kind == "integer":
        if isinstance(result, (bool, np.bool_)) or not isinstance(result, (int, np.integer)):
            raise Mismatch(f"returned {_what(result)}, expected an integer")
        if result != expected["value"]:
            raise Mismatch(f"returned {result}, expected {expected['value']}")
        return None
    if kind == "array":
        value = case.arrays[expected["value"]["array"]]
        return _within(_checked(result, value.shape, (expected["dtype"],)), value, tolerance)
    if kind == "basis":
        return _compare_basis(case.arrays[expected["projector"]["array"]], expected["rank"], result, tolerance)
    if kind == "numbers":
        return _compare_numbers(expected["value"], result, tolerance)
    return max((error for error in _compare_list(case, expected["value"], result, tolerance)), default=0.0)


def _compare_list(case: Case, expected: Sequence[Any], result: Any, tolerance: float) -> Iterator[float]:
    """Errors of one basis per mode."""
    if not isinstance(result, (list, tuple)) or len(result) != len(expected):
        raise Mismatch(f"returned {_what(result)}, expected a list of {len(expected)}: an array or None for each mode")
    for mode, (wanted, item) in enumerate(zip(expected, result, strict=True)):
        try:
            if (wanted is None) != (item is None):
                raise Mismatch(f"returned {_what(item)}, expected {'None' if wanted is None else 'an array'}")
            if wanted is not None:
                yield compare(case, wanted, item, tolerance) or 0.0
        except Mismatch as mismatch:
            raise Mismatch(f"mode {mode}: {mismatch}", mismatch.error) from None


def _compare_basis(expected: np.ndarray, rank: int, result: Any, tolerance: float) -> float:
    """Error of U Uᵀ, and of UᵀU: signs, and rotations among the columns, are free."""
    U = _checked(result, (len(expected), rank), ("float32", "float64")).astype(np.float64)
    if not rank:
        return 0.0
    try:
        skew = _within(U.T @ U, np.eye(rank), tolerance)
    except Mismatch as mismatch:
        raise Mismatch(f"the columns are not orthonormal: UᵀU has {mismatch}", mismatch.error) from None
    try:
        return max(skew, _within(projector(U), expected, tolerance))
    except Mismatch as mismatch:
        raise Mismatch(f"spans another subspace: UUᵀ has {mismatch}", mismatch.error) from None


def _compare_numbers(expected: Mapping[str, float], result: Any, tolerance: float) -> float:
    """Errors of numbers by name, relative to themselves or to 1, whichever is larger; other names are ignored."""
    if not isinstance(result, Mapping):
        raise Mismatch(f"returned {_what(result)}, expected a mapping with {', '.join(map(repr, expected))}")
    errors = []
    for name, value in expected.items():
        if name not in result:
            raise Mismatch(f"returned no {name!r}, only {', '.join(map(repr, result))}")
        number = result[name]
        if isinstance(number, (bool, np.bool_)) or not isinstance(number, (int, float, np.integer, np.floating)):
            raise Mismatch(f"{name!r} is {_what(number)}, expected a number")
        errors.append(abs(float(number) - value) / max(abs(value), 1.0))
        if not errors[-1] <= tolerance:  # NaN too
            raise Mismatch(f"{name!r} is {float(number):.6g}, expected {value:.6g}", errors[-1])
    return max(errors)


def _checked(result: Any, shape: tuple[int, ...], dtypes: Sequence[str]) -> np.ndarray:
    """``result`` if it is an array of this shape, one of these dtypes, and finite."""
    if not isinstance(result, np.ndarray):
        raise Mismatch(f"returned {_what(result)}, expected a numpy.ndarray")
    if result.shape != shape:
        raise Mismatch(f"returned shape {result.shape}, expected {shape}")
    if result.dtype.name not in dtypes:
        raise Mismatch(f"returned dtype {result.dtype}, expected {' or '.join(dtypes)}")
    if not np.isfinite(result).all():
        raise Mismatch(f"returned {np.count_nonzero(~np.isfinite(result))} entries that are NaN or infinite")
    return result


def _within(result: np.ndarray, expected: np.ndarray, tolerance: float) -> float:
    """max|x − y| / max|y|; Mismatch if that is larger than the tolerance."""
    if not expected.size:
        return 0.0
    difference = np.abs(result.astype(np.float64) - expected)
    error = float(difference.max()) / (float(np.abs(expected).max()) or 1.0)
    if error > tolerance:
        where = np.unravel_index(int(difference.argmax()), difference.shape)
        place = ", ".join(str(int(i)) for i in where)
        raise Mismatch(f"relative error {error:.2g} at [{place}], expected at most {tolerance:g}", error)
    return error


def _what(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, (bool, int, float)):
        return f"{value!r} ({type(value).__name__})"
    return "None" if value is None else f"a {type(value).__name__}"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else f"{text[:300]} ..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
