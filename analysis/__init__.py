"""What a training step costs: predicted from the trace alone, then compared with what was measured.

The formulas here are derived on paper and know nothing of the implementation in ``lance_ref``;
they read the trace (:func:`lance_ref.trace`) and nothing else.

:func:`analysis.cost` is the whole cost model as one function.
"""

import sys
from typing import TYPE_CHECKING, Any

from analysis.commands import shipped  # noqa: F401  isort: skip  (before anything is looked for in lance_ref)
from analysis.commands import stopping  # noqa: F401  isort: skip  (then: Ctrl-C while a command imports what it needs)
from analysis.moved import LateFinder

if TYPE_CHECKING:
    from analysis.cost_model import cost as cost

__all__ = ["cost"]

sys.meta_path.insert(0, LateFinder())  # old import paths, for one release

NEEDED = ("peak.memory", "ranks.choose", "reports.peaks", "reports.report", "reports.tables", "rules.calibration_costs")
"""What a call of :func:`cost` runs: imported with it, so that the first call is as fast as the others."""


def __getattr__(name: str) -> Any:
    """``analysis.cost`` is imported when it is asked for: commands must start without the numerical libraries."""
    if name == "cost":
        from importlib import import_module

        from analysis.cost_model import cost

        for module in NEEDED:
            import_module(f"analysis.{module}")
        return cost
    raise AttributeError(f"module 'analysis' has no attribute {name!r}")
