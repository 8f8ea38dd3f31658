"""One seam: what a layer keeps of its input, and what of it trains.

:class:`Input` keeps the input itself, :class:`Core` its projection on fixed directions, equation (4) of LANCE. A
:class:`Layer` has the weights: frozen ones lie in flash, trained ones in the arena. With the update in the subspace,
W = W_0 + D ×₂ U, and D trains (C_out × r × k_h × k_w).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lance_ref.device.arena import Array, Memory
from lance_ref.device.arithmetic import (
    correlate,
    correlate_back,
    kernel_gradient,
    spread,
    spread_back,
)
from lance_ref.device.graph import Conv, Pair, Window
from lance_ref.device.windows import Reach, Span, reach, whole


@dataclass(frozen=True, eq=False)
class Pixels:
    """How the bytes of an image (H, W, C) become numbers (C, H, W): scale · byte + shift, one of each for a channel."""

    scale: np.ndarray
    shift: np.ndarray

    def read(self, image: np.ndarray) -> np.ndarray:
        """The numbers of a part of the image."""
        return image.transpose(2, 0, 1) * self.scale[:, None, None] + self.shift[:, None, None]


@dataclass(eq=False)
class Input:
    """The input (C, H, W) itself.

    ``array`` may be the source of a segment, which then stays alive, so that nothing is copied; if that is the image,
    ``pixels`` says how its bytes are read.
    """

    array: Array
    is_copy: bool = True
    pixels: Pixels | None = None
    scratch: tuple[Array, ...] = ()
    basis: np.ndarray | None = None

    def add(self, m: Memory, c: int, x: np.ndarray) -> None:
        """Channel ``c`` has come by."""
        if self.is_copy:
            m[self.array][c] = x

    def prepare(self, m: Memory) -> None:
        """Before the backward pass: nothing."""

    def maps(self, m: Memory) -> np.ndarray:
        """What the weight gradient is made from, one map for each direction: here the channels."""
        return m[self.array] if self.pixels is None else self.pixels.read(m[self.array])

    def channel(self, m: Memory, c: int) -> np.ndarray:
        """Channel ``c`` of what was kept."""
        kept: np.ndarray = self.maps(m)[c]
        return kept


@dataclass(eq=False)
class Core:
    """The core S = A ×₂ Uᵀ ×₃ U_hᵀ ×₄ U_wᵀ of an input, summed up channel by channel; a factor may be None.

    Attributes
    ----------
    array : Array
        (r or C, r_h or H, r_w or W); of a linear layer (r, 1, 1).
    basis : (C, h, w, r) array or None
        U, with h = w = 1 for a convolution and h, w = H, W for a linear layer.
    rows, columns : arrays or None
        U_h and U_w.
    scratch : tuple of Array
        Where height or width are compressed: room for a channel that is projected on one of them, and for all maps
        that are expanded again, if they are wanted at once.
    """

    array: Array
    basis: np.ndarray | None = None
    rows: np.ndarray | None = None
    columns: np.ndarray | None = None
    size: Pair = (1, 1)
    scratch: tuple[Array, ...] = ()
    is_expanded: bool = False

    def add(self, m: Memory, c: int, x: np.ndarray) -> None:
        """S += U[c] ⊗ (U_hᵀ x U_w), for channel ``c`` of the input."""
        core = m[self.array]
        if self.rows is not None:
            half = m.view(self.scratch[0], (self.rows.shape[1], x.shape[1]))
            m.count("projection", self.rows.size * x.shape[1])
            x = np.matmul(self.rows.T, x, out=half)
        if self.columns is not None:
            m.count("projection", self.columns.size * len(x))
            x = x @ self.columns
        if self.basis is None:
            core[c] = x
        else:
            m.count("projection", self.basis.shape[3] * x.size)
            if self.is_flat:
                core[:, 0, 0] += np.tensordot(self.basis[c], x, ((0, 1), (0, 1)))
            else:
                core += self.basis[c, 0, 0][:, None, None] * x

    @property
    def is_flat(self) -> bool:
        """Whether a direction goes through all places, as in a linear layer behind a map."""
        return self.basis is not None and self.basis.shape[1:3] != (1, 1)

    def prepare(self, m: Memory) -> None:
        """Before the backward pass: expand S over height and width, if there is room for it."""
        if self.is_expanded and self.scratch:
            out = m[self.scratch[1]]
            for r, x in enumerate(m[self.array]):
                out[r] = self._expand(m, x)

    def maps(self, m: Memory) -> np.ndarray:
        """S, expanded over height and width: one map for each direction, or for each channel without U."""
        return m[self.scratch[1]] if self.is_expanded and self.scratch else m[self.array]

    def channel(self, m: Memory, c: int) -> np.ndarray:
        """Channel ``c`` of the input as the core has it, Σ_ρ U[c, ρ] S[ρ], (H, W)."""
        core = m[self.array]
        if self.basis is None:
            return self._expand(m, core[c])
        m.count("grad_weight", core.size)
        return self._expand(m, np.tensordot(self.basis[c, 0, 0], core, 1))

    def _expand(self, m: Memory, x: np.ndarray) -> np.ndarray:
        if self.columns is not None:
            m.count("grad_weight", self.columns.size * len(x))
            x = x @ self.columns.T
        if self.rows is not None:
            m.count("grad_weight", self.rows.size * x.shape[1])
            x = self.rows @ x
        return x


@dataclass(eq=False)
class Layer:
    """A convolution or linear layer as the program runs it.

    Attributes
    ----------
    conv : Conv
    input_size, output_size : pair of int
        Of whole maps.
    keeps : Input, Core or None
        What is kept of the input; None if the weight does not train.
    weight : Array, optional
        The weight that trains, as it is in the network.
    change : Array, optional
        D, where the update stays in the subspace.
    is_merged : bool
        Whether the forward pass uses W_0 + D ×₂ U, rather than W_0 x + D (Uᵀ x).
    bias : Array, optional
        The bias that trains.
    gradients : dict of Array to Array
        For each array that trains where its gradient is added up; without an entry it is changed at once.
    projected, returned : Array, optional
        Uᵀ x, and Dᵀ g, of (r, H, W).
    """

    conv: Conv
    input_size: Pair
    output_size: Pair
    keeps: Input | Core | None = None
    weight: Array | None = None
    change: Array | None = None
    is_merged: bool = False
    bias: Array | None = None
    gradients: dict[Array, Array] = field(default_factory=dict)
    projected: Array | None = None
    returned: Array | None = None

    # ---- weights ------------------------------------------------------------------------------

    @property
    def trained(self) -> list[Array]:
        """The arrays that train."""
        return [array for array in (self.weight, self.change, self.bias) if array is not None]

    def _scaled(self, weight: np.ndarray, channels: Any) -> np.ndarray:
        scale = self.conv.weight_scale
        return weight if scale is None else weight * scale[channels].reshape(-1, *(1,) * (weight.ndim - 1))

    def changes(self, m: Memory, channels: slice = slice(None)) -> np.ndarray:
        """D of these output channels, with batch norm's factor."""
        assert self.change is not None
        return self._scaled(m[self.change][channels], channels)

    def row(self, m: Memory, o: int) -> np.ndarray:
        """The kernels (C_in/groups, k_h, k_w) of output channel ``o``."""
        one = slice(o, o + 1)
        weight = self.conv.weight[one] if self.weight is None else m[self.weight][one]
        if self.change is not None and self.is_merged:
            assert self.basis is not None
            m.count("merge", self.basis.size * math.prod(self.change.shape[2:]))
            weight = weight + np.tensordot(self.basis[:, 0, 0], m[self.change][o], 1)
        return self._scaled(weight, one)[0]

    def column(self, m: Memory, i: int) -> np.ndarray:
        """The kernels (C_out/groups, k_h, k_w) that use input channel ``i``."""
        outputs, place = self.outputs_of(i), i % self.conv.weight.shape[1]
        weight = (self.conv.weight if self.weight is None else m[self.weight])[outputs, place]
        if self.change is not None and self.is_merged:
            assert self.basis is not None
            m.count("merge", math.prod(self.change.shape))
            weight = weight + np.tensordot(m[self.change], self.basis[i, 0, 0], ((1,), (0,)))
        return self._scaled(weight, outputs)

    def outputs_of(self, i: int) -> slice:
        """The output channels that look at input channel ``i``."""
        share = len(self.conv.weight) // self.conv.groups
        group = i // self.conv.weight.shape[1]
        return slice(group * share, (group + 1) * share)

    def inputs_of(self, o: int) -> slice:
        """The input channels that output channel ``o`` looks at."""
        width = self.conv.weight.shape[1]
        group = o // (len(self.conv.weight) // self.conv.groups)
        return slice(group * width, (group + 1) * width)

    def shift(self, m: Memory, o: Any = slice(None)) -> np.ndarray:
        """What is added to output channel ``o``, or to each of them."""
        shift: np.ndarray = self.conv.shift[o]
        if self.bias is not None:
            bias = m[self.bias][o]
            shift = shift + (bias if self.conv.bias_scale is None else bias * self.conv.bias_scale[o])
        return shift

    @property
    def basis(self) -> np.ndarray | None:
        """U, if something of the input is kept in its directions."""
        return None if self.keeps is None else self.keeps.basis

    @property
    def core_window(self) -> Window:
        """The window between the maps of a core and the output."""
        return Window() if self.conv.is_linear and self.basis is not None else self.conv.window

    @property
    def is_factored(self) -> bool:
        """Whether products with D run beside those with W_0."""
        return self.change is not None and not self.is_merged

    def _reach(self) -> Reach:
        return reach(self.conv.window, whole(self.output_size), whole(self.input_size))

    def _core_reach(self) -> Reach:
        size = (1, 1) if self.core_window != self.conv.window else self.input_size
        return reach(self.core_window, whole(self.output_size), whole(size))

    # ---- forward: a head makes channels, a tail uses them up ---------------------------------

    def look(self, m: Memory, c: int, x: np.ndarray) -> None:
        """Channel ``c`` of the input has come by: keep what is kept of it, project it if D needs that."""
        if self.keeps is not None:
            self.keeps.add(m, c, x)
        if self.projected is not None:
            assert self.basis is not None
            m.count("projection", self.basis.shape[3] * x.size)
            m[self.projected][:] += self.basis[c, 0, 0][:, None, None] * x

    def make(self, m: Memory, o: int, x: np.ndarray, out: np.ndarray, output: Span, source: Span) -> None:
        """Channel ``o`` of the output from all channels of the input."""
        kernels, inputs = self.row(m, o), self.inputs_of(o)
        out[:] = self.shift(m, o)
        correlate(out, x[inputs], kernels, reach(self.conv.window, output, source))
        m.count("forward", out.size * kernels.size)
        if self.is_factored:
            D = self.changes(m, slice(o, o + 1))[0]
            correlate(out, self._projections(m), D, self._core_reach())
            m.count("forward", out.size * D.size)

    def use(self, m: Memory, i: int, x: np.ndarray, out: np.ndarray, output: Span, source: Span) -> None:
        """Add what channel ``i`` of the input gives to all channels of the output."""
        kernels, outputs = self.column(m, i), self.outputs_of(i)
        spread(out[outputs], x, kernels, reach(self.conv.window, output, source))
        m.count("forward", out[outputs].size * math.prod(kernels.shape[1:]))

    def finish(self, m: Memory, out: np.ndarray) -> None:
        """What D adds to all channels of the output, after the last channel of the input: D (Uᵀ x)."""
        if self.is_factored:
            D, S = self.changes(m), self._projections(m)
            for r in range(len(S)):
                spread(out, S[r], D[:, r], self._core_reach())
            m.count("forward", out.size * math.prod(D.shape[1:]))

    def _projections(self, m: Memory) -> np.ndarray:
        """Uᵀ x"""
        if self.projected is not None:
            return m[self.projected]
        assert self.keeps is not None
        return m[self.keeps.array]

    # ---- backward -----------------------------------------------------------------------------

    def turn(self, m: Memory, g: np.ndarray) -> None:
        """For a tail: compute Dᵀ g, before the first channel."""
        if self.is_factored:
            assert self.returned is not None
            T, D = m[self.returned], self.changes(m)
            T[:] = 0
            for r in range(len(T)):
                spread_back(T[r], g, D[:, r], self._core_reach())
            m.count("grad_input", g.size * math.prod(D.shape[1:]))

    def use_back(self, m: Memory, i: int, g: np.ndarray, gradient: np.ndarray) -> None:
        """The gradient of input channel ``i`` of a tail."""
        kernels, outputs = self.column(m, i), self.outputs_of(i)
        gradient[:] = 0
        spread_back(gradient, g[outputs], kernels, self._reach())
        m.count("grad_input", g[outputs].size * math.prod(kernels.shape[1:]))
        if self.is_factored:
            self._add_turned(m, i, gradient)

    def make_back(self, m: Memory, o: int, g: np.ndarray, gradient: np.ndarray) -> None:
        """What output channel ``o`` of a head, or of a depthwise convolution, gives to its input's gradient."""
        kernels, inputs = self.row(m, o), self.inputs_of(o)
        correlate_back(gradient[inputs], g, kernels, self._reach())
        m.count("grad_input", g.size * kernels.size)
        if self.is_factored:
            assert self.returned is not None
            D = self.changes(m, slice(o, o + 1))[0]
            correlate_back(m[self.returned], g, D, self._core_reach())
            m.count("grad_input", g.size * D.size)

    def finish_back(self, m: Memory, gradient: np.ndarray) -> None:
        """U (Dᵀ g), added to the input gradient of a head after its last channel."""
        if self.is_factored:
            for i in range(len(gradient)):
                self._add_turned(m, i, gradient[i])

    def _add_turned(self, m: Memory, i: int, gradient: np.ndarray) -> None:
        assert self.basis is not None
        assert self.returned is not None
        T = m[self.returned]
        if self.conv.is_linear:
            gradient += np.tensordot(self.basis[i], T[:, 0, 0], 1)
        else:
            gradient += np.tensordot(self.basis[i, 0, 0], T, 1)
        m.count("grad_input", T.shape[0] * gradient.size)

    # ---- what it learns -----------------------------------------------------------------------

    def learn(self, m: Memory, g: np.ndarray, outputs: slice) -> None:
        """The gradients of the weights of these output channels, from their gradient (n, H, W)."""
        if self.bias is not None:
            total = g.sum((1, 2))
            scale = self.conv.bias_scale
            self._add(m, self.bias, outputs, total if scale is None else total * scale[outputs])
        trained = self.change if self.change is not None else self.weight
        if trained is None:
            return
        assert self.keeps is not None
        places = self._core_reach()
        if self.conv.groups > 1 or self.conv.is_depthwise:
            for o in range(outputs.start, outputs.stop):
                inputs = self.inputs_of(o)
                for i in range(inputs.start, inputs.stop):
                    one = slice(o - outputs.start, o - outputs.start + 1)
                    kernel = kernel_gradient(self.keeps.channel(m, i), g[one], places)  # (1, k_h, k_w)
                    m.count("grad_weight", g[0].size * kernel.size)
                    row = slice(o, o + 1)
                    self._add(m, trained, (row, i - inputs.start), self._scaled(kernel, row))
            return
        maps = self.keeps.maps(m)
        for r in range(len(maps)):
            kernel = kernel_gradient(maps[r], g, places)  # (n, k_h, k_w)
            m.count("grad_weight", g.size * math.prod(kernel.shape[1:]))
            kernel = self._scaled(kernel, outputs)
            if self.change is not None or self.basis is None:
                self._add(m, trained, (outputs, r), kernel)
            else:  # equation (8): put back from direction r to all channels
                m.count("grad_weight", kernel.size * self.basis[..., r].size)
                self._add(m, trained, outputs, self.basis[..., r] * kernel[:, None])

    def _add(self, m: Memory, array: Array, where: Any, gradient: np.ndarray) -> None:
        """Add to the gradient of an array that trains, or, without room for that, change it at once: W −= rate · dW."""
        if array in self.gradients:
            m[self.gradients[array]][where] += gradient
        else:
            m[array][where] -= gradient.dtype.type(m.rate) * gradient
