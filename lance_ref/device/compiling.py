"""The compiler: from a network to a program that fits, with the fewest extra multiply-adds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import groupby, product
from typing import Any, NamedTuple

import numpy as np

from lance_ref.algebra.subspace import Subspace
from lance_ref.device import graph as graphs
from lance_ref.device.budget import parse_bytes, shown_bytes
from lance_ref.device.graph import Graph, UnsupportedError
from lance_ref.device.layers import Pixels
from lance_ref.device.layout import Choice, DeviceLayout, Factors, Recipe, lay_out
from lance_ref.device.program import Program
from lance_ref.device.segments import first_roles
from lance_ref.device.tiles import NotTiledError, parts_along, recomputed_macs
from lance_ref.lance.calibration import Calibration
from lance_ref.models.register import NETS
from lance_ref.nn.module import Module
from lance_ref.nn.selection import tune as choose_layers

METHODS = ("lance", "bp", "bias", "head")
UPDATES = ("image", "batch")
TRAINS = ("subspace", "weight")
FORWARDS = ("auto", "factored", "merged")


class BudgetError(ValueError):
    """Nothing that the compiler tried fits the budget; ``needed_bytes`` is the smallest arena of what it tried."""

    def __init__(self, message: str, needed_bytes: int = 0) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes


def compile(
    net: Module,
    calibration: Mapping[str, Subspace] | None = None,
    input_shape: Sequence[int] = (3, 128, 128),
    tune: str | Sequence[str] | None = None,
    update: str = "batch",
    budget: int | str | None = None,
    *,
    method: str | None = None,
    train: str = "subspace",
    forward: str = "auto",
    momentum: float = 0.0,
    preprocess: Any = None,
    poison: bool = False,
) -> Program:
    """One training step of ``net`` as a list of instructions on arrays with fixed addresses.

    Parameters
    ----------
    net : Module
        Its weights are copied. ``tune`` chooses what of it trains.
    calibration : mapping of layer path to Subspace, optional
        Fixed directions of the layers' inputs, of :func:`lance_ref.calibrate` without the batch mode. Layers that train
        and are not named keep their input as it is. Default: none.
    input_shape : tuple of int
        (C, H, W) or (features,) of one image.
    tune : str or sequence of str, optional
        As for :func:`lance_ref.tune`, which it calls. Default: what trains already.
    update : {"batch", "image"}
        Whether the gradients of the images of a step are added up, and one update follows, or the weights change after
        each image, which needs no room for gradients.
    budget : int or str, optional
        Bytes that the arena may have, such as ``"256KiB"``. The program with the fewest multiply-adds that fits is
        chosen. Default: the smallest arena whose tiles recompute at most twice the network's forward pass.
    method : {"lance", "bp", "bias", "head"}, optional
        LANCE; backpropagation with exact weights and inputs; the biases of the chosen layers; the classifier alone.
        Default: ``"lance"`` with a calibration, ``"bp"`` without.
    train : {"subspace", "weight"}
        With LANCE, whether D trains in W = W_0 + D ×₂ U, or the whole weight. Both give the same weights.
    forward : {"auto", "factored", "merged"}
        Whether the forward pass computes W_0 x + D (Uᵀ x) or (W_0 + D ×₂ U) x. Default: what takes fewer multiply-adds.
    momentum : float in [0, 1)
        Of SGD; needs room for the gradients.
    preprocess : callable, optional
        From pixels (B, H, W, C) of uint8 to the net's input; each channel by a scale and a shift. Default: that of the
        registered net whose input has this shape; pixel / 255.
    poison : bool
        Whether the program overwrites dead arrays, for tests.

    Returns
    -------
    Program

    Raises
    ------
    UnsupportedError
        If the net has an operation that cannot run, batch statistics, or the batch mode is compressed.
    BudgetError
        If the budget is too small; says what would be needed, and which arrays stand in the way.
    ValueError
        If an argument is out of range, a weight is not finite, or the calibration is of another net.
    """
    if not isinstance(net, Module):
        raise TypeError(f"net is a {type(net).__name__}, expected a lance_ref.nn.Module")
    method = method or ("bp" if calibration is None else "lance")
    for name, value, allowed in (
        ("method", method, METHODS), ("update", update, UPDATES), ("train", train, TRAINS),
        ("forward", forward, FORWARDS),
    ):  # fmt: skip
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(allowed)}")
    if isinstance(momentum, bool) or not isinstance(momentum, (int, float)) or not 0 <= momentum < 1:
        raise ValueError(f"momentum is {momentum!r}, expected a number from 0 to below 1")
    if (method == "lance") != (calibration is not None):
        came, wanted = ("none", "one") if calibration is None else ("given", "none")
        raise ValueError(f"calibration is {came}, but method {method!r} takes {wanted}")
    shape = tuple(input_shape)
    if len(shape) not in (1, 3) or any(
        isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1 for n in shape
    ):
        raise ValueError(f"input_shape is {input_shape!r}, expected (C, H, W) or (features,), positive integers")
    allowed_bytes = None if budget is None else parse_bytes(budget)
    if tune is not None or method in ("bias", "head"):
        selection = "head" if method == "head" else tune if tune is not None else _tuned(net)
        choose_layers(net, selection, parameters="bias" if method == "bias" else "all")
    if isinstance(calibration, Calibration):
        calibration.check(net)
    graph = graphs.read(net, shape)
    if graph.output not in graph.needs_gradient:
        raise ValueError("nothing that the output depends on trains, expected tune to select a layer")
    factors = _factors(graph, calibration or {})
    pixels = _pixels(net, shape, preprocess, graph)
    head = [node.conv.path for node in graph.nodes if node.conv is not None][-1]
    recipe = Recipe(factors, train == "subspace", forward, update, float(momentum), head, pixels)
    layout = choose(graph, recipe, allowed_bytes)
    return Program(graph, recipe, layout, method, allowed_bytes, poison)


def _tuned(net: Module) -> Any:
    tuning = getattr(net, "tuning", None)
    return "last:4" if tuning is None else tuning.selection


# ---- choosing -----------------------------------------------------------------------------------


def choose(graph: Graph, recipe: Recipe, budget: int | None) -> DeviceLayout:
    """The layout with the fewest recomputed multiply-adds whose arena fits the budget; without one the smallest arena.

    First tiles are chosen with the roles that keep the largest maps from existing, then each convolution's role is
    turned round where that makes the arena smaller.
    """
    best = _best(graph, recipe, first_roles(graph), budget)
    heads = dict(best.choice.heads)
    if budget is None or best.ram_bytes > budget:
        for node in heads:
            turned = {**heads, node: not heads[node]}
            try:
                other = lay_out(graph, recipe, Choice(turned, best.choice.tiled, best.choice.tile))
            except NotTiledError:
                continue
            if other.lower_bound_bytes < best.lower_bound_bytes:
                other.place()
                if other.ram_bytes < best.ram_bytes:
                    best, heads = other, turned
    if budget is not None and best.ram_bytes > budget:
        alive = sorted((a for a in best.arrays if _at_peak(best, a)), key=lambda a: -a.nbytes)[:3]
        shown = ", ".join(f"{a.name} ({shown_bytes(a.nbytes)})" for a in alive)
        raise BudgetError(
            f"budget is {shown_bytes(budget)}, but the step needs at least {shown_bytes(best.ram_bytes)}, "
            f"of which most are {shown}",
            best.ram_bytes,
        )
    return best


def _at_peak(layout: DeviceLayout, array: Any) -> bool:
    time = layout.live.index(layout.lower_bound_bytes)
    return bool(array.first <= time <= array.last)


class _Tiling(NamedTuple):
    """A choice, and what is known of it before its arrays are laid out, which takes longer."""

    recomputed: int  #: Multiply-adds.
    bound: int  #: Bytes that are alive after the tiles: its arena is no smaller.
    choice: Choice


def _best(graph: Graph, recipe: Recipe, heads: Mapping[Any, bool], budget: int | None) -> DeviceLayout:
    """Lays out and places tilings in the order in which they would be chosen, until one holds what it promises."""
    plain = lay_out(graph, recipe, Choice(heads))
    if budget is not None and plain.lower_bound_bytes <= budget:
        plain.place()
        if plain.ram_bytes <= budget:  # without tiles nothing is computed again
            return plain
    tilings = [_Tiling(0, plain.lower_bound_bytes, plain.choice), *_tilings(graph, plain)]
    known = {id(plain.choice): plain}

    def laid_out(equal: Iterable[_Tiling]) -> list[DeviceLayout]:
        for tiling in equal:
            if id(tiling.choice) not in known:
                known[id(tiling.choice)] = lay_out(graph, recipe, tiling.choice, plain.segments)
        return sorted((known[id(tiling.choice)] for tiling in equal), key=_size)

    if budget is not None:
        within = (tiling for tiling in sorted(tilings, key=_recomputed) if tiling.bound <= budget)
        for _, equal in groupby(within, key=_recomputed):
            for layout in laid_out(list(equal)):
                if layout.lower_bound_bytes <= budget:
                    layout.place()
                    if layout.ram_bytes <= budget:
                        return layout
    # No tiles at all recompute nothing, so that something is always within the limit.
    limit = math.inf if budget is not None else 2 * _forward_macs(graph)
    best: DeviceLayout | None = None
    for bound, equal in groupby(sorted(tilings, key=_bound), key=_bound):
        if best is not None and bound > best.ram_bytes:
            break
        for layout in laid_out([tiling for tiling in equal if tiling.recomputed <= limit]):
            if best is None or _size(layout) < (best.ram_bytes, best.recomputed_macs):
                layout.place()
                if best is None or (layout.ram_bytes, layout.recomputed_macs) < (best.ram_bytes, best.recomputed_macs):
                    best = layout
    assert best is not None
    return best


def _recomputed(tiling: _Tiling) -> int:
    return tiling.recomputed


def _bound(tiling: _Tiling) -> int:
    return tiling.bound


def _size(layout: DeviceLayout) -> tuple[int, int]:
    return layout.lower_bound_bytes, layout.recomputed_macs


def _forward_macs(graph: Graph) -> int:
    layers = [(node.conv, graph.shapes[node.output]) for node in graph.nodes if node.conv is not None]
    return sum(conv.weight.size * H * W for conv, (_, H, W) in layers)


def _tilings(graph: Graph, plain: DeviceLayout) -> Iterator[_Tiling]:
    """More and more segments in tiles of several sizes."""
    peak = plain.live.index(plain.lower_bound_bytes)
    for count, segment in enumerate(plain.segments, 1):
        if count <= peak:  # tiles before the peak do not change it
            continue
        bound = max(plain.live[count:])
        if bound == plain.lower_bound_bytes:
            return
        _, H, W = graph.shapes[segment.output]
        with suppress(NotTiledError):  # which is so for a tile of any size
            rows, columns = (
                {cut: parts_along(graph, plain.segments, count, axis, cut) for cut in _cuts(n)}
                for axis, n in enumerate((H, W))
            )
            for h, w in product(rows, columns):
                if (h, w) != (H, W) and not _is_narrow(h, w, W):
                    again = recomputed_macs(graph, plain.segments[:count], rows[h], columns[w])
                    yield _Tiling(again, bound, Choice(plain.choice.heads, count, (h, w)))
        if segment.trains:
            return


_PARTS, _LONGEST = (1, 2, 3, 4, 6, 8, 12, 16), 3


def _is_narrow(h: int, w: int, W: int) -> bool:
    """Whether a tile that does not span all ``W`` columns is much longer than wide, or wider: it has more halo."""
    return w < W and max(h / w, w / h) > _LONGEST


def _cuts(n: int) -> list[int]:
    """Sizes of tiles that cut n places into a few parts, the largest first."""
    return sorted({-(-n // parts) for parts in _PARTS if parts <= n}, reverse=True)


# ---- what is asked of a calibration and of pixels -------------------------------------------


def _factors(graph: Graph, calibration: Mapping[str, Subspace]) -> dict[str, Factors]:
    """The factors of every layer that trains and is calibrated, without the batch mode."""
    layers = {node.conv.path: node for node in graph.nodes if node.conv is not None}
    found: dict[str, Factors] = {}
    for path in calibration:
        if path not in graph.layers:
            raise ValueError(f"the calibration names layer {path!r}, which the net does not run")
        if path not in layers:  # nothing depends on it
            continue
        node = layers[path]
        conv = node.conv
        assert conv is not None
        if conv.weight_name is None:
            continue
        space = calibration[path]
        C, H, W = graph.shapes[node.inputs[0]]
        expected = (C * H * W,) if conv.is_linear else (C, H, W)
        if space.shape[1:] != expected:
            raise ValueError(f"layer {path!r} was calibrated with {space.shape[1:]}, but its input has {expected}")
        if space.factors[0] is not None:
            raise UnsupportedError(
                f"the calibration of layer {path!r} compresses the batch mode, but a device sees one image at a time; "
                'expected calibrate(…, modes=("channel", "height", "width")) or fewer'
            )
        if space.frame.mean is not None:
            raise UnsupportedError(f"layer {path!r} is calibrated with center=True, expected mean_free=True or neither")
        factors = space.factors[1:]
        if any(factor is not None for factor in factors):
            found[path] = (factors[0], None, None) if conv.is_linear else (factors[0], factors[1], factors[2])
    return found


def _pixels(net: Module, input_shape: tuple[int, ...], preprocess: Any, graph: Graph) -> Pixels | None:
    """Scale and shift of each channel, found by asking ``preprocess``; None for input that is no image."""
    if len(input_shape) != 3:
        return None
    C = input_shape[0]
    if preprocess is None:
        own = type(net).__module__.rpartition(".")[2]
        known = [spec for spec in NETS.values() if spec.make.__module__ == type(net).__module__ and own]
        preprocess = known[0].preprocess if known else (lambda pixels: pixels.transpose(0, 3, 1, 2) / np.float32(255))
    grey = np.arange(256, dtype=np.uint8)
    try:
        values = np.asarray(preprocess(np.broadcast_to(grey[None, :, None, None], (1, 256, 1, C)).copy()))
    except ValueError:
        if C in (1, 3):
            raise
        return None
    values = values.reshape(C, 256).astype(np.float64)
    shift, scale = values[:, 0], (values[:, 255] - values[:, 0]) / 255
    if np.abs(values - (shift[:, None] + scale[:, None] * grey)).max() > 1e-5 * max(1.0, float(np.abs(values).max())):
        raise UnsupportedError("preprocess does not give each channel by one scale and one shift")
    return Pixels(scale.astype(graph.dtype), shift.astype(graph.dtype))
