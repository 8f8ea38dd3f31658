"""What all optimisers share: the parameters, the checks before a step, and the state as arrays."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import ClassVar

import numpy as np

from lance_ref.engine.blocks import all_finite
from lance_ref.engine.ownership import alone
from lance_ref.engine.tensor import Tensor


class Optimizer:
    """Base class: a subclass names its settings and buffers and defines :meth:`update`.

    Parameters
    ----------
    params : iterable of Tensor
        The tensors to update, for instance ``net.parameters()``. A tensor without a gradient at
        the time of a step is left alone, buffers included.
    lr : float
        Learning rate, finite and at least 0. It may be assigned at any time (schedules do).

    Attributes
    ----------
    params : tuple of Tensor
        In the order given; errors and state names speak of positions in it.
    initial_lr : float
        The learning rate that it was made with.
    buffers : dict of str to list of (ndarray or None)
        ``buffers[name][position]``: what the optimiser remembers of each parameter, of its shape
        and dtype; None before the parameter's first step.
    """

    settings: ClassVar[tuple[str, ...]] = ("lr",)
    buffer_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, params: Iterable[Tensor], lr: float) -> None:
        self.params = _checked_parameters(params)
        self.lr = lr
        self.initial_lr = self.lr
        self.steps = [0] * len(self.params)  # updates that each parameter has had
        self.buffers: dict[str, list[np.ndarray | None]] = {
            name: [None] * len(self.params) for name in self.buffer_names
        }

    @property
    def lr(self) -> float:
        """Learning rate."""
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._lr = at_least("lr", value, 0)

    def zero_grad(self) -> None:
        """Forget the gradients of all parameters (``.grad`` becomes None)."""
        for parameter in self.params:
            parameter.grad = None

    def step(self) -> None:
        """Update every parameter that has a gradient; all gradients are checked before any change.

        Raises
        ------
        ValueError
            If a gradient has another shape than its parameter, or holds NaN or infinity.
        TypeError
            If a gradient or a buffer has another dtype than its parameter.
        """
        for position, parameter in enumerate(self.params):
            if parameter.grad is not None:
                self._check_gradient(position, parameter, parameter.grad)
        for position, parameter in enumerate(self.params):
            if parameter.grad is not None:
                self.steps[position] += 1
                data = parameter.data
                # In place, unless somebody holds the old values: a tape that is kept, or whoever compares.
                new = data if alone(data, others=1) else np.empty_like(data)
                self.update(position, data, parameter.grad, new)
                parameter.data = new

    def update(self, position: int, data: np.ndarray, grad: np.ndarray, new: np.ndarray) -> None:
        """Write the new values of the parameter at ``position`` into ``new``, which may be ``data`` itself.

        ``grad`` stays as it is. What an optimiser remembers is its own, and may be written over.
        """
        raise NotImplementedError

    def remembered(self, name: str, position: int) -> np.ndarray:
        """A buffer of the parameter at ``position``, zeros before its first step."""
        buffer = self.buffers[name][position]
        if buffer is None:
            buffer = self.buffers[name][position] = np.zeros_like(self.params[position].data)
        return buffer

    def _check_gradient(self, position: int, parameter: Tensor, grad: np.ndarray) -> None:
        if grad.shape != parameter.shape:
            raise ValueError(f"the {self._gradient(position)} has shape {grad.shape}")
        if grad.dtype != parameter.dtype:
            raise TypeError(f"the {self._gradient(position)} has dtype {grad.dtype}, expected {parameter.dtype}")
        if not all_finite(grad):
            bad = int(grad.size - np.isfinite(grad).sum())
            raise ValueError(
                f"the {self._gradient(position)} holds {bad} NaN or infinite value(s); no parameter was changed"
            )
        for name, buffers in self.buffers.items():
            buffer = buffers[position]
            if buffer is not None and buffer.dtype != parameter.dtype:
                raise TypeError(
                    f"{name} of parameter {position} has dtype {buffer.dtype}, but the parameter is now "
                    f"{parameter.dtype}; make the optimiser after net.to(dtype)"
                )

    def _gradient(self, position: int) -> str:
        return f"gradient of parameter {position} (of {len(self.params)}, shape {self.params[position].shape})"

    # ---- state -------------------------------------------------------------------------

    def state_dict(self) -> dict[str, np.ndarray]:
        """Settings, step counts and buffers as arrays by name, fit for ``numpy.savez``.

        ``"lr"`` and the other settings have shape (), ``"steps"`` is (number of parameters,) int64,
        and ``"<buffer>.<position>"`` has the parameter's shape. Buffers not yet made are left out.
        """
        state = {name: np.asarray(getattr(self, name), dtype=np.float64) for name in self.settings}
        state["steps"] = np.asarray(self.steps, dtype=np.int64)
        for name, buffers in self.buffers.items():
            for position, buffer in enumerate(buffers):
                if buffer is not None:
                    state[f"{name}.{position}"] = np.array(buffer)  # a copy
        return state

    def load_state_dict(self, state_dict: Mapping[str, np.ndarray]) -> None:
        """Take over what :meth:`state_dict` gave; checks everything before it changes anything.

        Raises
        ------
        KeyError
            If names are missing or unexpected.
        ValueError
            If an array has the wrong shape or is not finite, or a setting is out of range.
        """
        own = {f"{name}.{position}" for name in self.buffer_names for position in range(len(self.params))}
        required = {*self.settings, "steps"}
        missing, unexpected = sorted(required - set(state_dict)), sorted(set(state_dict) - required - own)
        if missing or unexpected:
            raise KeyError(f"state_dict does not fit {type(self).__name__}: missing {missing}, unexpected {unexpected}")
        arrays = {name: np.asarray(array) for name, array in state_dict.items()}
        for name in self.settings:
            _expect_array(name, arrays[name], ())
        _expect_array("steps", arrays["steps"], (len(self.params),))
        if (arrays["steps"] < 0).any() or (arrays["steps"] % 1).any():
            raise ValueError("state_dict['steps'] must hold whole numbers of at least 0")
        for name in sorted(own & set(arrays)):
            _expect_array(name, arrays[name], self.params[int(name.rpartition(".")[2])].shape)
        settings = {name: float(arrays[name]) for name in self.settings}
        self.check_settings(**settings)
        for name, value in settings.items():
            current = getattr(self, name)
            setattr(self, name, type(current)(value) if isinstance(current, bool) else value)
        self.steps = [int(count) for count in arrays["steps"]]
        for name in self.buffer_names:
            self.buffers[name] = [
                arrays[f"{name}.{position}"].astype(parameter.dtype) if f"{name}.{position}" in arrays else None
                for position, parameter in enumerate(self.params)
            ]

    @classmethod
    def check_settings(cls, **settings: float) -> None:
        """Raise ValueError if a setting is out of range."""
        for name, value in settings.items():
            at_least(name, value, 0)


def at_least(name: str, value: float, smallest: float) -> float:
    """``value`` as a float; ValueError unless it is finite and at least ``smallest``."""
    whole = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if whole and math.isfinite(value) and value >= smallest:
        return float(value)
    raise ValueError(f"{name} is {value!r}, expected a finite number of at least {smallest}")


def _expect_array(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"state_dict[{name!r}] has shape {array.shape}, expected {shape}")
    if array.dtype.kind not in "fiub" or not np.isfinite(array).all():
        raise ValueError(f"state_dict[{name!r}] must hold finite numbers, got dtype {array.dtype}")


def _checked_parameters(params: Iterable[Tensor]) -> tuple[Tensor, ...]:
    if isinstance(params, Tensor):
        raise TypeError("params is a single Tensor, expected an iterable of them; write [tensor]")
    parameters = tuple(params)
    if not parameters:
        raise ValueError("params is empty, expected at least one Tensor (was a generator used up?)")
    seen: set[int] = set()
    for position, parameter in enumerate(parameters):
        if not isinstance(parameter, Tensor):
            raise TypeError(f"params[{position}] is a {type(parameter).__name__}, expected a Tensor")
        if not parameter.is_leaf:
            raise ValueError(f"params[{position}] is the result of an operation, expected a leaf tensor")
        if parameter.uid in seen:
            raise ValueError(f"params[{position}] is given twice; it would be updated twice in one step")
        seen.add(parameter.uid)
    return parameters
