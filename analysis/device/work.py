"""Multiply-adds of one image's step, by kind, from shapes; and the bytes in flash."""

from __future__ import annotations

import math
from collections import Counter

from analysis.device.layers import Layer
from analysis.device.memory import Step
from analysis.device.operations import Operation

KINDS = ("forward", "recomputed", "projection", "merge", "grad_input", "grad_weight")
"""Forward through every place once; places that several tiles compute, beyond the first time; projections of inputs
on fixed directions; D into the weights; the gradients."""


def macs(step: Step) -> dict[str, int]:
    """Multiply-adds of one image's step, by kind."""
    total: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
    for i, segment in enumerate(step.segments):
        for operation in segment.inner:
            of = step.layers.get(operation.output)
            if of is not None:
                total["forward"] += of.weights.size * _places(of)
                if i < step.choices.tiled:
                    again = step.tiles.computed(operation.output) - _places(of)
                    total["recomputed"] += of.weights.size * again
                _count_layer(total, step, operation, of)
    return dict(total)


def _count_layer(total: Counter[str], step: Step, operation: Operation, of: Layer) -> None:
    """What training adds to the forward pass of a layer, and its backward pass."""
    weights = of.weights
    reaches = operation.inputs[0] in step.net.wanted
    merged = operation.path in step.choices.merged
    D_products = of.change * _places(of)  # each number of D meets each place of the output
    features = math.prod(of.source)
    if of.has_core:
        total["projection"] += _projection(of)
    if of.in_subspace and merged:
        total["merge"] += of.change * weights.inputs * (2 if reaches else 1)
    elif of.in_subspace:
        total["forward"] += D_products
        if of.has_places_projected:  # U^T x is wanted with every place
            total["projection"] += (of.channels or 0) * features
    if reaches:
        total["grad_input"] += weights.size * _places(of)
        if of.in_subspace and not merged:
            total["grad_input"] += D_products + (of.channels or 0) * features
    if weights.trains:
        total["grad_weight"] += _weight_gradient(of)


def _places(of: Layer) -> int:
    """Places of the output."""
    return of.output[1] * of.output[2]


def _projection(of: Layer) -> int:
    """Multiply-adds of projecting the input on height, then on width, then on channels."""
    C, H, W = of.source
    if of.weights.is_linear:
        return (of.channels or 0) * C * H * W
    _, h, w = of.core
    by_height = C * H * W * h if of.height is not None else 0
    by_width = C * h * W * w if of.width is not None else 0
    return by_height + by_width + (C * h * w * of.channels if of.channels is not None else 0)


def _expansion(of: Layer) -> int:
    """Multiply-adds of expanding one map of the core over width, then over height."""
    (_, H, W), (_, h, w) = of.source, of.core
    if of.weights.is_linear:
        return 0
    return (h * w * W if of.width is not None else 0) + (h * W * H if of.height is not None else 0)


def _weight_gradient(of: Layer) -> int:
    """Equations (7) and (8): from the core, expanded over height and width; for whole weights put back on channels.

    Where an output channel reads a group of channels, each of these is put together from the core for it.
    """
    weights = of.weights
    if weights.groups > 1 or weights.channelwise:
        one = math.prod(of.core) if of.channels is not None else 0
        return weights.outputs * weights.inputs * (one + _expansion(of) + _places(of) * weights.places)
    kernel = of.kernel_of_change if of.channels is not None else weights.places
    directions = of.core[0] if of.has_core else of.source[0]
    products = weights.outputs * directions * kernel * _places(of)
    products += directions * _expansion(of) if of.has_places_projected and of.at_once else 0
    if of.channels is None or of.in_subspace:
        return products
    features = math.prod(of.source) if weights.is_linear else of.source[0]
    return products + weights.outputs * directions * kernel * features


def flash_bytes(step: Step) -> int:
    """Bytes of what never changes: frozen weights, shifts and factors of channels, directions, and the image's scale.

    A layer whose whole weight trains has it in RAM alone. With D, the weight W_0 stays in flash. Every layer has a
    shift, unless its bias trains and no batch norm adds to it.
    """
    numbers = 0
    seen: set[str] = set()
    for operation in step.net.operations:
        of = step.layers.get(operation.output)
        if of is None or operation.path in seen:
            continue
        seen.add(operation.path)
        weights = of.weights
        numbers += 0 if weights.trains and not of.in_subspace else weights.size
        numbers += weights.outputs if weights.norm or not weights.bias_trains else 0
        numbers += weights.outputs * ((weights.norm and weights.trains) + weights.scales_bias)
        if of.has_core:
            C, H, W = of.source
            features = C * H * W if weights.is_linear else C
            numbers += features * (of.channels or 0) + H * (of.height or 0) + W * (of.width or 0)
    numbers += 2 * step.net.maps[0][0] if step.settings.pixels else 0
    return numbers * step.net.itemsize
