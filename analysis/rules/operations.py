"""The table of operations: everything that the cost model knows of each of them, in one row.

Our own modules fill a column each (:func:`column`, :func:`fill`): costs in :mod:`analysis.rules`, what is in flight in
:mod:`analysis.peak`, twins in :mod:`analysis.check.torch_replay`. Who has an operation of their own registers a whole
row with :func:`operation`, which is ``analysis.operation``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

PACKED, LIKE_INPUT = "packed", "as the first input"
View = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Operation:
    """One row of the table.

    Attributes
    ----------
    name : str
        The ``op`` of its :class:`lance_ref.engine.autograd.Function`.
    cost : callable
        From a :class:`analysis.rules.op_cost.Call` to an :class:`~analysis.rules.op_cost.OpCost`. Without it an
        operation is an error wherever it runs.
    in_flight_forward : callable, optional
        From the call to the most bytes that are allocated at a moment of its forward pass, its result and what it
        keeps included. Default: an upper estimate, which the report says: both of these, and three arrays of the size
        of each input and of the result.
    in_flight_backward : callable, optional
        From the call and the :class:`analysis.rules.layouts.Layout` of the gradient that comes in to a
        :class:`analysis.peak.rules.Backward`. Default: an upper estimate, which the report says: its gradients, and
        three arrays of the size of each input and of the result.
    layout : {"packed", "as the first input"} or callable
        How its result lies in memory: in C order; with its axes in the order of the first input of its shape; or,
        from the record and the layouts of its inputs, where in the memory of one of them (None: it is a copy).
        Default: "packed".
    layout_in_pytorch : the same, optional
        How PyTorch's lies. Default: as ``layout``.
    twin : callable, optional
        The same in PyTorch: from the module torch, the list of inputs and the mapping of attributes to a tensor.
        Default: none, and ``--measure`` says that PyTorch's column is left out.
    onnx : mapping of str to callable
        Operators of ONNX files that are read as this one: from an :class:`analysis.onnx.file.Node` and its inputs to
        a Tensor. Default: none.
    """

    name: str
    cost: Callable[..., Any] | None = None
    in_flight_forward: Callable[..., int] | None = None
    in_flight_backward: Callable[..., Any] | None = None
    layout: str | View = PACKED
    layout_in_pytorch: str | View | None = None
    twin: Callable[..., Any] | None = None
    onnx: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for column in ("cost", "in_flight_forward", "in_flight_backward", "twin"):
            value = getattr(self, column)
            if value is not None and not callable(value):
                raise TypeError(f"{column} of operation {self.name!r} is {value!r}, expected a function")
        for column in ("layout", "layout_in_pytorch"):
            value = getattr(self, column)
            if not callable(value) and value not in (PACKED, LIKE_INPUT, None):
                expected = f"{PACKED!r}, {LIKE_INPUT!r} or a function"
                raise ValueError(f"{column} of operation {self.name!r} is {value!r}, expected {expected}")

    @property
    def is_estimated(self) -> bool:
        """Whether its peak of memory is an upper estimate, for want of a rule."""
        return self.in_flight_forward is None or self.in_flight_backward is None

    def lies(self, in_pytorch: bool) -> str | View:
        """``layout``, or the one in PyTorch."""
        return self.layout if not in_pytorch or self.layout_in_pytorch is None else self.layout_in_pytorch


OPERATIONS: dict[str, Operation] = {}
"""Every operation by its name."""


def known(name: str) -> Operation:
    """The row of an operation; one that says nothing if there is none."""
    return OPERATIONS.get(name) or Operation(name)


def operation(name: str, *, cost: Callable[..., Any], replace: bool = False, **columns: Any) -> None:
    """Register an operation; ``columns`` are the other attributes of :class:`Operation`, all of them optional.

    Parameters
    ----------
    cost : callable
        What it computes and keeps.
    replace : bool
        Whether the row may take the place of another one. Default: it may not.

    Raises
    ------
    ValueError
        If an operation of that name has another cost rule already (both are named), or a layout is not known.
    TypeError
        If a rule is no function, or there is no such column.

    Examples
    --------
    >>> operation("twice", cost=lambda call: None, layout="as the first input")
    >>> OPERATIONS.pop("twice").is_estimated
    True
    """
    row = Operation(name, cost, **columns)
    if not callable(cost):
        raise TypeError(f"cost of operation {name!r} is {cost!r}, expected a function")
    if not replace:
        _check_free("cost", name, cost)
    OPERATIONS[name] = row


def fill(column: str, values: Mapping[str, Any]) -> None:
    """Fill a column of the rows of these operations, which are made if need be.

    Raises ValueError if one of them has another value there already.
    """
    for name, value in values.items():
        _check_free(column, name, value)
        OPERATIONS[name] = replace(known(name), **{column: value})


def column(name: str) -> Callable[..., Callable[[Any], Any]]:
    """A decorator with which our own modules fill a column of the operations that it is given."""

    def of(*operations: str) -> Callable[[Any], Any]:
        def register(function: Any) -> Any:
            fill(name, dict.fromkeys(operations, function))
            return function

        return register

    return of


def _check_free(column: str, name: str, value: Any) -> None:
    before = getattr(known(name), column)
    if before not in (None, PACKED) and _called(before) != _called(value):
        raise ValueError(
            f"operation {name!r} is registered twice: its {column} is {_called(before)}, and here {_called(value)}; "
            "replace=True puts the new row in its place"
        )


def _called(value: Any) -> str:
    """The origin of a function; the line number distinguishes functions without a name."""
    code = getattr(value, "__code__", None)
    line = f" of line {code.co_firstlineno}" if code is not None and code.co_name == "<lambda>" else ""
    return f"{value.__module__}.{value.__qualname__}{line}" if hasattr(value, "__qualname__") else repr(value)
