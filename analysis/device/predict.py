"""The prediction: what a step of one image takes on a device, from a trace, settings and the compiler's choices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from analysis.device.choices import Choices, DeviceSettings
from analysis.device.layers import layer
from analysis.device.memory import Step
from analysis.device.operations import read
from analysis.device.segments import split
from analysis.device.work import flash_bytes, macs
from lance_ref.engine.recording import OpRecord


@dataclass(frozen=True)
class DevicePrediction:
    """What a step takes.

    Attributes
    ----------
    live : tuple of int
        Bytes of RAM that are alive at each instruction.
    ram : dict of kind to bytes
        When most are alive.
    flash_bytes : int
    macs : dict of kind to int
        Multiply-adds of one image. ``forward`` has every place once, ``recomputed`` what tiles compute again.
    """

    live: tuple[int, ...]
    ram: dict[str, int]
    flash_bytes: int
    macs: dict[str, int]

    @property
    def lower_bound_bytes(self) -> int:
        """The most that is alive at once: no placing of the arrays needs less."""
        return max(self.live)


class StepTrace(NamedTuple):
    """The records of a forward pass, and the number of the value that it gives."""

    records: list[OpRecord]
    output: int


def predict(trace: StepTrace, settings: DeviceSettings, choices: Choices) -> DevicePrediction:
    """RAM, flash and multiply-adds of a step of one image.

    Parameters
    ----------
    trace : StepTrace
        Of the forward pass in training mode, with what trains chosen; of any batch.
    settings : DeviceSettings
    choices : Choices
        Those of the compiler.

    Raises
    ------
    ValueError
        If the trace has an operation that no device runs, or the choices are those of another net.
    """
    net = read(*trace)
    step = Step(net, split(net, choices.heads), settings, choices)
    blocks = step.blocks()
    live = tuple(sum(b.nbytes for b in blocks if b.first <= t <= b.last) for t in range(step.instructions))
    peak = live.index(max(live))
    ram: dict[str, int] = {}
    for block in blocks:
        if block.first <= peak <= block.last:
            ram[block.kind] = ram.get(block.kind, 0) + block.nbytes
    return DevicePrediction(live, ram, flash_bytes(step), macs(step))


def trained_bytes(trace: StepTrace, settings: DeviceSettings) -> int:
    """Bytes of the weights that train, D in place of W where D trains; without gradients."""
    net, numbers = read(*trace), 0
    for operation in net.operations:
        if operation.weights is not None:
            of = layer(net, operation, settings, is_end=True)
            numbers += of.weights.outputs if of.weights.bias_trains else 0
            if of.weights.trains:
                numbers += of.change if of.in_subspace else of.weights.size
    return numbers * net.itemsize
