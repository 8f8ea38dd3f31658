"""The published figures of ``data/published.yaml``, as they were printed, and the reading of lists edited by hand."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from analysis.commands.shipped import shipped
from experiments.ledger.accounting_rules import RULES, rounding

QUANTITIES = ("memory", "memory-ratio", "work", "work-ratio", "bases")
STATUSES = ("met", "explained", "within range", "by ranks", "unexplained")
"""``by ranks``: the figure depends on ranks that the source does not print, and some share of every mode gives it."""


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


# ---- lists that people edit by hand --------------------------------------------------------------


def load_entries(
    path: str | os.PathLike[str], kind: type, sources_required: bool = True
) -> tuple[dict[str, dict[str, str]], list[dict[str, Any]]]:
    """Sources by name, and entries as written, of a YAML file with these two keys.

    An entry will become a dataclass ``kind``: its fields are the keys that are known, and those without a default are
    required. With ``sources_required`` each entry's ``source`` must name one of the sources. Every mistake is a
    ValueError, in one line that names the file and the entry.
    """
    import yaml

    path = Path(path)
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict) or set(document) != {"sources", "entries"}:
        raise ValueError(f"{path} must be a mapping with the keys sources and entries")
    sources, entries = document["sources"], document["entries"]
    if not isinstance(sources, dict) or not isinstance(entries, list):
        raise ValueError(f"{path}: sources must be a mapping and entries a list")
    for name, source in sources.items():
        if not isinstance(source, dict) or not {"paper", "url"} <= set(source):
            raise ValueError(f"{path}: source {name!r} must have paper and url")
    seen: set[str] = set()
    for entry in entries:
        _check(path, entry, kind, seen)
        if sources_required and entry["source"] not in sources:
            raise ValueError(f"{path}, {entry['id']}: source {entry['source']!r} is not one of {', '.join(sources)}")
    return sources, entries


def _check(path: Path, entry: Any, kind: type, seen: set[str]) -> None:
    if not isinstance(entry, dict) or not isinstance(entry.get("id"), str):
        raise ValueError(f"{path}: every entry must be a mapping with an id, one is {str(entry)[:60]!r}")
    known = {field.name: field for field in fields(kind)}
    required = {name for name, field in known.items() if field.default is MISSING and field.default_factory is MISSING}
    if missing := required - set(entry):
        raise ValueError(f"{path}, {entry['id']}: {', '.join(sorted(missing))} missing")
    if unknown := set(entry) - set(known):
        raise ValueError(f"{path}, {entry['id']}: unknown keys {', '.join(sorted(unknown))}")
    if entry["id"] in seen:
        raise ValueError(f"{path}: the id {entry['id']} is there twice")
    seen.add(entry["id"])


def choose(what: str, asked: Sequence[str], known: Mapping[str, Any]) -> list[Any]:
    """Those of the entries that were asked for, or all; LookupError for an unknown id, with those that are like it."""
    from difflib import get_close_matches

    for name in asked:
        if name not in known:
            near = get_close_matches(name, known, n=3, cutoff=0.4)
            hint = f"do you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(known)}"
            raise LookupError(f"unknown {what} {name!r}, {hint}")
    return [known[name] for name in asked or known]
