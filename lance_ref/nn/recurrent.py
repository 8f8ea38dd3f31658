"""Recurrent layers: LSTM and GRU, made of linear layers that can be tuned and compressed like any other.

Each direction of each layer has two linear layers: ``ih``, which takes the whole sequence at once, and ``hh``, which
takes the state at every step. PyTorch computes an LSTM in one kernel, whose workspace is not in any account here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lance_ref import functional as F
from lance_ref.engine.tensor import Tensor
from lance_ref.nn.init import as_generator
from lance_ref.nn.layers import Dropout, Linear, Rng, positive_integers
from lance_ref.nn.module import Module

State = tuple[Tensor, ...]


class _Direction(Module):
    """One direction of one layer: ``step`` makes the next state of gates from the input and the state before."""

    gates: int

    def __init__(self, input_size: int, hidden_size: int, bias: bool, rng: Rng) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        bound = 1 / np.sqrt(hidden_size)
        self.ih = Linear(input_size, self.gates * hidden_size, bias, rng)
        self.hh = Linear(hidden_size, self.gates * hidden_size, bias, rng)
        for parameter in self.parameters():  # PyTorch draws all of them between ±1/√hidden_size
            if not parameter.is_meta:
                largest = np.float32(bound)
                parameter.data = as_generator(rng).uniform(-largest, largest, parameter.shape).astype(np.float32)

    def run(self, x: Tensor, state: State, backwards: bool) -> tuple[list[Tensor], State]:
        """Results (B, 1, H) of all steps of x (B, T, I), in its order, and the last state."""
        inputs = self.ih(x)  # (B, T, gates·H)
        results: list[Tensor] = []
        steps = range(x.shape[1])
        for t in reversed(steps) if backwards else steps:
            state = self.step(inputs[:, t], state)
            results.append(F.reshape(state[0], (x.shape[0], 1, self.hidden_size)))
        return (results[::-1] if backwards else results), state

    def step(self, x: Tensor, state: State) -> State:
        raise NotImplementedError

    def part(self, gates: Tensor, i: int) -> Tensor:
        return gates[:, i * self.hidden_size : (i + 1) * self.hidden_size]


class _LstmDirection(_Direction):
    gates = 4

    def step(self, x: Tensor, state: State) -> State:
        """i, f, g, o = gates;  c = σ(f)·c + σ(i)·tanh(g);  h = σ(o)·tanh(c)"""
        h, c = state
        gates = x + self.hh(h)
        i, f, o = (F.sigmoid(self.part(gates, n)) for n in (0, 1, 3))
        c = f * c + i * F.tanh(self.part(gates, 2))
        return o * F.tanh(c), c


class _GruDirection(_Direction):
    gates = 3

    def step(self, x: Tensor, state: State) -> State:
        """r, z = σ(gates);  n = tanh(x_n + r·h_n);  h = n + z·(h − n)"""
        (h,) = state
        before = self.hh(h)
        r, z = (F.sigmoid(self.part(x, n) + self.part(before, n)) for n in (0, 1))
        n = F.tanh(self.part(x, 2) + r * self.part(before, 2))
        return (n + z * (h - n),)


class _Recurrent(Module):
    kind: type[_Direction]
    states: int

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        rng: Rng = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.input_size, self.hidden_size, self.num_layers = positive_integers(
            name, input_size=input_size, hidden_size=hidden_size, num_layers=num_layers
        )
        self.batch_first, self.bidirectional = batch_first, bidirectional
        self.drop = Dropout(dropout, rng)
        generator = as_generator(rng)
        for layer in range(self.num_layers):
            size = self.input_size if layer == 0 else self.hidden_size * self._directions
            for suffix in ("", "_reverse")[: self._directions]:
                self.add_module(f"l{layer}{suffix}", self.kind(size, self.hidden_size, bias, generator))

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    def forward(self, x: Tensor, state: Any = None) -> Any:
        if x.ndim != 3 or x.shape[2] != self.input_size or not x.shape[1] or not x.shape[0]:
            order = "(B, T, " if self.batch_first else "(T, B, "
            raise ValueError(
                f"{type(self).__name__}: x has shape {x.shape}, expected {order}{self.input_size}) with T and B above 0"
            )
        x = x if self.batch_first else x.transpose(0, 1)  # (B, T, I)
        given = self._given(state, x)
        last: list[State] = []
        for layer in range(self.num_layers):
            if layer:
                x = self.drop(x)
            sides = []
            for backwards in (False, True)[: self._directions]:
                direction = self._modules[f"l{layer}{'_reverse' if backwards else ''}"]
                results, state = direction.run(x, tuple(s[len(last)] for s in given), backwards)
                sides.append(F.concatenate(results, 1))  # (B, T, H)
                last.append(state)
            x = F.concatenate(sides, 2) if len(sides) > 1 else sides[0]
        ends = tuple(
            F.concatenate([F.reshape(states[i], (1, *states[i].shape)) for states in last], 0)
            for i in range(self.states)
        )
        output = x if self.batch_first else x.transpose(0, 1)
        return output, ends if self.states > 1 else ends[0]

    def _given(self, state: Any, x: Tensor) -> tuple[Any, ...]:
        """The states before the first step, each (layers · directions, B, H)."""
        shape = (self.num_layers * self._directions, x.shape[0], self.hidden_size)
        if state is None:
            zeros = Tensor.meta(shape, x.dtype) if x.is_meta else Tensor(np.zeros(shape, x.dtype))
            return (zeros,) * self.states
        states = tuple(state) if self.states > 1 else (state,)
        if len(states) != self.states or any(tuple(s.shape) != shape for s in states):
            shapes = [tuple(s.shape) for s in states]
            raise ValueError(f"{type(self).__name__}: states have shapes {shapes}, expected {self.states} of {shape}")
        return states

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}"


class LSTM(_Recurrent):
    """Long short-term memory (Hochreiter and Schmidhuber 1997), with PyTorch's order of gates.

    Parameters
    ----------
    input_size, hidden_size, num_layers : int
    bias : bool
        Of both linear layers of each direction.
    batch_first : bool
        Whether inputs and results are (B, T, ...) in place of (T, B, ...).
    dropout : float
        Between the layers, while training.
    bidirectional : bool
        Whether each layer has a second direction, whose results stand behind those of the first.
    rng : numpy.random.Generator or int, optional
        Source of the initial weights.

    Notes
    -----
    ``forward(x, (h, c))`` gives ``(output, (h, c))``; the states are (layers · directions, B, H), zeros by default. The
    linear layers are ``l0.ih``, ``l0.hh``, ``l0_reverse.ih`` and so on.
    """

    kind = _LstmDirection
    states = 2


class GRU(_Recurrent):
    """Gated recurrent unit (Cho et al. 2014, arXiv 1406.1078), with PyTorch's order of gates.

    Parameters are those of :class:`LSTM`. ``forward(x, h)`` gives ``(output, h)``.
    """

    kind = _GruDirection
    states = 1
