"""Putting LANCE on the layers of a network, and taking it off again."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from lance_ref.algebra.subspace import Subspace
from lance_ref.engine.tensor import Shape
from lance_ref.nn import Convolution
from lance_ref.nn.module import Module
from lance_ref.nn.selection import learns, weighted_layers
from lance_ref.nn.subspace import merge, train_in_subspace
from lance_ref.stores import EXACT, ActivationStore, Lance

UPDATES = ("weight", "subspace")
_SHOWN = 6  # layer paths that an error lists


def compress(
    net: Module,
    calibration: Mapping[str, Subspace],
    order: str = "auto",
    layers: str | Sequence[str] | None = None,
    *,
    core_bits: int | None = None,
    batch_mode: str = "calibrated",
    batch_ratio: float | None = None,
    seed: int = 0,
    update: str = "weight",
    forward: str = "auto",
) -> list[str]:
    """Make calibrated layers keep the core of their input instead of the input.

    From the next forward pass on, each of these layers saves the projection of its activation on its
    subspace, and computes its weight gradient from that. Output and input gradient stay exact.

    Parameters
    ----------
    net : Module
        ``layer.store`` becomes a :class:`~lance_ref.stores.Lance`, in the dtype of the layer's weight.
    calibration : Calibration, or mapping of layer path to Subspace
    order : {"auto", "papers", "separable"}
        Order of contraction of a convolution's weight gradient.
    layers : glob or sequence of globs, optional
        Which of the calibrated layers; all of them by default.
    core_bits, batch_mode, batch_ratio
        As :class:`~lance_ref.stores.Lance` takes them: cores as codes, and a random sketch of the batch.
    seed : int
        Of the sketches; each layer's is drawn independently of the others'.
    update : {"weight", "subspace"}
        What trains of these layers: the weight, or D in W = W_0 + D ×₂ Q with Q from the factor of channels or
        features, where D is smaller (:mod:`lance_ref.nn.subspace`). By stochastic gradient descent both are the same
        to rounding, and gradient and optimiser state are smaller in the subspace. :func:`merge` ends it. Make the
        optimiser afterwards.
    forward : {"auto", "merged", "factored"}
        How a layer that trains in a subspace computes its output (:class:`~lance_ref.algebra.basis.Basis`).

    Returns
    -------
    list of str
        Paths of the layers that are compressed now.

    Raises
    ------
    ValueError
        If a glob matches no calibrated layer, or a layer is missing from the network or takes another
        number of channels or features than was calibrated; names the layer and both shapes. Also if a layer trains in
        a subspace already, or cannot. Nothing has been changed then.
    """
    if update not in UPDATES:
        raise ValueError(f"update is {update!r}, expected one of {', '.join(UPDATES)}")
    if forward != "auto" and update != "subspace":
        raise ValueError(f"forward is {forward!r}, but update is {update!r}, expected 'subspace'")
    paths = list(calibration) if layers is None else match_layers(layers, list(calibration), "calibrated layer")
    subspaces = {path: calibration[path] for path in paths}
    check_shapes(net, {path: subspace.shape for path, subspace in subspaces.items()})
    modules = weighted_layers(net)
    seeds = np.random.SeedSequence(seed).generate_state(len(paths))
    stores = {
        path: Lance(subspace, order, modules[path].weight.dtype, core_bits, batch_mode, batch_ratio, int(own))
        for own, (path, subspace) in zip(seeds, subspaces.items(), strict=True)
    }
    put_on(net, stores, update, forward)
    return paths


def put_on(net: Module, stores: Mapping[str, ActivationStore], update: str = "weight", forward: str = "auto") -> None:
    """Give layers their stores, and let them train as ``update`` says; after a ValueError the net is unchanged."""
    modules = weighted_layers(net)
    for path, store in stores.items():
        try:
            store.check_op(modules[path].op)
        except ValueError as error:
            raise ValueError(f"layer {path!r}: {error}") from None
    updated = [path for path in stores if modules[path].update is not None]
    if updated:
        raise ValueError(f"layer {updated[0]!r} trains in the subspace of its store; merge(net) before it gets another")
    before = {path: modules[path].store for path in stores}
    try:
        for path, store in stores.items():
            modules[path].store = store
        if update == "subspace":
            train_in_subspace(net, list(stores), forward)
    except ValueError:
        for path, store in before.items():
            modules[path].store = store
        raise


def restore(net: Module) -> list[str]:
    """Make every convolution and linear layer of ``net`` keep its whole input again.

    Returns the paths of the layers that did not.

    Layers that train in a subspace are merged (:func:`lance_ref.merge`).
    """
    merge(net)
    changed = [path for path, layer in weighted_layers(net).items() if layer.store is not EXACT]
    for layer in weighted_layers(net).values():
        layer.store = EXACT
    return changed


def attach(
    net: Module,
    make: Callable[[str, Module], ActivationStore],
    layers: str | Sequence[str] | None = None,
    update: str = "weight",
    forward: str = "auto",
) -> list[str]:
    """Give every chosen layer an activation store of its own.

    Parameters
    ----------
    net : Module
    make : callable
        ``make(path, layer)`` is the store of that layer; a new one each time, as stores remember things.
    layers : glob or sequence of globs, optional
        By default the layers that ``tune`` selected (without the head), or, for a network that was not tuned, all
        whose weight requires gradients.
    update, forward
        As for :func:`compress`.

    Returns
    -------
    list of str
        Paths of these layers.

    Raises
    ------
    ValueError
        If no layer is chosen, or a glob matches none, or two layers were given the same store, or a store does not take
        the input of such a layer. Nothing has been changed then.

    Examples
    --------
    >>> from lance_ref import nn
    >>> from lance_ref.stores import Quantized
    >>> attach(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), lambda path, layer: Quantized(8))
    ['0', '1']
    """
    modules = weighted_layers(net)
    stores = {path: make(path, modules[path]) for path in chosen_layers(net, layers)}
    for path, store in stores.items():
        if not isinstance(store, ActivationStore):
            raise TypeError(f"make returned a {type(store).__name__} for layer {path!r}, expected an ActivationStore")
    if len({id(store) for store in stores.values() if store is not EXACT}) < sum(
        s is not EXACT for s in stores.values()
    ):
        raise ValueError(f"make returned one store for several layers of {list(stores)}, expected a new one for each")
    put_on(net, stores, update, forward)
    return list(stores)


def chosen_layers(net: Module, layers: str | Sequence[str] | None) -> list[str]:
    """Paths of the layers to compress: those named, else those that train without the head, in module order."""
    available = weighted_layers(net)
    if layers is not None:
        return match_layers(layers, list(available), "convolution or linear layer")
    tuning = getattr(net, "tuning", None)
    if tuning is not None:
        chosen = [path for path in available if path in tuning.layers and learns(available[path])]
        if tuning.layers and not chosen:
            raise ValueError(
                "no weight of the tuned layers trains, only biases, so there is no activation to compress; name layers "
                "with layers=..."
            )
    else:
        chosen = [path for path, layer in available.items() if learns(layer)]
    if not chosen:
        raise ValueError(
            "net has no convolution or linear layer that trains (its head aside); name them with layers=..."
        )
    return chosen


def match_layers(layers: str | Sequence[str], available: Sequence[str], what: str) -> list[str]:
    """The paths among ``available`` that a glob matches, in their own order.

    Globs are matched against whole dotted paths; ``*`` also matches dots. ValueError if there are none, or one of them
    matches nothing; ``what`` says in it what is available.
    """
    globs = [layers] if isinstance(layers, str) else list(layers)
    if not globs:
        raise ValueError(f"layers is empty, expected globs of a {what}")
    selected: set[str] = set()
    for glob in globs:
        matches = [path for path in available if path == glob or fnmatch.fnmatchcase(path, glob)]
        if not matches:
            raise ValueError(f"layers: {glob!r} matches no {what}, expected one of {_listed(available)}")
        selected.update(matches)
    return [path for path in available if path in selected]


def features_of(layer: Module) -> int:
    """Size of the feature mode of the layer's input."""
    features: int = layer.in_channels if isinstance(layer, Convolution) else layer.in_features
    return features


