"""Running a network over batches and looking at what some of its layers take in."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from lance_ref.engine.autograd import no_grad
from lance_ref.engine.counting import spending_on
from lance_ref.engine.tensor import Shape, Tensor
from lance_ref.nn import Conv2d
from lance_ref.nn.module import Module
from lance_ref.nn.selection import weighted_layers
from lance_ref.stores import EXACT

See = Callable[[str, np.ndarray, bool], None]
"""Called with a layer's path, its input, and whether it has run on the same batch before."""


def run_over(
    net: Module,
    batches: Iterable[Any],
    paths: Sequence[str],
    see: See,
    progress: bool | None = False,
) -> None:
    """Run the network over all batches and show every input of these layers to ``see(path, activation, again)``.

    Evaluation mode, no gradients, no compression; the network is left as it was found. What ``see``
    multiplies is booked as calibration.

    Raises
    ------
    ValueError
        If there are no batches, a layer is not reached, or its input has the wrong number of dimensions.
    TypeError
        For batches that are not arrays.
    """
    count = 0
    seen: set[str] = set()
    of_batch: set[str] = set()
    with _listening(net, paths, see, seen, of_batch), _progress_bar(batches, progress) as advance, no_grad():
        for batch in batches:
            of_batch.clear()
            net(_inputs_of(batch, count))
            del batch  # before the next one is made
            count += 1
            advance()
    if not count:
        raise ValueError("batches is empty, expected at least one batch")
    missed = [path for path in paths if path not in seen]
    if missed:
        raise ValueError(f"layers {missed} were not reached by the network's forward pass; leave them out of layers")


@contextmanager
def _listening(net: Module, paths: Sequence[str], see: See, seen: set[str], of_batch: set[str]) -> Iterator[None]:
    """Evaluation mode, no compression, and a hook on every chosen layer; all put back at the end."""
    available = weighted_layers(net)
    training = [(module, module.training) for module in net.modules()]
    stores = [(layer, layer.store) for layer in available.values()]
    removers = []
    try:
        net.eval()
        for layer, _ in stores:
            layer.store = EXACT  # a batch size that an earlier calibration fixed is of no concern here
        for path in paths:
            removers.append(available[path].register_forward_pre_hook(_hook(path, see, seen, of_batch)))
        yield
    finally:
        for remove in removers:
            remove()
        for module, mode in training:
            module.training = mode
        for layer, store in stores:
            layer.store = store


def _hook(path: str, see: See, seen: set[str], of_batch: set[str]) -> Callable[[Module, tuple[Tensor, ...]], None]:
    def hook(layer: Module, inputs: tuple[Tensor, ...]) -> None:
        activation = inputs[0].data
        if path not in seen:
            _check_modes_of(layer, path, activation.shape)
            seen.add(path)
        with spending_on("calibration"):
            see(path, activation, path in of_batch)
        of_batch.add(path)

    return hook


def _check_modes_of(layer: Module, path: str, shape: Shape) -> None:
    expected = (4,) if isinstance(layer, Conv2d) else (2, 3)
    if len(shape) not in expected:
        names = "(B, C, H, W)" if isinstance(layer, Conv2d) else "(B, I) or (B, L, I)"
        raise ValueError(f"layer {path!r}: activation has shape {shape}, expected {names}")


def _inputs_of(batch: Any, index: int) -> np.ndarray | Tensor:
    """The network's input: the batch itself, or the first of a tuple or list."""
    inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(inputs, (np.ndarray, Tensor)):
        raise TypeError(
            f"batch {index} is a {type(batch).__name__} with inputs of type {type(inputs).__name__}, "
            "expected an array, a Tensor, or a tuple that starts with one"
        )
    return inputs


@contextmanager
def _progress_bar(batches: Iterable[Any], wanted: bool | None) -> Iterator[Callable[[], None]]:
    """A function to call after each batch."""
    if wanted is None:
        wanted = sys.stderr is not None and sys.stderr.isatty()
    if not wanted:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("calibrating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("calibrating", total=operator.length_hint(batches, 0) or None)
        yield lambda: bar.advance(task)
