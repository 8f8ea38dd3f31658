"""The published figures of ``data/published.yaml``, as they were printed."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from analysis.commands.shipped import shipped
from experiments.ledger.accounting_rules import RULES, rounding
from experiments.ledger.yaml_file import load_entries

QUANTITIES = ("memory", "memory-ratio", "work", "work-ratio", "bases")
STATUSES = ("met", "explained", "within range", "by ranks", "unexplained")
"""By ranks: the figure depends on ranks that the source does not print, and some share of every mode gives it."""


@dataclass(frozen=True)
class Published:
    """A number that somebody printed.

    Attributes
    ----------
    quantity : str
        One of :data:`QUANTITIES`.
    value : str
        As printed: its last digit says how exact it is. ``"22..33"`` is a range.
    source, where : str
        A name of the file's sources, and the place there.
    case : dict
        ``net``, ``batch``, ``tune``, ``method`` ("bp" or "lance"), and ``ranks`` or ``epsilon`` where it has ranks.
    status, rules : str, list of str
        What :func:`explain` must find.
    free : str
        ``"ranks"`` where the figure depends on ranks that are not printed.
    like : str
        Id of a figure beside it that is counted in the same way, so that its rules are this one's too.
    """

    id: str
    what: str
    quantity: str
    value: str
    unit: str
    source: str
    where: str
    case: dict[str, Any] = field(default_factory=dict)
    status: str = ""
    rules: list[str] = field(default_factory=list)
    free: str = ""
    like: str = ""
    remark: str = ""

    @property
    def bounds(self) -> tuple[float, float]:
        """The printed value or range, with the rounding of its last digit."""
        ends = self.value.split("..")
        return float(ends[0]) - rounding(ends[0]), float(ends[-1]) + rounding(ends[-1])


@lru_cache(maxsize=1)
def published() -> tuple[dict[str, dict[str, str]], dict[str, Published]]:
    """Sources, and all published figures by id."""
    path = shipped("published.yaml", "experiments")
    sources, entries = load_entries(path, Published)
    rows = {}
    for entry in entries:
        row = Published(**entry)
        if row.quantity not in QUANTITIES or row.status not in STATUSES or not set(row.rules) <= set(RULES):
            raise ValueError(f"{path}, {row.id}: quantity, status or rules are not among those that there are")
        if row.free not in ("", "ranks") or (row.like and row.like not in rows):
            raise ValueError(f"{path}, {row.id}: free must be ranks, and like the id of a figure above")
        if not isinstance(row.value, str):
            raise ValueError(f"{path}, {row.id}: value must be a string, as printed, it is {row.value!r}")
        rows[row.id] = row
    return sources, rows
