"""What a training step costs: predicted from the trace alone, then compared with what was measured.

The formulas here are derived on paper and know nothing of the implementation in ``lance_ref``;
they read the trace (:func:`lance_ref.trace`) and nothing else.

:func:`analysis.cost` is the whole cost model as one function.
"""

from typing import TYPE_CHECKING, Any

from analysis import shipped  # noqa: F401  isort: skip  (before anything is looked for in lance_ref)
from analysis import stopping  # noqa: F401  isort: skip  (then at once: Ctrl-C while a command imports what it needs)

if TYPE_CHECKING:
    from analysis.cost_model import cost as cost


def __getattr__(name: str) -> Any:
    """``analysis.cost`` is imported when it is asked for: command lines must start without the numerical libraries.

    With it comes all that it runs, so that the first call is as fast as the others.
    """
    if name == "cost":
        from analysis import calibration_costs, peak, ranks, report, step_changes, tables  # noqa: F401
        from analysis.cost_model import cost
        from analysis.peak import methods  # noqa: F401

        return cost
    raise AttributeError(f"module 'analysis' has no attribute {name!r}")
