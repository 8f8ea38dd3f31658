"""The operators and methods of :class:`~lance_ref.engine.tensor.Tensor`, as one table of functions.

The tensor lies below this package and knows none of its functions, so this package hands them over.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from lance_ref.engine.tensor import Operator, Tensor
from lance_ref.functional.elementwise import add, div, exp, log, mul, neg, pow, sqrt, sub
from lance_ref.functional.indexing import index
from lance_ref.functional.nonlinearities import relu, sigmoid, tanh
from lance_ref.functional.products import matmul
from lance_ref.functional.reductions import max, mean, sum, var
from lance_ref.functional.shaping import flatten, permute, reshape, transpose


def reflected(function: Operator) -> Operator:
    """The operator for a tensor on the right: ``2 - tensor`` is ``sub(2, tensor)``."""
    return lambda self, other: function(other, self)


def variadic(function: Operator) -> Operator:
    """``tensor.f(2, 3)`` and ``tensor.f((2, 3))`` mean the same, as in PyTorch."""

    def method(self: Tensor, *numbers: Any) -> Tensor:
        one = len(numbers) == 1 and isinstance(numbers[0], (tuple, list))
        return function(self, tuple(numbers[0]) if one else numbers)

    method.__name__, method.__doc__ = function.__name__, function.__doc__
    return method


OPERATORS: dict[str, Operator] = {
    "__add__": add,
    "__radd__": add,
    "__sub__": sub,
    "__rsub__": reflected(sub),
    "__mul__": mul,
    "__rmul__": mul,
    "__truediv__": div,
    "__rtruediv__": reflected(div),
    "__pow__": pow,
    "__neg__": neg,
    "__matmul__": matmul,
    "__rmatmul__": reflected(matmul),
    "__getitem__": index,
    "sum": sum,
    "mean": mean,
    "max": max,
    "var": var,
    "reshape": variadic(reshape),
    "view": variadic(reshape),
    "flatten": flatten,
    "permute": variadic(permute),
    "transpose": transpose,
    "exp": exp,
    "log": log,
    "sqrt": sqrt,
    "tanh": tanh,
    "sigmoid": sigmoid,
    "relu": relu,
}


def hand_over(names: Collection[str]) -> None:
    """Give :class:`~lance_ref.engine.tensor.Tensor` its operators, and the names of all functions for its messages."""
    for name, function in OPERATORS.items():
        setattr(Tensor, name, function)
    Tensor.FUNCTIONS = frozenset(names)
