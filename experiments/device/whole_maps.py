"""The arithmetic of a device program on whole maps: all channels at once, so that thousands of images run.

A :class:`~lance_ref.device.Program` goes through its maps channel by channel, to need little memory. :class:`WholeMaps`
takes the same layers, the same D in W = W_0 + D ×₂ U and the same cores, and keeps every map whole. The numbers are
those of the program to rounding; a test compares both over 50 updates.

A map of B images has shape (C, P, B), with its H·W places in one axis P. A convolution is then one product of
matrices, whatever B is: the matrix of the kernels times what each output place sees.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from lance_ref.algebra.geometry import ConvGeometry
from lance_ref.device import Program, UnsupportedError
from lance_ref.device.graph import Conv, Graph, Node
from lance_ref.device.instructions import adaptive
from lance_ref.device.layers import Layer
from lance_ref.device.windows import reach, whole

Maps = dict[int, np.ndarray]
"""Arrays (C, P, B) by the number of their map in the graph."""
Change = tuple[np.ndarray, np.ndarray]
"""An array that trains, and its gradient."""
SMALL_MAP = 64
"""Places up to which a depthwise convolution of several images is a matrix for each channel."""


class WholeMaps:
    """The network of a program, trained from the weights that the network had.

    Parameters
    ----------
    program : Program
        What trains, and which directions are kept, is taken from it. It is not run.

    Raises
    ------
    UnsupportedError
        If the network has an operation other than convolutions, linear layers, additions, ReLU, ReLU6 and adaptive
        pooling, or if a mode other than the channels is compressed.
    """

    def __init__(self, program: Program) -> None:
        graph = program.graph
        self.graph, self.dtype = graph, graph.dtype
        self._operations = {node: _operation(node, graph, program.layout.layers) for node in graph.nodes}
        self._frozen = [node for node in graph.nodes if node.output not in graph.needs_gradient]
        self._rest = [node for node in graph.nodes if node.output in graph.needs_gradient]
        made = {0, *(node.output for node in self._frozen)}
        read = {number for node in self._rest for number in node.inputs}
        self.sources = tuple(sorted(made & read))

    # ---- forward and backward -----------------------------------------------------------------

    def frozen(self, x: np.ndarray) -> Maps:
        """What the frozen operations give for some images, where an operation that is not frozen reads it.

        Parameters
        ----------
        x : (B, C, H, W) array
            Preprocessed images, or the features that the network takes in their place.
        """
        maps: Maps = {0: np.ascontiguousarray(_as_columns(x.astype(self.dtype, copy=False)))}
        for node in self._frozen:
            maps[node.output] = self._operations[node].forward(*(maps[number] for number in node.inputs))
        return {number: maps[number] for number in self.sources}

    def logits(self, sources: Mapping[int, np.ndarray]) -> np.ndarray:
        """(classes, B), from what :meth:`frozen` gave; what the backward pass needs is kept until the next call."""
        maps = dict(sources)
        for node in self._rest:
            maps[node.output] = self._operations[node].forward(*(maps[number] for number in node.inputs))
        return maps[self.graph.output][:, 0]

    def step(
        self, sources: Mapping[int, np.ndarray], labels: np.ndarray, lr: float, clip: float | None = None
    ) -> float:
        """One update with the mean gradient of these images; returns their mean loss before it.

        ``clip`` is the largest norm of the whole gradient. That of D is as long as that of W, as U is orthonormal.
        """
        z = self.logits(sources)  # (classes, B)
        B = z.shape[1]
        z = z - z.max(0)
        p = np.exp(z)
        p /= p.sum(0)
        places = np.arange(B)
        loss = float((np.log(np.exp(z).sum(0)) - z[labels, places]).mean())
        p[labels, places] -= 1
        changes: Iterable[Change] = self._backward((p / self.dtype.type(B))[:, None])
        if clip is not None:
            changes = list(changes)
            norm = math.sqrt(sum(float(np.vdot(gradient, gradient)) for _, gradient in changes))
            lr *= min(1.0, clip / (norm + 1e-6))  # as the library does it, and PyTorch
        for weight, gradient in changes:
            gradient *= self.dtype.type(lr)
            weight -= gradient
        return loss

    def _backward(self, g: np.ndarray) -> Iterator[Change]:
        """Gradients are those of the weights before the update: a layer's own comes after that of its input."""
        gradients: Maps = {self.graph.output: g}
        for node in reversed(self._rest):
            g = gradients.pop(node.output)
            operation = self._operations[node]
            for number in node.inputs:
                if number in self.graph.needs_gradient:
                    given = operation.backward(g)
                    gradients[number] = gradients[number] + given if number in gradients else given
            yield from operation.learn(g)

    # ---- what was learned ---------------------------------------------------------------------

    def weights(self) -> dict[str, np.ndarray]:
        """The parameters that train by their dotted names, with D merged, as :meth:`Program.weights` gives them."""
        found: dict[str, np.ndarray] = {}
        for node, operation in self._operations.items():
            if node.conv is not None:
                found |= operation.trained()
        return found

    def is_finite(self) -> bool:
        """Whether every weight that trains is a finite number."""
        return all(np.isfinite(value).all() for value in self.weights().values())