def check_shapes(net: Module, shapes: Mapping[str, Shape]) -> None:
    """Raise ValueError unless ``net`` has layers at these paths that take activations of these shapes.

    Only what the weight tells is checked: the kind of the layer, and its number of channels or features.
    Batch, height and width are checked when the layer runs.
    """
    modules = weighted_layers(net)
    for path, shape in shapes.items():
        if path not in modules:
            raise ValueError(
                f"net has no convolution or linear layer {path!r}, which was calibrated with shape {shape}; "
                f"it has {_listed(list(modules))}"
            )
        layer, n = modules[path], features_of(modules[path])
        if isinstance(layer, Convolution):
            takes = ("B", n, *"DHW"[-layer.axes :])
        else:
            takes = ("B", "L", n) if len(shape) == 3 else ("B", n)
        if len(shape) != len(takes) or shape[takes.index(n)] != n:
            raise ValueError(
                f"layer {path!r} was calibrated with activations of shape {shape}, but this net's "
                f"{type(layer).__name__} with a weight of shape {layer.weight.shape} takes "
                f"({', '.join(map(str, takes))})"
            )


def _listed(paths: Iterable[str]) -> str:
    """The first few paths, and how many more there are."""
    paths = list(paths)
    text = ", ".join(map(repr, paths[:_SHOWN])) or "none"
    return text if len(paths) <= _SHOWN else f"{text} and {len(paths) - _SHOWN} more"


@contextmanager
def uncompressed(net: Module) -> Iterator[None]:
    """Every layer keeps its whole input inside the ``with`` block; afterwards each has its own store again."""
    stores = [(layer, layer.store) for layer in weighted_layers(net).values()]
    for layer, _ in stores:
        layer.store = EXACT  # a batch size that an earlier calibration fixed is of no concern inside
    try:
        yield
    finally:
        for layer, store in stores:
            layer.store = store
