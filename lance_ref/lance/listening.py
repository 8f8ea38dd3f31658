"""Running a network over batches and looking at what some of its layers take in."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from lance_ref.engine.autograd import no_grad
from lance_ref.engine.counting import spending_on
from lance_ref.engine.tensor import Tensor
from lance_ref.io.progress import progress_bar
from lance_ref.lance.compression import uncompressed
from lance_ref.nn import Convolution
from lance_ref.nn.module import Module
from lance_ref.nn.selection import weighted_layers
from lance_ref.train.features import in_mode

See = Callable[[str, np.ndarray, bool], None]
"""Called with a layer's path, its input, and whether it has run on the same batch before."""


def run_over(
    net: Module, batches: Iterable[Any], paths: Sequence[str], see: See, progress: bool | None = False
) -> None:
    """Run the network over all batches and show every input of these layers to ``see(path, activation, again)``.

    Evaluation mode, no gradients, no compression; the network is left as it was found. What ``see``
    multiplies is booked as calibration. ValueError if there are no batches, a layer is not reached, or its input has
    the wrong number of dimensions; TypeError for batches that are not arrays.
    """
    count = 0
    seen: set[str] = set()
    of_batch: set[str] = set()
    modules = weighted_layers(net)
    bar = progress_bar("calibrating", operator.length_hint(batches, 0) or None, progress)
    with in_mode(net, training=False), uncompressed(net), no_grad(), bar as advance, ExitStack() as hooks:
        for path in paths:
            hooks.callback(modules[path].register_forward_pre_hook(_hook(path, see, seen, of_batch)))
        for batch in batches:
            of_batch.clear()
            inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
            if not isinstance(inputs, (np.ndarray, Tensor)):
                raise TypeError(
                    f"batch {count} is a {type(batch).__name__} with inputs of type {type(inputs).__name__}, "
                    "expected an array, a Tensor, or a tuple that starts with one"
                )
            net(inputs)
            del batch, inputs  # before the next one is made
            count += 1
            advance(1, "")
    if not count:
        raise ValueError("batches is empty, expected at least one batch")
    missed = [path for path in paths if path not in seen]
    if missed:
        raise ValueError(f"layers {missed} were not reached by the network's forward pass; leave them out of layers")


def _hook(path: str, see: See, seen: set[str], of_batch: set[str]) -> Callable[[Module, tuple[Tensor, ...]], None]:
    def hook(layer: Module, inputs: tuple[Tensor, ...]) -> None:
        activation = inputs[0].data
        if path not in seen:
            names = "(B, I) or (B, L, I)"
            dimensions: tuple[int, ...] = (2, 3)
            if isinstance(layer, Convolution):
                names, dimensions = f"(B, C, {', '.join('DHW'[-layer.axes :])})", (2 + layer.axes,)
            if activation.ndim not in dimensions:
                raise ValueError(f"layer {path!r}: activation has shape {activation.shape}, expected {names}")
            seen.add(path)
        with spending_on("calibration"):
            see(path, activation, path in of_batch)
        of_batch.add(path)

    return hook
