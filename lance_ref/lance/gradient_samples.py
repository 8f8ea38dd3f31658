"""What the layers of a network take in, and the gradients of what they give out, on real batches.

To choose ranks or directions by their effect on the weight gradient one needs both. They are recorded where a layer
calls its activation store: while samples are taken, each layer has a store that writes down its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from lance_ref.algebra.geometry import Geometry
from lance_ref.engine.counting import spending_on
from lance_ref.engine.state import state
from lance_ref.engine.tensor import Tensor
from lance_ref.functional import cross_entropy
from lance_ref.lance.compression import chosen_layers, uncompressed
from lance_ref.nn.module import Module
from lance_ref.nn.selection import refuse_updates, weighted_layers
from lance_ref.stores import ActivationStore
from lance_ref.train.features import in_mode

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class LayerSample:
    """One call of a layer in a forward and backward pass.

    Attributes
    ----------
    activation, grad_output : array
        What the layer took in, of shape ``geometry.input_shape``, and the gradient of the loss with respect to what it
        gave out.
    geometry : ConvGeometry or LinearGeometry
        The sizes of the call; ``geometry.weight_gradient(activation, grad_output)`` is its weight gradient.
    call : int
        0 for the layer's first call in that forward pass, 1 for the second, … (Where a segment is recomputed
        in the backward pass, in the order in which it runs again.)
    """

    activation: np.ndarray
    grad_output: np.ndarray
    geometry: Geometry
    call: int = 0


def sample_gradients(
    net: Module, batches: Iterable[Any], layers: str | Sequence[str] | None = None, loss: Loss = cross_entropy
) -> dict[str, list[LayerSample]]:
    """Run the network forward and backward, and write down what each chosen layer saw.

    In evaluation mode (no dropout, running statistics as they are) and without compression. The network
    is left as it was found, also after an error: modes, stores, gradients, which parameters train.

    Parameters
    ----------
    net : Module
    batches : iterable of (inputs, targets) pairs
        Arrays or Tensors. Two copies of every sampled activation's size stay in memory: use few batches.
    layers : glob or sequence of globs, optional
        Paths of convolutions and linear layers, whether they train or not. By default the layers that ``tune``
        selected (without the head), or, for a network that was not tuned, all whose weight requires gradients.
    loss : callable
        ``loss(net(inputs), targets)`` is the scalar Tensor to differentiate.

    Returns
    -------
    dict of layer path to list of LayerSample
        In the order of the batches and, within a batch, of the calls; a call that the loss does not depend
        on has no sample.

    Raises
    ------
    ValueError
        If there are no batches, a glob matches no layer, the loss never depends on a chosen layer, or a layer trains in
        a subspace.
    TypeError
        If a batch is not a pair.
    """
    if not isinstance(net, Module):
        raise TypeError(f"net is a {type(net).__name__}, expected a lance_ref.nn.Module")
    refuse_updates(net, "sample_gradients")
    paths = chosen_layers(net, layers)
    modules = weighted_layers(net)
    samples: dict[str, list[LayerSample]] = {path: [] for path in paths}
    count = 0
    with _as_found(net):
        for batch in batches:
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise TypeError(f"batch {count} is a {type(batch).__name__}, expected a pair (inputs, targets)")
            inputs, targets = (x if isinstance(x, Tensor) else Tensor(x) for x in batch)
            notebooks = {path: _Notebook() for path in paths}
            for path, notebook in notebooks.items():  # whose weight alone asks for gradients
                modules[path].store = notebook
                modules[path].weight.requires_grad_()
                modules[path].weight.grad = None
            with spending_on("calibration"):
                value = loss(net(inputs), targets)
            if value.requires_grad:
                value.backward()
            for path, notebook in notebooks.items():  # what the backward pass came through, as the forward pass did
                samples[path] += sorted(notebook.found, key=lambda sample: sample.call)
            count += 1
    if not count:
        raise ValueError("batches is empty, expected at least one pair of inputs and targets")
    missed = [path for path, found in samples.items() if not found]
    if missed:
        raise ValueError(f"the loss does not depend on layers {missed}; leave them out of layers")
    return samples


class _Notebook(ActivationStore):
    """A store that writes down what it is given, and computes no weight gradient."""

    name = "exact"

    def __init__(self) -> None:
        self.calls = 0
        self.found: list[LayerSample] = []

    def save(self, activation: np.ndarray) -> dict[str, np.ndarray]:
        call = np.asarray(self.calls)
        self.calls += 1
        return {"activation": activation, "call": call}

    def weight_gradient(
        self, saved: Mapping[str, np.ndarray], grad_output: np.ndarray, geometry: Geometry
    ) -> np.ndarray:
        # copies: the caller's batch, and buffers of the backward pass, may be written to again
        activation, gradient = saved["activation"].copy(), grad_output.copy()
        self.found.append(LayerSample(activation, gradient, geometry, int(saved["call"])))
        return np.zeros(geometry.weight_shape, grad_output.dtype)


@contextmanager
def _as_found(net: Module) -> Iterator[None]:
    """Inside the ``with`` block: evaluation mode, nothing compressed, nothing trains, gradients on. Undone after it."""
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in net.parameters()]
    grad_enabled = state.grad_enabled
    with in_mode(net, training=False), uncompressed(net):
        try:
            state.grad_enabled = True
            for parameter, _, _ in parameters:
                parameter.requires_grad_(False)
            yield
        finally:
            state.grad_enabled = grad_enabled
            for parameter, requires_grad, grad in parameters:
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad
