"""Evidence for claims: committed results, each of which says how it was made, and what a check finds there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lance_ref.io.whole_file import read_json

MOST_BYTES = 2**28
"""The largest size of a results file."""

RESULTS = Path(__file__).parents[1] / "results"
PROVENANCE = ("command", "seed", "versions", "machine")
NOT_RUN = "not run here"
VERDICTS = ("reproduced", "bounded", "contradicted", "not testable here", NOT_RUN)
"""The last is no verdict about the claim: the result file is not there, as in an installed package."""


@dataclass(frozen=True)
class Outcome:
    """What a check found: our figure, one of :data:`VERDICTS`, and a line of why."""

    figure: str
    verdict: str
    why: str


def graded(reproduced: object, bounded: object = False) -> str:
    """The verdict of two conditions, the stronger one first."""
    return "reproduced" if reproduced else "bounded" if bounded else "contradicted"


def verdict_of_points(behind: float) -> str:
    """The verdict on "within a few points": reproduced up to 2 points behind, bounded up to 5.

    >>> [verdict_of_points(points) for points in (-1.0, 2.0, 5.0, 5.1)]
    ['reproduced', 'reproduced', 'bounded', 'contradicted']
    """
    return graded(behind <= 2, behind <= 5)


class MissingEvidenceError(LookupError):
    """A result that is not there yet; the message is the command that makes it."""


@dataclass
class Evidence:
    """Result files of ``folder`` by name, read once."""

    folder: Path = RESULTS
    _read: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)

    def results(self, name: str, command: str) -> dict[str, Any]:
        """The contents of ``<name>.json``, which ``command`` makes.

        MissingEvidenceError if there is no such file; ValueError if it is no JSON object, or lacks command, seed,
        versions or machine.
        """
        if name in self._read:
            return self._read[name]
        path = self.folder / f"{name}.json"
        if not path.is_file():
            raise MissingEvidenceError(f"needs {command}")
        document = read_json(path, MOST_BYTES)
        missing = [key for key in PROVENANCE if key not in document]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}: evidence must say how it was made")
        return self._read.setdefault(name, document)

    def names(self, pattern: str) -> list[str]:
        """Names of the files that fit a pattern, such as ``domain_shift*``, in order."""
        return sorted(path.stem for path in self.folder.glob(f"{pattern}.json"))


Check = Callable[[Evidence], Outcome]
CHECKS: dict[str, Check] = {}
"""Every check by its name, which is that of its function."""


def check(function: Check) -> Check:
    """Register a check under its name."""
    CHECKS[function.__name__] = function
    return function


def row_of(rows: Sequence[dict[str, Any]], command: str, option: str, **wanted: str) -> dict[str, Any]:
    """The row of a result file that has these entries, else the command that would make it."""
    for row in rows:
        if all(row[name] == value for name, value in wanted.items()):
            return row
    raise MissingEvidenceError(f"needs {command}, with {' and '.join(wanted.values())} among {option}")
