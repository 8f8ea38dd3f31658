"""Training in a subspace: W = s·W_0 + D ×₂ Q, where W_0 and Q stay as they are and D trains.

Every weight gradient of LANCE is dŴ = dD ×₂ Q, with Q from the fixed factor of the layer's channels or features. So
stochastic gradient descent never leaves W_0 + D ×₂ Q, and D, its gradient and its momentum have r numbers where the
weight has C_in/g. The steps are those of LANCE on the whole weight:

* a sum of gradients (momentum, dampening, Nesterov) is the same sum of dD;
* Q has orthonormal columns, ‖dŴ‖ = ‖dD‖, so clipping is the same;
* weight decay adds λW = λs·W_0 + λD ×₂ Q to the gradient: λD to that of D, and λs to that of s, which is zero
  otherwise. So s is one more parameter of the optimiser, with a velocity of its own, and needs nothing else.

Adam divides a gradient entry by entry, and entries of D are not those of W: on D it is another method than on W.

It is LoRA (:mod:`lance_ref.nn.lora`) with B = D and a frozen A = Qᵀ that calibration found.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from lance_ref.algebra.basis import Basis
from lance_ref.functional.convolution import Update
from lance_ref.nn.init import constant_parameter, shapes_only
from lance_ref.nn.layers import Conv2d, Linear
from lance_ref.nn.module import Module
from lance_ref.nn.selection import weighted_layers


class SubspaceUpdate(Module):
    """The trained part of a layer's weight, as a module below the layer.

    Parameters
    ----------
    layer : Conv2d or Linear
    basis : Basis
        Q; must have the number of channels or features of the layer.

    Attributes
    ----------
    weight : Parameter
        D, of zeros at first: (C_out, r, k_h, k_w), (O, r), or (C_out, r, 1, 1) in directions of patches.
    decay : Parameter ()
        s, what weight decay has left of W_0: 1 at first.
    """

    def __init__(self, layer: Module, basis: Basis) -> None:
        super().__init__()
        self.basis = basis
        weight = layer.weight
        with shapes_only() if weight.is_meta else nullcontext():
            self.weight = constant_parameter(basis.update_shape(weight.shape), 0.0, weight.dtype)
            self.decay = constant_parameter((), 1.0, weight.dtype)

    def parts(self) -> Update:
        """As :func:`lance_ref.functional.conv2d` takes it."""
        return Update(self.weight, self.decay, self.basis)

    def extra_repr(self) -> str:
        return f"rank={self.basis.rank}, forward={self.basis.forward}"


def train_in_subspace(net: Module, layers: list[str], forward: str = "auto") -> list[str]:
    """Have layers train in the directions of their stores, in place of their whole weight, where that is smaller.

    Parameters
    ----------
    net : Module
        Changed in place: these layers get an ``update``, and their weights are frozen.
    layers : list of str
        Paths of layers that train, with stores that have fixed directions of channels or features.
    forward : {"auto", "merged", "factored"}
        How their output is computed (:class:`~lance_ref.algebra.basis.Basis`).

    Returns
    -------
    list of str
        Those that train in a subspace now. A layer whose update would not be smaller than its weight trains as it is:
        a depthwise one, and one of r or fewer channels a group.

    Raises
    ------
    ValueError
        If a layer is of a kind of its own, shares its weight with another one, or trains in a subspace already.
        Nothing has been changed then.
    """
    modules = weighted_layers(net)
    found: dict[str, Basis] = {}
    for path in layers:
        layer = modules[path]
        if layer.op not in (Conv2d.op, Linear.op):
            raise _of_another_kind(path, layer)
        basis = layer.store.basis(getattr(layer, "groups", 1), forward)
        if basis is None or not basis.pays(layer.weight.shape) or not layer.weight.requires_grad:
            continue
        _check(modules, path)
        found[path] = basis
    for path, basis in found.items():
        modules[path].update = SubspaceUpdate(modules[path], basis)
        modules[path].weight.requires_grad_(False)
    return list(found)


def merge(net: Module) -> list[str]:
    """Write what was learned into the weights, W_0 ← s·W_0 + D ×₂ Q, and have these train as a whole again.

    Stores stay as they are. An optimiser made before still has D and s, which are no parameters of the net any more:
    make a new one.

    Parameters
    ----------
    net : Module
        Changed in place.

    Returns
    -------
    list of str
        Paths of the layers that trained in a subspace.

    Examples
    --------
    >>> import numpy as np
    >>> from lance_ref import Subspace, nn
    >>> from lance_ref.stores import Lance
    >>> net = nn.Sequential(nn.Linear(6, 4, rng=0))
    >>> net[0].store = Lance(Subspace.random((8, 6), (None, 2), np.random.default_rng(0)))
    >>> train_in_subspace(net, ["0"])
    ['0']
    >>> [(name, p.shape) for name, p in net.named_parameters() if p.requires_grad]
    [('0.bias', (4,)), ('0.update.weight', (4, 2)), ('0.update.decay', ())]
    >>> merge(net), net[0].update
    (['0'], None)
    """
    updated = {path: layer for path, layer in weighted_layers(net).items() if layer.update is not None}
    for layer in updated.values():
        update, layer.update = layer.update, None
        if not layer.weight.is_meta:
            arrays = layer.weight.data, update.decay.data, update.weight.data
            layer.weight.data = update.basis.merged(*arrays)
        layer.weight.requires_grad_()
    return list(updated)


@contextmanager
def as_whole(net: Module) -> Iterator[None]:
    """Inside the ``with`` block, layers that train in a subspace are plain ones of the same output; then as before."""
    layers = weighted_layers(net).values()
    found = [(layer, layer.update, layer.weight.data) for layer in layers if layer.update is not None]
    merge(net)
    try:
        yield
    finally:
        for layer, update, base in found:
            layer.update, layer.weight.data = update, base
            layer.weight.requires_grad_(False)


def _of_another_kind(path: str, layer: Module) -> ValueError:
    kind = type(layer).__name__
    return ValueError(f"layer {path!r} is a {kind}, expected a Conv2d or Linear to train in a subspace")


def _check(modules: dict[str, Module], path: str) -> None:
    layer = modules[path]
    if type(layer) not in (Conv2d, Linear):
        raise _of_another_kind(path, layer)
    if layer.update is not None:
        raise ValueError(f"layer {path!r} trains in a subspace already; merge(net) first")
    tied = [other for other, module in modules.items() if module.weight is layer.weight and module is not layer]
    if tied:
        raise ValueError(
            f"layers {path!r} and {tied[0]!r} share one weight, expected a weight of its own to train in a subspace"
        )