def _as_columns(x: np.ndarray) -> np.ndarray:
    """(B, C, H, W) or (B, features) as (C, P, B)."""
    B, C = x.shape[:2]
    return x.reshape(B, C, -1).transpose(1, 2, 0)


# ---- operations ---------------------------------------------------------------------------------


def _operation(node: Node, graph: Graph, layers: Mapping[str, Layer]) -> Any:
    (_, H, W), (_, H_out, W_out) = graph.shapes[node.inputs[0]], graph.shapes[node.output]
    sizes = (H, W), (H_out, W_out)
    if node.conv is not None:
        layer = layers.get(node.conv.path) or Layer(node.conv, *sizes)  # the program lists those that train
        return (_Depthwise if node.conv.is_depthwise else _Dense)(layer, _Gather(node.conv, *sizes))
    if node.op in _SIMPLE:
        return _SIMPLE[node.op]()
    if node.op == "adaptive_pool":
        return _AdaptivePool(*sizes, graph.dtype)
    raise UnsupportedError(f"operation {node.op!r} of layer {node.path!r} cannot run on whole maps here")


class _Stateless:
    """An operation without weights."""

    def learn(self, g: np.ndarray) -> Iterator[Change]:
        """There is nothing to learn."""
        yield from ()


class _Add(_Stateless):
    def forward(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a + b

    def backward(self, g: np.ndarray) -> np.ndarray:
        return g


class _ReLU(_Stateless):
    def forward(self, x: np.ndarray) -> np.ndarray:
        self.mask = x > 0
        return np.maximum(x, 0)

    def backward(self, g: np.ndarray) -> np.ndarray:
        return g * self.mask


class _ReLU6(_Stateless):
    def forward(self, x: np.ndarray) -> np.ndarray:
        self.mask = (x > 0) & (x < 6)
        return x.clip(0, 6)

    def backward(self, g: np.ndarray) -> np.ndarray:
        return g * self.mask


class _AdaptivePool(_Stateless):
    """Averages, as one matrix (P_out, P_in) for all channels."""

    def __init__(self, source: tuple[int, int], output: tuple[int, int], dtype: Any) -> None:
        rows, columns = (
            np.array([[float(i in range(n)[window]) for i in range(n)] for window in adaptive(n, m)])
            for n, m in zip(source, output, strict=True)
        )
        matrix = np.kron(rows, columns)
        self.matrix = (matrix / matrix.sum(1, keepdims=True)).astype(dtype)

    def forward(self, x: np.ndarray) -> np.ndarray:
        return self.matrix @ x

    def backward(self, g: np.ndarray) -> np.ndarray:
        return self.matrix.T @ g


_SIMPLE: dict[str, Any] = {"add": _Add, "relu": _ReLU, "relu6": _ReLU6}


class _Gather:
    """Which place of the input each place of the output sees, for every tap of the kernel.

    Attributes
    ----------
    seen : (taps, P_out) integers
        A place of the input; the number of places stands for padding, where there is a zero.
    seen_by : (taps, P_in) integers
        The other way round, for input gradients.
    is_plain : bool
        Whether every place sees itself alone, as with a kernel of one.
    """

    def __init__(self, conv: Conv, source: tuple[int, int], output: tuple[int, int]) -> None:
        self.source, self.output = source, output
        P_in, P_out = math.prod(source), math.prod(output)
        places_in, places_out = np.arange(P_in).reshape(source), np.arange(P_out).reshape(output)
        taps = reach(conv.window, whole(output), whole(source)).taps
        self.seen = np.full((len(taps), P_out), P_in)
        self.seen_by = np.full((len(taps), P_in), P_out)
        for tap, (_, _, written, read) in enumerate(taps):
            self.seen[tap, places_out[written].ravel()] = places_in[read].ravel()
            self.seen_by[tap, places_in[read].ravel()] = places_out[written].ravel()
        self.is_plain = len(taps) == 1 and P_in == P_out and bool((self.seen[0] == np.arange(P_in)).all())

    def geometry(self, conv: Conv, images: int) -> ConvGeometry:
        """The sizes of the library's convolution for this number of images."""
        kernel, window = conv.weight.shape[2:], conv.window
        (top, bottom), (left, right) = (
            (before, max(0, (m - 1) * stride + dilation * (k - 1) + 1 - n - before))
            for before, m, n, stride, dilation, k in zip(
                window.before, self.output, self.source, window.stride, window.dilation, kernel, strict=True
            )
        )
        C_in = conv.weight.shape[1] * conv.groups
        padding = ((top, bottom), (left, right))
        shapes = (images, C_in, *self.source), conv.weight.shape
        return ConvGeometry(*shapes, window.stride, padding, window.dilation, conv.groups)

    def columns(self, x: np.ndarray) -> np.ndarray:
        """(C, taps, P_out, B) of a map (C, P_in, B)."""
        return x[:, None] if self.is_plain else _padded(x)[:, self.seen]

    def summed_back(self, g: np.ndarray) -> np.ndarray:
        """The transpose of :meth:`columns`: (C, taps, P_out, B) to (C, P_in, B)."""
        if self.is_plain:
            return g[:, 0]
        return sum(_padded(g[:, tap])[:, places] for tap, places in enumerate(self.seen_by))  # type: ignore[return-value]


def _padded(x: np.ndarray) -> np.ndarray:
    """A place of zeros behind the others."""
    return np.concatenate([x, np.zeros_like(x[:, :1])], axis=1)


class _Weighted:
    """A layer with weights, what of it trains, and U if it keeps a core."""

    def __init__(self, layer: Layer, gather: _Gather) -> None:
        conv = self.conv = layer.conv
        self.gather = gather
        self.shift = conv.shift.copy()
        self.bias = None if conv.bias is None else conv.bias.copy()
        keeps = layer.keeps
        if keeps is not None and (
            getattr(keeps, "rows", None) is not None or getattr(keeps, "columns", None) is not None
        ):
            raise UnsupportedError(f"layer {conv.path!r} compresses height or width, expected the channels alone")
        self.U: np.ndarray | None = None  # (C, r)
        if layer.basis is not None:
            if conv.is_linear or (conv.groups > 1 and not conv.is_depthwise):
                raise UnsupportedError(f"layer {conv.path!r} is linear or has groups, expected no core of its input")
            self.U = layer.basis.reshape(len(layer.basis), -1)
        if conv.groups > 1 and not conv.is_depthwise:
            raise UnsupportedError(f"layer {conv.path!r} has {conv.groups} groups, expected 1 or depthwise")
        self.in_subspace = layer.change is not None

    def _shifted(self, out: np.ndarray) -> np.ndarray:
        """The output with bias and shift, in place."""
        shift = self.shift
        if self.bias is not None:
            scale = self.conv.bias_scale
            shift = shift + (self.bias if scale is None else self.bias * scale)
        out += shift[:, None, None]
        return out

    def learn(self, g: np.ndarray) -> Iterator[Change]:
        """What of the layer trains, with its gradient, from the gradient of the output."""
        if self.bias is not None:
            total, scale = g.sum((1, 2)), self.conv.bias_scale
            yield self.bias, total if scale is None else total * scale
        if self.conv.weight_name is not None:
            yield self._learned(g)

    def _learned(self, g: np.ndarray) -> Change:
        raise NotImplementedError

    def _scaled(self, weight: np.ndarray) -> np.ndarray:
        """Batch norm's factor for each output channel, where the weight trains."""
        scale = self.conv.weight_scale
        return weight if scale is None else weight * scale.reshape(-1, *(1,) * (weight.ndim - 1))

    def _named(self, weight: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        if self.conv.weight_name is not None:
            yield self.conv.weight_name, weight.reshape(len(weight), -1) if self.conv.is_linear else weight
        if self.conv.bias_name is not None:
            assert self.bias is not None
            yield self.conv.bias_name, self.bias


class _Dense(_Weighted):
    """A convolution over all channels, or a linear layer: with D it is W_0 x + D (Uᵀ x)."""

    def __init__(self, layer: Layer, gather: _Gather) -> None:
        super().__init__(layer, gather)
        shape = self.conv.weight.shape
        self.W = self.conv.weight.reshape(shape[0], -1).copy()  # (C_out, C·taps)
        self.taps = math.prod(shape[2:])
        self.D: np.ndarray | None = None  # (C_out, r·taps)
        if self.in_subspace:
            assert self.U is not None
            self.D = np.zeros((shape[0], self.U.shape[1] * self.taps), self.W.dtype)

    def forward(self, x: np.ndarray) -> np.ndarray:
        self.x_shape = x.shape
        seen = self.gather.columns(x)  # (C, taps, P, B)
        out_shape = (len(self.W), *seen.shape[2:])
        columns = seen.reshape(self.W.shape[1], -1)
        out = self._scaled(self.W) @ columns
        if self.U is not None:
            core = (self.U.T @ x.reshape(len(x), -1)).reshape(-1, *x.shape[1:])  # equation (4)
            columns = self.gather.columns(core).reshape(self.U.shape[1] * self.taps, -1)
            if self.D is not None:
                out += self._scaled(self.D) @ columns
        self.kept = columns
        return self._shifted(out.reshape(out_shape))

    def backward(self, g: np.ndarray) -> np.ndarray:
        flat = g.reshape(len(g), -1)
        C, _, B = self.x_shape
        seen = (-1, self.taps, *g.shape[1:])
        gradient = self.gather.summed_back((self._scaled(self.W).T @ flat).reshape(seen))
        if self.D is not None:
            assert self.U is not None
            returned = self.gather.summed_back((self._scaled(self.D).T @ flat).reshape(seen))  # Dᵀ g
            gradient = gradient + (self.U @ returned.reshape(len(returned), -1)).reshape(C, -1, B)
        return gradient

    def _learned(self, g: np.ndarray) -> Change:
        kernel = self._scaled(g.reshape(len(g), -1) @ self.kept.T)
        if self.D is not None:
            return self.D, kernel
        return self.W, kernel if self.U is None else self._expanded(kernel).reshape(self.W.shape)

    def _expanded(self, D: np.ndarray) -> np.ndarray:
        """D ×₂ U as (C_out, C, taps), equation (8)."""
        assert self.U is not None
        whole_kernel: np.ndarray = np.einsum("cr,ort->oct", self.U, D.reshape(len(D), -1, self.taps))
        return whole_kernel

    def trained(self) -> dict[str, np.ndarray]:
        W = self.W if self.D is None else self.W + self._expanded(self.D).reshape(self.W.shape)
        return dict(self._named(W.reshape(self.conv.weight.shape)))


class _Depthwise(_Weighted):
    """A convolution of each channel alone; a core stands for the input in its kernel's gradient.

    For several images a small map is quickest as one matrix (P_out, P_in) for each channel, which the images share.
    Otherwise it is the library's convolution.
    """

    def __init__(self, layer: Layer, gather: _Gather) -> None:
        super().__init__(layer, gather)
        if self.in_subspace:
            raise UnsupportedError(f"depthwise layer {self.conv.path!r} trains in the subspace, expected its kernel")
        self.W = self.conv.weight.copy()  # (C, 1, k_h, k_w)
        P_out, P_in = gather.seen.shape[1], gather.seen_by.shape[1]
        self.is_small = max(P_out, P_in) <= SMALL_MAP
        # 1 where the output place sees the input place through this tap; padding is cut off
        places = gather.seen[..., None] == np.arange(P_in)
        self.through = places.reshape(-1, P_out * P_in).astype(self.W.dtype) if self.is_small else None

    def _matrices(self) -> np.ndarray:
        """(C, P_out, P_in)"""
        assert self.through is not None
        kernels = self._scaled(self.W).reshape(len(self.W), -1)
        return (kernels @ self.through).reshape(len(self.W), self.gather.seen.shape[1], -1)

    def _maps(self, x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """(C, P, B) as (B, C, H, W)."""
        return x.transpose(2, 0, 1).reshape(x.shape[2], x.shape[0], *size)

    def forward(self, x: np.ndarray) -> np.ndarray:
        self.x_shape = x.shape
        self.in_matrices = self.is_small and x.shape[2] > 1
        self.kept = x if self.U is None else self.U.T @ x.reshape(len(x), -1)
        if self.in_matrices:
            return self._shifted(self._matrices() @ x)
        self.geometry = self.gather.geometry(self.conv, x.shape[2])
        out = self.geometry.forward(self._maps(x, self.gather.source), self._scaled(self.W))
        return self._shifted(_as_columns(out))

    def backward(self, g: np.ndarray) -> np.ndarray:
        if self.in_matrices:
            return self._matrices().transpose(0, 2, 1) @ g
        return _as_columns(self.geometry.input_gradient(self._scaled(self.W), self._maps(g, self.gather.output)))

    def _learned(self, g: np.ndarray) -> Change:
        x = self.kept if self.U is None else (self.U @ self.kept).reshape(self.x_shape)
        if self.in_matrices:
            assert self.through is not None
            kernel = ((g @ x.transpose(0, 2, 1)).reshape(len(g), -1) @ self.through.T).reshape(self.W.shape)
        else:
            maps = self._maps(x, self.gather.source), self._maps(g, self.gather.output)
            kernel = self.geometry.weight_gradient(*maps)
        return self.W, self._scaled(kernel)

    def trained(self) -> dict[str, np.ndarray]:
        return dict(self._named(self.W))
