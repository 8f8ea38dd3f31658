"""A tensor whose values are not computed yet."""

from __future__ import annotations

from typing import Any

import numpy as np

from lance_ref.engine.state import Postponement
from lance_ref.engine.tensor import Shape, Tensor, Version, next_uid

_slot: Any = Tensor.__dict__["_data"]  # where a tensor keeps its array, and this one what will give it


class Promise:
    """Which result of which deferral a tensor waits for."""

    __slots__ = ("deferral", "index")

    def __init__(self, deferral: Postponement, index: int) -> None:
        self.deferral = deferral
        self.index = index


class Pending(Tensor):
    """A tensor that computes itself when somebody looks at it, and is a plain :class:`Tensor` from then on."""

    __slots__ = ()

    @staticmethod
    def make(promise: Promise, shape: Shape, dtype: np.dtype, version: Version | None) -> Pending:
        """A pending tensor; ``version``: that of the tensor which it is a view of."""
        tensor = Pending.__new__(Pending)
        _slot.__set__(tensor, promise)
        tensor._shape, tensor._dtype, tensor._node, tensor.grad = shape, dtype, None, None
        tensor._version = Version() if version is None else version
        tensor.requires_grad, tensor.uid, tensor.of_parameter = False, next_uid(), False
        return tensor

    @property
    def _data(self) -> np.ndarray:
        promise = _slot.__get__(self)
        promise.deferral.compute()
        return self._data  # now that of a Tensor

    @_data.setter
    def _data(self, array: np.ndarray) -> None:
        _slot.__set__(self, array)
        self.__class__ = Tensor  # type: ignore[assignment]

    @property
    def is_meta(self) -> bool:
        return False


def promise_of(tensor: Tensor) -> Promise | None:
    """What a tensor waits for; None if it waits for nothing."""
    return _slot.__get__(tensor) if type(tensor) is Pending else None
