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
    from analysis.rules.op_cost import OpCost as OpCost
    from analysis.rules.operations import operation as operation
    from analysis.steps.register import method as method
    from analysis.steps.settings import Setting as Setting

__all__ = ["OpCost", "Setting", "cost", "method", "operation"]

sys.meta_path.insert(0, LateFinder())  # old import paths, for one release

NEEDED = {
    "cost": (
        *("cost_model", "peak.memory", "ranks.choose", "reports.peaks", "reports.report", "reports.tables"),
        *("rules.calibration_costs", "steps.chunks"),
    ),
    "operation": ("rules.operations", "rules.account", "peak.layers", "check.torch_replay"),
    "OpCost": ("rules.op_cost",),
    "method": ("steps.register", "steps.methods"),
    "Setting": ("steps.settings",),
}
"""Where each public name is, and what is imported with it: all that a call of :func:`cost` runs, so that the first one
is as fast as the others; our own operations and methods before the first of anybody else's."""


def __getattr__(name: str) -> Any:
    """Public names are imported when they are asked for: commands must start without the numerical libraries."""
    if name in NEEDED:
        from importlib import import_module

        home, *_ = [import_module(f"analysis.{module}") for module in NEEDED[name]]
        return getattr(home, name)
    raise AttributeError(f"module 'analysis' has no attribute {name!r}")
