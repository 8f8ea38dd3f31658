"""What ``--check`` prints: a line for each function and dtype, then what failed, then the sum."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lance_ref.conformance.case import EXACT, FUNCTIONS
from lance_ref.conformance.checking import FAILED, STATUSES, Outcome

COLUMNS = ("function", "dtype", "passed", "failed", "skipped", "largest error", "tolerance")


def render(outcomes: Sequence[Outcome], tolerances: Mapping[str, float], verbose: bool = False) -> str:
    """The whole report as plain text.

    Parameters
    ----------
    outcomes : sequence of Outcome
    tolerances : mapping of str to float
        By dtype.
    verbose : bool
        Whether to begin with a line for each check.
    """
    lines = []
    if verbose:
        width = max((len(one.label) for one in outcomes), default=0)
        lines += [f"{one.status:<7}  {one.label:<{width}}  {_detail(one)}".rstrip() for one in outcomes] + [""]
    lines += _aligned([COLUMNS, *_rows(outcomes, tolerances)])
    failed = [one for one in outcomes if one.status == FAILED]
    if failed:
        lines += ["", *(f"FAILED {one.label}: {one.reason}" for one in failed)]
    counts = [f"{sum(one.status == status for one in outcomes)} {status}" for status in STATUSES]
    return "\n".join([*lines, "", ", ".join(counts), ""])


def _detail(one: Outcome) -> str:
    return one.reason or ("equal" if one.error is None else f"{one.error:.1e}")


def _rows(outcomes: Sequence[Outcome], tolerances: Mapping[str, float]) -> Iterator[tuple[str, ...]]:
    for function in FUNCTIONS:
        for dtype, tolerance in tolerances.items():
            these = [one for one in outcomes if (one.function, one.dtype) == (function, dtype)]
            if not these:
                continue
            counts = [str(sum(one.status == status for one in these)) for status in STATUSES]
            errors = [one.error for one in these if one.error is not None]
            largest = f"{max(errors):.1e}" if errors else ""
            limit = "exact" if function in EXACT else f"{tolerance:.0e}"
            yield (function, dtype, *counts, largest, limit)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines, text to the left and numbers to the right, with a rule below the first."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = []
    for row in rows:
        cells = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return [lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]]
